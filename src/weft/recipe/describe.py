"""The schema in words: what a key may hold, a commented recipe, the table of all keys, a recipe as YAML."""

from __future__ import annotations

import types
from collections.abc import Iterator
from textwrap import wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from weft.recipe.schema import Recipe, Section

__all__ = ["all_keys", "commented_template", "docs_table", "expected", "section_of", "to_yaml"]

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
_LIMITS: dict[type, tuple[str, str]] = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}


def expected(field: FieldInfo) -> str:
    """What a key may hold, in words."""
    return _type_text(field.annotation, tuple(field.metadata))


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key opens, if it is one."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def all_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key, sections before what is in them, in the order of the schema."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = section_of(field)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.")


def commented_template(*, model: str = "pico", train: str = "train.jsonl") -> str:
    """A recipe with every key at its default, each with its description; what `weft init` writes."""
    recipe = Recipe.model_validate({"base": {"model": model}, "data": {"train": train}})
    head = "# A recipe for `weft tune`. Every key but data.train may be left out: the values shown are the defaults.\n"
    return head + "\n".join(_template_lines(recipe, indent=0)) + "\n"


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every key, such that loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def docs_table() -> str:
    """Every key as a Markdown table."""
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in all_keys():
        if section_of(field) is None:
            default = "(required)" if field.is_required() else f"`{_inline(field.default)}`"
            cells = (f"`{key}`", expected(field), default, field.description or "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _template_lines(section: Section, *, indent: int) -> Iterator[str]:
    space = " " * indent
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        inner = isinstance(value, Section)
        words = (field.description or "") if inner else f"{field.description} ({expected(field)})"
        if indent == 0:
            yield ""
        yield from (f"{space}# {line}" for line in wrap(words, 110 - indent, break_on_hyphens=False))
        if inner:
            yield f"{space}{name}:"
            yield from _template_lines(value, indent=indent + 2)
        else:
            yield f"{space}{name}: {_inline(value)}"


def _inline(value: Any) -> str:
    """A value on one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _type_text(kind: Any, limits: tuple[Any, ...] = ()) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(part, () if part is type(None) else limits) for part in inner)
    if origin is tuple:
        many = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"a list of {many}{_plural(_type_text(inner[0]))}"
    if origin is dict:
        return "a mapping"
    if origin is Annotated:
        parts = [limit for note in kind.__metadata__ for limit in getattr(note, "metadata", [note])]
        return _type_text(inner[0], (*limits, *parts))
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"a section with the keys {', '.join(kind.model_fields)}"
    limits = tuple(limit for limit in limits if type(limit) in _LIMITS)
    return _NAMES[kind] + " and".join(_limit_text(limit) for limit in limits)


def _limit_text(limit: Any) -> str:
    attribute, sign = _LIMITS[type(limit)]
    return f" {sign} {getattr(limit, attribute)}"


def _plural(text: str) -> str:
    return text.replace("a whole number", "whole numbers").replace("a number", "numbers").replace("one of", "any of")
