"""PEFT's adapter_config.json: reading with every option accounted for, and the parts that all methods write."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from weft.adapter import CONFIG, AdapterFileError
from weft.interop.peft.place import Places, Unwritable, ends_of
from weft.kinds.seat import base_class

PEFT_VERSION = "0.21.2"
"""The PEFT whose layout is written."""

COMMON = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "fan_in_fan_out", "init_weights", "runtime_config",
    }
)  # fmt: skip
"""Options whose work is done when the tensors are there: which modules were chosen, how a fresh adapter starts."""

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
_TASKS |= {"ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}

Config = Mapping[str, Any]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration; AdapterFileError when there is none or it is no object."""
    file = folder / CONFIG
    if not file.exists():
        raise AdapterFileError(f"{folder} has no {CONFIG}, so nothing says which method its tensors belong to")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{file} is not readable: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterFileError(f"{file} has no peft_type, so nothing says which method its tensors belong to")
    return config


def check_options(config: Config, known: Collection[str], neutral: Mapping[str, Any], folder: Path) -> None:
    """AdapterFileError for an option that changes what the adapter does and that Weft has not.

    known: options that the reader uses. neutral: options that Weft lacks, with the value at which they do nothing.
    An option of a newer PEFT is fine while it is off.
    """
    for key, value in config.items():
        if key in COMMON or key in known or not value or value == neutral.get(key):
            continue
        raise AdapterFileError(
            f"{folder / CONFIG}: {key}={value!r} is an option of PEFT's {config['peft_type']} that Weft does not have; "
            "an adapter without it can be read"
        )


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """What PEFT takes from a `rank_pattern` or `alpha_pattern` for a module: the first key that matches its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and an anchored pattern for every path that has another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": v for path, v in values.items() if v != common}


def uniform(methods: Iterable[Any], *options: str) -> tuple[Any, ...]:
    """The values of options that PEFT has once for all modules."""
    every = [*methods]
    found = []
    for option in options:
        values = {getattr(m, option) for m in every}
        if len(values) > 1:
            raise Unwritable(
                f"{every[0].name} has {option}={', '.join(map(str, sorted(values, key=str)))} at different sites, and "
                "PEFT has one for all"
            )
        found.append(values.pop())
    return tuple(found)


def target_modules(paths: Sequence[str], places: Places) -> list[str] | str:
    """Names that PEFT matches to these modules and no others: paths, or an expression where one is another's end."""
    chosen = frozenset(paths)
    if any(end in chosen for path in places.modules if path not in chosen for end in ends_of(path)):
        return "|".join(re.escape(p) for p in sorted(paths))
    return sorted(paths)


def task_type(model: nn.Module) -> str | None:
    """What PEFT calls the model's task, by the name of its class."""
    name = base_class(model).__name__
    if name.endswith("ForConditionalGeneration") and is_encoder_decoder(model):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def header(model: nn.Module, peft_type: str) -> dict[str, Any]:
    """What every configuration begins with.

    A task with a head makes PEFT expect the head's tensors, so only tasks without one are named.
    """
    cls, task = base_class(model), task_type(model)
    found: dict[str, Any] = {"peft_type": peft_type, "peft_version": PEFT_VERSION, "inference_mode": True}
    found["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return {**found, "task_type": task}
    found["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return {**found, "task_type": None}


def number(value: float) -> float | int:
    """A whole number as an integer, as PEFT declares its alphas."""
    return int(value) if float(value).is_integer() else value
