"""Multi30k: captions of images in German and English, from a local folder, checked."""

import gzip
import pathlib

import numpy as np


PARTS = {"train": 29_000, "val": 1014, "test_2016_flickr": 1000}


def read(folder: pathlib.Path) -> dict[str, list[tuple[str, str]]]:
    """Returns the pairs of lines of each part."""

    def lines(part, language):
        path = folder / f"{part}.{language}.gz"
        if not path.exists():
            raise SystemExit(
                f"There is no {path}; --data-dir must name a folder with the files of "
                "data/task1/raw in the repository multi30k/dataset on GitHub"
            )
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            found = [line.strip() for line in file]
        if len(found) != PARTS[part]:
            raise SystemExit(f"{path} has {len(found)} lines, expected {PARTS[part]}")
        return found

    return {p: [*zip(lines(p, "de"), lines(p, "en"), strict=True)] for p in PARTS}


def made_up() -> dict[str, list[tuple[str, str]]]:
    """Returns numbers in words, to be put into other words and the opposite order."""
    german = "null eins zwei drei vier fünf sechs sieben acht neun".split()
    english = "zero one two three four five six seven eight nine".split()
    random = np.random.default_rng(0)

    def pair():
        digits = random.integers(0, 10, random.integers(4, 9)).tolist()
        source = " ".join(german[d] for d in digits)
        return f"{source}.", " ".join(english[d] for d in reversed(digits)) + "."

    sizes = zip(PARTS, (200, 20, 20), strict=True)
    return {part: [pair() for _ in range(size)] for part, size in sizes}
