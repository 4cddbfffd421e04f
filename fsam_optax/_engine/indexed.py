"""Weights that are looked up at places known beforehand, as of a Toeplitz matrix.

The gradient of `v` in `x @ v[index]` adds up, for each entry of v, those entries of an
outer product that have its index. The product is not formed: each of its entries is
made where it is added,

    s_t = sum_e c_e a[i_e] g[j_e],  over the entries e that have index t,

for many examples, which lie side by side. A step of a loop takes one entry of each
list; long lists are cut, and their parts added up afterwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fsam_optax._engine.factored import factored, products_of
from fsam_optax._engine.grouping import FEW, Group
from fsam_optax._engine.jaxpr import size
from fsam_optax._engine.rows import gathered, into_table, looked_up, numbers_of_rows
from fsam_optax._engine.sources import Site, Source, Summation
from fsam_optax._engine.sums import added_up, apart, power
from fsam_optax._engine.waiting import zeros_after


PER_ENTRY, PER_LIST = 4.0, 2.0  # Operations: two places are read, and those sums.
HELD = 32.0  # What a list counts for by being held, where its length is chosen.
MOST_ENTRIES = 1 << 21  # Their places are constants of the program.
LANES = 128  # Examples and cotangents that lie side by side.
STARTING = 20.0  # Operations that one entry takes besides, whatever the lanes.


def symmetric(site: Site) -> Source | None:
    """A matrix looked up by an index that is symmetric."""
    found = looked_up(site.flow, site.terms[0]) if len(site.terms) == 1 else None
    if found is None or len(found[0]) != 1 or found[1].rows not in site.inside:
        return None
    indexed, lookup = found
    index = site.flow.known_value(lookup.index)
    shape = lookup.rows.aval.shape
    if index is None or lookup.window or len(shape) != 2 or shape[0] != shape[1]:
        return None
    index = index.reshape(shape)
    row, column = np.tril_indices(shape[0])
    places = index[row, column]
    if (
        np.any(index != index.T)
        or len(np.unique(places)) < len(places)
        or np.any((places < 0) | (places >= site.like.shape[0]))
    ):
        return None
    # The sum of the gradient of the matrix and its transpose, twice the diagonal.
    what = dataclasses.replace(site.what, uniform=False)
    both = dataclasses.replace(site, terms=(lookup.rows,), what=what)
    source = factored(both, mirrored=True)
    if source is None:
        return None
    inner = source.finish
    like = lookup.rows.aval if source.like is None else source.like

    def finish(s, p, env):
        s = s if inner is None else inner(s, p, env)
        s = s[row, column] * jnp.where(row == column, 0.5**p, 1)
        return into_table(site, indexed, jnp.asarray(places), s)

    return dataclasses.replace(source, finish=finish, like=like, keeps=False)


def indexed_product(site: Site) -> Source | None:
    """Products whose entries are added up at known places."""
    targets = [_targets(site, v) for v in site.terms]
    if any(x is None for x in targets):
        return None
    groups, operands = [], {}
    for v, at in zip(site.terms, targets, strict=True):
        rows = site.flow.made_by(v).invars[-1]
        one = dataclasses.replace(site, terms=(rows,))
        found = products_of(one, site.what.limit)
        if found is None:
            return None
        groups += [(group, at) for group in found[0]]
        operands |= dict.fromkeys(found[1])
    positions = [sum(g.positions()) for g, _ in groups]
    entries = sum(n * at.size for n, (_, at) in zip(positions, groups, strict=True))
    if max(positions) >= FEW or entries > MOST_ENTRIES:
        return None
    if all(len(g.sides) == 1 for g, _ in groups):
        return None
    return _source(site, groups, tuple(operands))


def _targets(site, v):
    """Returns where each entry of scattered rows goes; the size of the table if out.

    None for what is not scattered, or to places that are not known.
    """
    found = looked_up(site.flow, v)
    if found is None:
        return None
    indexed, lookup = found
    index = site.flow.known_value(lookup.index)
    if index is None or size(lookup.rows) > MOST_ENTRIES:
        return None
    shape, rows = v.aval.shape, lookup.rows.aval.shape
    bounds = [shape[d] for d in indexed]
    with jax.ensure_compile_time_eval():
        flat = np.asarray(numbers_of_rows(jnp.asarray(index), bounds, lookup))
    table = np.moveaxis(np.arange(size(v)).reshape(shape), indexed, range(len(bounds)))
    table = table.reshape(math.prod(bounds), -1)
    table = np.concatenate([table, np.full_like(table[:1], size(v))])
    # In the axes of the rows, among which those of a window may lie anywhere.
    window = lookup.window
    order = [*(d for d in range(len(rows)) if d not in window), *window]
    found = table[flat].reshape([rows[d] for d in order])
    return np.transpose(found, np.argsort(order))


class Lists(NamedTuple):
    """What is added up for each target: lists of one length, or parts of them.

    Attributes:
        left: The places of the first factors.  # shape=(length, lists)
        right: Those of the second ones.  # shape=(length, lists)
        scale: Those of constants that they are multiplied with, or None.
        owner: The number of the target that a list belongs to.  # shape=(lists,)
        targets: Where the targets lie.  # shape=(targets,)
    """

    left: np.ndarray
    right: np.ndarray
    scale: np.ndarray | None
    owner: np.ndarray
    targets: np.ndarray

    @property
    def are_cut(self) -> bool:
        """Tells whether a target has several lists."""
        return len(self.owner) > len(self.targets)


def _lists(groups: Sequence[tuple[Group, np.ndarray]], out: int) -> Lists:
    """Returns the entries of products by where they are added, below `out`.

    Where a list is shorter than others, it is filled up with the last of the factors,
    which are zeros; what has no second factor has the one before it, a one.
    """
    sizes = [sum(_sizes(g, side) for g, _ in groups) for side in (0, 1)]
    start, found, scales = [0, 0], [], 1
    for g, at in groups:
        masked = bool(g.terms[0].masks)
        for n in g.positions():
            batch, *sides = (g.volume(x) for x in (g.batch, *g.sides))
            with jax.ensure_compile_time_eval():
                ids = jnp.arange(batch * math.prod(sides))
                ids = ids.reshape([g.sizes[x] for x in g.labels])
                ids = np.asarray(g.arranged(ids, g.labels)).reshape(-1)
            b, *rest = np.unravel_index(ids, (batch, *sides))
            scale = scales + np.arange(at.size) if masked else np.zeros_like(ids)
            for t in range(n):
                factors = [
                    begin + (b * n + t) * m + x
                    for begin, m, x in zip(start, sides, rest, strict=False)
                ]
                factors += [np.full_like(ids, sizes[1])] * (2 - len(sides))
                found.append((*factors, scale, at.reshape(-1)))
            for k, m in enumerate(sides):
                start[k] += batch * n * m
        scales += at.size * masked
    left, right, scale, targets = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.argsort(targets, kind="stable")
    order = order[targets[order] < out]
    targets, number, counts = np.unique(
        targets[order], return_inverse=True, return_counts=True
    )
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = _length(counts)
    each = -(-counts // length)
    place = (np.cumsum(each) - each)[number] + rank // length
    shape = length, int(np.sum(each))

    def filled(values, rest):
        y = np.full(shape, rest, np.int32)
        y[rank % length, place] = values[order]
        return y

    return Lists(
        filled(left, sizes[0]),
        filled(right, sizes[1] + 1),
        filled(scale, 0) if scales > 1 else None,
        np.repeat(np.arange(len(targets)), each),
        targets,
    )


def _sizes(group, side):
    """Returns how many entries the first or second factors of products have."""
    if side >= len(group.sides):
        return 0
    each = group.volume(group.batch) * group.volume(group.sides[side])
    return sum(group.positions()) * each


def _length(counts):
    """Returns the length of lists that takes the least work."""
    longest = int(np.max(counts, initial=1))
    lengths = {min(1 << k, longest) for k in range(longest.bit_length() + 1)}

    def work(length):
        lists = np.sum(-(-counts // length))
        return (PER_ENTRY * length + HELD) * lists

    return min(sorted(lengths, reverse=True), key=work)


def _source(site, groups, operands):
    what, dtype, out = site.what, groups[0][0].dtype, size(site.terms[0])
    lists = _lists(groups, out)
    several = len(lists.targets), len(lists.owner)

    def prepare(*values):
        env = dict(zip(operands, values, strict=True))
        left, right, scales = [], [], [jnp.ones(1, dtype)]
        for g, _ in groups:
            for first, *second in g.factors(env):
                left.append(first.reshape(-1))
                right += [x.reshape(-1) for x in second]
            if masks := g.masks(env):
                ones = jnp.ones([g.sizes[x] for x in g.labels], dtype)
                scales.append(g.placed(ones, masks, 1).reshape(-1))
        left.append(jnp.zeros(1, dtype))
        right.append(jnp.asarray([1, 0], dtype))
        found = [jnp.concatenate(left), jnp.concatenate(right)]
        return found + ([] if lists.scale is None else [jnp.concatenate(scales)])

    def finish(s, p, env):
        del p, env
        if len(lists.targets) < out:
            s = jnp.zeros(out, s.dtype).at[lists.targets].set(s)
        return s.reshape(site.like.shape)

    factors = sum(_sizes(g, side) for g, _ in groups for side in (0, 1)) + 3
    held = (factors + sum(several)) * dtype.itemsize
    lanes = max(1, min(LANES, what.budget // held))
    reduce = _over_lanes(functools.partial(_added, lists), what, lanes)
    entries = lists.left.size
    scaled = lists.scale is not None
    work = sum(t.work for g, _ in groups for t in g.terms) + factors
    work += (PER_ENTRY + scaled) * entries + PER_LIST * lists.are_cut * several[1]
    work += what.per_entry * several[0]
    # The places are read once for as many examples as lie side by side.
    together = min(what.examples, lanes)
    work += (2 + 2 * scaled) * entries / together
    waits = STARTING * entries / together
    like = jax.ShapeDtypeStruct((several[0],), dtype)
    return Source(
        "indexed product",
        work + waits,
        operands,
        reduce,
        held,
        prepare,
        finish,
        like,
        waits=waits,
    )


def _added(lists, left, right, *scales):
    """Returns what is added up for each target, with the axis of the lanes.

    Args:
        lists: What is added up.
        left: First factors.  # shape=(factors, lanes)
        right: Second factors.  # shape=(factors, lanes)
        scales: Constants, if there are any.  # shape=(constants,)
    """
    places = [jnp.asarray(x) for x in lists[:3] if x is not None]

    def step(k, before):
        at = [lax.dynamic_index_in_dim(x, k, keepdims=False) for x in places]
        x, y, *z = (
            gathered(values, i)
            for values, i in zip((left, right, *scales), at, strict=True)
        )
        product = x * y
        return [before[0] + (product * z[0][:, None] if z else product)]

    lanes = left.shape[1]
    like = jax.ShapeDtypeStruct((len(lists.owner), lanes), left.dtype)
    zeros = zeros_after([left, right], [like], False)
    (sums,) = lax.fori_loop(0, len(lists.left), step, zeros)
    if not lists.are_cut:
        return sums
    whole = jnp.zeros((len(lists.targets), lanes), sums.dtype)
    return whole.at[lists.owner].add(sums, mode="promise_in_bounds")


def _over_lanes(added: Callable, what: Summation, lanes: int) -> Callable:
    """Returns the rule that adds up for some examples and cotangents at a time.

    Args:
        added: Maps factors, whose last axis is that of the lanes, to sums for each.
        what: What is summed.
        lanes: How many lie side by side.
    """

    def of_lanes(ks, weight, left, right, *scales):
        x = added(left.T, right.T, *scales)
        if not what.by_example:
            return [jnp.sum(power(x, p) * weight, 1) for p in what.powers]
        ks = [k if k.ndim == 0 else k[:, None] for k in ks]
        return [jnp.sum(k * (x * x), 0) for k in ks]

    def of_share(ks, scales, weight, left, right):
        given = [
            x.reshape(weight.size, *x.shape[weight.ndim :])
            for x in (weight, left, right)
        ]
        steps = -(-weight.size // lanes)
        if steps == 1:
            return of_lanes(ks, *given, *scales)
        each = -(-weight.size // steps)
        rest = steps * each - weight.size
        given = [jnp.pad(x, [(0, rest), *[(0, 0)] * (x.ndim - 1)]) for x in given]
        given = [x.reshape(steps, each, *x.shape[1:]) for x in given]
        found = lax.map(lambda x: of_lanes(ks, *x, *scales), tuple(given))
        if what.by_example:
            return [y.reshape(-1)[: weight.size] for y in found]
        return [jnp.sum(y, 0) for y in found]

    def reduce(number, has, weight, *args):
        ks, (left, right, *scales) = args[:number], args[number:]
        has = has[1 + number :]

        def spread(x, own):
            x = jnp.expand_dims(x, [d for d, b in enumerate(own) if not b])
            return jnp.broadcast_to(x, (*weight.shape, x.shape[-1]))

        given = weight, spread(left, has[0]), spread(right, has[1])
        one = functools.partial(of_share, ks, scales)
        if weight.ndim == 0:
            found = one(*given)
            return [y.reshape(()) for y in found] if what.by_example else [found]
        share = math.gcd(len(weight), what.examples)
        found = apart(one, share, (0, 0, 0), given)
        if what.by_example:
            return [y.reshape(-1) for y in found]
        return [added_up(found)]

    return reduce if what.by_example else functools.partial(reduce, 0)
