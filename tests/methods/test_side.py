"""Side networks: their equations, mixed batches, generation, packed rows, and a backbone that no gradient enters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import weft
from tests.common.language import CAUSAL, bert, close, generate, gpt2, ids, llama, padded, t5, tensors
from tests.tune import runs
from weft.attach import AdapterError
from weft.data.pack import concatenate
from weft.data.rows import Example
from weft.recipe import Recipe
from weft.targets import TargetError
from weft.tune import tune
from weft.tune.packing import packed_attention, why_not_packed

QST = {"down": "low-rank", "rank": 3, "gates": "channels", "merge": "gate"}
METHODS: dict[str, Callable[[], weft.Method]] = {
    "ladder": lambda: weft.LadderSide(reduction_factor=4.0, head_size=4),
    "every second": lambda: weft.LadderSide(reduction_factor=4.0, every=2),
    "qst": lambda: weft.LadderSide(reduction_factor=4.0, **QST),
    "k-adapter": lambda: weft.KAdapter(width=8, head_size=4),
}


@torch.no_grad()
def woven(method: str, model: Any = None, name: str = "s") -> Any:
    """A model with a trained-looking side network."""
    model = llama() if model is None else model
    weft.attach(model, METHODS[method](), name=name, seed=len(name))
    for p in weft.parameters(model, name):
        p.add_(torch.randn_like(p) * 0.3)
    return model


def states_of(model: Any, rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """The embeddings and what every layer gave, and the final hidden states, by hooks of torch's own."""
    seen: list[Tensor] = []
    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))]
    handles += [layer.register_forward_hook(lambda _m, _a, out: seen.append(out)) for layer in layers]
    with weft.using(model, None), torch.no_grad():
        last = model.model(rows).last_hidden_state
    for handle in handles:
        handle.remove()
    return seen, last


def dense_layer(t: dict[str, Tensor], i: int, s: Tensor, heads: int) -> Tensor:
    """One pre-norm transformer layer on one row [T, c], written out."""
    size, width = s.shape
    q, k, v = (F.layer_norm(s, (width,)) * t["norms"][i, 0] @ t["attention"][i].T).split(width, -1)
    seen, out = torch.ones(size, size).tril().bool(), []
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[:, part] @ k[:, part].T / (width // heads) ** 0.5
        out.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, part])
    s = s + torch.cat(out, -1) @ t["output"][i].T
    h = F.gelu(F.layer_norm(s, (width,)) * t["norms"][i, 1] @ t["inner"][i].T + t["inner_bias"][i])
    return s + h @ t["outer"][i].T + t["outer_bias"][i]


@torch.no_grad()
def test_the_ladder_climbs_as_the_paper_says() -> None:
    rows = ids(1)
    for name, every, heads in (("ladder", 1, 2), ("every second", 2, 1), ("qst", 1, 1)):
        model = woven(name)
        (t,) = tensors(model, "s").values()
        states, last = states_of(model, rows)
        down = t["down"] if name != "qst" else t["down_b"] @ t["down_a"]
        temperature = 1.0 if name == "qst" else 0.1
        s = states[0][0] @ down[0].T
        for i, n in enumerate(range(every, 4, every)):
            g = torch.sigmoid(t["gate"][i] / temperature)
            s = dense_layer(t, i, g * s + (1 - g) * (states[n][0] @ down[i + 1].T), heads)
        climbed = (F.layer_norm(s, s.shape[-1:]) * t["norm"]) @ t["up"].T
        y = last[0] + climbed if name != "qst" else t["mix"] * last[0] + (1 - t["mix"]) * climbed
        close(model(rows).logits[0], y @ model.lm_head.weight.T)


@torch.no_grad()
def test_the_k_adapter_is_the_papers() -> None:
    model, rows = woven("k-adapter"), ids(1)
    (t,) = tensors(model, "s").values()
    states, last = states_of(model, rows)
    s = torch.zeros_like(last[0])
    for k, n in enumerate((0, 1, 2)):  # from the embeddings to the last of three layers' input
        f = F.layer_norm(states[n][0], states[n].shape[-1:]) + s
        h = f @ t["down"][k].T + t["down_bias"][k]
        for i in range(2):
            h = dense_layer(t, 2 * k + i, h, 2)
        s = f + h @ t["up"][k].T + t["up_bias"][k]
    y = last[0] + torch.cat([last[0], s], -1) @ t["join"].T
    close(model(rows).logits[0], y @ model.lm_head.weight.T, 1e-4)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_one_is_the_base_and_all_of_it_learns(method: str, family: str) -> None:
    model, rows = CAUSAL[family](), ids()
    base = model(rows).logits
    plan = weft.attach(model, METHODS[method](), name="s")
    close(model(rows).logits, base, 1e-6)
    assert plan.num_parameters == sum(p.numel() for p in weft.parameters(model))
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    model(rows, labels=rows).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in weft.parameters(model))
    own = {id(p) for p in weft.parameters(model)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_equals_one_without(method: str, family: str) -> None:
    model, batch = woven(method, CAUSAL[family]()), padded(ids(3), (0, 2, 1))
    for how in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        assert torch.equal(generate(model, batch, **how), generate(model, batch, **how, use_cache=False))
    with weft.using(model, None):
        assert not torch.equal(generate(model, batch), generate(woven(method, copy.deepcopy(model), "t"), batch))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_one_batch_beside_other_adapters(use_cache: bool) -> None:
    model, batch = woven("ladder"), padded(ids(7), (0, 2, 0, 3, 1, 0, 2))
    woven("k-adapter", model, "kk")
    woven("ladder", model, "other")
    weft.attach(model, weft.LoRA(rank=2), name="l")
    weft.attach(model, weft.PromptTuning(num_tokens=3), name="p")
    weft.attach(model, weft.PrefixTuning(num_tokens=2), name="x")
    with torch.no_grad():
        for p in weft.parameters(model, "l"):
            p.normal_(std=0.3)
    routes = ["s", None, "kk", weft.Stack("l", "s"), "other", weft.Stack("p", "s"), weft.Stack("x", "s", "kk")]
    logits, texts = [], []
    for i, route in enumerate(routes):
        weft.use(model, route)
        row = {k: v[i : i + 1] for k, v in batch.items()}
        with torch.no_grad():
            logits.append(model(**row).logits[0])
        texts.append(generate(model, row, use_cache=use_cache)[0])
    weft.use(model, routes)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        together = model(**batch).logits
    for i, expected in enumerate(logits):
        close(together[i][real[i]], expected[real[i]], 1e-4)
    assert torch.equal(generate(model, batch, use_cache=use_cache), torch.stack(texts))


def test_adapters_that_learn_in_one_batch_get_their_own_gradients() -> None:
    model, rows = woven("ladder"), ids(4)
    woven("ladder", model, "other")
    alone = {}
    for name, part in (("s", rows[:2]), ("other", rows[2:])):
        with weft.using(model, name):
            model(part).logits.square().sum().backward()
        alone[name] = [p.grad.clone() for p in weft.parameters(model, name)]
    model.zero_grad()
    with weft.using(model, ["s", "s", "other", "other"]):
        model(rows).logits.square().sum().backward()
    for name, expected in alone.items():
        for p, g in zip(weft.parameters(model, name), expected, strict=True):
            close(p.grad / g.abs().max(), g / g.abs().max())


@pytest.mark.parametrize("quantize", [None, "packed-int4"])
def test_no_gradient_enters_the_backbone_and_nothing_of_it_is_kept(quantize: Any) -> None:
    model, _ = weft.load_base("pico", quantize=quantize)
    weft.attach(model, weft.LadderSide(**QST), name="s")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    model.train()
    inside, kept, wanting = [0], [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, inside[0] + 1))

        def after(_module: Any, _args: Any, out: Any) -> None:
            inside[0] -= 1
            wanting.append((out[0] if isinstance(out, tuple) else out).requires_grad)

        layer.register_forward_hook(after)

    def pack(t: Tensor) -> Tensor:
        if inside[0]:
            kept.append(t.shape)
        return t

    rows = torch.randint(3, 200, (2, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(rows, labels=rows, use_cache=False).loss
    assert len(wanting) == len(model.model.layers)
    assert not any(wanting), "a layer of the backbone is part of the graph"
    assert not kept, "the backbone keeps tensors for a backward"
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in weft.parameters(model))
    weft.attach(model, weft.LoRA(rank=2), name="l")  # the same watch sees a graph where there is one
    with weft.using(model, "l"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(rows, use_cache=False)
    assert kept
    assert any(wanting)


def test_the_backbone_learns_with_another_adapter_beside_it() -> None:
    model, rows = woven("ladder"), ids()
    weft.attach(model, weft.LoRA(rank=2), name="l")
    with weft.using(model, weft.Stack("l", "s")):
        model(rows, labels=rows).loss.backward()
    assert all(p.grad is not None for name in ("l", "s") for p in weft.parameters(model, name))


def test_no_gradient_goes_back_through_what_the_layers_gave() -> None:
    model, rows = woven("qst"), ids()
    weft.attach(model, weft.LoRA(rank=2), name="l")
    (t,) = tensors(model, "s").values()
    with torch.no_grad():
        t["mix"].zero_()  # the side network's answer alone: all that the LoRA changes comes through the states
        for p in weft.parameters(model, "l"):
            p.normal_(std=0.3)
    weft.use(model, "s")
    before = model(rows).logits
    weft.use(model, weft.Stack("l", "s"))
    after = model(rows, labels=rows)
    assert (after.logits - before).abs().max() > 1e-3
    after.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in weft.parameters(model, "l"))
    assert all(p.grad.any() for p in weft.parameters(model, "s"))


def test_packed_rows_are_the_padded_ones() -> None:
    from array import array

    model, sizes = woven("ladder"), (3, 6, 2)
    assert why_not_packed(model, longest=8) is None
    rows = [torch.randint(3, 96, (n,)) for n in sizes]
    packed = concatenate([Example(array("i", r.tolist()), array("i", r.tolist()), "f", 1) for r in rows])
    with packed_attention(model), torch.no_grad():
        together = model(**packed.inputs(), use_cache=False).logits[0]
    for part, row in zip(together.split(sizes), rows, strict=True):
        with torch.no_grad():
            close(part, model(row.unsqueeze(0)).logits[0])


@pytest.mark.parametrize("method", METHODS)
def test_saved_copied_and_taken_off(method: str, tmp_path: Path) -> None:
    model, rows = llama(), ids()
    clean = copy.deepcopy(model)
    woven(method, model)
    expected = model(rows).logits
    weft.save(model, tmp_path / "s", name="s")
    weft.load(clean, tmp_path / "s")
    assert torch.equal(clean(rows).logits, expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(rows).logits, expected)
    with torch.no_grad():
        for p in weft.parameters(twin):
            p.add_(1.0)
    assert not torch.equal(twin(rows).logits, expected)
    assert torch.equal(model(rows).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(rows).logits, expected)
    with weft.using(model, None):
        base = model(rows).logits
    weft.detach(model)
    assert torch.equal(model(rows).logits, base)
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_is_a_sentence() -> None:
    model = woven("ladder")
    with pytest.raises(AdapterError, match="reads what every layer gives, and no weight can express it"):
        weft.merge(model, "s")
    with pytest.raises(ValueError, match="no room for the keys of a side network"):
        generate(model, {"input_ids": ids()}, cache_implementation="static")
    with pytest.raises(AdapterError, match="cannot be adapted in both ways"):
        weft.attach(model, weft.NormTuning(), ["model.norm"], name="n")
    for other in (bert(), t5()):
        with pytest.raises(TargetError, match="no decoder whose layers end in one norm"):
            weft.attach(other, weft.LadderSide())


def test_compiled_in_one_graph_and_with_layers_computed_again() -> None:
    model, rows = woven("ladder"), ids()
    weft.attach(model, weft.LoRA(rank=2), name="l")
    expected = model(rows, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(rows, use_cache=False).logits, expected)
    weft.use(model, weft.Stack("l", "s"))
    found = []
    for again in (False, True):
        model.train()
        if again:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(rows, labels=rows, use_cache=False).loss.backward()
        found.append([p.grad.clone() for name in ("l", "s") for p in weft.parameters(model, name)])
    for kept, recomputed in zip(*found, strict=True):
        close(kept, recomputed, 1e-6)


def test_a_model_called_past_its_root_works_too() -> None:
    model, rows = woven("ladder", gpt2()), ids()
    with torch.no_grad():
        close(model.lm_head(model.transformer(rows).last_hidden_state), model(rows).logits)


def test_a_run_trains_measures_and_checks_it(tmp_path: Path) -> None:
    base, data = runs.make_base(tmp_path / "base"), runs.make_data(tmp_path / "data")
    recipe = Recipe.model_validate(
        {
            "base": {"model": str(base)},
            "data": {"train": str(data / "train.jsonl")},
            "method": {"name": "ladder_side", "reduction_factor": 2.0},
            "train": {"steps": 20, "batch_size": 4, "learning_rate": 0.01, "threads": 1},
            "output": str(tmp_path / "out"),
        }
    )
    result = tune(recipe, console=runs.quiet())
    rows = {row["way"]: row for row in result.summary["parity"]["rows"]} if hasattr(result, "summary") else {}
    assert all(row["passed"] for row in rows.values())
    assert (tmp_path / "out" / "adapter" / "weft.json").is_file()
