"""Which room may import which, read from the syntax tree; and that importing is cheap."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

import w2s_jax

PACKAGE = Path(w2s_jax.__file__).parent
TOP = {"distributed", "errors"}  # leaves that every room may use

BELOW_SEARCH = {"ops", "models", "text"}
BELOW_EVALUATE = {*BELOW_SEARCH, "search", "train"}
ALLOWED = {
    "ops": set(),
    "text": set(),
    "models": {"ops"},
    "search": BELOW_SEARCH,
    "train": {*BELOW_SEARCH, "search"},
    "evaluate": BELOW_EVALUATE,
    "serve": BELOW_EVALUATE,
    "bench": BELOW_EVALUATE,
    "plan": BELOW_EVALUATE,
    "demo": {*BELOW_EVALUATE, "evaluate"},  # the demo shows gold rewards
    "reasoning": {*BELOW_EVALUATE, "evaluate"},
    "experiments": {*BELOW_EVALUATE, "evaluate", "demo", "reasoning"},
    "cli": {*BELOW_EVALUATE, "evaluate", "serve", "bench", "plan", "demo", "reasoning"},
}

# What is measured beside this package, each in a process of its own.
PEERS = ("bench/peers.py",)
# Libraries that are heavy, or whose types must not spread: where their imports may stand.
HOMES = {
    "transformers": ("models/huggingface.py", "models/gguf.py", "text/", *PEERS),
    "safetensors": ("models/huggingface.py", "models/save.py", "text/"),
    "huggingface_hub": ("models/huggingface.py", "text/"),
    "orbax": ("train/checkpoint.py",),
    "flax": ("models/",),
    "torch": PEERS,
    "lm_eval": ("evaluate/harness.py", "cli/lm_eval.py"),
    "httpx": ("serve/client.py",),
}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def nodes(module: str) -> tuple[ast.AST, ...]:
    """All nodes of a module's syntax tree, and of the stub that lists what a room shows."""
    trees = [ast.parse((PACKAGE / module).read_text())]
    stub = (PACKAGE / module).with_suffix(".pyi")
    if stub.exists():
        trees.append(ast.parse(stub.read_text()))
        for node in ast.walk(trees[-1]):
            if isinstance(node, ast.ImportFrom):
                room = ".".join(["w2s_jax", *Path(module).parts[:-1]])
                node.module, node.level = f"{room}.{node.module}", 0
    return tuple(node for tree in trees for node in ast.walk(tree))


def imports(module: str) -> Iterator[str]:
    """Dotted names a module imports anywhere, also inside functions."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_used(module: str) -> set[str]:
    """The package's modules that one imports anywhere, also for types alone."""
    used = set()
    for name in imports(module):
        path = name.removeprefix("w2s_jax.").replace(".", "/")
        parent = path.rpartition("/")[0]
        found = (f"{path}.py", f"{path}/__init__.py", f"{parent}.py", f"{parent}/__init__.py")
        used.update([one for one in found if name.startswith("w2s_jax.") and one in MODULES][:1])
    return used - {module}


def test_no_file_imports_itself_by_way_of_others():
    """Not even lazily, or for types: then none of them could be read first."""
    left = {module: modules_used(module) for module in MODULES}
    while free := [module for module, used in left.items() if not used & left.keys()]:
        for module in free:
            del left[module]
    assert not left, {module: sorted(used & left.keys()) for module, used in left.items()}


@pytest.mark.parametrize("module", MODULES)
def test_names_with_an_underscore_stay_in_their_file(module):
    known = {
        alias.asname or alias.name
        for node in nodes(module)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("w2s_jax")
        for alias in node.names
    }
    private = [
        f"{node.value.id}.{node.attr}"
        for node in nodes(module)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in known
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    ]
    private += [
        name for name in imports(module) if name.startswith("w2s_jax") and "._" in name
        and "__" not in name
    ]  # fmt: skip
    assert not private, f"{module} reaches for {private}"


def room_of(name: str) -> str:
    """The room of a dotted name inside the package: "w2s_jax.ops.layers" is in "ops"."""
    return name.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if "/" in name])
def test_rooms_import_only_what_is_below_them(module):
    room = module.split("/")[0]
    used = {room_of(name) for name in imports(module) if name.startswith("w2s_jax.")}
    beyond = used - ALLOWED[room] - TOP - {room, "__version__"}
    assert not beyond, f"{module} imports from {sorted(beyond)}"


@pytest.mark.parametrize("module", sorted(TOP))
def test_the_leaves_import_no_room(module):
    used = {room_of(name) for name in imports(f"{module}.py") if name.startswith("w2s_jax.")}
    assert used <= {"errors"}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_homes(module):
    for name in imports(module):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or module.startswith(homes), f"{module} imports {name}"
        assert not name.startswith("flax.nnx"), f"{module} imports {name}"


CHEAP = """
import sys
import w2s_jax
assert w2s_jax.__version__ and dir(w2s_jax)
heavy = {"jax", "flax", "transformers", "orbax", "torch", "datasets"} & set(sys.modules)
assert not heavy, heavy

from w2s_jax import *
assert __version__
from w2s_jax.search import search
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()

from w2s_jax.text.tokenizer import load_tokenizer
load_tokenizer(FOLDER)
# Where torch is installed, AutoTokenizer imports it.
heavy = {"orbax", "torch", "datasets", "transformers.models.auto.tokenization_auto"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_the_package_its_names_and_a_tokenizer_are_cheap(run_python, tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    run_python(f"FOLDER = {str(tmp_path)!r}\n{CHEAP}")


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute nonsense"):
        _ = w2s_jax.nonsense
