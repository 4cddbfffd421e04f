"""The engine on real parameters within complex arithmetic.

The square of a complex number has other parts than the squares of its parts, so that
no power may pass through anything complex.
"""

import functools

import engine_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fsam_optax as fsam


# jax 0.7 takes real parts by a cast.
pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values to real")


@pytest.fixture(autouse=True)
def rank_promotion(no_rank_promotion):
    """The models are written as their authors write them."""
    with jax.numpy_rank_promotion("allow"):
        yield


RNG = np.random.default_rng(0)


def normal(*shape):
    return jax.device_put(np.float32(RNG.normal(size=shape)))


def s4d(p, x):
    """Diagonal state space, as a convolution by its kernel."""
    a = -jnp.exp(p["log_a"]) + 1j * p["imag_a"]
    dt = jnp.exp(p["log_dt"])[:, None]
    c = p["c_re"] + 1j * p["c_im"]
    powers = jnp.exp((a * dt)[..., None] * jnp.arange(x.shape[0]))
    kernel = 2 * jnp.einsum("hn,hnl->hl", c * (jnp.exp(a * dt) - 1) / a, powers).real
    n = 2 * x.shape[0]
    y = jnp.fft.rfft(kernel, n) * jnp.fft.rfft(x.T, n)
    return jnp.fft.irfft(y, n)[:, : x.shape[0]].T + p["d"][None] * x


S4D = {
    "log_a": normal(3, 4) / 4,
    "imag_a": normal(3, 4),
    "log_dt": normal(3) / 4 - 1,
    "c_re": normal(3, 4),
    "c_im": normal(3, 4),
    "d": normal(3),
}


def s5(p, x):
    """State space with an associative scan; complex matrices of two real leaves."""
    a = jnp.exp(-jnp.exp(p["log_a"]) + 1j * p["imag_a"])
    b, c = p["b"][..., 0] + 1j * p["b"][..., 1], p["c"][..., 0] + 1j * p["c"][..., 1]
    u = x.astype(jnp.complex64) @ b.T

    def compose(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = lax.associative_scan(compose, (jnp.broadcast_to(a[None], u.shape), u))
    return jax.nn.gelu((h @ c.T).real) + x * p["d"][None]


S5 = {
    "log_a": normal(4) / 4,
    "imag_a": normal(4),
    "b": normal(4, 3, 2),
    "c": normal(3, 4, 2),
    "d": normal(3),
}


def lru(p, x):
    """Linear recurrent unit, step by step."""
    a = jnp.exp(-jnp.exp(p["nu"]) + 1j * jnp.exp(p["theta"]))
    b = (p["b_re"] + 1j * p["b_im"]) * jnp.exp(p["gamma"])[:, None]

    def step(h, u):
        h = a * h + b @ u.astype(jnp.complex64)
        return h, ((p["c_re"] + 1j * p["c_im"]) @ h).real + p["d"] * u

    return lax.scan(step, jnp.zeros(4, jnp.complex64), x)[1]


LRU = {
    "nu": normal(4) / 4,
    "theta": normal(4) / 4,
    "gamma": normal(4) / 4,
    "b_re": normal(4, 3),
    "b_im": normal(4, 3),
    "c_re": normal(3, 4),
    "c_im": normal(3, 4),
    "d": normal(3),
}


def fno(p, x):
    """Layer of a Fourier neural operator."""
    y = jnp.fft.rfft(x, axis=0)[:3]
    y = jnp.einsum("ki,kio->ko", y, p["w"][..., 0] + 1j * p["w"][..., 1])
    return jax.nn.gelu(jnp.fft.irfft(y, x.shape[0], axis=0) + x @ p["skip"])


def fno_2d(p, x):
    x = jnp.einsum("tc,sc->tsc", x, x)
    y = jnp.fft.rfft2(x, axes=(0, 1))[:2, :2]
    y = jnp.einsum("klc,klco->klo", y, lax.complex(p["re"], p["im"]))
    return jnp.fft.irfft2(y, x.shape[:2], axes=(0, 1))[0]


def hyena(p, x):
    """A long filter, the output of a small network of the positions."""
    t = jnp.linspace(0, 1, x.shape[0])[:, None]
    filters = jnp.sin(t @ p["w0"] + p["b0"][None]) @ p["w1"] * jnp.exp(-t * p["decay"])
    q, k, v = jnp.split(x @ p["mix"], 3, axis=1)
    n = 2 * x.shape[0]
    y = jnp.fft.rfft(k * v, n, axis=0) * jnp.fft.rfft(filters, n, axis=0)
    return q * jnp.fft.irfft(y, n, axis=0)[: x.shape[0]]


def optics(p, x):
    """Phase masks between free propagations; the intensity is what is seen."""
    field = x.astype(jnp.complex64)
    for phase in p["phase"]:
        field = jnp.fft.ifft2(jnp.fft.fft2(field * jnp.exp(1j * phase)))
        field = field * jnp.exp(1j * jnp.cos(p["shared"]))
    return jnp.abs(field) ** 2 + jnp.angle(field + 3)


def quantum(p, x):
    """Rotations of one quantum bit that encode data and parameters."""
    state = jnp.array([1, 0], jnp.complex64)
    one, z = jnp.eye(2), jnp.array([[1, 0], [0, -1]])
    y = jnp.array([[0, -1j], [1j, 0]])
    for angle, u in zip(p["angles"], x, strict=True):
        for by in (angle[0] * u[0], angle[1] + u[1]):
            state = (jnp.cos(by / 2) * one - 1j * jnp.sin(by / 2) * z) @ state
            state = (jnp.cos(by) * one - 1j * jnp.sin(by) * y) @ state
    return p["scale"] * jnp.abs(state) ** 2


def complex_network(p, x):
    """Complex weights of two real leaves each, and of one with a trailing axis."""
    z = x + 1j * x[:, ::-1]
    z = z @ lax.complex(p["re"], p["im"]) + (p["b"][:, 0] + 1j * p["b"][:, 1])[None]
    z = z * jax.nn.sigmoid(jnp.abs(z) + p["bias"][None])
    z = jnp.conj(z) @ (p["re"].T + 1j * p["im"].T)
    return z.real + z.imag**2


MODELS = {
    "s4d": (s4d, S4D),
    "s5": (s5, S5),
    "lru": (lru, LRU),
    "fno": (fno, {"w": normal(3, 3, 3, 2), "skip": normal(3, 3)}),
    "fno_2d": (fno_2d, {"re": normal(2, 2, 3, 3), "im": normal(2, 2, 3, 3)}),
    "hyena": (
        hyena,
        {
            "w0": normal(1, 4),
            "b0": normal(4),
            "w1": normal(4, 3),
            "decay": normal(3),
            "mix": normal(3, 9),
        },
    ),
    "optics": (optics, {"phase": normal(2, 6, 3), "shared": normal(6, 3)}),
    "quantum": (quantum, {"angles": normal(6, 2), "scale": normal(2)}),
    "complex_network": (
        complex_network,
        {
            "re": normal(3, 3),
            "im": normal(3, 3),
            "b": normal(3, 2),
            "bias": normal(3),
        },
    ),
}
X = normal(4, 6, 3)


def check(loss_fn, params, x):
    sums = jax.jit(lambda p, x: fsam.loss_power_sums(loss_fn, p, x, powers=(1, 2, 4)))
    expected = oracles.loss_power_sums(loss_fn, params, x, powers=(1, 2, 4))
    oracles.assert_close(sums(params, x), expected)


@pytest.mark.short("hyena", "complex_network", "optics", "lru")
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, params = MODELS[name]
    check(lambda p, x: jnp.sum(jnp.tanh(model(p, x))), params, X)


def test_complex_inputs_are_accepted_and_complex_parameters_are_not():
    x = X[:, 0] * jnp.exp(1j * jnp.arange(3))[None]

    def model(w, x):
        return jnp.abs(x * w[None] + 1)

    check(lambda w, x: jnp.sum(model(w, x[None])), jnp.ones(3), x)
    exact = fsam.fisher_exact(model, fsam.gaussian())
    diagonal = jax.jit(functools.partial(fsam.diagonal, exact))(jnp.ones(3), (x, None))
    expected = np.mean(np.square((np.abs(x) ** 2 + x.real) / np.abs(x + 1)), axis=0)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-5)
    with pytest.raises(TypeError, match="two real leaves"):
        fsam.loss_power_sums(
            lambda w, x: jnp.sum(model(w, x[None])), jnp.ones(3, jnp.complex64), x
        )


def random_model(seed):
    """Returns a model that mixes real and complex arithmetic at random."""
    rng = np.random.default_rng(seed)
    params = {
        f"p{i}": jax.device_put(np.float32(rng.normal(size=(4, 4)) / 2))
        for i in range(4)
    }
    steps = [(rng.integers(9), *rng.integers(4, size=2)) for _ in range(4)]

    def step(kind, w, v, z):
        match kind:
            case 0:
                return z @ (w + 1j * v)
            case 1:
                return jnp.exp(1j * w) * z
            case 2:
                return jnp.fft.fft(z, axis=0) * w
            case 3:
                return jnp.tanh(z.real @ w) + 1j * jnp.sin(z.imag * v)
            case 4:
                return jnp.fft.irfft(jnp.fft.rfft(z.real, axis=0) * w[:3], 4, axis=0)
            case 5:
                return lax.complex(z.real * w, z.imag + v)
            case 6:
                return z + jnp.concatenate([w[:2], v[2:].astype(jnp.complex64) * 1j])
            case 7:
                return jnp.conj(z) * (w.astype(jnp.complex64) @ v) + 2j * w
            case _:
                return lax.scan(
                    lambda h, u: (h * 0.5j + u * w[0] + v[0],) * 2, z[0], z
                )[1]

    def model(params, x):
        z = x.astype(jnp.complex64)
        for kind, i, j in steps:
            z = step(kind, params[f"p{i}"], params[f"p{j}"], z).astype(jnp.complex64)
        return z.real + 0.3 * z.imag

    return model, params, jax.device_put(np.float32(rng.normal(size=(3, 4, 4))))


@pytest.mark.short("3")
@pytest.mark.parametrize("seed", range(6))
def test_random_models(seed):
    model, params, x = random_model(seed)
    check(lambda p, x: jnp.sum(jnp.sin(model(p, x))), params, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s5", "fno", 0, 1])
def test_diagonals_of_squares_are_never_negative(name):
    if isinstance(name, str):
        (model, params), x = MODELS[name], X
    else:
        model, params, x = random_model(name)

    def apply_fn(p, x):
        return jnp.stack([model(p, x)[0] for x in x])

    likelihood = fsam.gaussian()
    target = jnp.zeros((len(x), x.shape[-1]))
    key = jax.random.key(0)
    for estimator in (
        fsam.fisher_empirical(apply_fn, likelihood),
        fsam.fisher_exact(apply_fn, likelihood),
        fsam.fisher_i1(apply_fn, likelihood, key=key),
    ):
        diagonal = fsam.diagonal(estimator, params, (x, target))
        assert all(np.all(leaf >= 0) for leaf in jax.tree.leaves(diagonal))
