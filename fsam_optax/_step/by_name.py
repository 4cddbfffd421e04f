"""The methods by name: wiring only."""

from __future__ import annotations

import numbers

import jax
import optax

from fsam_optax._ball.geometries import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
)
from fsam_optax._ball.memory import friendly
from fsam_optax._common.checks import check_number
from fsam_optax._fisher.at_hand import squared_gradient
from fsam_optax._step.descents import extrapolate, reuse, surrogate_gap
from fsam_optax._step.displaced import displaced
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


def gsam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.6,
    alpha: jax.typing.ArrayLike = 0.6,
) -> optax.GradientTransformationExtraArgs:
    """GSAM: SAM with `descent=surrogate_gap(alpha)`.

    Args:
        base: The optimizer that makes the step.
        rho: Radius: a number >= 0 or a schedule. The authors let it fall with the
            learning rate, from 0.6 to 0.1 for vision transformers (the defaults here)
            and from 0.04 to 0.02 for residual networks, with alpha = 0.01.
        alpha: Weight of the orthogonal part, >= 0; 0 is SAM.

    Returns:
        A transformation whose `update` takes `grad_fn`; see `sharpness_aware`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.array([1.0, 0.25]) * w**4))
        >>> optimizer = gsam(optax.sgd(0.1), rho=0.5, alpha=0.5)
        >>> w = jnp.ones(2)
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update)  # SAM would make it [-1.31 -0.14].
        [-1.3131 -0.1128]

    References:
        Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training,
        2022, https://arxiv.org/abs/2203.08065; defaults: the ViT configuration of
        google-research/big_vision, `big_vision/configs/proj/gsam`.
    """
    return sharpness_aware(base, euclidean_ball(rho), descent=surrogate_gap(alpha))


def wsam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.05,
    gamma: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """WSAM, coupled: SAM with `descent=extrapolate(gamma / (1 - gamma))`.

    Args:
        base: The optimizer that makes the step.
        rho: Radius: a number >= 0 or a schedule.
        gamma: Weight of the sharpness against the loss, in [0, 1); 1/2 is SAM and 0
            the base optimizer. The authors take 0.8 to 0.95.

    Returns:
        A transformation whose `update` takes `grad_fn`; see `sharpness_aware`.

    Raises:
        ValueError: If gamma is a Python number out of range.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: w**4)
        >>> optimizer = wsam(optax.sgd(0.1), rho=0.5, gamma=0.75)
        >>> w = jnp.array(1.0)
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update)  # SAM would make it -1.35, SGD -0.4.
        -3.25

    References:
        Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
        Regularization Term, 2023, https://arxiv.org/abs/2305.15817 (the range of
        gamma); the radius is that of SAM. The authors' code takes the decoupled form
        by default: docs/methods.md.
    """
    check_number("gamma", gamma, 0, 1)
    if isinstance(gamma, numbers.Real) and gamma == 1:
        raise ValueError("`gamma` must be less than 1, got 1.")
    descent = extrapolate(gamma / (1 - gamma))
    return sharpness_aware(base, euclidean_ball(rho), descent=descent)


def looksam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.05,
    alpha: jax.typing.ArrayLike = 0.7,
    every: jax.typing.ArrayLike = 5,
) -> optax.GradientTransformationExtraArgs:
    """LookSAM: SAM at each `every`-th step, with `descent=reuse(alpha)` between.

    Args:
        base: The optimizer that makes the step.
        rho: Radius: a number >= 0 or a schedule of the perturbed steps.
        alpha: Length of what is added between, relative to the gradient, >= 0.
        every: A step is perturbed each `every`-th time, from the first on.

    Returns:
        A transformation whose `update` takes `grad_fn`; see `sharpness_aware`. Steps
        that are not perturbed do not call it.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: w[0] ** 2 + w[0] * w[1] ** 2)
        >>> optimizer = looksam(optax.sgd(0.1), rho=0.5, alpha=0.5, every=2)
        >>> w = jnp.array([1.0, 0.1])
        >>> state = optimizer.init(w)
        >>> for _ in range(2):
        ...     update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        ...     print(update)
        [-0.3017 -0.0448]
        [-0.1910 -0.1205]

    References:
        Liu, Mai, Chen, Hsieh, You, Towards Efficient and Scalable Sharpness-Aware
        Minimization, 2022, https://arxiv.org/abs/2203.02714 (k); alpha is that of
        `configs/default.ini` in MarlonBecker/MSAM, the radius that of SAM.
    """
    descent = reuse(alpha)
    return sharpness_aware(base, euclidean_ball(rho), descent=descent, every=every)


def friendly_sam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 0.2,
    sigma: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Friendly SAM: SAM with `friendly(sigma, decay)` before the ball.

    Args:
        base: The optimizer that makes the step.
        rho: Radius: a number >= 0 or a schedule.
        sigma: How much of the average gradient is taken out; 0 is SAM.
        decay: Weight of the old average: lambda of the authors.

    Returns:
        A transformation whose `update` takes `grad_fn`; see `sharpness_aware`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grad_fn = jax.grad(lambda w: w**4)
        >>> optimizer = friendly_sam(optax.sgd(0.1), rho=0.5)
        >>> w = jnp.array(1.0)
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update)  # The first step is that of SAM.
        -1.35

    References:
        Li et al., Friendly Sharpness-Aware Minimization, 2024,
        https://arxiv.org/abs/2403.12350; defaults: `run.sh` of the authors' code.
    """
    ascent = optax.chain(friendly(sigma, decay), euclidean_ball(rho))
    return sharpness_aware(base, ascent)


def msam(
    base: optax.GradientTransformation,
    rho: jax.typing.ArrayLike | optax.Schedule = 3.0,
    decay: float | jax.Array = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Momentum SAM: `displaced(base, ...)` against the momentum; one gradient a step.

        eps = -rho v / |v|,    v <- decay v + h

    Against the momentum, so that the trainer holds weights further down, as with a long
    step of Nesterov; the ascent lies in where w comes from. Weight decay belongs into
    `base`, which sees w. The authors' SGD decays at w + eps and lets the decay into v:
    put `optax.add_decayed_weights` before this in a chain to have that.

    Args:
        base: The optimizer that makes the step.
        rho: Radius: a number >= 0 or a schedule. Much larger than in SAM.
        decay: Decay of the momentum, in [0, 1], best that of `base` (b1 of Adam).

    Returns:
        A transformation with an ordinary `update(grads, state, params)`; evaluate
        `eval_params(state, params)`. See `displaced`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import eval_params
        >>> optimizer = msam(optax.sgd(0.1, momentum=0.9), rho=0.5)
        >>> params = jnp.array([1.0])
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(4 * params**3, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, eval_params(state, params))
        [0.1] [0.6]

    References:
        Becker, Altrock, Risse, Momentum-SAM: Sharpness Aware Minimization without
        Computational Overhead, 2024, https://arxiv.org/abs/2401.12033; default of rho:
        the README of the authors' code.
    """
    check_number("decay", decay, 0, 1)
    ascent = optax.chain(optax.trace(decay), optax.scale(-1.0), euclidean_ball(rho))
    return displaced(base, ascent)
