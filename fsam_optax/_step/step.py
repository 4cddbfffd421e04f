"""One step of sharpness-aware minimisation, from the gradient to the direction.

    eps = perturbation(g)     h = grad(w + eps)     d = descent(h, g, eps)

Both front ends are thin around `perturbed_step` and `plain_step`: they find the clean
gradient g, hand over the second one as a function, and merge what several parts of a
batch made. The base optimizer steps with d, at w.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.guard import ascend, keep_unless
from fsam_optax._common.checks import check_like, is_real, leaf_shape
from fsam_optax._common.displacement import displace
from fsam_optax._common.mapped_axes import AxisName, vary
from fsam_optax._step.advice import check_ascends, check_descends
from fsam_optax._step.metrics import measure, Metrics, no_metrics


class Rule(NamedTuple):
    """How a step is made; it does not change from step to step.

    Attributes:
        perturbation: Makes eps of the clean gradient.
        descent: Makes the direction d of both gradients; None is d = h.
        every: Which steps are perturbed: each `every`-th from the first on, or those
            for which a function of the step returns True.
        perturb_dtype: Dtype in which w + eps is formed; None for that of w.
        axis_name: Mapped axes whose devices hold parts of the batch.
        metrics: Whether to measure.
    """

    perturbation: optax.GradientTransformationExtraArgs
    descent: optax.GradientTransformationExtraArgs | None
    every: Any
    perturb_dtype: Any
    axis_name: AxisName
    metrics: bool


class Memory(NamedTuple):
    """What a step leaves for the next one.

    Attributes:
        perturbation: State of the perturbation.
        descent: State of the descent; empty without one.
    """

    perturbation: optax.OptState
    descent: optax.OptState


class Stride(NamedTuple):
    """What one part of a batch makes of a step.

    Attributes:
        direction: What the base optimizer is to step with; like the clean gradient.
        memory: The memory after the step.
        found: Whether there was a perturbation; without one no memory was touched.
        metrics: What the step was like; None if not asked for.
        value: Loss at w + eps; None if the second pass does not tell.
    """

    direction: Any
    memory: Memory
    found: jax.Array
    metrics: Metrics | None
    value: jax.Array | None


def first_memory(rule: Rule, params: Any) -> Memory:
    """Returns the memory before the first step."""
    perturbation = rule.perturbation.init(params)
    check_ascends(perturbation)
    descent = rule.descent.init(params) if rule.descent else optax.EmptyState()
    check_descends(descent)
    return Memory(perturbation=perturbation, descent=descent)


def first_metrics(rule: Rule, params: Any) -> Metrics | None:
    """Returns the metrics before the first step; None if not asked for."""
    return no_metrics(params) if rule.metrics else None


def perturbed_step(
    rule: Rule,
    memory: Memory,
    params: Any,
    grads: Any,
    gradient: Callable[[Any], tuple[jax.Array | None, Any]],
    extra: dict[str, Any],
) -> Stride:
    """Ascends, takes the second gradient, and descends.

    Args:
        rule: How the step is made.
        memory: What the step before left.
        params: The parameters w.
        grads: The clean gradient g at w.
        gradient: `gradient(point) -> (loss or None, gradient)` on the same batch.
        extra: What the perturbation and the descent are given by name.
    """

    def displaced(eps):
        return vary(displace(params, eps, rule.perturb_dtype), rule.axis_name)

    eps, ascent, _, found = ascend(
        rule.perturbation,
        grads,
        memory.perturbation,
        params,
        {"displaced": displaced, **extra},
    )
    check_like("the perturbation's output", eps, "params", params)
    point = displaced(eps)
    value, h = gradient(point)
    metrics = measure(grads, h, params, point) if rule.metrics else None
    d, descent = _descend(rule, memory.descent, params, h, grads, eps, extra)
    descent = keep_unless(found, descent, memory.descent)
    return Stride(d, Memory(ascent, descent), found, metrics, value)


def plain_step(
    rule: Rule,
    memory: Memory,
    params: Any,
    grads: Any,
    extra: dict[str, Any],
    metrics: Metrics | None,
) -> Stride:
    """Descends with the clean gradient alone: a step without perturbation.

    It reads the memory and leaves it, and the metrics of the step before, as they are.
    """
    d, _ = _descend(rule, memory.descent, params, grads, grads, None, extra)
    return Stride(d, memory, jnp.array(False), metrics, None)


def _descend(rule, before, params, h, grads, eps, extra):
    """Returns the direction, in the dtypes of the clean gradient, and the state."""
    if rule.descent is None:
        return cast_like(h, grads), before
    d, after = rule.descent.update(
        h, before, params, **{**extra, "clean_grads": grads, "eps": eps}
    )
    check_like("the descent's output", d, "params", params)
    return cast_like(d, grads), after


def cast_like(tree: Any, like: Any) -> Any:
    """Returns the real leaves of `tree` in the dtypes of `like`."""
    return jax.tree.map(
        lambda x, y: jnp.asarray(x, jnp.asarray(y).dtype) if is_real(y) else x,
        tree,
        like,
    )


def always(every: Any) -> bool:
    """Tells whether every step is known to be perturbed."""
    return isinstance(every, numbers.Integral) and int(every) == 1


def on_schedule(
    every: Any, step: jax.Array, perturbed: Callable[[], Any], plain: Callable[[], Any]
) -> Any:
    """Returns `perturbed()` at the steps that `every` names, else `plain()`.

    Only one of the two is computed at run time, except under `jax.vmap`.
    """
    if always(every):
        return perturbed()
    now: Any = every(step) if callable(every) else step % every == 0
    if leaf_shape(now) != ():
        raise ValueError(
            "`every` must return one bool for a step, True where it is perturbed, got "
            + (f"{now!r}." if leaf_shape(now) is None else f"shape {leaf_shape(now)}.")
        )
    return jax.lax.cond(jnp.asarray(now, bool), perturbed, plain)
