"""Weight files: published layouts, damaged and hostile files."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from tensorcomp_ext import data, models

SHARED = Path(os.environ.get("TENSORCOMP_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def test_data_parallel_checkpoint(tmp_path):
    source = models.build("resnet20")
    state = {f"module.{k}": v for k, v in source.state_dict().items() if "num_batches_tracked" not in k}
    torch.save({"state_dict": state, "best_prec1": 91.78}, tmp_path / "w.th")
    model = models.build("resnet20")
    normalization = models.load_weights(model, tmp_path / "w.th")
    assert normalization == (data.IMAGENET_MEAN, data.IMAGENET_STD)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_torchvision_style_names(tmp_path):
    source = models.build("resnet20", option="B")
    rename = {
        k: k.replace(".shortcut.", ".downsample.").replace("linear.", "fc.") for k in source.state_dict()
    }
    torch.save({rename[k]: v for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    model = models.build("resnet20", option="B")
    assert models.load_weights(model, tmp_path / "w.pt") is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def _untouched(model, path, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_another_network(tmp_path):
    torch.save(models.build("resnet32").state_dict(), tmp_path / "w.pt")
    _untouched(models.build("resnet20"), tmp_path / "w.pt", "another network.*unexpected")


def test_weights_of_another_width(tmp_path):
    torch.save(models.build("resnet20", num_classes=100).state_dict(), tmp_path / "w.pt")
    _untouched(
        models.build("resnet20"), tmp_path / "w.pt", r"linear.weight must be \[10, 64\], got \[100, 64\]"
    )


def test_truncated_file(tmp_path):
    torch.save(models.build("lenet5").state_dict(), tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: len(content) // 2])
    _untouched(models.build("lenet5"), tmp_path / "w.pt", "not a readable file")


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_file_of_another_kind(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    _untouched(models.build("lenet5"), tmp_path / "w.pt", "not a readable file")


def test_hostile_pickle_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    with open(tmp_path / "w.pt", "wb") as file:
        pickle.dump({"conv1.weight": Hostile()}, file)
    _untouched(models.build("lenet5"), tmp_path / "w.pt", "not a readable file")
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        models.load_weights(models.build("lenet5"), tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("name", "option", "file"),
    [
        ("resnet20", "A", "akamaster/resnet20-12fca82f.th"),
        ("resnet32", "A", "akamaster/resnet32-d509ac18.th"),
        ("resnet44", "A", "akamaster/resnet44-014dd654.th"),
        ("resnet20", "B", "distiller/resnet20_cifar_dense.pt"),
    ],
)
def test_published_weights_fit(name, option, file):
    path = SHARED / "weights" / file
    if not path.is_file():
        pytest.skip(f"no {path}; set TENSORCOMP_DATA to a folder with weights/")
    models.load_weights(models.build(name, option=option), path)
