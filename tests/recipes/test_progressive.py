"""Progressive Tucker as a whole: exact starts, budgets, the end of the dense branch, files, refusals."""

import copy

import pytest
import torch
from method_networks import copied, same_state, small_network
from safetensors import safe_open
from small_images import quadrants
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import recipes
from tensorcomp_ext.formats import SVD, Tucker2
from tensorcomp_ext.nn import FactorizedLayer, FadingDense
from tensorcomp_ext.recipes import Progressive, progressive

OPTIONS = {"epochs": 5, "batch_size": 32, "lr": 0.02, "target": 0.2}
# Weights of the layers that can be compressed: the depthwise one cannot.
NUMEL = {"0": 72, "3": 864, "6": 192, "9": 5120, "11": 80}


@pytest.fixture(scope="module")
def network():
    model = small_network()
    recipes.train(model, quadrants(), epochs=2, lr=0.05, batch_size=32)
    return model


class Watch(recipes.Callback):
    """What the network is at every step and epoch."""

    def __init__(self, x):
        self.x, self.outputs, self.fading, self.sizes = x, [], [], []

    def on_batch(self, state):
        state.model.eval()
        with torch.no_grad():
            self.outputs.append(state.model(self.x))
        state.model.train()
        self.fading.append([float(m.gate) for m in state.model.modules() if isinstance(m, FadingDense)])

    def on_epoch(self, state):
        weights = [m.weight for m in state.model.modules() if isinstance(m, FactorizedLayer)]
        self.sizes.append(sum(weight.numel for weight in weights))


@pytest.mark.parametrize("init", ["residual", "lora"])
@pytest.mark.parametrize("decay", ["cosine", "linear", "sine"])
def test_from_the_pretrained_outputs_to_factors_alone(network, dataset, init, decay):
    before = copied(network)
    x = dataset.normalize(dataset.test_images)
    watch = Watch(x)
    made = progressive(
        network, dataset, **OPTIONS, init=init, decay=decay, callbacks=[watch], example_inputs=x[:2]
    )
    assert same_state(before, copied(network))
    with torch.no_grad():
        expected = network.eval()(x)
    assert (watch.outputs[0] - expected).norm() <= 1e-5 * expected.norm()
    # 25 steps, of which the dense branch fades in 20.
    steps = [recipes.progressive.__globals__["FADES"][decay](step, 20.0) for step in range(20)]
    for gates, gate in zip(watch.fading, steps, strict=False):
        assert gates and all(found == pytest.approx(gate, abs=1e-6) for found in gates)
    assert all(not gates for gates in watch.fading[20:]) and len(watch.fading) == 25
    details = made.report.details["progressive"]
    total = sum(NUMEL.values())
    assert details["weights"] == total and details["stored"] <= 0.2 * total
    assert details["stored_share"] == pytest.approx(details["stored"] / total)
    budgets = [1.3 - 0.3 * min(1.0, epoch / 4) for epoch in range(1, 6)]
    stays = sum(NUMEL[name] for name in NUMEL if made.report[name].skipped)
    limits = [factor * (int(0.2 * total) - stays) for factor in budgets]
    assert all(size <= limit for size, limit in zip(watch.sizes, limits, strict=True))
    assert watch.sizes == sorted(watch.sizes, reverse=True)
    logged = [entry.extra["progressive"] for entry in made.history]
    assert [entry["stored"] for entry in logged] == watch.sizes
    assert logged[-1]["gate"] == 0.0 and logged[-1]["ranks"] == details["ranks"]
    kinds = {type(m.weight) for m in made.model.modules() if isinstance(m, FactorizedLayer)}
    assert kinds <= {Tucker2, SVD} and SVD in kinds
    assert not any(isinstance(m, FadingDense) for m in made.model.modules())


def test_the_report_and_the_file_count_the_same(network, dataset, tmp_path):
    x = torch.zeros(2, 1, 8, 8)
    made = progressive(network, dataset, **OPTIONS, example_inputs=x)
    trained = sum(p.numel() for p in made.model.parameters())
    assert made.report.parameters_after == trained < made.report.parameters_before
    for entry in made.report.replaced:
        layer = made.model.get_submodule(entry.name)
        assert entry.parameters_after == layer.weight.numel and entry.note is None
        assert list(entry.rank) == made.report.details["progressive"]["ranks"][entry.name]
        dense = network.get_submodule(entry.name).weight
        expected = (layer.weight.to_dense() - dense).norm() / dense.norm()
        assert entry.relative_error == pytest.approx(expected.item(), rel=1e-5)
    assert (
        made.report["5"].skipped == "not called, or not compressible"
        or "depthwise" in made.report["5"].skipped
    )
    tc.save(made.model, tmp_path / "net.safetensors")
    buffers = sum(b.numel() * b.element_size() for b in made.model.buffers())
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in stored) == 4 * trained + buffers
    again = tc.load(tmp_path / "net.safetensors", small_network(seed=9))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), made.model.eval()(x))


def test_removing_the_branch_at_zero_changes_nothing(network, dataset):
    x = dataset.normalize(dataset.test_images)
    seen = {}

    class Before(recipes.Callback):
        """Called before the method's own step."""

        def on_step(self, state):
            if state.step == 19:
                for module in state.model.modules():
                    if isinstance(module, FadingDense):
                        module.fade(0.0)
                state.model.eval()
                with torch.no_grad():
                    seen["with"] = state.model(x)
                state.model.train()

    class After(recipes.Callback):
        def on_step(self, state):
            if state.step == 19:
                state.model.eval()
                with torch.no_grad():
                    seen["without"] = state.model(x)
                state.model.train()
                seen["state"] = list(state.model.state_dict())

    step = Progressive.on_step

    def on_step(self, state):
        before.on_step(state)
        step(self, state)

    before = Before()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progressive, "on_step", on_step)
        # Ranks are chosen once, so that the last step cuts none.
        progressive(network, dataset, **OPTIONS, start=1.0, callbacks=[After()])
    torch.testing.assert_close(seen["with"], seen["without"], rtol=1e-5, atol=1e-5)
    assert not any("residual" in name or "gate" in name for name in seen["state"])


def test_hooks_see_the_whole_layer(network, dataset):
    model = small_network()
    seen = []
    model[9].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    x = dataset.normalize(dataset.test_images[:3])
    with torch.no_grad():
        model.eval()(x)
    watch = Watch(x)
    progressive(model, dataset, **{**OPTIONS, "epochs": 1}, callbacks=[watch])
    seen = [output for output in seen if len(output) > 1]  # of one image it is tried whether they fit
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert len(seen) == 1 + 2 * 5


def test_without_epochs_the_network_is_decomposed(network, dataset):
    made = progressive(network, dataset, **{**OPTIONS, "epochs": 0})
    assert made.history == [] and not any(isinstance(m, FadingDense) for m in made.model.modules())
    assert made.report.details["progressive"]["stored"] <= 0.2 * sum(NUMEL.values())


def test_in_bfloat16_and_modes_are_kept(network, dataset):
    network.eval()
    network[1].train()
    made = progressive(network, dataset, **OPTIONS, precision="bf16")
    modes = [(name, m.training) for name, m in network.named_modules()]
    assert [(n, m.training) for n, m in made.model.named_modules() if n in dict(modes)] == modes
    assert not any(m.training for m in made.model[9].modules())
    assert made.model[9].weight.a.dtype == torch.float32 and made.history[-1].loss < 2.0


def test_ranks_by_hand(network, dataset):
    """Cuts every second epoch only, and the whole time for the fade."""
    watch = Watch(dataset.normalize(dataset.test_images[:1]))
    progressive(network, dataset, **{**OPTIONS, "epochs": 4}, share=1.0, rank_every=2, callbacks=[watch])
    assert watch.sizes[0] > watch.sizes[1] and watch.sizes[1] == watch.sizes[2] >= watch.sizes[3]
    assert all(watch.fading) and len(watch.fading) == 20


def test_same_seed_same_ranks(network, dataset):
    first, second = (progressive(network, dataset, **OPTIONS, seed=5) for _ in range(2))
    assert first.report.details == second.report.details
    assert same_state(copied(first.model), copied(second.model))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"target": 0.0}, r"target must be in \(0, 1\), got 0.0"),
        ({"target": 1.0}, "target must be in"),
        ({"target": 0.001}, r"target must be at least 0.0\d+, which rank 1 takes, got 0.001"),
        ({"init": "zero"}, "init must be one of residual, lora, got 'zero'"),
        ({"decay": "steep"}, "decay must be one of cosine, linear, sine, got 'steep'"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"start": 0.9}, r"start must be in \[1, inf\), got 0.9"),
        ({"rank_every": 0}, "rank_every must be at least 1, got 0"),
        ({"epochs": -1}, "progressive: epochs must be 0 or more"),
        ({"schedule": "steep"}, "schedule must be one of"),
        ({"batch_size": 0}, "batch_size must be in"),
        ({"exclude": "*"}, "no convolution or linear layer to compress"),
        ({"parameters": [{}]}, "parameters must be None"),
    ],
)
def test_refused_before_any_work(dataset, monkeypatch, options, message):
    def never(*arguments, **options):
        raise AssertionError("decomposed")

    monkeypatch.setitem(recipes.progressive.__globals__, "decomposed_at", never)
    with pytest.raises(ValueError, match=message):
        progressive(small_network(), dataset, **{**OPTIONS, **options})


@pytest.mark.parametrize("init", ["residual", "lora"])
def test_layers_that_are_not_trained_stay_as_they_are(network, dataset, init):
    """Factors that begin at zero would end there, once the dense weight is gone."""
    model = copy.deepcopy(network)
    model[3].weight.requires_grad_(False)
    model[11].bias.requires_grad_(False)
    made = progressive(model, dataset, **OPTIONS, init=init)
    assert type(made.model[3]) is nn.Conv2d and torch.equal(made.model[3].weight, network[3].weight)
    assert made.report["3"].skipped == "not trained: its weight does not require gradients"
    assert made.report["5"].skipped == "depthwise convolution"
    details = made.report.details["progressive"]
    assert details["weights"] == sum(NUMEL.values()) - NUMEL["3"] and details["stored_share"] <= 0.2
    for layer in made.model.modules():
        assert not isinstance(layer, FactorizedLayer) or layer.weight.to_dense().any()
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"progressive: .* no weight of 0, 3, 6, 9, 11 requires gradients"):
        progressive(model, dataset, **OPTIONS, init=init)


def test_unsound_networks(dataset):
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        progressive(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), dataset, **OPTIONS)
    with pytest.raises(ValueError, match="itself one layer"):
        progressive(nn.Linear(64, 4), dataset, **{**OPTIONS, "epochs": 0})
    model = small_network()
    model[9].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '9' has NaN or Inf"):
        progressive(model, dataset, **OPTIONS)
    with pytest.raises(TypeError, match=r"rank_every must be an int, got 1\.5"):
        progressive(small_network(), dataset, **OPTIONS, rank_every=1.5)
    with pytest.raises(TypeError, match="progressive: unknown option 'ranks'"):
        progressive(small_network(), dataset, **OPTIONS, ranks=1)
    with pytest.raises(ValueError, match="no layer with a dense branch"):
        Progressive(small_network(), 100)
