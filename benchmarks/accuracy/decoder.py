"""The small pretrained decoder, compressed: perplexity against size, before and after learning from itself.

``python -m benchmarks.accuracy.decoder --data DIR --json benchmarks/results/decoder.json``

DIR holds ``weights/tinystories260k`` and ``text/tinystories_sample.txt``. All linear layers of attention and
MLP store a share of their weights, by SVD, in tensor trains and as low rank plus sparse (half of the share
each); embedding and logits, which are one matrix, stay dense. The text this network was trained on is not
here: the dense network writes stories itself, and the compressed ones learn to say what it would.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy.experiment import Experiment, Row, add_arguments, checked, drive
from tensorcomp_ext import compress, data, models, recipes
from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.data.llama_tokenizer import BEGIN
from tensorcomp_ext.ranks import Ratio
from tensorcomp_ext.recipes.lowrank_sparse import layers_of, stored

SHARES = (0.9, 0.75, 0.5, 0.35)
LAYERS = "layers.*"
LEARNING: dict[str, Any] = {"stories": 256, "tokens": 160, "epochs": 12, "lr": 2e-3, "batch_size": 16}
"""Of what the dense network writes, and of learning from it."""


def rows() -> list[Row]:
    """The dense network, then every way at every size."""
    found = [Row("dense", "tinystories", 0)]
    for share in SHARES:
        found += [
            Row(method, "tinystories", 0, {"share": share}) for method in ("svd", "tt", "lowrank-sparse")
        ]
    return found


def stories(root: Path) -> list[torch.Tensor]:
    """The tokens of each story, [1, T]."""
    tokenizer = data.LlamaTokenizer(root / "weights" / "tinystories260k" / "tokenizer.bin")
    text = (root / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    parts = (part.strip() for part in text.split("<|endoftext|>"))
    return [torch.tensor([tokenizer.encode(part)]) for part in parts if part]


@torch.inference_mode()
def counted(model: nn.Module, texts: list[torch.Tensor]) -> tuple[float, int, int]:
    """Perplexity, tokens that were the likeliest, and tokens."""
    loss, correct, total = 0.0, 0, 0
    for text in texts:
        logits, labels = model(text[:, :-1])[0], text[0, 1:]
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return math.exp(loss / total), correct, total


@torch.inference_mode()
def written(dense: nn.Module, config: dict[str, Any]) -> torch.Tensor:
    """Stories of the dense network, drawn token by token as likely as it says: int64 [stories * tokens]."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(config["stories"] // 64):
        text = torch.full((64, 1), BEGIN)
        while text.shape[1] < config["tokens"]:
            likely = dense(text)[:, -1].softmax(1)
            text = torch.cat([text, torch.multinomial(likely, 1, generator=generator)], 1)
        parts.append(text)
    return torch.cat(parts).flatten()


def sparse(dense: nn.Module, share: float) -> nn.Module:
    """Half of the share in factors by SVD, half in the largest entries of what these leave."""
    exclude = [n for n, m in dense.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    exclude = [name for name in exclude if not name.startswith("layers.")]
    made = recipes.parts_of(dense, low_rank="svd", fraction=share / 2, exclude=exclude).model
    found = stored(made)
    pruner = recipes.GlobalPruner(made)
    pruner.prune(1.0 - (share * found["weights"] - found["low_rank"]) / pruner.numel)
    return made


def run(row: Row, checkpoint: Path, *, root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One row: the network, compressed, read to, taught, and read to again."""
    dense = models.load_decoder(root / "weights" / "tinystories260k" / "tinystories260k.pt").eval()
    texts = stories(root)
    model: nn.Module = dense
    if row.method == "lowrank-sparse":
        model = sparse(dense, row.options["share"])
    elif row.method != "dense":
        rank = {LAYERS: Ratio(row.options["share"])}
        model = compress(dense, format=row.method, rank=rank).model
    before, correct, total = counted(model.eval(), texts)
    found: dict[str, Any] = {"perplexity": before}
    if row.method != "dense":
        task = own_stories(dense, config, checkpoint.parent / "stories.pt")
        options = {name: config[name] for name in ("epochs", "lr", "batch_size")}
        recipes.train(
            model,
            task,
            optimizer="adam",
            schedule="cosine",
            weight_decay=0.0,
            callbacks=[recipes.Distillation(dense, alpha=0.0, temperature=1.0)],
            checkpoint=checkpoint,
            **options,
        )
        model = recipes.finalize(model).eval()
        found["perplexity_finetuned"], correct, total = counted(model, texts)
    count = count_parameters(dense) if row.method == "dense" else stored_in(model)
    return {
        "test": {"correct": correct, "total": total},
        **found,
        "parameters": count,
        "ratio": count_parameters(dense) / count,
    }


def own_stories(dense: nn.Module, config: dict[str, Any], path: Path) -> recipes.LanguageTask:
    """What the dense network has written, kept in a file for the rows that follow."""
    if not path.exists():
        torch.save(written(dense, config), path)
    tokens = torch.load(path, weights_only=True)
    vocabulary = data.Vocabulary([str(number) for number in range(508)])
    text = data.TextDataset("own stories", tokens, tokens[:0], vocabulary)
    return recipes.LanguageTask(text, window=config["tokens"])


def stored_in(model: nn.Module) -> int:
    """Weights, entries of sparse parts without their places."""
    layers = layers_of(model).values()
    inside = {id(p) for m in layers for p in m.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return dense + sum(m.weight.counted for m in layers)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    options = checked(parser, arguments)
    config = {"network": "Decoder", "weights": "tinystories260k", "layers": LAYERS, **LEARNING}
    task = partial(run, root=options.data, config=config)
    return drive(Experiment("rank_selection", "decoder", config, rows(), task), options)


if __name__ == "__main__":
    sys.exit(main())
