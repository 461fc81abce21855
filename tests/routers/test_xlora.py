"""X-LoRA beside PEFT's, and what a first pass of the base means for batches, caches and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.language import bert, ids, llama, padded
from tests.interop.architectures import quiet
from weft.attach import records

TOKENS = ids(3, 6)
TARGETS = ["q_proj", "up_proj"]


def base() -> Any:
    torch.manual_seed(0)
    return llama(use_cache=False)


def shaken(parameters: Any, seed: int = 0, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=generator))


def theirs(tmp_path: Path, **options: Any) -> Any:
    """PEFT's, over three LoRAs that it has saved."""
    folders = {}
    for i in range(3):
        with quiet():
            model = peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
            shaken([p for n, p in model.named_parameters() if "lora_" in n], seed=i)
            folders[str(i)] = str(tmp_path / str(i))
            model.save_pretrained(folders[str(i)])
    with quiet():
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=folders, **options)
        found = peft.get_peft_model(base(), config)
    shaken(found.base_model.internal_xlora_classifier.parameters(), seed=9)
    return found.eval()


def ours(tmp_path: Path, model: Any, router: weft.Method) -> Any:
    """The same LoRAs under our router, with PEFT's classifier."""
    found = base()
    for i in range(3):
        weft.load(found, tmp_path / str(i), name=f"e{i}")
    weft.join(found, router, ["e0", "e1", "e2"], name="x")
    own = records(found)["x"].shared["xlora"].tensors()
    maps = [m for m in model.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for i, m in enumerate(maps[:-1]):
            own[f"M_{i}"].copy_(m.weight), own[f"bM_{i}"].copy_(m.bias)
        for k in range(3):
            own[f"W_e{k}"].copy_(maps[-1].weight.unflatten(0, (-1, 3))[:, k])
            own[f"bW_e{k}"].copy_(maps[-1].bias.unflatten(0, (-1, 3))[:, k])
    return found


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("theirs_", "ours_"),
    [
        ({}, {}),
        ({"softmax_temperature": 0.5, "global_scaling_weight": 2.0}, {"temperature": 0.5, "scale": 2.0}),
        ({"xlora_depth": 3, "xlora_size": 10}, {"depth": 3, "width": 10}),
        ({"layerwise_scalings": True, "top_k_lora": 2}, {"layerwise": True, "k": 2}),
        (
            {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "xlora_depth": 2, "xlora_size": 7},
            {"softmax": "chosen", "k": 2, "depth": 2, "width": 7},
        ),
        ({"enable_softmax": False}, {"softmax": "none"}),
    ],
)
def test_peft_gives_the_same(theirs_: dict[str, Any], ours_: dict[str, Any], tmp_path: Path) -> None:
    model = theirs(tmp_path, **theirs_)
    found = ours(tmp_path, model, weft.XLoRA(**ours_))
    with torch.no_grad():
        wanted, here = model(input_ids=TOKENS).logits, found(input_ids=TOKENS).logits
        torch.testing.assert_close(here, wanted, rtol=1e-5, atol=1e-5)
        with weft.using(found, None):
            assert (found(input_ids=TOKENS).logits - wanted).abs().max() > 1e-2


def woven(model: Any, targets: list[str] = TARGETS, **options: Any) -> Any:
    experts = (*weft.experts(weft.LoRA(rank=2), 2), weft.core.router.Expert("gain", weft.IA3()))
    weft.attach(model, weft.XLoRA(experts=experts, **options), targets, name="x")
    shaken(weft.parameters(model, "x"))
    return model


def logits(model: Any, tokens: Tensor, route: object = "x") -> Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(input_ids=tokens).logits


def test_rows_share_a_batch_with_others() -> None:
    model = woven(base())
    weft.attach(model, weft.LoRA(rank=2), TARGETS, name="other")
    shaken(weft.parameters(model, "other"))
    mixed = logits(model, TOKENS, ["x", "other", None])
    for i, name in enumerate(["x", "other", None]):
        torch.testing.assert_close(mixed[i], logits(model, TOKENS[i : i + 1], name)[0])


def test_every_site_has_the_same_gates_unless_layerwise() -> None:
    for layerwise in (False, True):
        model = woven(base(), layerwise=layerwise)
        with weft.recording() as choices:
            logits(model, TOKENS)
        first, *others = (choices.gates(a) for a in choices.names)
        assert first.shape == (TOKENS.numel(), 3)
        torch.testing.assert_close(first.sum(-1), torch.ones(len(first)))
        assert all(torch.equal(first, g) != layerwise for g in others)


def test_a_site_reads_its_own_scores_whatever_was_there_before() -> None:
    models = base(), base()
    weft.attach(models[1], weft.LoRA(rank=2), ["up_proj"], name="before")
    first, second = (logits(woven(model, layerwise=True), TOKENS) for model in models)
    assert torch.equal(first, second)


def test_it_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = woven(base(), depth=2, width=5, dropout=0.0)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    own = weft.parameters(model, "x")
    assert all(p.grad is not None and p.grad.any() for p in own)
    assert all(p.grad is None for p in model.parameters() if id(p) not in {id(o) for o in own})
    model.eval()
    weft.save(model, tmp_path / "x", "x")
    fresh = base()
    weft.load(fresh, tmp_path / "x", name="x")
    assert torch.equal(logits(fresh, TOKENS, "x"), logits(model, TOKENS))


def test_an_encoder_with_padding_is_surveyed_with_its_mask() -> None:
    torch.manual_seed(0)
    model = woven(bert(), ["query"])
    batch = padded(ids(2, 6), (0, 2), "right")
    with torch.no_grad():
        both = model(**batch).logits
        alone = model(input_ids=batch["input_ids"][1:, :4]).logits
    torch.testing.assert_close(both[1, :4], alone[0])


def test_generation_keeps_a_cache_for_the_base_too() -> None:
    model = woven(base())
    model.generation_config.eos_token_id = None  # no row ends early
    how = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(TOKENS, use_cache=False, **how)
    assert torch.equal(model.generate(TOKENS, use_cache=True, **how), plain)
    step = logits(model, plain[:, :-1])[:, -1].argmax(-1)
    assert torch.equal(step, plain[:, -1])
    with pytest.raises(ValueError, match="without beams"):
        model.generate(TOKENS, use_cache=True, num_beams=2, **how)
    beams = model.generate(TOKENS, use_cache=False, num_beams=2, **how)
    assert beams.shape == plain.shape
    with torch.no_grad():
        with weft.using(model, None):
            cache = model(input_ids=TOKENS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="the base alone has read 0"):
            model(input_ids=TOKENS[:, :1], past_key_values=cache)


def test_what_it_cannot_do_says_why() -> None:
    model = woven(base(), hidden_size=20)
    with pytest.raises(ValueError, match="hidden_size of 32"):
        logits(model, TOKENS)
    plain = woven(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), ["q_proj"])
    with pytest.raises(ValueError, match="was called alone"):
        plain["q_proj"](torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="wants k"):
        weft.join(base_with_lora(), weft.XLoRA(softmax="chosen"), ["a"])


def base_with_lora() -> Any:
    model = base()
    weft.attach(model, weft.LoRA(rank=2), TARGETS, name="a")
    return model
