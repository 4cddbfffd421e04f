"""The modes of jax in which a step runs, and that `pytest --mode` is one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam


RNG = np.random.default_rng(0)
PARAMS = {
    "k": jax.device_put(np.float32(RNG.normal(size=(3, 2)))),
    "b": jnp.zeros(2, jnp.float32),
}
BATCH = (
    jax.device_put(np.float32(RNG.normal(size=(8, 3)))),
    jnp.asarray(RNG.integers(2, size=8), jnp.int32),
)


def model(params, x):
    return jnp.tanh(x @ params["k"]) + params["b"][None]


loss_fn = fsam.negative_log_likelihood(model, fsam.categorical)
SCHEDULE = optax.linear_schedule(0.1, 0.5, 10)
AVERAGE = optax.chain(
    fsam.fisher_i1(model, fsam.categorical, key=jax.random.key(0)), optax.ema(0.9)
)
PERTURBATIONS = {
    "sam": fsam.euclidean_ball(0.1),
    "asam": fsam.adaptive_ellipsoid(SCHEDULE, scope="filter"),
    "fisher": fsam.fisher_ellipsoid(SCHEDULE, fsam.refresh_every(2, AVERAGE)),
}


def by_transformation(perturbation):
    tx = fsam.sharpness_aware(optax.adam(0.1), perturbation, every=2)

    def step(params, state, batch):
        def grad_fn(p):
            return jax.grad(loss_fn)(p, batch)

        updates, state = tx.update(
            grad_fn(params), state, params, grad_fn=grad_fn, batch=batch
        )
        return optax.apply_updates(params, updates), state

    return tx.init, step


def by_oracle(perturbation):
    f = fsam.value_and_grad(loss_fn, perturbation, micro_batches=2)

    def step(params, state, batch):
        _, grads, state = f(params, state, batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), state

    return f.init, step


@pytest.mark.short("fisher-by_transformation")
@pytest.mark.parametrize("front_end", [by_transformation, by_oracle])
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_jitted_step_transfers_nothing(front_end, name):
    init, step = front_end(PERTURBATIONS[name])
    step, state, params = jax.jit(step), init(PARAMS), PARAMS
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            params, state = step(params, state, BATCH)
    jax.block_until_ready((params, state))


def test_the_transfer_guard_sees_a_transfer():
    double = jax.jit(lambda x: 2 * x)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="transfer"):
        double(np.ones(3, np.float32))


def test_the_mode_is_on(request):
    mode = request.config.getoption("--mode")
    flags = {
        "checking_leaks": jax.config.jax_check_tracer_leaks,
        "debug_nans": jax.config.jax_debug_nans,
        "x64": jax.config.jax_enable_x64,
    }
    assert [name for name, on in flags.items() if on] == [mode] * (mode is not None)
    assert jax.config.jax_numpy_rank_promotion == "raise"
