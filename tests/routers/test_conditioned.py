"""Routers that read the task or the user of a row: every row by its own, in batches of any shape, and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.language import close, ids, llama
from weft.attach import AdapterError, records

TOKENS = ids()
GATES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    weft.attach(model, weft.LoRA(rank=3), ["q_proj", "up_proj"], name="math", seed=1)
    weft.attach(model, weft.Bottleneck(), ["q_proj", "mlp-blocks"], name="code", seed=2)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.6 * torch.randn_like(p))
    return model


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def set_gates(model: nn.Module, name: str) -> None:
    """Every site's table such that the weights of task or user t are GATES[t], or 1 where there is one expert."""
    with torch.no_grad():
        for adapter in records(model)[name].adapters.values():
            t, gates = adapter.tensors(), GATES[:, : len(adapter.method.experts)]
            if name == "tasks":
                t["Z"].copy_(gates.logit())  # their sum is 1 already
            else:
                t["users"].copy_(torch.eye(3))
                t["G"].copy_(gates.log().mT)
                t["b"].zero_()


@pytest.fixture(params=["tasks", "users"])
def routed(model: nn.Module, request: Any) -> tuple[nn.Module, str]:
    router = (
        weft.TaskRouting(num_tasks=3)
        if request.param == "tasks"
        else weft.UserRouting(num_users=3, embedding_size=3, hidden=None)
    )
    weft.join(model, router, ["math", "code"], name=request.param)
    set_gates(model, request.param)
    return model, {"tasks": "task", "users": "user"}[request.param]


def given(model: nn.Module, condition: str, value: Any) -> Any:
    return weft.given(model, **{condition: value})


def test_every_row_is_weighed_by_its_own(routed: tuple[nn.Module, str]) -> None:
    model, condition = routed
    each = []
    for number in range(3):
        with given(model, condition, number):
            each.append(logits(model, TOKENS[:1])[0])
    assert (each[0] - each[1]).abs().max() > 1e-2
    with given(model, condition, [2, 0, 1]):
        mixed = logits(model, TOKENS[:1].expand(3, -1))
    for row, number in enumerate([2, 0, 1]):
        close(mixed[row], each[number], 1e-4)


def test_the_weights_are_those_of_the_table(routed: tuple[nn.Module, str]) -> None:
    model, condition = routed
    with given(model, condition, [1, 2]), weft.recording() as choices:
        logits(model)
    found = choices.gates("model.layers.0.self_attn.q_proj").view(*TOKENS.shape, 2)
    close(found[0], GATES[1].expand(TOKENS.shape[1], -1))
    close(found[1], GATES[2].expand(TOKENS.shape[1], -1))


def test_rows_of_a_route_keep_what_is_given_for_them(routed: tuple[nn.Module, str]) -> None:
    model, condition = routed
    name = "tasks" if condition == "task" else "users"
    tokens = TOKENS[:1].expand(4, -1)
    with given(model, condition, [0, 1, 2, 1]), weft.using(model, ["math", name, None, name]):
        mixed = logits(model, tokens)
    for row, (route, number) in enumerate(zip(["math", name, None, name], [0, 1, 2, 1], strict=True)):
        with given(model, condition, number), weft.using(model, route):
            close(mixed[row], logits(model, tokens[:1])[0], 1e-4)


def test_nothing_given_and_no_weight_for_it(routed: tuple[nn.Module, str]) -> None:
    model, condition = routed
    with pytest.raises(ValueError, match=f"reads the {condition} of every row, and none is given"):
        logits(model)
    with given(model, condition, 3), pytest.raises(ValueError, match=f"knows {condition} 0 to 2"):
        logits(model)
    with pytest.raises(AdapterError, match=f"reads the {condition} of every row"):
        weft.merge(model, "tasks" if condition == "task" else "users")


def test_only_the_rows_of_given_tasks_learn(routed: tuple[nn.Module, str]) -> None:
    model, condition = routed
    with given(model, condition, [1, 1]):
        model(TOKENS).logits.square().mean().backward()
    q = records(model)[{"task": "tasks", "user": "users"}[condition]].adapters["model.layers.0.self_attn.q_proj"]
    table = q.tensors()["Z" if condition == "task" else "users"]
    assert table.grad is not None
    assert table.grad[1].any()
    assert not table.grad[0].any()


def test_skills_are_drawn_while_they_train(model: nn.Module) -> None:
    weft.join(model, weft.TaskRouting(num_tasks=3), ["math", "code"], name="tasks")
    set_gates(model, "tasks")
    address = "model.layers.0.self_attn.q_proj"
    seen = []
    with given(model, "task", [1, 1]), weft.recording() as choices:
        model.train()
        for _ in range(400):
            model.get_submodule(address)(torch.zeros(2, 1, 32))
        model.eval()
        seen = choices.gates(address).view(400, 2, 2)
    assert (seen[:, 0] == seen[:, 1]).all(), "rows of a task are of one draw"
    assert len(seen[:, 0].unique(dim=0)) == 400
    # both are draws of one temperature: relaxed Bernoulli with the odds 1 to 4 and 4 to 1
    u = torch.rand(20000, 2, generator=torch.Generator().manual_seed(0))
    wanted = (GATES[1].logit() + u.logit()).sigmoid()
    close(seen[:, 0].mean(0), (wanted / wanted.sum(-1, keepdim=True)).mean(0), 0.06)
    weft.join(model, weft.TaskRouting(num_tasks=3, gate="softmax"), ["math", "code"], name="soft")
    model.train()
    with given(model, "task", 0), weft.using(model, "soft"):
        assert torch.equal(logits(model), logits(model))


def test_vectors_of_users_come_from_elsewhere_and_stay(model: nn.Module) -> None:
    router = weft.UserRouting(num_users=3, embedding_size=4, train_users=False)
    weft.join(model, router, ["math", "code"], name="users")
    vectors = torch.randn(3, 4)
    model.get_buffer("adapters.users.user_routing.users").copy_(vectors)
    adapter = records(model)["users"].adapters["model.layers.0.mlp"]
    assert torch.equal(adapter.tensors()["users"], vectors)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if ".users." in n} == {"G", "b", "H", "h"}


@pytest.mark.parametrize(
    ("router", "said"),
    [(weft.TaskRouting(num_tasks=2, task=2), "num_tasks=2 tasks"), (weft.UserRouting(user=3), "num_users=2 users")],
)
def test_a_number_that_is_none(model: nn.Module, router: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        weft.join(model, router, ["math", "code"], name="no")
