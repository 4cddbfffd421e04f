"""What the site has beyond Sphinx: the API in groups, links by name, thumbnails.

* The directive `names` documents the public names that it lists, and the build fails if
  a public name is in no group, in two, or without a docstring.
* A name in code type, such as `sam`, links to its place in the API, in every page.
* Docstrings are plain text with formulas; here they become reStructuredText.
* `notebooks` and `figures` are the gallery: cards with the first picture of each
  notebook, and with the figures of the pages that have some.
"""

import ast
import base64
import importlib
import inspect
import itertools
import json
import pathlib
import re

from api_groups import groups, mistakes, MODULES
from docutils import nodes, statemachine
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective


ROOT = pathlib.Path(__file__).parents[2]
SECTION = re.compile(
    r"^\s*(Args|Attributes|Examples?|Note|Raises|References|Returns|Yields|See Also):$"
)
# Code between backticks, or what reStructuredText would read as something else.
FIGURE = re.compile(r"!\[[^\]]*\]\([^)]*figures/([^)/]+)\)")
PLURAL = re.compile(r"(`[^`]+`)(\w?)")
SPECIAL = re.compile(r"(`+[^`]*`+)|([|*])|(?<=\w)(_)(?=\W|$)")


def check(app: Sphinx) -> None:
    """Fails the build if the groups are not the public names."""
    if wrong := mistakes():
        raise ExtensionError("docs/api: " + " ".join(wrong))


class Names(SphinxDirective):
    """A table of the names, one line each, and then each in full."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Returns the table and the descriptions."""
        module = self.arguments[0]
        lines = [f".. currentmodule:: {module}", "", ".. list-table::"]
        lines += ["   :widths: auto", ""]
        names = " ".join(self.content).split()
        for name in names:
            doc = docstring(name, getattr(importlib.import_module(module), name))
            first = rst(["", *doc.split("\n\n")[0].splitlines()])
            lines += [f"   * - :py:obj:`{name} <{module}.{name}>`"]
            lines += [f"     - {' '.join(first).strip()}"]
        for name in names:
            value = getattr(importlib.import_module(module), name)
            lines += ["", *described(name, value)]
        # The directive stands in Markdown; what it writes is reStructuredText.
        return parsed(self, ["```{eval-rst}", *lines, "```"])


def is_data(value: object) -> bool:
    """Tells a constant, whose docstring stands after it in the sources."""
    return not (inspect.isclass(value) or inspect.isroutine(value))


def docstring(name: str, value: object) -> str:
    """Returns the docstring of a public name."""
    if not is_data(value):
        return inspect.getdoc(value) or ""
    for path in sorted((ROOT / "fsam_optax").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        for assigned, then in itertools.pairwise(body):
            if (
                isinstance(assigned, ast.Assign)
                and ast.unparse(assigned.targets[0]) == name
                and isinstance(then, ast.Expr)
                and isinstance(then.value, ast.Constant)
            ):
                return inspect.cleandoc(str(then.value.value))
    raise ExtensionError(f"{name} has no docstring after it.")


def described(name: str, value: object) -> list[str]:
    """Returns the lines of reStructuredText that document one name."""
    if inspect.isclass(value):
        return [f".. autoclass:: {name}"]
    if not is_data(value):
        return [f".. autofunction:: {name}"]
    lines = rst(docstring(name, value).splitlines())
    return [f".. py:data:: {name}", "", *(f"   {line}" for line in lines)]


def rst(lines: list[str]) -> list[str]:
    """Turns a docstring into reStructuredText.

    An indented block before the first section is a formula, and is shown as it is;
    elsewhere bars, stars and trailing underscores mean themselves.
    """
    lines = [PLURAL.sub(apart, line) for line in lines]
    out: list[str] = []
    head, block, example = True, False, False
    for i, line in enumerate(lines):
        if SECTION.match(line):
            head, block = False, False
            example = line.strip().startswith("Example")
        indented = line.startswith("    ")
        before_is_blank = i == 0 or not lines[i - 1].strip()
        if head and not block and indented and before_is_blank:
            out += ["::", ""]
            block = True
        elif block and line.strip() and not indented:
            block = False
        if block or example or ">>>" in line:
            out.append(line)
        else:
            out.append(SPECIAL.sub(escaped, line))
    return out


def escaped(match: re.Match[str]) -> str:
    """Escapes what is not between backticks."""
    return match[1] or "\\" + (match[2] or match[3])


def apart(match: re.Match[str]) -> str:
    """Sets code apart from a letter right after it."""
    return match[1] + (f"\\ {match[2]}" if match[2] else "")


def process(app, what, name, obj, options, lines) -> None:
    """Rewrites a docstring in place, before its sections are read."""
    lines[:] = rst(lines)


class Links(SphinxTransform):
    """Links public names in code type to the API."""

    default_priority = 400

    def apply(self, **kwargs) -> None:
        """Wraps every literal that is a public name into a reference."""
        names = {
            f"{prefix}{name}": f"{module}.{name}"
            for module, prefixes in zip(
                MODULES,
                (
                    ("", "fsam.", "fsam_optax."),
                    ("fsam_nnx.", "nnx.", "fsam_optax.nnx."),
                    ("", "variance.", "fsam_optax.variance."),
                ),
                strict=True,
            )
            for prefix in prefixes
            for name in groups()[module]
        }
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext().removesuffix("()")
            inside = literal.parent
            while inside is not None and not isinstance(
                inside, nodes.reference | addnodes.pending_xref | nodes.title
            ):
                inside = inside.parent
            if text not in names or inside is not None:
                continue
            reference = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=names[text],
                refexplicit=True,
                refwarn=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(reference)
            reference += literal


class Cards(SphinxDirective):
    """Cards with a picture: `(picture, title, target, type of the target)` each."""

    def cards(self) -> list[tuple[str, str, str, str]]:
        """Returns what is on the cards."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Returns the grid."""
        lines = ["::::{grid} 1 2 2 3", ":gutter: 3", ""]
        for picture, title, target, kind in self.cards():
            lines += [":::{grid-item-card}", f":link: {target}", f":link-type: {kind}"]
            lines += [f":img-top: {picture}", ":img-alt: "] if picture else []
            lines += ["", title, ":::", ""]
        return parsed(self, [*lines, "::::"])


class Notebooks(Cards):
    """A card for each notebook, with its first picture and its title."""

    def cards(self) -> list[tuple[str, str, str, str]]:
        """Returns the cards of all notebooks."""
        found = []
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            cells = json.loads(path.read_text())["cells"]
            title = "".join(cells[0]["source"]).partition("\n")[0].strip("# ")
            picture = ROOT / "docs" / "_pictures" / f"{path.stem}.png"
            shown = f"_pictures/{picture.name}" if picture.exists() else ""
            found.append((shown, title, f"../notebooks/{path.stem}", "doc"))
        return found


class Figures(Cards):
    """A card for each figure of the pages in `benchmarks/` and `docs/recipes/`."""

    def cards(self) -> list[tuple[str, str, str, str]]:
        """Returns the cards, each linked to the page that shows it."""
        found: dict[str, tuple[str, str, str, str]] = {}
        pages = [
            *sorted((ROOT / "docs" / "recipes").glob("*.md")),
            *sorted((ROOT / "benchmarks").glob("*.md")),
        ]
        for page in pages:
            text = page.read_text()
            for name in FIGURE.findall(text):
                title = text.partition("\n")[0].strip("# ")
                target = "../" + page.relative_to(ROOT).with_suffix("").as_posix()
                picture = f"../benchmarks/figures/{name}"
                found.setdefault(name, (picture, title, target, "doc"))
        return list(found.values())


def parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """Returns what Markdown lines that a directive wrote become."""
    node = nodes.container()
    node.document = directive.state.document
    directive.state.nested_parse(statemachine.StringList(lines, source=""), 0, node)
    return node.children


def thumbnails(app: Sphinx) -> None:
    """Writes the first picture of each notebook to `docs/_pictures`."""
    folder = ROOT / "docs" / "_pictures"
    folder.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pictures = [
            output["data"]["image/png"]
            for cell in json.loads(path.read_text())["cells"]
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        if pictures:
            data = base64.b64decode("".join(pictures[0]))
            target = folder / f"{path.stem}.png"
            if not target.exists() or target.read_bytes() != data:
                target.write_bytes(data)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers all of the above."""
    app.add_directive("names", Names)
    app.add_directive("notebooks", Notebooks)
    app.add_directive("figures", Figures)
    app.add_transform(Links)
    app.connect("builder-inited", check)
    app.connect("builder-inited", thumbnails)
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
