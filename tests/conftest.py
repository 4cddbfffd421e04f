"""Settings under which every test runs, and the modes: `pytest --mode x64`."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import sys


# Before jax starts: eight CPU devices for the tests of sharding, and less time for
# compiling, which is most of a test's. LLVM does not optimize, while XLA does, and what
# was compiled once is kept for later runs.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A module of LLVM for each kernel takes three times as long. Only in the versions on
# which this was tried: a flag that XLA does not know ends the process.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and (
    importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10."))
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Nor is a matrix product left to a library, which takes longer to be set up for it than
# these small ones take. Sums are, as for users: it takes less memory for them.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and (
    importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12."))
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_experimental_ynn_fusion_type=reduce"
# Each once, also in the processes of xdist, which inherit them: what was compiled is
# found again by the flags.
os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(os.environ["XLA_FLAGS"].split()))
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"),
)
# Programs are not told where in the sources they come from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import oracles
import pytest
from jax.interpreters import mlir


# All programs are written in one context of MLIR: one for each, as for users, takes a
# fifth of the time and most of the memory. Where a version of jax has no such function,
# or looks it up elsewhere, each program has its own.
make = getattr(mlir, "make_ir_context", None)
if make and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    make.__globals__[make.__name__] = functools.cache(make)


# Tracing makes many objects and hardly any garbage in cycles: a sixth of the time went
# into looking for it. Never again among what has survived.
gc.set_threshold(100_000, 10, 10_000)


MODES = {
    "checking_leaks": "jax_check_tracer_leaks",
    "debug_nans": "jax_debug_nans",
    "x64": "jax_enable_x64",
}

# What cannot hold in a mode: parts of the names of tests, and why.
NAN = "a NaN is passed in on purpose, which this mode reports as an error"
CANNOT_HOLD = {
    "checking_leaks": {},
    "debug_nans": {
        "test_a_run_can_be_interrupted_and_resumed": "the base optimizer has no "
        "sharpness, which the comparison stores as a NaN",
    }
    | dict.fromkeys(
        (
            "test_100_donated_steps_are_one_trace",
            "test_no_more_passes_and_memory_than_by_hand",
        ),
        "jax donates nothing in this mode, to run again what made a NaN",
    )
    | dict.fromkeys(
        (
            "test_zero_gradients_do_not_make_nan[first]",
            "test_zero_gradients_do_not_make_nan[both]",
        ),
        "Optax's own SAM makes a NaN of a zero gradient, which the test shows",
    )
    | dict.fromkeys(
        (
            "test_a_gradient_that_is_not_finite_displaces_nothing",
            "test_a_leaf_that_the_ball_masks_is_kept_out_of_memory_too[",
            "test_a_nan_in_one_of_several_balls_stops_all",
            "test_after_a_first_gradient_that_is_not_finite_nothing_moves",
            "test_an_ascent_that_is_cut_short_counts_one_step",
            "test_an_end_of_the_extrapolation_does_not_see_the_other_gradient[nan]",
            "test_an_impossible_label_",
            "test_apply_if_finite_around_it_leaves_everything_as_it_was",
            "test_bayesian_sam_skips_what_is_not_finite",
            "test_by_rho_of_what_is_left_out[nan]",
            "test_fault_03_",
            "test_fault_04_",
            "test_fault_19_masked_leaves[",
            "test_fault_26_all_shards_take_the_same_decision[nan]",
            "test_fault_26_nan_on_one_replica",
            "test_nan_in_the_second_gradient_is_caught",
            "test_norms_are_the_same_on_an_accelerator[nan]",
            "test_norms_are_the_same_on_an_accelerator[inf]",
            "test_a_skipped_micro_batch_does_not_count[first-nan]",
            "test_a_skipped_micro_batch_does_not_count[second-nan]",
            "test_lagged_keeps_what_is_not_finite_out_of_its_memory",
            "test_no_cosine_is_told_of_a_vector_that_is_too_long",
            "test_weight_0_hides_outputs_that_are_not_finite_in_the_value",
            "test_what_a_device_without_weight_made_may_be_nan",
            "test_what_is_not_finite[",
            "test_statistics_of_the_batch_are_warned_of[",
            "test_what_is_not_finite_is_not_reused[nan]",
        ),
        NAN,
    )
    | dict.fromkeys(
        ("_likelihood.negative_log_likelihood", "nnx.negative_log_likelihood"),
        "the NaN of an impossible label is made for all labels, and taken for none",
    ),
    "x64": dict.fromkeys(
        (
            "test_fault_31_no_retrace_for_numpy_and_python_inputs",
            "test_fault_31_numpy_and_python_inputs[",
            "test_half_precision_is_squared_in_float32[",
            "test_loops_count_as_often_as_they_run[",
            "test_narrow_outputs_are_computed_with_in_float32[",
            "test_random_parametrisations[10]",
            "test_random_parametrisations[12]",
            "test_squares_have_the_precision_asked_for[1-F32_F32_F32-True]",
            "test_squares_have_the_precision_asked_for[5-F32_F32_F32-True]",
        ),
        "Python floats and `jnp.ones` are float64 in this mode, float32 in the test",
    )
    | dict.fromkeys(
        ("_fisher.dataset.dataset_diagonal", "_step.bsam.bsam"),
        "the example prints a number of float32",
    )
    | dict.fromkeys(
        (
            "nnx.dataset_diagonal",
            "nnx.diagonal",
            "nnx.value_and_grad",
            "_nnx.example_gradients.",
            "test_statistics_are_weighted_as_the_parts_of_the_batch_are[",
        ),
        "a variable of Flax is of float32 and what the example writes to it is not",
    )
    | {
        "test_micro_batches_are_devices_without_synchronisation": "two programs agree "
        "to the last bit only as they are compiled in float32",
    },
}


def pytest_addoption(parser):
    parser.addoption("--mode", choices=sorted(MODES), help="run all tests in this mode")


def pytest_configure(config):
    # Here and not in pyproject.toml, which the tests of the wheel do not see.
    config.addinivalue_line("filterwarnings", "error")
    # What one process still writes another reads as damaged, and compiles it itself.
    for what in ("reading", "writing"):
        message = f"Error {what} persistent compilation cache entry"
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")
    # Hypothesis counts references to its own generator, which Python 3.14 borrows.
    message = "It looks like `register_random` was passed an object"
    config.addinivalue_line("filterwarnings", f"ignore:{message}")
    config.addinivalue_line(
        "markers", "slow: trains, draws, kills or spawns; run by `make test-slow`"
    )
    config.addinivalue_line(
        "markers", "long: guards little beyond others for what it costs; slow too"
    )
    config.addinivalue_line(
        "markers",
        "short(*cases): of a test with many cases, one for each path; the others are "
        "long. A name stands for all cases that begin with it and a hyphen",
    )
    if mode := config.getoption("--mode"):
        jax.config.update(MODES[mode], True)


def leave_cases(items):
    """Marks as long what no case of its marker `short` names.

    Returns the names that are those of no case.
    """
    named, found = set(), set()
    for item in items:
        if marker := item.get_closest_marker("short"):
            test, case = item.nodeid.partition("[")[0], item.callspec.id
            matching = {c for c in marker.args if f"{case}-".startswith(f"{c}-")}
            named |= {(test, c) for c in marker.args}
            found |= {(test, c) for c in matching}
            if not matching:
                item.add_marker("long")
    return sorted(named - found)


def pytest_collection_modifyitems(config, items):
    unknown = leave_cases(items)
    if unknown and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"These cases, named as short, are none: {unknown}.")
    reasons = CANNOT_HOLD.get(config.getoption("--mode"), {})
    pages = pathlib.Path(__file__).parents[1] / "docs"
    for item in items:
        if pages in item.path.parents:  # They train, as the programs of pages do.
            item.add_marker("slow")
        if item.get_closest_marker("long"):
            item.add_marker("slow")
        for name, reason in reasons.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """What was imported stays, and is not looked through for garbage."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Ends a process of xdist at once, when it has reported all: it runs for no one.

    To take thousands of programs and traces down, one by one, takes seconds.
    """
    if hasattr(config, "workerinput"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@pytest.fixture(autouse=True, scope="module")
def no_rank_promotion():
    """The library's own arithmetic never lines up shapes by chance.

    A fixture, so that the doctests beside these tests run as a user would run them.
    """
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def old_objects_stay(request):
    """Leaks are looked for after each trace, but not in what was there before."""
    if request.config.getoption("--mode") == "checking_leaks":
        gc.freeze()


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Loops over examples that take several at a time, as they do not on a CPU."""
    from fsam_optax._engine.sums import Steps

    rows = Steps.rows
    monkeypatch.setattr(
        Steps, "rows", lambda *args: {"default": rows(*args)["default"]}
    )


@pytest.fixture
def x64():
    """Computes in float64 during one test."""
    with oracles.x64():
        yield
