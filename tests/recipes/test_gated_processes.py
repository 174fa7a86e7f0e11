"""Rank selection in two processes: the same gates, cuts and ranks in both, those of the first."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

WORKER = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from gated_networks import LAYERS, dense_network
    from small_images import quadrants
    from tensorcomp_ext import recipes

    torch.set_num_threads(1)
    rank, folder = int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    sent, broadcast = [], dist.broadcast
    dist.broadcast = lambda *args, **options: (sent.append(1), broadcast(*args, **options))[1]

    class Watch(recipes.Callback):
        def __init__(self):
            self.sizes, self.sent = [], []

        def on_batch(self, state):
            sent.clear()

        def on_step(self, state):
            self.sent.append(len(sent))
            layers = [m for m in state.model.modules() if hasattr(m, "bonds")]
            self.sizes.append([str(m.rank) for m in layers])

    class Drift(recipes.Callback):  # even where processes have drifted apart, their cuts do not
        def on_step(self, state):
            if rank and state.step % 4 == 2:
                for name, parameter in state.model.named_parameters():
                    if name.endswith("gates.location"):
                        parameter.data.add_(0.2 * torch.randn_like(parameter))

    methods = {
        "l0": {"weight": 5.0, "gate_lr": 12.0, "target": 14.0},
        "reinforce": {"samples": 2, "gate_lr": 3.0},
        "mars": {"logit": 0.0},
        "mars-target": {"target": 8.0, "gate_lr": 20.0, "epochs": 5},
    }
    for name, own in methods.items():
        watch = Watch()
        options = {"format": LAYERS, "layers": list(LAYERS), "rank": 5, "epochs": 3, "batch_size": 32}
        options |= {"lr": 0.02, "remove_every": 3, "callbacks": [Drift(), watch], **own}
        recipe = getattr(recipes, name.partition("-")[0])
        small, report, history = recipe(dense_network(seed=rank), quadrants(), **options)
        found = {"state": small.state_dict(), "sizes": watch.sizes, "details": report.details}
        found |= {"sent": watch.sent, "frozen": [e.extra["frozen"] for e in history]}
        torch.save(found, f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()
""")


METHODS = ("l0", "reinforce", "mars", "mars-target")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes leave of a run of each method."""
    folder, here = tmp_path_factory.mktemp("processes"), os.path.dirname(__file__)
    commands = [[sys.executable, "-c", WORKER, here, str(r), str(folder)] for r in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_same_ranks(folder, name):
    first, second = (torch.load(folder / f"{name}{r}.pt", weights_only=True) for r in range(2))
    assert first["sizes"] == second["sizes"]
    assert first["details"] == second["details"]
    assert list(first["state"]) == list(second["state"])
    for key, value in first["state"].items():
        assert value.shape == second["state"][key].shape
        torch.testing.assert_close(value, second["state"][key], rtol=1e-5, atol=1e-6)
    if name in ("l0", "mars-target"):
        assert first["sizes"][0] != first["sizes"][-1]
        assert first["details"][name.partition("-")[0]]["frozen"] and not first["frozen"][0]
    # A flag from the first process a step tells all of them whether ranks are frozen, where gates decide it.
    steps = [sent for step, sent in enumerate(first["sent"]) if (step + 1) % 3]
    assert first["sent"] == second["sent"]
    assert set(steps) <= ({0, 1, 3} if name == "l0" else {0})
    assert steps[0] == (name == "l0") and steps.count(3) <= 1
