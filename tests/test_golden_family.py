"""The family: end points recorded from the authors' code, and from NumPy by hand.

Where a method is no name of this library's, it is written as a user would write it.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.projections
import pytest

import fsam_optax
from fsam_optax import (
    adaptive_ellipsoid,
    averaged,
    bsam,
    displaced,
    euclidean_ball,
    eval_params,
    extrapolate,
    multi_step,
    perturbation,
    sharpness_aware,
    surrogate_gap,
)


SHARED = os.environ.get(
    "FSAM_SHARED", pathlib.Path(__file__).parents[2] / "shared" / "data"
)
OFFICIAL = pathlib.Path(SHARED) / "golden_family.npz"
LAYERS = ("l1", "l2", "l3")
STEPS = 8
RATE = 0.1


@functools.cache
def data():
    if not OFFICIAL.exists():
        pytest.skip("the trajectories of the authors' code are not beside the project")
    return dict(np.load(OFFICIAL))


def tree(prefix):
    """The layers, in the layout of PyTorch: weight is out x in."""
    return {
        layer: {n: data()[f"{prefix}.{layer}.{n}"] for n in ("weight", "bias")}
        for layer in LAYERS
    }


def loss(params, batch):
    x, y = batch
    for layer in LAYERS[:-1]:
        x = jnp.tanh(x @ params[layer]["weight"].T + params[layer]["bias"][None])
    logits = x @ params["l3"]["weight"].T + params["l3"]["bias"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def sgd(rate=RATE, decay=5e-4):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


def train(tx, steps=STEPS, loss=loss, **per_step):
    """Trains on the four batches in turn; `per_step` holds an extra argument a step."""

    def step(carry, given):
        params, state = carry
        batch, extra = given
        grad_fn = jax.grad(lambda p: loss(p, batch))
        grads = grad_fn(params)
        extra = {"grad_fn": grad_fn, "clean": grads, **extra}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    turns = np.arange(steps) % 4
    given = (data()["X"][turns], data()["Y"][turns]), per_step
    params = jax.tree.map(jnp.asarray, tree("init"))
    run = jax.jit(lambda start, given: jax.lax.scan(step, start, given)[0])
    return run((params, tx.init(params)), jax.tree.map(jnp.asarray, given))


def assert_close(params, name, atol=1e-10):
    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)

    jax.tree.map(close, params, tree(name))


def schedule(name, which):
    values = jnp.asarray(data()[f"aux.{name}.{which}"])
    return lambda count: values[count]


def stateless(rule):
    """A transformation of gradient, parameters and extra arguments."""

    def update(updates, state, params=None, **extra):
        return rule(updates, params, **extra), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def tree_map(f):
    return lambda *trees: jax.tree.map(f, *trees)


# SAM by its own name, to start with: the harness itself is right.


def test_the_harness(x64):
    asam = np.load(OFFICIAL.with_name("golden_asam.npz")) if data() else None
    params, _ = train(sharpness_aware(sgd(), euclidean_ball(0.05)))
    for layer in LAYERS:
        expected = asam[f"samsung_sam_rho0.05.{layer}.weight"]
        np.testing.assert_allclose(params[layer]["weight"], expected, atol=1e-10)


# Descents.


def test_gsam(x64):
    for name in ("gsam_bv_rho0.3_alpha0.6", "gsam_torch_rho0.3_alpha0.6"):
        params, _ = train(fsam_optax.gsam(sgd(), 0.3, 0.6))
        assert_close(params, name)


@pytest.mark.short("gsam_torch_rhomax0.6_rhomin0.1_alpha0.4_coslr")
@pytest.mark.parametrize(
    "name",
    [
        "gsam_bv_rhomax0.6_rhomin0.1_alpha0.4_lrdecay",
        "gsam_torch_rhomax0.6_rhomin0.1_alpha0.4_coslr",
    ],
)
def test_gsam_with_a_radius_that_follows_the_learning_rate(x64, name):
    rate, rho = schedule(name, "lr"), schedule(name, "rho")
    params, _ = train(fsam_optax.gsam(sgd(rate), rho, 0.4))
    assert_close(params, name)


def test_gsam_that_minimises_the_clean_loss(x64):
    descent = surrogate_gap(0.6, minimize_clean=True)
    params, _ = train(sharpness_aware(sgd(), euclidean_ball(0.3), descent=descent))
    assert_close(params, "gsam_bv_minf_rho0.3_alpha0.6")


@pytest.mark.long
def test_gsam_in_the_ellipsoid_of_big_vision(x64):
    """Which is none: one factor |w|, and the norm of the gradient without it."""
    times_w = stateless(
        lambda eps, w, **_: tree_map(lambda e, w: jnp.abs(w) * e)(eps, w)
    )
    ascent = optax.chain(euclidean_ball(1.0), times_w)
    params, _ = train(sharpness_aware(sgd(), ascent, descent=surrogate_gap(0.6)))
    assert_close(params, "gsam_bv_adaptive_rho1.0_alpha0.6")


@pytest.mark.long
def test_gsam_in_the_ellipsoid_of_asam(x64):
    ascent = adaptive_ellipsoid(1.0, eta=0.0, normalize=True)
    params, _ = train(sharpness_aware(sgd(), ascent, descent=surrogate_gap(0.4)))
    assert_close(params, "gsam_torch_adaptive_rho1.0_alpha0.4")


def test_wsam(x64):
    params, _ = train(fsam_optax.wsam(sgd(), 0.1, 0.8))
    assert_close(params, "wsam_coupled_rho0.1_gamma0.8")


def decoupled(base, rate, alpha):
    """Lets `base` step with the clean gradient, and adds the sharpness apart."""
    base = optax.with_extra_args_support(base)

    def update(h, state, params, *, clean, **extra):
        updates, state = base.update(clean, state, params, **extra)
        add = tree_map(lambda u, g, h: u - rate * alpha * (h - g))
        return add(updates, clean, h), state

    return optax.GradientTransformationExtraArgs(base.init, update)


def test_decoupled_wsam(x64):
    base = decoupled(sgd(), RATE, 0.8 / (1 - 0.8))
    params, _ = train(sharpness_aware(base, euclidean_ball(0.1)))
    assert_close(params, "wsam_decoupled_rho0.1_gamma0.8")


@pytest.mark.long
def test_gradient_norm_penalty(x64):
    ascent, descent = euclidean_ball(0.1), extrapolate(0.8)
    params, _ = train(sharpness_aware(sgd(), ascent, descent=descent))
    assert_close(params, "pgn_r0.1_alpha0.8")

    def regularised(params, batch):
        squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return loss(params, batch) + 0.5 * 0.01 * squares

    tx = sharpness_aware(sgd(decay=0.0), ascent, descent=descent)
    params, _ = train(tx, loss=regularised)
    assert_close(params, "pgn_r0.1_alpha0.8_l2loss0.01")


def test_gradient_norm_penalty_as_its_code_has_it(x64):
    """The clean gradient enters normalised."""

    def mix(h, params, *, clean_grads, **extra):
        length = optax.tree.norm(clean_grads)
        return tree_map(lambda h, g: 0.2 * g / length + 0.8 * h)(h, clean_grads)

    descent = stateless(mix)
    params, _ = train(sharpness_aware(sgd(), euclidean_ball(0.1), descent=descent))
    assert_close(params, "pgn_norm_r0.1_alpha0.8")


def test_looksam(x64):
    params, _ = train(fsam_optax.looksam(sgd(), 0.1, 0.7, 5), steps=12)
    assert_close(params, "looksam_rho0.1_alpha0.7_k5_steps12")


@pytest.mark.long
def test_cr_sam(x64):
    """A descent that asks for a gradient of its own, on the other side of w."""

    def curve(h, params, *, clean_grads, eps, grad_fn, **extra):
        below = grad_fn(tree_map(jnp.subtract)(params, eps))
        rule = tree_map(lambda a, b, g: a + 0.3 * (a + b - 2 * g) + 0.1 * (a - b))
        return rule(h, below, clean_grads)

    descent = stateless(curve)
    params, _ = train(sharpness_aware(sgd(), euclidean_ball(0.2), descent=descent))
    assert_close(params, "crsam_rho0.2_gamma0.3_beta0.1")


# Memory in front of the ball.


def test_friendly_sam(x64):
    params, _ = train(fsam_optax.friendly_sam(sgd(), 0.2, 1.0, 0.6))
    assert_close(params, "friendlysam_rho0.2_sigma1.0_lmbda0.6")


def added_to_the_norm(epsilon):
    """The authors' `norm + epsilon`, where it is large enough to be seen."""
    return lambda dual_norm, count: dual_norm / (dual_norm + epsilon)


def test_vasso(x64):
    ball = euclidean_ball(0.2, length=added_to_the_norm(1e-7))
    params, _ = train(sharpness_aware(sgd(), optax.chain(averaged(1 - 0.4), ball)))
    assert_close(params, "vasso_rho0.2_theta0.4")


# One gradient a step.


def test_momentum_sam(x64):
    """With the decay at w + eps, where the authors' code has it: in front."""
    tx = optax.chain(
        optax.add_decayed_weights(5e-4),
        fsam_optax.msam(optax.sgd(RATE, momentum=0.9), 0.3, 0.9),
    )
    params, state = train(tx)
    assert_close(eval_params(state, params), "msam_sgd_rho0.3")


def test_momentum_sam_decays_at_w(x64):
    ascent = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.trace(0.9),
        optax.scale(-1.0),
        euclidean_ball(0.3),
    )
    params, state = train(displaced(sgd(), ascent))
    distances = jax.tree.map(
        lambda x, y: np.max(np.abs(x - y)),
        eval_params(state, params),
        tree("msam_sgd_rho0.3"),
    )
    assert 1e-5 < max(jax.tree.leaves(distances)) < 4e-4


def test_momentum_sam_in_adamw(x64):
    """The authors decay after the step of Adam, and so a little of the step too."""

    def decay(updates, params, **extra):
        return tree_map(lambda u, w: u - 0.01 * 0.01 * (w + u))(updates, params)

    base = optax.chain(optax.adam(0.01), stateless(decay))
    params, state = train(fsam_optax.msam(base, 0.3, 0.9))
    name = "msam_adamw_rho0.3_lr0.01_b0.9_0.999_wd0.01"
    assert_close(eval_params(state, params), name)
    adamw = fsam_optax.msam(optax.adamw(0.01, weight_decay=0.01), 0.3, 0.9)
    params, state = train(adamw)
    assert_close(eval_params(state, params), name, atol=2e-5)


# Geometries and masks.


@pytest.mark.short("samon_no_l2_rho0.3", "asamon_elementwise_only_l2_rho1.0_eta0.01")
@pytest.mark.parametrize(
    ("name", "ascent"),
    [
        ("samon_only_l2_rho0.5", lambda only, but: euclidean_ball(0.5, mask=only)),
        ("samon_no_l2_rho0.3", lambda only, but: euclidean_ball(0.3, mask=but)),
        (
            "asamon_elementwise_only_l2_rho1.0_eta0.01",
            lambda only, but: adaptive_ellipsoid(
                1.0, eta=0.01, normalize=True, mask=only
            ),
        ),
        (
            "asamon_inf_elementwise_rho0.1_eta0.01",
            lambda only, but: adaptive_ellipsoid(0.1, eta=0.01, ord=np.inf),
        ),
    ],
)
def test_sam_on(x64, name, ascent):
    only = {layer: layer == "l2" for layer in LAYERS}
    but = {layer: layer != "l2" for layer in LAYERS}
    params, _ = train(sharpness_aware(sgd(), ascent(only, but)))
    assert_close(params, name)


def test_sam_on_by_layer(x64):
    """Its eta multiplies |W|; ours, like that of ASAM, is added."""

    def operator(path, w):
        is_bias = path[-1].key == "bias"
        return 1.0 if is_bias else optax.tree.norm(w) * (1 + 0.1)

    def operators(grads, params):
        return jax.tree_util.tree_map_with_path(operator, params)

    ascent = perturbation(0.3, optax.stateless(operators))
    params, _ = train(sharpness_aware(sgd(), ascent))
    assert_close(params, "asamon_layerwise_rho0.3_eta0.1")


@pytest.mark.short("unified_rho0.2_lambd1overt")
@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("unified_rho0.2_lambd0.5", lambda count: 0.5),
        ("unified_rho0.2_lambd1overt", lambda count: 1 / (1.0 + count)),
    ],
)
def test_unified_sam(x64, name, weight):
    def length(dual_norm, count):
        return (1 - weight(count)) * dual_norm + weight(count)

    params, _ = train(sharpness_aware(sgd(), euclidean_ball(0.2, length=length)))
    assert_close(params, name)


def decayed_above(decay):
    """The base steps at w + eps in the code of AWP: the decay is taken there."""

    def rule(h, params, *, eps, **extra):
        return tree_map(lambda h, w, e: h + decay * (w + e))(h, params, eps)

    return stateless(rule)


def matrices(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


def adversarial_weights(gamma):
    return adaptive_ellipsoid(
        gamma, eta=0.0, scope="layer", per_leaf=True, normalize=True, mask=matrices
    )


@pytest.mark.short("awp_gamma0.1")
@pytest.mark.parametrize(
    ("name", "ascent"),
    [
        ("awp_gamma0.1", lambda: adversarial_weights(0.1)),
        ("awp_simple_eta0.1_iter2", lambda: multi_step(2, adversarial_weights(0.05))),
    ],
)
def test_adversarial_weight_perturbation(x64, name, ascent):
    tx = sharpness_aware(sgd(decay=0.0), ascent(), descent=decayed_above(5e-4))
    params, _ = train(tx)
    assert_close(params, name)


def test_multi_step(x64):
    project = functools.partial(optax.projections.projection_l2_ball, scale=0.2)
    ascent = multi_step(3, euclidean_ball(0.1), project=project)
    params, _ = train(sharpness_aware(sgd(), ascent))
    assert_close(params, "multistep_rho0.2_step0.1_n3")


@pytest.mark.long
def test_sparse_sam_by_a_fisher_mask(x64):
    """The mask comes after the norm in the authors' code, so that eps is shorter."""
    name = "ssamf_rho0.3_sparsity0.5_freq1"
    empty = jax.tree.map(jnp.zeros_like, tree("init"))
    one, five = (tree(f"aux.{name}.mask_from_step{t}") for t in (1, 5))
    masks = [empty, *[one] * 4, *[five] * 3]
    masks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    cut = stateless(lambda eps, w, *, mask, **_: tree_map(jnp.multiply)(eps, mask))
    ball = euclidean_ball(0.3, length=added_to_the_norm(1e-7))
    params, _ = train(sharpness_aware(sgd(), optax.chain(ball, cut)), mask=masks)
    assert_close(params, name)


@pytest.mark.long
def test_z_score_filter(x64):
    """Each matrix has a radius of its own, filtered; biases share the whole norm."""

    def outliers(grads, params):
        def keep(g):
            if g.ndim < 2:
                return g
            z = jnp.abs((g - jnp.mean(g)) / (jnp.std(g, ddof=1) + 1e-12))
            return jnp.where(z > jnp.quantile(z, 0.6), g, 0)

        return jax.tree.map(keep, grads)

    of_matrices = optax.chain(
        optax.stateless(outliers), euclidean_ball(0.2, per_leaf=True, mask=matrices)
    )
    of_all = euclidean_ball(0.2)

    def init(params):
        return of_matrices.init(params), of_all.init(params)

    def update(grads, state, params=None, **extra):
        some, first = of_matrices.update(grads, state[0], params)
        all_, second = of_all.update(grads, state[1], params)
        choose = tree_map(lambda w, x, y: x if w.ndim > 1 else y)
        return choose(params, some, all_), (first, second)

    ascent = optax.GradientTransformationExtraArgs(init, update)
    params, _ = train(sharpness_aware(sgd(), ascent))
    assert_close(params, "zsharp_rho0.2_alpha0.6")


@pytest.mark.long
def test_eigen_sam(x64):
    """The eigenvector is an extra argument; before there is one, eps = rho g."""
    name = "eigensam_rho0.2_alpha0.5_freq3"
    none = jax.tree.map(jnp.zeros_like, tree("init"))
    three, six = (tree(f"aux.{name}.v_from_step{t}") for t in (3, 6))
    vectors = [*[none] * 3, *[three] * 3, *[six] * 2]
    vectors = jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)

    def towards(grads, params, *, eigenvector, **extra):
        length = optax.tree.norm(grads)
        u = tree_map(lambda g: g / length)(grads)
        cosine = optax.tree.vdot(u, eigenvector)
        bent = tree_map(lambda u, v: u + 0.5 * jnp.sign(cosine) * (v - cosine * u))
        there = optax.tree.norm(eigenvector) > 0
        eps = tree_map(lambda g, e: 0.2 * jnp.where(there, e, g))
        return eps(grads, bent(u, eigenvector))

    tx = sharpness_aware(sgd(), stateless(towards))
    params, _ = train(tx, eigenvector=vectors)
    assert_close(params, name)


@pytest.mark.long
def test_lookbehind(x64):
    """Two ascents and two steps on a batch; the second ascent goes on from the first.

    Then the weights before the batch are averaged with those after it.
    """
    ball, base = euclidean_ball(0.1), sgd()

    def inner(params, state, batch):
        fast, above, (ascent, descent) = params, params, state
        for _ in range(2):
            h = jax.grad(loss)(above, batch)
            eps, ascent = ball.update(h, ascent, above)
            above = optax.apply_updates(above, eps)
            d = jax.grad(loss)(above, batch)
            updates, descent = base.update(d, descent, fast)
            fast = optax.apply_updates(fast, updates)
        return tree_map(lambda x, w: 0.5 * (x + w))(fast, params), (ascent, descent)

    params = jax.tree.map(jnp.asarray, tree("init"))
    state = ball.init(params), base.init(params)
    step = jax.jit(inner)
    for t in range(STEPS):
        params, state = step(params, state, (data()["X"][t % 4], data()["Y"][t % 4]))
    assert_close(params, "lookbehind_sam_rho0.1_k2_alpha0.5")


# An optimizer of its own.


@pytest.mark.short("alone")
@pytest.mark.parametrize("how", ["alone", "vmap"])
def test_bayesian_sam(x64, how):
    name = "bsam_lr0.05_b0.9_0.99_wd0.0005_rho0.02_N64_s0.1_damp0.01_m1"
    tx = bsam(
        0.05,
        0.02,
        num_data=64,
        key=jax.random.PRNGKey(0),
        b2=0.99,
        damping=0.01,
        init_precision=0.1,
        axis_name="parts" if how == "vmap" else None,
    )
    if how == "vmap":
        update = tx.update

        def over_one_part(grads, state, params, *, grad_fn, **extra):
            def part(_):
                return update(grads, state, params, grad_fn=grad_fn)

            return jax.vmap(part, axis_name="parts", out_axes=None)(jnp.zeros(1))

        tx = optax.GradientTransformationExtraArgs(tx.init, over_one_part)
    params, state = train(tx)
    assert_close(params, name)
    assert_close(state.precision, f"aux.{name}.precision")


def test_every_recorded_method_is_here():
    names = {key.rsplit(".", 2)[0] for key in data() if key.count(".") > 1}
    names = {name for name in names if not name.startswith(("aux", "init"))}
    here = pathlib.Path(__file__).read_text()
    assert len(names) == 33
    assert [name for name in sorted(names) if f'"{name}"' not in here] == []
