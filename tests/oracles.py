"""Slow, obvious versions of everything, in NumPy float64 on flat dictionaries."""

import contextlib

import jax
import numpy as np


@contextlib.contextmanager
def x64():
    """Computes in float64."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def f64(tree):
    """Returns the leaves of a flat dictionary in float64."""
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def flat(tree):
    """Returns all leaves of a flat dictionary as one vector, in the order of keys."""
    return np.concatenate([f64(tree)[name].ravel() for name in sorted(tree)])


def norm(x, ord):
    x = np.abs(x)
    return np.max(x) if ord == np.inf else np.sum(x**ord) ** (1 / ord)


def dual(ord):
    return 1.0 if ord == np.inf else ord / (ord - 1)


def no_scale(params):
    return {name: np.ones_like(w) for name, w in f64(params).items()}


def asam_scale(params, eta, scope="element", biases=("b",), filter_axis=-1):
    """Returns T of ASAM."""

    def scale(name, w):
        if name in biases:
            return np.ones_like(w)
        if scope == "layer":
            return np.full_like(w, np.sqrt(np.sum(w**2)) + eta)
        if scope == "filter" and w.ndim > 1:
            t = np.empty_like(w)
            for i in range(w.shape[filter_axis]):
                where = [slice(None)] * w.ndim
                where[filter_axis] = i
                where = tuple(where)
                t[where] = np.sqrt(np.sum(w[where] ** 2)) + eta
            return t
        return np.abs(w) + eta

    return {name: scale(name, w) for name, w in f64(params).items()}


def fisher_scale(fisher, eta=1.0, damping=None, relative=True):
    """Returns T of Fisher SAM."""
    fisher = {name: np.maximum(f, 0) for name, f in f64(fisher).items()}
    mean = np.mean(flat(fisher)) if relative else 1.0

    def scale(f):
        f = f / mean
        return np.sqrt(1 / (1 + eta * f) if damping is None else 1 / (f + damping))

    return {name: scale(f) for name, f in fisher.items()}


def perturbation(rho, grads, scale, ord=2):
    """Returns eps, from its definition, and the dual norm."""
    q = dual(ord)
    tg = {name: scale[name] * g for name, g in f64(grads).items()}
    dual_norm = norm(flat(tg), q)
    eps = {
        name: rho * scale[name] * np.sign(x) * (np.abs(x) / dual_norm) ** (q - 1)
        for name, x in tg.items()
    }
    return eps, dual_norm


# Base optimizers: each is a function (w, g, step, memory) -> new w, of one array.


def sgd(lr):
    def step(w, g, t, memory):
        return w - lr(t) * g

    return step


def nesterov(lr, momentum):
    def step(w, g, t, memory):
        memory["m"] = g + momentum * memory.get("m", 0)
        return w - lr(t) * (g + momentum * memory["m"])

    return step


def adam(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    def step(w, g, t, memory):
        memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
        m = memory["m"] / (1 - b1 ** (t + 1))
        v = memory["v"] / (1 - b2 ** (t + 1))
        return w - lr(t) * (m / (np.sqrt(v) + eps) + weight_decay * w)

    return step


def two_pass(params, gradient, batches, rho, scale_of, optimizer, ord=2):
    """Trains with two gradients a step, and returns the parameters.

    `scale_of(params, grads)` is T; `rho(step)` and the learning rate are schedules.
    """
    params = f64(params)
    memory = {name: {} for name in params}
    for step, batch in enumerate(batches):
        grads = f64(gradient(params, batch))
        eps, _ = perturbation(rho(step), grads, scale_of(params, grads), ord)
        above = {name: params[name] + eps[name] for name in params}
        perturbed_grads = f64(gradient(above, batch))
        params = {
            name: optimizer(w, perturbed_grads[name], step, memory[name])
            for name, w in params.items()
        }
    return params
