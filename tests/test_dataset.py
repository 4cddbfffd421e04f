"""Estimators over a data set, against one batch of all of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam


RNG = np.random.default_rng(0)
N = 14
X = RNG.normal(size=(N, 4)).astype("float32")
# Two labels an example, some absent, and weights.
Y = RNG.integers(-1, 3, size=(N, 2))
W = RNG.uniform(0, 2, size=N).astype("float32")
PARAMS = {
    "in": RNG.normal(size=(4, 5)).astype("float32"),
    "out": RNG.normal(size=(5, 3)).astype("float32"),
}
KEY = jax.random.key(0)
# Labels that do not depend on the draw, so that a batch of all draws the same.
LIKELY = fsam.categorical._replace(sample=lambda key, h: jnp.argmax(h, -1))


def model(params, x):
    h = jnp.tanh(x @ params["in"]) @ params["out"]
    return jnp.stack([h, 1 - 2 * h], axis=1)


NLL = fsam.negative_log_likelihood(model, LIKELY)
EXACT, EMPIRICAL = fsam.fisher_exact(NLL), fsam.fisher_empirical(NLL)
I1 = functools.partial(fsam.fisher_i1, NLL, key=KEY, standard_error=True)


def batches(size):
    cuts = (slice(i, i + size) for i in range(0, N, size))
    return ((X[cut], Y[cut], W[cut]) for cut in cuts)


def close(a, b, rtol=1e-5, atol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b
    )


def at_once(estimator):
    state = estimator.init(PARAMS)
    return jax.jit(functools.partial(estimator.update, None))(
        state, PARAMS, batch=(X, Y, W)
    )


@pytest.mark.short("exact-4")
@pytest.mark.parametrize("size", [1, 4, 14])
@pytest.mark.parametrize("estimator", [EXACT, EMPIRICAL], ids=["exact", "empirical"])
def test_a_data_set_is_one_big_batch(estimator, size):
    found = fsam.dataset_diagonal(estimator, PARAMS, batches(size))
    close(found, at_once(estimator)[0], rtol=1e-6, atol=1e-6)


class Tensor:
    """An array of another framework: neither JAX's nor NumPy's, nor cut by indices."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype)


def test_a_loader_of_another_framework_is_read():
    loader = [[Tensor(x) for x in batch] for batch in batches(4)]
    found = fsam.dataset_diagonal(EMPIRICAL, PARAMS, loader)
    close(found, fsam.dataset_diagonal(EMPIRICAL, PARAMS, [*batches(4)]), 0, 0)


@pytest.mark.short("3")
@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_standard_error_is_that_of_all_draws_at_once(num_samples):
    estimator = I1(num_samples=num_samples)
    diagonal, state = at_once(estimator)
    for size in (1, 4):
        found = fsam.dataset_diagonal(
            estimator, PARAMS, batches(size), standard_error=True
        )
        close(found, (diagonal, state.standard_error))


def test_variances_for_given_inputs_add_up():
    estimator = fsam.fisher_gnb(NLL, key=KEY, standard_error=True)
    states, state = [], estimator.init(PARAMS)
    update = jax.jit(functools.partial(estimator.update, None))
    for batch in batches(7):
        _, state = update(state, PARAMS, batch=batch)
        states.append(state)
    total = sum(state.batch_weight for state in states)
    _, error = fsam.dataset_diagonal(estimator, PARAMS, batches(7), standard_error=True)
    expected = jax.tree.map(
        lambda *e: (
            np.sqrt(
                sum((s.batch_weight * x) ** 2 for s, x in zip(states, e, strict=True))
            )
            / total
        ),
        *(state.standard_error for state in states),
    )
    close(error, expected)


@pytest.mark.long
def test_by_group_every_group_is_that_of_its_estimator():
    grouped = fsam.by_group(
        {"in": "drawn", "out": "exact"}, {"drawn": I1(), "exact": EXACT}
    )
    diagonal, error = fsam.dataset_diagonal(
        grouped, PARAMS, batches(4), standard_error=True
    )
    drawn, state = at_once(I1())
    close(diagonal["in"], drawn["in"])
    close(error["in"], state.standard_error["in"])
    close(diagonal["out"], at_once(EXACT)[0]["out"])
    assert not error["out"].any()


@pytest.mark.long
def test_only_the_parameters_of_the_mask_are_evaluated():
    mask = {"in": False, "out": True}
    whole = at_once(EXACT)[0]
    expected = {"in": optax.MaskedNode(), "out": whole["out"]}
    close(fsam.dataset_diagonal(EXACT, PARAMS, batches(4), mask=mask), expected)
    close(fsam.diagonal(EXACT, PARAMS, (X, Y, W), mask=mask), expected)

    def products(mask):
        jaxpr = jax.make_jaxpr(
            lambda p: fsam.diagonal(EMPIRICAL, p, (X, Y, W), mask=mask)
        )(PARAMS)
        return str(jaxpr).count("dot_general")

    assert products(mask) < products(None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A tree that can be called, as those of Equinox."""

    first: Any
    last: Any

    def __call__(self):
        raise AssertionError


def test_a_tree_that_can_be_called_is_a_mask():
    params = Module(PARAMS["in"], PARAMS["out"])
    nll = fsam.negative_log_likelihood(
        lambda w, x: model({"in": w.first, "out": w.last}, x), LIKELY
    )
    exact, grouped = fsam.fisher_exact(nll), {False: fsam.fisher_empirical(nll)}
    mask, expected = Module(False, True), at_once(EXACT)[0]
    found = fsam.dataset_diagonal(exact, params, batches(4), mask=mask)
    close(found.last, expected["out"])
    assert found.first == optax.MaskedNode()
    grouped = fsam.by_group(mask, grouped | {True: exact})
    found = jax.jit(functools.partial(fsam.diagonal, grouped))(params, (X, Y, W))
    close([found.first, found.last], [at_once(EMPIRICAL)[0]["in"], expected["out"]])
    for ball in (
        fsam.euclidean_ball(0.1, mask=mask),
        fsam.adaptive_ellipsoid(0.1, normalize=mask, mask=mask),
    ):
        eps, _ = ball.update(params, ball.init(params), params)
        assert eps.last.any() and not eps.first.any()


def test_one_program_serves_all_batches_and_all_calls():
    traces = []

    def traced(params, x):
        traces.append(None)
        return model(params, x)

    estimator = fsam.fisher_empirical(traced, LIKELY)
    fsam.dataset_diagonal(estimator, PARAMS, batches(4))
    first = len(traces)
    fsam.dataset_diagonal(estimator, PARAMS, batches(4))
    fsam.dataset_diagonal(estimator, PARAMS, list(batches(4))[:1])
    assert len(traces) == first


def test_it_goes_on_from_where_it_was():
    seen = []
    whole = fsam.dataset_diagonal(
        I1(), PARAMS, batches(4), standard_error=True, progress=seen.append
    )
    assert [int(state.batches) for state in seen] == [1, 2, 3, 4]
    rest = list(batches(4))[2:]
    again = fsam.dataset_diagonal(
        I1(), PARAMS, rest, standard_error=True, state=seen[1]
    )
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_state_of_another_call_is_refused():
    seen = []
    fsam.dataset_diagonal(I1(), PARAMS, list(batches(4))[:1], progress=seen.append)
    other = {**PARAMS, "out": PARAMS["out"][:, :1]}
    for estimator, params, kept, message in (
        (I1(), PARAMS, True, r"leaf .*spreads.*progress"),
        (EXACT, PARAMS, False, r"leaf .*estimator.*progress"),
        (I1(), other, False, r"leaf .*'out'.*shape.*progress"),
    ):
        with pytest.raises(ValueError, match=message):
            fsam.dataset_diagonal(
                estimator, params, [], standard_error=kept, state=seen[0]
            )
    with pytest.raises(TypeError, match=r"DatasetState, got .*progress"):
        fsam.dataset_diagonal(EXACT, PARAMS, [], state=EXACT.init(PARAMS))


def test_batches_draw_apart_and_a_key_decides():
    drawn = fsam.fisher_i1(model, fsam.categorical, key=KEY)
    twice = [(X, None), (X, None)]
    one, two, other = (
        fsam.dataset_diagonal(drawn, PARAMS, data, key=key)
        for data, key in ((twice[:1], None), (twice, None), (twice[:1], KEY))
    )
    assert not np.allclose(one["in"], two["in"])
    close(one, other)
    third = fsam.dataset_diagonal(drawn, PARAMS, twice[:1], key=jax.random.key(1))
    assert not np.allclose(one["in"], third["in"])


def test_half_precision_is_evaluated_in_float32():
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    found = fsam.dataset_diagonal(EXACT, half, batches(4))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_nothing_is_zero():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    close(fsam.dataset_diagonal(EXACT, PARAMS, []), zeros)
    nothing = [(X, Y, np.zeros(N))] * 2
    close(fsam.dataset_diagonal(EXACT, PARAMS, nothing), zeros)


@pytest.mark.parametrize(
    ("estimator", "data", "options", "message"),
    [
        (fsam.squared_gradient(), [], {}, "what a batch weighs"),
        (fsam.refresh_every(2, EXACT), [], {}, "refresh_every"),
        (EXACT, 3, {}, "iterable"),
        (EXACT, {"x": X}, {}, "iterable"),
        (EXACT, [], {"standard_error": True}, "standard_error"),
        (
            fsam.by_group(
                {"in": 0, "out": 1}, {0: I1(), 1: fsam.fisher_i1(NLL, key=KEY)}
            ),
            [],
            {"standard_error": True},
            "standard_error",
        ),
    ],
)
def test_what_cannot_be_is_refused(estimator, data, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fsam.dataset_diagonal(estimator, PARAMS, data, **options)
