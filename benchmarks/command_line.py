"""The command line of an experiment, from a default of each option."""

import argparse
import math
from collections.abc import Callable
from typing import Any


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def read(script, doc, arguments, options, defaults, smoke) -> argparse.Namespace:
    """Returns the options; see `harness.start`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(script, description=doc, formatter_class=form, add_help=False)
    for name, given in options.items():
        settings = given if isinstance(given, dict) else {"default": given}
        settings = {"help": "", **kind(settings.get("default")), **settings}
        choices = "; ".join(map(str, settings.get("choices", ())))
        if len(choices) > 40:  # As one word, they would not be broken into lines.
            settings["help"] += f", of {choices}"
            settings["metavar"] = name.upper()
        settings["help"] = f"{settings['help']}; default %(default)s".lstrip(",; ")
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
