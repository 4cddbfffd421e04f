"""The methods that are compared, each as a training step at its published defaults."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fsam_optax as fsam


RADII = (0.05, 0.1, 0.2, 0.4, 0.8)


class Method(NamedTuple):
    """A method, and the radii that a search offers it."""

    radii: tuple[float, ...] = RADII  # none where there is no perturbation
    ball: Callable[[Any], Any] = fsam.euclidean_ball
    settings: Mapping[str, Any] = {}  # of `value_and_grad`
    passes: int = 2  # gradients a step


def fisher(estimator, form, rho):
    """Returns the ball of Fisher SAM in one of its two forms."""
    if form == "relative":  # T^2 = 1 / (1 + F / mean F)
        return fsam.fisher_ellipsoid(rho, estimator)
    return fsam.fisher_ellipsoid(rho, estimator, damping=1e-3, relative=False)


def friendly(rho):
    return optax.chain(fsam.friendly(1.0, 0.9), fsam.euclidean_ball(rho))


def times(factor):
    return tuple(factor * rho for rho in RADII)


# Its radius is of the square root of a divergence.
ABSOLUTE = (0.0015, 0.005, 0.015, 0.05, 0.15)
SQUARED = partial(fisher, fsam.squared_gradient())
EMPIRICAL = partial(fisher, fsam.given())
SHARED = {"empirical_fisher": True}  # from the pass of the gradient
METHODS = {
    "base": Method((), passes=1),
    "SAM": Method(),
    # Its radius is relative to the weights.
    "ASAM": Method(times(3), fsam.adaptive_ellipsoid),
    "Fisher SAM, squared, relative": Method(ball=partial(SQUARED, "relative")),
    "Fisher SAM, squared, absolute": Method(ABSOLUTE, partial(SQUARED, "absolute")),
    "Fisher SAM, empirical, relative": Method(
        RADII, partial(EMPIRICAL, "relative"), SHARED
    ),
    "Fisher SAM, empirical, absolute": Method(
        ABSOLUTE, partial(EMPIRICAL, "absolute"), SHARED
    ),
    "GSAM": Method(settings={"descent": fsam.surrogate_gap(0.1)}),
    # It goes nine times as far as from one gradient to the other.
    "WSAM": Method(times(1 / 8), settings={"descent": fsam.extrapolate(9.0)}),
    "Friendly SAM": Method(ball=friendly),
    "MSAM": Method(times(6), passes=1),
}


class Stepper(NamedTuple):
    """How a method trains."""

    init: Callable  # maps parameters to a state
    step: Callable  # maps parameters, state, *args of the loss to loss and both anew
    weights: Callable = lambda params, state: params  # those to evaluate


def stepper(name: str, loss: Any, optimizer: Any, rho: Any) -> Stepper:
    """Returns the training step of a method around a base optimizer.

    The loss is `loss(params, batch, ...)`, a `negative_log_likelihood` where the method
    takes the exact empirical Fisher from the pass of the gradient.
    """
    method = METHODS[name]
    if method.passes == 2:
        settings = {"metrics": False, **method.settings}
        oracle = fsam.value_and_grad(loss, method.ball(rho), **settings)
        return around(oracle, optimizer)
    plain = jax.value_and_grad(loss)

    def oracle(params, state, *args):
        return *plain(params, *args), state

    if name == "base":
        return around(oracle, optimizer, lambda params: ())
    found = around(oracle, fsam.msam(optimizer, rho, 0.9), lambda params: ())
    return found._replace(weights=lambda w, state: fsam.eval_params(state[1], w))


def around(oracle: Any, optimizer: Any, oracle_init: Any = None) -> Stepper:
    """Returns the step of an oracle, by default with an `init` of its own."""
    oracle_init = oracle_init or oracle.init

    def init(params):
        return oracle_init(params), optimizer.init(params)

    def step(params, state, *args):
        value, grads, oracle_state = oracle(params, state[0], *args)
        updates, base_state = optimizer.update(grads, state[1], params)
        return value, optax.apply_updates(params, updates), (oracle_state, base_state)

    return Stepper(init, step)


def grid(name, rates, radii=None) -> list[dict[str, float]]:
    """Returns the points of a search, as many for each method.

    The base optimizer, which has no radius, is offered as many learning rates.
    """
    radii = METHODS[name].radii if radii is None else radii
    if radii:
        return [{"rho": rho, "rate": rate} for rho in radii for rate in rates]
    every = np.geomspace(0.002, 0.5, len(RADII) * len(rates))
    return [{"rho": 0.0, "rate": rate} for rate in every.tolist()]


def columns(points: Sequence[Mapping[str, float]], *names: str) -> list[jax.Array]:
    """Returns one array for each axis of a grid."""
    return [jnp.array([point[name] for point in points]) for name in names]


def choose(points: Sequence[Mapping[str, Any]], scores: Any) -> dict[str, Any]:
    """Returns the point of the greatest score, and the edges of the grid that it is on.

    An edge tells that a wider grid might hold a better point.
    """
    scores = np.nan_to_num(np.array(scores, float), nan=-math.inf, neginf=-math.inf)
    best = points[int(np.argmax(scores))]
    edges = []
    for axis, value in best.items():
        values = sorted({point[axis] for point in points})
        if len(values) > 1 and value in (values[0], values[-1]):
            edges.append(f"{'least' if value == values[0] else 'largest'} {axis}")
    return {**best, "edges": edges, "score": float(scores.max())}
