"""Whatever a file holds: a clear error, and the model as it was."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from compress_networks import SmallNet, same_state, small_net, state
from safetensors.torch import save_file
from torch import nn

from tensorcomp_ext.compress import CheckpointError, compress, load, read_header, save

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to")


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "net"
    save(compress(small_net(), rank=3).model, path, meta={"a": 1})
    return path.read_bytes()


def split(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def with_config(content: bytes, change) -> bytes:
    """The file with its configuration changed by ``change(config)``."""
    header, body = split(content)
    config = json.loads(header["__metadata__"]["tensorcomp"])
    replaced = change(config)
    text = replaced if isinstance(replaced, str) else json.dumps(config)
    header["__metadata__"]["tensorcomp"] = text
    return join(header, body)


def refuse(content: bytes, tmp_path, text: str = "hostile", model: nn.Module | None = None) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(content)
    model = model or SmallNet().eval()
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=text):
        load(path, model)
    assert same_state(before, model.state_dict()) and kinds == [type(m) for m in model.modules()]


def test_truncated_anywhere(content, tmp_path):
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    offsets = {1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(content) - 1}
    for offset in sorted(offsets | set(range(0, len(content), len(content) // 40))):
        refuse(content[:offset], tmp_path, "truncated|damaged")


def test_surplus_bytes(content, tmp_path):
    refuse(content + b"\0" * 8, tmp_path)


def test_header_bytes_changed_at_random(content, tmp_path):
    """A changed header may still be valid (a digit of a remark); else it is refused, never a crash."""
    length = 8 + struct.unpack("<Q", content[:8])[0]
    generator = random.Random(0)
    path = tmp_path / "fuzzed"
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            changed[generator.randrange(length)] = generator.randrange(256)
        path.write_bytes(bytes(changed))
        model = SmallNet()
        before = state(model)
        try:
            load(path, model)
        except CheckpointError:
            refused += 1
            assert same_state(before, model.state_dict())
    assert refused > 100


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04 a zip file, as torch.save writes", "truncated|no safetensors"),
        (b"\x80\x04\x95 a pickle" * 40, "truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"{}", "not saved by"),
        (struct.pack("<Q", 4) + b"[[[[", "damaged"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "damaged"),
    ],
)
def test_other_files(raw, text, tmp_path):
    refuse(raw, tmp_path, text)


def test_header_of_absurd_length(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 80 << 20))
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="over the limit"):
        load(path, SmallNet())


def test_foreign_safetensors(tmp_path):
    save_file({"stem.weight": torch.zeros(2)}, tmp_path / "foreign")
    refuse((tmp_path / "foreign").read_bytes(), tmp_path, "not saved by")
    with pytest.raises(CheckpointError, match="not saved by"):
        read_header(tmp_path / "foreign")


def set_at(*path, value):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


CONFIGURATIONS = {
    "newer version": (set_at("format_version", value=2), "format version 2.*update"),
    "no version": (set_at("format_version", value=None), "format_version"),
    "true as version": (set_at("format_version", value=True), "format_version"),
    "not JSON": (lambda config: "{", "no JSON"),
    "deep JSON": (lambda config: "[" * 100_000, "no JSON"),
    "huge number": (lambda config: '{"format_version": ' + "9" * 5000 + "}", "no JSON"),
    "a list": (lambda config: "[1]", "must be an object"),
    "layers a list": (set_at("layers", value=[]), "'layers' must be an object"),
    "layer a text": (set_at("layers", "stem", value="x"), "'stem' must be an object"),
    "unknown layer type": (set_at("layers", "stem", "type", value="FactorizedNothing"), "'stem'.*type"),
    "type a list": (set_at("layers", "stem", "type", value=["a"]), "'stem'"),
    "dangerous type": (set_at("layers", "stem", "type", value="os.system"), "'stem'.*type"),
    "unknown format": (set_at("layers", "stem", "format", value="pickle"), "'stem'.*format"),
    "rank zero": (set_at("layers", "stem", "rank", value=[0, 3]), "'stem'"),
    "rank text": (set_at("layers", "stem", "rank", value="many"), "'stem'"),
    "other rank": (set_at("layers", "stem", "rank", value=[2, 3]), r"stem\.weight.* must be"),
    "huge sizes": (set_at("layers", "head", "in_features", value=2**39), "head"),
    "overflowing sizes": (set_at("layers", "stem", "kernel_size", value=[2**39, 2**39]), "stem"),
    "beyond 64 bits": (set_at("layers", "stem", "in_channels", value=2**70), "out of range"),
    "nested": (set_at("layers", "stem", "stride", value=[[[[[[[[[[1]]]]]]]]]]), "nested too deep"),
    "dtype": (set_at("layers", "stem", "dtype", value="object"), "'stem'"),
    "other stride": (set_at("layers", "body.1", "stride", value=[1, 1]), "another model.*stride"),
    "other padding": (set_at("layers", "stem", "padding", value="same"), "another model.*padding"),
    "bias dropped": (set_at("layers", "stem", "bias", value=False), "bias"),
    "moved": (lambda c: c["layers"].update(norm=c["layers"].pop("stem")), "norm"),
    "elsewhere": (lambda c: c["layers"].update(nowhere=c["layers"].pop("stem")), "nowhere"),
    "layer forgotten": (lambda c: c["layers"].pop("stem") and None, "another model"),
    "alias to nothing": (set_at("aliases", value={"x": "y"}), "stands for"),
    "alias of itself": (set_at("aliases", value={"head.bias": "head.bias"}), "stands for"),
    "alias not text": (set_at("aliases", value={"x": [1]}), "stands for"),
    "tensor unlisted": (lambda c: c["tensors"].pop("head.bias") and None, "differ: head.bias"),
    "tensor of other shape": (set_at("tensors", "head.bias", value=["float32", [7]]), "head.bias"),
    "plans a text": (set_at("plans", value="fast"), "'plans' must be"),
    "unknown plan": (
        set_at("plans", "layers", "stem", "plan", value="quantum"),
        "plans are not valid.*quantum",
    ),
    "plan of nothing": (set_at("plans", "layers", "norm", value={}), "plans are not valid"),
    "tuned nonsense": (set_at("plans", "layers", "stem", "tuned", value={"a/b": {}}), "plans are not valid"),
    "report nonsense": (set_at("report", value={"layers": 3}), "not a compression report"),
    "report text": (set_at("report", value="x"), "report"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case, content, tmp_path):
    change, text = CONFIGURATIONS[case]
    refuse(with_config(content, change), tmp_path, text)


def test_unchanged_configuration_loads(content, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(with_config(content, lambda config: None))
    load(path, SmallNet())


class Wider(SmallNet):
    def __init__(self) -> None:
        super().__init__(classes=7)


class Longer(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(2, 2)


class Grouped(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2, bias=False)


class Shorter(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16, affine=False)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Wider, "another model.*out_features"),
        (Longer, r"lacks tail\.bias, tail\.weight"),
        (Grouped, "has groups 1, the model's has 2"),
        (Shorter, r"has too norm\.bias, norm\.weight"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "no such module"),
        (lambda: nn.Linear(3, 3), "no such module"),
    ],
)
def test_other_models(model, text, content, tmp_path):
    refuse(content, tmp_path, text, model())


def test_missing_file_and_wrong_argument(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", SmallNet())
    with pytest.raises(IsADirectoryError):
        load(tmp_path, SmallNet())
    with pytest.raises(TypeError, match="Module"):
        load(tmp_path / "none", {"a": 1})
