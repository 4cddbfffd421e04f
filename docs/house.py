"""Draws the packages of the library and their imports: `python docs/house.py`.

The picture is `docs/house.svg`. A test compares it with what this makes of the sources.
"""

import ast
import html
import pathlib


ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ROOT / "fsam_optax"
WIDTH, GAP, LINE = 300, 36, 17


def rooms() -> dict[str, list[pathlib.Path]]:
    """Returns the packages and public modules, each with its files."""
    found = {}
    for path in sorted(SOURCES.iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            found[path.name] = sorted(path.glob("*.py"))
        elif path.suffix == ".py" and path.name != "__init__.py":
            found[path.stem] = [path]
    return found


def imported(path: pathlib.Path) -> set[str]:
    """Returns the packages and public modules that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "fsam_optax":
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
    return found


def arrows() -> dict[str, set[str]]:
    """Returns what each package imports from."""
    files = rooms()
    return {
        room: {to for path in paths for to in imported(path)} & set(files) - {room}
        for room, paths in files.items()
    }


def circles() -> list[str]:
    """Returns the packages that import themselves by way of others."""
    found = arrows()
    return [room for room in found if room in below(room, found)]


def below(room: str, found: dict[str, set[str]]) -> set[str]:
    """Returns all that a package imports from, directly or not."""
    seen: set[str] = set()
    todo = set(found[room])
    while todo:
        seen |= todo
        todo = {to for room in todo for to in found[room]} - seen
    return seen


def storeys(found: dict[str, set[str]]) -> list[list[str]]:
    """Returns the packages from the top storey on: each is under all that use it."""
    users = {room: {user for user in found if room in found[user]} for room in found}
    level: dict[str, int] = {}
    while len(level) < len(found):
        for room in sorted(set(found) - set(level)):
            if users[room] <= set(level):
                level[room] = 1 + max((level[user] for user in users[room]), default=-1)
    return [
        sorted(room for room in found if level[room] == i)
        for i in range(1 + max(level.values()))
    ]


def summary(room: str) -> str:
    """Returns the first line of a docstring."""
    path = SOURCES / room / "__init__.py"
    path = path if path.exists() else SOURCES / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].replace("`", "")


def wrapped(words: list[str], width: int, sep: str = " ") -> list[str]:
    """Returns the words in lines of at most `width` characters."""
    lines = [""]
    for word in words:
        line = f"{lines[-1]}{sep}{word}" if lines[-1] else word
        if len(line) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = line
    return lines


def picture() -> str:
    """Returns the picture as SVG. Arrows that follow from others are left out."""
    files, found = rooms(), arrows()
    floors = storeys(found)
    straight = {
        room: targets - {to for via in targets for to in below(via, found)}
        for room, targets in found.items()
    }
    width = max(len(floor) for floor in floors) * (WIDTH + GAP) + GAP
    boxes, out, y = {}, [], 30
    for floor in floors:
        texts = {
            room: (
                wrapped(summary(room).split(), 42),
                wrapped([p.stem for p in files[room] if p.stem != "__init__"], 40, ", ")
                if len(files[room]) > 1
                else [],
            )
            for room in floor
        }
        lines = [LINE * (len(a) + len(b)) + 8 * bool(b) for a, b in texts.values()]
        height = 44 + max(lines)
        left = (width - len(floor) * (WIDTH + GAP) + GAP) / 2
        over = [boxes[user][0] for user in boxes if floor[0] in straight[user]]
        if len(floor) == 1 and over:
            left = sum(over) / len(over)
        for i, room in enumerate(floor):
            x = left + i * (WIDTH + GAP)
            boxes[room] = (x, y, height)
            out += [
                f'<rect x="{x:g}" y="{y}" width="{WIDTH}" height="{height}" rx="6" '
                'fill="#eef3f8" stroke="#4878a8"/>',
                f'<text x="{x + 12:g}" y="{y + 24}" font-size="15" font-weight="bold">'
                f"{room}</text>",
            ]
            line = y + 44
            for kind, lines in zip(("#222", "#567"), texts[room], strict=True):
                for text in lines:
                    out.append(
                        f'<text x="{x + 12:g}" y="{line}" fill="{kind}">'
                        f"{html.escape(text)}</text>"
                    )
                    line += LINE
                line += 8
        y += height + 46
    for room, targets in sorted(straight.items()):
        for to in sorted(targets):
            x, top, height = boxes[room]
            u, v, _ = boxes[to]
            out.append(
                f'<line x1="{x + WIDTH / 2:g}" y1="{top + height}" '
                f'x2="{u + WIDTH / 2:g}" y2="{v - 7}" stroke="#888" stroke-width="1.5" '
                'marker-end="url(#head)"/>'
            )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y - 16}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">\n'
        '<marker id="head" markerWidth="9" markerHeight="8" refX="3" refY="4" '
        'orient="auto"><path d="M0,0 L9,4 L0,8 z" fill="#888"/></marker>\n'
        f'<rect width="{width}" height="{y - 16}" fill="#fff"/>\n'
    )
    return head + "\n".join(out) + "\n</svg>\n"


if __name__ == "__main__":
    (ROOT / "docs" / "house.svg").write_text(picture())
