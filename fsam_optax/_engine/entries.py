"""Where each array of parameters enters a model, linearly: its pre-activations.

With z = A(x) theta, the second derivatives of a loss by theta are those by z, carried
back: `H_theta = A^T H_z A`. There are far fewer z than theta, and for one example the
entries of H_theta off its diagonal are mostly products of inputs, which H_z is free of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.norms import widen
from fsam_optax._engine.flatten import flatten
from fsam_optax._engine.jaxpr import Dataflow, evaluate, is_real, read, size
from fsam_optax._engine.power_sums import sums_of_powers
from fsam_optax._engine.primitives import ENTERED_BY, LINEAR_MOVES, name_of


PyTree = Any


class Entry(NamedTuple):
    """An array of parameters, seen from the pre-activations that it enters through.

    Attributes:
        shape: Shape of the pre-activations z of one example.
        dtype: Their dtype.
        enter: `enter(leaf, x) -> z` for one example x; linear in the leaf.
        onward: `onward(delta, x) -> h`, the outputs for one example if delta is added
            to z.
    """

    shape: tuple[int, ...]
    dtype: Any
    enter: Callable[[jax.Array, PyTree], jax.Array]
    onward: Callable[[jax.Array, PyTree], jax.Array]


def entries(
    fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, inputs: PyTree
) -> list[Entry | None]:
    """Finds the pre-activations of each array of parameters.

    Args:
        fn: The model for one example, whose output is one array.
        params: Pytree of floating-point arrays.
        inputs: Pytree of arrays with a leading axis of examples.

    Returns:
        One entry for each leaf of params. An array that is added or scaled, and no
        larger than the activations, is its own pre-activation, one for each example.
        None for an array that enters in another way, or more than once.
    """
    leaves, tree = jax.tree.flatten(params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    flat_example, example_tree = jax.tree.flatten(example)

    def model(leaves, flat_example):
        x = example_tree.unflatten(flat_example)
        return fn(tree.unflatten(leaves), x)

    closed = jax.make_jaxpr(model)(leaves, flat_example)
    varies = [i >= len(leaves) for i in range(len(closed.in_avals))]
    flat = jax.make_jaxpr(flatten(closed, varies))(*closed.in_avals)
    jaxpr = flat.jaxpr
    variables, given = jaxpr.invars[: len(leaves)], jaxpr.invars[len(leaves) :]
    flow = Dataflow(jaxpr, given)
    limit = max(map(size, flow.varying), default=0)

    def entry(i):
        z = _entered(flow, variables[i], limit)
        if z is None:
            return None
        before = flow.ancestors([z])

        def environment(leaf, x):
            env = dict(zip(jaxpr.constvars, flat.consts, strict=True))
            known = [*leaves[:i], leaf, *leaves[i + 1 :], *jax.tree.leaves(x)]
            env.update(zip(jaxpr.invars, known, strict=True))
            evaluate(jaxpr.eqns, env, before)
            return env

        def enter(leaf, x):
            return environment(leaf, x)[z]

        def onward(delta, x):
            env = environment(leaves[i], x)
            env[z] = env[z] + delta
            evaluate(jaxpr.eqns, env, flow.ancestors(jaxpr.outvars, stop=[z]))
            (h,) = (read(env, v) for v in jaxpr.outvars)
            return h

        return Entry(z.aval.shape, z.aval.dtype, enter, onward)

    return [entry(i) for i in range(len(leaves))]


def _entered(flow, v, limit) -> Any:
    """Returns the pre-activation of a parameter; None if it has none."""
    itself = v if size(v) <= limit else None
    while flow.uses.get(v) == 1 and v not in flow.jaxpr.outvars:
        (eqn,) = (e for e in flow.jaxpr.eqns if v in e.invars)
        others = [x for x in eqn.invars if x is not v]
        if not all(map(is_real, eqn.outvars)):
            break
        if name_of(eqn) in ENTERED_BY:
            return eqn.outvars[0]
        if name_of(eqn) not in LINEAR_MOVES or others or len(eqn.outvars) != 1:
            break
        (v,) = eqn.outvars
    return itself


def sum_of_products(
    entry: Entry,
    leaf: jax.Array,
    inputs: PyTree,
    first: jax.Array,
    second: jax.Array,
) -> jax.Array:
    """Returns `sum_n (A_n^T v_n) (A_n^T u_n)`, elementwise, with z = A_n theta.

    By the squares of sum and difference, after v and u were brought to one length. The
    examples are taken for those of one device.

    Args:
        entry: Where the parameter enters.
        leaf: The parameter.
        inputs: Inputs of N examples.
        first: The cotangents v.  # shape=(N, *entry.shape)
        second: The cotangents u.  # shape=(N, *entry.shape)

    Returns:
        The sum, with the shape of the parameter; float32 or wider.
    """
    axes = tuple(range(1, first.ndim))

    def length(x):
        # Half-precision squares would leave their range.
        x = x.astype(widen(x.dtype))
        largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
        unit = jnp.where(largest > 0, largest, 1)
        return largest * jnp.sqrt(jnp.mean((x / unit) ** 2, axis=axes, keepdims=True))

    lengths = length(first), length(second)
    scales = [jnp.where(x > 0, x, 1) for x in lengths]
    v, u = first / scales[0], second / scales[1]
    weights = (lengths[0] * lengths[1] / 4).reshape(-1)

    def squares(c):
        examples = inputs, c.astype(entry.dtype)
        (total,) = sums_of_powers(
            entry.enter, leaf, examples, _only, (2,), weights, share=len(c)
        )
        return total

    return squares(v + u) - squares(v - u)


def _only(z, c):
    del z
    return c[None]
