"""The size budget: files, functions, nesting and parameters small enough to be read.

    python tools/budget.py        prints every violation; exits 1 if there is one

The tests keep to the length of a file only. Commands of click are exempt from the number of
parameters: their options arrive as such.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE, FUNCTION, NESTING, PARAMETERS = 400, 60, 4, 6
CODE = ("quantizers", "formats", "calibration", "converter", "tools")
LENGTH_ONLY = ("tests",)

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


def violations(root: Path) -> Iterator[str]:
    """Everything under a repository's root that is over the budget, one line each."""
    for folder in (*CODE, *LENGTH_ONLY):
        for path in sorted((root / folder).rglob("*.py")):
            if "ns" in path.relative_to(root).parts:  # links to the folders themselves
                continue
            text = path.read_text()
            where = str(path.relative_to(root))
            lines = len(text.splitlines())
            if lines > FILE:
                yield f"{where}: {lines} lines, at most {FILE}"
            if folder in CODE:
                yield from (f"{where}:{found}" for found in in_functions(ast.parse(text, where)))


def in_functions(tree: ast.Module) -> Iterator[str]:
    """What is over the budget in each function, as "line: name: what"."""
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        found = {
            "lines": (lines, FUNCTION),
            "nested blocks": (nesting(node), NESTING),
            "parameters": (0 if is_command(node) else parameters(node), PARAMETERS),
        }
        for what, (count, limit) in found.items():
            if count > limit:
                yield f"{node.lineno}: {node.name}: {count} {what}, at most {limit}"


def nesting(node: ast.AST) -> int:
    """Depth of the deepest block; an elif is as deep as its if; inner functions count alone."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        own = isinstance(child, BLOCKS) and not (is_elif and len(node.orelse) == 1)
        deepest = max(deepest, own + nesting(child))
    return deepest


def parameters(node: Function) -> int:
    """Parameters other than self and cls."""
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(node: Function) -> bool:
    """Whether click calls it: a decorator ends in .command or .group."""
    called = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any(isinstance(d, ast.Attribute) and d.attr in ("command", "group") for d in called)


def main() -> int:
    """Print the violations of this repository."""
    found = list(violations(Path(__file__).parents[1]))
    print("\n".join(found) or "within the budget")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
