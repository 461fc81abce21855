"""P-tuning, multitask prompts and context-aware prompts as PEFT stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.adapter import AdapterFileError
from weft.core.method import Method
from weft.interop.peft.config import Config, is_encoder_decoder
from weft.interop.peft.family import Tensors
from weft.interop.peft.place import Place, Places, Unwritable
from weft.interop.peft.tokens import EMBEDDINGS, SHAPE_OF_BASE, Prompt, count_of
from weft.registry import method_from_spec


class Encoded(Prompt):
    """`prompt_embeddings` [N, C], as the encoder has made them: it is not in the file, so a plain prompt is read."""

    peft_type = "P_TUNING"
    method = "p_tuning"
    known = SHAPE_OF_BASE | {
        "num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
        "encoder_dropout",
    }  # fmt: skip
    renames = False

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return method_from_spec({"name": "prompt", "num_tokens": count_of(config)})

    def join(self, places: Places, own: Mapping[str, Tensors], method: Any) -> Tensor:
        return super().join(places, {a: method.coefficients(t, None) for a, t in own.items()}, method)

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        made = sites[0][1].encoder.upper()
        return {**super().options(sites, places), "encoder_reparameterization_type": made}


class Multitask(Prompt):
    """The shared `prompt_embeddings` [N, C], `prefix_task_cols` [K, N, R] and `prefix_task_rows` [K, R, C]."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    method = "multitask_prompt"
    leaves = (EMBEDDINGS, "prefix_task_cols", "prefix_task_rows")
    known = Prompt.known | {
        "num_tasks", "num_ranks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
    }  # fmt: skip
    expressed = ("num_tokens", "num_tasks", "rank")

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return self.made(
            {
                "num_tokens": count_of(config), "num_tasks": config.get("num_tasks") or 1,
                "rank": config.get("num_ranks") or 1, "init_text": config.get("prompt_tuning_init_text") or None,
            }
        )  # fmt: skip

    def beside(self, config: Config, found: Tensors) -> dict[str, Tensor]:
        missing = [leaf for leaf in self.leaves if leaf not in found]
        if missing:
            raise AdapterFileError(f"a multitask prompt needs {', '.join(missing)}, and the file has none")
        return {"rows": found["prefix_task_cols"], "columns": found["prefix_task_rows"]}

    def write_beside(self, own: Tensors) -> dict[str, Tensor]:
        return {"prefix_task_cols": own["rows"], "prefix_task_rows": own["columns"]}

    def join(self, places: Places, own: Mapping[str, Tensors], method: Any) -> Tensor:
        if is_encoder_decoder(places.model):
            raise Unwritable("PEFT's multitask prompt of an encoder-decoder model has rows for the decoder too")
        return super().join(places, own, method)

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        method = sites[0][1]
        return {**super().options(sites, places), "num_tasks": method.num_tasks, "num_ranks": method.rank}


class Context(Prompt):
    """`prompt_embeddings` [N, C]: the context with what was added to it, which the file does not tell apart."""

    peft_type = "CPT"
    method = "cpt"
    known = SHAPE_OF_BASE | {
        "num_virtual_tokens", "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type",
        "opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path",
    }  # fmt: skip
    expressed = ("decay", "epsilon", "format_epsilon")
    renames = False

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return self.made(
            {
                "init_ids": tuple(config["cpt_token_ids"]),
                "token_types": tuple(config.get("cpt_tokens_type_mask") or (1,) * len(config["cpt_token_ids"])),
                "decay": config.get("opt_loss_decay_factor", 1.0) if _decays(config) else 1.0,
                "epsilon": config.get("opt_projection_epsilon", 0.1),
                "format_epsilon": config.get("opt_projection_format_epsilon", 0.1),
            }
        )

    def split(self, config: Config, places: Places, matrix: Tensor) -> dict[str, dict[str, Tensor]]:
        method: Any = self.read_method(config, None, {})  # type: ignore[arg-type]  # reads no site
        found = super().split(config, places, matrix)
        for own in found.values():
            own |= {"delta": torch.zeros_like(own["tokens"]), **method.told(own["tokens"], method.init_ids)}
        return found

    def join(self, places: Places, own: Mapping[str, Tensors], method: Any) -> Tensor:
        if is_encoder_decoder(places.model):
            raise Unwritable("PEFT's context-aware prompts are for causal language models")
        return super().join(places, {a: method.coefficients(t, None) for a, t in own.items()}, method)

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        method = sites[0][1]
        num = len(method.init_ids) if method.init_ids is not None else method.num_tokens or 8
        ids, types = list(method.init_ids or [0] * num), list(method.token_types or [2] * num)
        return {
            "num_virtual_tokens": num, "task_type": "CAUSAL_LM", "cpt_token_ids": ids, "cpt_mask": [1] * num,
            "cpt_tokens_type_mask": types, "opt_weighted_loss_type": "decay" if method.decay < 1 else "none",
            "opt_loss_decay_factor": method.decay, "opt_projection_epsilon": method.epsilon,
            "opt_projection_format_epsilon": method.format_epsilon,
        }  # fmt: skip


def _decays(config: Config) -> bool:
    return config.get("opt_weighted_loss_type", "none") == "decay"
