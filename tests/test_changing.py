"""An adapter with other options of its method: what is carried over, what starts anew, and what then trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.attach import AdapterError, records
from weft.changing import changed
from weft.compressing import to_lora

X = torch.linspace(-2, 2, 3 * 5 * 16).view(3, 5, 16).sin()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    weft.attach(model, weft.Poly(rank=2, alpha=3.0, num_tasks=3, num_splits=2), "0", name="tasks")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_()
    return model


def own(model: nn.Module, name: str) -> dict[str, Tensor]:
    return records(model)[name].adapters["0"].tensors()


def test_gates_of_a_new_task_over_trained_skills(model: nn.Module) -> None:
    changed(model, "tasks", {"num_tasks": 1, "train_skills": False}, name="few")
    before, after = own(model, "tasks"), own(model, "few")
    assert all(torch.equal(before[k], after[k]) and before[k].data_ptr() != after[k].data_ptr() for k in "AB")
    assert after["Z"].shape == (1, 2, 4)
    assert [p is after["Z"] for p in weft.parameters(model, "few")] == [True]
    with weft.given(model, task=0):
        model(X).square().sum().backward()
    assert after["Z"].grad is not None
    assert after["Z"].grad.any()
    assert before["A"].grad is None


def test_one_task_for_all_merges(model: nn.Module) -> None:
    with weft.given(model, task=2), torch.no_grad():
        live = model(X)
    changed(model, "tasks", {"task": 2}, name="second")
    torch.testing.assert_close(model(X), live)
    weft.merge(model, "second", keep=False)
    torch.testing.assert_close(model(X), live, rtol=1e-4, atol=1e-4)


def test_the_mean_of_the_skills_is_a_lora_that_trains_on(model: nn.Module) -> None:
    t = {k: v.detach().clone() for k, v in own(model, "tasks").items()}
    changed(model, "tasks", {"routing": "mean"}, name="mean")
    assert set(own(model, "mean")) == {"A", "B"}
    to_lora(model, "mean", name="lora", rank=2)
    with torch.no_grad(), weft.using(model, "lora"):
        found = model(X)
    a = torch.cat([part.view(4, 2, 8).mean(0) for part in t["A"][0]], 1)
    b = torch.cat([part.view(4, 2, 4).mean(0) for part in t["B"][0]], 1).T
    wanted = nn.functional.linear(X, model[0].weight + 1.5 * b @ a, model[0].bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(weft.parameters(model, "lora")) == 2


def test_tensors_that_are_named_start_anew(model: nn.Module) -> None:
    changed(model, "tasks", {}, name="same")
    assert torch.equal(own(model, "same")["Z"], own(model, "tasks")["Z"])
    changed(model, "tasks", {}, name="new", fresh=["Z"])
    assert own(model, "new")["Z"].abs().max() <= 1e-3
    assert torch.equal(own(model, "new")["A"], own(model, "tasks")["A"])


def test_what_sites_share_is_carried_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    experts = weft.experts(weft.LoRA(rank=2), 2)
    weft.attach(model, weft.UserRouting(experts=experts, num_users=3, embedding_size=4), ["0", "1"], name="a")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_()
    with weft.given(model, user=1), torch.no_grad():
        live = model(X)
    changed(model, "a", {"train_users": False, "user": 1}, name="b")
    torch.testing.assert_close(model(X), live, rtol=1e-4, atol=1e-3)
    assert not any(n.endswith("users") for n, _ in model.named_parameters() if ".b." in n)


def test_what_there_is_not(model: nn.Module) -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'task'.*tasks"):
        changed(model, "task", {}, name="b")
    with pytest.raises(ValueError, match=r"poly has no option 'tasks'.*task"):
        changed(model, "tasks", {"tasks": 1}, name="b")
    with pytest.raises(ValueError, match="fresh=z: 'tasks' has no such tensor"):
        changed(model, "tasks", {}, name="b", fresh=["z"])
    with pytest.raises(ValueError, match="num_splits=3 does not divide"):
        changed(model, "tasks", {"num_splits": 3}, name="b")
    assert list(records(model)) == ["tasks"]
