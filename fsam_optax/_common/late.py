"""Which arrays are worth being made late: when they are used, and no sooner."""

from typing import Any


SMALL = 1 << 16  # bytes


def is_small(x: Any) -> bool:
    """Tells whether an array may as well be held from the beginning.

    To make one wait takes ten operations, which have to be compiled.
    """
    return x.size * x.dtype.itemsize < SMALL
