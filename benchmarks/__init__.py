"""Benchmarks of the repository; the measuring core is ``tensorcomp_ext.bench``."""
