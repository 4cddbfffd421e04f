"""The loss that knows its model: its rules, over every estimator."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam
from fsam_optax._fisher.functional import value_grad_and_pull
from fsam_optax._fisher.negative_log_likelihood import total_weight
from fsam_optax._fisher.one_pass import value_grad_and_fisher


RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype("float32")
Y = np.array([0, 1, 2, 0, 1, 2])
# Two labels for each example.
TWO = np.array([[0, 1], [2, 2], [1, 0], [0, 0], [1, 2], [2, 1]])
PARAMS = {
    "in": RNG.normal(size=(4, 5)).astype("float32"),
    "out": RNG.normal(size=(5, 3)).astype("float32"),
}
KEY = jax.random.key(0)


def net(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def sequence(params, x):
    h = net(params, x)
    return jnp.stack([h, 1 - 2 * h], axis=1)


def dropped(params, x, key, scale=1.0):
    """A model that draws a mask of the shape of the batch."""
    h = jnp.tanh(x @ params["in"])
    keep = jax.random.bernoulli(key, 0.5, h.shape)
    return scale * (jnp.where(keep, 2 * h, 0) @ params["out"]), {"hidden": h}


MAKERS = {
    "empirical": fsam.fisher_empirical,
    "exact": fsam.fisher_exact,
    "i1": functools.partial(fsam.fisher_i1, key=KEY),
    "hutchinson": functools.partial(fsam.fisher_hutchinson, key=KEY),
    "gnb": functools.partial(fsam.fisher_gnb, key=KEY),
    "i2": functools.partial(fsam.fisher_i2, key=KEY),
}
# Those whose estimate does not depend on where in the batch an example stands.
STEADY = ["empirical", "exact"]


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@functools.cache
def estimate(nll, make):
    return jax.jit(functools.partial(fsam.diagonal, make(nll)))


def evaluate(nll, make, batch, **extra):
    if not extra:
        return estimate(nll, make)(PARAMS, batch)
    return jax.jit(functools.partial(fsam.diagonal, make(nll), **extra))(PARAMS, batch)


@functools.cache
def in_one_pass(nll):
    return jax.jit(lambda p, b: value_grad_and_fisher(nll, p, b, (), {}))


def one_pass(nll, batch, *args, **kwargs):
    if not args and not kwargs:
        return in_one_pass(nll)(PARAMS, batch)
    run = functools.partial(value_grad_and_fisher, nll)
    return jax.jit(lambda p, b: run(p, b, args, kwargs))(PARAMS, batch)


def close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def by_hand(log_probs, params, a, m):
    """Returns loss, gradient and Fisher from the log-probability of every label.

    `log_probs(params)` has shape (N, T).
    """
    log_p, scores = jax.jit(lambda p: (log_probs(p), jax.jacrev(log_probs)(p)))(params)
    total = np.sum(a[:, None] * m)

    def summed(s, power):
        one = np.einsum("nt,nt...->n...", m, np.asarray(s, np.float64))
        return np.einsum("n,n...->...", a, one**power) / total

    loss = -np.sum(a[:, None] * m * np.asarray(log_p)) / total
    gradient = jax.tree.map(lambda s: -summed(s, 1), scores)
    return loss, gradient, jax.tree.map(lambda s: summed(s, 2), scores)


# One divisor, and what the weights mean.


@pytest.mark.short("labels")
@pytest.mark.parametrize("weights", ["none", "examples", "labels"])
def test_loss_gradient_and_fisher_are_means_over_the_labels(weights):
    nll = fsam.negative_log_likelihood(sequence, fsam.categorical)
    w = {
        "none": np.ones((6, 2)),
        "examples": np.repeat([[1.0], [0.0], [2.0], [0.5], [1.0], [3.0]], 2, axis=1),
        "labels": np.array([[1, 0], [1, 2], [0, 0], [0.5, 1], [1, 1], [3, 1]]),
    }[weights]
    given = {"none": (), "examples": (w[:, 0],), "labels": (w,)}[weights]
    a = w.max(axis=1)
    m = w / np.where(a > 0, a, 1)[:, None]

    def log_probs(params):
        return fsam.categorical.log_prob(sequence(params, X), TWO)

    loss, gradient, fisher = by_hand(log_probs, PARAMS, a, m)
    batch = (X, TWO, *given)
    close(jax.jit(jax.value_and_grad(nll))(PARAMS, batch), (loss, gradient))
    (value, aux), grads, one = one_pass(nll, batch)
    assert aux is None
    close((value, grads, one), (loss, gradient, fisher))
    close(evaluate(nll, fsam.fisher_empirical, batch), fisher)
    np.testing.assert_allclose(total_weight(nll, PARAMS, batch, (), {}), w.sum())


@pytest.mark.short("empirical")
@pytest.mark.parametrize("name", STEADY)
def test_unequal_parts_weighed_by_their_divisors_are_the_whole(name):
    nll = fsam.negative_log_likelihood(sequence, fsam.categorical)
    y = np.where(RNG.random(TWO.shape) < 0.4, -1, TWO)
    cuts = slice(0, 1), slice(1, 4), slice(4, 6)
    parts = [(X[cut], y[cut]) for cut in cuts]
    value, weight = (
        jax.jit(nll),
        jax.jit(lambda b: total_weight(nll, PARAMS, b, (), {})),
    )
    weights = [weight(part) for part in parts]
    assert len({float(w) for w in weights}) > 1

    def mean(values):
        return jax.tree.map(
            lambda *v: (
                sum(w * x for w, x in zip(weights, v, strict=True)) / sum(weights)
            ),
            *values,
        )

    close(mean([value(PARAMS, part) for part in parts]), value(PARAMS, (X, y)))
    one = [evaluate(nll, MAKERS[name], part) for part in parts]
    close(mean(one), evaluate(nll, MAKERS[name], (X, y)))


def test_micro_batches_count_by_the_weight_of_their_labels():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    batch = X, np.array([0, -1, 2, -1, -1, 2])  # 2 and 1, whichever way it is halved
    f = fsam.value_and_grad(nll, fsam.euclidean_ball(0.0), micro_batches=2)
    value, grads, _ = jax.jit(f)(PARAMS, f.init(PARAMS), batch)
    close((value, grads), jax.jit(jax.value_and_grad(nll))(PARAMS, batch))


LABELS = pytest.mark.parametrize("label", [77, -5, np.nan])


def hidden_and_not(label):
    """A loss, and batches that differ in a label of weight 0."""
    likelihood = fsam.gaussian(0.5) if np.isnan(label) else fsam.categorical
    y = RNG.normal(size=(6, 3)).astype("float32") if np.isnan(label) else Y
    weights = np.array([1.0, 1, 0, 1, 1, 1], "float32")
    hidden = y.copy()
    hidden[2] = label
    nll = fsam.negative_log_likelihood(net, likelihood)
    return nll, (X, hidden, weights), (X, y, weights)


@LABELS
def test_weight_0_hides_any_label_in_value_and_gradient(label):
    nll, hidden, shown = hidden_and_not(label)
    for fn in (
        nll,
        jax.grad(nll),
        jax.grad(lambda w, b: jax.grad(nll)(w, b)["in"][0, 0]),
    ):
        fn = jax.jit(fn)
        equal(fn(PARAMS, hidden), fn(PARAMS, shown))
    close(one_pass(nll, hidden), one_pass(nll, shown))


@pytest.mark.short("i2-nan", "exact-77", "gnb-77")
@LABELS
def test_weight_0_hides_any_label_in_the_fisher(make, label):
    nll, hidden, shown = hidden_and_not(label)
    equal(evaluate(nll, make, hidden), evaluate(nll, make, shown))


def test_weight_0_hides_outputs_that_are_not_finite_in_the_value():
    nll = jax.jit(fsam.negative_log_likelihood(net, fsam.categorical))
    weights = np.array([1.0, 1, 0, 1, 1, 1], "float32")
    padded = np.where(weights[:, None] == 0, np.float32(np.inf), X)
    assert not np.all(np.isfinite(jax.jit(net)(PARAMS, padded)))
    equal(nll(PARAMS, (padded, Y, weights)), nll(PARAMS, (X, Y, weights)))


ZEROS = jax.tree.map(np.zeros_like, PARAMS)
NONE = X, np.full(6, 77), np.zeros(6)


def test_a_batch_of_weight_0_is_0():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    equal(jax.jit(jax.value_and_grad(nll))(PARAMS, NONE), (np.zeros([]), ZEROS))
    equal(one_pass(nll, NONE), ((np.zeros([]), None), ZEROS, ZEROS))


@pytest.mark.short("empirical", "exact", "gnb", "hutchinson")
def test_the_fisher_of_a_batch_of_weight_0_is_0(make):
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    equal(evaluate(nll, make, NONE), ZEROS)


ABSENT = np.where(np.arange(6) == 5, -100, Y)


def test_an_absent_label_is_one_that_is_not_there():
    run = jax.jit(
        jax.value_and_grad(fsam.negative_log_likelihood(net, fsam.categorical))
    )
    close(run(PARAMS, (X, ABSENT)), run(PARAMS, (X[:5], Y[:5])))


@pytest.mark.short("exact")
def test_an_absent_label_is_not_there_in_the_fisher(make):
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    weights = (np.arange(6) < 5).astype("float32")
    fisher = evaluate(nll, make, (X, ABSENT))
    close(fisher, evaluate(nll, make, (X, Y, weights)))
    if make is fsam.fisher_exact:
        close(fisher, evaluate(nll, make, (X[:5], Y[:5])))


@pytest.mark.long
def test_some_of_several_binary_labels_may_be_absent():
    y = np.array(
        [[1, -1, 0], [0, 1, 1], [-1, -1, -1], [1, 1, 0], [0, 0, 0], [1, -1, 1]]
    )

    def log_probs(params):
        h = net(params, X)
        log_p = y * jax.nn.log_sigmoid(h) + (1 - y) * jax.nn.log_sigmoid(-h)
        return jnp.sum(jnp.where(y < 0, 0, log_p), axis=1, keepdims=True)

    a = (y.max(axis=1) >= 0).astype(float)
    expected = by_hand(log_probs, PARAMS, a, np.ones((6, 1)))
    nll = fsam.negative_log_likelihood(net, fsam.bernoulli)
    (value, _), grads, fisher = one_pass(nll, (X, y))
    close((value, grads, fisher), expected)
    # Labels that are drawn are absent there too: the exact Fisher, by enumeration.
    exact = evaluate(nll, fsam.fisher_exact, (X, y))
    draws = [
        evaluate(
            nll, functools.partial(fsam.fisher_i1, key=key, num_samples=200), (X, y)
        )
        for key in jax.random.split(KEY, 4)
    ]
    close(jax.tree.map(lambda *x: np.mean(x, 0), *draws), exact, rtol=0.2, atol=0.02)


IMPOSSIBLE = X, np.where(np.arange(6) == 2, 3, Y)


def test_an_impossible_label_is_nan_everywhere():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    value_and_grad = jax.jit(jax.value_and_grad(nll))
    for tree in (value_and_grad(PARAMS, IMPOSSIBLE), one_pass(nll, IMPOSSIBLE)):
        assert all(np.isnan(x).all() for x in jax.tree.leaves(tree))


def test_an_impossible_label_is_nan_in_the_fisher(make):
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    assert all(np.isnan(x).all() for x in evaluate(nll, make, IMPOSSIBLE).values())


@pytest.mark.parametrize(
    "dtype, classes", [("uint8", 256), ("uint8", 300), ("int8", 300)]
)
def test_labels_of_a_narrow_type_are_those_of_a_wide_one(dtype, classes):
    y = np.array([0, 1, 5, 44, 100, -1]).astype(dtype)
    h = RNG.normal(size=(6, classes)).astype("float32")
    of = fsam.categorical
    for fn in (of.presence, of.log_prob, of.score):
        np.testing.assert_array_equal(fn(h, y), fn(h, y.astype("int32")))
        assert np.isfinite(fn(h, y)).all()


def test_soft_labels_are_expectations_over_labels():
    p = np.asarray(jax.nn.softmax(RNG.normal(size=(6, 3)))).astype("float32")
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    hard = [nll(PARAMS, (X, np.full(6, c), p[:, c])) * p[:, c].sum() for c in range(3)]
    np.testing.assert_allclose(nll(PARAMS, (X, p)), sum(hard) / 6, rtol=1e-5)
    one_hot = np.eye(3, dtype="float32")[Y]
    close(one_pass(nll, (X, one_hot)), one_pass(nll, (X, Y)))


# Batches, arguments, keys, aux.


@pytest.mark.short("i1", "exact")
def test_a_batch_is_any_pytree(make):
    def unpack(batch):
        return batch["image"], batch["label"], batch["mask"]

    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    mine = fsam.negative_log_likelihood(net, fsam.categorical, unpack=unpack)
    weights = np.array([1, 0, 2, 1, 1, 1], "float32")
    batch = {"image": X, "label": Y, "mask": weights, "name": None}
    equal(nll(PARAMS, (X, Y, weights)), mine(PARAMS, batch))
    equal(evaluate(nll, make, (X, Y, weights)), evaluate(mine, make, batch))


def keys_in(kind):
    return {
        "typed": ((KEY,), {}),
        "legacy": ((jax.random.PRNGKey(0),), {}),
        "in a dict": ((), {"key": KEY}),
    }[kind]


@pytest.mark.short("in a dict")
@pytest.mark.parametrize("kind", ["typed", "legacy", "in a dict"])
def test_every_example_draws_by_its_own_key_in_every_pass(kind):
    args, kwargs = keys_in(kind)
    nll = fsam.negative_log_likelihood(dropped, fsam.categorical, has_aux=True)

    def alone(params, n):
        key = jax.random.fold_in(args[0] if args else KEY, n)
        h, _ = dropped(params, X[n][None], key)
        return fsam.categorical.log_prob(h[0], Y[n])

    def log_probs(params):
        return jnp.stack([alone(params, n) for n in range(6)])[:, None]

    expected = by_hand(log_probs, PARAMS, np.ones(6), np.ones((6, 1)))
    (value, aux), grads, fisher = one_pass(nll, (X, Y), *args, **kwargs)
    close((value, grads, fisher), expected)
    close(aux["hidden"], np.tanh(X @ PARAMS["in"]))
    (value, again), grads = jax.jit(jax.value_and_grad(nll, has_aux=True))(
        PARAMS, (X, Y), *args, **kwargs
    )
    close((value, grads), expected[:2])
    close(again, aux)
    apart = evaluate(
        nll, fsam.fisher_empirical, (X, Y), loss_args=args, loss_kwargs=kwargs
    )
    close(apart, expected[2])


@pytest.mark.short("empirical")
def test_estimators_see_the_arguments_of_the_model(make):
    nll = fsam.negative_log_likelihood(dropped, fsam.categorical, has_aux=True)
    fixed = fsam.negative_log_likelihood(
        lambda p, x, key: dropped(p, x, key, 3.0), fsam.categorical, has_aux=True
    )
    extra = {"loss_args": (KEY,)}
    close(
        evaluate(nll, make, (X, Y), **extra, loss_kwargs={"scale": 3.0}),
        evaluate(fixed, make, (X, Y), **extra),
    )


def test_a_key_is_passed_whole_if_it_is_not_to_be_split():
    nll = fsam.negative_log_likelihood(
        dropped, fsam.categorical, has_aux=True, split_keys=False
    )
    h, _ = dropped(PARAMS, X, KEY)
    expected = -jnp.mean(fsam.categorical.log_prob(h, Y))
    close(nll(PARAMS, (X, Y), KEY)[0], expected)
    with pytest.raises(ValueError, match="split_keys"):
        one_pass(nll, (X, Y), KEY)


def test_aux_may_be_the_same_for_all_examples_but_no_statistic():
    key = jax.random.key(7)

    def fixed(params, x):
        aux = {"norm": jnp.sum(params["in"]), "h": x[:, :1], "key": key, "step": 3}
        return net(params, x), aux

    def statistic(params, x):
        return net(params, x), {"deep": {"mean": jnp.mean(x, axis=0)}}

    nll = fsam.negative_log_likelihood(fixed, fsam.categorical, has_aux=True)
    (_, aux), _, _ = one_pass(nll, (X, Y))
    close(aux["norm"], np.sum(PARAMS["in"]))
    equal(aux["h"], X[:, :1])
    assert aux["key"] == key and aux["step"] == 3
    nll = fsam.negative_log_likelihood(statistic, fsam.categorical, has_aux=True)
    close(nll(PARAMS, (X, Y))[1]["deep"]["mean"], X.mean(axis=0))
    with pytest.raises(ValueError, match=r"\['deep'\]\['mean'\].*\(4,\)"):
        one_pass(nll, (X, Y))


# Derivatives.


@pytest.mark.long
def test_the_one_pass_has_ordinary_derivatives_and_a_constant_fisher():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)

    def of_one_pass(params, x):
        (value, _), grads, _ = value_grad_and_fisher(nll, params, (x, Y), (), {})
        return value**2 + optax.tree.norm(grads, squared=True)

    def apart(params, x):
        value, grads = jax.value_and_grad(nll)(params, (x, Y))
        return value**2 + optax.tree.norm(grads, squared=True)

    for derivative in (jax.grad, jax.jacfwd):
        close(
            jax.jit(derivative(of_one_pass, (0, 1)))(PARAMS, X),
            jax.jit(derivative(apart, (0, 1)))(PARAMS, X),
            rtol=1e-4,
            atol=1e-5,
        )

    def fisher(params):
        return optax.tree.sum(value_grad_and_fisher(nll, params, (X, Y), (), {})[2])

    equal(jax.grad(fisher)(PARAMS), jax.tree.map(np.zeros_like, PARAMS))


def test_functional_gradient_pulls_the_output_gradient_back_at_another_point():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    point = jax.tree.map(lambda w: w + 0.1, PARAMS)

    def loss_of(h):
        return -jnp.mean(fsam.categorical.log_prob(h, Y))

    cotangent = jax.grad(loss_of)(net(PARAMS, X))
    expected = jax.vjp(lambda w: net(w, X), point)[1](cotangent)[0]
    grad_fn = fsam.functional_gradient(nll, PARAMS, (X, Y))
    close(grad_fn(point), expected)
    close(grad_fn(PARAMS), jax.grad(nll)(PARAMS, (X, Y)))
    (value, _), grads, pull = value_grad_and_pull(nll, PARAMS, (X, Y), (), {})
    close((value, grads), jax.value_and_grad(nll)(PARAMS, (X, Y)))
    close(pull(point), (nll(point, (X, Y)), expected))


# Messages.


def per_example(params, x):
    return params["out"].T @ jnp.tanh(params["in"].T @ x)


def needs_rngs(params, x, rngs=None):
    if rngs is None:
        raise ValueError('InvalidRngError: Dropout_0 needs PRNG for "dropout"')
    return net(params, x)


MODELS = {
    "a column is missing": (lambda p, x: net(p, x)[:, 0], r"\(6,\).*\[\.\.\., None\]"),
    "a dict": (lambda p, x: {"logits": net(p, x)}, r"dict with \['logits'\].*'logits'"),
    "aux": (lambda p, x: (net(p, x), x), "has_aux=True"),
    "one example": (per_example, r"jax\.vmap\(apply_fn"),
    "other rows": (lambda p, x: net(p, x)[1:], r"\(5, 3\) for 6 examples"),
    "keys": (needs_rngs, "rngs=.*loss_kwargs"),
    "arguments": (lambda p, x, key: net(p, x), "loss_args"),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_that_no_likelihood_takes_are_refused(name):
    model, message = MODELS[name]
    nll = fsam.negative_log_likelihood(model, fsam.categorical)
    estimator = fsam.fisher_exact(model, fsam.categorical)
    for call in (
        lambda: nll(PARAMS, (X, Y)),
        lambda: fsam.diagonal(estimator, PARAMS, (X, Y)),
        lambda: one_pass(nll, (X, Y)),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


C = fsam.categorical
ONE = np.ones(6, "float32")
LABELS = {
    "broadcast": (fsam.gaussian(), ONE, r"\(6,\).*\(6, 3\).*never broadcast"),
    "floats": (C, Y.astype("float32"), r"float32.*astype\(int\)"),
    "one-hot integers": (C, np.eye(3, dtype=int)[Y], r"one-hot.*argmax"),
    "a column": (C, Y[:, None], r"\(6, 1\).*\(6, 3\).*targets\[\.\.\., 0\]"),
    "other rows": (C, Y[:5], r"\(5,\).*\(6, 3\)"),
    "bools": (C, Y > 0, "bool"),
    "a list": (C, [0, 1, 2, 0, 1, 2], r"Leaf \[0\] of the targets.*jnp.asarray"),
    "none": (C, None, "None"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_another_shape_or_type_are_refused(name):
    likelihood, y, message = LABELS[name]
    nll = fsam.negative_log_likelihood(net, likelihood)
    for call in (
        lambda: nll(PARAMS, (X, y)),
        lambda: fsam.diagonal(fsam.fisher_empirical(nll), PARAMS, (X, y)),
        lambda: one_pass(nll, (X, y)),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_a_column_of_labels_is_asked_for():
    nll = fsam.negative_log_likelihood(lambda p, x: net(p, x)[:, :1], fsam.bernoulli)
    with pytest.raises(ValueError, match=r"\(6,\).*\(6, 1\).*targets\[\.\.\., None\]"):
        nll(PARAMS, (X, ONE))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": X, "label": Y}, r"'image', 'label'.*unpack=.*batch\['image'\]"),
        (X, r"array of shape \(6, 4\)"),
        ((X,), "tuple"),
        ((X, Y, np.ones((6, 2))), r"\(6,\).*\(6, 2\)"),
        ((X, "cat"), "targets.*'cat'"),
        ((X, np.float32(1)), r"\(\)"),
        (((X, X[:5]), Y), "leading axes"),
    ],
)
def test_other_batches_are_refused(batch, message):
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    with pytest.raises((TypeError, ValueError), match=message):
        nll(PARAMS, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((fsam.categorical, net), "in this order"),
        ((net, fsam.gaussian), r"`gaussian\(\)`"),
        ((net, "categorical"), r"`fsam_optax\.categorical`"),
        ((net,), "negative_log_likelihood"),
        ((3, fsam.categorical), "must be a function|needs a model"),
    ],
)
def test_other_models_are_refused(make, arguments, message):
    for call in (make, fsam.negative_log_likelihood):
        with pytest.raises(TypeError, match=message):
            call(*arguments) if len(arguments) > 1 else make(*arguments)


def test_a_loss_has_its_likelihood():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    with pytest.raises(TypeError, match="not both"):
        fsam.fisher_exact(nll, fsam.categorical)


def test_inputs_and_targets_are_one_batch():
    nll = fsam.negative_log_likelihood(net, fsam.categorical)
    with pytest.raises(TypeError, match=r"\(inputs, targets\)"):
        fsam.diagonal(fsam.fisher_exact(nll), PARAMS, X, Y)


def test_equal_likelihoods_are_equal():
    assert fsam.gaussian(2) == fsam.gaussian(2.0) != fsam.gaussian(1.0)
    assert hash(fsam.gaussian()) == hash(fsam.gaussian(1))
    assert fsam.negative_log_likelihood(net, fsam.gaussian(0.5)) == (
        fsam.negative_log_likelihood(net, fsam.gaussian(0.5))
    )


def test_explain_needs_no_cotangents():
    nll = fsam.negative_log_likelihood(dropped, fsam.categorical, has_aux=True)
    leaves = fsam.explain(nll, PARAMS, (X, Y), KEY)
    assert [leaf.rule for leaf in leaves] == ["outer product"] * 2
    assert fsam.explain(net, fsam.categorical, PARAMS, (X, Y)) == leaves


# Statistics of the batch, of which a single example has none.


def normalised(p, x):
    h = jnp.tanh(x @ p["in"])
    return ((h - h.mean(0)[None]) / jnp.sqrt(h.var(0)[None] + 0.1)) @ p["out"]


def normalised_inside(p, x):
    return jax.jit(jax.checkpoint(normalised))(p, x)


ONE_BY_ONE = {
    "exact": lambda nll: fsam.diagonal(fsam.fisher_exact(nll), PARAMS, (X, Y)),
    "drawn": lambda nll: fsam.diagonal(fsam.fisher_i1(nll, key=KEY), PARAMS, (X, Y)),
    "one pass": lambda nll: value_grad_and_fisher(nll, PARAMS, (X, Y), (), {}),
    "norms": lambda nll: fsam.per_example_norms(nll, PARAMS, (X, Y)),
}


@pytest.mark.short("normalised-norms")
@pytest.mark.parametrize("how", ONE_BY_ONE)
@pytest.mark.parametrize("apply_fn", [normalised, normalised_inside])
def test_statistics_of_the_batch_are_warned_of(how, apply_fn):
    nll = fsam.negative_log_likelihood(apply_fn, fsam.categorical)
    with pytest.warns(UserWarning, match="reduces over the examples.*check_separable"):
        jax.eval_shape(lambda: ONE_BY_ONE[how](nll))


def steps_first(p, x):
    """As many steps as examples, one after the other, and their mean."""
    steps = jnp.stack([net(p, x) * t for t in range(len(X))])
    return steps.mean(0)


@pytest.mark.short("norms", "drawn")
@pytest.mark.parametrize("how", ONE_BY_ONE)
def test_reductions_that_mix_no_examples_are_not_warned_of(how):
    def aside(p, x):
        normalised(p, x)  # Nobody reads it.
        return net(p, x) + jnp.max(jnp.arange(len(x))) * 0

    for apply_fn in (net, steps_first, aside):
        nll = fsam.negative_log_likelihood(apply_fn, fsam.categorical)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(lambda nll=nll: ONE_BY_ONE[how](nll))


def test_the_loss_itself_may_take_statistics_of_the_batch():
    nll = fsam.negative_log_likelihood(normalised, fsam.categorical)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = fsam.value_and_grad(nll, fsam.euclidean_ball(0.1))
        jax.eval_shape(f, PARAMS, f.init(PARAMS), (X, Y))
