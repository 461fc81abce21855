"""Virtual tokens: prompts, prefixes and LLaMA-Adapter in batches, in generation and beside other adapters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import weft
from tests.common.language import CAUSAL, bert, close, generate, ids, llama, padded, t5, tensors
from weft.attach import AdapterError
from weft.targets import TargetError


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prefix_under_every_attention(implementation: str) -> None:
    torch.manual_seed(0)
    model = llama(attn_implementation=implementation)
    weft.attach(model, weft.PrefixTuning(num_tokens=4), name="x")
    weft.attach(model, weft.PrefixTuning(num_tokens=2), name="y", seed=1)
    torch.manual_seed(0)
    reference = llama()
    weft.attach(reference, weft.PrefixTuning(num_tokens=4), name="x")
    rows = ids(3)
    weft.use(model, ["x", None, "y"])
    close(model(rows, use_cache=False).logits[:1], reference(rows[:1]).logits)


def test_llama_adapter_starts_as_the_base_even_with_biases() -> None:
    model = llama(attention_bias=True)
    nn.init.normal_(model.model.layers[-1].self_attn.o_proj.bias)
    rows = ids()
    base = model(rows).logits
    plan = weft.attach(model, weft.LlamaAdapter(num_tokens=4, num_layers=2), name="a")
    assert [s.path for s in plan.sites] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    close(model(rows).logits, base, 1e-6)


def test_masked_and_bare_encoders_keep_the_length_of_the_input() -> None:
    model, rows = bert(), ids()
    weft.attach(model, weft.PromptTuning(num_tokens=5), name="p")
    result = model(rows, labels=rows, output_hidden_states=True)
    assert result.logits.shape[:2] == (2, 7)
    assert {h.shape[1] for h in result.hidden_states} == {7}
    bare = bert(transformers.BertModel)
    plan = weft.attach(bare, weft.PromptTuning(num_tokens=5), name="p")
    assert plan.sites[0].site.address == "input"
    assert bare(rows).last_hidden_state.shape == (2, 7, 32)
    assert bare(rows, return_dict=False)[0].shape == (2, 7, 32)
    weft.detach(bare)
    assert type(bare) is transformers.BertModel
    assert not bare._modules.keys() & {"adapters"}


def test_bert_prefix_is_seen_by_every_layer() -> None:
    model, rows = bert(), ids()
    with torch.no_grad():
        base = model(rows).logits
        weft.attach(model, weft.PrefixTuning(num_tokens=3), name="x")
        moved = model(rows).logits
        weft.use(model, ["x", None])
        mixed = model(rows).logits
    assert (moved - base).abs().max() > 1e-3
    close(mixed, torch.stack([moved[0], base[1]]))


def test_t5_rows_with_and_without_a_prompt() -> None:
    model, rows, labels = t5(), padded(ids(3), (0, 2, 1), "right"), ids(3, 4)
    base = model(**rows, labels=labels).logits
    weft.attach(model, weft.PromptTuning(num_tokens=5), name="p")
    weft.attach(model, weft.PromptTuning(num_tokens=2), name="q", seed=1)
    alone = {}
    for name in ("p", "q"):
        weft.use(model, name)
        alone[name] = model(**rows, labels=labels).logits
    weft.use(model, ["p", None, "q"])
    close(model(**rows, labels=labels).logits, torch.stack([alone["p"][0], base[1], alone["q"][2]]))
    weft.use(model, [None, "p", None])
    out = model.generate(**rows, max_new_tokens=4, min_new_tokens=4, num_beams=2)
    weft.use(model, None)
    assert torch.equal(out[0], model.generate(**rows, max_new_tokens=4, min_new_tokens=4, num_beams=2)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_one_batch_with_different_adapters(family: str, use_cache: bool) -> None:
    model, batch = CAUSAL[family](), padded(ids(6), (0, 2, 0, 3, 1, 0))
    weft.attach(model, weft.PromptTuning(num_tokens=5), name="p")
    weft.attach(model, weft.PromptTuning(num_tokens=2), name="q", seed=1)
    weft.attach(model, weft.PrefixTuning(num_tokens=3), name="x")
    weft.attach(model, weft.LlamaAdapter(num_tokens=3), name="a")
    lora = weft.LoRA(rank=2)
    weft.attach(model, lora, name="l")
    with torch.no_grad():
        for parameter in (*weft.parameters(model, "l"), *weft.parameters(model, "a")):
            parameter.normal_(std=0.5)
    routes = ["p", None, "x", "l", "q", weft.Stack("l", "a", "x", "p")]
    logits, texts = [], []
    for i, route in enumerate(routes):
        weft.use(model, route)
        row = {k: v[i : i + 1] for k, v in batch.items()}
        logits.append(model(**row).logits[0])
        texts.append(generate(model, row, use_cache=use_cache)[0])
    weft.use(model, routes)
    real = batch["attention_mask"].bool()
    together = model(**batch).logits
    for i, expected in enumerate(logits):
        close(together[i][real[i]], expected[real[i]])
    assert torch.equal(generate(model, batch, use_cache=use_cache), torch.stack(texts))
    with pytest.raises(ValueError, match="6 rows"):
        model(ids(2))


def test_none_is_the_base_to_the_bit_and_detaching_leaves_the_model_that_came_in() -> None:
    model, rows = llama(), ids()
    names, classes = [*model.state_dict()], [type(m) for m in model.modules()]
    base = model(rows).logits
    weft.attach(model, weft.PromptTuning(), name="p")
    for name in ("x", "y"):
        weft.attach(model, weft.PrefixTuning(num_tokens=3), name=name)
    both = model(rows).logits
    weft.detach(model, "p")
    assert torch.equal(model(rows).logits, both)
    weft.attach(model, weft.PromptTuning(), name="p")
    assert [n for n in model.state_dict() if ".adapters." not in n] == names
    weft.use(model, None)
    assert torch.equal(model(rows).logits, base)
    weft.detach(model, "x")
    weft.use(model, "y")
    assert not torch.equal(model(rows).logits, base)
    weft.detach(model)
    assert torch.equal(model(rows).logits, base)
    assert [type(m) for m in model.modules()] == classes
    assert [*model.state_dict()] == names
    assert all(not {"seat", "seats", "weave"} & m.__dict__.keys() for m in model.modules())


@pytest.mark.parametrize("name", ["p", "x", "a"])
def test_virtual_tokens_cannot_be_merged_or_blended(name: str) -> None:
    model = llama()
    methods = {"p": weft.PromptTuning(), "x": weft.PrefixTuning(), "a": weft.LlamaAdapter()}
    weft.attach(model, methods[name], name=name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match="no weight can express"):
        weft.merge(model, name)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match="no prompt that was trained"):
        weft.use(model, {name: 0.5})
    model(ids())


def test_classification_pools_the_last_real_token() -> None:
    model = transformers.LlamaForSequenceClassification(llama().config).eval()
    rows = padded(ids(), (0, 3), "right")
    weft.attach(model, weft.PromptTuning(num_tokens=5), name="p")
    alone = model(rows["input_ids"][1:, :4]).logits
    close(model(**rows).logits[1:], alone)
    assert model(**rows, labels=torch.tensor([0, 1])).loss.isfinite()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["PromptTuning", "PrefixTuning", "LlamaAdapter"])
def test_gradient_checkpointing_changes_no_gradient(family: str, method: str) -> None:
    model, rows = CAUSAL[family](), ids()
    weft.attach(model, getattr(weft, method)(num_tokens=4), name="p")
    with torch.no_grad():
        for parameter in weft.parameters(model):
            parameter.normal_(std=0.3)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    plain = torch.autograd.grad(model(rows, labels=rows, use_cache=False).loss, weft.parameters(model))
    model.activation_checkpointing_enable()
    checked = torch.autograd.grad(model(rows, labels=rows, use_cache=False).loss, weft.parameters(model))
    assert all(g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, checked, strict=True):
        close(a, b, 1e-7)


@pytest.mark.parametrize("route", ["p", "x", "a", ["p", "x"]], ids=str)
def test_compiles_without_a_graph_break(route: Any) -> None:
    model, rows = llama(), ids()
    weft.attach(model, weft.PromptTuning(num_tokens=4), name="p")
    weft.attach(model, weft.PrefixTuning(num_tokens=3), name="x")
    weft.attach(model, weft.LlamaAdapter(num_tokens=3), name="a")
    weft.use(model, route)
    expected = model(rows, labels=rows, use_cache=False)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager", fullgraph=True)(rows, labels=rows, use_cache=False)
    close(found.logits, expected.logits, 1e-6)
    close(found.loss, expected.loss, 1e-6)


def test_copies_and_pickles_keep_their_virtual_tokens() -> None:
    model, rows = llama(), ids()
    weft.attach(model, weft.PromptTuning(num_tokens=4), name="p")
    weft.attach(model, weft.PrefixTuning(num_tokens=3), name="x")
    weft.use(model, ["p", "x"])
    expected = model(rows).logits
    assert torch.equal(copy.deepcopy(model)(rows).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(rows).logits, expected)


def test_counts_without_allocating() -> None:
    with torch.device("meta"):
        model = llama()
    for method, count in (
        (weft.PromptTuning(num_tokens=5), 5 * 32),
        (weft.PrefixTuning(num_tokens=5), 3 * 2 * 5 * 16),
        (weft.PrefixTuning(num_tokens=5, projection=True, hidden_size=8), 5 * 16 + 17 * 8 + 3 * 9 * 32),
        (weft.LlamaAdapter(num_tokens=5, num_layers=2), 2 * (5 * 32 + 1)),
    ):
        assert weft.resolve(model, method).num_parameters == count


def test_starts_of_a_prompt() -> None:
    model = llama()
    table = model.model.embed_tokens.weight
    weft.attach(model, weft.PromptTuning(num_tokens=5, init_ids=(7, 9)), name="ids")
    assert torch.equal(tensors(model, "ids")["model.input"]["tokens"], table[[7, 9, 7, 9, 7]])
    weft.attach(model, weft.PromptTuning(num_tokens=5), name="drawn")
    drawn = tensors(model, "drawn")["model.input"]["tokens"]
    assert all((table == row).all(1).any() for row in drawn)
    assert len(drawn.unique(dim=0)) > 1
    with pytest.raises(ValueError, match="init_ids"):
        weft.attach(model, weft.PromptTuning(init_text="a docstring"), name="text")
    with pytest.raises(TargetError, match="0 to 95"):
        weft.attach(model, weft.PromptTuning(init_ids=(96,)), name="far")


def test_a_text_starts_a_prompt_when_the_tokenizer_lies_beside_the_base(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "write": 5, "docs": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weft.attach(model, weft.PromptTuning(num_tokens=3, init_text="write docs"), name="p")
    assert torch.equal(tensors(model, "p")["model.input"]["tokens"], model.model.embed_tokens.weight[[5, 6, 5]])


def test_refusals_are_sentences() -> None:
    with pytest.raises(TargetError, match="through a cache"):
        weft.attach(t5(), weft.PrefixTuning())
    with pytest.raises(TargetError, match="queries cannot be recomputed"):
        weft.attach(bert(), weft.LlamaAdapter())
    with pytest.raises(TargetError, match="only 3 attentions"):
        weft.attach(llama(), weft.LlamaAdapter(num_layers=4))
    with pytest.raises(TargetError, match="matches no module"):
        weft.attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), weft.PromptTuning())
    with pytest.raises(TargetError, match="cannot adapt"):
        weft.attach(llama(), weft.PromptTuning(), targets="all-linear")
    model = llama()
    weft.attach(model, weft.PromptTuning(num_tokens=4), name="p")
    with pytest.raises(ValueError, match="static cache"):
        model.generate(ids(), max_new_tokens=3, cache_implementation="static")
    with weft.using(model, None):
        cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be continued"):
        model(ids(2, 1), attention_mask=torch.ones(2, 10, dtype=torch.long), past_key_values=cache)


def test_a_static_cache_holds_a_prefix() -> None:
    model, batch = llama(), {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    weft.attach(model, weft.PrefixTuning(num_tokens=4), name="x")
    static = generate(model, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, batch))


def test_targets_by_name_and_layer() -> None:
    plan = weft.resolve(llama(), weft.PrefixTuning(), "layers.1.self_attn")
    assert [s.site.address for s in plan.sites] == ["model.layers.1.self_attn.attention"]
    assert len(weft.resolve(llama(), weft.PrefixTuning(), layers="1-2").sites) == 2
    assert "kind" in str(plan)
    assert weft.resolve(llama(), weft.LoRA(), "attention").sites[0].site.kind == "linear"


def test_the_woven_model_has_the_arguments_of_the_base() -> None:
    import inspect

    model = llama()
    names = [*inspect.signature(model.forward).parameters]
    weft.attach(model, weft.LoRA(), name="l")
    assert [*inspect.signature(model.forward).parameters] == names


def test_half_precision_bases_keep_float32_prompts() -> None:
    model, rows = llama().bfloat16(), ids()
    weft.attach(model, weft.PromptTuning(num_tokens=4), name="p")
    weft.attach(model, weft.PrefixTuning(num_tokens=4), name="x")
    weft.attach(model, weft.LlamaAdapter(num_tokens=4), name="a")
    assert {p.dtype for p in weft.parameters(model)} == {torch.float32}
    for name in ("p", "x", "a"):
        weft.use(model, name)
        result = model(rows, labels=rows)
        assert result.logits.dtype == torch.bfloat16
        assert all(g is not None for g in torch.autograd.grad(result.loss, weft.parameters(model, name)))


def test_a_prompt_joins_a_model_that_has_prefixes_and_leaves_it() -> None:
    model, rows = llama(), ids()
    kind = type(model.model)
    weft.attach(model, weft.PrefixTuning(num_tokens=3), name="x")
    prefixed = model(rows).logits
    weft.attach(model, weft.PromptTuning(num_tokens=4), name="p")
    prompted = model(rows).logits
    weft.use(model, weft.Stack("x", "p"))
    both = model(rows).logits
    assert len({round(t.sum().item(), 4) for t in (prefixed, prompted, both)}) == 3
    weft.detach(model, "p")
    weft.use(model, "x")
    assert torch.equal(model(rows).logits, prefixed)
    weft.detach(model, "x")
    assert type(model.model) is kind


def test_one_module_is_not_read_in_two_ways() -> None:
    model = llama()
    weft.attach(model, weft.PrefixTuning(), name="x")
    with pytest.raises(AdapterError, match="both ways"):
        weft.attach(model, weft.Bottleneck(), targets="attention-blocks", name="b")
    weft.attach(model, weft.Bottleneck(), targets="mlp-blocks", name="b")
    weft.use(model, weft.Stack("x", "b"))
    model(ids())


@pytest.mark.parametrize("family", ["RobertaForMaskedLM", "OPTForCausalLM"])
def test_rows_of_models_that_count_only_real_tokens(family: str) -> None:
    config = getattr(transformers, family).config_class(
        hidden_size=32, intermediate_size=48, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, vocab_size=96, pad_token_id=1 if "Rob" in family else 0,
    )  # fmt: skip
    model = getattr(transformers, family)(config).eval()
    batch = padded(ids(4), (0, 2, 3, 1), "right")
    batch["input_ids"][batch["attention_mask"] == 0] = config.pad_token_id
    alone = [model(**batch).logits]
    methods = {"p": weft.PromptTuning(num_tokens=4), "q": weft.PromptTuning(num_tokens=2), "x": weft.PrefixTuning()}
    for name, method in methods.items():
        weft.attach(model, method, name=name)
        alone.append(model(**batch).logits)
    weft.use(model, [None, *methods])
    together, real = model(**batch).logits, batch["attention_mask"].bool()
    for i, expected in enumerate(alone):
        close(together[i][real[i]], expected[i][real[i]])
