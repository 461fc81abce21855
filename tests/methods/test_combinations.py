"""Several methods declared as one adapter: attached, saved, mixed, trained as one; combinations that papers named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import weft
from tests.common.language import close, generate, gpt2, ids, llama, padded
from weft.attach import records
from weft.core import Progress
from weft.core.evolve import Part
from weft.errors import RecipeError
from weft.interop.folder import AdapterFileError
from weft.recipe import Recipe, load_recipe, to_yaml
from weft.recipe.combinations import COMBINATIONS
from weft.targets import TargetError

TARGETS = {
    "mlp-blocks": {},
    "self-attention": {"method": "prefix", "num_tokens": 3, "projection": True, "hidden_size": 8},
    "q_proj": {"method": "lora", "rank": 2},
}


def combined(seed: int = 0, name: str = "c"):
    torch.manual_seed(0)
    model = llama()
    weft.attach(model, weft.Bottleneck(placement="parallel", width=4, scale=4.0), TARGETS, name=name, seed=seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p.normal_(std=0.1)
    return model


@torch.no_grad()
def test_one_adapter_holds_several_methods_and_is_saved_as_one(tmp_path: Path) -> None:
    model, batch = combined(), padded(ids(3), (0, 2, 1))
    assert {s.method.name for s in weft.adapters(model)["c"].sites} == {"bottleneck", "prefix", "lora"}
    found = model(**batch).logits
    weft.save(model, tmp_path / "c")
    torch.manual_seed(0)
    fresh = llama()
    plan = weft.load(fresh, tmp_path / "c", name="z")
    assert plan.num_parameters == weft.adapters(model)["c"].num_parameters
    assert torch.equal(fresh(**batch).logits, found)
    with pytest.raises(AdapterFileError, match="one method in an adapter"):
        weft.save(model, tmp_path / "p", format="peft")


@torch.no_grad()
def test_its_parts_do_together_what_they_do_as_adapters_of_their_own() -> None:
    model, batch = combined(), padded(ids(2), (0, 2))
    torch.manual_seed(0)
    apart = llama()
    weft.attach(apart, weft.Bottleneck(placement="parallel", width=4, scale=4.0), "mlp-blocks", name="b")
    weft.attach(apart, weft.PrefixTuning(num_tokens=3, projection=True, hidden_size=8), name="p")
    weft.attach(apart, weft.LoRA(rank=2), "q_proj", name="l")
    known = dict(model.named_parameters())
    for key, value in apart.named_parameters():
        for name in "bpl":
            if f"adapters.{name}." in key:
                value.copy_(known[key.replace(f"adapters.{name}.", "adapters.c.")])
    weft.use(apart, weft.Stack("b", "p", "l"))
    close(model(**batch).logits, apart(**batch).logits)


@torch.no_grad()
def test_rows_of_one_batch_use_it_or_not() -> None:
    model, batch = combined(), padded(ids(3), (0, 2, 1))
    alone = []
    for i, route in enumerate(("c", None, "c")):
        weft.use(model, route)
        row = {k: v[i : i + 1] for k, v in batch.items()}
        alone.append(generate(model, row)[0])
    weft.use(model, ["c", None, "c"])
    assert torch.equal(generate(model, batch), torch.stack(alone))


def test_a_method_that_is_none_or_does_not_fit_is_refused_by_its_pattern() -> None:
    for targets, said in (
        ({"q_proj": {"method": "lra"}}, "did you mean 'lora'"),
        ({"q_proj": {"method": "lora", "rnk": 2}}, r"targets\['q_proj'\]: lora has no option 'rnk'"),
        ({"mlp-blocks": {"method": "lora"}}, "lora cannot adapt"),
    ):
        with pytest.raises(TargetError, match=said):
            weft.resolve(llama(), weft.LoRA(), targets)


def test_each_method_counts_its_own_sites() -> None:
    targets = {"q_proj": {}, "self-attention": {"method": "llama_adapter", "num_layers": 2}}
    plan = weft.resolve(llama(), weft.LoRA(), targets)
    assert [s.site.layer for s in plan.sites if s.method.name == "llama_adapter"] == [1, 2]
    with pytest.raises(TargetError, match="only 3 attentions match"):
        weft.resolve(llama(), weft.LoRA(), {**targets, "self-attention": {"method": "llama_adapter", "num_layers": 4}})


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_combination_of_a_paper_attaches_and_learns(name: str, build) -> None:
    torch.manual_seed(0)
    model, rows = build(initializer_range=0.2), ids(4)
    weft.attach(model, *weft.combination(name))
    kinds = {s.site.kind for s in weft.adapters(model)["default"].sites}
    assert kinds == {"block", "attention"} | ({"linear"} if name == "unipelt" else set())
    optimizer, losses, wanted = torch.optim.Adam(weft.parameters(model), lr=0.02), [], torch.tensor([5, 6, 7, 8])
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(rows).logits[:, -1], wanted)
        loss.backward()
        assert all(p.grad is not None for p in weft.parameters(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_recipe_names_a_combination_and_is_written_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    file = tmp_path / "mam.yaml"
    file.write_text("data: rows.jsonl\nmethod: mam\n")
    recipe = load_recipe(file)
    assert recipe.method["name"] == "bottleneck"
    assert recipe.targets is not None and recipe.targets["self-attention"]["method"] == "prefix"  # noqa: PT018
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe
    file.write_text("data: rows.jsonl\nmethod: {name: mam, width: 8}\n")
    with pytest.raises(RecipeError, match="mam is several methods"):
        load_recipe(file)
    with pytest.raises(ValueError, match="did you mean 'mam'"):
        weft.combination("mom")


def test_adapterdrop_leaves_the_first_layers_as_they_are() -> None:
    model = llama()
    weft.attach(model, weft.Bottleneck(width=4), "mlp-blocks", layers="1-2")
    assert [s.site.layer for s in weft.adapters(model)["default"].sites] == [1, 2]
    assert type(model.model.layers[0].mlp) is type(llama().model.layers[0].mlp)


def test_adapterdrop_trains_without_the_adapters_of_the_first_layers() -> None:
    torch.manual_seed(0)
    model, rows = llama(), ids()
    drop = weft.methods()["adapter_drop"](width=4)
    weft.attach(model, drop)
    adapters = [*records(model)["default"].adapters.values()]
    each = [Part(a.site, a.tensors(), {}, lambda name, mask: None) for a in adapters]
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_(std=0.3)
    seen = set()
    for step in range(1, 30):
        with torch.no_grad():
            drop.evolve(each, Progress(step, 30))
        on = [bool(a.tensors()["k"]) for a in adapters]
        assert on == sorted(on), "the first layers are off, and no later one"
        seen.add(sum(on))
        model.zero_grad()
        model.train()(rows).logits.square().sum().backward()
        assert [bool(a.tensors()["up"].grad.any()) for a in adapters] == on
    assert seen == {1, 2, 3}, "there is a step to learn from every time"
    with torch.no_grad():
        off = model.eval()(rows).logits
        drop.evolve(each, Progress(30, 30))
        close(model(rows).logits, off)
    assert all(a.tensors()["k"] == 1 for a in adapters)
