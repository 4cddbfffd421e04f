"""Which leaves are biases, told by their names, places and axes."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np


_WEIGHTS = frozenset({"w", "k", "weight", "kernel", "embedding", "table", "scale"})


class _Place(NamedTuple):
    """Where a leaf stands: in which container, by which name, at which number."""

    container: tuple[str, ...]
    name: str
    number: int | None


def _label(key: Any) -> str | int:
    """Returns what a key of a path is called."""
    for attribute in ("key", "name", "idx"):
        label = getattr(key, attribute, None)
        if label is not None:
            return label if isinstance(label, int) else str(label)
    return str(key)


def _place(path: tuple[Any, ...]) -> _Place:
    labels = [_label(key) for key in path]
    # Flax keeps the array of a variable one attribute further down.
    while len(labels) > 1 and labels[-1] in ("value", "raw_value"):
        labels.pop()
    upper = tuple(map(str, labels[:-1]))
    names = [label for label in labels if isinstance(label, str)]
    # A flat dictionary holds the whole path in its key: "encoder.0.bias".
    *prefix, name = re.split(r"[./]", names[-1]) if names else [""]
    if labels and isinstance(labels[-1], int):
        return _Place(upper, name, labels[-1])
    return _Place((*upper, *prefix), name, None)


def _words(name: str) -> list[str]:
    """Splits `in_proj_bias`, `biasIH`, `b1` into words, in the singular."""
    words = [word.lower() for word in re.findall(r"[A-Za-z][a-z]*", name)]
    return ["bias" if w in ("bias", "biases") else w.removesuffix("s") for w in words]


def _says_bias(name: str) -> bool:
    words = _words(name)
    if words in (["beta"], ["offset"]):
        return True
    if "bias" not in words[:1] + words[-1:]:
        return False
    return words[-1] == "bias" or not _WEIGHTS.intersection(words)


def _instead_of_b(name: str, *others: str) -> list[str]:
    """Returns names with another letter or word where `b1`, `bq`, `fc_b` have a b."""
    at_the_ends = (r"^b", r"(?<![A-Za-z])b(?=_?\d*$)")
    return [
        re.sub(b, other, name)
        for b in at_the_ends
        if re.search(b, name)
        for other in others
    ]


def _long_axes(shape: tuple[int, ...]) -> int:
    return sum(n != 1 for n in shape)


def biases(params: Any) -> Any:
    """Returns a bool for every leaf: whether it is a bias.

    1. By its name, whatever its shape: one whose last word is `bias`, or whose first
       word is and no other says weight; `beta`; `offset`.
    2. By the weight it belongs to, if it has fewer axes than that, or fewer longer than
       1: named as that with a `b` for the `w` (`b1` and `W1`, `bq` and `wq`), but not
       the second factor of LoRA, which has an `a` of as many axes beside it. Or the
       entry after it, without a name, in a list or tuple: `[(W, b)]`.
    3. Called `b`, with a number or without, and of at most one axis.

    The name is the last key that is no number, in a flat dictionary what comes after
    its last `.` or `/`. Numbers in it do not count.
    """
    leaves, structure = jax.tree.flatten(params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    places = [_place(path) for path in paths]
    shapes = dict(zip(places, map(np.shape, leaves), strict=True))

    def beside(place, *others):
        names = _instead_of_b(place.name, *others)
        named = [place._replace(name=name) for name in names]
        return [shapes[p] for p in named if p in shapes]

    def follows_its_weight(place, shape):
        if place.number is None or _WEIGHTS.intersection(_words(place.name)):
            return False
        weight = shapes.get(place._replace(number=place.number - 1), ())
        # (1, n), but not (n, 1), which could be the next weight.
        row = shape[-1:] == weight[-1:] and _long_axes(shape) == 1 < _long_axes(weight)
        return len(shape) < len(weight) or (len(shape) == len(weight) and row)

    def is_bias(place):
        shape = shapes[place]
        if _says_bias(place.name) or follows_its_weight(place, shape):
            return True
        if len(shape) < 2 and re.fullmatch(r"b_?\d*", place.name):
            return True
        if len(shape) > 1 and any(len(a) == len(shape) for a in beside(place, "a")):
            return False
        return any(
            len(shape) < len(w)
            or (len(shape) == len(w) and _long_axes(shape) < _long_axes(w))
            for w in beside(place, "w", "W", "k", "kernel", "weight")
        )

    return structure.unflatten(map(is_bias, places))
