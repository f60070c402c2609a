"""Sizes of modules, functions and argument lists in the package, and the reason for each exception."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

MODULE, FUNCTION, POSITIONAL = 350, 60, 7
STORY = {"runs/fit.py", "runs/loop.py"}  # what a newcomer reads first
STORY_FUNCTION, STORY_POSITIONAL = 50, 6

TRITON = [f"network/kernels/{name}.py" for name in ("pool_norm", "head", "update")]
"""Kernels take pointers, sizes and constants one by one: Triton knows no structures."""

PACKAGE = ROOT / "fastcnn"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def functions(module: str) -> Iterator[tuple[str, int, int]]:
    """Name, lines and positional parameters, self and cls aside, of each function of a module."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            assert node.end_lineno
            yield node.name, node.end_lineno - node.lineno + 1, len(arguments) - (arguments[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module: str) -> None:
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= MODULE
    most, arguments = (STORY_FUNCTION, STORY_POSITIONAL) if module in STORY else (FUNCTION, POSITIONAL)
    for name, lines, positional in functions(module):
        if module in TRITON:
            continue
        assert lines <= most, name
        assert positional <= arguments, name


def test_exceptions_are_needed() -> None:
    for module in TRITON:
        assert any(positional > POSITIONAL for _, _, positional in functions(module)), module
