"""Diagonals that cost nothing: the squared gradient, and one that is given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_like, is_real
from fsam_optax._common.norms import widen


def squared_gradient() -> optax.GradientTransformationExtraArgs:
    """Squares the batch gradient: the cheap surrogate of the Fisher SAM paper.

        F = (mean_n g_n)^2            g_n: gradient of the loss of example n

    This is *not* a Fisher information, nor the empirical Fisher mean_n g_n^2, from
    which it falls short by the variance of g_n. It vanishes where the batch gradient
    does, depends on the batch size, and scales with the square of the loss.

    Returns:
        A stateless transformation from the batch gradient to its elementwise square,
        float32 or wider. Beyond magnitudes of 1e19 the square overflows float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> estimator = squared_gradient()
        >>> grads = {"w": jnp.array([1.0, -2.0])}
        >>> diagonal, _ = estimator.update(grads, estimator.init(grads))
        >>> print(diagonal["w"])
        [1. 4.]

    References:
        Kim, Li, Hu, Hospedales, Fisher SAM: Information Geometry and Sharpness Aware
        Minimisation, 2022, https://arxiv.org/abs/2206.04920. On what it is not:
        Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558.
    """

    def square(g):
        if not is_real(g):
            return jnp.zeros(jnp.shape(g), widen())
        g = jnp.asarray(g, widen(g))
        return g * g

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(square, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def given() -> optax.GradientTransformationExtraArgs:
    """Takes the diagonal from the extra argument `fisher` of `update`.

    For a diagonal computed elsewhere: stored after an earlier task, merged over
    workers, or averaged over a whole data set.

    Returns:
        A stateless transformation whose output is `fisher` itself.

    Raises:
        TypeError: In `update`, if `fisher` is not passed.
        ValueError: In `update`, if `fisher` has not the structure and shapes of the
            gradients.

    Examples:
        >>> import jax.numpy as jnp
        >>> estimator = given()
        >>> grads = {"w": jnp.array([1.0, -2.0])}
        >>> fisher = {"w": jnp.array([0.5, 3.0])}
        >>> diagonal, _ = estimator.update(grads, estimator.init(grads), fisher=fisher)
        >>> print(diagonal["w"])
        [0.5 3. ]
    """

    def init_fn(params):
        del params
        return optax.EmptyState()

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    def update_fn(updates, state, params=None, *, fisher=None, **extra_args):
        del params, extra_args
        if fisher is None:
            raise TypeError(
                "`given` needs the diagonal as an extra argument: "
                "`update(grads, state, params, fisher=diagonal)`, or with "
                "`value_and_grad`, `f(params, state, batch, "
                "extra_args={'fisher': diagonal})`."
            )
        if any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
            # Within `by_group`: the gradient is that of a group, `fisher` is whole.
            fisher = jax.tree.map(
                lambda g, f: g if is_masked(g) else f,
                updates,
                fisher,
                is_leaf=is_masked,
            )
        check_like("fisher", fisher, "grads", updates)
        return fisher, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
