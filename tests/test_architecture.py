"""The rooms of the house: what may import what, and how large anything may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.draw_rooms import arrows, modules, room

REPOSITORY = Path(__file__).parents[1]

# From top to bottom: a room imports from itself and from rooms in lines below its own. Rooms of one
# line do not know each other.
LAYERS = """
    dd.__main__
    dd.experiments
    dd.report
    dd.sweep
    dd.baselines
    dd.runs
    dd.training
    dd.tracking
    dd
    dd.data dd.trials
    dd.theory
    dd.decouple dd.optimizer
    dd.rules
    dd.correction
    dd.watch
    dd.curvature dd.samples
    dd.noise
    dd.functional
    dd.support
"""
MOST_MODULES, MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_POSITIONAL = 25, 400, 60, 6

MODULES = modules(REPOSITORY / "dd")
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
ARROWS = arrows(REPOSITORY / "dd")


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some circle of arrows, or nothing."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(arrows.get(path[-1], ())):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in done and (found := search([*path, target])):
                return found
        done.add(path[-1])
        return []

    return next((found for start in sorted(arrows) if (found := search([start]))), [])


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} == set(LAYERS.split())


def test_arrows_point_downwards():
    floor = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}
    wrong = [
        f"{name} -> {target}"
        for name, targets in ARROWS.items()
        for target in sorted(targets)
        if room(name) != room(target) and floor[room(name)] >= floor[room(target)]
    ]
    assert not wrong


def test_arrows_are_all_imports_and_no_relative_ones(tmp_path):
    package = tmp_path / "p"
    (package / "a").mkdir(parents=True)
    texts = {
        "__init__": "",
        "a/__init__": "import os, p.b",
        "a/c": "def f():\n    from p import b\n    from p.a import NAME\n    from p.a.c import f",
        "b": "if TYPE_CHECKING:\n    from p.a import c",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    found = {"p": set(), "p.a": {"p.b"}, "p.a.c": {"p.a", "p.b"}, "p.b": {"p.a.c"}}
    assert arrows(package) == found
    assert room("p.a.c") == "p.a"
    (package / "b.py").write_text("from . import a")
    with pytest.raises(ValueError, match=r"p\.b imports relatively"):
        arrows(package)


def test_no_module_comes_back_to_itself():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle(ARROWS)


def test_folders_are_small():
    folders = {path.parent for path in MODULES.values()}
    sizes = {str(f.relative_to(REPOSITORY)): len(list(f.glob("*.py"))) for f in folders}
    assert {f: size for f, size in sizes.items() if size > MOST_MODULES} == {}


def test_files_are_short():
    sizes = {name: lines_beside_examples(path.read_text("utf-8")) for name, path in MODULES.items()}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES} == {}


def lines_beside_examples(text: str) -> int:
    """Lines of a file, examples apart, with which docstrings end."""
    return len(re.sub(r'\n\n *Example:\n.*?(?=\n *""")', "", text, flags=re.DOTALL).splitlines())


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def test_functions_are_short():
    sizes = {name: lines_of_code(node) for name, node in functions()}
    assert {n: size for n, size in sizes.items() if size > MOST_LINES_OF_FUNCTION} == {}


def lines_of_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring apart."""
    own = node.body[0]
    documented = isinstance(own, ast.Expr) and isinstance(own.value, ast.Constant)
    assert node.end_lineno is not None
    assert own.end_lineno is not None
    return node.end_lineno - (own.end_lineno if documented else own.lineno - 1)


def test_arguments_are_few_or_named():
    counts = {}
    for name, node in functions():
        given = [argument.arg for argument in node.args.posonlyargs + node.args.args]
        counts[name] = len(given) - (given[:1] in (["self"], ["cls"]))
    assert {n: count for n, count in counts.items() if count > MOST_POSITIONAL} == {}


def test_every_room_says_what_it_is_for():
    inits = [n for n, path in MODULES.items() if path.name == "__init__.py" and n != "dd"]
    rooms = {n: (ast.get_docstring(TREES[n]) or "").split() for n in inits}
    assert [n for n, words in rooms.items() if not {"In:", "Out:"} <= set(words)] == []


def test_import_is_light():
    code = "import dd, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = [sys.executable, "-c", code]
    found = set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())  # noqa: S603
    heavy = "hydra omegaconf jinja2 matplotlib pandas plotly pyarrow rich scipy sklearn torchvision"
    assert found & {*heavy.split(), "wandb", "PIL", "optuna"} == set()
