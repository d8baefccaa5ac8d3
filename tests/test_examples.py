"""Every public name has an example in its docstring, and every example does what it says."""

import doctest
import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

MODULES = ["dd", "dd.data", "dd.trials", "dd.experiments.models", "dd.theory.state_evolution"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def methods(owner: type) -> Iterator[tuple[str, Any]]:
    """What a class of ours defines for its users to call, inherited from ours or not."""
    for name, value in inspect.getmembers_static(owner):
        definition = next(base for base in owner.__mro__ if name in vars(base))
        called = isinstance(value, classmethod | staticmethod) or inspect.isfunction(value)
        if called and not name.startswith("_") and definition.__module__.partition(".")[0] == "dd":
            yield name, getattr(owner, name)


def public() -> Iterator[tuple[str, Any]]:
    """Functions, classes and their methods, each where it is first named; the rest are tables."""
    seen = set()
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value) or id(value) in seen:
                continue
            seen.add(id(value))
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for method, function in methods(value):
                    yield f"{module.__name__}.{name}.{method}", function


PUBLIC = dict(public())


def examples(name: str, value: Any, names: dict[str, Any]) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", PUBLIC)
def test_example_does_what_it_says(name, doctest_namespace, tmp_path, monkeypatch):
    found = examples(name, PUBLIC[name], doctest_namespace)
    assert found, f"{name} has no example in its docstring"
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failed = doctest.DocTestRunner(optionflags=FLAGS).run(found[0], out=said.append)
    assert failed.failed == 0, "".join(said)


def test_wrong_example_is_found():
    def half():
        """Halve one.

        >>> 1 / 2
        1
        """

    (test,) = examples("half", half, {})
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None).failed == 1
