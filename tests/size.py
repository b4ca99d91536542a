"""Counts of the package: `python -m tests.size [--longest N]`.

Code is every line that is neither blank nor all comment or docstring.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "w2s_jax"
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Size:
    """Lines of a file, and its functions as (lines, name)."""

    lines: int
    code: int
    told: int
    functions: tuple[tuple[int, str], ...]


def size_of(source: str) -> Size:
    """The counts of one file's source; `told` are lines of comments and docstrings."""
    tree = ast.parse(source)
    docstrings = set(_docstring_lines(tree))
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            comments.update(lines)
        elif token.type not in _LAYOUT:
            code.update(lines)
    code -= docstrings
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        ((node.end_lineno or 0) - node.lineno + 1, node.name)
        for node in ast.walk(tree)
        if isinstance(node, functions)
    ]
    told = len((comments - code) | docstrings)
    return Size(source.count("\n"), len(code), told, tuple(found))


def sizes() -> dict[str, Size]:
    """Every file of the package, by its path within it."""
    return {
        str(path.relative_to(PACKAGE)): size_of(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def _docstring_lines(tree: ast.AST) -> Iterator[int]:
    """Lines of texts that stand alone: docstrings, and those of fields."""
    for node in ast.walk(tree):
        body = getattr(node, "body", ())
        for child in body if isinstance(body, list) else ():
            alone = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if alone and isinstance(child.value.value, str):
                yield from range(child.lineno, (child.end_lineno or child.lineno) + 1)


def main() -> None:
    """Print the counts, the longest files and functions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=5, help="files and functions to name")
    longest = parser.parse_args().longest
    found = sizes()
    print(f"{len(found)} files, {sum(size.code for size in found.values())} lines of code,")
    print(f"{sum(size.told for size in found.values())} lines of comments and docstrings")
    files = sorted(((size.lines, name) for name, size in found.items()), reverse=True)
    functions = sorted(
        ((lines, f"{name}: {function}") for name, size in found.items()
         for lines, function in size.functions), reverse=True,
    )  # fmt: skip
    for lines, name in (*files[:longest], *functions[:longest]):
        print(f"{lines:5} {name}")


if __name__ == "__main__":
    main()
