"""Benchmarks on the Fisher information: smoke runs, and the grid search itself."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def assert_pictures(folder, names):
    assert {file.name for file in folder.iterdir()} == set(names)
    for file in folder.iterdir():
        assert file.stat().st_size > 10_000


# Empirical Fisher.


def test_empirical_fisher_in_smoke_mode(script, tmp_path, capsys, monkeypatch, x64):
    module = script("empirical_fisher")
    command = ["--smoke", "--out", str(tmp_path)]
    assert module.main(command) == 0
    printed = capsys.readouterr().out
    assert "EFGD" in printed and "logistic, wrong B" in printed
    assert_pictures(
        tmp_path / "figures",
        [
            "empirical_fisher.png",
            "empirical_fisher_fields.png",
            "empirical_fisher_misspecified.png",
        ],
    )
    file = tmp_path / "results" / "empirical_fisher.json"
    results = json.loads(file.read_text())
    for record in results["optimisation"]["wine"]["methods"].values():
        # The grid and the library ran the same thing.
        np.testing.assert_allclose(record["losses"][-1], record["grid_loss"], rtol=1e-5)
        assert record["losses"][-1] < record["losses"][0]
    for case in module.CASES:
        # The Fisher of a generalised linear model is its Hessian.
        errors = results["misspecified"]["logistic"][case]["relative_error"]
        assert max(errors["100"]["hessian"]) < 1e-12

    # A second call computes nothing.
    before = file.read_text()
    for name in ("fields", "misspecified", "optimisation"):
        monkeypatch.setattr(module, f"plot_{name}", lambda *args: None)
    assert module.main(command) == 0
    assert file.read_text() == before
    with pytest.raises(SystemExit, match=r"seeds: 2 there, 20 here"):
        module.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("kind", ["linear", "logistic"])
@pytest.mark.parametrize("method", ["GD", "NGD", "EFGD"])
def test_the_grid_search_takes_the_steps_of_the_library(script, kind, method, x64):
    module = script("empirical_fisher")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 3)), random.integers(0, 2, 12).astype(float)
    problem = module.Regression(kind, x, y)
    step_size, damping, steps = 0.3, 0.2, 3
    direction = module.direction_fn(problem, method, damping)
    w = jnp.zeros(3)
    for _ in range(steps):
        w = optax.apply_updates(w, -step_size * direction(w))
    expected = module.mean_loss(problem)(w)
    # Beside it, a run that diverges.
    found = module.final_losses(
        problem, method, np.array([step_size, 1e9]), np.full(2, damping), steps
    )
    np.testing.assert_allclose(found, [expected, np.inf], rtol=1e-10)


def test_runs_that_cannot_win_are_cut_short_and_no_others(script):
    module = script("empirical_fisher")
    random = np.random.default_rng(1)
    x, y = random.normal(size=(40, 3)), random.integers(0, 2, 40).astype(float)
    step_sizes = np.logspace(-6, 3, 37)
    for kind in ("linear", "logistic"):
        problem = module.Regression(kind, x, y)
        for method in module.METHODS:
            args = problem, method, step_sizes, np.full(37, 1e-3), 20
            every = module.final_losses(*args)
            some = module.final_losses(*args, best=every.min())
            assert np.argmin(some) == np.argmin(every)
            assert np.isfinite(every).sum() > np.isfinite(some).sum() + 10
            kept = np.isfinite(some)
            np.testing.assert_array_equal(some[kept], every[kept])


def test_absent_data_are_left_out_by_name(script, tmp_path, capsys, monkeypatch, x64):
    module = script("empirical_fisher")
    monkeypatch.setattr(module, "fields", lambda options: {})
    monkeypatch.setattr(module, "misspecified", lambda options: {})
    for name in ("print_tables", "plot_fields", "plot_misspecified"):
        monkeypatch.setattr(module, name, lambda *args: None)
    arguments = ["--data-dir", str(tmp_path), "--out", str(tmp_path)]
    assert module.main([*arguments, "--datasets", "boston", "a1a"]) == 0
    printed = capsys.readouterr().err
    assert "boston is left out" in printed and "a1a is left out" in printed


# Variances.


def test_fisher_variance_in_smoke_mode(script, tmp_path, capsys, monkeypatch):
    module = script("fisher_variance")
    monkeypatch.setattr(module, "TEST", 32)
    monkeypatch.setattr(module, "TOYS", {"logistic": module.TOYS["logistic"]})
    command = ["--smoke", "--out", str(tmp_path)]
    assert module.main(command) == 0
    assert "digits, regr., softplus" in capsys.readouterr().out
    assert_pictures(
        tmp_path / "figures", ["fisher_variance.png", "fisher_variance_toy.png"]
    )
    file = tmp_path / "results" / "fisher_variance.json"
    layers = json.loads(file.read_text())["layers"]["digits"]
    assert list(layers) == ["classification, sigmoid", "regression, softplus"]
    for title, (record,) in layers.items():
        for name in ("i1", "i2"):
            value, lower, upper = (
                np.array(record[name + suffix]) for suffix in ("", "_lower", "_upper")
            )
            assert np.all(lower <= value * (1 + 1e-4))
            assert np.all(value <= upper * (1 + 1e-4))
            if title.startswith("regression"):
                np.testing.assert_allclose(lower, upper, rtol=1e-4)
        # The outputs are linear in the last layer.
        assert not np.array(record["i2"])[:, -1].any()
        assert all(preferred[-1] == "i2" for preferred in record["preferred"])
    before = file.read_text()
    for name in ("toy", "layers"):
        monkeypatch.setattr(module, f"plot_{name}", lambda *args: None)
    assert module.main(command) == 0
    assert file.read_text() == before


# Curvature.


def test_eigenvalues_and_trace_of_a_known_hessian(script):
    module = script("curvature")
    spectrum = jnp.array([5.0, 3.0, 0.5, -2.0])
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4, 4)))[0]
    hessian = turn @ jnp.diag(spectrum) @ turn.T

    def loss(params):
        w = jnp.concatenate([params["a"], params["b"].ravel()])
        return w @ hessian @ w / 2

    params = {"a": jnp.ones(2), "b": jnp.ones((2, 1))}
    found = module.hessian_eigenvalues(loss, params, jax.random.key(1), 4)
    np.testing.assert_allclose(found, spectrum, rtol=1e-4)
    mean, error = module.hessian_trace(loss, params, jax.random.key(2), 400)
    assert 0 < error < 0.5
    assert abs(mean - 6.5) < 4 * error


# Sharpness and the generalisation gap.


def test_sharpness_and_gap_in_smoke_mode(script, tmp_path, capsys, monkeypatch):
    module = script("sharpness_and_gap")
    names = "plain, p = 2", "adaptive, p = 2", "Fisher, undamped"
    monkeypatch.setattr(module, "BALLS", {name: module.BALLS[name] for name in names})
    monkeypatch.setattr(module, "STEPS", (1, 10))
    kinds = [f"{name}, {steps} steps" for name in names for steps in (1, 10)]
    monkeypatch.setattr(module, "KINDS", kinds)
    file, figure = tmp_path / "results.json", tmp_path / "figures" / "gap.png"
    command = ["--smoke", "--out", str(file), "--figure", str(figure)]
    module.main(command)
    assert "adaptive, p = 2, 10 steps" in capsys.readouterr().out
    assert_pictures(tmp_path / "figures", ["gap.png"])
    results = json.loads(file.read_text())["results"]
    found = results["invariance"]
    assert found["largest change of an output"] == 0
    for kind, values in found["rise"].items():
        if kind.startswith("plain"):
            assert max(values) > 1.5 * min(values) > 0
        else:
            np.testing.assert_allclose(values, values[0], rtol=1e-4)
    rows = np.array([row.split() for row in results["batch size 45, seed 0"]], float)
    assert rows.shape == (5, len(module.columns()))
    of = dict(zip(module.columns(), rows.T, strict=True))
    # An ascent of ten steps begins with that of one.
    for rule in module.RULES:
        for name in names:
            one, ten = (f"{rule}: {name}, {n} steps, rise 0.1" for n in (1, 10))
            assert np.all(of[ten] >= of[one] - 1e-5)

    # A second call trains nothing.
    before = file.read_text()
    monkeypatch.setattr(module, "draw", lambda *args: None)
    monkeypatch.setattr(module, "sweep", None)
    module.main(command)
    assert file.read_text() == before


def test_rank_correlation_is_that_of_scipy(script):
    from scipy.stats import kendalltau

    module = script("sharpness_and_gap")
    random = np.random.default_rng(0)
    x, y = random.normal(size=30), random.integers(0, 6, 30).astype(float)
    everything = np.ones((30, 30))
    found = module.kendall(x, y, everything)
    np.testing.assert_allclose(found, kendalltau(x, y).statistic, rtol=1e-12)
    # A weight is a number of copies.
    rows = random.integers(0, 30, (4, 30))
    weights = np.array([np.bincount(row, minlength=30) for row in rows], float)
    expected = [kendalltau(x[row], y[row]).statistic for row in rows]
    found = module.kendall(x, y, everything, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # Pairs within groups, one after the other.
    group = np.arange(30) % 3
    signs = [
        (np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
        for i in range(30)
        for j in range(i)
        if group[i] == group[j]
    ]
    a, b = np.array(signs).T
    expected = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
    found = module.kendall(x, y, group[:, None] == group)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# What is on the harness: everything once, and a second call computes nothing.

SCRIPTS = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if "harness.main(" in path.read_text()
)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "harness"])
def test_in_smoke_mode(script, tmp_path, capsys, monkeypatch, name):
    module = script(name)
    command = ["--smoke", "--out", str(tmp_path)]
    assert module.main(command) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    file = tmp_path / f"{name}.json"
    before = file.read_text()
    cells = json.loads(before)["cells"]
    assert cells and all(numbers(cell["result"]) for cell in cells)
    for picture in tmp_path.glob("*.png"):
        assert picture.stat().st_size > 10_000
    monkeypatch.setattr(script("show"), "save", lambda *args: None)
    monkeypatch.setattr(script("harness"), "keep", None)
    assert module.main(command) == 0
    assert file.read_text() == before


# Wrong labels.


def test_a_wrong_label_is_another_one(script):
    module = script("perceptron")
    labels = np.arange(10_000) % 10
    for noise in (0.0, 0.4, 0.8):
        noisy = module.noisy_labels(labels, noise, 0)
        assert set(noisy.tolist()) == set(range(10))
        assert abs(np.mean(noisy != labels) - noise) < 0.02


# Translation.


def test_translation_in_smoke_mode(script, tmp_path, capsys, monkeypatch):
    module = script("translation")
    file, figure = tmp_path / "results.json", tmp_path / "figures" / "translation.png"
    command = ["--smoke", "--out", str(file), "--figure", str(figure)]
    command += ["--methods", "Adam", "Fisher SAM"]
    module.main(command)
    assert "Fisher SAM" in capsys.readouterr().out
    assert figure.stat().st_size > 10_000
    results = json.loads(file.read_text())["results"]
    # Five tries and one more seed.
    assert len(results) == 6 * 2
    for facts in results.values():
        assert facts["validation loss"][-1] < facts["validation loss"][0]
        assert facts["signature"].startswith("nrefs:1|case:lc")

    # A second call trains nothing.
    before = file.read_text()
    monkeypatch.setattr(module, "draw", lambda *args: None)
    monkeypatch.setattr(module, "run", None)
    module.main(command)
    assert file.read_text() == before
    with pytest.raises(SystemExit, match="smoke: True there, False here"):
        module.main(["--data-dir", str(tmp_path), "--out", str(file)])
    with pytest.raises(SystemExit, match=r"There is no .*train\.de\.gz"):
        module.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "new")])


def test_sentences_of_a_row_do_not_see_each_other(script):
    module = script("translation")
    random = np.random.default_rng(0)
    pairs = [
        (random.integers(3, 9, m).tolist(), random.integers(3, 9, n).tolist())
        for m, n in ((5, 4), (2, 7), (6, 1))
    ]
    together = module.pack(pairs)
    assert len(together.part) == 1
    model = module.Model(9, 9, width=8, depth=1)
    params = model.init(jax.random.key(0), together)
    found = model.features(params, jax.tree.map(jnp.asarray, together))
    for number, pair in enumerate(pairs, 1):
        alone = jax.tree.map(jnp.asarray, module.pack([pair]))
        for name in ("inputs", "labels"):
            np.testing.assert_array_equal(
                getattr(together, name)[together.part == number],
                getattr(alone, name)[alone.part == 1],
            )
        np.testing.assert_allclose(
            found[together.part == number],
            model.features(params, alone)[alone.part == 1],
            atol=1e-5,
        )


def test_smoothed_cross_entropy_is_that_of_smoothed_labels(script):
    module = script("translation")
    table = jax.random.normal(jax.random.key(0), (7, 4))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    labels = jnp.arange(6).reshape(2, 3)
    params = {"decoder": {"Embed_0": {"embedding": table}}}
    found = module.smoothed_cross_entropy(params, x, labels)
    smoothed = optax.smooth_labels(jax.nn.one_hot(labels, 7), module.SMOOTHING)
    expected = optax.softmax_cross_entropy(x @ table.T, smoothed)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_greedy_translation_says_the_likeliest_next_word(script):
    module = script("translation")
    corpus = module.prepare(module.made_up())
    model = module.Model(corpus.source_size, len(corpus.words), width=8, depth=1)
    init, _, translate = module.common(model, corpus)
    params = init(jax.random.key(0))
    outputs = translate(params)
    # All at once, from what was said.
    begin = jnp.full((len(outputs), 1), module.EOS)
    inputs = jnp.concatenate([begin, outputs[:, :-1]], 1)
    part = jnp.asarray(corpus.test != module.PAD, jnp.int32)
    memory = model.encode(params, jnp.asarray(corpus.test), part)
    x = model.decode(params, inputs, jnp.ones_like(inputs), memory, part)
    logits = np.array(x @ module.output_layer(params).T)
    logits[..., [module.PAD, module.UNKNOWN]] = -np.inf
    np.testing.assert_array_equal(outputs, logits.argmax(-1))


# Costs, and what has no test of its own.


def numbers(tree):
    """Returns all numbers in a tree of JSON."""
    if isinstance(tree, dict | list):
        parts = tree.values() if isinstance(tree, dict) else tree
        return [x for part in parts for x in numbers(part)]
    return [tree] if isinstance(tree, int | float) else []


def test_passes_over_an_array_are_counted(script):
    def fn(x, y):
        return x + y, jnp.sum(x * x)

    x = jnp.ones((5, 7))
    program = jax.jit(fn).lower(x, x).compile()
    # Two reads and a write; one read.
    assert script("cost").passes(program, (5, 7)) == 4
    assert script("cost").passes(program, (7, 5)) == 0


@pytest.mark.parametrize("name", ["fisher_cost", "step_time", "growth"])
def test_costs_in_smoke_mode(script, tmp_path, name):
    module = script(name)
    file, figure = tmp_path / "results.json", tmp_path / "figure.png"
    drawn = ["--figure", str(figure)] if name == "growth" else []
    module.main(["--smoke", "--out", str(file), *drawn])
    results = json.loads(file.read_text())["results"]
    if name == "growth":
        assert figure.stat().st_size > 10_000
        results = {k: v for points in results.values() for k, v in points.items()}
    for facts in results.values():
        first, *others = facts.values()
        assert first["ratio"] == 1 and len(others) > 4
        for row in facts.values():
            assert row["ratio"] > 0 and row["trace_s"] > 0 and row["compile_s"] > 0


def test_errors_of_estimators_in_smoke_mode(script, tmp_path, capsys):
    module = script("estimator_error")
    file = tmp_path / "results.json"
    module.main(["--smoke", "--out", str(file)])
    assert "exact" in capsys.readouterr().out
    found = numbers(json.loads(file.read_text())["results"])
    assert len(found) > 20 and np.all(np.isfinite(found))


# Peers, each in an environment of its own.


@pytest.mark.parametrize(
    ("name", "package"), [("torch_peers", "torch"), ("kfac_peers", "kfac_jax")]
)
def test_peers_in_smoke_mode(script, tmp_path, name, package):
    pytest.importorskip(package)
    file = tmp_path / "results.json"
    script(name).main(["--smoke", "--out", str(file)])
    (facts,) = json.loads(file.read_text())["results"].values()
    if name == "torch_peers":
        assert len(facts["diagonals"]) == len(facts["steps, eager"]) == 4
        assert min(facts["diagonals"].values()) > 0
    else:
        errors = [row["error"] for row in facts.values() if "error" in row]
        assert len(errors) == 2 and max(errors) < 1e-5
