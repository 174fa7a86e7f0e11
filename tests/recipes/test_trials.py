"""Networks that are not for the data are refused before any work, by asking them about a few examples."""

import dataclasses

import pytest
import torch
from small_texts import sentences, text, translations
from test_prepare import network
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.models import SentimentLSTM
from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.nn.gates import attach_gates
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate


def wide_images(dataset):
    """The same images, one column wider."""
    wider = {
        f"{split}_images": torch.nn.functional.pad(dataset.split(split)[0], (0, 1))
        for split in ("train", "test")
    }
    return dataclasses.replace(dataset, **wider)


FEW = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
UNREAD = r"cannot read .*quadrants.*, \[1, 8, 9\] each: mat1 and mat2"
FEWER = r"must answer \[N, classes\] with the 4 classes or more that quadrants has, got \[\d+, 3\]"
RECIPES = {
    "train": recipes.train,
    "posttraining": recipes.posttraining,
    "decompose_finetune": recipes.decompose_finetune,
    "nrmf": recipes.nrmf,
    "progressive": recipes.progressive,
    "lowrank_sparse": recipes.lowrank_sparse,
    "l0": recipes.l0,
    "uniform": recipes.uniform,
}


@pytest.mark.parametrize("name", RECIPES)
def test_networks_that_are_not_for_the_images_are_refused(dataset, nothing_begun, name):
    epochs = {"epochs": 1, **({"finetune_epochs": 1} if name == "nrmf" else {})}
    with pytest.raises(ValueError, match=f"{name}: the network {UNREAD}"):
        RECIPES[name](network(), wide_images(dataset), **epochs)
    with pytest.raises(ValueError, match=f"{name}: the network {FEWER}"):
        RECIPES[name](FEW, dataset, **epochs)


def test_evaluation_says_which_images_a_network_cannot_read(dataset):
    with pytest.raises(ValueError, match=f"evaluate: the network {UNREAD}"):
        recipes.evaluate(network(), wide_images(dataset))
    with pytest.raises(ValueError, match=f"evaluate: the network {FEWER}"):
        recipes.evaluate(FEW, dataset)


class Running(nn.Module):
    """Answers each token by itself."""

    def __init__(self, vocabulary, classes):
        super().__init__()
        self.table, self.out = nn.Embedding(vocabulary, 4), nn.Linear(4, classes)

    def forward(self, tokens):
        return self.out(self.table(tokens))


class Pairs(Running):
    def forward(self, source, target):
        return super().forward(target) + super().forward(source).mean(1, keepdim=True)


def lstm(vocabulary, classes):
    return SentimentLSTM(vocabulary, classes, dim=8, hidden=8)


# A network for each, and the least vocabulary and number of classes that will do.
TEXTS = {
    "sentences": (recipes.SentenceTask(sentences()), lstm, 30, 4),
    "pairs": (recipes.TranslationTask(translations(), bleu=False), Pairs, 26, 26),
    "groups of pairs": (recipes.TranslationTask(translations(), tokens=20, bleu=False), Pairs, 26, 26),
    "running": (recipes.LanguageTask(text(), window=16), Running, 9, 9),
}


@pytest.mark.parametrize("name", TEXTS)
def test_networks_that_know_too_few_tokens_or_classes_are_refused(name):
    task, build, words, classes = TEXTS[name]
    task.check("train", build(words, classes))
    with pytest.raises(ValueError, match=r"train: the network cannot read what .*index out of range"):
        recipes.train(build(words - 1, classes), task, epochs=1, batch_size=1)
    with pytest.raises(ValueError, match=rf"with the {classes} classes or more that {task.name} has, got \["):
        recipes.train(build(words, classes - 1), task, epochs=1, batch_size=1)


def test_a_trial_changes_neither_modes_nor_random_numbers(dataset):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 4))
    model[1].eval()
    state = torch.get_rng_state()
    recipes.ImageTask(dataset).check("train", model)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model[2].num_batches_tracked) == 0


def test_a_trial_leaves_nothing_prepared(dataset):
    """A copy of the weights for inference would stay in memory throughout training."""
    model = nn.Sequential(nn.Flatten(), FactorizedLinear(64, 32, rank=4, format="tt"), nn.Linear(32, 4))
    gates = attach_gates(model[1], GaussianGate(), torch.Generator())
    with torch.no_grad():
        model.eval()(torch.zeros(2, 1, 8, 8))
    assert model[1]._prepared is not None and gates._kept is not None
    recipes.ImageTask(dataset).check("train", model.train())
    assert model[1]._prepared is None and gates._kept is None


def test_a_network_of_two_inputs_is_refused(dataset):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, a, b):
            return self.layer(a + b)

    with pytest.raises(ValueError, match=r"train: the network cannot read what quadrants holds, .* 'b'"):
        recipes.train(Two(), dataset, epochs=1)


def test_what_trains_only_later_is_refused_at_once(dataset, nothing_begun):
    with pytest.raises(ValueError, match=f"nrmf: the network {UNREAD}"):
        recipes.nrmf(network(), wide_images(dataset), epochs=0, finetune_epochs=1)
    with pytest.raises(ValueError, match=f"posttraining: the network {UNREAD}"):
        recipes.posttraining(network(), wide_images(dataset), epochs=0)
