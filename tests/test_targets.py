"""Targets become a plan that says what is adapted, or an error that says what exists."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import weft
from tests.common.models import MODELS, assert_same_state, llama, state
from weft import patterns
from weft.attach import records
from weft.targets import PRESETS, TargetError

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
BERT_ATTENTION = [*(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense"]
EXPECTED = {  # what a preset means in the first layer of each model (T5: of its decoder)
    ("llama", "attention"): [f"self_attn.{n}" for n in QKVO],
    ("llama", "mlp"): ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    ("llama", "attention-blocks"): ["self_attn"],
    ("llama", "mlp-blocks"): ["mlp"],
    ("llama", "norms"): ["input_layernorm", "post_attention_layernorm"],
    ("gpt2", "attention"): ["attn.c_attn", "attn.c_proj"],
    ("gpt2", "mlp"): ["mlp.c_fc", "mlp.c_proj"],
    ("gpt2", "attention-blocks"): ["attn"],
    ("gpt2", "mlp-blocks"): ["mlp"],
    ("gpt2", "norms"): ["ln_1", "ln_2"],
    ("bert", "attention"): BERT_ATTENTION,
    ("bert", "mlp"): ["intermediate.dense", "output.dense"],
    ("bert", "attention-blocks"): ["attention"],
    ("bert", "norms"): ["attention.output.LayerNorm", "output.LayerNorm"],
    ("t5", "attention"): [
        f"layer.{i}.{a}.{n}" for i, a in enumerate(("SelfAttention", "EncDecAttention")) for n in "qkvo"
    ],
    ("t5", "mlp"): ["layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"],
    ("t5", "attention-blocks"): ["layer.0.SelfAttention", "layer.1.EncDecAttention"],
    ("t5", "mlp-blocks"): ["layer.2.DenseReluDense"],
    ("t5", "norms"): [f"layer.{i}.layer_norm" for i in range(3)],
    ("mixtral", "attention"): [f"self_attn.{n}" for n in QKVO],
    ("mixtral", "mlp"): ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ("mixtral", "attention-blocks"): ["self_attn"],
    ("mixtral", "mlp-blocks"): ["mlp"],
    ("mixtral", "norms"): ["input_layernorm", "post_attention_layernorm"],
    ("vit", "attention"): [f"attention.{n}" for n in QKVO],
    ("vit", "mlp"): ["mlp.fc1", "mlp.fc2"],
    ("vit", "attention-blocks"): ["attention"],
    ("vit", "mlp-blocks"): ["mlp"],
    ("vit", "norms"): ["layernorm_before", "layernorm_after"],
}
LAYER = {
    "llama": "model.layers.0.", "gpt2": "transformer.h.0.", "bert": "bert.encoder.layer.0.", "t5": "decoder.block.0.",
    "mixtral": "model.layers.0.", "vit": "vit.layers.0.",
}  # fmt: skip
LORA = weft.LoRA(rank=2)


def where(plan: weft.targets.Plan) -> list[str]:
    return [s.site.address for s in plan.sites]


@pytest.mark.parametrize(("name", "preset"), EXPECTED)
def test_presets_mean_the_same_in_every_architecture(name: str, preset: str) -> None:
    method = {"norms": weft.Full()}.get(preset, weft.Bottleneck(width=2) if preset.endswith("blocks") else LORA)
    found = where(weft.resolve(MODELS[name](), method, preset))
    start = LAYER[name]
    assert [a.removeprefix(start) for a in found if a.startswith(start)] == EXPECTED[name, preset]


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_attention_and_mlp_and_not_the_head(name: str) -> None:
    model = MODELS[name]()
    found = set(where(weft.resolve(model, LORA, "all-linear")))
    parts = {a for preset in ("attention", "mlp") for a in where(weft.resolve(model, LORA, preset))}
    assert parts <= found
    assert found - parts <= {"bert.pooler.dense"}
    assert not {"lm_head", "classifier"} & found


def test_all_linear_leaves_bare_matrices_that_are_no_weights() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.randn(8, 4))
            self.in_proj = nn.Linear(8, 8)

    assert where(weft.resolve(nn.Sequential(Scan()), LORA, "all-linear")) == ["0.in_proj"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("model.layers.1.self_attn.q_proj", 1),
        ("*.q_proj", 2),
        ("model.layers.[0]*proj", 7),
        (r"re:.*\.(q|v)_proj", 4),
        (r"re:.*layers\.1\..*_proj", 7),
        ("lm_head", 1),
        ("embed_tokens", 1),
        (["q_proj", "*.up_proj"], 4),
        (["q_proj", "*.q_proj"], 2),
    ],
)
def test_names_globs_and_expressions(pattern: str | list[str], count: int) -> None:
    assert len(weft.resolve(llama(), LORA, pattern).sites) == count


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            "q_prj",
            r"target 'q_prj' matches no module of LlamaForCausalLM; did you mean 'q_proj'\? It has .*down_proj",
        ),
        ("zzz", r"target 'zzz' matches no module of LlamaForCausalLM\. It has .*down_proj"),
        (["q_proj", "w_proj", "v_proj"], r"target 'w_proj' matches no module"),
        (r"re:q_proj", r"target 're:q_proj' matches no module"),  # an expression must match the whole address
        ({"q_proj": {}, "c_attn": {"rank": 4}}, r"target 'c_attn' matches no module"),
        ({"q_proj": {"rnk": 4}}, r"targets\['q_proj'\]: lora has no option 'rnk'; did you mean 'rank'\?"),
        ("mlp-blocks", r"lora cannot adapt model\.layers\.0\.mlp \(LlamaMLP, kind block\); it adapts: conv, embedding"),
        ("self_attn", r"lora cannot adapt model\.layers\.0\.self_attn \(LlamaAttention, kind block\)"),
        ("norms", r"lora cannot adapt model\.layers\.0\.input_layernorm \(LlamaRMSNorm, kind norm\); it adapts"),
        ([], r"nothing is left to adapt"),
    ],
)
def test_what_does_not_fit_is_an_error_and_nothing_changes(targets: object, sentence: str) -> None:
    model = llama()
    before = state(model)
    with pytest.raises(TargetError, match=sentence):
        weft.attach(model, LORA, targets=targets)
    assert_same_state(state(model), before)
    assert type(model) is LlamaForCausalLM


def test_a_shape_that_the_method_cannot_take_names_the_site() -> None:
    with pytest.raises(
        TargetError, match=r"shira cannot adapt .*q_proj: rank 9 trains 288 entries and the weight has 256"
    ):
        weft.resolve(llama(), weft.SHiRA(rank=9), "q_proj")


def test_a_preset_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(
        TargetError, match=r"target 'mlp-blocks' matches no module of BertForSequenceClassification\. It has"
    ):
        weft.resolve(MODELS["bert"](), weft.Bottleneck(width=2), "mlp-blocks")


def test_options_by_pattern() -> None:
    model = llama()
    plan = weft.attach(
        model, LORA, targets={"q_proj": {"rank": 4}, "re:.*layers.0.*proj": {}, "v_proj": {"alpha": 1.0}}
    )
    ranks = {s.site.address: (s.method.rank, s.method.alpha) for s in plan.sites}
    assert ranks["model.layers.0.self_attn.q_proj"] == (4, 16.0)  # the first pattern that matches decides
    assert ranks["model.layers.0.self_attn.v_proj"] == (2, 16.0)
    assert ranks["model.layers.1.self_attn.v_proj"] == (2, 1.0)
    assert len(ranks) == 9
    tensors = records(model)["default"].adapters["model.layers.0.self_attn.q_proj"].tensors()
    assert tensors["A"].shape == (4, 16)
    assert plan.num_parameters == sum(p.numel() for p in weft.parameters(model))


@pytest.mark.parametrize(
    ("layers", "kept"), [("1", {1}), ("0-1", {0, 1}), ("0,1", {0, 1}), ([0], {0}), (range(1, 9), {1})]
)
def test_layers(layers: object, kept: set[int]) -> None:
    assert {s.site.layer for s in weft.resolve(llama(), LORA, "mlp", layers=layers).sites} == kept


def test_layers_that_do_not_exist_or_cannot_be_read() -> None:
    with pytest.raises(TargetError, match=r"layers='5-7' leaves none of the matched sites; the model has layers 0-1"):
        weft.resolve(llama(), LORA, "mlp", layers="5-7")
    with pytest.raises(TargetError, match=r"layers='last': expected numbers and ranges such as '4-7'"):
        weft.resolve(llama(), LORA, "mlp", layers="last")


def test_exclude() -> None:
    assert len(weft.resolve(llama(), LORA, "all-linear", exclude=["mlp", "o_proj"]).sites) == 6
    with pytest.raises(TargetError, match=r"exclude='c_attn' matches none of the chosen sites"):
        weft.resolve(llama(), LORA, "attention", exclude=["c_attn"])
    with pytest.raises(TargetError, match=r"nothing is left to adapt"):
        weft.resolve(llama(), LORA, "attention", exclude=["attention"])


def test_a_saved_head_is_trained_whole() -> None:
    model = MODELS["bert"]().eval()
    plan = weft.attach(model, LORA, targets="attention", save_modules=["classifier"])
    assert [(s.site.address, s.method.name) for s in plan.sites if s.method != LORA] == [("classifier", "full")]
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    loss = before.square().sum()
    loss.backward()
    head = records(model)["default"].adapters["classifier"].tensors()
    assert head["weight"].shape == (3, 16)
    assert all(p.grad is not None for p in head.values())
    with torch.no_grad():
        head["bias"].add_(1.0)
    assert torch.allclose(model(ids).logits, before + 1, atol=1e-5)
    weft.use(model, None)
    assert torch.equal(model(ids).logits, before)  # the base's own head is as it was
    with pytest.raises(TargetError, match=r"target 'score' matches no module"):
        weft.resolve(model, LORA, "attention", save_modules=["score"])


def test_a_plain_module_with_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5), nn.BatchNorm1d(5))
    plan = weft.resolve(model, LORA, ["0", "3"])
    assert [(s.site.kind, s.site.shape) for s in plan.sites] == [("conv", (8, 3, 3, 3)), ("linear", (5, 32))]
    assert where(weft.resolve(model, LORA, "all-linear")) == ["3"]
    weft.attach(model, LORA, targets=["0", "3"])
    x = torch.randn(2, 3, 4, 4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in weft.parameters(model))
    with pytest.raises(TargetError, match=r"target '1' matches no module of Sequential"):
        weft.resolve(model, LORA, "1")


def test_the_plan_prints_every_site_and_the_total() -> None:
    plan = weft.resolve(llama(), LORA, "attention", name="math")
    lines = str(plan).splitlines()
    assert lines[0].split() == ["module", "kind", "out", "in", "method", "parameters"]
    assert lines[1].split() == ["model.layers.0.self_attn.q_proj", "linear", "16", "16", "lora", "64"]
    assert lines[-1].startswith("math: LoRA(rank=2")
    assert lines[-1].endswith(f"at 8 sites, {plan.num_parameters:,} parameters")
    assert len(lines) == 10


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_explained(preset: str) -> None:
    assert len(PRESETS[preset].split()) > 2


@pytest.mark.parametrize("name", MODELS)
def test_what_an_index_finds_is_what_a_look_at_every_place_finds(name: str) -> None:
    model = MODELS[name]()
    places, head = weft.candidates(model), patterns.output_head(model)
    index = patterns.Index(places, head)
    names = {c.address[i:] for c in places for i in range(len(c.address)) if i == 0 or c.address[i - 1] == "."}
    for pattern in [*sorted(names), *PRESETS, "*.0.*", "re:.*1.*", "nothing", "."]:
        for method in (None, weft.LoRA(), weft.Bottleneck()):
            expected = [c for c in places if patterns._matches(pattern, c, head, method)]
            assert index.named(pattern, method) == expected


def test_an_address_is_not_compared_with_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    addresses = [s.site.address for s in weft.resolve(model, weft.LoRA()).sites]
    compared, named = [], patterns._named
    monkeypatch.setattr(patterns, "_named", lambda p, a: compared.append(a) or named(p, a))
    assert where(weft.resolve(model, weft.LoRA(), addresses, exclude=addresses[1:])) == addresses[:1]
    assert len(compared) == 2 * len(addresses) - 1
