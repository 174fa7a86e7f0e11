"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dataset import Dataset

INSTALL_DEMO = (
    "{module}: pip install 'tensorcomp_ext[demo]' "
    "(in a source tree: pip install --no-build-isolation '.[demo]')"
)


def read_digits(size: int = 32) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak 1998), upscaled by bilinear interpolation.

    The split is fixed and stratified: of each class every fifth image, in the order of the file, is a test
        image
    (1,442 training, 355 test images).

    Arguments:
        size: side of the upscaled images, at least 8.

    Raises ValueError for a smaller size; ModuleNotFoundError where scikit-learn is not installed.
    """
    if size < 8:
        raise ValueError(f"digits: size must be at least 8, got {size}")
    # Imported here: everything else in the package works without scikit-learn.
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the data set digits needs {INSTALL_DEMO.format(module='scikit-learn')}"
        ) from error

    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)  # [1797, 1, 8, 8], 0..16 in the file
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    test = torch.zeros_like(labels, dtype=torch.bool)
    for label in range(10):
        test[torch.nonzero(labels == label).flatten()[4::5]] = True
    train_images = images[~test]
    unit = train_images.double() / 255
    return Dataset(
        name="digits",
        train_images=train_images,
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        mean=(unit.mean().item(),),
        std=(unit.std().item(),),
        classes=tuple(map(str, range(10))),
    )
