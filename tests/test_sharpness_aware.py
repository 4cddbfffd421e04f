"""The wrapper that is an ordinary Optax transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_perturbation import arguments

import fsam_optax
from fsam_optax import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
    given,
    sharpness_aware,
    squared_gradient,
)


RNG = np.random.default_rng(0)
SHAPES = {"k": (3, 2), "b": (2,)}


def arrays(dtype):
    rng = np.random.default_rng(0)
    params = {n: jax.device_put(dtype(rng.normal(size=s))) for n, s in SHAPES.items()}
    batches = [
        (
            jax.device_put(dtype(rng.normal(size=(8, 3)))),
            jax.device_put(rng.integers(0, 2, 8)),
        )
        for _ in range(3)
    ]
    return params, batches


def loss(params, batch):
    x, y = batch
    logits = jnp.tanh(x @ params["k"] + params["b"][None])
    losses = optax.softmax_cross_entropy_with_integer_labels(3 * logits, y)
    return jnp.mean(losses)


gradient = jax.jit(jax.grad(loss))

PARAMS, BATCHES = arrays(np.float32)
BATCH = BATCHES[0]
GRADS = gradient(PARAMS, BATCH)


def grad_fn(params):
    return gradient(params, BATCH)


def step(tx, state=None, params=PARAMS, grads=GRADS, grad_fn=grad_fn, **extra):
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, grad_fn=grad_fn, **extra)


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_close(tree, expected, rtol):
    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)

    jax.tree.map(close, tree, expected)


# Against training by hand


RATE = optax.linear_schedule(0.3, 0.1, 7)
RADIUS = optax.linear_schedule(0.1, 0.4, 7)


def np_schedule(start, end):
    return lambda t: start + (end - start) * min(t, 7) / 7


NP_RATE, NP_RADIUS = np_schedule(0.3, 0.1), np_schedule(0.1, 0.4)

BASES = {
    "sgd": (optax.sgd(RATE), oracles.sgd(NP_RATE)),
    "nesterov": (
        optax.sgd(RATE, momentum=0.9, nesterov=True),
        oracles.nesterov(NP_RATE, 0.9),
    ),
    "adam": (optax.adam(RATE), oracles.adam(NP_RATE)),
    "adamw": (
        optax.adamw(RATE, weight_decay=0.1),
        oracles.adam(NP_RATE, weight_decay=0.1),
    ),
}

METHODS = {
    "sam": (lambda rho: euclidean_ball(rho), lambda w, g: oracles.no_scale(w), 2),
    "sam_inf": (
        lambda rho: euclidean_ball(rho, ord=np.inf),
        lambda w, g: oracles.no_scale(w),
        np.inf,
    ),
    "asam": (
        lambda rho: adaptive_ellipsoid(rho, eta=0.1),
        lambda w, g: oracles.asam_scale(w, 0.1),
        2,
    ),
    "fisher_sam": (
        lambda rho: fisher_ellipsoid(rho, squared_gradient(), eta=2.0),
        lambda w, g: oracles.fisher_scale({n: x**2 for n, x in g.items()}, eta=2.0),
        2,
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_trains_as_by_hand(x64, base, method):
    params, batches = arrays(np.float64)
    batches = [batches[i % 3] for i in range(9)]
    (ours, by_hand), (make, scale_of, ord) = BASES[base], METHODS[method]
    tx = sharpness_aware(ours, make(RADIUS))
    expected = oracles.two_pass(
        params, gradient, batches, NP_RADIUS, scale_of, by_hand, ord
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(
            gradient(params, batch),
            state,
            params,
            grad_fn=lambda p: gradient(p, batch),
        )
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    assert params["k"].dtype == np.float64
    # Schedules of optax round to float32.
    assert_close(params, expected, rtol=1e-6)


@pytest.mark.short("asam", "fisher_sam")
@pytest.mark.parametrize("method", METHODS)
def test_trains_as_by_hand_to_the_last_digits(x64, method):
    params, batches = arrays(np.float64)
    make, scale_of, ord = METHODS[method]
    expected = oracles.two_pass(
        params,
        gradient,
        batches,
        lambda t: 0.3,
        scale_of,
        oracles.nesterov(lambda t: 0.2, 0.9),
        ord,
    )
    tx = sharpness_aware(optax.sgd(0.2, momentum=0.9, nesterov=True), make(0.3))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(
            gradient(params, batch),
            state,
            params,
            grad_fn=lambda p: gradient(p, batch),
        )
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    assert_close(params, expected, rtol=1e-13)


PERTURBATIONS = {
    "euclidean": euclidean_ball,
    "inf": lambda rho: euclidean_ball(rho, ord=np.inf),
    "element": adaptive_ellipsoid,
    "filter": lambda rho: adaptive_ellipsoid(rho, scope="filter"),
    "layer": lambda rho: adaptive_ellipsoid(rho, scope="layer"),
    "fisher": lambda rho: fisher_ellipsoid(rho, squared_gradient()),
}


@pytest.mark.short("inf-True")
@pytest.mark.parametrize(
    ("geometry", "jit"),
    [("euclidean", False), ("layer", False), ("inf", True), ("fisher", True)],
)
def test_rho_0_is_the_base_optimizer_bit_for_bit(geometry, jit):
    base = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(0.1, weight_decay=0.1)
    )
    tx = sharpness_aware(base, PERTURBATIONS[geometry](0.0))

    def train(params, batches):
        results = []
        for wrapped in (True, False):
            opt, p = (tx if wrapped else base), params
            state = opt.init(p)
            for batch in batches:

                def grad_fn(p, batch=batch):
                    return jax.grad(loss)(p, batch)

                extra = {"grad_fn": grad_fn} if wrapped else {}
                updates, state = opt.update(grad_fn(p), state, p, **extra)
                p = optax.apply_updates(p, updates)
            results.append((p, state.base if wrapped else state))
        return results

    train = jax.jit(train) if jit else train
    (params, base_state), (expected, expected_state) = train(PARAMS, BATCHES[:2])
    assert not np.array_equal(params["k"], PARAMS["k"])
    assert_equal(params, expected)
    assert_equal(base_state, expected_state)


@pytest.mark.parametrize(
    ("alias", "wired"),
    [
        (
            lambda b: fsam_optax.sam(b),
            lambda b: sharpness_aware(b, euclidean_ball(0.05)),
        ),
        (
            lambda b: fsam_optax.sam(b, 0.2),
            lambda b: sharpness_aware(b, euclidean_ball(0.2)),
        ),
        (
            lambda b: fsam_optax.asam(b),
            lambda b: sharpness_aware(b, adaptive_ellipsoid(0.5, eta=0.01)),
        ),
        (
            lambda b: fsam_optax.asam(b, 0.2, 0.3),
            lambda b: sharpness_aware(b, adaptive_ellipsoid(0.2, eta=0.3)),
        ),
        (
            lambda b: fsam_optax.fisher_sam(b),
            lambda b: sharpness_aware(b, fisher_ellipsoid(0.1, squared_gradient())),
        ),
        (
            lambda b: fsam_optax.fisher_sam(b, 0.2, estimator=given(), eta=3.0),
            lambda b: sharpness_aware(b, fisher_ellipsoid(0.2, given(), eta=3.0)),
        ),
    ],
    ids=["sam", "sam_rho", "asam", "asam_rho_eta", "fisher_sam", "fisher_sam_given"],
)
def test_aliases_are_wiring(alias, wired):
    base = optax.sgd(0.1, momentum=0.9)
    fisher = jax.tree.map(jnp.abs, PARAMS)
    assert_equal(step(alias(base), fisher=fisher), step(wired(base), fisher=fisher))


# What a step does


def test_gradient_is_asked_for_once_at_the_perturbed_parameters():
    points = []

    def spy(params):
        points.append(params)
        return grad_fn(params)

    before = {n: np.array(w) for n, w in PARAMS.items()}
    updates, _ = step(sharpness_aware(optax.sgd(1.0), euclidean_ball(0.5)), grad_fn=spy)
    eps, _ = oracles.perturbation(0.5, GRADS, oracles.no_scale(PARAMS))
    [point] = points
    assert_close(point, {n: before[n] + eps[n] for n in SHAPES}, rtol=1e-6)
    assert_equal(updates, {n: -g for n, g in grad_fn(point).items()})
    assert_equal(PARAMS, before)


def test_metrics():
    def second(params):
        return {"k": jnp.full((3, 2), 2.0), "b": jnp.full(2, -1.0)}

    first = {"k": jnp.full((3, 2), 3.0), "b": jnp.full(2, 4.0)}
    tx = sharpness_aware(optax.sgd(1.0), adaptive_ellipsoid(0.5))
    state = tx.init(PARAMS)
    assert all(x == 0 and x.dtype == "float32" for x in jax.tree.leaves(state.metrics))
    _, state = step(tx, state, grads=first, grad_fn=second)
    g, h = (oracles.flat(tree) for tree in (first, second(None)))
    eps, dual_norm = oracles.perturbation(0.5, first, oracles.asam_scale(PARAMS, 0.01))
    expected = {
        "grad_norm": np.linalg.norm(g),
        "perturbed_grad_norm": np.linalg.norm(h),
        "perturbation_norm": np.linalg.norm(oracles.flat(eps)),
        "gradient_cosine": g @ h / np.linalg.norm(g) / np.linalg.norm(h),
        "rho": 0.5,
        "dual_norm": dual_norm,
        "skipped": 0,
    }
    for name, value in expected.items():
        metric = optax.tree.get(state, name)
        assert metric.shape == ()
        assert metric.dtype == (jnp.int32 if name == "skipped" else jnp.float32)
        np.testing.assert_allclose(metric, value, rtol=1e-6)
    leaves = optax.tree.get(state, "leaf_perturbation_norms")
    assert_close(leaves, {n: np.linalg.norm(e) for n, e in eps.items()}, rtol=1e-6)


def test_metrics_show_what_is_perturbed_though_the_base_freezes_it():
    labels = {"k": "frozen", "b": "trained"}
    base = optax.partition(
        {"trained": optax.sgd(1.0), "frozen": optax.set_to_zero()}, labels
    )
    for mask, where in ((None, "k"), ({"k": False, "b": True}, "b")):
        tx = sharpness_aware(base, euclidean_ball(0.5, mask=mask))
        _, state = step(tx, tx.init(PARAMS))
        norms = optax.tree.get(state, "leaf_perturbation_norms")
        assert max(norms, key=norms.get) == where
    assert norms["k"] == 0
    assert_close(norms["b"], 0.5, rtol=1e-6)


@pytest.mark.short("3-True")
@pytest.mark.parametrize(("every", "jit"), [(2, False), (3, True)])
def test_every_kth_step_is_perturbed_from_the_first_on(every, jit):
    calls = []

    def radius(count):
        return 0.1 * (count + 1)

    def counted(params):
        jax.debug.callback(lambda: calls.append(None), ordered=True)
        return jax.tree.map(lambda w: 4 * w**3, params)

    tx = sharpness_aware(optax.sgd(1.0), euclidean_ball(radius), every=every)
    plain = jax.tree.map(lambda w: 4 * w**3, PARAMS)

    def one_step(state):
        return tx.update(plain, state, PARAMS, grad_fn=counted)

    one_step = jax.jit(one_step) if jit else one_step
    state = tx.init(PARAMS)
    for i in range(5):
        updates, new_state = one_step(state)
        jax.effects_barrier()
        count = i // every + 1  # Perturbed steps so far.
        assert len(calls) == count
        assert new_state.step == i + 1
        assert new_state.perturbation.count == count
        np.testing.assert_allclose(new_state.perturbation.rho, 0.1 * count, rtol=1e-6)
        if i % every == 0:
            eps, _ = oracles.perturbation(0.1 * count, plain, oracles.no_scale(PARAMS))
            point = {n: np.asarray(PARAMS[n]) + eps[n] for n in SHAPES}
            assert_close(updates, {n: -4 * p**3 for n, p in point.items()}, 1e-5)
        else:
            assert_equal(updates, jax.tree.map(jnp.negative, plain))
            assert_equal(new_state.metrics, state.metrics)
            assert_equal(new_state.perturbation, state.perturbation)
        state = new_state


def test_weight_decay_is_at_the_unperturbed_parameters_and_not_in_the_perturbation():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    base = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    tx = sharpness_aware(base, euclidean_ball(10.0))
    updates, _ = step(tx, grad_fn=lambda p: zero)
    assert_equal(updates, {n: -0.5 * w for n, w in PARAMS.items()})


def test_clipping_belongs_into_the_base():
    def huge(params):
        return jax.tree.map(lambda w: 1e3 * jnp.ones_like(w), params)

    clip = optax.clip_by_global_norm(1.0)
    inside = sharpness_aware(optax.chain(clip, optax.sgd(1.0)), euclidean_ball(0.1))
    updates, _ = step(inside, grads=huge(PARAMS), grad_fn=huge)
    np.testing.assert_allclose(np.linalg.norm(oracles.flat(updates)), 1.0, rtol=1e-6)
    # After it, clipping acts on the update; before it, on nothing but eps.
    after = optax.chain(sharpness_aware(optax.sgd(1.0), euclidean_ball(0.1)), clip)
    assert_close(step(after, grads=huge(PARAMS), grad_fn=huge)[0], updates, 1e-6)


def test_extra_arguments_reach_perturbation_and_base():
    seen = {}

    def recorder(name):
        def update(updates, state, params=None, **extra):
            seen[name] = extra
            return updates, state

        return optax.GradientTransformationExtraArgs(
            lambda _: optax.EmptyState(), update
        )

    tx = sharpness_aware(recorder("base"), recorder("perturbation"))
    step(tx, value=1.0, batch="batch")
    assert callable(seen["perturbation"].pop("displaced"))
    assert seen["base"] == {"value": 1.0, "batch": "batch"}
    assert seen["perturbation"] == {
        "value": 1.0,
        "batch": "batch",
        "grad_fn": grad_fn,
    }


@pytest.mark.short("base0")
@pytest.mark.parametrize("base", [optax.polyak_sgd(), optax.lbfgs()])
def test_bases_that_need_extra_arguments(base):
    tx = sharpness_aware(base, euclidean_ball(0.05))
    updates, _ = step(
        tx,
        value=loss(PARAMS, BATCH),
        grad=GRADS,
        value_fn=lambda p: loss(p, BATCH),
    )
    assert loss(optax.apply_updates(PARAMS, updates), BATCH) < loss(PARAMS, BATCH)


def test_perturb_dtype_shows_the_loss_what_the_parameters_cannot_hold():
    params = jax.tree.map(lambda w: jnp.ones_like(w, jnp.bfloat16), PARAMS)
    grads = jax.tree.map(jnp.ones_like, params)
    points = []

    def spy(p):
        points.append(p)
        return p

    for dtype in (None, jnp.float32):
        tx = sharpness_aware(optax.sgd(1.0), euclidean_ball(0.001), perturb_dtype=dtype)
        updates, _ = step(tx, params=params, grads=grads, grad_fn=spy)
        assert updates["k"].dtype == jnp.bfloat16
    rounded, exact = points
    assert_equal(rounded, params)
    np.testing.assert_allclose(exact["k"], 1 + 0.001 / np.sqrt(8), rtol=1e-7)


# Wrong use


TREES = {
    "tree": PARAMS,
    "array": PARAMS["k"],
    "pair": (PARAMS["k"], PARAMS["b"]),
    "scalar": jnp.float32(2.0),
}

WRONG = {
    "value_and_grad": (
        lambda loss: jax.value_and_grad(loss),
        r"returned \(value, grads\).*jax.grad\(loss\)",
    ),
    "has_aux": (
        lambda loss: jax.grad(lambda p: (loss(p), {"aux": 1.0}), has_aux=True),
        r"returned \(grads, aux\).*has_aux=True\)\(p, batch\)\[0\]",
    ),
    "has_aux_none": (
        lambda loss: jax.grad(lambda p: (loss(p), None), has_aux=True),
        r"returned \(grads, aux\)",
    ),
    "both": (
        lambda loss: jax.value_and_grad(lambda p: (loss(p), {"a": 1.0}), has_aux=True),
        "`grad_fn` must return the gradient|returned",
    ),
    "nothing": (lambda loss: lambda p: None, "`grad_fn` must return the gradient"),
    "loss": (lambda loss: loss, "`grad_fn` returned one number, as a loss does"),
}


@pytest.mark.parametrize(
    ("params", "wrong"),
    # The loss at a scalar has the shape of a gradient: nothing can be known.
    [(p, w) for p in TREES for w in WRONG if (p, w) != ("scalar", "loss")],
)
def test_grad_fn_that_returns_something_else_is_rejected(params, wrong):
    def quartic(p):
        return sum(jnp.sum(w**4) for w in jax.tree.leaves(p))

    params, (make, match) = TREES[params], WRONG[wrong]
    tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1))
    with pytest.raises(TypeError, match=match):
        step(tx, params=params, grads=jax.grad(quartic)(params), grad_fn=make(quartic))


@pytest.mark.parametrize("missing", [None, GRADS], ids=["none", "grads"])
def test_missing_grad_fn_is_rejected(missing):
    tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1))
    with pytest.raises(TypeError, match=r"grad_fn=lambda p: jax.grad\(loss\)"):
        step(tx, grad_fn=missing)
    with pytest.raises(TypeError, match="needs the gradient as a function"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_wrong_use_is_found_while_tracing():
    tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1))
    with pytest.raises(TypeError, match=r"returned \(value, grads\)"):
        jax.eval_shape(
            lambda p: step(
                tx, params=p, grad_fn=jax.value_and_grad(lambda q: loss(q, BATCH))
            ),
            PARAMS,
        )


@pytest.mark.parametrize(
    ("grads", "match"),
    [
        ({"k": GRADS["k"]}, r"leaf \['b'\] is in `params` and not in `grads`"),
        ({**GRADS, "z": GRADS["b"]}, r"leaf \['z'\] is in `grads` and not in `params`"),
        (
            {**GRADS, "b": jnp.ones(1)},
            r"leaf \['b'\] is of shape \(1,\) in `grads` and of shape \(2,\)",
        ),
        ({**GRADS, "k": jnp.ones(2)}, r"leaf \['k'\] is of shape \(2,\)"),
        ({**GRADS, "b": 1.0}, r"leaf \['b'\] is of shape \(\)"),
        ({**GRADS, "b": None}, r"leaf \['b'\]"),
        ({**GRADS, "k": GRADS["k"].T}, r"leaf \['k'\] is of shape \(2, 3\)"),
        (list(GRADS.values()), "structure of `params`"),
    ],
    ids=["less", "more", "1", "broadcastable", "scalar", "none", "transposed", "list"],
)
def test_gradients_that_do_not_fit_are_rejected(grads, match):
    tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1))
    with pytest.raises(ValueError, match=match):
        step(tx, grads=grads)
    with pytest.raises(ValueError, match=match):
        euclidean_ball(0.1).update(grads, euclidean_ball(0.1).init(PARAMS), PARAMS)
    # From the second pass it is `grad_fn` that is wrong.
    with pytest.raises(TypeError, match="`grad_fn` must return the gradient"):
        step(tx, grad_fn=lambda p: grads)


def test_containers_must_agree():
    params, grads = (GRADS["k"], GRADS["b"]), [GRADS["k"], GRADS["b"]]
    tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1))
    with pytest.raises(ValueError, match="its containers differ"):
        step(tx, params=params, grads=grads)


def test_missing_params_are_rejected():
    for tx in (
        sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1)),
        adaptive_ellipsoid(0.1),
    ):
        with pytest.raises(ValueError, match="needs the current value of the parame"):
            tx.update(GRADS, tx.init(PARAMS), grad_fn=grad_fn)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"k": True, "b": False}),
        lambda tx: optax.partition(
            {"sam": tx, "sgd": optax.sgd(0.1)}, {"k": "sam", "b": "sgd"}
        ),
    ],
    ids=["masked", "partition"],
)
def test_masking_from_outside_is_rejected(wrap):
    tx = wrap(sharpness_aware(optax.sgd(0.1), euclidean_ball(0.1)))
    with pytest.raises(ValueError, match=r"MaskedNode at \['b'\].*pass `mask=`"):
        step(tx)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"base": 0.1}, TypeError, r"`base` must be .* such as optax.sgd\(0.1\)"),
        (
            {"perturbation": 0.05},
            TypeError,
            r"`perturbation` must be .* euclidean_ball",
        ),
        ({"perturbation": euclidean_ball}, TypeError, "`perturbation` must be"),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1"),
        ({"every": -1}, ValueError, "`every` must be"),
        ({"every": 1.5}, ValueError, "`every` must be"),
        ({"every": float("nan")}, ValueError, "`every` must be"),
    ],
    ids=arguments,
)
def test_bad_arguments_are_rejected(kwargs, error, match):
    kwargs = {"base": optax.sgd(0.1), "perturbation": euclidean_ball(0.1), **kwargs}
    with pytest.raises(error, match=match):
        sharpness_aware(**kwargs)


def test_multi_steps_as_base_is_explained():
    with pytest.raises(TypeError, match="gradient_transformation"):
        sharpness_aware(optax.MultiSteps(optax.sgd(0.1), 2), euclidean_ball(0.1))
