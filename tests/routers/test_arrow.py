"""Arrow beside PEFT's, its prototypes, and what of them follows when adapters change."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import ArrowConfig, create_arrow_model
from torch import Tensor, nn

import weft
from tests.common.language import ids, llama
from weft.attach import records

TOKENS = ids()
SITE = "model.layers.0.self_attn.q_proj"


def base() -> Any:
    torch.manual_seed(0)
    return llama()


def tensors(model: nn.Module, name: str, address: str = SITE) -> dict[str, Tensor]:
    return records(model)[name].adapters[address].tensors()


def logits(model: nn.Module, route: object) -> Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(TOKENS).logits


def their_lora(folder: Path, seed: int) -> None:
    """One of PEFT's, whose update has one direction far above the others: PEFT iterates 15 times to find it."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
            if "lora_B" in name:
                p.mul_(torch.tensor([0.6, 0.06, 0.02]))
    model.save_pretrained(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("k", [1, 2, 3])
def test_peft_gives_the_same(k: int, tmp_path: Path) -> None:
    folders = [tmp_path / f"task_{i}" for i in range(3)]
    for seed, folder in enumerate(folders):
        their_lora(folder, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrow = ArrowConfig(top_k=k, router_temperature=0.7, rng_seed=0)
        theirs = create_arrow_model(base(), [str(f) for f in folders], arrow).eval()
        with torch.no_grad():
            wanted = theirs(TOKENS).logits
    ours = base()
    for i, folder in enumerate(folders):
        weft.load(ours, folder, name=f"task_{i}")
    weft.join(ours, weft.Arrow(k=k, temperature=0.7), [f"task_{i}" for i in range(3)], name="arrow")
    found = logits(ours, "arrow")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - logits(ours, None)).abs().max() > 1e-2


@pytest.fixture
def model() -> nn.Module:
    model = base()
    weft.attach(model, weft.LoRA(rank=3), ["q_proj"], name="pair", seed=1)
    weft.attach(model, weft.VeRA(rank=4), ["q_proj"], name="shares", seed=2)
    weft.attach(model, weft.IA3(), ["q_proj"], name="dense", seed=3)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.2 * torch.randn_like(p))
    return model


def first(update: Tensor) -> Tensor:
    return torch.linalg.svd(update)[2][0]


def test_prototypes_are_the_updates_first_singular_vectors_and_follow_a_join(model: nn.Module) -> None:
    def updates() -> list[Tensor]:
        weight = model.get_submodule(SITE).weight.detach().clone()
        found = []
        for name in ("pair", "shares", "dense"):
            weft.merge(model, name)
            found.append(model.get_submodule(SITE).weight.detach() - weight)
            weft.unmerge(model)
        return found

    for name in ("before", "after"):
        weft.join(model, weft.Arrow(), ["pair", "shares", "dense"], name=name)
        for own, update in zip(tensors(model, name)["V"], updates(), strict=True):
            assert abs(float(own @ first(update))) == pytest.approx(1, abs=1e-3)
        with torch.no_grad():
            tensors(model, "pair")["A"].mul_(torch.rand(3, 1) * 4)
    before, after = (tensors(model, name)["V"] for name in ("before", "after"))
    assert abs(float(before[0] @ after[0])) < 0.99
    assert torch.equal(before[1:], after[1:])


def test_general_experts_are_taken_off_the_others(model: nn.Module) -> None:
    arrow = weft.Arrow(k=1, general=("pair", "dense"))
    plan = weft.join(model, arrow, ["pair", "shares", "dense"], name="own")
    assert tensors(model, "own")["V"].shape == (1, 32)
    expected = logits(model, {"shares": 1.0, "pair": -0.5, "dense": -0.5})
    torch.testing.assert_close(logits(model, "own"), expected)
    assert plan.num_parameters == 0


def test_it_says_what_it_cannot_weigh(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="general=math: its experts are pair"):
        weft.join(model, weft.Arrow(general=("math",)), ["pair"])
    with pytest.raises(ValueError, match="k=3 is more than the 2 experts"):
        weft.join(model, weft.Arrow(), ["pair", "dense"])
    weft.join(model, weft.TopK(k=1), ["pair", "dense"], name="router")
    with pytest.raises(ValueError, match=r"no update at .*q_proj to point along"):
        weft.join(model, weft.Arrow(k=1), ["router"])


def test_fresh_experts_that_share_tensors_count_alike() -> None:
    model = base()
    weft.attach(model, weft.Arrow(experts=weft.experts(weft.VeRA(rank=4), 2), k=1), ["q_proj"], name="fresh")
    with weft.recording() as choices:
        logits(model, "fresh")
    assert choices.gates(SITE).unique().tolist() == [0.5]
