from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compress_networks import SmallNet, same_state, small_net, state
from safetensors import safe_open
from torch import nn

from tensorcomp_ext.compress import CheckpointError, compress, load, read_header, save
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear, FadingDense
from tensorcomp_ext.nn.gates import attach_gates, fold_gates
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to")

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


@pytest.fixture
def saved(tmp_path):
    model, report = compress(small_net(), rank=4, example_inputs=X)
    path = tmp_path / "net.safetensors"
    save(model, path, report=report, meta={"model": {"name": "small"}})
    return model, path


def test_round_trip_is_bitwise(saved):
    model, path = saved
    fresh = SmallNet().eval()
    back = load(path, fresh)
    assert back is fresh and type(back.stem) is FactorizedConv2d and type(back.head) is FactorizedLinear
    assert same_state(state(model), back.state_dict())
    with torch.no_grad():
        assert torch.equal(back(X), model(X))


def test_loading_into_a_factorised_model(saved):
    model, path = saved
    other = compress(small_net(seed=3), rank=4).model
    layer = other.stem
    assert load(path, other).stem is layer and same_state(state(model), other.state_dict())
    ranks_differ = compress(small_net(seed=3), rank=3).model
    assert same_state(state(model), load(path, ranks_differ).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_the_file_wins(tmp_path, dtype):
    model = compress(small_net(dtype=dtype), rank=4).model
    save(model, tmp_path / "net")
    fresh = SmallNet().eval()
    names = {name for name, _ in fresh.norm.named_buffers()}
    load(tmp_path / "net", fresh)
    assert same_state(state(model), fresh.state_dict())
    assert fresh.norm.running_mean.dtype == dtype and names == {
        name for name, _ in fresh.norm.named_buffers()
    }
    assert fresh.norm.num_batches_tracked.dtype == torch.int64
    fresh(X.to(dtype))


def test_mode_hooks_and_trainability_of_the_target_stay(saved):
    _, path = saved
    fresh = SmallNet()
    fresh.head.eval()
    fresh.stem.weight.requires_grad_(False)
    seen = []
    fresh.stem.register_forward_hook(lambda *_: seen.append(1))
    load(path, fresh)
    assert fresh.stem.training and not fresh.head.training
    assert not any(p.requires_grad for p in fresh.stem.weight.parameters())
    fresh(X).sum().backward()
    assert seen == [1]


def test_shared_tensors_are_stored_once(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 16)})
    net["b"].weight = net["a"].weight
    model = compress(net, rank=4).model
    save(model, tmp_path / "net")
    header = read_header(tmp_path / "net")
    assert header.aliases == {"b.weight": "a.weight"}
    with safe_open(tmp_path / "net", "pt") as file:
        assert "b.weight" not in set(file.keys())
    fresh = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 16)})
    fresh["b"].weight = fresh["a"].weight
    load(tmp_path / "net", fresh)
    assert fresh["b"].weight is fresh["a"].weight and same_state(state(model), fresh.state_dict())
    untied = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 16)})
    load(tmp_path / "net", untied)
    assert torch.equal(untied["b"].weight, net["a"].weight) and untied["b"].weight is not untied["a"].weight


def test_layer_with_two_names_stays_one(tmp_path):
    layer = FactorizedLinear(32, 32, rank=3)
    save(nn.ModuleDict({"a": layer, "b": layer}), tmp_path / "net")
    dense = nn.Linear(32, 32)
    fresh = load(tmp_path / "net", nn.ModuleDict({"a": dense, "b": dense}))
    assert fresh["a"] is fresh["b"] and torch.equal(fresh["a"].weight.a, layer.weight.a)


def test_overlapping_views_are_stored_separately(tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0).view(3, 4)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[1:, ::2])
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("scalar", torch.tensor(3))

    save(Views(), tmp_path / "net")
    fresh = Views()
    fresh.whole.zero_()
    load(tmp_path / "net", fresh)
    assert torch.equal(fresh.whole[1:, ::2], fresh.part) and fresh.scalar == 3


def test_plans_travel(saved, tmp_path):
    model, _ = saved
    model.stem.plan, model.body[1].prefer = "dense", "memory"
    save(model, tmp_path / "net")
    back = load(tmp_path / "net", SmallNet())
    assert back.stem.plan == "dense" and back.body[1].prefer == "memory" and back.head.plan is None


def test_header_tells_everything(saved):
    model, path = saved
    header = read_header(path)
    assert header.format_version == 1 and header.meta == {"model": {"name": "small"}}
    assert header.layers["stem"] == json.loads(json.dumps(model.stem.config()))
    assert header.tensors["stem.weight.core"] == ("float32", tuple(model.stem.weight.core.shape))
    assert header.report["stem"].rank == (4, 3) and header.report.parameters_after == sum(
        p.numel() for p in model.parameters()
    )


def test_saving_is_deterministic_and_keeps_permissions(saved, tmp_path):
    model, path = saved
    first = path.read_bytes()
    path.chmod(0o640)
    save(model, path, report=read_header(path).report, meta={"model": {"name": "small"}})
    assert path.read_bytes() == first and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_symbolic_link_stays_a_link(saved, tmp_path):
    model, path = saved
    link = tmp_path / "link"
    link.symlink_to(path)
    save(model, link)
    assert link.is_symlink() and read_header(path).report is None


def test_what_cannot_be_stored(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"any": object()}

        def set_extra_state(self, state):
            pass

    with pytest.raises(CheckpointError, match="only tensors"):
        save(Extra(2, 2), tmp_path / "net")
    with pytest.raises(CheckpointError, match="plain dense tensor"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "net")
    with pytest.raises(CheckpointError, match="JSON"):
        save(nn.Linear(2, 2), tmp_path / "net", meta={"x": object()})
    with pytest.raises(FileNotFoundError):
        save(nn.Linear(2, 2), tmp_path / "nowhere" / "net")
    assert list(tmp_path.iterdir()) == []


def test_layers_in_the_middle_of_a_recipe_are_refused(tmp_path):
    gated = nn.Sequential(nn.Linear(3, 3), FactorizedLinear(8, 6, format="svd", rank=3))
    attach_gates(gated[1], GaussianGate())
    with pytest.raises(CheckpointError, match="layer '1' has gates"):
        save(gated, tmp_path / "net")
    fold_gates(gated[1])
    save(gated, tmp_path / "net")
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(8, 6))
    load(tmp_path / "net", plain)
    assert same_state(plain.state_dict(), gated.state_dict())
    layer = FactorizedLinear(8, 6, format="svd", rank=3)
    fading = nn.Sequential(FadingDense(layer, torch.zeros(6, 8)))
    with pytest.raises(CheckpointError, match="layer '0' still has its dense weight"):
        save(fading, tmp_path / "fading")
    assert not (tmp_path / "fading").exists()


def test_failed_write_leaves_the_former_file(saved, monkeypatch, tmp_path):
    model, path = saved
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(model, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


SAVER = """
import sys
import torch
from tensorcomp_ext.compress import load, save
from tensorcomp_ext.nn import FactorizedLinear
model = torch.nn.Sequential(FactorizedLinear(1024, 1024, rank=256), FactorizedLinear(1024, 1024, rank=256))
count = 0
while True:
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, count)
    save(model, sys.argv[1], meta={"count": count})
    count += 1
    if count == 1:
        print("ready", flush=True)
"""


def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / "net"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready"
        counts = []
        for delay in (0.0, 0.011, 0.017, 0.023):
            time.sleep(delay)
            os.kill(process.pid, signal.SIGSTOP)  # as good as killed: what a reader finds at this instant
            counts.append(check_whole(path))
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    counts.append(check_whole(path))
    assert counts == sorted(counts)


def check_whole(path: Path) -> int:
    fresh = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    load(path, fresh)
    count = read_header(path).meta["count"]
    assert all(torch.equal(p, torch.full_like(p, count)) for p in fresh.parameters())
    return count


def choices(model):
    layers = (
        module for module in model.modules() if isinstance(module, (FactorizedConv2d, FactorizedLinear))
    )
    return [(layer.plan, layer.prefer, dict(layer.tuned)) for layer in layers]


@pytest.mark.parametrize("target", ["dense", "other ranks", "same ranks"])
def test_a_hook_that_raises_leaves_the_model_as_it_was(tmp_path, target):
    source = compress(small_net(), rank=4).model
    source.stem.plan = "dense"
    source.to(torch.float32 if target == "same ranks" else torch.bfloat16)
    save(source, tmp_path / "net")
    model = small_net(seed=3)
    if target != "dense":
        model = compress(model, rank=4 if target == "same ranks" else 3).model
        model.stem.plan, model.head.prefer = "staged", "memory"
    modules, before, chosen = dict(model.named_modules()), state(model), choices(model)
    with torch.no_grad():
        expected = model(X)

    def refuse(*_):
        raise RuntimeError("not today")

    handle = model.body.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not today"):
        load(tmp_path / "net", model)
    assert dict(model.named_modules()) == modules and same_state(before, model.state_dict())
    assert choices(model) == chosen
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    handle.remove()
    assert same_state(state(source), load(tmp_path / "net", model).state_dict())


def test_a_model_without_memory_is_refused(saved):
    with torch.device("meta"):
        empty = SmallNet()
    with pytest.raises(CheckpointError, match=r"'stem\.weight' of the model is on the meta device"):
        load(saved[1], empty)
    assert type(empty.stem) is nn.Conv2d


def test_save_names_what_it_was_given(tmp_path: Path) -> None:
    class Result:
        model = torch.nn.Linear(2, 2)

    with pytest.raises(
        TypeError, match=r"save: model must be a torch.nn.Module, got Result \(pass its .model\)"
    ):
        save(Result(), tmp_path / "x.safetensors")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no such folder.*missing"):
        save(torch.nn.Linear(2, 2), tmp_path / "missing" / "x.safetensors")
