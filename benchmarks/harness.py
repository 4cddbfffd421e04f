"""What all experiments share: arguments, and cells that are kept.

An experiment asks a question, names its cells, and makes tables and pictures of them:

    def experiment(run):
        steps = run.options.steps
        facts = {m: run.cell(train, m, steps, method=m, steps=steps) for m in METHODS}
        show.table("Accuracy", ["method", "%"], ...)

    main = harness.script(__doc__, experiment, smoke={"steps": 3}, steps=800)

A cell is the unit of resume: its settings are its key, and what made it (command,
versions, device, seconds) is kept beside its result. It is written as it ends, all or
nothing: a run may be killed at any time, run twice at once or fill the disk, and what
was finished stays; a result of other settings is never taken for one of these.
"""

import argparse
import fcntl
import json
import math
import os
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import provenance
from rich.console import Console


HERE = pathlib.Path(__file__).resolve().parent
messages = Console(stderr=True, highlight=False, soft_wrap=True)


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
            made = provenance.of(self.options.command)
            made["seconds"] = round(time.perf_counter() - start, 1)
            cell = {"settings": settings, "result": result, "made": made}
            self.cells.update(keep(self.file, cell))
        self.used.append(key)
        return self.cells[key]["result"]

    def keyed(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns settings as they are kept, and their key."""
        smoke = {"smoke": True} if self.options.smoke else {}
        found = plain({**settings, **smoke})
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
    messages.print(text, style="dim", markup=False)


def read(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the cells of a file by key."""
    if not file.exists():
        return {}
    try:
        cells = json.loads(file.read_text())["cells"]
        return {key_of(cell["settings"]): cell for cell in cells}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{file} does not hold cells of an experiment ({type(error).__name__}: "
            f"{error}); move it away or name another folder in --out"
        ) from None


def keep(file: pathlib.Path, cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Adds a cell to a file, all or nothing; returns all that it holds then.

    Where another process has kept a cell of these settings meanwhile, that one stays.
    """
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
        raise SystemExit(
            f"{file}: {error.strerror}. Not kept: {describe(cell['settings'])}. "
            "All earlier cells are."
        ) from None
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


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action):
        default = action.default
        if default is False or default in (None, argparse.SUPPRESS):  # 0 is shown.
            return (action.help or "").lstrip("=")
        if isinstance(default, Mapping):
            default = [f"{k}={v:g}" for k, v in default.items()]
        if isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        return f"{action.help}; default {default}".replace("%", "%%").lstrip("=; ")


def main(
    doc: str | None,
    experiment: Callable[[Run], None],
    arguments: Sequence[str] | None = None,
    *,
    defaults: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda found: {},
    smoke: Mapping[str, Any] | None = None,
    **options: Any,
) -> int:
    """Reads the command line, runs the experiment and returns the exit code.

    Args:
        doc: Docstring of the script.
        experiment: What to run.
        arguments: Command line; default that of the process.
        defaults: Maps options to defaults that depend on them.
        smoke: Defaults of smoke mode: seconds, to see that it runs.
        **options: Each a default, which tells its type (whole numbers are positive, a
            list takes several), or a dict of what `add_argument` takes beside or in
            its place.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    module = pathlib.Path(sys.modules[experiment.__module__].__file__ or "").stem
    parser = _Parser(
        prog=f"{module}.py", description=doc, formatter_class=_Help, add_help=False
    )

    options["out"] = {"default": HERE, "help": "folder of all that is made"}
    for name, given in options.items():
        settings = given if isinstance(given, dict) else {"default": given}
        # Without a help text no default is shown.
        settings = {"help": "=", **kind(settings.get("default")), **settings}
        choices = "; ".join(map(str, settings.get("choices", ())))
        if len(choices) > 40:  # As one word, they would not be broken into lines.
            settings["help"] = f"{settings['help']}, of {choices}".lstrip("=, ")
            settings["metavar"] = name.upper()
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--smoke", action="store_true", help="seconds, to see it run")
    early, _ = parser.parse_known_args(arguments)
    chosen = {**defaults(early), **(dict(smoke or {}, out=None) if early.smoke else {})}
    parser.set_defaults(**chosen)
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    found = parser.parse_args(arguments)
    found.command = shlex.join(["python", f"benchmarks/{module}.py", *arguments])
    if found.smoke and found.out and found.out.resolve().is_relative_to(HERE):
        parser.error("--out: what smoke mode writes does not belong to the results")
    at = found.out or pathlib.Path(tempfile.mkdtemp(prefix=f"{module}-smoke-"))
    committed = at.resolve() == HERE
    results, pictures = (at / p if committed else at for p in ("results", "figures"))
    usable(results)
    usable(pictures)
    file = results / f"{module}.json"
    run = Run(found, file, pictures, read(file), [])
    try:
        experiment(run)
    except KeyboardInterrupt:
        say(f"Interrupted: {file} has what is finished; the same command goes on")
        return 130
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    made = [run.cells[key]["made"] for key in dict.fromkeys(run.used)]
    made = [f"{m['device']}; {describe(m['versions'])}" for m in made]
    for what in dict.fromkeys(made):
        say(f"{made.count(what)} of {len(made)} cells: {what}")
    say(f"{file}")
    return 0


def kind(default: Any) -> dict[str, Any]:
    """Returns what `add_argument` takes for a default of this type."""
    if default is None:
        return {}
    if isinstance(default, bool):
        return {"action": "store_true"}
    if isinstance(default, list):
        return {"nargs": "+", **kind(default[0])}
    return {"type": whole if isinstance(default, int) else type(default)}


def script(doc: str | None, experiment: Callable[[Run], None], **keywords: Any):
    """Returns `main(arguments=None)` of an experiment; see `main`."""
    return partial(main, doc, experiment, **keywords)


def usable(folder: pathlib.Path) -> None:
    """Raises SystemExit where one cannot write into a folder, before anything runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x" * 4096)
    except OSError as error:
        raise SystemExit(f"--out {folder}: {error.strerror}") from None


def whole(text: str) -> int:
    """Reads a positive whole number for argparse."""
    return int(positive(text, int))


def positive(text: str, kind: Callable[[str], float] = float) -> float:
    """Reads a positive number for argparse."""
    if not 0 < kind(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return kind(text)
