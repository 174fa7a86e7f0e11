"""The networks of the experiments, with the parameter counts of the papers they come from."""

from .imagenet_resnet import ResNet18
from .lenet import LeNet5
from .registry import build, names
from .resnet import CifarResNet
from .transformer import GatedMLP, ViTBlock
from .vgg import VGG16
from .weights import load_weights

__all__ = [
    "VGG16",
    "CifarResNet",
    "GatedMLP",
    "LeNet5",
    "ResNet18",
    "ViTBlock",
    "build",
    "load_weights",
    "names",
]
