"""Shapes and dtypes of annotations hold at every call while tests run.

jaxtyping's own import hook wraps every function and class of a package, and those that speak of no
array are most: a tenth of the suite's time, for what mypy says without running anything.
"""

import ast
import functools
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "w2s_jax"
OF_ARRAYS = re.compile(rb"jaxtyping|\bLogprobs\b")
"""What a module holds that annotates arrays: the library's name, or the losses' alias."""


def check_shapes() -> None:
    """From here on modules of the package are imported with their array annotations checked.

    Raises RuntimeError where some are imported already.
    """
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} is imported already: its annotations would go unchecked")
    sys.meta_path.insert(0, _Finder())


def checked(made: Any) -> Any:
    """A function or dataclass that is checked, where its annotations speak of arrays."""
    annotations = getattr(made, "__annotations__", {}).values()
    if not any(map(_of_array, annotations)):
        return made
    if isinstance(made, type):
        made.__init__ = _unless_rebuilt(made.__init__)
        return made
    return jaxtyped(made, typechecker=beartype)


def _unless_rebuilt(init: Callable[..., None]) -> Callable[..., None]:
    """`init` checked, but where jax rebuilds a pytree: with placeholders, or under another axis."""
    strict = jaxtyped(init, typechecker=beartype)

    @functools.wraps(init)
    def choose(self: Any, *args: Any, **kwargs: Any) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        (init if caller.partition(".")[0] == "jax" else strict)(self, *args, **kwargs)

    return choose


def _of_array(annotation: Any) -> bool:
    if isinstance(annotation, list):  # the arguments of a Callable
        return any(map(_of_array, annotation))
    is_array = isinstance(annotation, type) and issubclass(annotation, AbstractArray)
    return is_array or any(map(_of_array, get_args(annotation)))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        source = self.get_data(self.path)
        if not OF_ARRAYS.search(source):
            return super().get_code(fullname)
        # Not by way of the cache of byte code, which is also read where no test runs.
        tree = _Decorate().visit(ast.parse(source, self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Decorate(ast.NodeTransformer):
    """Not functions within functions: code would be generated at every call of the outer one."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        # Innermost, as `jax.jit` and `custom_vjp` give no function.
        node.decorator_list.append(_decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.decorator_list.insert(0, _decorator(node))  # outermost: the finished dataclass
        self.generic_visit(node)
        return node


def _decorator(node: ast.AST) -> ast.expr:
    name = f"__import__({__name__!r}, fromlist=['checked']).checked"
    return ast.copy_location(ast.parse(name, mode="eval").body, node)
