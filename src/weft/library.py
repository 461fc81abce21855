"""A library of adapters: which of them are alike, by their weights, and which suit a text, by texts that are known."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weft.adapter import AdapterFileError
from weft.attach import records, using, weave_of
from weft.core.clusters import k_means
from weft.differences import Difference, difference, flat
from weft.errors import AdapterError, nearest

__all__ = ["Embed", "Library", "cluster", "mean_hidden_state", "similarity"]

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to vectors [N, D]."""

_TENSORS, _FACTS, _PROBE = "index.safetensors", "index.json", "The quick brown fox jumps over the lazy dog."
_TRIES = 16


@torch.no_grad()
def similarity(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    """The cosine between what every two adapters change, over all weights together, [K, K].

    names: all adapters of the model where left out. Where one of them changes no weight it changes it by zero. Updates
    are compared, not their factors, which may differ, in shape too, where updates are the same. Raises AdapterError for
    an adapter that no weight can express.
    """
    chosen = _chosen(model, names)
    gram = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for seat in weave_of(model).seats.values():
        here = [i for i, name in enumerate(chosen) if name in seat.adapters]
        if here:
            found = _products([difference(seat, chosen[i]) for i in here]).double().cpu()
            gram[torch.tensor(here).unsqueeze(1), torch.tensor(here)] += found
    norm = gram.diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram / norm / norm.unsqueeze(1)


def cluster(model: nn.Module, count: int, *, names: Sequence[str] | None = None, seed: int = 0) -> list[list[str]]:
    """Adapters of a model in `count` groups that change its weights alike, in the order of their first members.

    K-means on their updates, each of length 1, from the best of several starts. One adapter that is trained on the data
    of a whole group takes its place (model-based clustering, MBC): Ostapenko et al. 2024, arXiv 2405.11157, who compare
    the factors of LoRAs of one rank and one start. Raises ValueError for more groups than adapters.
    """
    chosen = _chosen(model, names)
    if not 1 <= count <= len(chosen):
        raise ValueError(f"count={count}: {len(chosen)} adapters make 1 to {len(chosen)} groups")
    values, vectors = torch.linalg.eigh(similarity(model, chosen))
    rows = vectors * values.clamp_min(0).sqrt()  # points with these very products
    best: tuple[float, list[int]] | None = None
    for attempt in range(_TRIES):
        own = k_means(rows, count, torch.Generator().manual_seed(seed * _TRIES + attempt)).long()
        member = F.one_hot(own, count).to(rows.dtype)
        centres = member.mT @ rows / member.sum(0).clamp_min(1).unsqueeze(1)
        spread = (rows - centres[own]).square().sum().item()
        if best is None or spread < best[0] - 1e-12:
            best = spread, own.tolist()
    assert best is not None, "there is at least one attempt"
    groups: dict[int, list[str]] = {}
    for name, group in zip(chosen, best[1], strict=True):
        groups.setdefault(group, []).append(name)
    return [*groups.values()]


def mean_hidden_state(model: nn.Module, tokenizer: Any, *, batch: int = 16, length: int = 512) -> Embed:
    """What the base makes of a text: the mean over its tokens of the last hidden states, no adapter in use.

    length: tokens that are read of each text.
    """

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        config = getattr(model, "config", None)
        backbone = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model.base_model  # type: ignore[operator]
        device, found = next(model.parameters()).device, []
        for start in range(0, len(texts), batch):
            ids = [
                torch.tensor(tokenizer(t).input_ids[:length], dtype=torch.long) for t in texts[start : start + batch]
            ]
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
            states = backbone(input_ids=padded, attention_mask=mask).last_hidden_state.float()  # type: ignore[operator]
            found.append((states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1))
        return torch.cat(found).cpu()

    def without_adapters(texts: Sequence[str]) -> Tensor:
        training = model.training
        model.eval()
        try:
            if model.__dict__.get("weave") is None:
                return embed(texts)
            with using(model, None):
                return embed(texts)
        finally:
            model.train(training)

    return without_adapters


@dataclass(frozen=True, eq=False)
class Library:
    """Adapters by name, each with a vector of the texts that it is for.

    Retrieval of adapters: Luo et al. 2024 (Stylus, by descriptions), arXiv 2404.18928; Peng et al. 2024 (SLM, by the
    texts of tasks, the nearest ones averaged), arXiv 2404.07470.
    """

    names: tuple[str, ...]
    vectors: Tensor  # [K, D], of length 1
    embed: Embed

    @classmethod
    def of(cls, texts: Mapping[str, str | Sequence[str]], embed: Embed) -> Library:
        """An index of adapters: of each, by its name, a description or some texts like those that it was trained on."""
        vectors = []
        for name, own in texts.items():
            if not own:
                raise ValueError(f"{name} has no text to be found by; give a description or examples")
            vectors.append(F.normalize(embed([own] if isinstance(own, str) else [*own]).float(), dim=-1).mean(0))
        if not vectors:
            raise ValueError("a library needs at least one adapter")
        return cls(tuple(texts), F.normalize(torch.stack(vectors), dim=-1), embed)

    def scores(self, texts: Sequence[str]) -> Tensor:
        """The cosine between every text and every adapter, [N, K]."""
        return F.normalize(self.embed([*texts]).float(), dim=-1) @ self.vectors.mT

    def choose(self, texts: Sequence[str], top: int = 1, *, temperature: float = 0.1) -> list[dict[str, float]]:
        """Of every text, the `top` nearest adapters with weights that sum to 1: a route with one blend per row.

        temperature: of the softmax over their cosines; the lower it is, the more the nearest one counts.
        """
        if not 1 <= top <= len(self.names):
            raise ValueError(f"top={top}: this library has {len(self.names)} adapters")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        score, which = self.scores(texts).topk(top, -1)
        weights = (score / temperature).softmax(-1).tolist()
        rows = zip(which.tolist(), weights, strict=True)
        return [{self.names[k]: w for k, w in zip(*row, strict=True)} for row in rows]

    def with_only(self, names: Sequence[str]) -> Library:
        """The same for some of the adapters (those that a model carries, say)."""
        for name in names:
            if name not in self.names:
                raise AdapterError(f"this library has no adapter {name!r}; {nearest(name, self.names)}")
        where = torch.tensor([self.names.index(n) for n in names])
        return replace(self, names=tuple(names), vectors=self.vectors[where])

    def save(self, path: str | Path) -> Path:
        """Write a folder with the vectors and the names, and what `embed` makes of one text, to know it again."""
        path = Path(path)
        if path.exists() and not (path / _FACTS).is_file():
            raise AdapterFileError(f"{path} is there and is no library: it is not replaced; name a new folder")
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            vectors = {"vectors": self.vectors.contiguous(), "probe": self.embed([_PROBE])[0].float().contiguous()}
            save_file(vectors, temporary / _TENSORS)
            (temporary / _FACTS).write_text(json.dumps({"names": self.names}, indent=2) + "\n")
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    @classmethod
    def load(cls, path: str | Path, embed: Embed) -> Library:
        """Read a folder that `save` wrote. AdapterFileError where it is none, or was made by another `embed`."""
        path = Path(path)
        if not (path / _FACTS).is_file():
            raise AdapterFileError(f"{path} is no library: it has no {_FACTS}")
        names, tensors = json.loads((path / _FACTS).read_text())["names"], load_file(path / _TENSORS)
        probe, here = tensors["probe"], embed([_PROBE])[0].float()
        if probe.shape != here.shape or F.cosine_similarity(probe, here, dim=0) < 0.99:
            raise AdapterFileError(
                f"{path} was made with another way to embed texts: its vectors have {len(probe)} numbers and here "
                f"{len(here)}, or one text has two vectors; embed with the base and tokenizer that it was made with"
            )
        return cls(tuple(names), tensors["vectors"], embed)


def _chosen(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    known = records(model)
    for name in names or ():
        if name not in known:
            raise AdapterError(
                f"this model has no adapter {name!r}; {nearest(name, known) if known else 'it has none'}"
            )
    chosen = [*known] if names is None else [*names]
    if not chosen:
        raise AdapterError("this model has no adapters to compare; attach or load some first")
    return chosen


def _products(found: list[Difference]) -> Tensor:
    """The inner products of changes of one weight, [K, K]; those of thin matrices without the product of any."""
    site, pairs = found[0].site, [(d.b, d.a) for d in found if d.b is not None and d.a is not None]
    if len(pairs) < len(found):
        rows = torch.stack([d.weight().double().flatten() for d in found])
        return rows @ rows.mT
    b = torch.cat([b for b, _ in pairs], -1).double()  # [..., O, all R]
    a = torch.cat([flat(a, site) for _, a in pairs], -2).double()  # [..., all R, I]
    both = (b.mT @ b) * (a @ a.mT)
    both = both.reshape(-1, *both.shape[-2:]).sum(0)  # over experts, where there are any
    sizes = [pair[0].shape[-1] for pair in pairs]
    owner = F.one_hot(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), len(sizes)).to(both)
    return owner.mT @ both @ owner
