"""Text from a model, piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import WeftError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["GenerationError", "Sampling", "continuation", "reply"]


class GenerationError(WeftError, ValueError):
    """A model that cannot generate, or a prompt that it cannot go on with."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: always the likeliest; seed: of the draws otherwise."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def continuation(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling | None = None
) -> Iterator[str]:
    """What the model writes after `prompt`, under the route in use, until its end token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    yield from _pieces(model, tokenizer, ids, sampling or Sampling(), _end_tokens(model, tokenizer))


def reply(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """The assistant's next message in a conversation, rendered with the tokenizer's own chat template."""
    if tokenizer.chat_template is None:
        raise GenerationError(
            "this tokenizer has no chat template, so nobody knows how it writes turns: "
            "use `weft generate` with plain text"
        )
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(str(text), return_tensors="pt", add_special_tokens=False).input_ids
    ends = [*_end_tokens(model, tokenizer), *_turn_end(tokenizer)]
    yield from _pieces(model, tokenizer, ids, sampling or Sampling(), ends)


def _pieces(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: Tensor, sampling: Sampling, ends: Sequence[int]
) -> Iterator[str]:
    """Run `generate` in a thread, and hand on its text as it comes; its error is raised here."""
    from transformers import TextIteratorStreamer

    _check(model, ids, sampling)
    streamer = TextIteratorStreamer(
        tokenizer,
        skip_prompt=True,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    ids = ids.to(next(model.parameters()).device)
    draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    options = draws if sampling.temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    failed: list[BaseException] = []

    def run() -> None:
        try:
            torch.manual_seed(sampling.seed)
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.max_new_tokens, num_beams=1,
                streamer=streamer, pad_token_id=pad, eos_token_id=list(dict.fromkeys(ends)) or None, **options,
            )  # fmt: skip
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


def _check(model: Any, ids: Tensor, sampling: Sampling) -> None:
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise GenerationError(f"a {type(model).__name__} does not generate text; it may be an encoder or a classifier")
    if not ids.shape[1]:
        raise GenerationError("the prompt is empty, and this tokenizer has no token to begin with: give some text")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + sampling.max_new_tokens > longest:
        raise GenerationError(
            f"the prompt has {ids.shape[1]} tokens and {sampling.max_new_tokens} may follow, and the base reads "
            f"{longest} in all: shorten the prompt, or ask for fewer tokens"
        )


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a text, by the model's generation settings and the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = found if isinstance(found, list) else [found]
    return [token for token in (*several, tokenizer.eos_token_id) if token is not None]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the template puts right after an assistant's message."""
    marker = "weft"
    turns = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(marker)[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return ids[:1] if ids and ids[0] in tokenizer.added_tokens_decoder else []
