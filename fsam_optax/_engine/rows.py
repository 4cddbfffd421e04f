"""Sums of powers of rows that are scattered into a table, as by an embedding.

Rows of one example that fall on the same entry are added before the power. For this
every row is sent to the first one that has its index, which takes time linear in the
number of rows.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._engine.factored import factored
from fsam_optax._engine.jaxpr import Dataflow, is_real, size
from fsam_optax._engine.primitives import name_of, SCATTER
from fsam_optax._engine.sources import Site, Source
from fsam_optax._engine.squares import looped, mapped, square
from fsam_optax._engine.sums import power, widened
from fsam_optax._engine.waiting import on_one_device, zeros_after


# A table of so many entries a row is filled for each example, rather than rows sorted.
SMALL_TABLE = 32
BLOCK = 32  # Rows that are summed at a time where many fall on one entry.


class Lookup(NamedTuple):
    """Rows scattered into zeros.

    Attributes:
        index: Variable or literal with the indices.  # shape=(..., axes indexed)
        rows: Variable with the rows.
        window: The axes of a row within `rows`.
        columns: The numbers in `index` that count, one for each axis that is indexed.
        mode: What is done with indices out of bounds.
    """

    index: Any
    rows: Any
    window: tuple[int, ...]
    columns: tuple[int, ...]
    mode: Any


def looked_up(flow: Dataflow, v: Any) -> tuple[tuple[int, ...], Lookup] | None:
    """Returns the axes of `v` that are indexed, and the rows; None if it is no such."""
    eqn = flow.made_by(v)
    if name_of(eqn) != SCATTER or not flow.is_zero(eqn.invars[0]) or not is_real(v):
        return None
    numbers = eqn.params["dimension_numbers"]
    mode = eqn.params["mode"]
    _, index, rows = eqn.invars
    if numbers.operand_batching_dims or isinstance(rows, Literal):
        return None
    shape = v.aval.shape
    kept = (d for d in range(len(shape)) if d not in numbers.inserted_window_dims)
    window = dict(zip(kept, numbers.update_window_dims, strict=True))
    indexed = {}
    for column, d in enumerate(numbers.scatter_dims_to_operand_dims):
        n = rows.aval.shape[window[d]] if d in window else 1
        # Where none is dropped, a window that is all of its axis always starts at 0.
        if n == shape[d] > 1 and mode != lax.GatherScatterMode.FILL_OR_DROP:
            continue
        if n != 1:
            return None
        indexed[d] = column
        window.pop(d, None)  # As `dynamic_slice` under `vmap` leaves it, of size 1.
    if set(indexed) | set(window) != set(range(len(shape))) or any(
        rows.aval.shape[axis] != shape[d] for d, axis in window.items()
    ):
        return None
    axes, columns = tuple(indexed), tuple(indexed.values())
    return axes, Lookup(index, rows, tuple(window.values()), columns, mode)


def embedding(site: Site) -> Source | None:
    """Returns the source for the rows of one or several lookups; None for others."""
    known_lookups = [looked_up(site.flow, v) for v in site.terms]
    found = [x for x in known_lookups if x is not None]
    if len(found) < len(known_lookups) or len({axes for axes, _ in found}) != 1:
        return None
    indexed = found[0][0]
    lookups = [lookup for _, lookup in found]
    operands = [x for lookup in lookups for x in (lookup.index, lookup.rows)]
    small = all(
        (isinstance(x.index, Literal) or site.is_small(x.index))
        and site.is_small(x.rows)
        for x in lookups
    )
    if not small:
        return None
    known = [site.flow.known_value(lookup.index) for lookup in lookups]
    bounds, window = _table(site, indexed)
    rows = sum(size(x.rows) for x in lookups) // max(math.prod(window), 1)
    if any(x is None for x in known):
        work = site.own_work()
        if math.prod(bounds) <= rows:
            # The table is no larger than its rows: it is filled for each example.
            fn = _filled(site, indexed, lookups)
            reduce = looped(fn, [site.like], site.what, None)
            work += rows * max(4.0 * len(indexed) - 2, 0.0)
            work += site.what.per_entry * size(site.terms[0])
        else:
            rule = _squares if site.what.by_example else _reduction
            reduce = rule(site, indexed, lookups)
            entries, width = math.prod(bounds), math.prod(window)
            work += _merging_work(site, rows, entries, width, indexed)
        return Source("embedding", work, tuple(operands), reduce)
    return _at_known_places(site, indexed, lookups, known)


def _merging_work(site, rows, entries, width, indexed):
    """Returns the operations by which rows of the same place are added and squared.

    Beside those by which they come into the table.
    """
    places = rows * max(4.0 * len(indexed) - 2, 0.0)
    summing = site.what.per_entry - 1
    if rows > 1:
        by_table = entries <= SMALL_TABLE * rows
        places += rows * (2.0 if by_table else math.log2(rows) + 6)
        summing += 1
    return places + summing * rows * width


def _flat(index, bounds, lookup):
    """Returns indices as numbers of rows of the table; its size if out of bounds."""
    if jnp.iinfo(index.dtype).bits < 32:
        index = index.astype(jnp.int32)
    # Dropped, also where it was promised to be inside, as XLA does.
    fills = lookup.mode != lax.GatherScatterMode.CLIP
    flat = jnp.zeros((), index.dtype)
    inside: Any = True
    for k, (column, n) in enumerate(zip(lookup.columns, bounds, strict=True)):
        x = index[..., column]
        if fills:
            # Below zero is far above as a number without sign.
            unsigned = x.astype(f"uint{jnp.iinfo(x.dtype).bits}") < n
            inside = unsigned & inside if k else unsigned
        else:
            x = jnp.clip(x, 0, n - 1)
        flat = flat * n + x if k else x
    if fills and lookup.columns:
        flat = jnp.where(inside, flat, math.prod(bounds))
    return jnp.broadcast_to(flat, index.shape[:-1]).reshape(-1)


def _scattered(scatter, table, index, rows):
    """Scatters rows into a table at indices that are not negative."""
    numbers = lax.ScatterDimensionNumbers(tuple(range(1, rows.ndim)), (0,), (0,))
    drop = lax.GatherScatterMode.FILL_OR_DROP
    return scatter(table, index[:, None], rows, numbers, mode=drop)


def _gathered(table, index):
    """Returns rows of a table at indices within bounds."""
    numbers = lax.GatherDimensionNumbers(tuple(range(1, table.ndim)), (0,), (0,))
    clip = lax.GatherScatterMode.CLIP
    return lax.gather(table, index[:, None], numbers, (1, *table.shape[1:]), mode=clip)


def _stacked(rows, window):
    """Returns rows as (rows, *window)."""
    n = len(window)
    rows = jnp.moveaxis(rows, window, range(rows.ndim - n, rows.ndim))
    return rows.reshape(-1, *rows.shape[rows.ndim - n :])


def first_alike(index: jax.Array, entries: int) -> jax.Array:
    """Returns, for each index, the place of the first that is equal.

    Args:
        index: Numbers up to `entries`, inclusive.  # shape=(rows,)
        entries: How many entries the table has.
    """
    (n,) = index.shape
    places = lax.iota(jnp.int32, n)
    if entries <= SMALL_TABLE * n:
        first = vary_like(jnp.full(entries + 1, n, jnp.int32), index)
        return _gathered(_scattered(lax.scatter_min, first, index, places), index)
    ordered, order = lax.sort_key_val(index, places)
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    start = lax.cummax(jnp.where(new, places, 0))
    first = vary_like(jnp.zeros(n, jnp.int32), order)
    return _scattered(lax.scatter, first, order, _gathered(order, start))


def _table(site, indexed):
    """Returns the sizes of the axes that are indexed, and of those that are not."""
    shape = site.like.shape
    return [shape[d] for d in indexed], [
        n for d, n in enumerate(shape) if d not in indexed
    ]


def _into_table(site, indexed, flat, rows, alone=False):
    """Scatters rows (rows, *window) into zeros of the shape of the sum."""
    bounds, window = _table(site, indexed)
    like = jax.ShapeDtypeStruct((math.prod(bounds), *window), rows.dtype)
    (zeros,) = zeros_after([rows], [like], alone)
    table = _scattered(lax.scatter_add, zeros, flat, rows).reshape(*bounds, *window)
    return jnp.moveaxis(table, range(len(bounds)), indexed)


def _filled(site, indexed, lookups):
    """Returns the function that fills the table with the rows of one example."""
    bounds, _ = _table(site, indexed)
    dtype = widened(site.like.dtype)

    def fn(*operands):
        flat = [
            _flat(i, bounds, k) for i, k in zip(operands[::2], lookups, strict=True)
        ]
        rows = [
            _stacked(x.astype(dtype), k.window)
            for x, k in zip(operands[1::2], lookups, strict=True)
        ]
        flat, rows = (jnp.concatenate(x) if len(x) > 1 else x[0] for x in (flat, rows))
        return [_into_table(site, indexed, flat, rows)]

    return fn


def _numbered(lookups, bounds, *index):
    """Returns the places of all rows, and for each the first of the same place."""
    flat = [_flat(x, bounds, k) for x, k in zip(index, lookups, strict=True)]
    flat = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
    return flat, first_alike(flat, math.prod(bounds)) if len(flat) > 1 else None


def _merged(lookups, dtype, first, *rows):
    """Returns all rows, those of the same place added up at the first of them."""
    rows = [
        _stacked(x.astype(dtype), k.window) for x, k in zip(rows, lookups, strict=True)
    ]
    rows = jnp.concatenate(rows) if len(rows) > 1 else rows[0]
    if first is None:
        return rows
    return _scattered(lax.scatter_add, jnp.zeros_like(rows), first, rows)


def _squares(site: Site, indexed: tuple[int, ...], lookups: Sequence[Lookup]):
    """Sums the squares of the rows of each example."""
    bounds, window = _table(site, indexed)

    def one(ks, *operands):
        flat, first = _numbered(lookups, bounds, *operands[::2])
        rows = _merged(lookups, widened(site.like.dtype), first, *operands[1::2])
        inside = jnp.expand_dims(flat < math.prod(bounds), range(1, rows.ndim))
        rows = jnp.where(inside, rows, 0)

        def at_rows(k):
            if k.ndim == 0:
                return k
            k = jnp.moveaxis(k, indexed, range(len(bounds)))
            return k.reshape(-1, *window).at[flat].get(mode="clip")

        return [square(at_rows(k), rows) for k in ks]

    return mapped(one, None)


def _reduction(site: Site, indexed: tuple[int, ...], lookups: Sequence[Lookup]):
    dtype = widened(site.like.dtype)
    bounds, _ = _table(site, indexed)

    def reduce(has, weight, *operands):
        _, *has = has
        axes = range(weight.ndim)
        index, rows = operands[::2], operands[1::2]
        has_index = [any(h[j] for h in has[::2]) for j in axes]
        has_rows = [any(h) for h in zip(has_index, *has[1::2], strict=True)]

        def over_leading(fn, several):
            """Maps a function over the leading axes that its operands have."""
            for j in reversed(axes):
                if any(h[j] for h in several):
                    fn = jax.vmap(fn, [0 if h[j] else None for h in several])
            return fn

        numbered = functools.partial(_numbered, lookups, bounds)
        merged = functools.partial(_merged, lookups, dtype)
        flat, first = over_leading(numbered, has[::2])(*index)
        if first is None:
            found = over_leading(functools.partial(merged, None), has[1::2])(*rows)
            has_rows = [any(h[j] for h in has[1::2]) for j in axes]
        else:
            found = over_leading(merged, [has_index, *has[1::2]])(first, *rows)
        return [_summed(site, indexed, weight, flat, has_index, found, has_rows)]

    return reduce


def _summed(site, indexed, weight, flat, has_index, rows, has_rows):
    axes = range(weight.ndim)
    n_window = rows.ndim - 1 - sum(has_rows)
    alone = on_one_device(weight, site.what.examples)
    rows = jnp.expand_dims(rows, [j for j in axes if not has_rows[j]])
    weight = weight.astype(rows.dtype).reshape(weight.shape + (1,) * (1 + n_window))
    # Where the indices are the same for all, one scatter does.
    early = tuple(j for j in axes if not has_index[j])

    def sums(p):
        total = weight * power(rows, p)
        total = jnp.sum(total, axis=early) if early else total
        total = total.reshape(-1, *total.shape[total.ndim - n_window :])
        return _into_table(site, indexed, flat.reshape(-1), total, alone)

    return [sums(p) for p in site.what.powers]


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
        return _into_table(site, indexed, jnp.asarray(places), s)

    return dataclasses.replace(source, finish=finish, like=like, keeps=False)


def _at_known_places(site, indexed, lookups, known):
    """Sums rows by tables that are made now, and scatters after the examples."""
    dtype = widened(site.like.dtype)
    bounds, window = _table(site, indexed)
    flat = []
    for index, lookup in zip(known, lookups, strict=True):
        with jax.ensure_compile_time_eval():
            flat.append(np.asarray(_flat(jnp.asarray(index), bounds, lookup)))
    places, which = np.unique(np.concatenate(flat), return_inverse=True)
    levels = _levels(which.reshape(-1), len(places))

    def fn(*rows):
        rows = [
            _stacked(x.astype(dtype), k.window)
            for x, k in zip(rows, lookups, strict=True)
        ]
        x = jnp.concatenate(rows) if len(rows) > 1 else rows[0]
        for level in levels:
            y = x.at[level].get(mode="fill", fill_value=0)
            x = jnp.sum(y, axis=1) if level.shape[1] > 1 else y[:, 0]
        return [x]

    def finish(s, p, env):
        del p, env
        return _into_table(site, indexed, jnp.asarray(places), s)

    like = jax.ShapeDtypeStruct((len(places), *window), dtype)
    reduce = looped(fn, [like], site.what, None)
    moved = sum((2 if level.shape[1] > 1 else 1) * level.size for level in levels)
    moved += len(which) if len(lookups) > 1 else 0
    work = (moved + site.what.per_entry * len(places)) * math.prod(window)
    work += len(places) * math.prod(window) / site.what.examples
    operands = tuple(lookup.rows for lookup in lookups)
    return Source("embedding", work, operands, reduce, 0, None, finish, like)


def _levels(which: np.ndarray, n: int) -> list[np.ndarray]:
    """Returns tables of rows to add up, one after the other, until n sums are left.

    A table has a line for each sum; what is no row, the number of rows, stands for
    zeros.
    """
    levels = []
    while True:
        counts = np.bincount(which, minlength=n)
        most = int(counts.max(initial=1))
        order = np.argsort(which, kind="stable")
        rank = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        last = n * most <= 2 * len(which) + BLOCK
        width = most if last else min(BLOCK, most)
        lines = -(-counts // width)
        start = np.cumsum(lines) - lines
        table = np.full((int(lines.sum()), width), len(which), np.int32)
        line = start[which[order]] + rank // width
        table[line, rank % width] = order
        levels.append(table)
        which = np.repeat(np.arange(n), lines)
        if len(which) == n:
            return levels
