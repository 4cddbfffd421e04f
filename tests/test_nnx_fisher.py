"""Flax NNX with a real Fisher: the loss and the estimators over modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fsam_optax
from fsam_optax import categorical, fisher_ellipsoid, given, nnx as fsam_nnx


RNG = np.random.default_rng(0)
X = jax.device_put(np.float32(RNG.normal(size=(12, 4))))
Y = jax.device_put(RNG.integers(0, 3, 12))
BATCH = X, Y


class Net(nnx.Module):
    """BatchNorm and Dropout, each if asked for."""

    def __init__(self, norm=False, dropout=False):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs) if norm else jnp.tanh
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if dropout else jnp.tanh
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(self.hidden(x))))


def apply(model, x):
    return model(x)


def evaluate(model, x):
    model.eval()
    return model(x)


def log_loss(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


NLL = fsam_nnx.negative_log_likelihood(apply, categorical)


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol / 10), a, b
    )


def squares_of_examples(model):
    """The slow, obvious empirical Fisher of a module as it is evaluated."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, y):
        copy = nnx.merge(graphdef, params, rest, copy=True)
        copy.eval()
        return log_loss(copy, (x[None], y[None]))

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, X, Y)
    return jax.tree.map(lambda g: jnp.mean(g**2, 0), grads)


@pytest.mark.long
def test_diagonal_has_the_statistics_of_the_moment():
    estimator = fsam_nnx.fisher_empirical(evaluate, categorical)
    model = Net(norm=True, dropout=True)
    before = fsam_nnx.diagonal(estimator, model, BATCH)
    assert_close(before, squares_of_examples(model))
    model.norm.mean[...] += 1.0
    after = fsam_nnx.diagonal(estimator, model, BATCH)
    assert_close(after, squares_of_examples(model))
    assert optax.tree.norm(optax.tree.sub(after, before)) > 1e-3
    assert not model.dropout.deterministic
    assert model.dropout.rngs.count[...] == 0
    only = fsam_nnx.diagonal(
        estimator, model, BATCH, wrt=nnx.All(nnx.Param, nnx.PathContains("out"))
    )
    assert_close(only["out"], after["out"])
    assert list(only) == ["out"]


@pytest.mark.long
def test_data_set_is_one_batch():
    model = Net(norm=True)
    model.norm.mean[...] += 0.5
    estimator = fsam_nnx.fisher_empirical(evaluate, categorical)
    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    assert_close(
        fsam_nnx.dataset_diagonal(estimator, model, batches),
        fsam_nnx.diagonal(estimator, model, BATCH),
    )


@pytest.mark.long
def test_explanations_name_the_variables():
    model = Net(dropout=True)
    found = list(fsam_nnx.explain(NLL, model, BATCH))
    assert len(found) == 4 and all("fallback" not in leaf.rule for leaf in found)
    f = fsam_nnx.value_and_grad(
        NLL, fisher_ellipsoid(0.1, given()), empirical_fisher=True
    )
    assert "empirical Fisher" in str(f.explain(model, BATCH))
    assert model.dropout.rngs.count[...] == 0


@pytest.mark.short("gnb")
@pytest.mark.parametrize("name", ["exact", "i1", "i2", "gnb", "hutchinson"])
def test_estimators_are_those_of_the_parameters(name):
    model = Net(norm=True)
    model.norm.mean[...] += 0.5
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def of_params(params, x):
        return evaluate(nnx.merge(graphdef, params, rest, copy=True), x)

    key = {} if name == "exact" else {"key": jax.random.key(3)}
    ours = getattr(fsam_nnx, f"fisher_{name}")(evaluate, categorical, **key)
    plain = getattr(fsam_optax, f"fisher_{name}")(of_params, categorical, **key)
    expected = jax.jit(functools.partial(fsam_optax.diagonal, plain))(params, BATCH)
    found = nnx.jit(functools.partial(fsam_nnx.diagonal, ours))(model, BATCH)
    assert_close(found, expected)


@pytest.mark.long
def test_fisher_sam_with_batch_norm_in_training_mode():
    ellipsoid = fisher_ellipsoid(1.0, fsam_nnx.fisher_exact(evaluate, categorical))
    f = fsam_nnx.value_and_grad(log_loss, ellipsoid)
    model = Net(norm=True, dropout=True)
    model.norm.mean[...] += 0.5
    start = nnx.clone(model)
    _, grads, state = f(model, f.init(model), BATCH)
    # The Fisher was that of the statistics before the step.
    fisher = fsam_nnx.diagonal(
        fsam_nnx.fisher_exact(evaluate, categorical), start, BATCH
    )
    g = nnx.grad(log_loss)(nnx.clone(start), BATCH)
    size = sum(x.size for x in jax.tree.leaves(g))
    unit = optax.tree.sum(fisher) / size
    squares = jax.tree.map(lambda f: 1 / (1 + f / unit), fisher)
    dual = jnp.sqrt(optax.tree.sum(jax.tree.map(lambda t, g: t * g**2, squares, g)))
    np.testing.assert_allclose(optax.tree.get(state, "dual_norm"), dual, rtol=1e-5)
    moved = nnx.clone(start)
    nnx.update(
        moved,
        jax.tree.map(
            lambda w, t, g: w + t * g / dual, nnx.state(moved, nnx.Param), squares, g
        ),
    )
    assert_close(grads, nnx.grad(log_loss)(moved, BATCH), 1e-4)


@pytest.mark.short("2")
@pytest.mark.parametrize("micro_batches", [None, 2])
def test_one_pass_is_the_gradient_and_the_estimator(micro_batches):
    results = []
    for estimator, empirical in [
        (given(), True),
        (fsam_nnx.fisher_empirical(NLL), False),
    ]:
        model = Net(dropout=True)
        f = fsam_nnx.value_and_grad(
            NLL,
            fisher_ellipsoid(1.0, estimator),
            empirical_fisher=empirical,
            micro_batches=micro_batches,
        )
        value, grads, state = nnx.jit(f)(model, f.init(model), BATCH)
        results.append((value, grads, optax.tree.get(state, "dual_norm")))
        assert model.dropout.rngs.count[...] == 1
    assert_close(*results)


def test_functional_is_that_of_the_parameters():
    model = Net()
    graphdef, params = nnx.split(model)
    plain = fsam_optax.negative_log_likelihood(
        lambda params, x: nnx.merge(graphdef, params)(x), categorical
    )
    ball = fsam_optax.euclidean_ball(0.5)
    f = fsam_optax.value_and_grad(plain, ball, functional=True)
    value, grads, _ = jax.jit(f)(params, f.init(params), BATCH)
    f = fsam_nnx.value_and_grad(NLL, ball, functional=True)
    assert_close(nnx.jit(f)(model, f.init(model), BATCH)[:2], (value, grads))


@pytest.mark.long
def test_loss_of_a_module_updates_it():
    ours, theirs = Net(norm=True), Net(norm=True)
    nll, plain = nnx.jit(NLL), nnx.jit(log_loss)
    np.testing.assert_allclose(nll(ours, BATCH), plain(theirs, BATCH), rtol=1e-6)
    assert_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    f = fsam_nnx.value_and_grad(NLL, fsam_optax.euclidean_ball(0.1))
    nnx.jit(f)(ours, f.init(ours), BATCH)
    plain(theirs, BATCH)
    assert_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))


def test_each_example_has_a_mask_of_its_own():
    def apply_with(model, x, rngs, dropout):
        h = dropout(jnp.ones_like(x), rngs=rngs)
        return model(x) + 0 * jnp.sum(h), {"mask": h}

    loss = fsam_nnx.negative_log_likelihood(apply_with, categorical, has_aux=True)
    rngs = nnx.Rngs(dropout=1)
    _, aux = nnx.jit(loss)(Net(), BATCH, rngs, nnx.Dropout(0.5))
    assert rngs.dropout.count[...] == 1
    assert len(np.unique(aux["mask"], axis=0)) > 4
    f = fsam_nnx.value_and_grad(loss, fsam_optax.euclidean_ball(0.1), has_aux=True)
    model, rngs = Net(), nnx.Rngs(dropout=1)
    (_, again), _, _ = nnx.jit(f)(model, f.init(model), BATCH, rngs, nnx.Dropout(0.5))
    np.testing.assert_array_equal(again["mask"], aux["mask"])


@pytest.mark.parametrize("how", ["estimator", "one pass"])
def test_statistics_over_the_batch_are_no_example_s(how):
    model = Net(norm=True)
    with pytest.raises(ValueError, match=r"'norm'.*'mean'.*BatchNorm in\s*training"):
        if how == "estimator":
            fsam_nnx.diagonal(fsam_nnx.fisher_empirical(NLL), model, BATCH)
        else:
            ellipsoid = fisher_ellipsoid(0.1, given())
            f = fsam_nnx.value_and_grad(NLL, ellipsoid, empirical_fisher=True)
            f(model, f.init(model), BATCH)


def test_losses_of_equal_models_are_equal():
    assert NLL == fsam_nnx.negative_log_likelihood(apply, categorical)
    assert NLL != fsam_nnx.negative_log_likelihood(evaluate, categorical)
    assert hash(NLL) == hash(fsam_nnx.negative_log_likelihood(apply, categorical))


def plain_loss():
    return fsam_optax.negative_log_likelihood(lambda p, x: x @ p, categorical)


BALL = fsam_optax.euclidean_ball(0.1)
MISTAKES = {
    "plain loss": (
        lambda: fsam_nnx.value_and_grad(plain_loss(), BALL),
        r"`loss_fn` was given a `fsam_optax.neg.*Use `fsam_optax.nnx.negative_log_like",
    ),
    "plain loss in an estimator": (
        lambda: fsam_nnx.fisher_exact(plain_loss()),
        r"`fisher_exact` of `fsam_optax.nnx` was given.*Use `fsam_optax.nnx.negative_",
    ),
    "no model": (
        lambda: fsam_nnx.value_and_grad(log_loss, BALL, empirical_fisher=True),
        r"`empirical_fisher=True` needs.*`fsam_optax.nnx.negative_log_likelihood\(",
    ),
    "module as function": (
        lambda: fsam_nnx.fisher_exact(Net(), categorical),
        r"function of the module.*`lambda model, x: model\(x\)`, got a Net",
    ),
    "has_aux": (
        lambda: fsam_nnx.value_and_grad(NLL, BALL, has_aux=True),
        r"was made with `has_aux=False`",
    ),
    "plain diagonal": (
        lambda: fsam_optax.diagonal(
            fsam_nnx.fisher_exact(apply, categorical),
            nnx.state(Net(), nnx.Param),
            BATCH,
        ),
        r"given its parameters alone: call .*`fsam_optax.nnx`",
    ),
    "plain estimator": (
        lambda: fsam_nnx.diagonal(
            fsam_optax.fisher_exact(apply, categorical), Net(), BATCH
        ),
        r"takes a Flax NNX module.*`fsam_optax.nnx.fisher_exact\(",
    ),
    "swapped": (
        lambda: fsam_nnx.fisher_exact(categorical, apply),
        r"Likelihood in the place of `apply_fn`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name):
    mistake, match = MISTAKES[name]
    with pytest.raises(TypeError, match=match):
        mistake()


@pytest.mark.parametrize(
    "call", ["value_and_grad", "init", "diagonal", "sharpness_aware"]
)
def test_module_in_the_plain_front_end_is_sent_here(call):
    model = Net(norm=True)
    f = fsam_optax.value_and_grad(log_loss, BALL)
    tx = fsam_optax.sam(optax.sgd(0.1))
    calls = {
        "value_and_grad": lambda: f(model, f.init(jnp.ones(2)), BATCH),
        "init": lambda: f.init(model),
        "diagonal": lambda: fsam_optax.diagonal(
            fsam_optax.fisher_exact(apply, categorical), model, BATCH
        ),
        "sharpness_aware": lambda: tx.update(
            model, tx.init(jnp.ones(2)), model, grad_fn=lambda m: m
        ),
    }
    match = "`params` is a Flax NNX module, Net.*use `fsam_optax.nnx"
    with pytest.raises(TypeError, match=match):
        calls[call]()


def test_module_of_parameters_alone_is_a_tree():
    model = Net()
    f = fsam_optax.value_and_grad(log_loss, BALL)
    _, grads, _ = nnx.jit(f)(model, f.init(model), BATCH)
    assert isinstance(grads, Net)
