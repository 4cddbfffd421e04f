"""The pages of `docs/`: programs run, links lead somewhere, the API is whole."""

import importlib.util
import pathlib
import re
import sys

import jax
import pytest


ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "/_" not in p.as_posix())
TEXTS = [
    *PAGES,
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
# Packages that not everyone has. `make test-slow` has all of them.
OPTIONAL = "equinox flax haiku keras numpyro optimistix orbax".split()

FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def blocks(page):
    """The blocks of Python of a page that are no doctest, and what they print."""
    found = FENCE.findall(page.read_text())
    return [block for block in found if ">>>" not in block[1]]


def name(page):
    return page.relative_to(ROOT).as_posix()


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_printed(expected, printed):
    """The texts are equal, and the numbers in them to the digits that are given."""
    assert NUMBER.split(printed.strip()) == NUMBER.split(expected.strip()), printed
    for want, got in zip(
        NUMBER.findall(expected), NUMBER.findall(printed), strict=True
    ):
        digits = len(want.partition(".")[2])
        assert abs(float(got) - float(want)) <= 1.01 * 10**-digits, printed


PROGRAMS = [page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Of other packages.
@pytest.mark.parametrize("page", PROGRAMS, ids=name)
def test_the_program_of_a_page_runs(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    space = {"__name__": "__main__"}
    printed = ""
    with jax.numpy_rank_promotion("allow"):
        for kind, text in blocks(page):
            if kind == "text":
                assert_printed(text, printed)
                continue
            try:
                exec(compile(text, name(page), "exec"), space)
            except ModuleNotFoundError as error:
                package = (error.name or "").partition(".")[0]
                if package not in OPTIONAL:
                    raise
                pytest.skip(f"{package} is not installed")
            printed = capsys.readouterr().out


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        if "figures/" in target and not (ROOT / "benchmarks" / "figures").exists():
            continue  # The sdist is without them.
        path = page.parent / target
        assert path.exists(), f"{name(page)} links to {target}, which is not there"
        assert ROOT in path.resolve().parents or path.resolve() == ROOT


def test_every_public_name_is_in_one_group_of_the_api():
    pytest.importorskip("flax")
    assert not load(DOCS / "_ext" / "api_groups.py").mistakes()


def test_a_name_in_no_group_or_in_two_is_found(monkeypatch):
    pytest.importorskip("flax")
    api = load(DOCS / "_ext" / "api_groups.py")
    before, found = api.mistakes(), api.groups()
    found["fsam_optax"].remove("sam")
    found["fsam_optax.nnx"] += ["explain", "sam"]
    monkeypatch.setattr(api, "groups", lambda: found)
    assert sorted(set(api.mistakes()) - set(before)) == [
        "fsam_optax.nnx.explain is in 2 groups.",
        "fsam_optax.nnx.sam is in a group, but is not public.",
        "fsam_optax.sam is in 0 groups.",
    ]


def test_the_picture_of_the_house_is_that_of_the_imports():
    house = load(DOCS / "house.py")
    if pathlib.Path(sys.modules["fsam_optax"].__file__).parents[1] != ROOT:
        pytest.skip("the sources are not those that are imported")
    hint = "draw it again: python docs/house.py"
    assert house.picture() == (DOCS / "house.svg").read_text(), hint
    assert not house.circles(), "packages import each other"
