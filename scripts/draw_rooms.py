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


def rooms(package: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """What every room is for, by its docstring's first line, and the rooms that it imports."""
    purpose: dict[str, str] = {}
    imported: dict[str, set[str]] = {}
    names = {
        path: ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in sorted(package.rglob("*.py"))
    }
    modules = {name.removesuffix(".__init__") for name in names.values()}
    for path, name in names.items():
        tree, own = (
            ast.parse(path.read_text(encoding="utf-8")),
            room(name.removesuffix(".__init__")),
        )
        if name.removesuffix(".__init__") == own:
            purpose[own] = (ast.get_docstring(tree) or "").partition("\n")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = {f"{node.module}.{alias.name}" for alias in node.names} & modules
                targets = targets or {node.module} & modules
            elif isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names} & modules
            else:
                continue
            imported.setdefault(own, set()).update(map(room, targets))
    return purpose, {name: imported.get(name, set()) - {name} for name in purpose}


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
