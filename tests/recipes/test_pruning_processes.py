"""Pruning in several processes: the masks of the first are those of all, and so are its errors."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from pruned_networks import scores, sparse_network, weights

from tensorcomp_ext.recipes import GlobalPruner


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run_both(worker, *arguments):
    """Two processes of the same program, which gets the folder of these tests and its rank first."""
    commands = [
        [sys.executable, "-c", worker, os.path.dirname(__file__), str(r), *arguments] for r in range(2)
    ]
    running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()


WORKER = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from pruned_networks import sparse_network, weights
    from tensorcomp_ext.recipes import GlobalPruner, slow_start

    torch.set_num_threads(1)
    rank, folder = int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(sparse_network(sys.argv[4]), find_unused_parameters=False)
    pruner = GlobalPruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(rank)
    for t in range(1, 5):
        if rank:  # even where processes have drifted apart, their masks do not
            with torch.no_grad():
                for weight in weights(model):
                    weight.sparse.add_(0.1 * torch.randn_like(weight.sparse))
        pruner.prune(slow_start(t, 4, 0.9))
        for _ in range(3):
            x, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    gradients = [p.grad for p in model.parameters()]
    torch.save({"masks": pruner.state_dict()["masks"], "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
""")


@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_two_processes_have_the_same_masks(tmp_path, mode):
    run_both(WORKER, str(tmp_path), mode)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert list(first["masks"]) == list(second["masks"])
    assert same(first["masks"].values(), second["masks"].values())
    assert same(first["gradients"], second["gradients"])
    model = sparse_network(mode)
    pruner = GlobalPruner(model)
    pruner.load_state_dict({"masks": {n.removeprefix("module."): m for n, m in first["masks"].items()}})
    assert pruner.masked == round(0.9 * pruner.numel)
    assert sum(scores(w)[~w.kept].numel() for w in weights(model)) == pruner.masked


BROKEN = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from pruned_networks import sparse_network, weights
    from tensorcomp_ext.recipes import GlobalPruner

    rank, folder = int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = sparse_network()
    pruner = GlobalPruner(model)
    if rank == 0 and sys.argv[4] == "nan":
        weights(model)[0].sparse.data.fill_(float("nan"))
    elif rank == 0:
        pruner._scores = lambda name: torch.empty(1 << 60)
    try:
        pruner.prune(0.5)
    except (ValueError, RuntimeError) as error:
        open(f"{folder}/{rank}.txt", "w").write(f"{type(error).__name__} {error}")
    dist.destroy_process_group()
""")


@pytest.mark.parametrize("reason", ["nan", "memory"])
def test_nobody_waits_for_a_process_that_cannot_decide(tmp_path, reason):
    run_both(BROKEN, str(tmp_path), reason)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    deciding = "GlobalPruner: the process that decides"
    if reason == "nan":
        assert first == "ValueError GlobalPruner: the sparse part of 0.weight has NaN or Inf"
        assert second == f"ValueError {deciding} has NaN or Inf in a sparse part"
    else:
        assert first.startswith("RuntimeError") and "memory" in first
        assert second == f"RuntimeError {deciding} failed; its own message says why"
