"""Whole checkpoints into one, tensor by tensor: memory of the largest tensor of each, whatever the model's size."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.base import find_base
from weft.checkpoints.jobs import Job, scratch
from weft.checkpoints.stream import Out, plan_files, write_file, write_index
from weft.checkpoints.vocabulary import Rows
from weft.checkpoints.weights import CheckpointError, Stored, Weights
from weft.combine import Rule
from weft.errors import nearest

__all__ = [
    "BESIDE",
    "Made",
    "Merged",
    "Part",
    "Recipe",
    "merge_checkpoints",
    "open_weights",
    "refuse_taken",
    "run",
    "tensors_of",
    "whole",
]

BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*")
"""What of a checkpoint's folder a merged one needs too: configuration, tokenizer, licence; not its weights and card."""
SHARD_BYTES = 5_000_000_000
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # where a tied model stores one tensor for both
_STATE = "merging.json"
_PIECE = 1 << 17
"""Entries that are merged at once: half a megabyte in float32, which malloc takes from memory that it has already."""
_JOB = 1 << 19
"""Entries that a thread merges, in pieces, before it hands them over: a megabyte in bfloat16."""
_TOKENIZER = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template)|.*\.(model|tiktoken)$")


@dataclass(frozen=True)
class Part:
    """One tensor that goes into another: the folder it comes from, its name there, its weight, its rows' new order."""

    model: str
    name: str
    weight: float = 1.0
    rows: Rows | None = None


@dataclass(frozen=True)
class Made:
    """How one tensor of the result is made."""

    out: Out
    rule: Rule
    parts: tuple[Part, ...]
    base: Part | None = None

    def weights(self) -> list[float] | None:
        """The parts' weights, for a rule that reads them."""
        return [part.weight for part in self.parts] if self.rule.weighted else None


@dataclass(frozen=True)
class Recipe:
    """A merge, tensor by tensor. folder: whose configuration and tokenizer come along.

    config: what changes in the configuration; a.b is the key b in a. tokenizer: one that is written instead.
    """

    made: tuple[Made, ...]
    folder: Path
    config: Mapping[str, Any]
    seed: int = 0
    tokenizer: Any = None

    def digest(self) -> str:
        """What tells this merge from another, so that only the same one is gone on with."""
        text = repr([(m.out, m.rule, m.parts, m.base) for m in self.made]) + str(self.seed)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        shards = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return f"merged: {self.folder} ({self.num_tensors} tensors, {shards}, {self.num_bytes / 1e6:,.1f} MB)"


def merge_checkpoints(
    models: Mapping[str, float] | Sequence[str],
    rule: Rule,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Merge whole checkpoints of one architecture into a folder that transformers loads.

    models: {folder or bundled base: weight}, or names that weigh 1. base: what they were tuned from, for rules that
        merge differences. dtype: of the result; by default that of the base or the first model. seed: for rules that
        draw, with the tensor's name.
    Tensors are read, merged and written one by one, and a run that was killed goes on where it stopped, when it is
    started again with the same models, rule and folder.
    Raises CheckpointError before anything is written where the models do not fit together.
    """
    parents = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, 1.0)
    return run(whole(parents, rule, base=base, dtype=dtype, seed=seed), out, shard_bytes=shard_bytes, say=say)


def whole(
    parents: Mapping[str, float],
    rule: Rule,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Recipe:
    """The recipe that applies one rule to every tensor."""
    if rule.needs_base and base is None:
        raise CheckpointError(
            f"{rule.name} merges differences to a base: name the checkpoint that these were tuned from"
        )
    if rule.needs:
        raise CheckpointError(f"{rule.name} weighs models by their {rule.needs}, which files alone do not have")
    opened = {name: open_weights(name) for name in (*parents, *([base] if base else []))}
    first = base or next(iter(parents))
    _same_make({n: w for n, w in opened.items() if n != first}, first, opened[first])
    made = []
    for name, stored in opened[first].items():
        out = Out(name, stored.shape, dtype if dtype and stored.dtype.is_floating_point else stored.dtype)
        parts = tuple(_part(opened[model], model, name, weight, stored.shape) for model, weight in parents.items())
        made.append(Made(out, rule, parts, Part(base, name) if base else None))
    return Recipe(tuple(made), opened[first].folder, _config(dtype), seed)


def run(
    recipe: Recipe, out: str | Path, *, shard_bytes: int = SHARD_BYTES, say: Callable[[str], None] = lambda _: None
) -> Merged:
    """Carry a recipe out; see `merge_checkpoints`."""
    folder = Path(out)
    _claim(folder, recipe)
    read = _Reader()
    by_name = {m.out.name: m for m in recipe.made}
    files = plan_files([m.out for m in recipe.made], shard_bytes)
    for count, (file, outs) in enumerate(files.items(), 1):
        try:
            write_file(folder / file, outs, lambda o: _jobs(by_name[o.name], read, recipe.seed))
        except OSError as error:
            raise CheckpointError(
                f"could not write {folder / file} ({error.strerror or error}); what is done is kept: start the same "
                "merge again to go on"
            ) from error
        say(f"{file}: {count} of {len(files)}")
    write_index(folder, files)
    _beside(recipe, folder)
    (folder / _STATE).unlink()
    size = sum(m.out.num_bytes for m in recipe.made)
    return Merged(folder, len(recipe.made), size, tuple(files))


def tensors_of(recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result by name, made as `run` makes it when it is its turn."""
    read = _Reader()
    for made in recipe.made:
        flat = torch.cat([job.make() for job in _jobs(made, read, recipe.seed)])
        yield made.out.name, flat.view(made.out.shape)


class _Reader:
    """The tensors that parts name; each folder is opened once."""

    def __init__(self) -> None:
        self._opened: dict[str, Weights] = {}

    def of(self, model: str) -> Weights:
        if model not in self._opened:
            self._opened[model] = open_weights(model)
        return self._opened[model]

    def whole(self, part: Part) -> Tensor:
        found = self.of(part.model).read(part.name)
        return found if part.rows is None else part.rows.of(found, lambda model: self.of(model).read(part.name))

    def entries(self, part: Part) -> Stored | Tensor:
        """What `_runs` goes through: what a file says of the tensor, or the tensor where its rows are laid out anew."""
        return self.of(part.model)[part.name] if part.rows is None else self.whole(part).reshape(-1)


def _jobs(made: Made, read: _Reader, seed: int) -> Iterator[Job]:
    """What makes one tensor of the result, flat and in order; in pieces, where the rule allows."""
    numel = torch.Size(made.out.shape).numel()
    if not made.rule.by_entry:
        yield Job(numel, partial(_merged, made, read, seed))
        return
    base = None if made.base is None else read.entries(made.base)
    parts = [read.entries(part) for part in made.parts]
    for start in range(0, numel, _JOB):
        stop = min(start + _JOB, numel)
        yield Job(stop - start, partial(_merged_run, made, parts, base, start, stop))


def _merged(made: Made, read: _Reader, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(seed, made.out.name)) if made.rule.random else None
    base = None if made.base is None else _widened(read.whole(made.base), made.out.dtype)
    parts = [_widened(read.whole(p), made.out.dtype) for p in made.parts]
    found = made.rule(parts, weights=made.weights(), base=base, generator=generator)
    return found.to("cpu", made.out.dtype).contiguous().view(-1)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A rule gives its result in the format that it gets: a wider one is not to be rounded to that before."""
    return tensor.to(dtype) if tensor.is_floating_point() and dtype.itemsize > tensor.dtype.itemsize else tensor


def _merged_run(
    made: Made, parts: Sequence[Stored | Tensor], base: Stored | Tensor | None, start: int, stop: int
) -> Tensor:
    """The entries from `start` to `stop`: read, merged and rounded piece by piece, in the processor's cache."""
    first = parts[0] if base is None else base
    dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
    if not first.dtype.is_floating_point:  # a rule hands these on as they are
        dtype = first.dtype
    out = torch.empty(stop - start, dtype=made.out.dtype)
    runs = [_runs(p, start, stop, dtype, i) for i, p in enumerate([*parts] if base is None else [*parts, base])]
    for at, pieces in zip(range(0, stop - start, _PIECE), zip(*runs, strict=True), strict=True):
        here = None if base is None else pieces[-1]
        out[at : at + _PIECE].copy_(made.rule(pieces[: len(parts)], weights=made.weights(), base=here))
    return out


def _runs(entries: Stored | Tensor, start: int, stop: int, dtype: torch.dtype, index: int) -> Iterator[Tensor]:
    if isinstance(entries, Stored):
        raw, wide = (scratch(f"{use} {index}", _PIECE, kind) for use, kind in (("raw", entries.dtype), ("wide", dtype)))
        return entries.runs(start, stop, raw, wide)
    return (run.to(dtype) for run in entries[start:stop].split(_PIECE))


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")


def open_weights(name: str) -> Weights:
    """The weights of a folder, a bundled base, or a hub id that is in the cache or asked for."""
    place = Path(find_base(name))
    if place.is_dir():
        return Weights(place)
    from transformers.utils.hub import cached_file

    return Weights(Path(str(cached_file(str(place), "config.json"))).parent)


def _part(weights: Weights, model: str, name: str, weight: float, shape: tuple[int, ...]) -> Part:
    if name not in weights and _TIED.get(name) in weights and weights.config().get("tie_word_embeddings"):
        name = _TIED[name]
    if name not in weights:
        raise CheckpointError(f"{model} has no tensor {name!r}, which the first model has; {nearest(name, [*weights])}")
    if weights[name].shape != shape:
        hint = (
            " (another vocabulary? give both the same tokenizer first)" if "embed" in name or "lm_head" in name else ""
        )
        raise CheckpointError(f"{name} is {weights[name].shape} in {model} and {shape} in the first model{hint}")
    return Part(model, name, weight)


def _same_make(others: Mapping[str, Weights], first: str, weights: Weights) -> None:
    """CheckpointError for another architecture, or tensors that the first model lacks."""
    kind = weights.config().get("architectures")
    for name, other in others.items():
        if other.config().get("architectures") != kind:
            raise CheckpointError(f"{name} is a {other.config().get('architectures')} and {first} a {kind}")
        extra = sorted(other.keys() - weights.keys() - {n for n, tied in _TIED.items() if tied in weights})
        if extra:
            raise CheckpointError(f"{name} has tensors that {first} lacks: {', '.join(extra[:3])}")


def _config(dtype: torch.dtype | None) -> dict[str, Any]:
    return {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}


def _claim(folder: Path, recipe: Recipe) -> None:
    """The folder for this merge: a new one, or the same merge's that was interrupted."""
    state = folder / _STATE
    refuse_taken(folder)
    if state.is_file() and json.loads(state.read_text())["digest"] != recipe.digest():
        raise CheckpointError(f"{folder} holds another merge that was interrupted: remove it, or name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps({"digest": recipe.digest()}))


def refuse_taken(folder: Path) -> None:
    """CheckpointError for a folder that holds anything but a merge that was interrupted."""
    if folder.exists() and any(folder.iterdir()) and not (folder / _STATE).is_file():
        raise CheckpointError(f"{folder} is there already: name a new folder for the merged checkpoint")


def _beside(recipe: Recipe, folder: Path) -> None:
    for pattern in BESIDE:
        for path in recipe.folder.glob(pattern):
            if not path.name.endswith(".index.json") and (recipe.tokenizer is None or not _TOKENIZER.match(path.name)):
                shutil.copyfile(path, folder / path.name)
    if recipe.tokenizer is not None:
        recipe.tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    if recipe.config and file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        for key, value in recipe.config.items():
            *above, last = key.split(".")
            inner = config
            for part in above:
                inner = inner[part]
            inner[last] = value
        if "torch_dtype" in config and "dtype" in recipe.config:
            config["torch_dtype"] = config["dtype"]
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
