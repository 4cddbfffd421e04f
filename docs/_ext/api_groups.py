"""Which public names the pages of the API document. Without Sphinx, for the tests."""

import importlib
import inspect
import pathlib
import re
import types


FOLDER = pathlib.Path(__file__).parents[1] / "api"
MODULES = ("fsam_optax", "fsam_optax.nnx", "fsam_optax.variance")
BLOCK = re.compile(r"^```\{names\} (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def groups() -> dict[str, list[str]]:
    """Returns the names that the pages of the API list, module by module."""
    found: dict[str, list[str]] = {module: [] for module in MODULES}
    for page in sorted(FOLDER.glob("*.md")):
        for module, names in BLOCK.findall(page.read_text()):
            found[module] += names.split()
    return found


def mistakes() -> list[str]:
    """Returns what is wrong with the groups: a line for each name that is."""
    wrong = []
    for module, names in groups().items():
        public = importlib.import_module(module)
        for name in public.__all__:
            value = getattr(public, name)
            if isinstance(value, types.ModuleType):
                continue
            if names.count(name) != 1:
                wrong.append(f"{module}.{name} is in {names.count(name)} groups.")
            if not inspect.getdoc(value):
                wrong.append(f"{module}.{name} has no docstring.")
        wrong += [
            f"{module}.{name} is in a group, but is not public."
            for name in sorted(set(names) - set(public.__all__))
        ]
    return wrong
