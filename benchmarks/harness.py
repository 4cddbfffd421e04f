"""What all experiments share: options, cells that are kept, and what made them.

    @harness.experiment(smoke={"steps": 3}, steps=800)
    def main(run):
        steps = run.options.steps
        found = run.each("method", METHODS, train, steps, steps=steps)
        show.table("Accuracy", ["method", "%"], ...)

A cell is the unit of resume: its settings are its key, and what made it is kept beside
its result. It is written as it ends, all or nothing: a run may be killed at any time,
run twice at once or fill the disk, and what was finished stays.
"""

import argparse
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import command_line
import numpy as np


HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = {name: name for name in ("jax", "optax", "flax", "numpy", "torch")} | {
    **{"kfac_jax": "kfac-jax", "backpack": "backpack-for-pytorch"},
    **{"nngeometry": "nngeometry", "laplace.curvature": "laplace-torch"},
    **{"asdl": "asdfghjkl", "curvlinops": "curvlinops-for-pytorch"},
}


class Run(NamedTuple):
    """One call of an experiment: its options, and the cells that are finished."""

    options: argparse.Namespace
    file: pathlib.Path
    pictures: pathlib.Path
    cells: dict[str, dict[str, Any]]
    used: list[str]

    def cell(self, compute: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """Returns the result kept for these settings, or keeps that of compute(*args).

        The settings must hold everything that the result depends on.
        """
        settings, key = self.keyed(settings)
        if key not in self.cells:
            say(f"{self.file.stem}: {describe(settings)}")
            start = time.perf_counter()
            result = plain(compute(*args))
            made = made_by(self.options.command)
            made["seconds"] = round(time.perf_counter() - start, 1)
            cell = {"settings": settings, "result": result, "made": made}
            self.cells.update(keep(self.file, cell))
        self.used.append(key)
        return self.cells[key]["result"]

    def each(self, name: str, values: Any, compute: Callable, *args: Any, **key: Any):
        """Returns a cell for each value, which is the first argument and a setting."""
        return {v: self.cell(compute, v, *args, **{name: v}, **key) for v in values}

    def keyed(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns settings as they are kept, and their key."""
        found = plain(settings) | ({"smoke": True} if self.options.smoke else {})
        return found, key_of(found)

    def take(self, names: str) -> dict[str, Any]:
        """Returns the options of these names, to be settings of a cell."""
        return {name: getattr(self.options, name) for name in names.split()}

    def holds(self, **settings: Any) -> bool:
        """Says whether a cell is finished."""
        return self.keyed(settings)[1] in self.cells

    def picture(self, suffix: str = "") -> pathlib.Path:
        """Returns where a picture goes; other data than the digits are named."""
        data = getattr(self.options, "data", "digits")
        suffix += "" if data == "digits" else f"_{data}".replace("-", "_")
        return self.pictures / f"{self.file.stem}{suffix}.png"


def key_of(settings: Mapping[str, Any]) -> str:
    """Returns settings as a string that is the same for equal settings."""
    return json.dumps(settings, sort_keys=True)


def describe(settings: Mapping[str, Any]) -> str:
    """Returns the settings that fit one line."""
    shown = (f"{k} {v}" for k, v in settings.items() if not isinstance(v, dict | list))
    return ", ".join(shown)


def say(text: str) -> None:
    """Says where the work is, on the error stream."""
    print(text, file=sys.stderr, flush=True)


def made_by(command: str) -> dict[str, Any]:
    """Returns what a reader needs to repeat a cell: versions, device and command."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for module, name in PACKAGES.items():
        if module in sys.modules:
            versions[name] = importlib.metadata.version(name)
    device = f"CPU, {os.cpu_count()} cores"
    if "jax" in sys.modules:
        found = sys.modules["jax"].devices()[0]
        device = device if found.platform == "cpu" else found.device_kind
    versions["fsam_optax"] = code()
    return {"command": command, "device": device, "versions": versions}


@functools.cache
def code() -> str:
    """Returns the version of the library: the commit, or a digest of its source."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
        found = subprocess.run(command, cwd=HERE, capture_output=True, check=True)
        return found.stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        parts = sorted((HERE.parent / "fsam_optax").rglob("*.py"))
        digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts))
        return f"source {digest.hexdigest()[:8]}"


def read(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the cells of a file by key."""
    if not file.exists():
        return {}
    try:
        cells = json.loads(file.read_text())["cells"]
        return {key_of(cell["settings"]): cell for cell in cells}
    except (ValueError, KeyError, TypeError) as error:
        what = f"{file} does not hold cells of an experiment ({error!r})"
        raise SystemExit(f"{what}; move it away or name another --out") from None


def keep(file: pathlib.Path, cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Adds a cell to a file, if it has none of these settings; returns all of them."""
    temporary = file.with_name(f".{file.name}.unfinished")
    try:
        with locked(file.parent):
            cells = read(file)
            cells.setdefault(key_of(cell["settings"]), cell)
            # One cell a line, for the sake of differences between versions.
            lines = ",\n".join(json.dumps(c, allow_nan=False) for c in cells.values())
            try:
                with temporary.open("w") as stream:
                    stream.write(f'{{"cells": [\n{lines}\n]}}\n')
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        what = f"{file}: {error.strerror}. Not kept: {describe(cell['settings'])}"
        raise SystemExit(f"{what}. All earlier cells are.") from None
    return cells


@contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time write in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """Returns a tree of arrays as JSON: six digits, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "dtype"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, pathlib.Path) else value


def experiment(**keywords: Any) -> Callable[[Callable[[Run], None]], Any]:
    """Makes `main(arguments=None)` of a function of a `Run`; see `start`."""
    return lambda function: functools.partial(start, function, **keywords)


def start(function, arguments=None, *, defaults=lambda _: {}, smoke=(), **options: Any):
    """Reads the command line, runs the experiment and returns the exit code.

    Args:
        function: What to run; the docstring of its module is the help.
        arguments: Command line; default that of the process.
        defaults: Maps options to defaults that depend on them.
        smoke: Defaults of smoke mode: seconds, to see that it runs.
        **options: Each a default, which tells its type (whole numbers are positive, a
            list takes several), or a dict of what `add_argument` takes.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    module = sys.modules[function.__module__]
    path = pathlib.Path(module.__file__ or "").resolve()
    name, script = path.stem, os.path.relpath(path, HERE.parent)
    options["out"] = {"default": HERE, "help": "folder of all that is made"}
    asked = f"{name}.py", module.__doc__, arguments
    found = command_line.read(*asked, options, defaults, dict(smoke))
    found.command = shlex.join(["python", script, *arguments])
    if found.smoke and found.out and found.out.resolve().is_relative_to(HERE):
        raise SystemExit("--out: what smoke mode writes does not belong to the results")
    at = found.out or pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-smoke-"))
    committed = at.resolve() == HERE
    results, pictures = (at / p if committed else at for p in ("results", "figures"))
    usable(results)
    usable(pictures)
    file = results / f"{name}.json"
    run = Run(found, file, pictures, read(file), [])
    try:
        function(run)
    except KeyboardInterrupt:
        say(f"Interrupted: {file} has what is finished; the same command goes on")
        return 130
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    made = [run.cells[key]["made"] for key in dict.fromkeys(run.used)]
    made = Counter(f"{m['device']}; {describe(m['versions'])}" for m in made)
    for what, count in made.items():
        say(f"{count} of {made.total()} cells: {what}")
    say(f"{file}")
    return 0


def usable(folder: pathlib.Path) -> None:
    """Raises SystemExit where one cannot write into a folder, before anything runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x" * 4096)
    except OSError as error:
        raise SystemExit(f"--out {folder}: {error.strerror}") from None
