"""Sums of powers of rows that are scattered into a table, as by an embedding.

Rows of one example that fall on the same entry are added before the power. For this
every row is sent to one of those that have its index, the same for all of them, which
takes time linear in the number of rows.
"""

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
from fsam_optax._common.norms import widen
from fsam_optax._engine.jaxpr import Dataflow, is_real, size
from fsam_optax._engine.primitives import name_of, SCATTER
from fsam_optax._engine.sources import Site, Source
from fsam_optax._engine.squares import looped, mapped, square
from fsam_optax._engine.sums import power, rows_at, Steps
from fsam_optax._engine.waiting import on_one_device, zeros_after


# A table of so many entries a row is filled for each example, rather than rows sorted.
SMALL_TABLE = 32
FEW = 32  # Rows of an example: pairs of them take less time than a step of a loop.


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
        found = 2.0 if by_table else math.log2(rows) + 6
        places += rows * (3.0 + (3.0 * rows if rows <= FEW else found))
        summing += 2
    return places + summing * rows * width


def numbers_of_rows(index: jax.Array, bounds: Sequence[int], lookup: Lookup) -> Any:
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


def gathered(table: jax.Array, index: jax.Array) -> jax.Array:
    """Returns rows of a table at indices within bounds."""
    numbers = lax.GatherDimensionNumbers(tuple(range(1, table.ndim)), (0,), (0,))
    inside = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    window = (1, *table.shape[1:])
    return lax.gather(table, index[:, None], numbers, window, mode=inside)


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
    if n <= FEW:
        # Of columns, of which XLA:CPU takes several at a time.
        alike = index[:, None] == index[None, :]
        return jnp.min(jnp.where(alike, places[:, None], n), 0)
    if entries <= SMALL_TABLE * n:
        first = vary_like(jnp.full(entries + 1, n, jnp.int32), index)
        return gathered(_scattered(lax.scatter_min, first, index, places), index)
    ordered, order = lax.sort_key_val(index, places)
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    start = lax.cummax(jnp.where(new, places, 0))
    first = vary_like(jnp.zeros(n, jnp.int32), order)
    return _scattered(lax.scatter, first, order, gathered(order, start))


def _table(site, indexed):
    """Returns the sizes of the axes that are indexed, and of those that are not."""
    shape = site.like.shape
    return [shape[d] for d in indexed], [
        n for d, n in enumerate(shape) if d not in indexed
    ]


def into_table(
    site: Site, indexed: tuple[int, ...], flat: Any, rows: Any, alone: bool = False
) -> jax.Array:
    """Scatters rows (rows, *window) into zeros of the shape of the sum."""
    bounds, window = _table(site, indexed)
    like = jax.ShapeDtypeStruct((math.prod(bounds), *window), rows.dtype)
    (zeros,) = zeros_after([rows], [like], alone)
    return _as_table(site, indexed, _scattered(lax.scatter_add, zeros, flat, rows))


def _as_table(site, indexed, rows):
    """Returns the rows of a table in the shape of the sum."""
    bounds, window = _table(site, indexed)
    return jnp.moveaxis(rows.reshape(*bounds, *window), range(len(bounds)), indexed)


def _filled(site, indexed, lookups):
    """Returns the function that fills the table with the rows of one example."""
    bounds, _ = _table(site, indexed)
    dtype = widen(site.like.dtype)

    def fn(*operands):
        flat = _numbers(lookups, bounds, operands[::2])
        rows = _merged(lookups, dtype, None, *operands[1::2])
        return [into_table(site, indexed, flat, rows)]

    return fn


def _numbers(lookups, bounds, index):
    """Returns the places of all rows in the table."""
    flat = [numbers_of_rows(x, bounds, k) for x, k in zip(index, lookups, strict=True)]
    return jnp.concatenate(flat) if len(flat) > 1 else flat[0]


def _numbered(lookups, bounds, *index):
    """Returns where rows are left in the table, and for each the first of its place."""
    flat, entries = _numbers(lookups, bounds, index), math.prod(bounds)
    if len(flat) == 1:
        return flat, None
    first = first_alike(flat, entries)
    return jnp.where(_stays(first), flat, entries), first


def _stays(one):
    return one == lax.iota(one.dtype, len(one))


def _merged(lookups, dtype, one, *rows):
    """Returns all rows, those of the same place added up at one of them."""
    rows = [
        _stacked(x.astype(dtype), k.window) for x, k in zip(rows, lookups, strict=True)
    ]
    rows = jnp.concatenate(rows) if len(rows) > 1 else rows[0]
    if one is None:
        return rows
    stays = _stays(one)
    kept = jnp.where(jnp.expand_dims(stays, range(1, rows.ndim)), rows, 0)
    # To scatter an entry takes a CPU several operations: none is sent to itself.
    sent = jnp.where(stays, len(rows), one)
    return _scattered(lax.scatter_add, kept, sent, rows)


def _squares(site: Site, indexed: tuple[int, ...], lookups: Sequence[Lookup]):
    """Sums the squares of the rows of each example."""
    bounds, window = _table(site, indexed)

    def one(ks, *operands):
        flat, first = _numbered(lookups, bounds, *operands[::2])
        rows = _merged(lookups, widen(site.like.dtype), first, *operands[1::2])
        inside = jnp.expand_dims(flat < math.prod(bounds), range(1, rows.ndim))
        rows = jnp.where(inside, rows, 0)

        def at_rows(k):
            if k.ndim == 0:
                return k
            k = jnp.moveaxis(k, indexed, range(len(bounds)))
            return k.reshape(-1, *window).at[flat].get(mode="clip")

        return [square(at_rows(k), rows) for k in ks]

    n = site.what.examples
    return mapped(one, None if _are_few(lookups) else Steps(1, n, n, apart=True))


def _reduction(site: Site, indexed: tuple[int, ...], lookups: Sequence[Lookup]):
    """Sums the powers of the rows of all examples."""
    bounds, window = _table(site, indexed)
    dtype = widen(site.like.dtype)
    merged = functools.partial(_merged, lookups, dtype)

    def over_leading(fn, several):
        """Maps a function over the leading axes that its operands have."""
        for axes in list(zip(*several, strict=True))[::-1]:
            if any(axes):
                fn = jax.vmap(fn, [0 if here else None for here in axes])
        return fn

    def powers(weight, rows, has, early):
        """Returns the weighted powers of rows, added up over the axes `early`."""
        rows = jnp.expand_dims(rows, [j for j, here in enumerate(has) if not here])
        weight = weight.astype(rows.dtype)
        weight = weight.reshape(weight.shape + (1,) * (1 + len(window)))
        found = [weight * power(rows, p) for p in site.what.powers]
        return [jnp.sum(x, axis=early) if early else x for x in found]

    def at_once(has, weight, *operands):
        index, rows = operands[::2], operands[1::2]
        has_index, has_rows = _union(has[::2]), _union(has[1::2])
        numbered = functools.partial(_numbered, lookups, bounds)
        flat, first = over_leading(numbered, has[::2])(*index)
        if first is None:
            found = over_leading(functools.partial(merged, None), has[1::2])(*rows)
        else:
            found = over_leading(merged, [has_index, *has[1::2]])(first, *rows)
            has_rows = _union(has)
        # Where the indices are the same for all, one scatter does.
        early = tuple(j for j, here in enumerate(has_index) if not here)
        alone = on_one_device(weight, site.what.examples)
        return [
            into_table(site, indexed, flat.reshape(-1), _merge_axes(x, window), alone)
            for x in powers(weight, found, has_rows, early)
        ]

    def in_turn(has, weight, *operands):
        """The same, one example after the other, so that caches hold what it meets."""
        axes, inner = (0, *(0 if h[0] else None for h in has)), [h[1:] for h in has]
        entries, early = math.prod(bounds), tuple(range(weight.ndim - 1))

        def add(n, before):
            (weight, *operands), (last, *sums) = rows_at(axes, given, n), before
            flat = _numbers(lookups, bounds, operands[::2])
            # What other examples have left there is of other places.
            last = _scattered(lax.scatter, last, flat, lax.iota(jnp.int32, len(flat)))
            several = [[False] * len(early), *inner[1::2]]
            one = gathered(last, flat)
            flat = jnp.where(_stays(one), flat, entries)
            found = over_leading(merged, several)(one, *operands[1::2])
            found = powers(weight, found, _union(inner), early)
            pairs = zip(sums, found, strict=True)
            return [last, *(_scattered(lax.scatter_add, s, flat, x) for s, x in pairs)]

        given = weight, *operands
        like = [jax.ShapeDtypeStruct((entries, *window), dtype)] * len(site.what.powers)
        like = [jax.ShapeDtypeStruct((entries + 1,), jnp.int32), *like]
        # Where the rows take more than the table, its zeros may be there before them.
        rows = sum(size(x) for x in operands[1::2])
        zeros = zeros_after(operands, like, entries * math.prod(window) > rows)
        _, *sums = lax.fori_loop(0, len(weight), add, zeros)
        return [_as_table(site, indexed, x) for x in sums]

    def reduce(has, weight, *operands):
        _, *has = has
        once = functools.partial(at_once, has)
        has_index = _union(has[::2])
        alone = on_one_device(weight, site.what.examples)
        by_example = has_index[:1] == [True] and not any(has_index[1:])
        if not by_example or not alone or _are_few(lookups):
            return [once(weight, *operands)]
        turn = functools.partial(in_turn, has)
        return [lax.platform_dependent(weight, *operands, cpu=turn, default=once)]

    return reduce


def _are_few(lookups):
    """Tells whether a step of a loop would take longer than the rows of an example."""
    return sum(math.prod(x.index.aval.shape[:-1]) for x in lookups) <= FEW


def _union(has):
    """Returns which of the leading axes any of the operands has."""
    return [any(axis) for axis in zip(*has, strict=True)]


def _merge_axes(rows, window):
    return rows.reshape(-1, *rows.shape[rows.ndim - len(window) :])


def _at_known_places(site, indexed, lookups, known):
    """Sums rows by tables that are made now, and scatters after the examples."""
    dtype = widen(site.like.dtype)
    bounds, window = _table(site, indexed)
    flat = []
    for index, lookup in zip(known, lookups, strict=True):
        with jax.ensure_compile_time_eval():
            flat.append(np.asarray(numbers_of_rows(jnp.asarray(index), bounds, lookup)))
    places, which = np.unique(np.concatenate(flat), return_inverse=True)
    which = jnp.asarray(which.reshape(-1), jnp.int32)

    def fn(*rows):
        rows = _merged(lookups, dtype, None, *rows)
        zeros = vary_like(jnp.zeros((len(places), *window), dtype), rows)
        return [_scattered(lax.scatter_add, zeros, which, rows)]

    def finish(s, p, env):
        del p, env
        return into_table(site, indexed, jnp.asarray(places), s)

    like = jax.ShapeDtypeStruct((len(places), *window), dtype)
    # One after the other on a CPU, so that the entries of each stay in its cache.
    what, width = site.what, math.prod(window)
    steps = Steps(like.size * dtype.itemsize, what.budget, what.examples, apart=True)
    reduce = looped(fn, [like], what, None if _are_few(lookups) else steps)
    work = (len(which) + (what.per_entry + 1 / what.examples) * len(places)) * width
    operands = tuple(lookup.rows for lookup in lookups)
    return Source("embedding", work, operands, reduce, 0, None, finish, like)
