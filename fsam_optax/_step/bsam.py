"""Bayesian SAM: an optimizer of a Gaussian posterior, whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    check_leaves,
    check_like,
    check_number,
    check_params,
    is_real,
)
from fsam_optax._common.late import all_finite
from fsam_optax._common.mapped_axes import (
    AxisName,
    check_axes,
    is_key,
    merge,
    vary,
)
from fsam_optax._common.norms import widen
from fsam_optax._fisher.estimation import key_data
from fsam_optax._step.second_gradient import gradient_function


class BSAMState(NamedTuple):
    """State of `bsam`.

    Attributes:
        count: Updates made so far; saturates.  # shape=(), dtype=int32
        skipped: Updates that changed nothing because a gradient was not finite;
            saturates.  # shape=(), dtype=int32
        key: Data of the PRNG key of the next update, an array of integers.
        momentum: Average gradient, like the parameters in float32 or wider.
        precision: s: the posterior of a parameter is Normal with the parameter as mean
            and variance `1 / (num_data * precision)`. Like the parameters in float32
            or wider.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (Optax's name)
    skipped: jax.Array
    key: jax.Array
    momentum: Any
    precision: Any


def bsam(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.01,
    *,
    num_data: jax.typing.ArrayLike,
    key: jax.Array,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    weight_decay: jax.typing.ArrayLike = 5e-4,
    damping: jax.typing.ArrayLike = 0.1,
    init_precision: jax.typing.ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Bayesian SAM: SAM in the geometry of a posterior precision that it learns.

        h = grad(w + z / sqrt(num_data s)),    z Normal(0, 1)
        q = grad(w + rho h / s)
        m <- b1 m + (1 - b1) (q + weight_decay w)
        w <- w - learning_rate m / s                              (s before its update)
        s <- b2 s + (1 - b2) (sqrt(s) |h| + damping + weight_decay)

    All of it by element; eps = rho h / s is not normalised. There is no bias correction
    and no square root of s in the step. w is the mean of the posterior, at which to
    evaluate, and `1 / (num_data * state.precision)` its variance: a variance for each
    weight. (Evaluating the mean over draws of it is what calibrates predictions.)

    With `axis_name`, each device, or each part of a batch under `jax.vmap`, draws a z
    of its own and perturbs for its own part; q and sqrt(s) |h| are then averaged, as
    the authors do with 8 parts:

        parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        step = lambda part: optimizer.update(
            zeros, state, params, grad_fn=lambda p: jax.grad(loss)(p, part))
        updates, state = jax.vmap(step, axis_name="parts", out_axes=None)(parts)

    Args:
        learning_rate: Step in units of `m / s`: a number or a schedule. The authors
            take 0.5 on CIFAR and 0.25 on TinyImageNet.
        rho: Length of the perturbation in units of `h / s`, >= 0: a number or a
            schedule. The authors take 0.01 on CIFAR and 5e-5 on TinyImageNet.
        num_data: Number of training examples N, which scales the variance. The authors
            take 4 N where images are augmented.
        key: PRNG key, typed or legacy, that z is drawn from.
        b1: Decay of the average gradient, in [0, 1].
        b2: Decay of the precision, in [0, 1].
        weight_decay: Precision of the prior over num_data, added at w, >= 0. (The
            authors have a prior precision of 10 to 25; the default is theirs of 25 with
            50000 examples.)
        damping: Added to the precision, >= 0.
        init_precision: s before the first step, > 0.
        axis_name: Mapped axes of `jax.shard_map`, `jax.pmap` or `jax.vmap` over which
            to average; keys are split into as many as there are parts, and one more.

    Returns:
        A transformation whose `update(grads, state, params, *, grad_fn, **extra)` takes
        `grad_fn(params) -> grads`, on the same batch in both calls, or in its place the
        loss, `value_fn` or `obj_fn(params) -> loss`. `grads`, the gradient at w, is not
        used: pass zeros, or let `jax.jit` drop it. A gradient that is not finite
        changes nothing but the key and the counters.

    Raises:
        ValueError: If a Python number is out of range; in `update`, without `params`.
        TypeError: If key is no PRNG key; in `update`, without `grad_fn`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> curvature = jnp.array([1.0, 100.0])
        >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(curvature * w**2))
        >>> optimizer = bsam(0.1, num_data=100, key=jax.random.key(0), b2=0.99)
        >>> w = jnp.ones(2)
        >>> state = optimizer.init(w)
        >>> @jax.jit
        ... def step(_, carry):
        ...     w, state = carry
        ...     updates, state = optimizer.update(w, state, w, grad_fn=grad_fn)
        ...     return optax.apply_updates(w, updates), state
        >>> w, state = jax.lax.fori_loop(0, 2000, step, (w, state))
        >>> print(state.precision.round(1))  # The steeper, the surer.
        [0.2 8.4]

    References:
        Moellenhoff, Khan, SAM as an Optimal Relaxation of Bayes, 2023,
        https://arxiv.org/abs/2210.01620 (algorithm 1). The order of the updates, and
        how keys are split, follow the authors' code.
    """
    for name, value in (("learning_rate", learning_rate), ("rho", rho)):
        if not callable(value):
            check_number(name, value, 0)
    key_data(key)  # Raises on anything but a key.
    impl = jax.random.key_impl(key) if is_key(key) else None
    check_number("num_data", num_data, 0, open=True)
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("weight_decay", weight_decay, 0)
    check_number("damping", damping, 0)
    check_number("init_precision", init_precision, 0, open=True)

    def init_fn(params):
        def full(value):
            def leaf(w):
                dtype = widen(w) if is_real(w) else widen()
                return jnp.full_like(w, value, dtype)

            return jax.tree.map(leaf, params)

        return BSAMState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            key=key_data(key),
            momentum=full(0),
            precision=full(init_precision),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        grad_fn=None,
        value_fn=None,
        obj_fn=None,
        **extra_args,
    ):
        del extra_args
        check_params("bsam", params)
        check_leaves(params, "params")
        check_axes("axis_name", axis_name)
        gradient = gradient_function("bsam", grad_fn, value_fn, obj_fn)
        rate, radius = (
            jnp.asarray(x(state.count) if callable(x) else x)
            for x in (learning_rate, rho)
        )
        current = jax.random.wrap_key_data(state.key, impl=impl)
        draw, next_key = _split(current, axis_name)

        def at(point):
            grads = gradient(vary(point, axis_name))
            check_like("grad_fn(params)", grads, "params", params)
            return grads

        noise = _normal_like(draw, params)
        sampled = _map(
            lambda w, z, s: w + z / jnp.sqrt(num_data * s),
            params,
            noise,
            state.precision,
        )
        h = at(sampled)
        q = at(_map(lambda w, h, s: w + radius * h / s, params, h, state.precision))
        gradient, spread = merge(
            (
                _map(lambda _, q: q, state.momentum, q),
                _map(lambda s, h: jnp.sqrt(s) * jnp.abs(h), state.precision, h),
            ),
            axis_name,
        )
        momentum = _map(
            lambda m, q, w: b1 * m + (1 - b1) * (q + weight_decay * w),
            state.momentum,
            gradient,
            params,
        )
        precision = _map(
            lambda s, a: b2 * s + (1 - b2) * (a + (damping + weight_decay)),
            state.precision,
            spread,
        )
        finite = all_finite(jax.tree.leaves((momentum, precision)))

        def keep(new, old):
            return jnp.where(finite, new, old)

        steps = jax.tree.map(
            lambda g, w, m, s: (
                jnp.where(finite, -rate * m / s, 0).astype(jnp.asarray(w).dtype)
                if is_real(w)
                else g
            ),
            updates,
            params,
            momentum,
            state.precision,
        )
        return steps, BSAMState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            skipped=keep(state.skipped, optax.safe_increment(state.skipped)),
            key=jax.random.key_data(next_key),
            momentum=jax.tree.map(keep, momentum, state.momentum),
            precision=jax.tree.map(keep, precision, state.precision),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _split(key: jax.Array, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    """Returns the key of this part and that of the next step."""
    if axis_name is None:
        draw, next_key = jax.random.split(key)
        return draw, next_key
    parts = jax.lax.axis_size(axis_name)
    keys = jax.random.split(key, parts + 1)
    return keys[jax.lax.axis_index(axis_name)], keys[parts]


def _normal_like(key: jax.Array, params: Any) -> Any:
    """Returns standard normal numbers, each leaf from a key of its own."""
    leaves, structure = jax.tree.flatten(params)
    _, *keys = jax.random.split(key, len(leaves) + 1)
    draws = [
        jax.random.normal(k, jnp.shape(w), widen(w)) if is_real(w) else w
        for k, w in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)


def _map(rule: Any, tree: Any, *others: Any) -> Any:
    """Applies a rule in float32 or wider; rounded to the dtypes of `tree`."""

    def leaf(x, *ys):
        if not is_real(x) or not all(is_real(y) for y in ys):
            return x
        x = jnp.asarray(x)
        wide = widen(x, *ys)
        return rule(*(jnp.asarray(y, wide) for y in (x, *ys))).astype(x.dtype)

    return jax.tree.map(leaf, tree, *others)
