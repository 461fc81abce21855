"""A recipe says what to do at a weight that two modules hold: planned, trained, checked, saved and loaded so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from tests.tune.runs import bare, make_data, make_tokenizer, quiet
from weft.errors import AdapterError, RecipeError
from weft.recipe import Recipe, load_recipe
from weft.tune import tune
from weft.tune.ahead import sampled
from weft.tune.skeleton import skeleton


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose head is its input embedding, and data."""
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return folder / "base", make_data(folder / "data")


def recipe(place: tuple[Path, Path], output: Path, method: dict[str, Any], **more: Any) -> Any:
    plain = bare(*place, output, steps=3, checkpoint_every=None).model_dump()
    report = {"html": False, "examples": 0, "forecast": False}
    return plain | {"method": method, "check": {"rows": 2}, "report": report} | more


METHODS = {
    "trainable_tokens": {"name": "trainable_tokens", "token_ids": [19, 26, 27, 280, 281]},
    "invertible": {"name": "invertible"},
}


@pytest.mark.parametrize(("method", "tied"), [("trainable_tokens", "share"), ("trainable_tokens", "separate"),
                                              ("invertible", "separate")])  # fmt: skip
def test_a_run_on_a_base_with_tied_embeddings(place: tuple[Path, Path], method: str, tied: str, tmp_path: Path) -> None:
    said = recipe(place, tmp_path / "run", METHODS[method], tied=tied)
    tune(Recipe.model_validate(said), console=quiet())
    model = transformers.AutoModelForCausalLM.from_pretrained(place[0]).eval()
    plan = weft.load(model, tmp_path / "run" / "adapter", name="a")
    assert plan.tied == tied
    planned = Recipe.model_validate(said)
    assert skeleton(planned, *sampled(planned)[:2]).plan.tied == tied  # what a forecast goes by, trained on the way
    assert f"tied: {tied}" in (tmp_path / "run" / "recipe.yaml").read_text()
    ids = torch.tensor([[19, 280, 7, 281]])
    with torch.no_grad():
        live = model(ids).logits
        weft.use(model, None)
        assert not torch.equal(model(ids).logits, live), "nothing was learnt"


def test_without_a_word_it_is_refused(place: tuple[Path, Path], tmp_path: Path) -> None:
    said = recipe(place, tmp_path / "run", METHODS["trainable_tokens"])
    with pytest.raises(AdapterError, match="tied='share'"):
        tune(Recipe.model_validate(said), console=quiet())


def test_what_the_key_takes(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text("data: train.jsonl\ntied: both\n")
    with pytest.raises(RecipeError, match="tied"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("data: train.jsonl\ntied: share\nstart: ../adapter\n")
    with pytest.raises(RecipeError, match="leave tied out"):
        load_recipe(tmp_path / "recipe.yaml")


def test_an_adapted_head_learns_where_the_loss_stands_in_for_it(place: tuple[Path, Path], tmp_path: Path) -> None:
    for tied in ("share", "separate"):
        said = recipe(place, tmp_path / tied, {"name": "lora", "rank": 2}, targets=["lm_head"], tied=tied)
        tune(Recipe.model_validate(said), console=quiet())
        model = transformers.AutoModelForCausalLM.from_pretrained(place[0]).eval()
        weft.load(model, tmp_path / tied / "adapter", name="a")
        assert all(p.abs().max() > 0 for p in weft.parameters(model))
