"""Whether a tag, the version and the changelog agree: `make release-check TAG=v1.2.3`.

The version is written once, as `__version__`. The build reads it there, a checkout that
is not installed has it, and CITATION.cff leaves it out.
"""

import pathlib
import re
import sys


ROOT = pathlib.Path(__file__).parents[1]


def problems(tag, version, changelog):
    """Returns what keeps a version from being released, as a list of sentences."""
    found = []
    if tag != f"v{version}":
        found.append(f"The tag {tag} is not v{version}, the version of the package.")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    unreleased, released = [], []
    for section in sections:
        title, _, body = section.partition("\n")
        (unreleased if title == "[Unreleased]" else released).append((title, body))
    if any(body.strip() for _, body in unreleased):
        found.append("CHANGELOG.md has changes under [Unreleased].")
    newest = released[0][0] if released else "nothing"
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", newest):
        found.append(
            f"CHANGELOG.md must begin with [{version}] - YEAR-MONTH-DAY, not {newest}."
        )
    return found


def version():
    """Returns the version that the package declares."""
    source = (ROOT / "fsam_optax" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Which tag? make release-check TAG=v1.2.3")
    sys.exit(
        "\n".join(problems(sys.argv[1], version(), (ROOT / "CHANGELOG.md").read_text()))
        or None
    )
