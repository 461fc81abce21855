"""Reading mergekit's configuration files: the same YAML, the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from weft.checkpoints.merge import Made, Part, Recipe, open_weights
from weft.checkpoints.modules import depth_key, split
from weft.checkpoints.stream import Out
from weft.checkpoints.vocabulary import Rows, Vocabulary, has_rows, read_vocabulary, templated
from weft.checkpoints.weights import CheckpointError, Weights
from weft.combine import Rule, rules
from weft.combine.task_vectors import TaskVectors
from weft.errors import nearest
from weft.patterns import layer_of

__all__ = ["read_mergekit"]

_VECTORS = {"lambda": "scale", "normalize": "normalise", "density": "density", "rescale": "rescale"}
# mergekit's name: our rule, what it has by default there, its options' names here
_METHODS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "linear": ("linear", {}, {"normalize": "normalise"}),
    "slerp": ("slerp", {}, {"t": "t"}),
    "nuslerp": ("nuslerp", {}, {"nuslerp_flatten": "by", "nuslerp_row_wise": "by"}),
    "multislerp": ("multislerp", {}, {"normalize_weights": "normalise"}),
    "karcher": ("karcher", {}, {"max_iter": "most_rounds", "tol": "tolerance"}),
    "task_arithmetic": ("task_arithmetic", {}, {"lambda": "scale", "normalize": "normalise"}),
    "ties": ("ties", {"density": 1.0}, _VECTORS),
    "dare_ties": ("dare", {"density": 1.0, "elect": True, "rescale": "l1"}, _VECTORS),
    "dare_linear": ("dare", {"density": 1.0, "rescale": "l1"}, _VECTORS),
    "della": ("della", {"density": 1.0}, {**_VECTORS, "epsilon": "spread"}),
    "della_linear": (
        "della", {"density": 1.0, "elect": False, "normalise": False}, {**_VECTORS, "epsilon": "spread"},
    ),
    "breadcrumbs": ("breadcrumbs", {"density": 1.0}, {**_VECTORS, "gamma": "outliers"}),
    "breadcrumbs_ties": ("breadcrumbs", {"density": 1.0, "elect": True}, {**_VECTORS, "gamma": "outliers"}),
    "sce": ("sce", {}, {"select_topk": "density"}),
    "model_stock": ("model_stock", {}, {"filter_wise": "by_filter"}),
    "nearswap": ("nearswap", {}, {"t": "t"}),
    "arcee_fusion": ("arcee_fusion", {}, {}),
    "ram": ("ram", {}, {"epsilon": "threshold"}),
    "ramplus_tl": ("ram", {"amplify": 0.1}, {"epsilon": "threshold", "r": "amplify", "alpha": "most_shared"}),
    "passthrough": ("passthrough", {}, {"scale": "scale"}),
}  # fmt: skip
_VARIES = {"density": 1.0, "outliers": 0.01, "spread": 0.15}  # options that models may have for themselves
_EMBEDDINGS = ("emb", "wte", "wpe")  # of what stands outside the layers, this comes before them
_KNOWN = {
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
}  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """A run of one model's layers, with settings of its own."""

    model: str
    first: int
    last: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Slice:
    """What one stretch of the result's layers is made of."""

    sources: tuple[_Source, ...]
    settings: Mapping[str, Any]


def read_mergekit(file: str | Path) -> Recipe:
    """The merge that a mergekit file (0.1) describes: models, slices or modules, with gradients, filters, tokenizers.

    Paths of models are read as they stand, from the file's folder on where they are relative and there.
    Raises CheckpointError for a key, a method or a parameter that is not known, and for models that do not fit.
    """
    path = Path(file)
    body = _body(path)
    name = body["merge_method"]
    if name not in _METHODS:
        raise CheckpointError(f"{path}: there is no merge_method {name!r}; {nearest(name, _METHODS)}")
    base = body.get("base_model")
    opened = {model: _open(path, model) for model in _models(body, base)}
    first = base or next(iter(opened))
    dtype = _dtype(path, body.get("out_dtype") or body.get("dtype"))
    config: dict[str, Any] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    vocabulary = read_vocabulary(path, body, base, opened, lambda model: _open(path, model))
    if vocabulary is not None:
        nested = "text_config." * ("vocab_size" in opened[first].config().get("text_config", {}))
        config[f"{nested}vocab_size"] = vocabulary.size
    wanted = [*body["modules"]] if "modules" in body else None
    names = {model: split(wanted, weights) for model, weights in opened.items()}
    made: list[Made] = []
    for module in names[first]:
        definition = body["modules"][module] if "modules" in body else body
        here = {model: parts[module] for model, parts in names.items() if module in parts}
        slices = _slices(path, definition, base, here)
        outer = tuple(d.get("parameters") or {} for d in ([definition, body] if "modules" in body else [body]))
        made += _Planner(path, name, base, outer, opened, here, dtype, vocabulary).made(slices)
        count, key = (
            sum(s.sources[0].last - s.sources[0].first for s in slices),
            depth_key(module, opened[first].config()),
        )
        if key is not None and count != _depth(here[first]):
            config[key] = count
    tokenizer = None if vocabulary is None else vocabulary.tokenizer
    if body.get("chat_template"):
        tokenizer = templated(path, body["chat_template"], tokenizer, opened, first)
    return Recipe(tuple(made), opened[first].folder, config, tokenizer=tokenizer)


def _models(body: Mapping[str, Any], base: str | None) -> list[str]:
    """Every model that the file merges, in its order."""
    found = dict.fromkeys(
        source["model"]
        for definition in ([*body["modules"].values()] if "modules" in body else [body])
        for each in [definition.get("models") or [], *(s["sources"] for s in definition.get("slices") or [])]
        for source in each
    )
    return [*found, *([base] if base is not None and base not in found else [])]


def _body(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict) or "merge_method" not in body:
        raise CheckpointError(f"{path} is no mergekit file: it should be a mapping with a merge_method")
    for key in body:
        if key not in _KNOWN:
            raise CheckpointError(f"{path}: the key {key!r} is not read here; {nearest(key, _KNOWN)}")
    if sum(key in body for key in ("models", "slices", "modules")) != 1:
        raise CheckpointError(f"{path}: one of models, slices and modules is expected")
    for module, definition in (body.get("modules") or {}).items():
        for key in definition:
            if key not in (known := ("models", "slices", "parameters")):
                raise CheckpointError(f"{path}: the module {module} has no key {key!r}; {nearest(key, known)}")
        if ("models" in definition) == ("slices" in definition):
            raise CheckpointError(f"{path}: one of models and slices is expected of the module {module}")
    return body


def _slices(path: Path, body: Mapping[str, Any], base: str | None, names: Mapping[str, Sequence[str]]) -> list[_Slice]:
    """`models` is one slice of all layers; a base that is not among its sources is, as in mergekit, one of them."""
    if "slices" in body:
        return [
            _Slice(tuple(_source(path, s) for s in each["sources"]), each.get("parameters") or {})
            for each in body["slices"]
        ]
    models = [*body["models"]]
    if base is not None and base not in [m["model"] for m in models]:
        models.append({"model": base})
    depth = {m["model"]: _depth(names[m["model"]]) for m in models}
    if len(set(depth.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in depth.items())
        raise CheckpointError(f"{path}: the models differ in their number of layers ({said}): use slices")
    sources = tuple(_Source(m["model"], 0, depth[m["model"]], m.get("parameters") or {}) for m in models)
    return [_Slice(sources, {})]


def _source(path: Path, body: Mapping[str, Any]) -> _Source:
    first, last = body["layer_range"]
    if not 0 <= first < last:
        raise CheckpointError(f"{path}: layer_range {[first, last]} of {body['model']} holds no layer")
    return _Source(body["model"], first, last, body.get("parameters") or {})


def _open(path: Path, model: str) -> Weights:
    beside = path.parent / model
    return open_weights(str(beside) if beside.is_dir() else model)


def _depth(names: Sequence[str]) -> int:
    return 1 + max((n for n in map(layer_of, names) if n is not None), default=-1)


def _dtype(path: Path, name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{path}: dtype {name!r} is none of torch's")
    return found


@dataclass(frozen=True)
class _Planner:
    """Every tensor of a module, with the settings that hold for it. names: of every model's tensors in the module."""

    path: Path
    method: str
    base: str | None
    settings: tuple[Mapping[str, Any], ...]
    opened: Mapping[str, Weights]
    names: Mapping[str, Sequence[str]]
    dtype: torch.dtype | None
    vocabulary: Vocabulary | None

    def made(self, slices: Sequence[_Slice]) -> list[Made]:
        """Embeddings and the like after the first slice's settings, layers by theirs, the head by the last one's."""
        outside = [n for n in self.names[self.base or slices[0].sources[0].model] if layer_of(n) is None]
        before = [n for n in outside if any(part in n for part in _EMBEDDINGS)]
        found = [self._one(n, n, slices[0], 0, 0.0) for n in before]
        number = 0
        for each in slices:
            lengths = {s.last - s.first for s in each.sources}
            if len(lengths) != 1:
                raise CheckpointError(f"{self.path}: the sources of a slice differ in their number of layers")
            (length,) = lengths
            for offset in range(length):
                t = offset / (length - 1) if length > 1 else 1.0
                inside = self._of_layer(each.sources[0].model, each.sources[0].first + offset)
                found += [self._one(_at(name, number), name, each, offset, t) for name in inside]
                number += 1
        return found + [self._one(n, n, slices[-1], 0, 0.0) for n in outside if n not in before]

    def _one(self, out: str, name: str, where: _Slice, offset: int, t: float) -> Made:
        """name: what the tensor is called in the first source; other sources have it in layers of their own."""
        inner = layer_of(name) is not None
        parts: list[tuple[_Source, str]] = []
        for source in where.sources:
            here = _at(name, source.first + offset) if inner else name
            if here not in self.opened[source.model]:
                raise CheckpointError(f"{self.path}: {source.model} has no tensor {here!r}")
            parts.append((source, here))
        rule_name, _, names = _METHODS[self.method]
        takes_base = rules()[rule_name].needs_base or rule_name in ("nuslerp", "multislerp")
        own = [p for p in parts if not (takes_base and p[0].model == self.base)]
        shape, rows = self._laid_out(out, [(s.model, here) for s, here in parts])
        value = _Settings(self.path, self.method, {"weight", "int8_mask", *names}, (where.settings, *self.settings), t)
        weights = [value.of("weight", s.settings, here) for s, here in own]
        rule = self._rule([(s.settings, here) for s, here in own], value, out)
        stored = self.opened[parts[0][0].model][parts[0][1]]
        made = tuple(
            Part(str(self.opened[s.model].folder), here, 1.0 if w is None else float(w), rows.get(s.model))
            for (s, here), w in zip(own, weights, strict=True)
        )
        base = None
        for s, here in parts:
            if s.model == self.base:
                base = Part(str(self.opened[s.model].folder), here, rows=rows.get(s.model))
        dtype = self.dtype if self.dtype and stored.dtype.is_floating_point else stored.dtype
        return Made(Out(out, shape, dtype), rule, made, base if takes_base else None)

    def _laid_out(self, out: str, parts: Sequence[tuple[str, str]]) -> tuple[tuple[int, ...], dict[str, Rows]]:
        """The shape of the result, and where it has a row for each token, how each model's rows are laid out."""
        stored = {model: self.opened[model][here] for model, here in parts}
        shapes = {s.shape for s in stored.values()}
        if self.vocabulary is not None and all(has_rows(here, stored[m].shape, self.opened[m]) for m, here in parts):
            if len({shape[1:] for shape in shapes}) == 1:
                found = self.vocabulary.rows({model: s.dtype for model, s in stored.items()})
                folders = {model: str(weights.folder) for model, weights in self.opened.items()}
                return (self.vocabulary.size, *next(iter(shapes))[1:]), {
                    m: r.of_folders(folders) for m, r in found.items()
                }
        if len(shapes) > 1:
            hint = "" if self.vocabulary else ": give all models one tokenizer (tokenizer_source: union)"
            raise CheckpointError(f"{self.path}: {out} has the shapes {sorted(shapes)}{hint}")
        return next(iter(shapes)), {}

    def _of_layer(self, model: str, number: int) -> list[str]:
        found = [name for name in self.names[model] if layer_of(name) == number]
        if not found:
            raise CheckpointError(f"{self.path}: {model} has no layer {number}; it has {_depth(self.names[model])}")
        return found

    def _rule(self, own: Sequence[tuple[Mapping[str, Any], str]], value: _Settings, out: str) -> Rule:
        """The rule with its options for one tensor. own: every model's settings, and the tensor's name in it."""
        name, defaults, names = _METHODS[self.method]
        options, first = dict(defaults), own[0][0] if own else {}
        for theirs, ours in names.items():
            if ours in _VARIES and issubclass(rules()[name], TaskVectors):
                each = [value.of(theirs, settings, here) for settings, here in own]
                if any(v is not None for v in each):
                    default = options.get(ours, _VARIES[ours])
                    options[ours] = tuple(default if v is None else float(v) for v in each)
                continue
            found = value.of(theirs, first, out)
            if found is not None:
                options[ours] = found
        if name == "nuslerp":
            options["by"] = _nuslerp(value, first, out)
        if "rescale" in options and isinstance(options["rescale"], bool):
            options["rescale"] = "l1" if options["rescale"] else "none"
        return rules()[name](**options)


def _nuslerp(value: _Settings, settings: Mapping[str, Any], tensor: str) -> str:
    if value.of("nuslerp_flatten", settings, tensor) in (None, True):
        return "whole"
    return "first" if value.of("nuslerp_row_wise", settings, tensor) else "last"


@dataclass(frozen=True)
class _Settings:
    """A parameter's value for one tensor: the model's own, else the slice's, else the file's."""

    path: Path
    method: str
    known: set[str]
    outer: tuple[Mapping[str, Any], ...]
    t: float

    def of(self, key: str, own: Mapping[str, Any], tensor: str) -> Any:
        for settings in (own, *self.outer):
            for each in settings:
                if each not in self.known:
                    hint = nearest(each, self.known)
                    raise CheckpointError(f"{self.path}: {self.method} has no parameter {each!r}; {hint}")
            if key in settings:
                found = _evaluated(settings[key], tensor, self.t)
                if found is not None:
                    return found
        return None


def _evaluated(setting: Any, tensor: str, t: float) -> Any:
    """A number as it is; a list of numbers along the layers; a list of {filter, value} by the tensor's name."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return float(setting) if isinstance(setting, str) else setting
    if all(isinstance(e, int | float | bool) for e in setting):
        place = t * (len(setting) - 1)
        low = int(place)
        high, share = min(len(setting) - 1, low + 1), place - low
        return (1 - share) * setting[low] + share * setting[high]
    for condition in setting:
        wanted = condition.get("filter")
        if wanted is None or wanted == "*" or wanted in tensor:
            return _evaluated(condition["value"], tensor, t)
    return None


def _at(name: str, number: int) -> str:
    """The same tensor in another layer."""
    here = layer_of(name)
    return name.replace(f".{here}.", f".{number}.", 1)
