"""What keeps the results of the experiments: nothing lost, nothing mixed."""

import argparse
import importlib
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest


BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow
SCRIPT = '''
"""Question: what is kept?"""

import os, pathlib, signal, sys, time
sys.path.insert(0, {benchmarks!r})
import command_line
import harness

@harness.experiment(
    smoke={{"cells": 1}},
    first={{"default": 0, "type": int}},
    cells={{"default": 3, "help": "how many"}},
    size=10,
    pause=0.0,
    rho={{"default": 0.5, "type": command_line.positive}},
    method={{"default": "no", "choices": ["no", *map(str, range(900, 930))]}},
    log=os.devnull,
)
def main(run):
    o = run.options
    for number in range(o.first, o.first + o.cells):
        def compute():
            with open(o.log, "a") as log:
                log.write(f"{{number}}\\n")
            time.sleep(o.pause)
            return {{"square": number ** 2, "long": "x" * o.size, "rho": o.rho}}
        print(run.cell(compute, number=number, size=o.size, rho=o.rho)["square"])

if __name__ == "__main__":
    sys.exit(main())
'''


@pytest.fixture
def script(tmp_path):
    """Returns a function that starts an experiment on a folder of this test."""
    path = tmp_path / "squares.py"
    path.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))

    def start(*arguments, before=None, out=tmp_path / "out"):
        command = [sys.executable, str(path), *map(str, arguments)]
        if out:
            command += ["--out", str(out)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    return start


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("harness")


@pytest.fixture
def show(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("show")


def finish(process):
    """Returns the exit code, what was printed, and what was said."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.split(), err


def cells(folder):
    """Returns the cells that a folder holds, each of them whole."""
    found = json.loads((folder / "out" / "squares.json").read_text())["cells"]
    for cell in found:
        number = cell["settings"]["number"]
        assert cell["result"]["square"] == number**2
        assert cell["result"]["rho"] == cell["settings"]["rho"]
        assert len(cell["result"]["long"]) == cell["settings"]["size"]
        assert cell["made"]["versions"]["python"] and cell["made"]["command"]
    keys = [json.dumps(cell["settings"], sort_keys=True) for cell in found]
    assert len(set(keys)) == len(keys)
    return found


def test_what_is_finished_is_not_computed_again(script, tmp_path):
    log = tmp_path / "log"
    assert finish(script("--log", log))[:2] == (0, ["0", "1", "4"])
    code, printed, said = finish(script("--log", log, "--cells", 4))
    assert (code, printed) == (0, ["0", "1", "4", "9"])
    assert log.read_text().split() == ["0", "1", "2", "3"]
    # What made them is told.
    assert "4 of 4 cells: CPU" in said and "fsam_optax" in said


def test_cells_of_other_settings_stand_beside_each_other(script, tmp_path):
    log = tmp_path / "log"
    for rho in (0.5, 0.25, 0.5):
        assert finish(script("--log", log, "--rho", rho))[0] == 0
    assert log.read_text().split() == ["0", "1", "2"] * 2
    assert sorted(c["result"]["rho"] for c in cells(tmp_path)) == [0.25] * 3 + [0.5] * 3


@pytest.mark.parametrize("attempt", range(3))
def test_killed_in_the_middle_of_a_write(script, tmp_path, attempt):
    """Writes of some megabytes, so that kill -9 hits one; then the run goes on."""
    size, count = 4_000_000, 4
    arguments = "--size", size, "--cells", count
    process = script(*arguments)
    unfinished = tmp_path / "out" / ".squares.json.unfinished"
    deadline = time.monotonic() + 60
    seen = 0
    while time.monotonic() < deadline and process.poll() is None:
        try:
            seen += unfinished.stat().st_size > size * (attempt + 0.2)
        except FileNotFoundError:
            continue
        if seen:
            process.send_signal(signal.SIGKILL)
            break
    code, _, _ = finish(process)
    assert code == -signal.SIGKILL and seen
    file = tmp_path / "out" / "squares.json"
    kept = len(cells(tmp_path)) if file.exists() else 0
    assert kept < count
    code, printed, _ = finish(script(*arguments))
    assert code == 0 and len(printed) == count
    assert len(cells(tmp_path)) == count and not unfinished.exists()


def test_two_processes_on_one_folder(script, tmp_path):
    """They overlap in half of their cells; each writes all the time."""
    arguments = "--cells", 20, "--pause", 0.01
    both = [script(*arguments, "--first", first) for first in (0, 10)]
    ends = [finish(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0]
    assert [int(p) for p in ends[1][1]] == [n**2 for n in range(10, 30)]
    assert {c["settings"]["number"] for c in cells(tmp_path)} == set(range(30))


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # For the limit.
def test_a_full_disk_loses_one_cell_and_says_so(script, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    arguments = "--size", 20_000, "--cells", 4
    code, printed, said = finish(script(*arguments, before=limit))
    assert (code, printed) == (1, ["0", "1"])
    line = said.strip().splitlines()[-1]
    assert "File too large" in line and "Not kept: number 2" in line
    assert len(cells(tmp_path)) == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["squares.json"]
    assert finish(script(*arguments))[1] == ["0", "1", "4", "9"]
    assert len(cells(tmp_path)) == 4


def test_an_interrupted_run_says_how_to_go_on(script, tmp_path):
    process = script("--cells", 3, "--pause", 5, "--log", tmp_path / "log")
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, said = finish(process)
    assert code == 130 and "the same command goes on" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rho", "-1"], "must be positive, got -1"),
        (["--out", "/dev/null/there"], "--out /dev/null/there: Not a directory"),
        (["--out", "/proc/there"], "--out /proc/there: No such file or directory"),
        (
            ["--smoke", "--out", BENCHMARKS / "results"],
            "does not belong to the results",
        ),
    ],
)
def test_what_cannot_work_ends_before_anything_runs(
    script, tmp_path, arguments, message
):
    log = tmp_path / "log"
    process = script("--log", log, *arguments, out=None)
    code, printed, said = finish(process)
    assert code in (1, 2) and not printed and not log.exists()
    assert message in said.strip().splitlines()[-1]


def test_a_foreign_file_is_left_alone(script, tmp_path):
    file = tmp_path / "out" / "squares.json"
    file.parent.mkdir()
    file.write_text('{"results": 1}')
    code, printed, said = finish(script())
    assert code == 1 and not printed and "does not hold cells" in said
    assert file.read_text() == '{"results": 1}'


def test_smoke_mode_is_apart(script, tmp_path):
    """Its cells are never taken for real ones, and by default it has its own folder."""
    assert finish(script("--smoke"))[1] == ["0"]
    assert finish(script("--cells", "1"))[1] == ["0"]
    assert [cell["settings"].get("smoke") for cell in cells(tmp_path)] == [True, None]
    code, _, said = finish(script("--smoke", out=None))
    folder = pathlib.Path(said.split()[-1]).parent
    assert code == 0 and not folder.is_relative_to(BENCHMARKS)
    assert "squares-smoke-" in folder.name


def test_the_help_shows_the_defaults(script):
    code, printed, _ = finish(script("--help"))
    assert code == 0
    assert "how many; default 3" in " ".join(printed)
    assert "--rho RHO default 0.5" in " ".join(printed)
    assert "--pause PAUSE default 0.0" in " ".join(printed)
    assert "of no; 900; 901" in " ".join(printed)
    assert max(map(len, printed)) <= 80


def test_a_cell_of_each_value(harness, tmp_path):
    options = argparse.Namespace(smoke=False, command="python x.py")
    run = harness.Run(options, tmp_path / "x.json", tmp_path, {}, [])
    found = run.each("root", (2, 3), pow, 2, power=2)
    assert found == {2: 4, 3: 9}
    assert run.holds(root=3, power=2) and not run.holds(root=4, power=2)
    assert run.each("root", (2, 3), None, power=2) == found


def test_numbers_become_json(harness):
    given = {"a": np.float32([1 / 3, np.nan]), "b": math.inf, "c": (1, None, "x")}
    found = harness.plain(given)
    assert found == {"a": [0.333333, None], "b": None, "c": [1, None, "x"]}


def test_the_best_point_and_its_edges(harness):
    methods = importlib.import_module("methods")
    points = [{"rho": r, "rate": e} for r in (1, 2, 3) for e in (0.1, 0.2, 0.3)]
    scores = [0, 0, 0, 0, 1, math.nan, 0, 0, 0]
    assert methods.choose(points, scores) == {
        **{"rho": 2, "rate": 0.2, "edges": [], "score": 1.0}
    }
    scores = [0, 0, 0, math.inf * 0, 0, 0, 0, 0, 2]
    assert methods.choose(points, scores)["edges"] == ["largest rho", "largest rate"]


def test_a_table_loses_nothing_at_80_columns(show, capsys):
    headings = ["method", *(f"heading {i}" for i in range(12))]
    names = (
        "short",
        "a name so long that it is more than a half of the columns there are",
    )
    rows = [[name, *(f"{i}.{len(name)} ± 0.1" for i in range(12))] for name in names]
    show.table("A title", headings, rows, "A caption.")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for heading in headings:
        assert heading in printed
    for row in rows:
        for entry in row[1:]:
            assert entry in printed
    squeezed = "".join(printed.split())
    assert "…" not in squeezed and squeezed.count("short") >= 2


def test_every_method_has_one_look(show, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    methods = importlib.import_module("methods")
    assert show.look("base")["color"] == "#000000"
    assert show.look("SAM")["color"] == "#0072B2"
    assert show.look("ASAM")["color"] == "#D55E00"
    looks = [tuple(show.look(name).values()) for name in methods.METHODS]
    forms = {name.rsplit(", ", 1)[0] for name in methods.METHODS if "Fisher" in name}
    assert len(set(looks)) == len(looks) - len(forms)
    assert len({len(methods.grid(name, (1, 2, 3, 4))) for name in methods.METHODS}) == 1


def test_an_unfinished_picture_leaves_the_old_one(show, tmp_path, monkeypatch):
    fig, axes = show.figure(1, 1, "A headline", figsize=(2, 2))
    show.dots(axes[0, 0], 0, [1.0, 2.0], "SAM")
    file = tmp_path / "picture.png"
    show.save(fig, file)
    before = file.read_bytes()

    def fail(*paths):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(show.os, "replace", fail)
    with pytest.raises(SystemExit, match="No space left"):
        show.save(fig, file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_versions_are_those_of_what_runs(harness):
    made = harness.made_by("python x.py")
    assert made["versions"]["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert made["versions"]["fsam_optax"]
    assert isinstance(argparse.Namespace(**made).device, str)
