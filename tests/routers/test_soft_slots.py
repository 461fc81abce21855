"""Soft slots in a real encoder: padding is in no slot, and models that may not see later tokens are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import weft
from tests.common.language import bert, gpt2, ids, llama, padded, t5
from weft.targets import TargetError


def woven(model: Any, targets: list[str], **options: Any) -> Any:
    experts = weft.experts(weft.Bottleneck(width=4), 2)
    weft.attach(model, weft.SoftSlots(experts=experts, **options), targets, name="slots")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def encoder() -> Any:
    torch.manual_seed(0)
    return woven(bert(), ["*.attention"], slots=2)


def test_it_adapts_the_blocks_of_an_encoder() -> None:
    model, tokens = encoder(), ids(2, 6)
    with torch.no_grad():
        found = model(input_ids=tokens).logits
        with weft.using(model, None):
            assert (model(input_ids=tokens).logits - found).abs().max() > 1e-2
        assert weft.adapters(model)["slots"].sites[0].site.kind == "block"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_slot(side: str) -> None:
    model, rows = encoder(), ids(2, 6)
    batch = padded(rows, (0, 3), side)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        together = model(**batch).logits
        for i in range(2):
            row = batch["input_ids"][i : i + 1]
            own = {k: v[i : i + 1] for k, v in batch.items()}
            changed = torch.where(mask[i : i + 1], row, (row + 5) % 90 + 3)
            same = model(**{**own, "input_ids": changed}).logits[0][mask[i]]
            torch.testing.assert_close(same, together[i][mask[i]])


def test_rows_share_a_batch_with_others() -> None:
    model, batch = encoder(), padded(ids(3, 6), (0, 2, 1), "right")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        with weft.using(model, ["slots", None, "slots"]):
            mixed = model(**batch).logits
        for name, i in (("slots", 0), (None, 1), ("slots", 2)):
            with weft.using(model, name):
                alone = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0]
            torch.testing.assert_close(mixed[i][mask[i]], alone[mask[i]])


@pytest.mark.parametrize(
    ("build", "targets", "why"),
    [
        (llama, ["self_attn"], "earlier ones only"),
        (gpt2, ["attn"], "earlier ones only"),
        (lambda: bert(transformers.BertLMHeadModel), ["*.attention"], "earlier ones only"),
        (t5, ["DenseReluDense"], "two rows of tokens"),
    ],
)
def test_a_model_that_may_not_see_later_tokens_is_refused(build: Any, targets: list[str], why: str) -> None:
    model = woven(build(), targets)
    tokens = ids(1, 5)
    with pytest.raises(ValueError, match=why):
        model(input_ids=tokens, **({"decoder_input_ids": tokens} if why.startswith("two") else {}))


def test_only_blocks_know_padding() -> None:
    with pytest.raises(TargetError, match="it adapts: block"):
        weft.attach(nn.Sequential(nn.Linear(4, 4)), weft.SoftSlots(experts=weft.experts(weft.Bottleneck(), 2)), ["0"])
