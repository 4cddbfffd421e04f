"""What is said of versions, tests and targets is so."""

import ast
import importlib.metadata
import pathlib
import re

import pytest
import release

import fsam_optax


ROOT = pathlib.Path(__file__).parents[1]
TESTS = ROOT / "tests"


def names_of_tests():
    """Returns the names of the tests in each file, read and not imported."""
    return {
        path.name: {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for path in TESTS.glob("test_*.py")
    }


def promised(text):
    """Yields the names in the last column of each table whose title has `test` in it.

    Within a cell, `_what_follows` stands for the name before it with another end.
    """
    column = None
    for line in text.splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            column = None
        elif column is None:
            column = "test" in cells[-1]
        elif column:
            yield from re.findall(r"`((?:test)?_\w+(?:\.py)?\*?)`", cells[-1])


def missing(text, files):
    """Returns the promised tests that do not exist."""
    names = set().union(*files.values())
    absent, before = [], ""
    for name in promised(text):
        if name.endswith(".py"):
            if name not in files:
                absent.append(name)
            continue
        if name.startswith("_"):
            # An end: some test must be named as the one before it is, up to there.
            starts = {before[: i + 1] for i, x in enumerate(before) if x != "_"}
            wanted = tuple(start + name.rstrip("*") for start in starts)
            found = [n for n in names if n.startswith(wanted)]
        else:
            before = name
            found = [n for n in names if n.startswith(name.rstrip("*"))]
        if not found:
            absent.append(name)
    return absent


def test_every_promised_test_exists():
    text = (ROOT / "PROMISES.md").read_text()
    assert len(list(promised(text))) > 40
    assert missing(text, names_of_tests()) == []


def test_a_promised_test_that_does_not_exist_is_found():
    files = {"test_x.py": {"test_fault_01_zero", "test_fault_03_nan", "test_sum"}}
    table = "| what | test |\n|---|---|\n| a promise | {} |\n"
    for cell in (
        "`test_fault_01`, `_03`",
        "`test_fault_01_zero`, `_03_nan`",
        "`test_x.py`: `test_fault_0*`",
        "`make modes`, with `constraints/oldest.txt`",
    ):
        assert missing(table.format(cell), files) == [], cell
    for cell, absent in (
        ("`test_fault_02`", "test_fault_02"),
        ("`test_fault_01`, `_04`", "_04"),
        ("`test_y.py`: `test_sum`", "test_y.py"),
        ("`test_product`", "test_product"),
    ):
        assert missing(table.format(cell), files) == [absent], cell


def test_the_version_is_that_of_what_is_installed():
    assert fsam_optax.__version__ == importlib.metadata.version("fsam_optax")
    assert fsam_optax.__version__ == release.version()
    # Nothing else names it that could disagree.
    assert not re.search(r"^(version|date-released):", citation(), re.MULTILINE)


def citation():
    return (ROOT / "CITATION.cff").read_text()


CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2030-01-31\n\n- A.\n"


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "expected"),
    [
        ("v1.2.0", "1.2.0", CHANGELOG, []),
        ("v1.2.1", "1.2.0", CHANGELOG, ["The tag v1.2.1"]),
        ("1.2.0", "1.2.0", CHANGELOG, ["The tag 1.2.0"]),
        ("v1.3.0", "1.3.0", CHANGELOG, [r"begin with \[1.3.0\]"]),
        (
            "v1.2.0",
            "1.2.0",
            CHANGELOG.replace("ed]\n", "ed]\n\n- B.\n"),
            ["under.*Unre"],
        ),
        ("v1.2.0", "1.2.0", CHANGELOG.replace(" - 2030-01-31", ""), ["must begin"]),
        ("v1.2.0", "1.2.0", "", ["must begin .* not nothing"]),
    ],
)
def test_what_keeps_a_version_from_being_released(tag, version, changelog, expected):
    found = release.problems(tag, version, changelog)
    assert len(found) == len(expected)
    for sentence, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, sentence)


def test_the_workflows_call_targets_that_exist():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not workflows:
        pytest.skip("The workflows are not in the sdist.")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    called = set()
    for path in workflows:
        for words in re.findall(r"(?:run: make|targets:) ([^,\n]+)", path.read_text()):
            called |= {w for w in words.split() if re.fullmatch(r"[\w-]+", w)}
    assert {"check", "test", "test-slow", "release-check", "wheel-test"} <= called
    assert called <= targets
