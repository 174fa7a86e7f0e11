"""MobileNetV3, EfficientNet-B0, DeiT-Small: published counts and names, what they compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensorcomp_ext import models
from tensorcomp_ext.models import DeiT, EfficientNetB0, MobileNetV3
from tensorcomp_ext.models.inverted_residual import InvertedResidual, Style, rounded_width

NETWORKS = ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "deit_small")


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("mobilenet_v3_small", 2_542_856, 244),
        ("mobilenet_v3_large", 5_483_032, 312),
        ("efficientnet_b0", 5_288_548, 360),
        ("deit_small", 22_050_664, 152),
    ],
)
def test_published_counts(name, parameters, tensors):
    with torch.device("meta"):
        model = models.build(name, num_classes=1000)
    assert count(model) == parameters and len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mobilenet_v3_small", 57), ("mobilenet_v3_large", 217), ("efficientnet_b0", 386), ("deit_small", 4241)],
)
def test_macs_of_an_image(name, millions):
    macs = []

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            macs.append(output.numel() * module.weight[0].numel())
        else:
            macs.append(output.numel() * module.in_features)

    with torch.device("meta"):
        model, x = models.build(name, num_classes=1000).eval(), torch.empty(1, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    assert model(x).shape == (1, 1000)
    assert round(sum(macs) / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "mobilenet_v3_small",
            {
                "features.0.0.weight": (16, 3, 3, 3),
                "features.1.block.0.0.weight": (16, 1, 3, 3),
                "features.1.block.1.fc1.weight": (8, 16, 1, 1),
                "features.4.block.2.fc2.bias": (96,),
                "features.11.block.3.1.running_var": (96,),
                "features.12.0.weight": (576, 96, 1, 1),
                "classifier.0.weight": (1024, 576),
                "classifier.3.weight": (1000, 1024),
            },
        ),
        (
            "mobilenet_v3_large",
            {
                "features.1.block.1.0.weight": (16, 16, 1, 1),
                "features.4.block.2.fc1.weight": (24, 72, 1, 1),
                "features.8.block.1.0.weight": (200, 1, 3, 3),
                "features.15.block.2.fc1.weight": (240, 960, 1, 1),
                "features.16.1.bias": (960,),
                "classifier.3.bias": (1000,),
            },
        ),
        (
            "efficientnet_b0",
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
                "features.2.1.block.0.0.weight": (144, 24, 1, 1),
                "features.6.3.block.2.fc2.weight": (1152, 48, 1, 1),
                "features.7.0.block.3.0.weight": (320, 1152, 1, 1),
                "features.8.0.weight": (1280, 320, 1, 1),
                "classifier.1.weight": (1000, 1280),
            },
        ),
        (
            "deit_small",
            {
                "cls_token": (1, 1, 384),
                "pos_embed": (1, 197, 384),
                "patch_embed.proj.weight": (384, 3, 16, 16),
                "blocks.11.attn.qkv.bias": (1152,),
                "blocks.0.mlp.fc2.weight": (384, 1536),
                "norm.weight": (384,),
                "head.weight": (1000, 384),
            },
        ),
    ],
)
def test_names_of_published_weights(name, shapes):
    with torch.device("meta"):
        state = models.build(name, num_classes=1000).state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name", NETWORKS[:3])
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 45)])
def test_images_of_any_size(name, channels, size):
    model = models.build(name, num_classes=7, in_channels=channels).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, channels, size, size + 1)).shape == (2, 7)


def test_mobilenet_strides():
    model, shapes = MobileNetV3("large").eval(), []
    for block in model.features:
        block.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
    assert [shapes[i] for i in (0, 1, 3, 6, 10, 12, 15, 16)] == [
        (16, 32, 32), (16, 32, 32), (24, 16, 16), (40, 8, 8),
        (80, 4, 4), (112, 4, 4), (160, 2, 2), (960, 2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("squeeze", [0, 3])
@pytest.mark.parametrize(("expanded", "stride"), [(4, 1), (10, 1), (10, 2)])
def test_inverted_residual_by_hand(squeeze, expanded, stride):
    torch.manual_seed(0)
    style = Style(0.01, 0.1, nn.ReLU, nn.Hardsigmoid)
    made = InvertedResidual(4, expanded, 4, 5, stride, style, nn.Hardswish, squeeze=squeeze, drop=0.5)
    model = made.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)

    def normed(y, norm):
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        return (y - mean) / (var + 0.01).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    layers, y = list(model.block), x
    if expanded != 4:
        conv, norm, _ = layers.pop(0)
        y = F.hardswish(normed(torch.einsum("nchw,dc->ndhw", y, conv.weight[:, :, 0, 0]), norm))
    conv, norm, _ = layers.pop(0)
    taps = F.unfold(y, 5, padding=2, stride=stride).unflatten(1, (expanded, 25))
    y = torch.einsum("nctp,ct->ncp", taps, conv.weight.flatten(1)).unflatten(2, (-1, 6 // stride))
    y = F.hardswish(normed(y, norm))
    if squeeze:
        inner = layers.pop(0)
        z = F.linear(y.mean((2, 3)), inner.fc1.weight.flatten(1), inner.fc1.bias).relu()
        z = F.linear(z, inner.fc2.weight.flatten(1), inner.fc2.bias)
        y = y * ((z + 3).clamp(0, 6) / 6)[:, :, None, None]
    conv, norm = layers.pop(0)
    y = normed(torch.einsum("nchw,dc->ndhw", y, conv.weight[:, :, 0, 0]), norm)
    torch.testing.assert_close(model(x), y if stride == 2 else x + y)
    assert not layers


def test_stochastic_depth_leaves_out_blocks_for_whole_images():
    torch.manual_seed(0)
    style = Style(1e-5, 0.1, nn.ReLU, nn.Sigmoid)
    block = InvertedResidual(4, 4, 4, 3, 1, style, nn.ReLU, drop=0.25).train()
    x = torch.randn(400, 4, 3, 3)
    added = block(x) - x
    out = added.flatten(1).abs().amax(1) < 1e-6
    # Binomial: 100 of 400, standard deviation 8.7.
    assert 70 <= int(out.sum()) <= 130
    block.drop = 0.0
    expected = (block(x) - x)[~out] / 0.75
    torch.testing.assert_close(added[~out], expected, rtol=1e-4, atol=1e-5)


def test_chances_of_efficientnets_blocks_grow_with_the_depth():
    drops = [m.drop for m in EfficientNetB0().modules() if isinstance(m, InvertedResidual)]
    assert drops == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_deit_by_hand():
    torch.manual_seed(0)
    model = DeiT(5, 2, image_size=6, patch=3, dim=8, depth=2, heads=2).double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    patches = x.reshape(3, 2, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(3, 4, 18)
    proj = model.patch_embed.proj
    tokens = F.linear(patches, proj.weight.flatten(1), proj.bias)
    tokens = torch.cat([model.cls_token.expand(3, 1, 8), tokens], 1) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    expected = model.head(F.layer_norm(tokens, (8,), model.norm.weight, model.norm.bias, 1e-6)[:, 0])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("width", "expected"), [(4, 8), (12, 16), (18, 24), (30, 32), (43, 40), (60, 64), (240, 240)]
)
def test_rounded_width(width, expected):
    """18 goes to 24: 16 would take more than a tenth away."""
    assert rounded_width(width) == expected


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='MobileNetV3: size must be "small" or "large", got \'tiny\''):
        MobileNetV3("tiny")
    with pytest.raises(ValueError, match=r"EfficientNetB0: drop must be in \[0, 1\), got 1.0"):
        EfficientNetB0(drop=1.0)
    with pytest.raises(ValueError, match="DeiT: patch must divide image_size = 225, got 16"):
        DeiT(image_size=225)
    with pytest.raises(ValueError, match="heads must divide dim = 10, got 6"):
        DeiT(dim=10)
    with torch.device("meta"), pytest.raises(ValueError, match=r"\[N, 3, 224, 224\], got \[2, 3, 32, 32\]"):
        DeiT()(torch.empty(2, 3, 32, 32))


def test_image_sizes():
    sizes = {name: models.image_size(name) for name in models.names()}
    large = {n for n, s in sizes.items() if s == 224}
    assert large - {"alexnet", "googlenet", "densenet121"} == {"resnet18", *NETWORKS}
    assert sizes["lenet5"] == sizes["mlp"] == 28 and sizes["vgg16"] == sizes["resnet110"] == 32
    channels = {name: models.image_channels(name) for name in models.names()}
    assert {n for n, c in channels.items() if c == 1} == {"lenet5", "mlp"}
    assert set(channels.values()) == {1, 3}
