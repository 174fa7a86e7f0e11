"""Readers of the experiments' data: images (MNIST format, CIFAR binary versions, SVHN, digits) and text."""

from .dataset import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD, Dataset
from .llama_tokenizer import LlamaTokenizer
from .load import load, names
from .load_text import load_text, text_names
from .sequences import Sequences, batches_by_length
from .text import SentenceDataset, TextDataset, TranslationDataset
from .vocabulary import Vocabulary

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Dataset",
    "LlamaTokenizer",
    "SentenceDataset",
    "Sequences",
    "TextDataset",
    "TranslationDataset",
    "Vocabulary",
    "batches_by_length",
    "load",
    "load_text",
    "names",
    "text_names",
]
