"""Flax NNX: every graph node in the arguments, the loss and the estimators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fsam_optax
from fsam_optax import nnx as fsam_nnx
from fsam_optax._common.keys import fold_keys
from fsam_optax._common.mapped_axes import is_key, merge, merge_stacked


BALL = fsam_optax.euclidean_ball(0.5)


class Net(nnx.Module):
    """A classifier with BatchNorm and Dropout."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm(self.hidden(x)))
        return self.out(self.dropout(x, rngs=rngs))


class Head(nnx.Module):
    """A second module, that is not trained and has statistics of its own."""

    def __init__(self, rngs):
        self.scale = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        self.seen = nnx.Intermediate(jnp.mean(x))
        return self.norm(self.scale(x))


def cross_entropy(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def loss_fn(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def loss_of_nodes(model, batch, rngs, head, metrics):
    x, y = batch
    logits = head(model(x, rngs))
    loss = cross_entropy(logits, y)
    metrics.update(loss=loss, logits=logits, labels=y)
    return loss


def make_batch(n=32):
    x = np.random.default_rng(1).normal(size=(n, 4)).astype(np.float32)
    return jax.device_put((x, np.argmax(x[:, :3], axis=1)))


def make_nodes():
    return (
        Net(nnx.Rngs(0)),
        nnx.Rngs(dropout=3),
        Head(nnx.Rngs(1)),
        nnx.MultiMetric(
            loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
        ),
    )


def contents(tree):
    """Returns the arrays of graph nodes, keys as their data."""
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x),
        nnx.to_pure_dict(nnx.state(tree)),
    )


def assert_same(a, b, rtol=0.0):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol / 10), a, b
    )


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 2])
def test_every_node_is_left_as_flax_leaves_it(every):
    batch = make_batch()
    model, rngs, head, metrics = theirs = make_nodes()
    values = []
    for _ in range(2):
        value, _ = nnx.value_and_grad(loss_of_nodes)(
            model, batch, rngs, head, metrics=metrics
        )
        values.append(value)
    model, rngs, head, metrics = ours = make_nodes()
    f = fsam_nnx.value_and_grad(loss_of_nodes, BALL, every=every)
    state = f.init(model)
    before = contents(ours)
    for value in values:
        got, _, state = f(model, state, batch, rngs, head, metrics=metrics)
        np.testing.assert_allclose(got, value, rtol=1e-6)
    assert_same(contents(ours), contents(theirs), rtol=1e-5)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(contents(ours), before)
    assert rngs.dropout.count[...] == 2


def test_gradient_is_that_at_the_perturbed_weights_with_the_same_masks():
    batch = make_batch()
    nodes = make_nodes()

    @jax.jit
    def gradient(shift):
        model, rngs, head, metrics = nnx.clone(nodes)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, e: w + e, params, shift))
        return nnx.grad(loss_of_nodes)(model, batch, rngs, head, metrics=metrics)

    g = gradient(jax.tree.map(jnp.zeros_like, nnx.state(nodes[0], nnx.Param)))
    scaled = jax.jit(lambda g: optax.tree.scale(0.5 / optax.tree.norm(g), g))
    expected = gradient(scaled(g))
    model, rngs, head, metrics = nodes
    f = fsam_nnx.value_and_grad(loss_of_nodes, BALL)
    _, grads, _ = nnx.jit(f)(model, f.init(model), batch, rngs, head, metrics=metrics)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, nnx.Param))
    assert_same(grads, expected, rtol=1e-4)


def test_shared_nodes_stay_one():
    class Twice(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

    layer = nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    model = Twice(layer)

    def loss(model, batch, other):
        assert other is model.layer
        return jnp.mean(other(batch) ** 2 * jnp.arange(4.0)[None])

    f = fsam_nnx.value_and_grad(loss, BALL)
    _, grads, _ = nnx.jit(f)(model, f.init(model), make_batch()[0], layer)
    assert optax.tree.norm(grads) > 0
    np.testing.assert_allclose(
        layer.mean[...], 0.5 * jnp.mean(make_batch()[0], 0), rtol=1e-5
    )


@pytest.mark.long
@pytest.mark.parametrize("how", ["nnx.jit", "jax.jit"])
def test_trains_under_jit(how):
    batch = make_batch()
    model, rngs, *_ = make_nodes()
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
    f = fsam_nnx.value_and_grad(
        lambda model, batch, rngs: cross_entropy(model(batch[0], rngs), batch[1]),
        fsam_optax.adaptive_ellipsoid(0.5),
    )

    def step(model, optimizer, rngs, state, batch):
        value, grads, state = f(model, state, batch, rngs)
        optimizer.update(model, grads)
        return value, state

    if how == "nnx.jit":
        run = nnx.jit(step)
    else:

        @jax.jit
        def pure(graphdef, variables, state, batch):
            nodes = nnx.merge(graphdef, variables)
            value, state = step(*nodes, state, batch)
            return value, state, nnx.state(nodes)

        def run(model, optimizer, rngs, state, batch):
            nodes = [model, optimizer, rngs]
            value, state, variables = pure(*nnx.split(nodes), state, batch)
            nnx.update(nodes, variables)
            return value, state

    state, values = f.init(model), []
    for _ in range(20):
        value, state = run(model, optimizer, rngs, state, batch)
        values.append(float(value))
    assert np.mean(values[-3:]) < 0.6 * np.mean(values[:3])
    assert state.perturbation.count == rngs.dropout.count[...] == 20
    assert state.perturbation.skipped == 0


@pytest.mark.long
def test_default_normalisation_finds_the_biases():
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    ellipsoid = fsam_optax.adaptive_ellipsoid(1.0, eta=0.0, ord=jnp.inf)
    grads = jax.tree.map(jnp.ones_like, params)
    eps, _ = ellipsoid.update(grads, ellipsoid.init(params), params)
    # T = 1 for a bias, |w| for everything else.
    (bias,), (kernel,) = (jax.tree.leaves(eps["hidden"][k]) for k in ("bias", "kernel"))
    np.testing.assert_array_equal(bias, np.ones(8))
    (weights,) = jax.tree.leaves(params["hidden"]["kernel"])
    np.testing.assert_array_equal(kernel, np.abs(weights))


@pytest.mark.long
def test_micro_batches_fold_keys_keep_counts_and_average_the_rest():
    x, y = make_batch()
    f = fsam_nnx.value_and_grad(loss_of_nodes, BALL, micro_batches=2)
    model, rngs, head, metrics = ours = make_nodes()
    key = jax.random.key_data(rngs.dropout.key[...])
    value, grads, _ = f(model, f.init(model), (x, y), rngs, head, metrics=metrics)

    alone, parts, results = fsam_nnx.value_and_grad(loss_of_nodes, BALL), [], []
    for i in range(2):
        model, rngs, head, metrics = nodes = make_nodes()
        folded = fold_keys(nnx.state(nodes), i)
        nnx.update(nodes, folded)
        part = x[i::2], y[i::2]
        results.append(
            alone(model, alone.init(model), part, rngs, head, metrics=metrics)[:2]
        )
        parts.append(contents(nodes))
    np.testing.assert_allclose(value, (results[0][0] + results[1][0]) / 2, rtol=1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, results[0][1], results[1][1])
    assert_same(grads, mean, rtol=1e-4)
    after = contents(ours)

    def merged(x, a, b):
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, (a + b) / 2, rtol=1e-5, atol=1e-6)

    jax.tree.map(merged, after, *parts)
    np.testing.assert_array_equal(after[1]["dropout"]["key"], key)
    assert after[1]["dropout"]["count"] == 1
    # Other masks in other parts.
    assert (parts[0][1]["dropout"]["key"] != parts[1][1]["dropout"]["key"]).any()
    assert optax.tree.norm(jax.tree.map(jnp.subtract, results[0][1], mean)) > 1e-3


def test_statistics_as_long_as_the_batch_are_no_batch():
    x, y = make_batch(8)  # The BatchNorm of Net has 8 features.
    f = fsam_nnx.value_and_grad(loss_fn, BALL, micro_batches=2)
    model = Net(nnx.Rngs(0))
    nnx.jit(f)(model, f.init(model), (x, y))
    with pytest.raises(ValueError, match=r"number 4 of the call.*leading size 8"):
        f(model, f.init(model), (x, y), x)


@pytest.mark.long
def test_devices_average_what_the_clean_pass_left():
    batch = make_batch()
    f = fsam_nnx.value_and_grad(loss_fn, BALL, axis_name="i")
    model = Net(nnx.Rngs(0))
    graphdef, variables = nnx.split(model)

    def of_device(batch):
        copy = nnx.merge(graphdef, variables, copy=True)
        value, grads, state = f(copy, f.init(copy), batch)
        return value, grads, state.sharpness, nnx.state(copy)

    halves = jax.tree.map(lambda a: jnp.stack([a[::2], a[1::2]]), batch)
    *got, left = jax.vmap(of_device, axis_name="i")(halves)
    cut = fsam_nnx.value_and_grad(loss_fn, BALL, micro_batches=2)
    value, grads, state = cut(model, cut.init(model), batch)
    for i in range(2):
        assert_same(
            jax.tree.map(lambda a, i=i: a[i], got),
            [value, grads, state.sharpness],
            rtol=1e-4,
        )
        assert_same(
            nnx.to_pure_dict(jax.tree.map(lambda a, i=i: a[i], left["norm"])),
            nnx.to_pure_dict(nnx.state(model)["norm"]),
            rtol=1e-5,
        )


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_means_of_narrow_statistics_count_many_labels(dtype):
    x, old = jnp.asarray([2.0, 4.0], dtype), jnp.zeros((), dtype)
    weights = jnp.asarray([100_001.0, 300_003.0])
    found = merge_stacked(x, weights, old)
    each = jax.vmap(lambda x, w: merge(x, "i", w, old), axis_name="i")(x, weights)
    assert found.dtype == each.dtype == dtype
    np.testing.assert_array_equal(np.asarray([found, *each], np.float32), 3.5)


@pytest.mark.short("one")
@pytest.mark.parametrize("parts", ["micro_batches", "devices", "one"])
def test_statistics_are_weighted_as_the_parts_of_the_batch_are(parts):
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    nll = fsam_nnx.negative_log_likelihood(lambda m, x: m(x), fsam_optax.gaussian())
    x = jnp.arange(16.0).reshape(8, 2)
    options = {"micro_batches": 2} if parts == "micro_batches" else {}
    rows = [jnp.arange(0, 8, 2), jnp.arange(1, 8, 2)]
    if parts == "devices":
        options, rows = {"axis_name": "i"}, [jnp.arange(4), jnp.arange(4, 8)]
    f = fsam_nnx.value_and_grad(nll, fsam_optax.euclidean_ball(0.1), **options)

    def mean_after(weights):
        model = Normed(nnx.Rngs(0))
        state = f.init(model)
        graph, variables = nnx.split(model)

        def step(batch):
            model = nnx.merge(graph, variables, copy=True)
            f(model, state, batch)
            return model.norm.mean[...]

        batch = x, x, weights
        if parts == "devices":
            batch = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), batch)
            return jax.jit(jax.vmap(step, axis_name="i"))(batch)[0]
        return jax.jit(step)(batch)

    none = mean_after(jnp.zeros(8))
    np.testing.assert_array_equal(none, jnp.zeros(2))
    if parts == "one":
        return
    a, b = (0.5 * x[r].mean(0) for r in rows)  # What each part leaves of a mean of 0.
    for u, v in ((1, 0), (1, 3)):
        weights = jnp.zeros(8).at[rows[0]].set(u).at[rows[1]].set(v)
        expected = (u * a + v * b) / (u + v)
        np.testing.assert_allclose(mean_after(weights), expected, rtol=1e-6)


def test_aux_comes_from_the_clean_pass_and_is_merged():
    batch = make_batch()

    def with_aux(model, batch):
        loss = loss_fn(model, batch)
        return loss, {"weight": jnp.sum(model.hidden.kernel[...]), "loss": loss}

    for options in ({}, {"micro_batches": 2, "merge_aux": lambda a: a["weight"][0]}):
        model = Net(nnx.Rngs(0))
        clean = jnp.sum(model.hidden.kernel[...])
        f = fsam_nnx.value_and_grad(with_aux, BALL, has_aux=True, **options)
        (_, aux), _, _ = nnx.jit(f)(model, f.init(model), batch)
        np.testing.assert_array_equal(aux if options else aux["weight"], clean)
    with pytest.raises(ValueError, match="`merge_aux` merges"):
        fsam_nnx.value_and_grad(
            loss_fn, BALL, micro_batches=2, merge_aux=lambda aux: aux
        )


@pytest.mark.long
def test_descent_reaches_the_step():
    batch = make_batch()
    grads = []
    for descent in (None, optax.scale(2.0)):
        model = Net(nnx.Rngs(0))
        f = fsam_nnx.value_and_grad(loss_fn, BALL, descent=descent)
        grads.append(nnx.jit(f)(model, f.init(model), batch)[1])
    assert_same(jax.tree.map(lambda x: 2 * x, grads[0]), grads[1], rtol=1e-6)


def test_lagged_writes_its_one_pass_back():
    x, y = make_batch()
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    f = fsam_nnx.value_and_grad(loss_fn, BALL, lagged=True)
    state = f.init(model)
    # Not perturbed: the first step.
    value, grads, state = nnx.jit(f)(model, state, (x, y))
    expected = nnx.jit(nnx.value_and_grad(loss_fn))(plain, (x, y))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert_same(grads, expected[1], rtol=1e-5)
    assert_same(contents(model), contents(plain), rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(state.displacement), 0.5, rtol=1e-5)


def test_wrt_selects_what_is_perturbed():
    batch = make_batch()
    model = Net(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, lambda path, _: path[0] == "out")
    f = fsam_nnx.value_and_grad(loss_fn, BALL, wrt=wrt)
    _, grads, _ = nnx.jit(f)(model, f.init(model), batch)
    assert list(grads) == ["out"]
    f = fsam_nnx.value_and_grad(loss_fn, BALL, wrt=nnx.LoRAParam)
    with pytest.raises(ValueError, match=r"selects no variable.*BatchStat.*Param"):
        f.init(model)


@pytest.mark.parametrize("kind", [dict, nnx.State])
def test_a_tree_of_arrays_is_sent_to_the_other_front_end(kind):
    params = kind({"w": jnp.ones(4)})
    f = fsam_nnx.value_and_grad(lambda p, b: jnp.mean(b @ p["w"]), BALL)
    match = "must be a Flax NNX module.*fsam_optax.value_and_grad"
    with pytest.raises(TypeError, match=match):
        f.init(params)
    state = fsam_nnx.value_and_grad(loss_fn, BALL).init(Net(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=match):
        f(params, state, make_batch()[0])


def test_wrong_calls_are_explained():
    model, batch = Net(nnx.Rngs(0)), make_batch()
    f = fsam_nnx.value_and_grad(loss_fn, BALL, has_aux=True)
    with pytest.raises(TypeError, match="has_aux"):
        nnx.jit(f)(model, f.init(model), batch)
    f = fsam_nnx.value_and_grad(loss_fn, BALL)
    with pytest.raises(TypeError, match=r"graph node in it.*further argument"):
        f(model, f.init(model), (batch, nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"f\(params, state, batch\)`"):
        f(f.init(model), model, batch)


def test_the_optimizer_of_parameters_names_itself_when_given_a_module():
    model = Net(nnx.Rngs(0))
    tx = fsam_optax.sam(optax.sgd(0.1))
    state = tx.init({"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"optax.sharpness_aware.*nnx.value_and_grad"):
        tx.update(model, state, model, grad_fn=lambda m: m)
