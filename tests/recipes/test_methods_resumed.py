"""Progressive Tucker and NRMF stopped, killed and resumed, and in two processes."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from method_networks import copied, same_state, small_network
from stopping import StopAt
from test_pruning_processes import run_both

from tensorcomp_ext.recipes import progressive
from tensorcomp_ext.recipes.checkpoint import read_checkpoint

OPTIONS = {"epochs": 5, "batch_size": 32, "lr": 0.01, "target": 0.2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "lora", "optimizer": "adam", "lr": 0.002},
        {"channels_last": True, "rank_every": 2, "decay": "linear", "share": 0.7},
        {"share": 1.0, "augment": True, "accumulate": 2},
    ],
    ids=["sgd", "adam", "channels-last", "whole-time"],
)
def test_stopped_at_any_epoch(dataset, tmp_path, options):
    """Between cuts of ranks, while the dense branch fades, and where it is gone."""
    model = small_network()
    chosen = {**OPTIONS, **options}
    whole = progressive(model, dataset, **chosen, callbacks=[StopAt(-1)])
    for step in (7, 13, 24):
        checkpoint = tmp_path / f"{step}.ckpt"
        with pytest.raises(KeyboardInterrupt):
            progressive(model, dataset, **chosen, checkpoint=checkpoint, callbacks=[StopAt(step)])
        assert len(read_checkpoint(checkpoint)["history"]) == step // 5
        again = progressive(model, dataset, **chosen, checkpoint=checkpoint, callbacks=[StopAt(-1)])
        assert same_state(copied(again.model), copied(whole.model)), step
        assert [e.extra for e in again.history] == [e.extra for e in whole.history]
        assert again.report.details == whole.report.details
    # What is finished is not trained again.
    done = progressive(model, dataset, **chosen, checkpoint=checkpoint, callbacks=[StopAt(0)])
    assert same_state(copied(done.model), copied(whole.model))
    for other in ({"target": 0.3}, {"init": "lora" if "init" not in options else "residual"}, {"start": 1.5}):
        with pytest.raises(ValueError, match="other settings"):
            progressive(model, dataset, **{**chosen, **other}, checkpoint=checkpoint, callbacks=[StopAt(-1)])


WORKER = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from method_networks import small_network
    from small_images import quadrants
    from tensorcomp_ext import recipes

    torch.set_num_threads(1)
    checkpoint, step, result = sys.argv[2:]

    class Killed(recipes.Callback):
        def on_step(self, state):
            if str(state.step) == step:
                os.kill(os.getpid(), signal.SIGKILL)

    made = recipes.progressive(
        small_network(), quadrants(), epochs=5, batch_size=32, lr=0.01, target=0.2,
        checkpoint=checkpoint, callbacks=[Killed()],
    )
    torch.save(made.model.state_dict(), result)
""")


def test_killed(dataset, tmp_path):
    def run(step, result):
        command = [sys.executable, "-c", WORKER, os.path.dirname(__file__), str(tmp_path / "run.ckpt"), step]
        return subprocess.run([*command, str(tmp_path / result)], capture_output=True, text=True, timeout=180)

    done = run("17", "none.pt")
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = run("-", "resumed.pt")
    assert done.returncode == 0, done.stderr
    whole = progressive(small_network(), dataset, **OPTIONS, callbacks=[StopAt(-1)])
    assert same_state(torch.load(tmp_path / "resumed.pt", weights_only=True), copied(whole.model))


TOGETHER = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from method_networks import small_network
    from small_images import quadrants
    from tensorcomp_ext import recipes

    torch.set_num_threads(1)
    rank, folder, recipe = int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = small_network()
    if rank:  # a process with weights of its own takes the ranks and the weights of the first
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    options = {"batch_size": 32, "lr": 0.02, "checkpoint": f"{folder}/run.ckpt"}
    if recipe == "progressive":
        made = recipes.progressive(model, quadrants(), epochs=3, target=0.2, **options)
    else:
        made = recipes.nrmf(model, quadrants(), epochs=2, finetune_epochs=1, alpha=0.3, p=0.8, **options)
    ranks = made.report.details[recipe]["ranks"]
    torch.save({"ranks": ranks, "state": made.model.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
""")


@pytest.mark.parametrize("recipe", ["progressive", "nrmf"])
def test_two_processes_have_the_same_ranks(tmp_path, recipe):
    run_both(TOGETHER, str(tmp_path), recipe)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["ranks"] == second["ranks"] and any(first["ranks"].values())
    assert same_state(first["state"], second["state"])


BROKEN = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from torch import nn
    from tensorcomp_ext.nn import FactorizedLinear
    from tensorcomp_ext.recipes.adaptive_ranks import cut_to

    rank, folder = int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(FactorizedLinear(8, 8, rank=5))
    if rank == 0:
        model[0].weight.a.data.fill_(float("nan"))
    try:
        cut_to(model, {"0": model[0]}, 40)
    except (ValueError, RuntimeError) as error:
        open(f"{folder}/{rank}.txt", "w").write(f"{type(error).__name__} {error}")
    dist.destroy_process_group()
""")


def test_nobody_waits_for_a_process_that_cannot_decide(tmp_path):
    run_both(BROKEN, str(tmp_path))
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == "ValueError Orthogonal: the factors of svd must be finite, got NaN or Inf"
    assert second == "RuntimeError the first process failed; its own message says why"
