"""Wrong inputs: an error of ours that names what is wrong, and nothing else."""

import functools
import inspect
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import fsam_optax


KEY = jax.random.key(0)
X, Y = jnp.ones((4, 2)), jnp.array([0, 1, 1, 0])
PARAMS = {"k": jnp.ones((2, 2)), "b": jnp.ones(2)}
LIBRARY = pathlib.Path(fsam_optax.__file__).parent
FUZZ = settings(derandomize=True, deadline=None, max_examples=40, database=None)


def model(params, x):
    return jnp.tanh(x @ params["k"]) + params["b"][None]


def cotangents(h, y):
    return fsam_optax.categorical.score(h, y)[None]


def example_loss(params, example):
    return jnp.sum(model(params, example[0][None]))


def batch_loss(params, batch):
    return jnp.mean(model(params, batch[0]))


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """Shows the frames of jax, which it leaves out of tracebacks otherwise."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def assert_refused(call, *names):
    """Asserts that a call raises an error of the library that has the names in it."""
    try:
        result = call()
    except (ValueError, TypeError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert pathlib.Path(raised_in).is_relative_to(LIBRARY), raised_in
        for name in filter(None, names):
            whole_word = rf"(?<!\w){re.escape(name)}(?!\w)"
            assert re.search(whole_word, str(error)), (name, str(error))
    else:
        raise AssertionError(f"{names} passed: {result}")


# What each kind of argument must not be.
NO_NUMBERS = ["text", object(), [], {}, b"x", 1j, np.nan, -np.inf, -1, np.ones(3)]
NO_FUNCTIONS = [None, "text", 1, object(), [], {}]
NO_TREES = ["text", {"k": object(), "b": 1.0}, {"k": 1j * X, "b": 1.0}]
WRONG = {
    "number": [*NO_NUMBERS, jnp.ones(3), None],
    "optional number": NO_NUMBERS,
    "positive number": [*NO_NUMBERS, 0],
    "size": [*NO_NUMBERS[:-1], 0],
    "count": [*NO_NUMBERS, jnp.ones(3), None, 0, 1.5],
    "optional count": [*NO_NUMBERS, 0, 1.5],
    "choice": [None, "text", 1, object(), [], np.ones(3)],
    "function": NO_FUNCTIONS,
    "transformation": [*NO_FUNCTIONS, lambda: 0],
    "optional transformation": [*NO_FUNCTIONS[1:], lambda: 0],
    "likelihood": [*NO_FUNCTIONS, fsam_optax.gaussian],
    "key": [None, "text", 1, 1.5, object(), [], jnp.ones(3), jax.random.split(KEY)],
    "inputs": ["text", 1.0, [], {}, {"x": X, "z": X[:2]}, {"x": object()}],
    "batch": ["text", 1, X, (), (X,), (X, Y, X), ("text", Y), ({}, Y), (1.0, Y)],
    "params": NO_TREES,
    "tree": [*NO_TREES[:2], None, {}, {"k": X, "b": 1.0}],
    "estimators": [*NO_FUNCTIONS[:5], {"a": None}, {"a": lambda: 0}],
    "dtype": ["text", 1, object(), "int32", "complex64"],
    "powers": [None, 1, "text", (), (3,), (0,), (1.5,)],
    "weights": ["text", object(), jnp.ones(3), jnp.ones((4, 1)), 1j * jnp.ones(4)],
}

LIKELIHOOD = (fsam_optax.categorical, "likelihood")
MODEL = {"model": (model, "function"), "likelihood": LIKELIHOOD}
NLL = fsam_optax.negative_log_likelihood(model, fsam_optax.categorical)
LOSS = {"nll": (NLL, "function"), "params": (PARAMS, "params")}
SAMPLED = {**MODEL, "key": (KEY, "key")}
DRAWS = {**SAMPLED, "num_samples": (1, "count")}
SGD, BALL = optax.sgd(0.1), fsam_optax.euclidean_ball(0.1)
BASE = {"base": (SGD, "transformation")}
EXACT = fsam_optax.fisher_exact(model, fsam_optax.categorical)
ESTIMATOR = {"estimator": (EXACT, "transformation")}
RHO, ETA, ORD = (0.1, "number"), (0.01, "number"), (2, "number")
STEP = {"perturbation": (BALL, "transformation"), "every": (1, "count")}
AT = {"params": (PARAMS, "params"), "inputs": (X, "inputs")}
DENSE = {**LOSS, "batch": ((X, Y), "batch")}
VARIANCE = DENSE
EXAMPLES = {
    "loss": (example_loss, "function"),
    "params": (PARAMS, "params"),
    "batch": ((X, Y), None),
}
DRAWN = {**VARIANCE, "num_draws": (3, "count"), "key": (KEY, "key")}
TREE, SIZE = (PARAMS, "tree"), (2, "size")

# For every public function: a value of each argument that is right, and its kind.
FUNCTIONS = {
    "perturbation": {
        "rho": RHO,
        "operator": (optax.identity(), "optional transformation"),
        "ord": ORD,
    },
    "euclidean_ball": {"rho": RHO, "ord": ORD},
    "adaptive_ellipsoid": {
        "rho": RHO,
        "eta": ETA,
        "scope": ("filter", "choice"),
        "ord": ORD,
    },
    "fisher_ellipsoid": {"rho": RHO, **ESTIMATOR, "eta": (1.0, "optional number")},
    "sharpness_aware": {**BASE, **STEP, "perturb_dtype": ("float32", "dtype")},
    "value_and_grad": {
        "loss_fn": (example_loss, "function"),
        **STEP,
        "micro_batches": (2, "optional count"),
        "perturb_dtype": ("float32", "dtype"),
    },
    "sam": {**BASE, "rho": RHO},
    "asam": {**BASE, "rho": RHO, "eta": ETA},
    "fisher_sam": {
        **BASE,
        "rho": RHO,
        "estimator": (EXACT, "optional transformation"),
        "eta": (1.0, "optional number"),
    },
    "given": {},
    "squared_gradient": {},
    "fisher_exact": MODEL,
    "fisher_empirical": MODEL,
    "fisher_i1": DRAWS,
    "fisher_hutchinson": DRAWS,
    "fisher_gnb": SAMPLED,
    "fisher_i2": {**DRAWS, "hessian": ("exact", "choice")},
    "by_group": {
        "labels": ({"k": "a", "b": "a"}, None),
        "estimators": ({"a": EXACT}, "estimators"),
    },
    "refresh_every": {"k": (2, "count"), **ESTIMATOR},
    "scale_by_inverse_fisher": {**ESTIMATOR, "damping": (1.0, "number")},
    "scale_by_inverse_dense": {
        "matrix_fn": (model, "function"),
        "damping": (1.0, "number"),
    },
    "gaussian": {"scale": (1.0, "positive number")},
    "negative_log_likelihood": {
        "apply_fn": (model, "function"),
        "likelihood": LIKELIHOOD,
    },
    "heads": {},
    "dataset_diagonal": {},
    "functional_gradient": DENSE,
    "diagonal": {
        **ESTIMATOR,
        "params": (PARAMS, "params"),
        "batch": ((X, Y), "batch"),
    },
    "dense_fisher": DENSE,
    "dense_ggn": DENSE,
    "dense_empirical_fisher": DENSE,
    "fisher_bounds": VARIANCE,
    "fisher_variance_i1": VARIANCE,
    "fisher_variance_i1_bounds": VARIANCE,
    "fisher_variance_i1_sampled": DRAWN,
    "fisher_variance_i2": VARIANCE,
    "fisher_variance_i2_bounds": VARIANCE,
    "fisher_variance_i2_sampled": DRAWN,
    "fisher_variance_between_inputs": VARIANCE,
    "fisher_variance_between_inputs_bound": VARIANCE,
    "fisher_variance_trace_bounds": VARIANCE,
    "fisher_variance_joint": {
        "conditional": (PARAMS, None),
        "between_inputs": TREE,
        "num_inputs": SIZE,
        "num_samples": SIZE,
    },
    "prefer": {
        "labels": ({"k": "a", "b": "b"}, None),
        "variance_i1": (PARAMS, None),
        "variance_i2": TREE,
    },
    "power_sums": {
        "apply_fn": (model, "function"),
        **AT,
        "cotangents": (cotangents, "function"),
        "targets": (Y, None),
        "powers": ((2,), "powers"),
        "weights": (jnp.ones(4), "weights"),
    },
    "loss_power_sums": {
        "loss_fn": (example_loss, "function"),
        "params": (PARAMS, "params"),
        "batch": ((X, Y), None),
        "powers": ((2,), "powers"),
        "weights": (jnp.ones(4), "weights"),
    },
    "per_example_norms": EXAMPLES,
    "clipped_gradient": {**EXAMPLES, "max_norm": (1.0, "number")},
    "explain": {},
    "explain_loss": {
        "loss_fn": (example_loss, "function"),
        "params": (PARAMS, "params"),
        "batch": ((X, Y), None),
    },
    "sharpness": {
        "loss_fn": (batch_loss, "function"),
        "params": (PARAMS, "params"),
        "batch": ((X, Y), None),
        "perturbation": (BALL, "transformation"),
        "steps": (1, "count"),
    },
    "metrics": {},
    "kl_divergence": {},
    "kl_divergence_quadratic": {},
    "loss_along": {},
    "loss_over_plane": {},
    "random_direction": {},
    "averaged": {},
    "bsam": {},
    "displaced": {},
    "eval_params": {},
    "extrapolate": {},
    "friendly": {},
    "friendly_sam": {},
    "gsam": {},
    "looksam": {},
    "msam": {},
    "multi_step": {},
    "reuse": {},
    "surrogate_gap": {},
    "wsam": {},
    "check_separable": {"apply_fn": (model, "function"), **AT},
}


def public(name):
    module = fsam_optax if hasattr(fsam_optax, name) else fsam_optax.variance
    return getattr(module, name)


def test_every_public_function_is_listed():
    listed = {
        name
        for module in (fsam_optax, fsam_optax.variance)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and name in module.__all__
    }
    assert listed == FUNCTIONS.keys()


@pytest.mark.parametrize("name", [name for name, table in FUNCTIONS.items() if table])
def test_a_wrong_argument_is_named(name):
    function, table = public(name), FUNCTIONS[name]
    right = {argument: value for argument, (value, _) in table.items()}
    inspect.signature(function).bind(**right)
    mistakes = []
    for argument, (_, kind) in table.items():
        for wrong in WRONG.get(kind, ()):
            try:
                assert_refused(
                    functools.partial(function, **{**right, argument: wrong}), argument
                )
            except Exception as mistake:
                mistakes.append(f"{argument}={wrong!r}: {mistake!r}")
    assert not mistakes, "\n".join(mistakes)


# Trees in which one leaf is wrong.

SHAPES = st.sampled_from([(), (0,), (2,), (2, 3), (1, 2, 1)])
TREES = st.recursive(
    SHAPES.map(lambda shape: np.ones(shape, np.float32)),
    lambda trees: (
        st.lists(trees, min_size=1, max_size=2)
        | st.dictionaries(st.sampled_from("abc"), trees, min_size=1, max_size=2)
        | st.tuples(trees, trees)
    ),
    max_leaves=4,
)
NO_ARRAYS = ["text", b"x", object(), print]
NOT_ALIKE = {
    "longer": lambda x: np.ones((*x.shape[:-1], 7), np.float32),
    "broadcastable": lambda x: np.ones((1, *x.shape), np.float32),
    "two": lambda x: [x, x],
    "none": lambda x: None,
}


@st.composite
def spoiled_trees(draw):
    """Draws a tree, a copy that is wrong in one leaf, how, and the leaf's key path."""
    tree = draw(TREES)
    leaves, structure = jax.tree.flatten(tree)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    i = draw(st.integers(0, len(leaves) - 1))
    how = draw(st.sampled_from([*NOT_ALIKE, "complex", "no array"]))
    if how == "none" and not paths[i]:
        how = "two"
    if how == "complex":
        wrong = leaves[i].astype(np.complex64)
    elif how == "no array":
        wrong = draw(st.sampled_from(NO_ARRAYS))
    else:
        wrong = NOT_ALIKE[how](leaves[i])
    spoiled = structure.unflatten([*leaves[:i], wrong, *leaves[i + 1 :]])
    return tree, spoiled, how, jax.tree_util.keystr(paths[i])


PERTURBATIONS = [
    fsam_optax.euclidean_ball(0.1),
    fsam_optax.adaptive_ellipsoid(0.1, scope="layer"),
    fsam_optax.fisher_ellipsoid(0.1, fsam_optax.squared_gradient()),
]


@FUZZ
@given(spoiled_trees(), st.sampled_from(PERTURBATIONS))
def test_a_wrong_leaf_of_the_gradient_is_named(trees, tx):
    params, grads, _, path = trees
    assert_refused(lambda: tx.update(grads, tx.init(params), params), path)


@FUZZ
@given(spoiled_trees())
def test_a_wrong_leaf_of_a_given_diagonal_is_named(trees):
    params, fisher, how, path = trees
    tx = fsam_optax.fisher_ellipsoid(0.1, fsam_optax.given())
    if how in NOT_ALIKE or how == "no array":
        update = functools.partial(tx.update, params, tx.init(params), params)
        assert_refused(lambda: update(fisher=fisher), path, "fisher")


def gradient(params):
    return jax.tree.map(jnp.ones_like, params)


@FUZZ
@given(spoiled_trees(), st.sampled_from(["grads", "params", "grad_fn"]))
def test_a_wrong_leaf_in_a_step_is_named(trees, which):
    right, wrong, _, path = trees
    tx = fsam_optax.sam(optax.sgd(0.1))
    arguments = {"grads": right, "params": right, "grad_fn": right, which: wrong}
    assert_refused(
        lambda: tx.update(
            arguments["grads"],
            tx.init(right),
            arguments["params"],
            grad_fn=lambda params: arguments["grad_fn"],
        ),
        path,
        which,
    )


@FUZZ
@given(spoiled_trees())
def test_a_wrong_leaf_of_the_oracles_parameters_is_named(trees):
    right, wrong, how, path = trees
    f = fsam_optax.value_and_grad(lambda params, batch: 0.0, PERTURBATIONS[0])
    if how in ("complex", "no array"):
        assert_refused(lambda: f(wrong, f.init(right), None), path, "params")


@FUZZ
@given(
    st.sampled_from([name for name in FUNCTIONS if name.startswith("fisher_")]),
    st.sampled_from(WRONG["batch"]),
    st.sampled_from([None, jnp.ones(3), jnp.ones((4, 1)), "text", 1.0]),
)
def test_a_wrong_batch_is_named_by_every_estimator(name, batch, weights):
    table = FUNCTIONS[name]
    if "params" in table or "model" not in table:
        return
    right = {argument: value for argument, (value, _) in table.items()}
    tx = getattr(fsam_optax, name)(**right)
    update = functools.partial(tx.update, None, tx.init(PARAMS), PARAMS)
    assert_refused(lambda: update(batch=batch), "batch")
    assert_refused(lambda: update(batch=None), "batch")
    if weights is not None:
        assert_refused(
            lambda: update(batch=(X, Y), example_weights=weights), "example_weights"
        )


@pytest.mark.parametrize("name", ["every", "micro_batches"])
def test_traced_counts_are_accepted(name):
    if name == "every":
        jax.eval_shape(
            lambda k: fsam_optax.sharpness_aware(SGD, BALL, every=k) and 0, 2
        )
    fsam_optax.value_and_grad(example_loss, BALL, **{name: np.int64(2)})
