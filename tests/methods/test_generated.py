"""Adapters that a network makes for each row's task: mixed tasks, packed rows, and the losses of prototypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft
from tests.common.language import close, generate, ids, llama, padded
from weft.attach import records
from weft.core.generated import contrast, instances
from weft.core.penalty import Penalised
from weft.core.positions import Positions
from weft.core.rowwise import project
from weft.targets import TargetError

SIZES: dict[str, Any] = {"embedding_size": 5, "hidden_size": 6}
METHODS: dict[str, weft.Method] = {
    "hyperformer": weft.HyperFormer(num_tasks=3, reduction_factor=8.0, **SIZES),
    "hyper_adapters": weft.HyperAdapters(num_languages=2, width=4, **SIZES),
    "prototype_adapters": weft.PrototypeAdapters(num_tasks=3, width=4, **SIZES),
}
GIVEN: dict[str, list[dict[str, int]]] = {
    "hyperformer": [{"task": k} for k in (2, 0, 1, 2)],
    "hyper_adapters": [{"source": s, "target": t} for s, t in ((0, 1), (1, 1), (1, 0), (0, 0))],
    "prototype_adapters": [{"task": k} for k in (2, 0, 1, 2)],
}


def woven(name: str, model: Any = None, called: str = "h") -> Any:
    model = llama() if model is None else model
    weft.attach(model, METHODS[name], name=called, seed=len(called))
    with torch.no_grad():
        for p in weft.parameters(model, called):
            p.add_(torch.randn_like(p) * 0.5)
    return model


def together(rows: list[dict[str, int]]) -> dict[str, list[int]]:
    return {k: [row[k] for row in rows] for k in rows[0]}


@pytest.mark.parametrize("name", METHODS)
def test_mixed_tasks_equal_each_alone_also_in_generation(name: str) -> None:
    model, batch, given = woven(name), padded(ids(4), (0, 2, 1, 0)), GIVEN[name]
    logits, texts = [], []
    for i, own in enumerate(given):
        with weft.given(model, **own), torch.no_grad():
            row = {k: v[i : i + 1] for k, v in batch.items()}
            logits.append(model(**row).logits[0])
            texts.append(generate(model, row, num_beams=2)[0])
    real = batch["attention_mask"].bool()
    with weft.given(model, **together(given)), torch.no_grad():
        found = model(**batch).logits
        assert torch.equal(generate(model, batch, num_beams=2), torch.stack(texts))
    for i, expected in enumerate(logits):
        close(found[i][real[i]], expected[real[i]])
    with weft.given(model, **given[0]), torch.no_grad():
        assert (model(**{k: v[1:2] for k, v in batch.items()}).logits - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("targets", ["mlp-blocks", "attention-blocks"])
@pytest.mark.parametrize("name", METHODS)
def test_beside_other_adapters_in_one_batch(name: str, targets: str) -> None:
    model, batch, given = llama(), padded(ids(4), (0, 2, 1, 0)), GIVEN[name]
    for called in ("h", "hh"):
        weft.attach(model, METHODS[name], targets, name=called, seed=len(called))
        with torch.no_grad():
            for p in weft.parameters(model, called):
                p.add_(torch.randn_like(p) * 0.5)
    routes, alone = ["h", None, "hh", "h"], []
    for i, route in enumerate(routes):
        with weft.using(model, route), weft.given(model, **given[i]), torch.no_grad():
            alone.append(model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0])
    with weft.using(model, routes), weft.given(model, **together(given)), torch.no_grad():
        found = model(**batch).logits
    real = batch["attention_mask"].bool()
    for i, expected in enumerate(alone):
        close(found[i][real[i]], expected[real[i]])


@pytest.mark.parametrize("name", METHODS)
def test_fixed_by_options_is_the_same_as_given(name: str) -> None:
    model, rows = woven(name), ids()
    fixed = llama()
    fixed.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    own = {k: v for k, v in METHODS[name].spec().items() if k != "name"} | GIVEN[name][0]
    weft.attach(fixed, type(METHODS[name])(**own), name="h")
    source = {n: p for n, p in model.named_parameters() if "adapters" in n}
    with torch.no_grad():
        for n, p in fixed.named_parameters():
            if n in source:
                p.copy_(source[n])
        with weft.given(model, **GIVEN[name][0]):
            close(fixed(rows).logits, model(rows).logits)


def test_gradients_go_to_the_tasks_of_the_batch() -> None:
    model = woven("hyperformer")
    weft.given(model, task=[2, 0])
    model(ids()).logits.square().sum().backward()
    tasks = records(model)["h"].shared["hyperformer"].tensors()["tasks"].grad
    assert [bool(g.any()) for g in tasks] == [True, False, True]


def test_places_of_different_widths_are_refused() -> None:
    blocks = nn.Sequential()
    for called, size in (("narrow", 8), ("wide", 12)):
        blocks.add_module(called, nn.Sequential(nn.Linear(size, size), nn.ReLU()))
    with pytest.raises(ValueError, match="one network makes adapters of one width"):
        weft.attach(blocks, METHODS["hyperformer"], ["narrow", "wide"])
    with pytest.raises(TargetError, match="tasks are numbered from 0"):
        weft.attach(llama(), weft.HyperFormer(num_tasks=2, task=2))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 6), (1, 1)])
def test_rows_meet_their_own_matrices(shape: tuple[int, ...]) -> None:
    x, a = (
        torch.randn(*((4, 5) if shape == (4,) else (4, 3, 5) if shape != (1, 6) else (1, 6, 5))),
        torch.randn(3, 2, 5),
    )
    which = torch.randint(3, shape)
    each = torch.einsum("...i,...ri->...r", x, a[which.expand(x.shape[:-1])])
    close(project(x, a, which), each)


def test_instances_of_padded_and_of_packed_rows_are_the_means_of_their_prompts() -> None:
    x = torch.randn(2, 5, 3)
    before = torch.tensor([[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    places = Positions(before, torch.tensor([[2, 2, 1, 0, -1], [1, 0, -1, -2, -3]]))
    means, numbers = instances(x, places, torch.tensor([[1], [0]]))
    close(means, torch.stack([x[0, 1:4].mean(0), x[1, :2].mean(0)]))
    assert numbers.tolist() == [1, 0]
    packed = torch.cat([x[0, 1:], x[1]]).unsqueeze(0)  # [1, 9, 3]
    joined = Positions(*(torch.cat([t[0, 1:], t[1]]).unsqueeze(0) for t in (places.before, places.after)))
    which = torch.tensor([[1] * 4 + [0] * 5])
    found, numbers = instances(packed, joined, which)
    close(found, means)
    assert numbers.tolist() == [1, 0]


def test_the_contrastive_losses_are_those_of_the_paper() -> None:
    z, p, numbers = torch.randn(5, 4), torch.randn(3, 4), torch.tensor([0, 1, 0, 2, 1])
    f, c = F.normalize(z, dim=1), F.normalize(p, dim=1)
    first, second = [], []
    for i in range(5):
        near = torch.tensor([(f[i] @ f[j]).item() / 0.2 for j in range(5)])
        others = [j for j in range(5) if j != i]
        same = [j for j in others if numbers[j] == numbers[i]]
        if same:
            first.append(sum(-(near[j] - near[others].logsumexp(0)) for j in same) / len(same))
        to = torch.tensor([(f[i] @ c[k]).item() / 0.2 for k in range(3)])
        rest = [k for k in range(3) if k != numbers[i]]
        second.append(-(to[numbers[i]] - to[rest].logsumexp(0)))
    expected = sum(first) / len(first) + sum(second) / len(second)
    close(contrast(z, numbers, p, 0.2), expected)
    assert contrast(z[:1], numbers[:1], p, 0.2).isfinite()


def test_the_retriever_learns_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = llama(), ids(3)
    weft.attach(model, weft.Bottleneck(width=4), "mlp-blocks", layers=[0], name="first")  # counts places of its own
    weft.detach(woven("prototype_adapters", model), "first")
    retriever = records(model)["h"].shared["prototype_adapters"].tensors()
    asked: list[float] = []
    original = Penalised.apply
    monkeypatch.setattr(Penalised, "apply", lambda y, loss: asked.append(loss.item()) or original(y, loss))
    weft.given(model, task=[0, 1, 0])
    model(rows, labels=rows).loss.backward()
    assert not asked
    assert retriever["M"].grad is None
    model.train()
    model(rows, labels=rows).loss.backward()
    assert len(list(filter(None, asked))) == 1  # at the last place alone
    assert retriever["M"].grad.any()
    assert retriever["prototypes"].grad.any()
