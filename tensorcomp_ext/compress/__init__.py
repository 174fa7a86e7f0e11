"""Compress a trained network: layer surgery, the report of it, latencies, and saving and loading."""

from tensorcomp_ext.compress.checkpoint import CheckpointError, Header
from tensorcomp_ext.compress.fold import FoldError, FoldReport, fold
from tensorcomp_ext.compress.latency import Latency, measure_network
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.report import LayerReport, Report
from tensorcomp_ext.compress.storage import load, read_header, save
from tensorcomp_ext.compress.surgery import CompressionResult, compress

__all__ = [
    "CheckpointError",
    "CompressionResult",
    "FoldError",
    "FoldReport",
    "Header",
    "Latency",
    "LayerReport",
    "Report",
    "compress",
    "fold",
    "load",
    "measure_network",
    "read_header",
    "refresh",
    "save",
]
