"""Three geometries: the balls in which the worst-case perturbation is sought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from fsam_optax._ball import operators
from fsam_optax._ball.arguments import check_radius, check_signature
from fsam_optax._ball.operators import Axes
from fsam_optax._ball.perturbation import Length, perturbation
from fsam_optax._common.checks import check_choice, check_number, check_transformation
from fsam_optax._common.mapped_axes import AxisName


def euclidean_ball(
    rho: jax.typing.ArrayLike | optax.Schedule,
    *,
    ord: jax.typing.ArrayLike = 2,
    mask: Any | None = None,
    length: Length | None = None,
    per_leaf: bool = False,
    shard_axes: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Perturbation of SAM: the same radius in every direction.

        p = 2:    eps = rho g / ||g||_2
        p = inf:  eps = rho sign(g)

    Not invariant: a rescaling of the weights that leaves the loss as it is (the two
    layers of a ReLU network times c and 1/c) changes what this ball contains.

    Args:
        rho: Radius, in the units of the parameters: a number >= 0 or a schedule.
            0.05 is the usual start, 0.1 on harder data.
        ord: The p of the ball, in (1, inf].
        mask: Which leaves to perturb; see `perturbation`.
        length: Factor on rho, by the dual norm; see `perturbation`.
        per_leaf: Whether every array has a ball of its own; see `perturbation`.
        shard_axes: For parameters sharded by hand; see `perturbation`.

    Returns:
        A transformation from the gradient to eps, float32 or wider, to be added.

    Raises:
        ValueError: If rho or ord is a Python number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> ball = euclidean_ball(0.05)
        >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
        >>> eps, _ = ball.update(grads, ball.init(grads))
        >>> print(eps["w"], eps["b"])
        [0.03 0.  ] [0.04]

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (equation 2).
    """
    check_radius(rho, "euclidean_ball(rho)")
    return perturbation(
        rho,
        ord=ord,
        mask=mask,
        length=length,
        per_leaf=per_leaf,
        shard_axes=shard_axes,
    )


def adaptive_ellipsoid(
    rho: jax.typing.ArrayLike | optax.Schedule,
    *,
    eta: jax.typing.ArrayLike = 0.01,
    scope: Literal["element", "filter", "layer"] = "element",
    ord: jax.typing.ArrayLike = 2,
    normalize: Callable[[tuple[Any, ...], Any], bool] | Any | None = None,
    filter_axis: Axes = -1,
    layer_axis: Axes = None,
    mask: Any | None = None,
    length: Length | None = None,
    per_leaf: bool = False,
    shard_axes: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Perturbation of ASAM: a radius in proportion to the weights themselves.

        T = |w| + eta                      element
            ||filter of w||_2 + eta        filter
            ||leaf of w||_2 + eta          layer
        p = 2:    eps = rho T^2 g / ||T g||_2
        p = inf:  eps = rho T sign(g)

    With eta = 0, element scope and every leaf normalised (`normalize=True`), any
    rescaling of single weights that leaves the loss as it is takes eps along. Leaving
    biases out, as is the default, and eta, which keeps weights near 0 perturbed, each
    break this a little. The radius is relative: rho is about ten times that of SAM.

    Args:
        rho: Radius relative to the weights: a number >= 0 or a schedule.
        eta: Added to every |w|, >= 0.
        scope: Over what |w| is taken. A layer is a leaf. A filter is the kernel of one
            output channel, all of a leaf but `filter_axis`; leaves of fewer than two
            axes have none and stay at element scope.
        ord: The p of the ball, in (1, inf].
        normalize: Which leaves get T from w; the others get T = 1 and are perturbed
            as in SAM. A function of the key path and the leaf, or a tree of bools that
            is a prefix of the parameters. None is everything but biases, by this rule.
            A leaf is a bias (1) by its name, whatever its shape: if the last word of it
            is `bias`, or the first is and no other says weight (`in_proj_bias`,
            `bias_hh_l0`, not `bias_kernel`), or it is `beta` or `offset`; (2) by the
            weight beside it, if it has fewer axes, or fewer that are longer than 1: if
            it is called as that with a `b` for the `w` (`b1` and `W1`, `bq` and `wq`),
            unless there is an `a` of as many axes too (LoRA), or if it comes after it
            without a name (`[(W, b)]`); (3) if it is called `b`, numbered or not, and
            has at most one axis. The name is the last key that is no number, in a flat
            dictionary what follows the last `.` or `/`.
        filter_axis: Axis, or tuple of axes, that the filters of a kernel are numbered
            by: its output channels, the last axis in Flax and Haiku, 0 in Equinox and
            PyTorch, (-2, -1) for a query kernel of shape (d, heads, head_dim). Or a
            function of the key path and the leaf that returns these, or None where
            there are no filters. (Name it in `static_args` of
            `optax.inject_hyperparams`, as `layer_axis`, `mask` and `normalize`.)
        layer_axis: Axis, or axes, along which layers of one shape are stacked, as by
            `nn.scan` and `nnx.vmap`; likewise or a function, None for a leaf that holds
            one layer. Each layer then has its own norms, and `filter_axis` counts the
            axes of one layer. No effect at element scope.
        mask: Which leaves to perturb at all; see `perturbation`.
        length: Factor on rho, by the dual norm; see `perturbation`.
        per_leaf: Whether every array has a ball of its own; see `perturbation`. With
            layer scope, eta = 0 and a mask of the kernels it is adversarial weight
            perturbation: eps = rho ||w|| g / ||g|| for every array.
        shard_axes: For parameters sharded by hand; see `perturbation`. Not with filters
            or `layer_axis`, whose norms may be cut through by such sharding.

    Returns:
        A transformation from the gradient to eps, float32 or wider, to be added. Its
        `update` needs `params`.

    Raises:
        ValueError: If rho, eta or ord is a Python number out of range, if scope is
            none of the three; in `update`, if params is None or a leaf has no
            `filter_axis`.

    Examples:
        >>> import jax.numpy as jnp
        >>> ellipsoid = adaptive_ellipsoid(0.5, eta=0.0)
        >>> params = {"kernel": jnp.array([1.0, 10.0]), "bias": jnp.array([9.0])}
        >>> grads = {"kernel": jnp.array([1.0, 0.1]), "bias": jnp.array([0.0])}
        >>> eps, _ = ellipsoid.update(grads, ellipsoid.init(params), params)
        >>> print((eps["kernel"] / params["kernel"]).round(4))  # Relative to w.
        [0.3536 0.3536]

    References:
        Kwon, Kim, Park, Choi, ASAM: Adaptive Sharpness-Aware Minimization for
        Scale-Invariant Learning of Deep Neural Networks, 2021,
        https://arxiv.org/abs/2102.11600. Which leaves are normalised, and eta, follow
        the authors' code.
    """
    check_radius(rho, "adaptive_ellipsoid(rho)")
    check_number("eta", eta, 0)
    check_choice("scope", scope, "element", "filter", "layer")
    check_signature("normalize", normalize, "path", "leaf")
    check_signature("filter_axis", filter_axis, "path", "leaf")
    check_signature("layer_axis", layer_axis, "path", "leaf")
    cut = '`scope="filter"`' if scope == "filter" else "`layer_axis`"
    if shard_axes is not None and (scope == "filter" or layer_axis is not None):
        raise ValueError(
            f"{cut} cannot be combined with `shard_axes`: a filter or layer may be cut "
            "by the sharding. Shard under `jax.jit` instead, or use another scope."
        )
    operator = operators.adaptive(
        eta, scope, normalize, filter_axis, layer_axis, shard_axes
    )
    return perturbation(
        rho,
        operator,
        ord=ord,
        mask=mask,
        length=length,
        per_leaf=per_leaf,
        shard_axes=shard_axes,
    )


def fisher_ellipsoid(
    rho: jax.typing.ArrayLike | optax.Schedule,
    estimator: optax.GradientTransformation,
    *,
    eta: jax.typing.ArrayLike | None = None,
    damping: jax.typing.ArrayLike | None = None,
    relative: bool = True,
    mask: Any | None = None,
    length: Length | None = None,
    per_leaf: bool = False,
    shard_axes: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Perturbation of Fisher SAM: a radius in units of the model's output.

        T^2 = 1 / (1 + eta F)    or    1 / (F + damping)
        eps = rho T^2 g / ||T g||_2

    F is a diagonal Fisher information, so that eps is short where a small change of a
    weight changes the predictions much. A diagonal is only invariant to rescaling
    weight by weight, and any damping breaks even that.

    Args:
        rho: Radius: a number >= 0 or a schedule. Euclidean length with eta (eps is
            never longer than rho), Fisher length with damping (eps may be as long as
            rho / sqrt(damping)).
        estimator: Transformation whose output is F. It receives every extra argument.
            A moving average is `optax.chain(estimator, optax.ema(0.95))`.
        eta: Weight of F against the Euclidean metric, >= 0; 0 is exactly SAM. 1 unless
            `damping` is given.
        damping: Added to F before inverting, >= 0. The same direction as eta =
            1 / damping, with a rho that is sqrt(damping) times as large. With 0,
            parameters of F = 0 are not perturbed.
        relative: Divide F by its mean over the perturbed parameters first, so that eta
            and damping have no unit. Without it the usual F is so small beside 1 that
            eta = 1 is SAM to five digits, and eta has to grow as the loss falls.
        mask: Which leaves to perturb; see `perturbation`.
        length: Factor on rho, by the dual norm; see `perturbation`.
        per_leaf: Whether every array has a ball of its own; see `perturbation`.
        shard_axes: For parameters sharded by hand; see `perturbation`.

    Returns:
        A transformation from the gradient to eps, float32 or wider, to be added.
        Negative entries of F, which some estimators return, count as 0. An F that is
        not finite gives eps = 0 and leaves the state of the estimator as it was.

    Raises:
        TypeError: If estimator is no transformation.
        ValueError: If rho, eta or damping is a Python number out of range, or eta and
            damping are both given.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import given
        >>> ellipsoid = fisher_ellipsoid(0.1, given())
        >>> grads, fisher = jnp.array([1.0, 1.0]), jnp.array([0.0, 6.0])
        >>> eps, _ = ellipsoid.update(grads, ellipsoid.init(grads), fisher=fisher)
        >>> print(eps)  # T^2 is 1 and 1/3.
        [0.08660254 0.02886751]

    References:
        Kim, Li, Hu, Hospedales, Fisher SAM: Information Geometry and Sharpness Aware
        Minimisation, 2022, https://arxiv.org/abs/2206.04920. `relative` is this
        library's addition.
    """
    check_radius(rho, "fisher_ellipsoid(rho, estimator)")
    check_transformation("estimator", estimator, "squared_gradient()")
    if eta is not None and damping is not None:
        raise ValueError(
            "`eta` and `damping` are two ways to damp the same metric: give one. "
            f"Got eta={eta} and damping={damping}."
        )
    eta = 1.0 if eta is None else eta
    check_number("eta", eta, 0)
    if damping is not None:
        check_number("damping", damping, 0)
    operator = operators.fisher(estimator, eta, damping, relative, mask, shard_axes)
    return perturbation(
        rho,
        operator,
        mask=mask,
        length=length,
        per_leaf=per_leaf,
        shard_axes=shard_axes,
    )
