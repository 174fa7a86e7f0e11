"""The networks of the experiments, with the parameter counts of the papers they come from."""

from .lenet import LeNet5
from .registry import build, names
from .resnet import CifarResNet
from .vgg import VGG16
from .weights import load_weights

__all__ = ["VGG16", "CifarResNet", "LeNet5", "build", "load_weights", "names"]
