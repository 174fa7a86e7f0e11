"""The networks of the experiments, with the parameter counts of the papers they come from."""

from .decoder import Decoder, load_decoder
from .deit import DeiT
from .efficientnet import EfficientNetB0
from .imagenet_resnet import ResNet18
from .lenet import LeNet5
from .mlp import MLP
from .mobilenet import MobileNetV3
from .registry import build, image_channels, image_size, names
from .resnet import CifarResNet
from .sentiment import SentimentLSTM
from .transformer import GatedMLP, ViTBlock
from .translation import Translator
from .vgg import VGG16
from .weights import load_weights

__all__ = [
    "MLP",
    "VGG16",
    "CifarResNet",
    "Decoder",
    "DeiT",
    "EfficientNetB0",
    "GatedMLP",
    "LeNet5",
    "MobileNetV3",
    "ResNet18",
    "SentimentLSTM",
    "Translator",
    "ViTBlock",
    "build",
    "image_channels",
    "image_size",
    "load_decoder",
    "load_weights",
    "names",
]
