"""Training in two processes: the steps of one process with the whole batch."""

import os
import subprocess
import sys
import textwrap

import torch
from test_loop import linear

from tensorcomp_ext import recipes

WORKER = textwrap.dedent("""
    import os
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from small_images import quadrants
    from test_loop import linear, Narrow
    from tensorcomp_ext import recipes

    torch.set_num_threads(1)
    rank, folder = int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = linear(seed=1 + rank)  # the first process's weights are those of all
    if sys.argv[4] == "sharded":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        model = linear(seed=1)
        fully_shard(model, mesh=mesh)
    options = {"epochs": 3, "lr": 0.05, "batch_size": 32, "accumulate": int(sys.argv[5])}
    marks = []

    class Mark(recipes.Callback):
        def on_step(self, state):
            marks.append(float(state.model.mark))
            state.model.mark.fill_(rank + 1)

    class Blocked(recipes.Callback):
        def on_epoch(self, state):  # there is no place for the checkpoint any more
            if rank == 0 and state.epoch == 1:
                os.unlink(f"{folder}/c.pt")
                os.mkdir(f"{folder}/c.pt")

    callbacks = {"narrow": [Narrow()], "blocked": [Blocked()]}.get(sys.argv[4], [])
    if sys.argv[4] == "mark":
        model.register_buffer("mark", torch.zeros(()))
        callbacks = [Mark()]
    logs = {} if sys.argv[4] == "sharded" else {"checkpoint": f"{folder}/c.pt", "logs": f"{folder}/logs"}
    try:
        history = recipes.train(
            model, quadrants(), test_each_epoch=sys.argv[4] != "sharded",
            callbacks=callbacks, **logs, **options,
        ).history
    except (OSError, RuntimeError) as error:
        torch.save(f"{type(error).__name__}: {error}", f"{folder}/{rank}.pt")
        dist.destroy_process_group()
        raise SystemExit from None
    state = model.state_dict()
    if sys.argv[4] == "sharded":
        state = {name: value.full_tensor() for name, value in state.items()}
    found = {"state": state, "loss": [e.loss for e in history], "train": [list(e.train) for e in history]}
    found["marks"] = marks
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
""")


def run_both(folder, kind, accumulate=1):
    here = os.path.dirname(__file__)
    commands = [
        [sys.executable, "-c", WORKER, here, str(r), str(folder), kind, str(accumulate)] for r in range(2)
    ]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def alone(dataset, callbacks=()):
    model = linear(seed=1)
    options = {"epochs": 3, "lr": 0.05, "batch_size": 32}
    return model, recipes.train(model, dataset, callbacks=callbacks, **options).history


def check(found, model, history):
    for name, value in model.state_dict().items():
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
        torch.testing.assert_close(found[0]["state"][name], value, rtol=1e-4, atol=1e-6)
    for process in found:
        assert process["train"] == [list(e.train) for e in history]
        torch.testing.assert_close(
            torch.tensor(process["loss"]), torch.tensor([e.loss for e in history]), rtol=1e-5, atol=0
        )


def test_two_processes_make_the_steps_of_one(dataset, tmp_path):
    found = run_both(tmp_path, "plain", accumulate=2)
    check(found, *alone(dataset))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.pt", "1.pt", "c.pt", "logs"]


def test_shapes_change_in_two_processes(dataset, tmp_path):
    from test_loop import Narrow

    found = run_both(tmp_path, "narrow")
    assert found[0]["state"]["1.weight"].shape == (6, 64)
    check(found, *alone(dataset, [Narrow()]))


def test_buffers_are_those_of_the_first_process_once_an_epoch(tmp_path):
    """Not at every call, where dense weights that fade would be sent too."""
    first, second = run_both(tmp_path, "mark")
    assert first["marks"] == [0.0] + 14 * [1.0]
    assert second["marks"] == [0.0, 2.0, 2.0, 2.0, 2.0] + 2 * [1.0, 2.0, 2.0, 2.0, 2.0]
    assert first["state"]["mark"] == second["state"]["mark"] == 1.0


def test_nobody_waits_for_a_checkpoint_that_cannot_be_written(tmp_path):
    first, second = run_both(tmp_path, "blocked")
    assert first.startswith("IsADirectoryError") and "c.pt" in first
    assert second == "RuntimeError: the first process failed; its own message says why"


def test_a_sharded_model_trains(dataset, tmp_path):
    found = run_both(tmp_path, "sharded")
    check(found, *alone(dataset))
