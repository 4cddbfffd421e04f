"""The command line of an experiment, from a default of each option."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class Help(argparse.RawDescriptionHelpFormatter):
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


def read(
    script: str,
    doc: str | None,
    arguments: Sequence[str],
    options: Mapping[str, Any],
    defaults: Callable[[argparse.Namespace], Mapping[str, Any]],
    smoke: Mapping[str, Any],
) -> argparse.Namespace:
    """Returns the options; see `harness.start`."""
    parser = Parser(script, description=doc, formatter_class=Help, add_help=False)
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
    parser.set_defaults(**defaults(early))
    if early.smoke:
        parser.set_defaults(**smoke, out=None)
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    return parser.parse_args(arguments)


def kind(default: Any) -> dict[str, Any]:
    """Returns what `add_argument` takes for a default of this type."""
    if default is None:
        return {}
    if isinstance(default, bool):
        return {"action": "store_true"}
    if isinstance(default, list):
        return {"nargs": "+", **kind(default[0])}
    return {"type": whole if isinstance(default, int) else type(default)}


def whole(text: str) -> int:
    """Reads a positive whole number."""
    return int(positive(text, int))


def positive(text: str, kind: Callable[[str], float] = float) -> float:
    """Reads a positive number."""
    if not 0 < kind(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return kind(text)
