"""How often each entry of a source counts in the squared norms that are asked for.

The squares of a gradient are linear in those of its sources, and so is what they sum up
to: the transpose of the moves tells how often each entry of a source counts in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._engine.jaxpr import evaluate
from fsam_optax._engine.moves import transposed
from fsam_optax._engine.sources import Source


Key = tuple[int, ...]


@dataclass(frozen=True)
class Ways:
    """The ways in which the entries of sources are counted.

    Attributes:
        numbers: By source, for each way how often every entry counts; one number if
            all count the same.
        owners: For each of these, the number of the wanted variable, and of the way to
            count its entries.
        asked: How many ways there are for each wanted variable.
    """

    numbers: dict[Key, list[jax.Array]]
    owners: dict[Key, list[tuple[int, int]]]
    asked: tuple[int, ...]

    def of_source(
        self, key: Key, source: Source, env: dict[Any, Any]
    ) -> list[jax.Array]:
        """Returns the numbers for what a source reduces, before it is finished."""
        finish: Any = source.finish

        def before(k):
            if finish is None or (source.keeps and k.ndim == 0):
                return k
            return transposed(lambda s: finish(s, 2, env), source.like, k)[0]

        return [before(k) for k in self.numbers[key]]

    def of_part(self, part: Any) -> list[list[jax.Array]]:
        """Returns the numbers for what a loop, by its steps, or a choice returns."""
        ways = [self.numbers[id(part.eqn.outvars[k]),] for k in part.outputs]
        steps = part.eqn.params.get("length")
        if steps is None:
            return ways
        return [
            [jnp.broadcast_to(k, (steps,)) if k.ndim == 0 else k for k in numbers]
            for numbers in ways
        ]

    def totals(self, sums: dict[Key, list[jax.Array]]) -> list[list[jax.Array]]:
        """Returns what is asked, from the sums of the sources.

        Those of a loop come by its steps.
        """
        totals: list[list[Any]] = [[0.0] * n for n in self.asked]
        for key, owners in self.owners.items():
            for (i, j), y in zip(owners, sums[key], strict=True):
                totals[i][j] = totals[i][j] + jnp.sum(y)
        return totals


def ways_to_count(
    plan: Any, env: dict[Any, Any], counts: Sequence[Sequence[jax.Array]]
) -> Ways:
    """Returns the ways to count the entries of the sources of a plan.

    Args:
        plan: The plan.
        env: The values of the program so far; those that moves read are added.
        counts: For each wanted variable, the ways to count its entries.
    """
    numbers: dict[Key, list[jax.Array]] = {}
    owners: dict[Key, list[tuple[int, int]]] = {}
    reads = [v for origin in plan.wanted for v in origin.all_reads()]
    # They are the same for all examples, so that they come out of no loop.
    evaluate(plan.flow.jaxpr.eqns, env, plan.flow.ancestors(reads))
    for i, (origin, ways) in enumerate(zip(plan.wanted, counts, strict=True)):
        for j, k in enumerate(ways):
            for key, found in origin.counts(k, env).items():
                numbers.setdefault(key, []).append(found)
                owners.setdefault(key, []).append((i, j))
    return Ways(numbers, owners, tuple(map(len, counts)))
