"""Accuracy reproductions on real data and published weights."""
