"""The three methods by name: wiring only."""

import jax
import optax

from fsam_optax._ball.geometries import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
)
from fsam_optax._fisher.at_hand import squared_gradient
from fsam_optax._step.sharpness_aware import sharpness_aware


def sam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """SAM: `sharpness_aware(base, euclidean_ball(rho))`.

    Args:
        base: The optimizer that makes the step.
        rho: Radius, in the units of the parameters: a number >= 0 or a schedule.

    Returns:
        A transformation whose `update` takes `grad_fn`; see `sharpness_aware`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: w**4)
        >>> optimizer = sam(optax.sgd(0.1), rho=0.5)
        >>> w = jnp.array(1.0)
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update)  # SGD would make it -0.4.
        -1.35

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412.
    """
    return sharpness_aware(base, euclidean_ball(rho))


def asam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.5,
    eta: jax.typing.ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """ASAM: `sharpness_aware(base, adaptive_ellipsoid(rho, eta=eta))`.

    Args:
        base: The optimizer that makes the step.
        rho: Radius relative to the weights: a number >= 0 or a schedule.
        eta: Added to every |w|, >= 0.

    Returns:
        A transformation whose `update` takes `grad_fn`; see `sharpness_aware`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: w**4)
        >>> optimizer = asam(optax.sgd(0.1), rho=0.5, eta=0.0)
        >>> w = jnp.array(2.0)
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update)  # -0.1 grad_fn(3): w moved up by half of itself.
        -10.8

    References:
        Kwon, Kim, Park, Choi, ASAM: Adaptive Sharpness-Aware Minimization for
        Scale-Invariant Learning of Deep Neural Networks, 2021,
        https://arxiv.org/abs/2102.11600.
    """
    return sharpness_aware(base, adaptive_ellipsoid(rho, eta=eta))


def fisher_sam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.1,
    *,
    estimator: optax.GradientTransformation | None = None,
    eta: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Fisher SAM: `sharpness_aware(base, fisher_ellipsoid(rho, estimator, eta=eta))`.

    Args:
        base: The optimizer that makes the step.
        rho: Radius: a number >= 0 or a schedule.
        estimator: Transformation whose output is the Fisher diagonal. None is
            `squared_gradient()`, which costs nothing and is not a Fisher.
        eta: Weight of the relative Fisher against the Euclidean metric, >= 0; 0 is
            exactly SAM.

    Returns:
        A transformation whose `update` takes `grad_fn`, and what the estimator needs;
        see `sharpness_aware`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
        >>> optimizer = fisher_sam(optax.sgd(0.1), rho=0.5)
        >>> w = jnp.array([3.0, 1.0])
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update)  # The steeper direction is perturbed less than in SAM.
        [-0.6532554  -0.24142085]

    References:
        Kim, Li, Hu, Hospedales, Fisher SAM: Information Geometry and Sharpness Aware
        Minimisation, 2022, https://arxiv.org/abs/2206.04920.
    """
    estimator = squared_gradient() if estimator is None else estimator
    return sharpness_aware(base, fisher_ellipsoid(rho, estimator, eta=eta))
