"""Several ascents: a perturbation that follows the gradient more than once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.guard import ascend, is_ball
from fsam_optax._common.checks import (
    check_count,
    check_function,
    check_like,
    check_params,
    check_transformation,
)
from fsam_optax._common.displacement import displace
from fsam_optax._common.mapped_axes import vary_like


class MultiStepState(NamedTuple):
    """State of `multi_step`.

    Attributes:
        perturbation: State of the perturbation. Count, radius and norm of a ball are
            those of the first ascent.
    """

    perturbation: optax.OptState


def multi_step(
    steps: int,
    perturbation: optax.GradientTransformation,
    *,
    project: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Ascends several times, from where the last ascent ended.

        eps = 0,    `steps` times:    eps <- project(eps + perturbation(grad(w + eps)))

    Costs `steps` gradients, the first of which is the one passed in, and one more for
    the descent. The perturbation sees w, so that an ellipsoid stays that of w. As a
    method it seldom earns its price (see the references); as a measurement of the
    sharpness it is closer to the worst case than one step.

    Args:
        steps: Number of ascents, a Python integer of at least 1.
        perturbation: What one ascent adds, such as `euclidean_ball(rho / steps)`. A
            schedule of its radius advances once an update, not once an ascent.
        project: What brings eps back to where it may be: a function of eps. For the
            Euclidean ball, `functools.partial(optax.projections.projection_l2_ball,
            scale=rho)`. None lets eps be as long as the ascents make it.

    Returns:
        A perturbation whose `update` needs `params` and the extra argument `grad_fn`,
        which both front ends pass on; as they do `displaced(eps)`, the point w + eps in
        the dtype in which the loss is to see it (that of w, if it is missing). A first
        gradient that is not finite gives eps = 0 and is not remembered; a later one
        ends the ascent where it was.

    Raises:
        ValueError: If steps < 1; in `update`, without `params`.
        TypeError: If steps is no integer or perturbation no transformation; in
            `update`, without `grad_fn`.

    Examples:
        >>> import functools
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> grad_fn = jax.grad(lambda w: w[0] ** 2 + 9 * w[1] ** 2)
        >>> w = jnp.array([3.0, 0.1])
        >>> ball = functools.partial(optax.projections.projection_l2_ball, scale=0.5)
        >>> for steps in (1, 20):
        ...     ascent = multi_step(steps, euclidean_ball(0.5), project=ball)
        ...     eps, _ = ascent.update(grad_fn(w), ascent.init(w), w, grad_fn=grad_fn)
        ...     print(eps)
        [0.4789 0.1437]
        [0.2937 0.4047]

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (appendix C.6:
        1, 2, 3 and 5 steps, no gain beyond the first).
        Andriushchenko, Flammarion, Towards Understanding Sharpness-Aware Minimization,
        2022, https://arxiv.org/abs/2206.06232.
    """
    check_count("steps", steps)
    if not isinstance(steps, int):
        raise TypeError(f"`steps` must be a Python integer, got {steps!r}.")
    check_transformation("perturbation", perturbation, "euclidean_ball(0.05)")
    if project is not None:
        check_function("project", project)
    inner = optax.with_extra_args_support(perturbation)

    def init_fn(params):
        return MultiStepState(inner.init(params))

    def update_fn(
        updates, state, params=None, *, grad_fn=None, displaced=None, **extra_args
    ):
        check_params("multi_step", params)
        if not callable(grad_fn):
            raise TypeError(
                "`multi_step` needs the gradient as a function of the parameters: "
                "`update(grads, state, params, grad_fn=lambda p: jax.grad(loss)(p, "
                f"batch))`, as both front ends pass it; got `grad_fn={grad_fn!r}`."
            )
        if displaced is None:
            displaced = functools.partial(displace, params)
        extra = {**extra_args, "grad_fn": grad_fn, "displaced": displaced}
        before = state.perturbation
        first = ascend(inner, updates, before, params, extra)
        check_like("the perturbation's output", first.eps, "params", params)
        start = (_projected(project, first.eps), first.state, first.finite)

        def ascend_again(_, carry):
            eps, memory, going = carry
            grads = grad_fn(displaced(eps))
            check_like("grad_fn(params)", grads, "params", params)
            ball_at_start = _with_balls(memory, before, "count", "skipped")
            next_ = ascend(inner, grads, ball_at_start, params, extra)
            # After a first gradient that is not finite, nothing moves at all.
            going = going & next_.finite
            moved = _projected(project, jax.tree.map(_add, eps, next_.eps))

            def keep(new, old):
                # Gradients at points in a wider dtype are wider than the first one.
                new = new if new.dtype == old.dtype else new.astype(old.dtype)
                return jnp.where(going, new, old)

            eps, memory = jax.tree.map(keep, (moved, next_.state), (eps, ball_at_start))
            return eps, memory, going

        if steps > 1:
            ended = jax.eval_shape(functools.partial(ascend_again, 1), start)
            start = vary_like(start, ended)
        eps, last, _ = jax.lax.fori_loop(1, steps, ascend_again, start)
        after = _with_balls(last, first.state, "count", "skipped", "rho", "dual_norm")
        return eps, MultiStepState(after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _projected(project: Callable[[Any], Any] | None, eps: Any) -> Any:
    if project is None:
        return eps
    projected = project(eps)
    check_like("project(eps)", projected, "eps", eps)
    return jax.tree.map(lambda x, e: jnp.asarray(x, e.dtype), projected, eps)


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x + y).astype(x.dtype)


def _with_balls(state: Any, other: Any, *fields: str) -> Any:
    """Returns the state with some fields of its balls as they are in another."""

    def replace(node, like):
        if not is_ball(node):
            return node
        return node._replace(**{name: getattr(like, name) for name in fields})

    return jax.tree.map(replace, state, other, is_leaf=is_ball)
