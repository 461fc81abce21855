"""Every method that PEFT has, on every architecture: folders cross both ways and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import weft
from tests.interop.architectures import (
    ARCHITECTURES,
    Architecture,
    assert_close,
    base,
    outputs,
    quiet,
    reloaded,
    shake,
    tensors_of,
    trained,
)

pytestmark = pytest.mark.oracle

MAPS = "linear", "conv", "embedding", "parameters"
CAUSAL = "llama", "gpt2", "mixtral"
IMAGE = "a model of images has no tokens"


class Case:
    """One method: PEFT's configuration, ours, and at which kinds of module both have it."""

    def __init__(
        self, theirs: Any, ours: Any, kinds: tuple[str, ...], *, skip: dict[str, str] | None = None, **both: Any
    ):
        self.theirs, self.ours, self.kinds, self.skip, self.options = theirs, ours, kinds, skip or {}, both

    def targets(self, a: Architecture) -> list[str]:
        return [n for kind in self.kinds if kind != "parameters" for n in getattr(a, kind)]

    def parameters(self, a: Architecture) -> list[str]:
        return [*a.parameters] if "parameters" in self.kinds else []


GPT2 = {"gpt2": "PEFT has it for no Conv1D"}
CASES = {
    "lora": Case(
        lambda **o: peft.LoraConfig(r=4, lora_alpha=6, **o), lambda: weft.LoRA(rank=4, alpha=6.0), MAPS
    ),
    "rslora": Case(
        lambda **o: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.1, **o),
        lambda: weft.LoRA(rank=4, alpha=6.0, rank_stabilised=True, dropout=0.1), ("linear", "conv", "embedding"),
    ),
    "gaussian": Case(
        lambda **o: peft.LoraConfig(r=2, init_lora_weights="gaussian", **o), lambda: weft.LoRA(rank=2, start="normal"),
        ("linear",),
    ),
    "orthogonal": Case(
        lambda **o: peft.LoraConfig(r=2, init_lora_weights="orthogonal", **o),
        lambda: weft.LoRA(rank=2, start="orthogonal"), ("linear",),
    ),
    "pissa": Case(
        lambda **o: peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", **o),
        lambda: weft.LoRA(rank=4, alpha=6.0, start="pissa"), ("linear",),
    ),
    "olora": Case(
        lambda **o: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights="olora", **o),
        lambda: weft.LoRA(rank=4, alpha=6.0, rank_stabilised=True, start="olora"), ("linear",),
        skip={"gpt2": "PEFT decomposes the transposed weight of a Conv1D and cannot run what it makes"},
    ),
    "dora": Case(
        lambda **o: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **o), lambda: weft.DoRA(rank=4, alpha=6.0),
        ("linear", "conv", "embedding"),
    ),
    "vera": Case(
        lambda **o: peft.VeraConfig(r=8, projection_prng_key=5, **o), lambda: weft.VeRA(rank=8, projection_seed=5),
        ("linear",),
    ),
    "vera_seed": Case(
        lambda **o: peft.VeraConfig(r=8, projection_prng_key=5, save_projection=False, **o),
        lambda: weft.VeRA(rank=8, projection_seed=5), ("linear",),
    ),
    "oft": Case(
        lambda **o: peft.OFTConfig(oft_block_size=8, **o), lambda: weft.OFT(block_size=8), ("linear", "embedding"),
        skip=GPT2,
    ),
    "coft": Case(
        lambda **o: peft.OFTConfig(
            oft_block_size=8, coft=True, eps=0.2, use_cayley_neumann=False, block_share=True, **o
        ),
        lambda: weft.OFT(block_size=8, constrained=True, eps=0.2, neumann_terms=None, block_share=True), ("linear",),
        skip=GPT2,
    ),
    "boft": Case(
        lambda **o: peft.BOFTConfig(boft_block_size=4, **o), lambda: weft.BOFT(block_size=4), ("linear", "conv"),
        skip=GPT2,
    ),
    "road": Case(
        lambda **o: peft.RoadConfig(variant="road_2", group_size=8, **o), lambda: weft.RoAd(variant=2, group_size=8),
        ("linear",), skip=GPT2,
    ),
    "ia3": Case(
        lambda **o: peft.IA3Config(feedforward_modules=[], **o), weft.IA3, ("linear", "conv"),
    ),
    "norm_tuning": Case(peft.LNTuningConfig, weft.NormTuning, ("norm",)),
    "shira": Case(lambda **o: peft.ShiraConfig(r=2, **o), lambda: weft.SHiRA(rank=2), ("linear",), skip=GPT2),
    "loha": Case(
        lambda **o: peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, **o),
        lambda: weft.LoHa(rank=3, alpha=5.0, effective_conv=True), ("linear", "conv"), skip=GPT2,
    ),
    "lokr": Case(
        lambda **o: peft.LoKrConfig(r=2, alpha=5, decompose_both=True, **o),
        lambda: weft.LoKr(rank=2, alpha=5.0, decompose_both=True), ("linear", "conv"), skip=GPT2,
    ),
    "fourierft": Case(
        lambda **o: peft.FourierFTConfig(n_frequency=40, scaling=30.0, random_loc_seed=5, **o),
        lambda: weft.FourierFT(num_frequencies=40, scaling=30.0, location_seed=5), ("linear",),
    ),
}  # fmt: skip

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "mixtral": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
TOKENS = {
    "prompt": Case(
        lambda **o: peft.PromptTuningConfig(num_virtual_tokens=3, **o), lambda: weft.PromptTuning(num_tokens=3), (),
        skip={"vit": IMAGE},
    ),
    "prefix": Case(
        lambda **o: peft.PrefixTuningConfig(num_virtual_tokens=3, **o), lambda: weft.PrefixTuning(num_tokens=3), (),
        skip={"vit": IMAGE, "t5": "our prefix tuning has no encoder-decoder models"},
    ),
    "prefix_projection": Case(
        lambda **o: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=24, **o),
        lambda: weft.PrefixTuning(num_tokens=3, projection=True, hidden_size=24), (),
        skip={"vit": IMAGE, "t5": "our prefix tuning has no encoder-decoder models"},
    ),
    "adaption_prompt": Case(
        lambda task_type: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type=task_type),
        lambda: weft.LlamaAdapter(num_tokens=4, num_layers=1), (),
        skip=dict.fromkeys(["vit", "t5", "bert", "mixtral"], "PEFT has it for Llama, Mistral and GPT-2"),
    ),
}  # fmt: skip

CELLS = [(m, a) for m, c in CASES.items() for a in ARCHITECTURES if a not in c.skip]
TOKEN_CELLS = [(m, a) for m, c in TOKENS.items() for a in ARCHITECTURES if a not in c.skip]


@pytest.mark.parametrize(("method", "architecture"), CELLS)
def test_what_peft_wrote_computes_the_same_here(method: str, architecture: str, tmp_path: Path) -> None:
    case, a = CASES[method], ARCHITECTURES[architecture]
    model = base(architecture)
    options: dict[str, Any] = {"target_modules": case.targets(a), "modules_to_save": [a.head]}
    if case.parameters(a):
        options["target_parameters"] = case.parameters(a)
    with quiet():
        config = case.theirs(**options)
    theirs = trained(base(architecture), config, tmp_path)
    plain = outputs(model, a.batch())
    weft.load(model, tmp_path, name="from_peft")
    assert_close(outputs(model, a.batch()), outputs(theirs, a.batch()), plain)
    weft.use(model, None)
    assert torch.equal(outputs(model, a.batch()), plain)


@pytest.mark.parametrize(("method", "architecture"), CELLS)
def test_what_we_wrote_computes_the_same_there(method: str, architecture: str, tmp_path: Path) -> None:
    case, a = CASES[method], ARCHITECTURES[architecture]
    model = base(architecture)
    plain = outputs(model, a.batch())
    targets = [*case.targets(a), *case.parameters(a)]
    weft.attach(model, case.ours(), targets, save_modules=[a.head], tied="separate", name="ours")
    shake(weft.parameters(model))
    weft.save(model, tmp_path / "it", format="peft")
    wanted = outputs(model, a.batch())
    assert_close(wanted, outputs(reloaded(base(architecture), tmp_path / "it"), a.batch()), plain)
    again = base(architecture)
    weft.load(again, tmp_path / "it")
    assert torch.equal(outputs(again, a.batch()), wanted)
    before, after = tensors_of(model, "ours"), tensors_of(again, "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("method", "architecture"), TOKEN_CELLS)
def test_virtual_tokens_that_peft_wrote(method: str, architecture: str, tmp_path: Path) -> None:
    a, model = ARCHITECTURES[architecture], base(architecture)
    theirs = trained(base(architecture), TOKENS[method].theirs(task_type=TASKS[architecture]), tmp_path, size=0.5)
    plain = outputs(model, a.batch())
    weft.load(model, tmp_path, name="from_peft")
    assert_close(outputs(model, a.batch()), outputs(theirs, a.batch()), plain)


@pytest.mark.parametrize(("method", "architecture"), TOKEN_CELLS)
def test_virtual_tokens_that_we_wrote(method: str, architecture: str, tmp_path: Path) -> None:
    a, model = ARCHITECTURES[architecture], base(architecture)
    plain = outputs(model, a.batch())
    weft.attach(model, TOKENS[method].ours(), name="ours")
    shake(weft.parameters(model), 0.5)
    weft.save(model, tmp_path / "it", format="peft")
    wanted = outputs(model, a.batch())
    assert_close(wanted, outputs(reloaded(base(architecture), tmp_path / "it"), a.batch()), plain)
    again = base(architecture)
    weft.load(again, tmp_path / "it")
    torch.testing.assert_close(outputs(again, a.batch()), wanted, rtol=0, atol=1e-6)
    if method != "prefix_projection":
        assert all(torch.equal(v, tensors_of(again, "ours")[k]) for k, v in tensors_of(model, "ours").items())
