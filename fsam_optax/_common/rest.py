"""What a model holds beside its parameters, on its way to a pure function."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rest:
    """What a module consists of beside its parameters.

    The front end of a framework with stateful modules passes it as the first argument
    after the batch, so that it reaches both passes and every estimator. It belongs to
    no example: it is not cut into micro-batches, but its PRNG keys are folded.

    Attributes:
        state: Arrays: statistics, PRNG keys and their counts, metrics.
        structure: What makes a module of them and the parameters.
    """

    state: Any
    structure: Any = dataclasses.field(metadata={"static": True})


def without_rest(args: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the arguments that the caller passed: all but the rest of a module."""
    return tuple(x for x in args if not isinstance(x, Rest))
