"""A recipe file and its overrides to a Recipe; whatever is wrong is a sentence with the file, the line and the key."""

from __future__ import annotations

import dataclasses
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from weft.errors import DataError, RecipeError, nearest
from weft.files import find
from weft.recipe.combinations import expanded
from weft.recipe.describe import all_keys, expected, section_of
from weft.recipe.schema import Recipe, Section

__all__ = ["load_recipe", "resolve_method"]

_SHORT = {"base": "model", "data": "train", "method": "name"}  # `base: pico` is short for `base: {model: pico}`
_PATH_KEYS = (("data", "train"), ("data", "validation"), ("data", "test"), ("forgetting", "data"))

_KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number: PyYAML reads YAML 1.1, where an exponent needs a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where keys come from, for messages: the file, the line of each dotted key, and the keys that overrides set."""

    file: str
    lines: Mapping[str, int]
    overridden: frozenset[str]

    def place(self, key: str) -> str:
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.overridden:
                return f"override {key}"
            if prefix in self.lines:
                return f"{self.file}:{self.lines[prefix]}: {key}"
        below = any(changed.startswith(f"{key}.") for changed in self.overridden)
        return f"override {key}" if below else f"{self.file}: {key}"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with overrides of the form `train.steps=10` (the value is YAML) on top.

    Data paths are relative to the recipe's folder, those in overrides and `output` to the working directory; all come
    out absolute. Raises RecipeError with the file, line, key, what was found and what is expected.
    """
    file = Path(path)
    raw, lines = _parse(file)
    raw = _with_full_paths(_expanded(raw), file.parent)
    changed = [_override(raw, text) for text in overrides]
    raw["output"] = _output(raw.get("output"), file)
    source = _Source(str(path), lines, frozenset(changed))
    try:
        recipe = Recipe.model_validate(expanded(raw))
    except ValidationError as error:
        raise RecipeError(_report(error, source)) from None
    _check_files(recipe, source)
    return recipe


def resolve_method(method: Mapping[str, Any], known: Mapping[str, type]) -> Any:
    """The recipe's `method` as an instance of the class of that name; each class is a dataclass of hyper-parameters."""
    from weft.registry import as_declared  # not above: reading a recipe takes no torch

    values = {key: value for key, value in method.items() if key != "name"}
    name = method["name"]
    if name not in known:
        raise RecipeError(f"method.name: there is no method '{name}'; {nearest(name, known)}")
    fields = [field.name for field in dataclasses.fields(known[name]) if field.init]
    for key in values:
        if key not in fields:
            raise RecipeError(f"method.{key}: {name} has no such hyper-parameter; {nearest(key, fields)}")
    try:
        return known[name](**as_declared(known[name], values))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method: {name} does not take {values}: {error}") from error


def _parse(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [item.name for item in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        hint = nearest(file.name, beside) if beside else "`weft init` writes one"
        raise RecipeError(f"there is no recipe at {file}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, _Loader)
        raw = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file} holds {_found(raw)}; a recipe is a mapping of keys, see `weft init`")
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, file, seen=set())
    return raw, lines


def _collect_lines(node: yaml.MappingNode, prefix: str, lines: dict[str, int], file: Path, *, seen: set[int]) -> None:
    """The line of every dotted key; a key that is written twice is an error (YAML would keep the last)."""
    seen.add(id(node))  # an alias is the node that it names, and may stand inside of it
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}" if isinstance(key_node, yaml.ScalarNode) else f"{prefix}?"
        line = key_node.start_mark.line + 1
        if key in lines:
            raise RecipeError(f"{file}:{line}: {key} is written twice, first on line {lines[key]}")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and id(value_node) not in seen:
            _collect_lines(value_node, f"{key}.", lines, file, seen=seen)


def _expanded(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {_SHORT[key]: value} if key in _SHORT and isinstance(value, str) else value for key, value in raw.items()
    }


def _with_full_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy in which data paths are absolute; a base that starts with a dot is a folder and is treated alike."""
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    for section, key in _PATH_KEYS:
        if isinstance(raw.get(section), dict) and key in raw[section]:
            raw[section][key] = _full(raw[section][key], folder)
    if isinstance(raw.get("start"), str):
        raw["start"] = _full(raw["start"], folder)
    base = raw.get("base")
    if isinstance(base, dict) and str(base.get("model")).startswith((".", "~")):
        base["model"] = _full(base["model"], folder)
    return raw


def _full(value: Any, folder: Path) -> Any:
    if isinstance(value, str) and value:
        # not resolve(): that follows links, and the files that a hub's cache links to have no suffix
        return os.path.abspath(folder / Path(value).expanduser())  # noqa: PTH100
    return [_full(item, folder) for item in value] if isinstance(value, list) else value


def _output(value: Any, file: Path) -> Any:
    return _full(f"runs/{file.stem}" if value is None else value, Path.cwd())


def _override(raw: dict[str, Any], text: str) -> str:
    """Set one override in `raw`; its dotted key comes back."""
    key, separator, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"the override '{text}' is not of the form key=value, as in train.steps=100")
    try:
        value = yaml.load(value_text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"the value of the override '{text}' is not YAML: {' '.join(str(error).split())}") from error
    if len(parts) == 1 and parts[0] in ("base", "data") and isinstance(value, str):
        parts.append(_SHORT[parts[0]])  # `base=other` changes the model and leaves dtype and the rest
    tree: Any = value
    for part in reversed(parts):
        tree = {part: tree}
    tree = _with_full_paths(_expanded(tree), Path.cwd())
    target = raw
    for part in parts[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target, tree = target[part], tree[part]
    target[parts[-1]] = tree[parts[-1]]
    return ".".join(parts)


def _report(error: ValidationError, source: _Source) -> str:
    sentences: dict[str, str] = {}  # one per key: a union reports each of its members
    for item in error.errors():
        key, sentence = _sentence(item["type"], [str(part) for part in item["loc"]], item["input"], item["msg"])
        sentences.setdefault(key, f"{source.place(key)}: {sentence}")
    return "\n".join(sentences.values())


def _sentence(kind: str, path: list[str], value: Any, message: str) -> tuple[str, str]:
    """The dotted key that an error is about, and what is wrong with it."""
    section: type[Section] | None = Recipe
    known: list[str] = []
    for depth, part in enumerate(path):
        assert section is not None
        known = list(section.model_fields)
        if part not in section.model_fields:
            return ".".join(path[: depth + 1]), f"there is no such key; {_nearest_key(part, known)}"
        field = section.model_fields[part]
        inner, key = section_of(field), ".".join(path[: depth + 1])
        if inner is None or depth == len(path) - 1:
            if kind == "missing":
                return key, f"is missing; expected {expected(field)}"
            if kind == "value_error":
                told = message.removeprefix("Value error, ")
                # a whole section is in the recipe to be read; its keys do not go together
                return key, told if isinstance(value, dict) else f"found {_found(value)}: {told}"
            close = f"; {nearest(value, _choices(field))}" if isinstance(value, str) and _choices(field) else ""
            return key, f"found {_found(value)}, expected {expected(field)}{close}"
        section = inner
    return ".".join(path) or "recipe", message.removeprefix("Value error, ")


def _nearest_key(name: str, known: Iterable[str]) -> str:
    """The nearest key of this section, or the one of that very name in another."""
    elsewhere = [key for key, _ in all_keys() if key.rpartition(".")[2] == name and "." in key]
    return f"did you mean '{elsewhere[0]}'?" if elsewhere else nearest(name, known)


def _choices(field: Any) -> list[str]:
    text = expected(field).removesuffix(" or null")
    return text.removeprefix("one of ").split(", ") if text.startswith("one of ") else []


def _found(value: Any) -> str:
    kinds = {
        str: "text",
        bool: "true/false",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
    }
    return "nothing" if value is None else f"{value!r} ({kinds.get(type(value), type(value).__name__)})"


def _check_files(recipe: Recipe, source: _Source) -> None:
    for section, key in _PATH_KEYS:
        paths = getattr(getattr(recipe, section), key, None)
        for path in [paths] if isinstance(paths, str) else paths or ():
            try:
                find(path)
            except DataError as error:
                raise RecipeError(f"{source.place(f'{section}.{key}')}: {error}") from None
