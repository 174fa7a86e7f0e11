"""Networks: parameter counts of the papers, shapes, names."""

import pytest
import torch

from tensorcomp_ext import models


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("lenet5", {}, 429_100),
        ("mlp", {}, 496_885),
        ("resnet18", {"num_classes": 1000}, 11_689_512),
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet44", {}, 658_586),
        ("resnet56", {}, 853_018),
        ("resnet110", {}, 1_727_962),
        ("resnet20", {"option": "B"}, 272_474),
        ("resnet32", {"option": "B"}, 466_906),
        ("resnet110", {"option": "B"}, 1_730_714),
        ("vgg16", {}, 14_728_266),
    ],
)
def test_parameter_counts(name, options, parameters):
    assert count(models.build(name, **options)) == parameters


def test_resnet32_counts_as_the_tensor_ring_papers_split_it():
    """31 convolutions of 3x3, 2,560 in 1x1 shortcuts, 2,464 in normalisation, 650 in the linear layer."""
    model = models.build("resnet32", option="B")
    sizes = {"conv3": 0, "conv1": 0, "norm": 0, "linear": 0}
    number_of_3x3 = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            sizes["conv3" if module.kernel_size == (3, 3) else "conv1"] += count(module)
            number_of_3x3 += module.kernel_size == (3, 3)
        elif isinstance(module, torch.nn.BatchNorm2d):
            sizes["norm"] += count(module)
        elif isinstance(module, torch.nn.Linear):
            sizes["linear"] += count(module)
    assert number_of_3x3 == 31
    assert (sizes["conv1"], sizes["norm"], sizes["linear"]) == (2_560, 2_464, 650)
    assert sum(sizes.values()) == 466_906


@pytest.mark.parametrize(
    ("name", "channels", "size", "options"),
    [
        ("lenet5", 1, 28, {}),
        ("lenet5", 3, 32, {"input_size": 32}),
        ("mlp", 1, 28, {}),
        ("mlp", 3, 9, {"input_size": 9, "hidden": 5}),
        ("resnet18", 3, 224, {}),
        ("resnet18", 1, 33, {}),
        ("resnet20", 1, 28, {}),
        ("resnet20", 3, 33, {"option": "B"}),
        ("resnet20", 1, 16, {}),
        ("vgg16", 3, 32, {}),
        ("vgg16", 1, 32, {}),
    ],
)
@pytest.mark.parametrize("classes", [1, 7])
def test_forward_shapes(name, channels, size, options, classes):
    model = models.build(name, num_classes=classes, in_channels=channels, **options).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


def test_resnet18_has_torchvisions_names_and_shapes():
    """Written out from torchvision's resnet18: 122 tensors."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    wanted = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    norms = {"bn1": 64}
    for stage, (c_in, c_out) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            wanted[f"{at}.conv1.weight"] = (c_out, c_out if block else c_in, 3, 3)
            wanted[f"{at}.conv2.weight"] = (c_out, c_out, 3, 3)
            norms |= {f"{at}.bn1": c_out, f"{at}.bn2": c_out}
        if stage > 1:
            wanted[f"layer{stage}.0.downsample.0.weight"] = (c_out, c_in, 1, 1)
            norms[f"layer{stage}.0.downsample.1"] = c_out
    for name, width in norms.items():
        wanted |= {f"{name}.{key}": () if key == norm[-1] else (width,) for key in norm}
    model = models.build("resnet18", num_classes=1000)
    assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == wanted and len(wanted) == 122


def test_resnet18_loads_a_state_dict_file(tmp_path):
    state = models.ResNet18().state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    model = models.build("resnet18", num_classes=1000)
    assert models.load_weights(model, tmp_path / "resnet18.pth") is None
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_resnet18_strides():
    shapes = []
    model = models.build("resnet18").eval()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


def test_padded_shortcut_is_the_identity_on_the_old_channels():
    model = models.build("resnet20").eval()
    shortcut = model.layer2[0].shortcut
    x = torch.randn(2, 16, 9, 9)
    y = shortcut(x)
    assert y.shape == (2, 32, 5, 5)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == 0 and y[:, 24:].abs().sum() == 0


def test_same_seed_same_weights():
    torch.manual_seed(3)
    a = models.build("resnet20").state_dict()
    torch.manual_seed(3)
    b = models.build("resnet20").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"resnet21.*lenet5.*resnet20.*vgg16"):
        models.build("resnet21")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet20", {"option": "C"}, '"A" or "B"'),
        ("resnet20", {"num_classes": 0}, "num_classes"),
        ("resnet20", {"in_channels": 0}, "in_channels"),
        ("lenet5", {"input_size": 11}, "at least 12"),
        ("mlp", {"hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, **arguments)


def test_bad_depth():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        models.CifarResNet(21)


def test_vgg_names_the_size_it_wants():
    with pytest.raises(ValueError, match=r"\[N, C, 32, 32\], got \[1, 3, 28, 28\]"):
        models.build("vgg16")(torch.zeros(1, 3, 28, 28))
