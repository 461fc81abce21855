"""The rules of the house that a program can see: functions from a source file to sentences about what is wrong with it.

CONTRIBUTING.md says why they are there; test_house.py runs them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src/weft", "tests", "scripts", "benchmarks", "examples")

# Imports point down this list, never up. "weft" is the package's own front: the command line may use the public names.
ROOMS = (
    *("__main__", "cli", "weft", "serve", "store", "compare"),
    *("merged", "joined", "combined", "searching", "coefficients", "own_data", "compressed", "extracting"),
    *("tune", "report", "plan", "merging"),
    *("gate", "parity", "capabilities", "checks", "objectives", "data", "cost", "generation", "diagnosis", "reopen"),
    *("checkpoints", "base", "classifier", "optim", "conflict", "library"),
    *("compressing", "aligning", "tangent", "combining", "differences"),
    "combine",
    *("reshape", "adaptive", "joining", "changing", "interop", "adapter", "attach", "conditions", "fresh", "calibrate"),
    *("compress", "targets", "patterns", "quantise", "kinds", "recipe", "registry", "methods", "routers", "core"),
    *("segments", "files", "borrowed", "units", "collector"),
    "errors",
)
ANYWHERE = {"weft.__version__"}  # a constant, bound before anything is imported

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_METHOD_LINES = 400, 50, 60
METHOD_MAY_IMPORT = (
    "weft.core",
    "weft.errors",
    "torch",
    "dataclasses",
    "math",
    "typing",
    "collections.abc",
    "__future__",
)
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
HUB_CALLS = {"snapshot_download", "hf_hub_download"}
HUB_SWITCHES = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
HOLDS_THE_SWITCHES = {"tests/conftest.py", "tests/house.py", "tests/test_house.py"}


@dataclass(frozen=True)
class Source:
    """One file of the project: where it stands (posix, from the root) and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """`weft.kinds.seat`; a package's `__init__.py` is the package."""
        return self.path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str | None:
        """The room in src/weft that it stands in; None for a file elsewhere."""
        if not self.path.startswith("src/weft/"):
            return None
        return "weft" if self.module == "weft" else self.module.split(".")[1]

    @property
    def is_method(self) -> bool:
        return self.path.startswith("src/weft/methods/") and not self.path.endswith("__init__.py")

    def imports(self) -> Iterator[tuple[str, int]]:
        """Every imported module or name in full with its line, lazy imports and literal import_module included."""
        package = self.module.split(".") if self.path.endswith("__init__.py") else self.module.split(".")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)
            elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "import_module" and node.args:
                if isinstance(node.args[0], ast.Constant):
                    yield str(node.args[0].value), node.lineno

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        yield from (n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def room_of(module: str) -> str:
    """The room of `weft.<room>...`; a name in the package's own front (`weft.LoRA`) is in the room "weft"."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "weft"
    is_room = name in ROOMS or (ROOT / "src/weft" / name).is_dir() or (ROOT / "src/weft" / f"{name}.py").is_file()
    return name if is_room else "weft"


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@cache
def sources() -> list[Source]:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


# The rules. ----------------------------------------------------------------------------------------------------------


def imports_point_down(source: Source) -> Iterator[str]:
    if source.room is None:
        return
    if source.room not in ROOMS:
        yield f"{source.path}: room {source.room!r} is not on the list of rooms (ROOMS in tests/house.py)"
        return
    here = ROOMS.index(source.room)
    for name, line in source.imports():
        if is_within(name, ("weft",)) and name not in ANYWHERE:
            there = room_of(name)
            if there not in ROOMS or ROOMS.index(there) < here:
                yield f"{source.path}:{line}: {source.room} imports {name}, and {there} is not below it"


def says_what_it_is(source: Source) -> Iterator[str]:
    first = source.tree.body[0] if source.tree.body else None
    if ast.get_docstring(source.tree) is None or first is None or first.lineno != 1:
        yield f"{source.path}: the first line is not a docstring that says what the file is"


def is_short(source: Source) -> Iterator[str]:
    limit = MAX_METHOD_LINES if source.is_method else MAX_FILE_LINES
    if (lines := source.text.count("\n")) > limit:
        yield f"{source.path}: {lines} lines, at most {limit}"
    if source.room is None:
        return
    for function in source.functions():
        docstring = function.body[0].end_lineno if ast.get_docstring(function) is not None else function.lineno
        if (lines := function.end_lineno - docstring) > MAX_FUNCTION_LINES:
            yield f"{source.path}:{function.lineno}: {function.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def method_knows_only_core(source: Source) -> Iterator[str]:
    if not source.is_method:
        return
    for name, line in source.imports():
        if not is_within(name, METHOD_MAY_IMPORT) or (is_within(name, ("torch.nn",)) and not is_functional(name)):
            allowed = ", ".join(METHOD_MAY_IMPORT)
            yield f"{source.path}:{line}: a method imports {name}; it may import {allowed}, and no layer"
    for node in ast.walk(source.tree):
        name = dotted(node)
        if name.startswith(("torch.nn.", "torch.cuda.")) and not is_functional(name):
            yield f"{source.path}:{node.lineno}: a method uses {name}; layers and devices are for kinds and readings"


def is_functional(name: str) -> bool:
    """A pure function of torch.nn, or the package on the way to it."""
    return name == "torch.nn.functional" or name.startswith("torch.nn.functional.")


def core_knows_only_torch(source: Source) -> Iterator[str]:
    if source.room == "core":
        for name, line in source.imports():
            if name.split(".")[0] not in {"torch", *sys.stdlib_module_names} and not is_within(
                name, ("weft.core", "weft.errors")
            ):
                yield f"{source.path}:{line}: core imports {name}; it may import torch and the standard library"


def kinds_name_no_method(source: Source) -> Iterator[str]:
    if source.room == "kinds":
        yield from (
            f"{source.path}:{line}: a kind imports {name}; what is used never knows which method adapts it"
            for name, line in source.imports()
            if is_within(name, ("weft.methods",))
        )


def no_pickles(source: Source) -> Iterator[str]:
    if source.room is None:
        return
    for name, line in source.imports():
        if name.split(".")[0] in PICKLES or name in PICKLING_CALLS:
            yield f"{source.path}:{line}: imports {name}; tensors on disk are safetensors, the rest is JSON"
    for node in ast.walk(source.tree):
        if dotted(node) in PICKLING_CALLS:
            yield f"{source.path}:{node.lineno}: uses {dotted(node)}; tensors on disk are safetensors, the rest is JSON"
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and getattr(node.value, "value", None) is not False
        ):
            yield f"{source.path}:{node.value.lineno}: allow_pickle may only be False"


def no_open_ended_signature(source: Source) -> Iterator[str]:
    if source.room in {None, "kinds", "conditions"}:  # called as the module that is adapted; names that are the user's
        return
    for owner, function in public_functions(source.tree):
        if function.args.kwarg:
            where = f"{owner}.{function.name}" if owner else function.name
            yield f"{source.path}:{function.lineno}: {where} takes **{function.args.kwarg.arg}; name its options"


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions, and public methods and constructors of public classes, each with its class's name or ""."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for part in node.body:
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    if part.name in {"__init__", "__call__"} or not part.name.startswith("_"):
                        yield node.name, part
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield "", node


def reaches_no_hub(source: Source) -> Iterator[str]:
    if not source.path.startswith("tests/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in HUB_CALLS:
            yield f"{source.path}:{node.lineno}: {dotted(node.func)} in a test; use what is bundled"
        if isinstance(node, ast.Constant) and node.value in HUB_SWITCHES and source.path not in HOLDS_THE_SWITCHES:
            yield f"{source.path}:{node.lineno}: touches {node.value}, which tests/conftest.py holds"


def what_is_taken(files: list[Source]) -> Iterator[tuple[str, str, str]]:
    """Every `from weft.room import name` in src: the room's front, the name, and where it is taken."""
    for source in files:
        for name, line in source.imports() if source.room else ():
            front, _, taken = name.rpartition(".")
            if is_within(front, ("weft",)) and not is_module(name) and not is_within(source.module, (front,)):
                yield front, taken, f"{source.path}:{line}"


def is_module(name: str) -> bool:
    path = ROOT / "src" / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def defined_in(source: Source) -> set[str]:
    """Public functions, classes and constants that a file's own top level defines, also under an `if` or `try`."""
    names: set[str] = set()
    for node in top_level(source.tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from top_level(node.body + node.orelse)
