"""Training procedures: the one training loop, its evaluation, and what builds on them."""

from .callbacks import Callback, TrainState
from .evaluate import Accuracy, evaluate, recalibrate_batchnorm
from .settings import Epoch, TrainResult
from .train import finetune, train

__all__ = [
    "Accuracy",
    "Callback",
    "Epoch",
    "TrainResult",
    "TrainState",
    "evaluate",
    "finetune",
    "recalibrate_batchnorm",
    "train",
]
