"""What is said of the rules: a table, and a warning where one is slow."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


PyTree = Any
# A fallback of so little more work than the gradient's own is not worth a warning.
LITTLE = 1.5
REMEDY = (
    "Make weights from parameters by products, sums, rows at fixed places and maps of "
    "single entries, the same for all examples, or use the parameters in another way"
)


class Used(NamedTuple):
    """A rule that a parameter uses, for all of it or for a part.

    Attributes:
        rule: Its name.
        work: Its operations for one example.
        own: Those of the gradient itself.
        note: Why it is a fallback.
    """

    rule: str
    work: float
    own: float
    note: str = ""


class Leaf(NamedTuple):
    """How the sums of one parameter are formed.

    Attributes:
        path: Key path of the parameter.
        shape: Its shape.
        rule: "outer product", "shared dense", "convolution", "embedding", "reduction",
            "constant", "Gram matrices" and the like, "mapped" where a linear map of a
            product is formed, or "fallback"; several, joined by commas, for one that
            has parts.
        cost: Operations of the rule, relative to those of the gradient of this
            parameter alone; infinity if the program could not be looked into.
        note: Why it falls back, and what to write instead.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    cost: float
    note: str = ""


class Explanation(tuple[Leaf, ...]):
    """The rule for each parameter; a table when printed, with remarks below.

    Attributes:
        cost: Operations of one pass for all parameters, forward and backward, relative
            to those of one gradient of the batch.
        remarks: What to know beside the table.
    """

    cost: float
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Returns one line per parameter, what all cost, then the remarks."""
        rows = [("parameter", "shape", "rule", "cost")]
        rows += [(x.path, str(x.shape), x.rule, f"{x.cost:.2f}") for x in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                cell.ljust(w) for cell, w in zip(row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        notes = [f"{x.path}: {x.note}" for x in self if x.note]
        whole = f"All of it costs {self.cost:.2f} gradients of the batch."
        return "\n".join([*table, whole, *notes, *self.remarks])


def leaves_of(params: PyTree, report: Sequence[Sequence[Used]]) -> list[Leaf]:
    """Returns, for each parameter, what a report says of it."""
    found = []
    for (path, leaf), rules in zip(
        jax.tree_util.tree_leaves_with_path(params), report, strict=False
    ):
        own = sum(x.own for x in rules)
        cost = sum(x.work for x in rules) / own if own else 1.0
        name = ", ".join(dict.fromkeys(x.rule for x in rules))
        note = " ".join(dict.fromkeys(x.note for x in rules if x.note))
        found.append(
            Leaf(jax.tree_util.keystr(path), jnp.shape(leaf), name, cost, note)
        )
    return found


def warn_of_fallbacks(leaves: Sequence[Leaf]) -> None:
    """Warns once of all parameters whose gradients are formed example by example."""
    slow = [x for x in leaves if x.note and x.cost > LITTLE]
    if slow:
        named = "; ".join(
            f"{x.path or 'the parameter'} ({x.cost:.3g} times the work of its "
            f"gradient): {x.note}"
            for x in slow
        )
        warnings.warn(
            "The gradients of single examples are formed, a few at a time, for "
            f"{named} {REMEDY}; `explain` tells which rule each parameter takes.",
            stacklevel=4,
        )
