"""Training procedures: the one training loop, its evaluation, and what builds on them."""

from .callbacks import Callback, TrainState
from .decompose_finetune import decompose_finetune
from .distillation import Distillation, distillation_loss, divergence
from .evaluate import Accuracy, evaluate
from .exchange import exchange
from .gated import GatedNetwork, RankSelection
from .l0 import L0, l0
from .lowrank_sparse import LowRankSparseResult, finalize, lowrank_sparse
from .mars import Mars, mars
from .normalization import recalibrate_batchnorm
from .nrmf import nrmf
from .nuclear_norm import NuclearNorm, trace_norm, true_nuclear
from .posttraining import posttraining
from .progressive import Progressive, progressive
from .pruning import GlobalPruner, GradualPruning
from .reinforce import Reinforce, reinforce
from .result import RecipeResult
from .settings import Epoch, TrainResult
from .sparse_start import parts_of
from .sparsity import slow_start, zhu_gupta
from .task import Batch, ImageTask, Task
from .text_tasks import LanguageTask, SentenceTask, TranslationTask
from .train import finetune, train
from .uniform import uniform

__all__ = [
    "L0",
    "Accuracy",
    "Batch",
    "Callback",
    "Distillation",
    "Epoch",
    "GatedNetwork",
    "GlobalPruner",
    "GradualPruning",
    "ImageTask",
    "LanguageTask",
    "LowRankSparseResult",
    "Mars",
    "NuclearNorm",
    "Progressive",
    "RankSelection",
    "RecipeResult",
    "Reinforce",
    "SentenceTask",
    "Task",
    "TrainResult",
    "TrainState",
    "TranslationTask",
    "decompose_finetune",
    "distillation_loss",
    "divergence",
    "evaluate",
    "exchange",
    "finalize",
    "finetune",
    "l0",
    "lowrank_sparse",
    "mars",
    "nrmf",
    "parts_of",
    "posttraining",
    "progressive",
    "recalibrate_batchnorm",
    "reinforce",
    "slow_start",
    "trace_norm",
    "train",
    "true_nuclear",
    "uniform",
    "zhu_gupta",
]
