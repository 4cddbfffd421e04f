"""The experiments and recipes: smoke runs, and the parts that have an oracle."""

import importlib
import itertools
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam


ROOT = Path(__file__).parents[1]
BENCHMARKS, RECIPES = FOLDERS = ROOT / "benchmarks", ROOT / "docs" / "recipes"
RESULTS = BENCHMARKS / "results"
pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch):
    """Imports a script; one that computes in float64 does not pass that on."""
    before = jax.config.jax_enable_x64

    def load(name):
        [folder] = (f for f in FOLDERS if (f / f"{name}.py").exists())
        monkeypatch.syspath_prepend(folder)
        return importlib.import_module(name)

    yield load
    jax.config.update("jax_enable_x64", before)


# Sharpness and the generalisation gap.


def test_rank_correlation_is_that_of_scipy(script):
    from scipy.stats import kendalltau

    module = script("sharpness_and_gap")
    random = np.random.default_rng(0)
    x, y = random.normal(size=30), random.integers(0, 6, 30).astype(float)
    everything, one = np.ones((30, 30)), np.ones((1, 30))
    found = module.kendall(x, y, everything, one)
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
    found = module.kendall(x, y, group[:, None] == group, one)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# What is on the harness: everything once, and a second call computes nothing.

SOURCES = {path: path.read_text() for folder in FOLDERS for path in folder.glob("*.py")}
SCRIPTS = sorted(
    path.stem
    for path, text in SOURCES.items()
    if "@harness.experiment(" in text and path.stem != "harness"
)
PEERS = {"from_other_libraries": "torch"}  # in an environment of its own


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_smoke_mode(script, tmp_path, capsys, monkeypatch, name):
    pytest.importorskip(PEERS.get(name, "jax"))
    module = script(name)
    command = ["--smoke", "--out", str(tmp_path)]
    assert module.main(command) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    file = tmp_path / f"{name}.json"
    before = file.read_text()
    cells = json.loads(before)["cells"]
    assert cells and all(cell["result"] for cell in cells)
    path = Path(module.__file__).relative_to(ROOT).as_posix()
    made = {cell["made"]["command"] for cell in cells}
    assert made == {f"python {path} --smoke --out {tmp_path}"}
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


def test_sentences_of_a_row_do_not_see_each_other(script):
    module = script("translation")
    random = np.random.default_rng(0)
    pairs = [
        (random.integers(3, 9, m).tolist(), random.integers(3, 9, n).tolist())
        for m, n in ((5, 4), (2, 7), (6, 1))
    ]
    together = module.pack(pairs)
    assert len(together.part) == 1
    model = module.Transformer((9, 9), width=8, depth=1)
    params = model.init(jax.random.key(0), *together[:4])
    found = model.apply(params, *together[:4])
    for number, pair in enumerate(pairs, 1):
        alone = module.pack([pair])
        for name in ("inputs", "labels"):
            np.testing.assert_array_equal(
                getattr(together, name)[together.part == number],
                getattr(alone, name)[alone.part == 1],
            )
        of_pair = model.apply(params, *alone[:4])[alone.part == 1]
        np.testing.assert_allclose(found[together.part == number], of_pair, atol=1e-5)


def test_the_translation_loss_is_that_of_smoothed_labels(script):
    module = script("translation")
    pairs = module.pack([([3, 4, 5], [6, 3]), ([5], [4, 4, 5, 3])])
    model = module.Transformer((7, 7), width=8, depth=1)
    params = model.init(jax.random.key(0), *pairs[:4])
    logits, used = model.apply(params, *pairs[:4]), pairs.part > 0
    found = module.score(model, params, pairs)
    for loss, smoothing in zip(found[:2], (module.SMOOTHING, 0), strict=True):
        labels = optax.smooth_labels(jax.nn.one_hot(pairs.labels, 7), smoothing)
        expected = optax.softmax_cross_entropy(logits, labels)[used].mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    right = (jnp.argmax(logits, -1) == pairs.labels)[used].mean()
    np.testing.assert_allclose(found[2], right, rtol=1e-5)


def test_greedy_translation_says_the_likeliest_next_word(script):
    module = script("translation")
    _, val, test, _, words = module.prepare(script("captions").made_up())
    model = module.Transformer(tuple(map(len, words)), width=8, depth=1)
    params = model.init(jax.random.key(0), *val[:4])
    params = jax.tree.map(lambda w: 2 * w, params)
    found = jax.jit(partial(module.translate, model))(params, jnp.asarray(test))
    said = np.full((len(test), module.LONGEST + 1), module.EOS)
    part, ones = (test != module.PAD).astype(int), np.ones((len(test), module.LONGEST))
    for place in range(module.LONGEST):
        logits = model.apply(params, test, part, said[:, :-1], ones)[:, place]
        logits = np.array(logits)
        logits[:, [module.PAD, module.UNKNOWN]] = -np.inf
        said[:, place + 1] = logits.argmax(-1)
    np.testing.assert_array_equal(found, said[:, 1:])
    assert len(np.unique(found)) > 3


# A language model.


def sums_over_tokens(loss, params, batch, *args):
    """Returns 1/D sum_nt sum_y p(y) (d log p(y) / dw)^2 of given prefixes."""
    inputs, labels = batch
    used = labels >= 0

    def log_p(params):
        return jax.nn.log_softmax(loss.apply_fn(params, inputs, *args))

    p = jnp.where(used[..., None], jnp.exp(log_p(params)), 0)
    scores = jax.jit(jax.jacrev(log_p))(params)
    return jax.tree.map(
        lambda s: jnp.einsum("nty,nty...->...", p, s**2) / used.sum(), scores
    )


@pytest.fixture
def tiny(script):
    gpt = script("gpt")
    net = gpt.initial(jax.random.key(0), vocabulary=3, length=6, width=4, depth=1)
    adapter = gpt.adapter_of(jax.random.key(1), net, rank=1)
    # Trained for a while: its product is no longer 0.
    keys = jax.tree.map(lambda w: jax.random.key(w.size), adapter)
    adapter = jax.tree.map(lambda w, k: jax.random.normal(k, w.shape), adapter, keys)
    return gpt, net, adapter


def test_the_fisher_of_a_sequence_is_the_sum_over_its_tokens(tiny):
    gpt, net, adapter = tiny
    batch = jax.tree.map(jnp.asarray, gpt.pack([[1, 2], [2], [2, 1, 1]], 6))
    assert len(batch[1]) == 2
    for loss, params, args in (
        (gpt.LOSS, adapter, (net,)),
        (gpt.OF_MATRICES, net["matrices"], (net,)),
        (gpt.NET, net, ()),
    ):
        expected = sums_over_tokens(loss, params, batch, *args)
        exact = jax.jit(
            lambda p, loss=loss, args=args: fsam.diagonal(
                fsam.fisher_exact(loss), p, batch, loss_args=args
            )
        )(params)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), exact, expected
        )
    # One draw of the signs errs by sqrt(2) times the mean of an example at most.
    draws = 1024
    signs = fsam.fisher_hutchinson(gpt.LOSS, num_samples=draws, key=jax.random.key(2))
    found = jax.jit(lambda p: fsam.diagonal(signs, p, batch, loss_args=(net,)))(adapter)
    expected = sums_over_tokens(gpt.LOSS, adapter, batch, net)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=5 * (2 / draws) ** 0.5, atol=1e-7),
        found,
        expected,
    )


def test_packing_changes_neither_loss_nor_fisher_but_the_empirical_one(tiny):
    gpt, net, _ = tiny
    texts = [1, 2], [2], [2, 1, 1]
    packed = jax.tree.map(jnp.asarray, gpt.pack(texts, 6))
    alone = [gpt.pack([text], 6) for text in texts]
    padded = jax.tree.map(lambda *rows: jnp.concatenate(rows), *alone)
    assert len(packed[1]) == 2
    np.testing.assert_allclose(gpt.NET(net, packed), gpt.NET(net, padded), rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    head = {}
    for name in ("fisher_exact", "fisher_empirical"):
        estimator = getattr(fsam, name)(gpt.NET)
        diagonal = jax.jit(partial(fsam.diagonal, estimator))
        pair = [diagonal(net, batch) for batch in (packed, padded)]
        head[name] = [f["matrices"]["head"] for f in pair]
        if name == "fisher_exact":
            jax.tree.map(close, *pair)
    assert np.abs(np.subtract(*head["fisher_empirical"])).max() > 1e-3


def test_over_sequences_of_the_model_cross_terms_of_tokens_vanish(tiny):
    """A score is centred, given the tokens before: E (sum_t s_t)^2 = sum_t E s_t^2."""
    gpt, net, _ = tiny
    labels = jnp.asarray(np.indices((3, 3, 3)).reshape(3, -1).T)  # every sequence
    tokens = jnp.concatenate([jnp.zeros((27, 1), int), labels[:, :-1]], 1)
    inputs = tokens, jnp.ones((27, 3), int)

    def log_p(net):
        every = jax.nn.log_softmax(gpt.of_net(net, inputs))
        return jnp.take_along_axis(every, labels[..., None], -1).sum((1, 2))

    p = jnp.exp(log_p(net))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    expected = jax.tree.map(
        lambda s: jnp.einsum("n,n...->...", p, s**2), jax.jit(jax.jacrev(log_p))(net)
    )
    exact = jax.jit(partial(fsam.diagonal, fsam.fisher_exact(gpt.NET)))
    mean = exact(net, (inputs, labels), example_weights=p)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(3 * f, e, rtol=1e-4, atol=1e-6),
        mean,
        expected,
    )


def test_an_adapter_is_its_product_added(tiny):
    gpt, net, adapter = tiny
    batch = jax.tree.map(jnp.asarray, gpt.pack([[1, 2], [2]], 6))
    merged = jax.tree.map(jnp.add, net["matrices"], gpt.changes(adapter))
    found = gpt.LOSS(adapter, batch, net)
    np.testing.assert_allclose(found, gpt.OF_MATRICES(merged, batch, net), rtol=1e-5)
    fresh = gpt.adapter_of(jax.random.key(1), net, rank=1)
    np.testing.assert_allclose(gpt.LOSS(fresh, batch, net), gpt.NET(net, batch))


def test_pieces_make_up_the_text(script):
    gpt = script("gpt")
    assert gpt.joined((*"aaab",), ("a", "a")) == ("aa", "a", "b")
    texts = ["The man, the men.", "A man runs"]
    known = gpt.pieces(texts, 20)
    assert len(known) == len(set(known)) == 20
    assert " man" in known
    for numbers, text in zip(gpt.encode(texts, known), texts, strict=True):
        assert "".join(known[i] for i in numbers) == text.lower()


def test_without_its_text_nothing_trains(script, tmp_path):
    module = script("language_model")
    with pytest.raises(SystemExit, match=r"There is no .*train.de.gz"):
        module.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])


# Costs, and what has no test of its own.


def test_the_steps_by_hand_are_those_of_the_library(script):
    """What is timed beside each other does the same."""
    steps, cost = script("steps"), script("cost")
    model = cost.SMOKE["tiny"]()
    every = steps.make_steps(model)
    names = [name for name in every if f"{name} by hand" in every]
    family = {"GSAM", "WSAM", "Friendly SAM", "LookSAM", "MSAM"}
    assert set(names) == {"SAM", "ASAM", *family}
    for name in names:
        ends = []
        for init, step in (every[name], every[f"{name} by hand"]):
            params, state = model.params, init(model.params)
            step = jax.jit(step)
            for _ in range(3):
                _, params, state = step(params, state, model.batch)
            ends.append(params)
        for ours, by_hand in zip(*map(jax.tree.leaves, ends), strict=True):
            np.testing.assert_allclose(
                ours, by_hand, rtol=1e-4, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_defaults_of_the_main_job_are_those_of_its_tuning(script, data):
    module, choose = script("generalization"), script("methods").choose
    chosen = getattr(module, data.upper())
    score, tries = {}, {}
    for cell in script("harness").read(RESULTS / "generalization.json").values():
        settings, result = cell["settings"], cell["result"]
        if settings.get("part") != "tuning" or settings["data"] != data:
            continue
        method = settings["method"]
        rho, rate, radii, rates = chosen[method]
        offered = list(itertools.product(radii, rates))
        points = [[point["rho"], point["rate"]] for point in settings["points"]]
        if np.shape(points) == np.shape(offered) and np.allclose(points, offered, 1e-5):
            best = choose(result["points"], result["accuracy"])
            np.testing.assert_allclose((rho, rate), (best["rho"], best["rate"]))
            score[method], tries[method] = best["score"], len(points)
    assert score.keys() == chosen.keys()
    if data == "digits":
        # The better form of each, and the same effort.
        for kind in ("squared", "empirical"):
            forms = [method for method in tries if kind in method]
            assert max(forms, key=lambda form: score[form]) in module.MAIN
            tries[kind] = sum(tries.pop(form) for form in forms)
    assert len(set(tries.values())) == 1


def test_no_experiment_imports_another():
    assert len(SCRIPTS) > 12
    for path, text in SOURCES.items():
        found = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
        assert not set(found) & set(SCRIPTS), path


def test_a_recipe_is_a_page_with_its_script():
    recipes = [path for path in RECIPES.glob("*.py") if path.stem in SCRIPTS]
    assert len(recipes) > 6
    for path in recipes:
        command = f"    python docs/recipes/{path.name}"
        assert command in path.with_suffix(".md").read_text(), path


def test_commands_of_results_name_scripts_that_are_there():
    commands = [
        cell["made"]["command"]
        for file in RESULTS.glob("*.json")
        for cell in json.loads(file.read_text())["cells"]
    ]
    found = {re.findall(r"python (\S+)", command)[0] for command in commands}
    assert len(found) > 18
    assert all((ROOT / path).is_file() for path in found), found


def test_what_was_tuned_names_the_points_it_was_offered(script):
    harness, tuned = script("harness"), 0
    for file in RESULTS.glob("*.json"):
        for cell in harness.read(file).values():
            result, points = cell["result"], cell["settings"].get("points", [])
            if isinstance(result, dict) and "edges" in result:
                tuned += 1
                chosen = [[result[axis] for axis in point] for point in points]
                offered = [list(point.values()) for point in points]
                close = np.isclose(chosen, offered, rtol=1e-5, atol=6e-6).all(1)
                assert close.any(), (file, cell["settings"])
    assert tuned > 100


def test_the_verdict_takes_the_tuning_of_the_same_settings(script):
    def tuning(points, accuracy, **settings):
        settings |= {"part": "tuning", "method": "SAM", "points": points}
        return {
            "settings": settings,
            "result": {"points": points, "accuracy": accuracy},
        }

    near, far = {"rho": 0.1, "rate": 0.2}, {"rho": 0.8, "rate": 0.2}
    tunings = [
        tuning([near, far], [0.9, 0.8], data="digits", seeds=2),
        tuning([far], [0.99], data="digits", seeds=2),
        tuning([near], [0.5], data="cifar10", seeds=2),
    ]
    held_out = script("verdict").held_out
    at = {"method": "SAM", "data": "digits", "seeds": 5}
    assert held_out(at | near, tunings) == 0.9
    assert held_out(at | far, tunings) == 0.99
    assert held_out(at | near | {"rho": 0.2}, tunings) == 0


def test_the_verdict_is_that_of_the_results(script, capsys):
    script("verdict").main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2
    for table in tables:
        assert table in (BENCHMARKS / "README.md").read_text()


# Laplace, attribution and preconditioning.


def test_laplace_is_exact_for_a_linear_model_of_orthogonal_inputs(script, x64):
    from scipy.stats import multivariate_normal

    module, random = script("laplace"), np.random.default_rng(0)
    x, y, new = (random.normal(size=shape) for shape in ((30, 3), (30, 1), (4, 3)))
    x = np.linalg.qr(x - x.mean(0))[0] * [1, 2, 5]
    tau, noise = 0.7, 0.5
    design, designed = (np.column_stack([np.ones(len(a)), a]) for a in (x, new))
    precision = design.T @ design / noise**2 + tau * np.eye(4)
    w = np.linalg.solve(precision, design.T @ y / noise**2)
    params = [{"bias": jnp.asarray(w[0]), "kernel": jnp.asarray(w[1:])}]
    loss = fsam.negative_log_likelihood(script("perceptron").apply, fsam.gaussian())
    f = script("diagonals").diagonal("exact F", loss, params, (x, y))
    f = 30 * module.ravel_pytree(f)[0]
    train, points = module.linearise(params, x, y), np.array([[tau, noise]])
    found = module.evidence(module.density, train, w[:, 0], f, 2, points)
    covariance = noise**2 * np.eye(30) + design @ design.T / tau
    expected = multivariate_normal(np.zeros(30), covariance).logpdf(y[:, 0])
    np.testing.assert_allclose(found, [expected], rtol=1e-9)
    net = module.linearise(params, new, y[:4])
    found, _ = module.density(net, f / noise**2 + tau, noise, None, 0)
    variance = np.diag(designed @ np.linalg.inv(precision) @ designed.T) + noise**2
    expected = module.norm.logpdf(y[:4], designed @ w, variance[:, None] ** 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_attribution_is_judged_by(script):
    from scipy.stats import spearmanr

    a, b = np.random.default_rng(0).normal(size=(2, 6, 12))
    expected = np.mean([spearmanr(*rows).statistic for rows in zip(a, b, strict=True)])
    found = script("attribution").correlation(a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_preconditioners_spend_the_same_gradients(script):
    module = script("preconditioning")
    for method, facts in module.METHODS.items():
        steps = module.steps_of(method, "digits", 300)
        passes = 9 if facts[-1] < 0 else facts[-1]
        assert 280 <= steps * (1 + passes / module.EVERY) <= 300, method
        assert len(module.points_of(method, "digits")) == 24
