"""The networks of the experiments, with the parameter counts of the papers they come from."""

from .deit import DeiT
from .efficientnet import EfficientNetB0
from .imagenet_resnet import ResNet18
from .lenet import LeNet5
from .mobilenet import MobileNetV3
from .registry import build, image_size, names
from .resnet import CifarResNet
from .transformer import GatedMLP, ViTBlock
from .vgg import VGG16
from .weights import load_weights

__all__ = [
    "VGG16",
    "CifarResNet",
    "DeiT",
    "EfficientNetB0",
    "GatedMLP",
    "LeNet5",
    "MobileNetV3",
    "ResNet18",
    "ViTBlock",
    "build",
    "image_size",
    "load_weights",
    "names",
]
