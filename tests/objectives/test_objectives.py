"""The losses against their definitions, and the registry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft import objectives
from weft.data.batch import Batch
from weft.data.rows import IGNORED
from weft.errors import WeftError
from weft.objectives.classification import classification_loss
from weft.objectives.next_token import next_token_loss


def test_next_token_is_the_sum_over_trained_positions() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED, 3], [IGNORED, IGNORED, 4, 5, IGNORED]])
    loss, count, metrics = next_token_loss(logits, labels)
    by_hand, right = 0.0, 0
    for row in range(2):
        for position in range(1, 5):
            target = int(labels[row, position])
            if target != IGNORED:
                by_hand -= logits[row, position - 1].log_softmax(-1)[target].item()
                right += int(logits[row, position - 1].argmax() == target)
    assert loss.dtype == torch.float32
    assert (count, int(metrics["correct"])) == (5, right)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[:, -1].any()  # nothing comes after the last position


def test_next_token_is_what_transformers_computes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 30, (2, 6))
    labels = ids.masked_fill(torch.rand(2, 6) < 0.5, IGNORED)
    batch = Batch(ids, torch.ones_like(ids), labels, num_trained=0, num_tokens=12)
    loss, count, _ = objectives.get("causal-lm").loss(model, batch)
    torch.testing.assert_close(loss / count, model(input_ids=ids, labels=labels).loss)


def test_a_batch_without_trained_tokens_is_zero_not_nan() -> None:
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss, count, _ = next_token_loss(logits, torch.full((1, 3), IGNORED))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def test_classification() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 0])
    loss, count, metrics = classification_loss(logits, labels)
    expected = -logits.float().log_softmax(-1)[range(4), labels].sum()
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32
    assert (count, int(metrics["correct"])) == (4, int((logits.argmax(-1) == labels).sum()))


def test_classification_without_pooling_answers_at_the_last_token() -> None:
    logits = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = Batch(mask, mask, torch.tensor([2, 0]), num_trained=2, num_tokens=6)

    def model(input_ids: Any, attention_mask: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    loss, _, _ = objectives.get("classification").loss(model, batch)
    torch.testing.assert_close(loss, classification_loss(logits[[0, 1], [1, 3]], batch.labels)[0])


def test_the_registry() -> None:
    assert {"causal-lm", "classification"} <= set(objectives.names())
    with pytest.raises(WeftError, match="did you mean 'causal-lm'"):
        objectives.get("casual-lm")
    with pytest.raises(ValueError, match="two objectives are named 'causal-lm'"):

        class Twice(objectives.Objective):
            name = "causal-lm"

            @staticmethod
            def loss(model: Any, batch: Any) -> Any:
                return None
