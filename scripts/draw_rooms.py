"""Draw which rooms of ``dd/`` there are and what they import; CONTRIBUTING.md holds the picture.

``python scripts/draw_rooms.py`` prints it, top floor first. An import that others imply (of a
room that lies further down the same stairs) is left out.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dd"


def room(module: str) -> str:
    """The folder, or the file beside the folders, that a module of ``dd`` belongs to."""
    return ".".join(module.split(".")[:2])


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its name, and its file."""
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
    }
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def arrows(package: Path) -> dict[str, set[str]]:
    """Every module of a package, and those that it imports, in functions and for its types too.

    Raises:
        ValueError: if one imports relatively, so that its file alone does not tell what.
    """
    files = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                if node.level or node.module is None:
                    raise ValueError(f"{name} imports relatively")
                own = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= own & set(files) or {node.module}
        found[name] = (targets & set(files)) - {name}
    return found


def rooms(package: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """What every room is for, by its docstring's first line, and the rooms that it imports."""
    trees = {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in modules(package).items()
        if name == room(name)
    }
    purpose = {
        name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items()
    }
    imported: dict[str, set[str]] = {name: set() for name in purpose}
    for name, targets in arrows(package).items():
        imported[room(name)] |= set(map(room, targets)) - {room(name)}
    return purpose, imported


def floors(imported: Mapping[str, set[str]]) -> dict[str, int]:
    """Number of rooms on the longest way down from each."""
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = max((floor(below) + 1 for below in imported[name]), default=0)
        return found[name]

    for name in imported:
        floor(name)
    return found


def stairs(imported: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports that no others imply."""

    def below(name: str) -> set[str]:
        return imported[name].union(*map(below, imported[name]))

    return {
        name: targets - set[str]().union(*map(below, targets)) for name, targets in imported.items()
    }


def picture(package: Path) -> str:
    """The floors from the top, a line a room: its name, what it is for, the rooms below it."""
    purpose, imported = rooms(package)
    floor, steps = floors(imported), stairs(imported)
    order = sorted(purpose, key=lambda name: (-floor[name], name))
    lines = []
    for name in order:
        below = ", ".join(sorted(map(_short, steps[name])))
        lines.append(f"{floor[name]:>2}  {_short(name):<12} {purpose[name]}")
        if below:
            lines.append(f"{'':<17}└─> {below}")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.removeprefix("dd.")


if __name__ == "__main__":
    print(picture(PACKAGE))
