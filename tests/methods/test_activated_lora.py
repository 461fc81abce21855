"""Activated LoRA: tokens before its invocation are the base's, to the bit, however a text comes to the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import weft
from tests.common.language import CAUSAL, close, generate, ids, llama, padded, t5
from tests.interop.architectures import quiet, reloaded, shake, trained
from weft import segments
from weft.adapter import AdapterFileError
from weft.data.pack import concatenate
from weft.data.rows import Example
from weft.errors import AdapterError

CALL = (50, 51)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def texts(*starts: tuple[int, ...], size: int = 12) -> Tensor:
    """Rows of tokens with the invocation at the given places."""
    rows = ids(len(starts), size)
    rows[rows == CALL[0]] = 3
    for row, where in zip(rows, starts, strict=True):
        for place in where:
            row[place : place + 2] = torch.tensor(CALL)
    return rows


def adapted(model: Any, *names: str, tokens: tuple[int, ...] = CALL, **options: Any) -> Any:
    """A model with trained-looking adapters at every linear layer."""
    for seed, name in enumerate(names or ("a",)):
        weft.attach(model, weft.LoRA(rank=4, invocation_tokens=tokens, **options), name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in weft.parameters(model, name):
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_computes_and_learns_what_peft_does(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, rows = CAUSAL[family](), texts((4, 8), (0,), (), (10,))
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS[family], task_type="CAUSAL_LM", alora_invocation_tokens=[*CALL],
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    theirs = trained(copy.deepcopy(ours), config, tmp_path / "theirs", size=0.3)
    plan = weft.load(ours, tmp_path / "theirs", name="a")
    assert {s.method.invocation_tokens for s in plan.sites} == {CALL}
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    with torch.no_grad():
        found = ours(**batch).logits
        close(found, theirs(**batch).logits)
        assert torch.equal(generate(ours, batch), generate(theirs, batch))
        with weft.using(ours, None):
            base = ours(**batch).logits
        for row, start in enumerate((8, 0, 12, 10)):
            assert torch.equal(found[row, :start], base[row, :start])
            assert start == 12 or ((found - base)[row, start:].abs().amax(-1) > 1e-3).all()
    theirs(input_ids=rows, labels=rows).loss.backward()
    ours(input_ids=rows, labels=rows).loss.backward()
    wanted = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert len(own) == len(wanted)
    assert all(g.abs().max() > 0 for g in own.values())
    for name, gradient in own.items():
        path, leaf = name.split(".adapters.a.")
        close(gradient, wanted[f"base_model.model.{path}.lora_{leaf}.weight"])


@pytest.mark.oracle
def test_a_folder_goes_to_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, rows = llama(), texts((3,), ())
    ours = copy.deepcopy(plain)
    weft.attach(ours, weft.LoRA(rank=4, invocation_tokens=CALL), TARGETS["llama"], name="a")
    shake(weft.parameters(ours, "a"), 0.3)
    weft.save(ours, tmp_path / "ours", name="a")
    with torch.no_grad(), quiet():
        close(reloaded(copy.deepcopy(plain), tmp_path / "ours")(input_ids=rows).logits, ours(rows).logits)
    again = copy.deepcopy(plain)
    assert next(iter(weft.load(again, tmp_path / "ours", name="a").sites)).method.invocation_tokens == CALL
    with torch.no_grad():
        assert torch.equal(again(rows).logits, ours(rows).logits)


@pytest.mark.oracle
def test_what_peft_cannot_say_is_refused(tmp_path: Path) -> None:
    model = llama()
    weft.attach(model, weft.LoRA(rank=4, invocation_tokens=CALL, start="normal"), ["embed_tokens", "q_proj"], name="a")
    weft.save(model, tmp_path / "ours", name="a")
    assert not (tmp_path / "ours" / "adapter_config.json").exists(), "PEFT has no such thing at an embedding"
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained(llama(), config, tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(
        file.read_text()
        .replace('"use_dora": false', '"use_dora": true')
        .replace('"alora_invocation_tokens": null', '"alora_invocation_tokens": [50, 51]')
    )
    with pytest.raises(AdapterFileError, match="alora_invocation_tokens with use_dora"):
        weft.load(llama(), tmp_path / "theirs", name="a")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_calls_nothing(side: str) -> None:
    torch.manual_seed(0)
    model, batch = adapted(llama(), tokens=(0,)), padded(ids(3), (0, 2, 3), side)  # the pad token is 0
    weft.use(model, None)
    base = model(**batch).logits
    weft.use(model, "a")
    assert torch.equal(model(**batch).logits, base)
    batch["input_ids"][1, 3] = 0  # a real one
    found, real = model(**batch).logits, batch["attention_mask"].bool()
    weft.use(model, None)
    changed = (found - model(**batch).logits).abs().amax(-1) > 1e-4
    assert torch.equal(changed[1][real[1]], torch.arange(7)[real[1]] >= 3)
    assert not changed[[0, 2]].any()


@torch.no_grad()
def test_a_cache_that_the_base_filled_goes_on() -> None:
    torch.manual_seed(0)
    model, rows = adapted(llama()), texts((5,), (6,), ())
    whole = model(rows).logits
    weft.use(model, None)
    cache = model(rows[:, :4], use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    weft.use(model, "a")
    close(model(rows[:, 4:8], past_key_values=cache).logits, whole[:, 4:8])
    found = [model(rows[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
    close(torch.cat(found, 1), whole[:, 8:])
    cache.crop(-5)  # in the second row, inside of its invocation, of which the cache then has the first token
    close(model(rows[:, 7:], past_key_values=cache).logits, whole[:, 7:])
    cache.crop(-8)
    other = texts((), (5,), ())
    close(
        model(other[:, 4:], past_key_values=cache).logits,
        model(torch.cat([rows[:, :4], other[:, 4:]], 1)).logits[:, 4:],
    )
    kept.batch_repeat_interleave(2)
    close(model(rows[:, 4:].repeat_interleave(2, 0), past_key_values=kept).logits[::2], whole[:, 4:])


@torch.no_grad()
def test_a_cache_that_nobody_saw_filled_is_enough_where_the_call_comes_later() -> None:
    torch.manual_seed(0)
    plain, rows = llama(), texts((5,), (6,))
    model = adapted(copy.deepcopy(plain))
    whole = model(rows).logits
    cache = plain(rows[:, :5], use_cache=True).past_key_values
    close(model(rows[:, 5:], past_key_values=cache).logits, whole[:, 5:])
    rows = texts((5,), (2,))
    cache = plain(rows[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="5 tokens that were not noted"):
        model(rows[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"static": True}])
@torch.no_grad()
def test_generation_goes_on_with_it(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, batch = adapted(llama()), padded(texts((4,), (6,), (1,)), (0, 2, 4))
    batch["input_ids"][2, 4:6] = torch.tensor([4, 5])  # its invocation is lost to padding
    text = batch["input_ids"]
    for _ in range(6):  # without a cache, by hand: what it makes itself calls nothing here
        mask = torch.cat([batch["attention_mask"], torch.ones(3, text.shape[1] - 12, dtype=torch.long)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=text, attention_mask=mask, position_ids=places).logits[:, -1]
        logits[:, 2] = -torch.inf
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    if how.pop("static", False):
        how = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, batch, **how), text)
    with weft.using(model, None):
        base = generate(model, batch, **how)
    assert [torch.equal(*each) for each in zip(base, text, strict=True)] == [False, False, True]


@torch.no_grad()
def test_packed_rows_have_an_invocation_each() -> None:
    torch.manual_seed(0)
    segments.register()
    model = adapted(llama(attn_implementation="weft-sdpa"))
    rows = [[5, 6, *CALL, 9], [11, 12, 50], [51, 22, *CALL]]  # 50, 51 across two rows is no invocation
    batch = concatenate([Example(row, row, "made", i) for i, row in enumerate(rows)])
    packed = model(**batch.inputs()).logits
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
    close(packed[0], alone)
    close(model(**{**batch.inputs(), "attention_mask": None}, use_cache=False).logits[0], alone)
    prompt, chosen, rejected = [5, 6, *CALL], [9, 10], [12, 13, 14]
    for shared, ends in ((4, prompt), (3, prompt[:3])):  # also where the rejected answer begins inside of it
        answers = [prompt[shared:] + chosen, prompt[shared:] + rejected]
        inputs = {
            "input_ids": torch.tensor([[*ends, *answers[0], *answers[1]]]),
            "attention_mask": segments.table([shared + len(answers[0]), len(answers[1])], [0, shared]),
            "position_ids": torch.tensor(
                [[*range(shared + len(answers[0])), *range(shared, shared + len(answers[1]))]]
            ),
        }
        found = model(**inputs).logits[0].split([shared + len(answers[0]), len(answers[1])])
        close(found[0], model(torch.tensor([ends + answers[0]])).logits[0])
        close(found[1], model(torch.tensor([ends + answers[1]])).logits[0, shared:])


@torch.no_grad()
def test_rows_of_one_batch_with_different_adapters() -> None:
    torch.manual_seed(0)
    model = adapted(adapted(llama(), "a", "b"), "c", tokens=(60,))
    weft.attach(model, weft.PromptTuning(num_tokens=3), name="p")
    weft.attach(model, weft.LoRA(rank=2), name="l")
    batch = padded(texts((5,), (6,), (7,), (9,), ()), (0, 2, 0, 3, 1))
    batch["input_ids"][4, 6] = 60
    routes = ["b", None, "a", weft.Stack("a", "p"), "c"]
    alone, texts_ = [], []
    for i, route in enumerate(routes):
        weft.use(model, route)
        row = {k: v[i : i + 1] for k, v in batch.items()}
        alone.append(model(**row).logits[0])
        texts_.append(generate(model, row)[0])
    weft.use(model, routes)
    together, real = model(**batch).logits, batch["attention_mask"].bool()
    for i, wanted in enumerate(alone):
        close(together[i][real[i]], wanted[real[i]])
    assert torch.equal(generate(model, batch), torch.stack(texts_))
    weft.use(model, ["a", "b", None, "c", "a"])
    beams = [generate(model, batch, num_beams=2)]
    for i, name in enumerate(["a", "b", None, "c", "a"]):
        weft.use(model, name)
        beams.append(generate(model, {k: v[i : i + 1] for k, v in batch.items()}, num_beams=2))
    assert torch.equal(beams[0], torch.cat(beams[1:]))
    weft.use(model, {"a": 0.5, "l": 0.5})
    assert model(**batch).logits.isfinite().all()


def test_a_layer_computed_again_in_the_backward_is_the_same() -> None:
    torch.manual_seed(0)
    model, rows = adapted(llama(), dropout=0.0), texts((5,), ())
    found = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable()
            model.train()
        model(rows, use_cache=False).logits.square().sum().backward()
        found.append([p.grad.clone() for p in weft.parameters(model)])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        assert b.abs().max() > 0
        close(a, b, 1e-4)


@torch.no_grad()
def test_embeddings_and_heads() -> None:
    torch.manual_seed(0)
    model, rows = llama(), texts((5,), ())
    weft.attach(model, weft.LoRA(rank=4, invocation_tokens=CALL, start="normal"), ["embed_tokens", "lm_head"])
    shake(weft.parameters(model), 0.5)
    found = model(rows).logits
    close(model(rows, logits_to_keep=3).logits, found[:, -3:])
    weft.use(model, None)
    changed = (found - model(rows).logits).abs().amax(-1) > 1e-4
    assert torch.equal(changed, torch.stack([torch.arange(12) >= 5, torch.zeros(12, dtype=torch.bool)]))


@torch.no_grad()
def test_what_knows_no_text_is_refused() -> None:
    model = adapted(llama())
    with pytest.raises(AdapterError, match=r"changes only the tokens behind its invocation.*serve it unmerged"):
        weft.merge(model, "a")
    with pytest.raises(ValueError, match="without input_ids"):
        model(inputs_embeds=torch.randn(2, 5, 32))
    with pytest.raises(ValueError, match="reads two texts"):
        adapted(t5())(input_ids=ids(2, 5), labels=ids(2, 3))
    with pytest.raises(ValueError, match="was called alone"):
        adapted(llama()).model.layers[0].mlp.up_proj(torch.randn(2, 5, 32))
    with pytest.raises(ValueError, match="conv does not see the tokens"):
        weft.attach(torch.nn.Conv1d(4, 4, 3), weft.LoRA(rank=2, invocation_tokens=CALL), "")
