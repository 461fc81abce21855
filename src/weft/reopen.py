"""Opening adapters together with the base that they were made on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.adapter import AdapterFileError, read_info
from weft.attach import use
from weft.base import load_base
from weft.errors import AdapterError, nearest
from weft.interop.folder import load

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from weft.quantise import SchemeName

__all__ = ["Reopened", "adapter_folder", "base_of", "names_of", "reopen"]

_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Reopened:
    """A base with adapters on it. names: of the adapters, in the order of their folders; recipe: of the first's run."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base: str
    names: tuple[str, ...]
    task: str
    recipe: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Origin:
    """What a folder says about itself."""

    folder: Path
    name: str
    base: str | None
    num_labels: int | None
    recipe: Mapping[str, Any] | None
    tied: bool = False

    @property
    def task(self) -> str:
        return "causal-lm" if self.num_labels is None else "classification"


def reopen(
    adapters: Sequence[str | Path],
    *,
    base: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    quantize: SchemeName | None = None,
    any_base: bool = False,
) -> Reopened:
    """Load a base and put adapters on it; a single one is in use, several wait for `weft.use`.

    adapters: folders of adapters, or of runs of `weft tune`; none gives the base alone.
    base: a name as `weft.load_base` takes it; by default the one that the first adapter names.
    dtype: of the base's weights; by default as in the adapter's own run. quantize: hold the base compressed; by default
        it is not, but for an adapter that makes up for what quantising lost, whose base is quantised as in its run.
    any_base: accept adapters that were made on other weights.
    Raises AdapterFileError for a folder that is no adapter or does not say its base, and for another base.
    """
    origins = [_origin(adapter_folder(path)) for path in adapters]
    known = [origin.base for origin in origins if origin.base is not None]
    chosen = base or (known[0] if known else None)
    if chosen is None:
        asked = f"{origins[0].folder} does not say which base it was made on" if origins else "there is no adapter"
        raise AdapterFileError(f"{asked}: name the base with base (--base)")
    recipe = origins[0].recipe if origins else None
    kind: Any = dtype or (recipe or {}).get("base", {}).get("dtype") or "auto"
    model, tokenizer = load_base(
        chosen, dtype=kind, revision=_revision(recipe, base), **_quantised(origins, chosen, quantize, recipe)
    )
    whole = _with_head(model, origins)
    names = _names([origin.name for origin in origins])
    for origin, name in zip(origins, names, strict=True):
        load(whole, origin.folder, name, any_base=any_base)
    if len(names) > 1:
        use(whole, None)
    whole.eval()
    return Reopened(whole, tokenizer, chosen, names, origins[0].task if origins else "causal-lm", recipe)


def adapter_folder(path: str | Path) -> Path:
    """The adapter's own folder: what was named, or the `adapter` inside the folder of a run."""
    folder = Path(path).expanduser()
    for place in (folder, folder / "adapter"):
        if (place / "adapter_model.safetensors").is_file() or (place / _CONFIG).is_file():
            return place
    if folder.is_dir():
        raise AdapterFileError(f"{folder} holds no adapter: neither adapter_model.safetensors nor {_CONFIG} is in it")
    beside = [item.name for item in folder.parent.iterdir() if item.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, beside) if beside else f"there is no {folder.parent} either"
    raise AdapterFileError(f"there is no adapter at {folder}; {hint}")


def base_of(adapter: str | Path) -> str | None:
    """The base that an adapter's folder names."""
    return _origin(adapter_folder(adapter)).base


def names_of(adapters: Sequence[str | Path]) -> tuple[str, ...]:
    """What `reopen` calls the adapters in these folders."""
    return _names([_origin(adapter_folder(path)).name for path in adapters])


def _origin(folder: Path) -> _Origin:
    info = read_info(folder)
    if info is None:
        return _Origin(folder, folder.name, _peft_base(folder), None, None)
    recipe = info.get("provenance", {}).get("recipe")
    labels = None
    if recipe is not None and recipe.get("task") == "classification":
        labels = int(info["sites"]["head"]["shape"][0])
    base = info["base"].get("name") or (recipe or {}).get("base", {}).get("model")
    tied = bool(info["base"].get("tied"))
    beside = folder.parent / "base"  # a run that was moved took its quantised base along
    if tied and base is not None and Path(base).name == "base" and not Path(base).is_dir() and beside.is_dir():
        base = str(beside)
    return _Origin(folder, info.get("name") or folder.name, base, labels, recipe, tied)


def _peft_base(folder: Path) -> str | None:
    try:
        found = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{folder / _CONFIG} is not readable: {error}") from error
    return found.get("base_model_name_or_path") or None


def _quantised(
    origins: Sequence[_Origin], base: str, quantize: SchemeName | None, recipe: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How to quantise the base: as asked, or as a tied adapter's run did where the base is not stored so already."""
    said = (recipe or {}).get("base", {})
    tied = any(origin.tied for origin in origins) and base == said.get("model")
    scheme = quantize or (said.get("quantize") if tied else None)
    if scheme is None:
        return {"quantize": None}
    own = said if scheme == said.get("quantize") else {}
    return {"quantize": scheme, "group_size": own.get("group_size"), "bits": own.get("bits")}


def _revision(recipe: Mapping[str, Any] | None, base: str | None) -> str | None:
    """The revision that the run used, unless another base was named."""
    return None if base is not None or recipe is None else recipe.get("base", {}).get("revision")


def _with_head(model: nn.Module, origins: Sequence[_Origin]) -> nn.Module:
    """The model with a classifier's head where the adapters are those of one."""
    counts = {origin.num_labels for origin in origins}
    if counts <= {None}:
        return model
    if len(counts) > 1:
        raise AdapterError(
            f"{', '.join(origin.name for origin in origins)} are for different tasks or numbers of labels, and one "
            "head cannot serve them: open them one by one"
        )
    from weft.classifier import make_classifier

    num_labels = counts.pop()
    assert num_labels is not None
    return make_classifier(model, num_labels)


def _names(wanted: Sequence[str]) -> tuple[str, ...]:
    """Names that differ: the second `math` becomes `math-2`."""
    found: list[str] = []
    for name in wanted:
        number = 1 + sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(name if name not in found else f"{name}-{number}")
    return tuple(found)
