"""Training procedures: the one training loop, its evaluation, and what builds on them."""

from .callbacks import Callback, TrainState
from .distillation import Distillation, distillation_loss, divergence
from .evaluate import Accuracy, evaluate, recalibrate_batchnorm
from .lowrank_sparse import LowRankSparseResult, finalize, lowrank_sparse
from .pruning import GlobalPruner, GradualPruning
from .settings import Epoch, TrainResult
from .sparse_start import parts_of
from .sparsity import slow_start, zhu_gupta
from .train import finetune, train

__all__ = [
    "Accuracy",
    "Callback",
    "Distillation",
    "Epoch",
    "GlobalPruner",
    "GradualPruning",
    "LowRankSparseResult",
    "TrainResult",
    "TrainState",
    "distillation_loss",
    "divergence",
    "evaluate",
    "finalize",
    "finetune",
    "lowrank_sparse",
    "parts_of",
    "recalibrate_batchnorm",
    "slow_start",
    "train",
    "zhu_gupta",
]
