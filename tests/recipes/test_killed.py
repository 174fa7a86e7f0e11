"""Runs that are killed outright: what is resumed ends as if nothing had happened, masks and all."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from tensorcomp_ext.recipes.checkpoint import read_checkpoint

WORKER = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from small_images import quadrants
    from torch import nn
    from tensorcomp_ext import recipes
    from tensorcomp_ext.recipes.lowrank_sparse import layers_of

    torch.set_num_threads(1)
    mode, checkpoint, step, result = sys.argv[2:]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Killed(recipes.Callback):
        def on_step(self, state):
            if str(state.step) == step:
                die()

    class Masks(recipes.Callback):
        \"\"\"Those of the last step, before the weights are packed.\"\"\"

        def on_step(self, state):
            self.found = {n: m.weight.mask.clone() for n, m in layers_of(state.model).items()}

    if step == "write":  # in the midst of the third checkpoint, its file not yet in place
        replace, left = os.replace, [2]
        def replaced(*paths):
            left[0] -= 1
            return replace(*paths) if left[0] >= 0 else die()
        os.replace = replaced
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Flatten(),
        nn.Linear(384, 24), nn.ReLU(), nn.Linear(24, 4),
    )
    masks = Masks()
    made = recipes.lowrank_sparse(
        model, quadrants(), mode=mode, epochs=4, lr=0.02, batch_size=32, sparsity=0.9,
        callbacks=[masks, Killed()], checkpoint=checkpoint,
    )
    torch.save({"masks": masks.found, "state": made.model.state_dict()}, result)
""")


def run(mode, checkpoint, step, result):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", WORKER, here, mode, str(checkpoint), step, str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody killed, by mode."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for mode in ("additive", "masking"):
        code, errors = run(mode, folder / f"{mode}.ckpt", "-", folder / f"{mode}.pt")
        assert code == 0, errors
        found[mode] = torch.load(folder / f"{mode}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("mode,moment", [("additive", "7"), ("masking", "14"), ("masking", "write")])
def test_killed_and_resumed(whole, tmp_path, mode, moment):
    """In the second epoch, in the third, and while the third checkpoint is written."""
    checkpoint, result = tmp_path / "run.ckpt", tmp_path / "result.pt"
    code, errors = run(mode, checkpoint, moment, result)
    assert code == -signal.SIGKILL and not result.exists(), errors
    epochs = {"7": 1, "14": 2, "write": 2}[moment]
    assert len(read_checkpoint(checkpoint)["history"]) == epochs
    code, errors = run(mode, checkpoint, "-", result)
    assert code == 0, errors
    resumed = torch.load(result, weights_only=True)
    for part in ("masks", "state"):
        assert list(resumed[part]) == list(whole[mode][part])
        assert all(torch.equal(tensor, whole[mode][part][name]) for name, tensor in resumed[part].items())
    kept = sum(
        int(bits.bitwise_and(1 << b).ne(0).sum()) for bits in resumed["masks"].values() for b in range(8)
    )
    numel = 54 + 54 + 384 * 24
    assert kept == numel - round(0.9 * numel)
