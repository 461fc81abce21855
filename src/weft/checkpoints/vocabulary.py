"""One vocabulary for models whose tokenizers differ: the tokens it holds, and what its embeddings are made of."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.weights import CheckpointError, Weights
from weft.errors import nearest

__all__ = ["Rows", "Vocabulary", "has_rows", "read_vocabulary", "templated", "vocabulary_size"]

_BY_TOKEN = re.compile(
    r"(^|\.)(embed_tokens|wte|lm_head|word_embeddings|embed_in|embed_out|tok_embeddings|shared|predictions)\."
)


@dataclass(frozen=True)
class Rows:
    """How one model's rows are laid out for the common vocabulary.

    own: [V], which of its rows a token has, -1 for none. fill: of other models' rows, (model, tokens, rows), whose mean
    a token without one gets; zero where there are none. size: V or more; what is beyond V is the mean of all.
    """

    digest: str
    size: int
    dtype: torch.dtype
    own: Tensor = field(repr=False, compare=False)
    fill: tuple[tuple[str, Tensor, Tensor], ...] = field(repr=False, compare=False)

    def of_folders(self, folders: Mapping[str, str]) -> Rows:
        """The same with models called by their folders."""
        return replace(self, fill=tuple((folders[model], tokens, rows) for model, tokens, rows in self.fill))

    def of(self, old: Tensor, other: Callable[[str], Tensor]) -> Tensor:
        """The rows of a tensor [N, ...] in the new order. other: the same tensor of another model."""
        new = old.new_zeros((self.size, *old.shape[1:]), dtype=self.dtype)
        here = self.own >= 0
        new[: len(here)][here] = old[self.own[here]].to(self.dtype)
        count = torch.zeros(len(here))
        for model, tokens, rows in self.fill:
            lacking = ~here[tokens]
            new[tokens[lacking]] += other(model)[rows[lacking]].to(self.dtype)
            count[tokens[lacking]] += 1
        many = (count > 1).nonzero()[:, 0]
        new[many] /= count[many].view(-1, *[1] * (old.ndim - 1)).to(self.dtype)
        new[len(here) :] = new[: len(here)].mean(0)
        return new


@dataclass(frozen=True)
class _Token:
    """Where a token's embedding comes from by the file: a model, perhaps as another token of it; None is zero."""

    model: str | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The common tokenizer, and by model, as the file calls it, its own tokens. settings: tokens the file speaks of."""

    tokenizer: Any
    tokens: Mapping[str, int]
    own: Mapping[str, Mapping[str, int]]
    settings: Mapping[str, _Token]
    base: str | None
    multiple: int

    @property
    def size(self) -> int:
        """Rows of an embedding."""
        return -(-len(self.tokens) // self.multiple) * self.multiple

    def rows(self, models: Mapping[str, torch.dtype]) -> dict[str, Rows]:
        """The layout for each of the models that have a certain tensor. models: with its dtype there."""
        fill: dict[str, list[tuple[int, int]]] = {name: [] for name in models}
        own = {name: torch.full((len(self.tokens),), -1) for name in models}
        for token, place in self.tokens.items():
            having = [name for name in models if token in self.own[name]]
            setting = self.settings.get(token)
            if setting is None or not setting.force:
                for name in having:
                    own[name][place] = self.own[name][token]
                if len(having) == len(models):
                    continue
            for name, row in self._sources(token, setting, having):
                if name not in fill:
                    raise CheckpointError(f"the token {token!r} is to come from {name}, which is not merged here")
                fill[name].append((place, row))
        pairs = tuple(
            (name, torch.tensor([place for place, _ in each]), torch.tensor([row for _, row in each]))
            for name, each in fill.items()
            if each
        )
        dtype = next(iter(models.values()))
        for each in models.values():
            dtype = torch.promote_types(dtype, each)
        text = repr([(n, own[n].tolist()) for n in models]) + repr([(n, t.tolist(), r.tolist()) for n, t, r in pairs])
        digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return {name: Rows(digest, self.size, dtype, own[name], pairs) for name in models}

    def _sources(self, token: str, setting: _Token | None, having: Sequence[str]) -> list[tuple[str, int]]:
        """The rows that a token gets for models that lack it: of the base, else of all that have it."""
        if setting is None:
            chosen = [self.base] if self.base in having else having
            return [(name, self.own[name][token]) for name in chosen if name is not None]
        if setting.model is None:
            return []
        if isinstance(setting.token, int):
            return [(setting.model, setting.token)]
        wanted = setting.token or token
        if wanted not in self.own.get(setting.model, {}):
            raise CheckpointError(f"the token {token!r} is to come from {setting.model}, which has no {wanted!r}")
        return [(setting.model, self.own[setting.model][wanted])]


def has_rows(name: str, shape: Sequence[int], weights: Weights) -> bool:
    """Whether a tensor of a model has a row for each token."""
    return _BY_TOKEN.search(name) is not None and shape[0] == vocabulary_size(weights)


def vocabulary_size(weights: Weights) -> int | None:
    """How many rows a model's embeddings have."""
    config = weights.config()
    found = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return None if found is None else int(found)


def read_vocabulary(
    path: Path,
    body: Mapping[str, Any],
    base: str | None,
    models: Mapping[str, Weights],
    open_at: Callable[[str], Weights],
) -> Vocabulary | None:
    """What a file says of tokenizers; None where it says nothing. models: in the file's order; the base may be none.

    Raises CheckpointError for what is not known, and for a model without a tokenizer.
    """
    settings = body.get("tokenizer") or {}
    source = body.get("tokenizer_source") or settings.get("source", "union" if settings else None)
    if body.get("tokenizer_source") and settings:
        raise CheckpointError(f"{path}: tokenizer_source and tokenizer say the same: give one of them")
    for key in settings:
        if key not in (known := ("source", "tokens", "pad_to_multiple_of")):
            raise CheckpointError(f"{path}: tokenizer has no key {key!r}; {nearest(key, known)}")
    if source is None:
        return None
    first = base or next(iter(models))
    loaded = {name: _load(weights) for name, weights in ({first: models[first]} | dict(models)).items()}
    own = {name: _with_rows(tokenizer, models[name]) for name, tokenizer in loaded.items()}
    if source == "union":
        result = _union(models[first], loaded, own)
    elif source == "base":
        result = _load(models[first])
    else:
        result = _load(models[source] if source in models else open_at(source))
    if source in ("union", "base") and (left := result.get_vocab().keys() - {t for each in own.values() for t in each}):
        raise CheckpointError(
            f"{first} has no embedding of {min(left)!r} and {len(left) - 1} more tokens of its tokenizer"
        )
    tokens = {token: _token(path, token, each) for token, each in (settings.get("tokens") or {}).items()}
    result.add_tokens([token for token in tokens if token not in result.get_vocab()])
    vocabulary = dict(sorted(result.get_vocab().items(), key=lambda item: item[1]))
    return Vocabulary(result, vocabulary, own, tokens, base, settings.get("pad_to_multiple_of") or 1)


def templated(path: Path, wanted: str, tokenizer: Any, models: Mapping[str, Weights], first: str) -> Any:
    """The tokenizer (None: the first model's) with a chat template: one written out, or with `auto` what most have."""
    tokenizer = _load(models[first]) if tokenizer is None else tokenizer
    if wanted == "auto":
        found = Counter(t.strip() for w in models.values() if isinstance(t := _load(w).chat_template, str))
        if found:
            tokenizer.chat_template = found.most_common(1)[0][0]
        return tokenizer
    if "{" not in wanted:
        raise CheckpointError(f"{path}: chat_template {wanted!r} is neither auto nor a template: write it out")
    tokenizer.chat_template = wanted
    return tokenizer


def _token(path: Path, token: str, body: Mapping[str, Any]) -> _Token:
    source = body.get("source")
    force = bool(body.get("force", False))
    if isinstance(source, str):
        return _Token(source, None, force)
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind == "zero":
        return _Token(None, None, force)
    if source and kind == "model_token" and ("token" in source) != ("token_id" in source):
        return _Token(source["model"], source.get("token", source.get("token_id")), force)
    raise CheckpointError(
        f"{path}: tokenizer.tokens.{token}.source should be a model, {{kind: zero}}, or {{kind: model_token}} "
        "with model and one of token and token_id"
    )


def _load(weights: Weights) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(weights.folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{weights.folder} has no tokenizer that can be read: {error}") from error


def _with_rows(tokenizer: Any, weights: Weights) -> dict[str, int]:
    """The tokens for which a model has embeddings."""
    limit = vocabulary_size(weights) or len(tokenizer)
    return {t: i for t, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if i < limit}


def _union(first: Weights, loaded: Mapping[str, Any], own: Mapping[str, Mapping[str, int]]) -> Any:
    """The first model's tokenizer with what the others know besides; their special tokens stay special."""
    result = _load(first)
    special: dict[str, Any] = {}
    for name, tokenizer in loaded.items():
        for info in tokenizer.added_tokens_decoder.values():
            if info.content in own[name]:
                special.setdefault(info.content, info)
    known = result.get_vocab()
    plain = dict.fromkeys(t for tokens in own.values() for t in tokens if t not in known and t not in special)
    result.add_tokens([*plain])
    result.add_tokens([*special.values()])
    return result
