"""Periodic merging into a quantised base: the paper's step written densely, and a run that is broken and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from tests.tune import runs
from weft.errors import RecipeError
from weft.kinds.packed import GPTQLinear, round_to_grid
from weft.quantise import quantise_model
from weft.quantise.budget import Grid
from weft.recipe import Recipe
from weft.reopen import reopen
from weft.tune import tune
from weft.tune.loqt import merge_and_restart, merge_steps, weight_gradients
from weft.tune.repair import check_repair


def test_the_gaps_grow() -> None:
    assert merge_steps(10, 2.0, 100) == [0, 10, 30, 70]
    assert merge_steps(10, 1.0, 35) == [0, 10, 20, 30]


class Scored(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> object:
        return type("Out", (), {"loss": self.layer(x).square().mean()})


def test_a_merge_is_the_papers() -> None:
    torch.manual_seed(0)
    model = Scored(nn.Linear(64, 48, bias=False))
    quantise_model(model, "packed-int3", group_size=32)
    weft.attach(model, weft.LoRA(rank=4, freeze_a=True), ["layer"])
    seat = model.weave.seats["layer"]
    t = seat.adapters["default"].tensors()
    with torch.no_grad():
        t["B"].normal_(std=0.05)
    whole = seat.value("default").dense(seat.weight()).detach()
    batch = {"x": torch.randn(7, 64)}
    gradient = weight_gradients(model, ["layer"], batch)["layer"]
    w = whole.clone().requires_grad_()
    (expected,) = torch.autograd.grad((batch["x"] @ w.T).square().mean(), w)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters())
    before = (Grid(3, 32).rounded(whole) - whole).norm()
    merge_and_restart(seat, "default", gradient)
    directions = torch.linalg.svd(expected)[2][:4]
    torch.testing.assert_close((t["A"] @ directions.T).abs(), torch.eye(4), atol=1e-2, rtol=0)
    now = seat.value("default").dense(whole)
    assert (now - whole).norm() < before, "B takes up what rounding loses in A's directions"
    residual = whole - seat.weight()
    torch.testing.assert_close(t["B"] * 4.0, residual @ t["A"].T, atol=1e-4, rtol=1e-3)
    codes = seat.codes().clone()
    best = GPTQLinear(64, 48, 3, 32)
    low = torch.zeros_like(whole)
    errors = []
    for _ in range(5):
        best.write(*round_to_grid(whole - low, 3, 32))
        low = (whole - best.dequantize()) @ t["A"].T @ t["A"]
        errors.append((whole - best.dequantize() - low).norm().item())
    assert (now - whole).norm().item() == pytest.approx(min(errors), rel=1e-3)
    assert torch.equal(codes, seat.codes())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    runs.make_tokenizer().save_pretrained(folder / "base")
    runs.make_data(folder / "data")
    return folder


def recipe(wide: Path, output: Path, **train: object) -> Recipe:
    given = runs.bare(wide / "base", wide / "data", output, **({"steps": 8, "merge_every": 3} | train))
    return given.model_copy(
        update={
            "base": given.base.model_copy(update={"quantize": "packed-int4"}),
            "method": {"name": "lora", "rank": 2, "freeze_a": True},
        }
    )


def test_a_run_that_is_broken_after_a_merge_goes_on_as_if_it_had_not_been(wide: Path, tmp_path: Path) -> None:
    whole = tune(recipe(wide, tmp_path / "whole", merge_growth=1.0), console=runs.quiet())
    assert max(p.name for p in (tmp_path / "whole" / "bases").iterdir()) == "step-6"
    broken = recipe(wide, tmp_path / "broken", merge_growth=1.0)
    runs_and_stops(broken, at=4)
    tune(broken, resume=True, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "whole") == runs.adapter_bits(tmp_path / "broken")
    opened = [reopen([tmp_path / name]).model for name in ("whole", "broken")]
    ids = torch.arange(10, 22).view(2, 6)
    assert torch.equal(opened[0](ids).logits, opened[1](ids).logits)
    assert whole.num_steps == 8


@pytest.mark.parametrize("method", [{"start": "lq-lora"}, {}])
def test_a_run_whose_start_repairs_goes_on_on_the_same_codes(wide: Path, tmp_path: Path, method: dict) -> None:
    given = {}
    for name in ("whole", "broken"):
        made = recipe(wide, tmp_path / name, merge_every=None, correct_steps=0 if method else 2, steps=5)
        given[name] = made.model_copy(update={"method": {"name": "lora", "rank": 2, **method}})
    tune(given["whole"], console=runs.quiet())
    runs_and_stops(given["broken"], at=3)
    tune(given["broken"], resume=True, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "whole") == runs.adapter_bits(tmp_path / "broken")
    assert (tmp_path / "whole" / "base").exists() == bool(method)


def runs_and_stops(given: Recipe, at: int) -> None:
    """A run that loses power after step `at`."""
    from weft.tune import learn

    original = learn.Watch.after_step

    def dies(self: object, result: object) -> bool:
        going = original(self, result)
        if self.progressed.step == at:
            raise KeyError("power")
        return going

    learn.Watch.after_step = dies
    try:
        with pytest.raises(KeyError):
            tune(given, console=runs.quiet())
    finally:
        learn.Watch.after_step = original


@pytest.mark.parametrize(
    ("base", "method", "train", "said"),
    [
        ({}, {"freeze_a": True}, {}, "base.quantize is nf4"),
        ({"quantize": "int8"}, {"freeze_a": True}, {}, "base.quantize is nf4"),
        ({"quantize": "nf4"}, {}, {}, "freeze_a: true"),
        ({"quantize": "nf4"}, {"freeze_a": True}, {"compile": True}, "train.compile"),
    ],
)
def test_what_cannot_be_merged_is_refused(base: dict, method: dict, train: dict, said: str) -> None:
    given = Recipe.model_validate(
        {"data": {"train": "x.jsonl"}, "base": base, "train": {"merge_every": 5, **train}, "method": {"name": "lora"}}
    )
    with pytest.raises(RecipeError, match=said):
        check_repair(given, weft.LoRA(**method))
