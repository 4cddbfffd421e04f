"""Trajectories that were computed elsewhere."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fsam_optax import adaptive_ellipsoid, euclidean_ball, sharpness_aware


OFFICIAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "golden_asam.npz"


def train(tx, gradient, params, batches):
    @jax.jit
    def step(params, state, batch):
        def grad_fn(p):
            return gradient(p, batch)

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return params


@pytest.mark.short("samsung_asam_rho1.0_eta0.1")
@pytest.mark.parametrize(
    ("name", "perturbation"),
    [
        ("samsung_sam_rho0.05", euclidean_ball(0.05)),
        ("samsung_asam_rho0.5_eta0.01", adaptive_ellipsoid(0.5, eta=0.01)),
        ("samsung_asam_rho1.0_eta0.1", adaptive_ellipsoid(1.0, eta=0.1)),
    ],
)
def test_official_asam_code(x64, name, perturbation):
    if not OFFICIAL.exists():
        pytest.skip("the trajectories of the official code are not beside the project")
    data = np.load(OFFICIAL)

    def weights(prefix):
        """The layers, in the layout of PyTorch: weight is out x in."""
        return {
            layer: {
                kind: data[f"{prefix}.{layer}.{kind}"] for kind in ("weight", "bias")
            }
            for layer in ("l1", "l2", "l3")
        }

    def loss(params, batch):
        x, y = batch
        for layer in ("l1", "l2"):
            x = jnp.tanh(x @ params[layer]["weight"].T + params[layer]["bias"][None])
        logits = x @ params["l3"]["weight"].T + params["l3"]["bias"][None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    base = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    params = train(
        sharpness_aware(base, perturbation),
        jax.grad(loss),
        jax.tree.map(jnp.asarray, weights("init")),
        [(data["X"][t % 4], data["Y"][t % 4]) for t in range(8)],
    )

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)

    jax.tree.map(close, params, weights(name))
    # The golden numbers do move, by far more than the tolerance.
    assert np.max(np.abs(params["l1"]["weight"] - data["init.l1.weight"])) > 1e-2


# Least squares, three steps of SGD (0.1, momentum 0.9, weight decay 0.01 at w), with
# weight (2 outputs x 2 inputs) and bias. By hand in NumPy, with
#   r = x W^T + b - y,   dW = r^T x / 4,   db = mean r     (mean over 4 examples, / 2)
#   T = |W| + eta for the weight and 1 for the bias        (1 everywhere for SAM)
X = np.array([[1.0, 0.5], [-1.0, 2.0], [0.5, -1.5], [2.0, 1.0]])
Y = np.array([[1.0, -1.0], [0.0, 2.0], [-1.0, 0.5], [0.5, 1.5]])
INIT = {"weight": [[0.5, -1.0], [2.0, 0.25]], "bias": [0.1, -0.3]}
GOLDEN = {
    "sam": {
        "weight": [
            [0.17578689178135554, 0.4429296954717561],
            [0.3222744922361499, 0.7674349838897606],
        ],
        "bias": [0.21492640426086917, -0.48774760193206756],
    },
    "asam": {
        "weight": [
            [0.22221551322920682, 0.29852001042938925],
            [0.0755478894288385, 0.7151383138918301],
        ],
        "bias": [0.19158493740518479, -0.5797143568586169],
    },
    "asam_inf": {
        "weight": [
            [0.18276933359374997, 0.34670024503124997],
            [0.3092286597499998, 0.7270083948749999],
        ],
        "bias": [0.2294012630875, -0.53814671495],
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_least_squares_by_hand(x64, name):
    perturbation = {
        "sam": euclidean_ball(0.5),
        "asam": adaptive_ellipsoid(0.5, eta=0.01),
        "asam_inf": adaptive_ellipsoid(0.2, eta=0.1, ord=np.inf),
    }[name]

    def loss(params, batch):
        x, y = batch
        r = x @ params["weight"].T + params["bias"][None] - y
        return 0.5 * jnp.mean(jnp.sum(r**2, axis=1))

    base = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))
    params = train(
        sharpness_aware(base, perturbation),
        jax.grad(loss),
        {n: jnp.asarray(w) for n, w in INIT.items()},
        [(jnp.asarray(X), jnp.asarray(Y))] * 3,
    )
    for leaf, values in GOLDEN[name].items():
        np.testing.assert_allclose(params[leaf], values, rtol=1e-12)
