"""Programs of all kinds that models are: exact, by a rule, at a counted price.

Each is compared with gradients of single examples formed in full: powers 1, 2 and 4,
and the norms of examples. None may fall back, and all costs that are told are counted.
"""

import warnings

import engine_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn
from jax.experimental import sparse
from jax.experimental.ode import odeint

from fsam_optax._engine import example_squares, explain_loss, loss_power_sums
from fsam_optax._engine.power_sums import sums_and_outputs
from fsam_optax._engine.work import total


pytestmark = pytest.mark.long
RNG = np.random.default_rng(1)
B, T, D, H = 6, 16, 32, 4
POWERS = 1, 2, 4


@pytest.fixture(autouse=True)
def rank_promotion(no_rank_promotion):
    """The programs are written as their authors write them."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape):
    """Returns what keeps the size of what it is multiplied with."""
    scale = shape[0] if len(shape) > 1 else 4
    return jax.device_put(np.float32(RNG.normal(size=shape) / np.sqrt(scale)))


def tokens(vocabulary, *shape):
    return jax.device_put(RNG.integers(0, vocabulary, shape))


def size(y):
    return jnp.sum(jnp.tanh(y) ** 2)


VECTORS, SEQUENCES = 2 * normal(B, D), 2 * normal(B, T, D)
IMAGES = 2 * normal(B, 8, 8, 8)
PROGRAMS = {}


def program(batch, bound=1.3, **params):
    """Adds the loss of one example, with a bound on its cost in gradients."""

    def add(loss_fn):
        PROGRAMS[loss_fn.__name__] = loss_fn, params, batch, bound
        return loss_fn

    return add


def weight(name, leaves, make, bound=1.3, batch=None):
    """Adds a dense layer whose weight is made from some leaves of `LEAVES`."""
    params, batch = (
        {k: LEAVES[k] for k in leaves},
        SEQUENCES if batch is None else batch,
    )
    PROGRAMS[name] = lambda p, x: size(x @ make(p)), params, batch, bound


def heads(x):
    return x.reshape(len(x), H, -1)


def attend(q, k, v, bias=0.0):
    scores = jnp.einsum("qhd,khd->hqk", heads(q), heads(k)) / 3 + bias
    y = jnp.einsum("hqk,khd->qhd", nn.softmax(scores), heads(v))
    return y.reshape(len(q), -1)


def convolved(x, w, stride=1, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x[None], w, (stride,) * 2, "SAME", dimension_numbers=dims, **options
    )[0]


# Recurrences and state spaces.


@program(
    SEQUENCES, A=normal(D, 4), b=normal(D, 4), c=normal(D, 4), t=normal(D), g=normal(D)
)
def selective_state_space(p, x):
    dt = nn.softplus(x * p["t"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["A"]))
    u = (dt * x)[..., None] * (x @ p["b"])[:, None]
    _, h = lax.associative_scan(
        lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1]),
        (decay, u),
    )
    return size(jnp.einsum("tdn,tn->td", h, x @ p["c"]) + p["g"] * x)


@program(SEQUENCES, q=normal(D, 8), k=normal(D, 8), v=normal(D, 8), b=normal(D))
def delta_rule(p, x):
    def step(memory, now):
        q, k, v, b = now
        memory = memory - b * jnp.outer(k, k @ memory - v)
        return memory, q @ memory

    beta, k = nn.sigmoid(x @ p["b"]), nn.standardize(x @ p["k"]) / 4
    return size(lax.scan(step, jnp.zeros((8, 8)), (x @ p["q"], k, x @ p["v"], beta))[1])


@program(SEQUENCES, w=normal(D, 4 * D), r=normal(D, 4 * D), b=normal(4 * D))
def exponential_gates(p, x):
    def step(state, u):
        h, c, n, m = state
        i, f, z, o = jnp.split(u @ p["w"] + h @ p["r"] + p["b"], 4)
        f = nn.log_sigmoid(f)
        top = jnp.maximum(f + m, i)
        i, f = jnp.exp(i - top), jnp.exp(f + m - top)
        c, n = f * c + i * jnp.tanh(z), f * n + i
        h = nn.sigmoid(o) * c / jnp.maximum(n, 1e-6)
        return (h, c, n, top), h

    return size(lax.scan(step, (jnp.zeros(D),) * 4, x)[1])


# Attention.


@program(SEQUENCES, qkv=normal(D, 3 * D), t=normal(8, H), o=normal(D, D))
def buckets_of_distance(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    far = np.abs(np.arange(T)[:, None] - np.arange(T)[None])
    bias = p["t"][np.minimum(far, 7)].transpose(2, 0, 1)
    return size(attend(q, k, v, bias) @ p["o"])


@program(SEQUENCES, q=normal(D, D), kv=normal(D, 2 * D // H), s=normal(H))
def rotary_with_shared_keys_and_slopes(p, x):
    angle = np.arange(T)[:, None] / 100 ** (np.arange(D // H // 2) / 4)
    c, s = (jnp.float32(f(angle))[:, None] for f in (np.cos, np.sin))

    def rotated(a):
        left, right = jnp.split(a, 2, -1)
        return jnp.concatenate([left * c - right * s, right * c + left * s], -1)

    k, v = (jnp.tile(a, H) for a in jnp.split(x @ p["kv"], 2, -1))
    far = np.arange(T)[None] - np.arange(T)[:, None]
    bias = jnp.where(far > 0, -1e9, far * nn.softplus(p["s"])[:, None, None])
    q, k = (rotated(heads(a)).reshape(T, D) for a in (x @ p["q"], k))
    return size(attend(q, k, v, bias))


@program(SEQUENCES, r=normal(2 * T, D // H), w=normal(D, D), u=normal(H, D // H))
def relative_shift(p, x):
    q = heads(x @ p["w"])
    far = jnp.einsum("qhd,rd->hqr", q + p["u"], p["r"])
    far = far.reshape(H, 2 * T, T)[:, 1:].reshape(H, T, 2 * T - 1)[:, :, :T]
    return size(attend(x, x, q.reshape(T, D), far))


# Graphs, sets, lookups.

EDGES = tokens(T, B, 40), tokens(T, B, 40)


@program((SEQUENCES, *EDGES), w=normal(D, D), a=normal(2 * D), v=normal(D, D))
def graph_attention(p, batch):
    x, i, j = batch
    h = x @ p["w"]
    s = nn.leaky_relu(jnp.concatenate([h[i], h[j]], 1) @ p["a"])
    s = jnp.exp(s - jax.ops.segment_max(s, j, T)[j])
    s = s / jax.ops.segment_sum(s, j, T)[j]
    return size(jax.ops.segment_sum(s[:, None] * h[i], j, T) @ p["v"])


@program(2 * normal(B, T, 2), t=normal(3, 64, 2), w=normal(6, D))
def hashed_grids(p, x):
    found = []
    for level in range(3):
        at = nn.sigmoid(x) * 4 * 2**level
        i = jnp.floor(at).astype(jnp.uint32)
        left, y = at - i, 0.0
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = (i[:, 0] + a) ^ ((i[:, 1] + b) * jnp.uint32(2654435761))
            share = jnp.abs(1 - a - left[:, 0]) * jnp.abs(1 - b - left[:, 1])
            y = y + share[:, None] * p["t"][level, place % 64]
        found.append(y)
    return size(jnp.concatenate(found, -1) @ p["w"])


@program(SEQUENCES, g=normal(D, 4), w=normal(4, D, D), v=normal(4, D, D))
def experts_of_the_top_two(p, x):
    top, i = lax.top_k(x @ p["g"], 2)
    share = jnp.sum(nn.one_hot(i, 4) * nn.softmax(top)[..., None], 1)
    h = nn.gelu(jnp.einsum("td,edf->tef", x, p["w"]))
    return size(jnp.einsum("tef,efd,te->td", h, p["v"], share))


# Images.


@program(
    IMAGES, e=normal(1, 1, 8, D), d=normal(3, 3, 1, D), s=normal(D, D), g=normal(D)
)
def squeeze_and_excite(p, x):
    y = nn.silu(convolved(x, p["e"]) * p["g"])
    y = nn.silu(convolved(y, p["d"], 2, feature_group_count=D))
    return size(y * nn.sigmoid(y.mean((0, 1)) @ p["s"]))


@program(IMAGES, o=normal(3, 3, 8, 18) / 9, k=normal(9, 8, 8))
def deformable(p, x):
    shift = convolved(x, p["o"]).reshape(8, 8, 9, 2)
    place = np.stack(np.indices((8, 8)), -1)[:, :, None]
    place = place + np.stack(np.indices((3, 3)), -1).reshape(9, 2) - 1 + shift
    taken = jax.vmap(
        lambda c: jax.scipy.ndimage.map_coordinates(
            c, [place[..., 0], place[..., 1]], 1, mode="nearest"
        ),
        -1,
        -1,
    )(x)
    return size(jnp.einsum("hwkc,kcd->hwd", taken, p["k"]))


@program(IMAGES, w=normal(3, 3, 8, 8) / 3, g=normal(8))
def standardised_kernel(p, x):
    w = nn.standardize(p["w"], axis=(0, 1, 2)) * p["g"]
    return size(convolved(x, w / 8))


@program(SEQUENCES, w=normal(D, 2 * D), s=normal(3, D))
def values_and_gates_in_turn(p, x):
    """Parts of a weight that lie between each other."""
    x = sum(p["s"].reshape(-1)[k::3] * jnp.tanh(k * x) for k in range(3))
    return size((x @ p["w"][:, ::2]) * nn.sigmoid(x @ p["w"][:, 1::2]))


# Structure, probability, implicit layers.


@program((SEQUENCES, tokens(6, B, T)), t=normal(6, 6), e=normal(D, 6), s=normal(6))
def random_field(p, batch):
    x, y = batch
    u = x @ p["e"]

    def step(a, u):
        return nn.logsumexp(a[:, None] + p["t"] + u, 0), None

    path = p["s"][y[0]] + jnp.sum(p["t"][y[:-1], y[1:]])
    path += jnp.sum(u[jnp.arange(T), y])
    return nn.logsumexp(lax.scan(step, p["s"] + u[0], u[1:])[0]) - path


@program((2 * normal(B, T, 3), normal(B, T)), 1.4, w=normal(3, 3), s=normal())
def gaussian_process(p, batch):
    x, y = batch
    z = x @ p["w"]
    k = jnp.exp(-jnp.sum((z[:, None] - z[None]) ** 2, -1))
    factor = jnp.linalg.cholesky(k + (0.1 + jnp.exp(p["s"])) * jnp.eye(T))
    fit = y @ jax.scipy.linalg.cho_solve((factor, True), y)
    return fit / 2 + jnp.sum(jnp.log(jnp.diag(factor)))


@jax.custom_vjp
def fixed_point(w, x):
    """Returns z = tanh(z w + x), whose derivative is implicit."""

    def step(state):
        return jnp.tanh(state[0] @ w + x), state[1] + 1

    return lax.while_loop(lambda s: s[1] < 9, step, (jnp.zeros_like(x), 0))[0]


def _fixed_point_bwd(saved, g):
    _, pull = jax.vjp(lambda w, x, z: jnp.tanh(z @ w + x), *saved)
    step = lambda s: (g + pull(s[0])[2], s[1] + 1)  # noqa: E731
    return pull(lax.while_loop(lambda s: s[1] < 9, step, (g, 0))[0])[:2]


fixed_point.defvjp(
    lambda w, x: (z := fixed_point(w, x), (w, x, z)),
    _fixed_point_bwd,
)


@program(VECTORS, w=normal(D, D) / 4)
def equilibrium(p, x):
    return size(fixed_point(p["w"], x))


@program(VECTORS, w=normal(D, D), b=normal(D), v=normal(D, D))
def differential_equation(p, x):
    def step(y, t):
        return y + jnp.tanh(y @ p["w"] + t * p["b"]) @ p["v"] / 8, None

    return size(lax.scan(step, x, jnp.arange(5.0, dtype=x.dtype) / 5)[0])


# Derivatives inside, rematerialisation, discontinuities.


@program(VECTORS, w=normal(D, D), v=normal(D))
def gradient_penalty(p, x):
    f = lambda x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    return f(x) ** 2 + jnp.sum(jax.grad(f)(x) ** 2)


@program(SEQUENCES, w=normal(3, D, D), b=normal(3, D))
def policies_of_checkpoints(p, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(
        lambda h, q: (jnp.tanh(h @ q["w"] + q["b"]), None), policy=policy
    )
    return size(lax.scan(layer, x, p)[0])


@program(SEQUENCES, w=normal(D, D), s=normal(D, 4))
def straight_through(p, x):
    soft = nn.softmax(x @ p["s"])
    hard = nn.one_hot(jnp.argmax(soft, -1), 4) + soft - lax.stop_gradient(soft)
    return size((x @ p["w"]) * hard[:, :1])


def cut_into_intervals(x, knots):
    """Returns linear splines."""
    return nn.relu(1 - jnp.abs(x[..., None] - knots) * 2)


@program(VECTORS, c=normal(D, 8, 9), b=normal(D, 8), v=normal(8, 5, 9))
def splines_on_edges(p, x):
    knots = jnp.linspace(-2, 2, 9)
    y = jnp.einsum("ik,ijk->j", cut_into_intervals(x, knots), p["c"]) + x @ p["b"]
    return size(jnp.einsum("ik,ijk->j", cut_into_intervals(y, knots), p["v"]))


# Complex numbers.


@program(SEQUENCES, re=normal(5, D, D), im=normal(5, D, D), w=normal(D, D))
def fourier_operator(p, x):
    y = jnp.einsum("kc,kcd->kd", jnp.fft.rfft(x, axis=0)[:5], p["re"] + 1j * p["im"])
    y = jnp.pad(y, ((0, T // 2 - 4), (0, 0)))
    return size(jnp.fft.irfft(y, T, axis=0) + x @ p["w"])


@program(SEQUENCES, r=normal(8), a=normal(8), b=normal(8, D, 2), c=normal(D, 8, 2))
def complex_state_space(p, x):
    decay = jnp.exp(-jnp.exp(p["r"]) + 1j * p["a"])
    b, c = (lax.complex(w[..., 0], w[..., 1]) for w in (p["b"], p["c"]))

    def step(h, u):
        h = decay * h + b @ u
        return h, h

    h = lax.scan(step, jnp.zeros(8, complex), x.astype(complex))[1]
    return size((h @ c.T).real)


@program(2 * normal(B, 8, 8), a=normal(8, 8), b=normal(8, 8))
def phase_plates(p, x):
    u = jnp.fft.ifft2(jnp.fft.fft2(x * jnp.exp(1j * p["a"])) * jnp.exp(1j * p["b"]))
    return size(jnp.abs(u) ** 2)


# Weights made from parameters.

FIXED = normal(D, D)
LEAVES = {"a": normal(D, 2), "b": normal(2, D), "c": normal(D), "d": normal(D)}
LEAVES |= {"w": normal(D, D), "v": normal(D, D), "k": normal(5, 4, 4), "s": normal()}
LEAVES |= {"e": normal(D, 2), "f": normal(2, D), "l": normal(3, D, D)}


def quantised(w, step):
    return step * (w / step + lax.stop_gradient(jnp.round(w / step) - w / step))


def low_rank(p):
    return jnp.diag(p["c"]) + p["w"] + p["a"] @ p["b"]


weight("vera", "cd", lambda p: FIXED + (p["c"][:, None] * FIXED * p["d"]) @ FIXED, 1.8)
weight("kronecker", "k", lambda p: jnp.kron(p["k"][0], p["k"][1:].reshape(8, 8)))
weight("quantised", "ws", lambda p: quantised(p["w"], jnp.exp(p["s"])))
weight("gains", "wc", lambda p: p["w"] * jnp.exp(p["c"]))
weight("centred", "w", lambda p: p["w"] - p["w"].mean(0), 1.15)
weight("standardised", "wc", lambda p: nn.standardize(p["w"], axis=0) * p["c"])
weight(
    "lower_with_positive_diagonal",
    "w",
    lambda p: jnp.tril(p["w"], -1) + jnp.diag(nn.softplus(jnp.diag(p["w"]))),
)
weight("rotation", "c", lambda p: jnp.eye(D) - jnp.outer(p["c"], p["c"]))
weight("of_probabilities", "w", lambda p: nn.softmax(p["w"], -1))
weight("of_large_ones", "w", lambda p: p["w"] * (jnp.abs(p["w"]) > 0.1), 1.15)
weight("low_rank", "abcw", low_rank)
weight("centred_1", "w", lambda p: p["w"] - p["w"].mean(0), 1.1, VECTORS)
weight("low_rank_1", "abcw", low_rank, 1.5, VECTORS)
weight(
    "flow_1",
    "wvc",
    lambda p: jnp.tril(p["w"], -1) @ (jnp.triu(p["v"], 1) + jnp.diag(p["c"])),
    1.4,
    VECTORS,
)


weight("skew_1", "w", lambda p: p["w"] - p["w"].T, 1.85, VECTORS)


def weight_norm(p, v):
    return p["c"] * v / jnp.linalg.norm(v, axis=0)


def low_rank_hadamard(p):
    return FIXED + (p["a"] @ p["b"]) * (p["e"] @ p["f"])


def low_rank_of_norm_one(p):
    return weight_norm(p, FIXED + p["a"] @ p["b"])


weight("loha", "abef", low_rank_hadamard, 1.5)
weight("loha_1", "abef", low_rank_hadamard, 1.5, VECTORS)
weight("dora", "abc", low_rank_of_norm_one, 1.5)
weight("dora_1", "abc", low_rank_of_norm_one, 3.0, VECTORS)
weight("weight_norm_1", "cw", lambda p: weight_norm(p, p["w"]), 1.7, VECTORS)


def layers(h, ws):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws)[0]


@program(SEQUENCES, l=LEAVES["l"])
def layers_run_through_twice(p, x):
    return size(layers(layers(x, p["l"]), p["l"][::-1]))


@program(VECTORS, 1.4, l=LEAVES["l"])
def layers_run_through_twice_1(p, x):
    return size(layers(layers(x, p["l"]), p["l"]))


@program(VECTORS, 1.75, l=LEAVES["l"])
def layers_that_decay_1(p, x):
    return size(layers(x, p["l"])) + jnp.sum(p["l"] ** 2) / 10


# Where the gradient of the batch sums over the examples within a loop.


@program(SEQUENCES[..., :4], 8.0, A=normal(6, 6) / 2, C=normal(4, 6), q=normal(6))
def kalman_filter(p, y):
    """The covariance is that of all examples, but not what leads back to it."""

    def step(state, y):
        m, P = state
        m, P = p["A"] @ m, p["A"] @ P @ p["A"].T + jnp.diag(jnp.exp(p["q"]))
        S = p["C"] @ P @ p["C"].T + jnp.eye(4)
        e, K = y - p["C"] @ m, jnp.linalg.solve(S, p["C"] @ P).T
        cost = e @ jnp.linalg.solve(S, e) + jnp.linalg.slogdet(S)[1]
        return (m + K @ e, P - K @ p["C"] @ P), cost

    return jnp.sum(lax.scan(step, (jnp.zeros(6), jnp.eye(6)), y)[1])


@program(SEQUENCES, 1.8, w=normal(D, D))
def weights_that_are_exchanged(p, x):
    """Two weights that decay into each other are no sum of products by step."""

    def step(carry, x):
        h, w, v = carry
        h = jnp.tanh(jnp.tanh(h @ w + x) @ v)
        return (h, 0.9 * w, 0.8 * v - 0.1 * w), None

    return size(lax.scan(step, (x[0], p["w"], p["w"].T), x)[0][0])


# Where gradients come out of what is solved, or of no rule's primitive.


@program(SEQUENCES[:, 0, :8], 1.05, w=normal(8, 16), v=normal(16, 8))
def adaptive_differential_equation(p, x):
    """Going back it carries the gradient of each example, as the batch does."""

    def slope(y, t, p):
        return jnp.tanh(y @ p["w"]) @ p["v"]

    return size(odeint(slope, x, np.float32([0, 0.5, 1]), p))


@program(SEQUENCES[:, 0, :8], 1.3, w=0.3 * normal(8, 8), u=normal(8, 8))
def implicit_layer(p, x):
    def solve(f, z):
        return lax.fori_loop(0, 20, lambda i, z: z - f(z), z)

    def solve_tangent(f, y):
        return jnp.linalg.solve(jax.jacobian(f)(y), y)

    def f(z):
        return z - jnp.tanh(z @ p["w"] + x @ p["u"])

    return size(lax.custom_root(f, jnp.zeros(8), solve, solve_tangent))


@program(SEQUENCES[:, 0, :8], 5.5, a=0.3 * normal(8, 8))
def matrix_exponential(p, x):
    """What leads back to the matrix is a map of whole matrices, one an example."""
    return size(x @ jax.scipy.linalg.expm(p["a"]))


PLACES = np.stack(np.divmod(RNG.permutation(D * D)[:60], D), -1)


@program(VECTORS, 1.1, w=normal(60))
def sparse_matrix(p, x):
    return size(x @ sparse.BCOO((p["w"], PLACES), shape=(D, D)).todense())


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    loss_fn, params, batch, bound = PROGRAMS[name]

    @jax.jit
    def found(params, batch):
        sums = loss_power_sums(loss_fn, params, batch, powers=POWERS)
        return sums, example_squares(loss_fn, params, batch)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The gradients of single examples")
        sums, squares = found(params, batch)
    gradients = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch)
    gradients = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients)
    expected = tuple(
        jax.tree.map(lambda g, p=p: np.sum(g**p, 0), gradients) for p in POWERS
    )
    oracles.assert_close(sums, expected, tolerance=2e-5)
    norms = jax.tree.map(lambda g: np.sum(g.reshape(B, -1) ** 2, 1), gradients)
    oracles.assert_close(squares, norms, tolerance=2e-5)

    explanation = explain_loss(loss_fn, params, batch)
    assert explanation.cost <= bound, f"\n{explanation}"
    assert not [x for x in explanation if "fallback" in x.rule], f"\n{explanation}"
    assert_told(loss_fn, params, batch, explanation.cost)


def assert_told(loss_fn, params, batch, cost, within=1.1):
    """Checks the costs of all leaves against what one pass has beyond a gradient."""
    used = []
    jax.eval_shape(
        lambda *args: sums_and_outputs(
            loss_fn, *args, None, (2,), None, None, report=used
        )[0],
        params,
        (batch, None),
    )
    mean = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))
    gradient = total(jax.make_jaxpr(mean)(params).jaxpr.eqns)
    work, own = (
        B * sum(getattr(x, k) for rules in used for x in rules) for k in ("work", "own")
    )
    told = (gradient - own + work) / gradient
    assert cost <= within * told + 0.02
    assert told <= within * max(cost, 1.0) + 0.02


@pytest.mark.parametrize(
    "name", ["kalman_filter", "weights_that_are_exchanged", "implicit_layer"]
)
def test_what_is_told_of_one_leaf_is_what_it_takes(name):
    """The others are constants then, of which no squares are asked for.

    But for what is the same for all examples, which loops of several kinds repeat.
    """
    loss_fn, params, batch, _ = PROGRAMS[name]
    for k, x in params.items():

        def of_one(q, example, k=k):
            return loss_fn({**params, **q}, example)

        alone = {k: x}
        cost = explain_loss(of_one, alone, batch).cost
        assert_told(of_one, alone, batch, cost, within=1.2)
