"""Moves: linear operations that shift entries about, or scale each by itself.

A gradient is moved from *sources*. Every entry of a moved value comes from one entry of
one source at most, times a number, so that sums of powers move in the same way. Nothing
on the way may be complex: (re + i im)^2 is not re^2 + im^2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._common.norms import widen
from fsam_optax._engine import multiples
from fsam_optax._engine.jaxpr import bind_in, Dataflow, is_real, read, size
from fsam_optax._engine.places import is_injective
from fsam_optax._engine.primitives import LINEAR_MOVES, name_of
from fsam_optax._engine.sums import scaled


@dataclass(frozen=True)
class Moved:
    """A value, as moved from others or as a source.

    Attributes:
        terms: The variables that the value is the sum of.
        parts: What it is moved from; empty for a source.
        carry: `carry(sums, p, env)`, the sums of p-th powers of the value from those of
            its parts.
        reads: The variables that `carry` reads.
        keeps: Whether each entry of the parts comes out once, at most negated.
        scaling: Operations for each entry of the value, where it does not.
    """

    terms: tuple[Any, ...]
    parts: tuple["Moved", ...] = ()
    carry: Callable[[Sequence[Any], int, dict[Any, Any]], Any] | None = None
    reads: tuple[Any, ...] = ()
    keeps: bool = True
    scaling: float = 2.0

    @property
    def key(self) -> tuple[int, ...]:
        """Returns what tells sources apart; literals do not hash."""
        return tuple(id(v) for v in self.terms)

    def sources(self) -> list["Moved"]:
        """Returns the sources that it is moved from, or itself."""
        found = [source for part in self.parts for source in part.sources()]
        return found if self.parts else [self]

    def all_reads(self) -> list[Any]:
        """Returns the variables that are read on the way from the sources."""
        return [*self.reads, *(v for part in self.parts for v in part.all_reads())]

    def sums(
        self,
        found: dict[tuple[int, ...], list[Any]],
        env: dict[Any, Any],
        powers: Sequence[int],
    ) -> list[Any]:
        """Returns the sums of powers, from those of the sources by their keys."""
        if self.carry is None:
            return found[self.key]
        inner = [part.sums(found, env, powers) for part in self.parts]
        return [
            self.carry([sums[k] for sums in inner], p, env)
            for k, p in enumerate(powers)
        ]

    @property
    def uniform(self) -> bool:
        """Tells whether each entry of the sources comes out once, at most negated."""
        keys = [source.key for source in self.sources()]
        return self._keeps_all() and len(set(keys)) == len(keys)

    def work(self) -> float:
        """Returns the operations on the way from the sources, other than moves."""
        scaled = 0.0 if self.keeps else self.scaling * size(self.terms[0])
        return scaled + sum(part.work() for part in self.parts)

    def _keeps_all(self):
        return self.keeps and all(part._keeps_all() for part in self.parts)

    def counts(self, k: Any, env: dict[Any, Any]) -> dict[tuple[int, ...], Any]:
        """Returns how often each entry of the sources counts, by their keys.

        What is linear in the squares of the value is so in those of its sources.

        Args:
            k: How often each entry of the value counts; one number if all the same.
            env: The values of the program.
        """
        sources = {source.key: source.terms[0].aval for source in self.sources()}
        if self.uniform and k.ndim == 0:
            return dict.fromkeys(sources, k)
        like = {key: [v] for key, v in sources.items()}
        (found,) = transposed(lambda s: self.sums(s, env, (2,))[0], like, k)
        return {key: s for key, (s,) in found.items()}


def transposed(fn: Callable, like: Any, k: jax.Array) -> tuple[Any, ...]:
    """Returns the transpose of a linear map at `k`; one number stands for all entries.

    Args:
        fn: The map.
        like: Shapes of its operand; the dtypes are widened.
        k: What is mapped back.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, widen(x.dtype)), like)
    zeros = jax.tree.map(lambda x: vary_like(x, k), zeros)
    y, pull = jax.vjp(fn, zeros)
    return pull(vary_like(jnp.broadcast_to(k.astype(y.dtype), y.shape), y))


def moved(
    flow: Dataflow,
    terms: Sequence[Any],
    formed: Callable,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Moved:
    """Returns how the sum of some variables is moved from sources; see `summands`.

    `scale` tells between what sizes the known constants are that scale it later on.
    """
    terms = [x for v in terms for x in flow.summands(v, formed)]
    terms = [v for v in terms if not flow.is_zero(v)] or terms[:1]
    eqns = [flow.made_by(v) for v in terms]
    if all(
        eqn is not None and flow.varies(v) for eqn, v in zip(eqns, terms, strict=True)
    ):
        for move in (_same_move, _boxes, _multiples):
            if found := move(flow, terms, eqns, formed, scale):
                return found
    return Moved(tuple(terms))


def moved_operand(flow: Dataflow, eqn: Any) -> int | None:
    """Returns the index of the operand that the equation moves; None if it does not."""
    if eqn is None or name_of(eqn) not in MOVES:
        return None
    varying = [i for i, v in enumerate(eqn.invars) if flow.varies(v)]
    if len(varying) != 1 or not all(
        map(is_real, (eqn.invars[varying[0]], *eqn.outvars))
    ):
        return None
    condition = MOVES[name_of(eqn)].condition
    return varying[0] if condition(flow, eqn, varying[0]) else None


def _same_move(flow, terms, eqns, formed, scale):
    """Returns a move that is the same for all terms, of the sum of what they move."""
    first, *rest = eqns
    i = moved_operand(flow, first)
    scale = multiples.scaled_by(flow, [first], scale)
    if i is None or not multiples.is_moderate(scale):
        return None
    k = first.outvars.index(terms[0])

    def alike(v, eqn):
        return (
            name_of(eqn) == name_of(first)
            and moved_operand(flow, eqn) == i
            and eqn.outvars.index(v) == k
            and eqn.invars[i].aval.shape == first.invars[i].aval.shape
            and all(
                _same(x, y)
                for x, y in zip(eqn.params.items(), first.params.items(), strict=True)
            )
            and all(
                _same_value(flow, x, y)
                for j, (x, y) in enumerate(zip(eqn.invars, first.invars, strict=True))
                if j != i
            )
        )

    if not all(alike(v, eqn) for v, eqn in zip(terms[1:], rest, strict=True)):
        return None

    def carry(sums, p, env):
        others = [
            jnp.asarray(read(env, x)) for j, x in enumerate(first.invars) if j != i
        ]
        return MOVES[name_of(first)].carry(first, i, k, others, sums[0], p)

    reads = tuple(x for j, x in enumerate(first.invars) if j != i)
    part = moved(flow, [eqn.invars[i] for eqn in eqns], formed, scale)
    keeps = MOVES[name_of(first)].keeps(first, i, k)
    return Moved(tuple(terms), (part,), carry, reads, keeps)


def _same(x, y):
    try:
        return bool(x == y)
    except Exception:
        return False


def _same_value(flow, x, y):
    if x is y:
        return True
    if x.aval.shape != y.aval.shape or flow.varies(x) or flow.varies(y):
        return False
    if flow.is_zero(x):
        return flow.is_zero(y)
    known = flow.known_value(x), flow.known_value(y)
    return known[0] is not None and np.array_equal(*known)


def _boxes(flow, terms, eqns, formed, scale):
    """Returns the move of parts that are nonzero on boxes which do not overlap.

    A box is the start, the stop and the step of each axis.
    """
    found: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
    shape = terms[0].aval.shape
    for eqn in eqns:
        pieces = _pieces(flow, eqn)
        if pieces is None:
            return None
        for box, v in pieces:
            found.setdefault(box, []).append(v)
    boxes = list(found)
    for k, box in enumerate(boxes):
        for other in boxes[:k]:
            if not any(map(_are_apart, box, other)):
                return None

    def carry(sums, p, env):
        axis = _stacked_along(boxes, shape)
        if axis is not None:
            order = sorted(range(len(boxes)), key=lambda k: boxes[k])
            return jnp.concatenate([sums[k] for k in order], axis)
        return sum(map(filled, boxes, sums))

    def filled(box, s):
        gaps = [(a, n - b, k - 1) for (a, b, k), n in zip(box, shape, strict=True)]
        return lax.pad(s, jnp.zeros((), s.dtype), gaps)

    parts = tuple(moved(flow, found[box], formed, scale) for box in boxes)
    return Moved(tuple(terms), parts, carry)


def _multiples(flow, terms, eqns, formed, scale):
    """Returns the move by the sum of the numbers that one value is scaled by."""
    del eqns
    found = multiples.common_multiple(flow, terms, moved_operand)
    if found is None:
        return None
    base, ways = found
    scale = multiples.scaled_by(flow, [eqn for way in ways for eqn in way], scale)
    if not multiples.is_moderate(scale):
        return None

    def carry(sums, p, env):
        (s,) = sums
        return scaled(s, multiples.multiple(flow, ways, env, s.dtype), p)

    reads = multiples.scales(flow, ways)
    each = 2.0 + len(reads) + len(terms) - 1
    part = moved(flow, [base], formed, scale)
    return Moved(tuple(terms), (part,), carry, reads, False, each)


def _are_apart(a, b):
    """Tells whether two ranges have nothing in common."""
    crossing = (a[0] - b[0]) % math.gcd(a[2], b[2]) == 0
    return a[1] <= b[0] or b[1] <= a[0] or not crossing


def _stacked_along(boxes, shape):
    """Returns the axis along which the boxes fill the shape; None if they do not."""
    if any(step != 1 for box in boxes for _, _, step in box):
        return None
    for axis, n in enumerate(shape):
        whole = all(
            span == (0, m, 1)
            for box in boxes
            for d, (span, m) in enumerate(zip(box, shape, strict=True))
            if d != axis
        )
        if whole and sum(box[axis][1] - box[axis][0] for box in boxes) == n:
            return axis
    return None


def _pieces(flow, eqn):
    """Returns boxes of the output and what fills them, where all else is zero."""
    if name_of(eqn) not in BOXES or not is_real(eqn.outvars[0]):
        return None
    return BOXES[name_of(eqn)](flow, eqn, eqn.outvars[0].aval.shape)


def _padded(flow, eqn, shape):
    config = eqn.params["padding_config"]
    if moved_operand(flow, eqn) != 0 or any(min(sides) < 0 for sides in config):
        return None
    box = tuple(
        (low, n - high, inside + 1)
        for (low, high, inside), n in zip(config, shape, strict=True)
    )
    return [(box, eqn.invars[0])]


def _concatenated(flow, eqn, shape):
    axis, start, pieces = eqn.params["dimension"], 0, []
    for v in eqn.invars:
        span = (start, start := start + v.aval.shape[axis], 1)
        box = tuple(span if d == axis else (0, n, 1) for d, n in enumerate(shape))
        if not flow.is_zero(v):
            pieces.append((box, v))
    return pieces


# What fills boxes of its output: name -> function that returns the boxes.
BOXES: dict[str, Callable] = {"pad": _padded, "concatenate": _concatenated}


# The table of moves.


@dataclass(frozen=True)
class Move:
    """How powers pass through a primitive.

    Attributes:
        condition: `condition(flow, eqn, i)` tells whether the equation moves operand i,
            the only one that differs between examples. It may rely on nothing being
            complex.
        carry: `carry(eqn, i, k, others, sums, p)` returns the sums of p-th powers of
            output k from those of operand i; `others` are the other operands.
        keeps: `keeps(eqn, i, k)` tells whether output k has each entry of operand i
            once, at most negated.
    """

    condition: Callable[[Dataflow, Any, int], bool]
    carry: Callable[..., Any]
    keeps: Callable[[Any, int, int], bool]


def _all_kept(eqn, i, k):
    del eqn, i, k
    return True


def _none_kept(eqn, i, k):
    del eqn, i, k
    return False


def _same_size(eqn, i, k):
    return size(eqn.invars[i]) == size(eqn.outvars[k])


def _nothing_cut(eqn, i, k):
    del i, k
    return all(min(low, high) >= 0 for low, high, _ in eqn.params["padding_config"])


def _rebound(eqn, i, k, others, s, p):
    del p
    return bind_in(s.dtype, eqn, [*others[:i], s, *others[i:]])[k]


def _converted(eqn, i, k, others, s, p):
    del i, others, p
    out = widen(eqn.outvars[k].aval.dtype)
    return s.astype(max(s.dtype, out, key=lambda dtype: dtype.itemsize))


def _negated(eqn, i, k, others, s, p):
    del eqn, i, k, others
    return -s if p % 2 else s


def _multiplied(eqn, i, k, others, s, p):
    del i, k
    y = scaled(s, others[0].astype(s.dtype), p)
    return y.reshape(eqn.outvars[0].aval.shape)


def _divided(eqn, i, k, others, s, p):
    del eqn, i, k
    for _ in range(p):
        s = s / others[0].astype(s.dtype)
    return s


def _always(flow, eqn, i):
    del flow, eqn, i
    return True


def _into_zeros(flow, eqn, i):
    return i == 1 and flow.is_zero(eqn.invars[0])


def _padding_with_zeros(flow, eqn, i):
    return i == 0 and flow.is_zero(eqn.invars[1])


def _first(flow, eqn, i):
    del flow, eqn
    return i == 0


def _beside_zeros(flow, eqn, i):
    others = [v for j, v in enumerate(eqn.invars) if j not in (0, i)]
    return i > 0 and all(map(flow.is_zero, others))


def _known_rows(flow, eqn, i):
    del flow
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return i == 0 and (not fills or eqn.params["fill_value"] == 0)


def _of_one(flow, eqn, i):
    del flow, i
    shape = eqn.invars[0].aval.shape
    return all(shape[d] == 1 for d in eqn.params["axes"])


def _scattered_apart(flow, eqn, i):
    return i == 2 and is_injective(flow, eqn)


MOVES: dict[str, Move] = dict.fromkeys(
    LINEAR_MOVES, Move(_always, _rebound, _same_size)
) | {
    "convert_element_type": Move(_always, _converted, _all_kept),
    "neg": Move(_always, _negated, _all_kept),
    "mul": Move(_always, _multiplied, _none_kept),
    "div": Move(_first, _divided, _none_kept),
    "pad": Move(_padding_with_zeros, _rebound, _nothing_cut),
    "dynamic_update_slice": Move(_into_zeros, _rebound, _all_kept),
    "dynamic_slice": Move(_first, _rebound, _same_size),
    "select_n": Move(_beside_zeros, _rebound, _none_kept),
    "gather": Move(_known_rows, _rebound, _none_kept),
    "bcoo_extract": Move(lambda flow, eqn, i: i == 1, _rebound, _none_kept),
    "scatter-add": Move(_scattered_apart, _rebound, _all_kept),
    "reduce_sum": Move(_of_one, _rebound, _all_kept),
}
