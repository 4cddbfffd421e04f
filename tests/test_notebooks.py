"""The notebooks: what they show is of a run, and they run from top to bottom."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import types

import pytest


FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Of the kernel's own packages.
@every_notebook
def test_notebook_runs(path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("FSAM_SMOKE", "1")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()


def code_of(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@every_notebook
def test_outputs_are_of_one_run_without_warnings_or_paths(path):
    cells = code_of(path)
    assert [c["execution_count"] for c in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name") != "stderr"
        text = "".join(output.get("text", ""))
        assert not re.search(r"Warning|WARNING|/(home|root|tmp|Users|work)/", text)


def test_first_cell_is_the_same_in_all():
    assert len({"".join(code_of(path)[0]["source"]) for path in PATHS}) == 1


@pytest.mark.parametrize("found", ["clone around", "clone beside", "nothing"])
@pytest.mark.parametrize("jax_is_there", [True, False])
def test_first_cell_installs_what_is_missing(
    found, jax_is_there, monkeypatch, tmp_path, capsys
):
    folder = {"clone around": "notebooks", "clone beside": "."}.get(found, "elsewhere")
    clone = tmp_path / "fsam_optax" if found == "clone beside" else tmp_path
    (tmp_path / folder).mkdir(exist_ok=True)
    if found != "nothing":
        (clone / "fsam_optax").mkdir(parents=True)
        (clone / "fsam_optax" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / folder)
    # A clone beside the notebook is found as a package without code.
    empty = types.SimpleNamespace(origin=None) if found == "clone beside" else None
    specs = {"fsam_optax": empty, "jax": jax_is_there, "optax": True}
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    calls = []

    def run(command, check):
        calls.append(command)
        return types.SimpleNamespace(returncode=int(found == "nothing"))

    monkeypatch.setattr(subprocess, "run", run)
    exec("".join(code_of(PATHS[0])[0]["source"]), {})

    source = "fsam_optax" if found == "nothing" else str(clone.resolve())
    expected = [sys.executable, "-m", "pip", "install", "-q", source]
    assert calls == [expected + ["--no-deps"] * jax_is_there]
    assert ("pip install ." in capsys.readouterr().out) == (found == "nothing")
