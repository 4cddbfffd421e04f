"""Operations that `jax.vmap` is told how to map: it sums over the examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap


def reduced(reduce: Callable, axes: int, summed: bool = True) -> Callable:
    """Returns an operation that the next `axes` maps sum over, and no later one.

    If not `summed`, an operation whose results keep the axis of the one map.

    `jax.vmap` stacks what an operation returns for each example. The operation returned
    here is told to add it up instead. The weight is mapped by each of the library's
    axes, so that counting its maps tells them from those of the caller.
    """

    def over(has: tuple[tuple[bool, ...], ...] | None, axes: int) -> Callable:
        def run(*args):
            return reduce(has or ((),) * len(args), *args)

        if axes == 0:
            return run
        operation = custom_vmap(run)

        @operation.def_vmap
        def rule(axis_size, mapped, *args):
            del axis_size
            if not mapped[0]:
                raise NotImplementedError("a map that is not over examples")
            before = has or ((),) * len(args)
            out = over(
                tuple((b, *h) for b, h in zip(mapped, before, strict=True)), axes - 1
            )(*args)
            return out, jax.tree.map(lambda _: not summed, out)

        return operation

    return over(None, axes)


def reduced_together(
    calls: Mapping[Any, tuple[Callable, Sequence[Any]]],
    weight: jax.Array,
    axes: int,
    summed: bool = True,
) -> dict[Any, Any]:
    """Returns what several operations return, by the names of their calls.

    Args:
        calls: By name, `reduce` of an operation and its operands.
        weight: The weight of the example, which all operations are given.
        axes: See `reduced`.
        summed: See `reduced`.
    """
    # Programs keep the operation, which must not keep what was traced.
    counts = [(fn, len(given)) for fn, given in calls.values()]

    def reduce(has, weight, *operands):
        found, start = [], 0
        for fn, count in counts:
            own = slice(start, start := start + count)
            found.append(fn((has[0], *has[1:][own]), weight, *operands[own]))
        return found

    operands = [x for _, given in calls.values() for x in given]
    found = reduced(reduce, axes, summed)(weight, *operands)
    return dict(zip(calls, found, strict=True))
