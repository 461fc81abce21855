"""Optimisers in a run: groups, resume with the same bits, memory said beforehand, and settings that do not fit."""

from __future__ import annotations

import math

import pytest
import torch

from tests.common.models import llama
from tests.tune import runs
from weft import methods, parameters
from weft.core.router import Router, experts
from weft.errors import WeftError
from weft.optim import ZerothOrder, held_bytes
from weft.recipe import Train
from weft.targets import resolve
from weft.tune import checkpoint
from weft.tune.evaluate import measure, pad_token
from weft.tune.keeper import Keeper
from weft.tune.learn import leave, make_learner
from weft.tune.loop import Progressed, train
from weft.tune.optimizers import check_optimizer, finish, make_optimizer, optimizer_bytes, settled
from weft.tune.parts import micro_batches
from weft.tune.random_state import seed_everything
from weft.tune.session import Session, attach_adapter, prepare
from weft.tune.step import Learner, StepResult, backpropagate, train_step
from weft.tune.trained import Tensors, planned_tensors, trained_tensors

FAST = {"lisa": {"layers": 1, "period": 2}, "frugal": {"update_gap": 4}, "mezo": {"queries": 2}}


def spec(name: str) -> dict:
    return {"name": name, **FAST.get(name, {})}


def ready(tiny, tmp_path, method="lora", **settings) -> tuple[Session, Learner]:
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "out", **settings)
    options = {"rank": 2} if method in ("lora", "dora") else {}
    session = prepare(recipe.model_copy(update={"method": {"name": method, **options}}), lambda text: None)
    attach_adapter(session)
    return session, make_learner(session)


def one_step(session: Session, learner: Learner, rate: float = 0.1, step: int = 1) -> StepResult:
    parts = micro_batches(session.splits.train.examples[:4], size=2, pad_token=1)
    return train_step(learner, parts, session.recipe.train, rate=rate, step=step)


def trained(tiny, tmp_path, **settings) -> tuple[Session, list[StepResult]]:
    session, learner = ready(tiny, tmp_path, **settings)
    results: list[StepResult] = []
    train(
        learner, session.splits.train, session.recipe.train, Progressed(),
        pad_token=pad_token(session.tokenizer), after_step=lambda result: results.append(result) or True,
    )  # fmt: skip
    finish(learner.optimizer)
    return session, results


@pytest.mark.parametrize(("name", "rate"), [("lisa", 0.05), ("scaled-adamw", 0.05), ("smmf", 0.05), ("mezo", 0.01)])
def test_a_language_model_learns(tiny, tmp_path, name, rate):
    session, _ = ready(tiny, tmp_path / "before")
    examples = session.splits.train.examples
    before = measure(session.model, session.tokenizer, examples)["loss"]
    session, _ = trained(tiny, tmp_path, steps=30, optimizer=spec(name), learning_rate=rate)
    assert measure(session.model, session.tokenizer, examples)["loss"] < before - 0.02


@pytest.mark.parametrize("name", ["lisa", "mezo", "natural-galore", "schedulefree-adamw", "adamw-8bit"])
def test_a_run_that_stopped_goes_on_with_the_same_bits(tiny, tmp_path, name):
    """Seven steps, and three, a checkpoint, validation after it, and four more in another process's stead."""
    settings = {"optimizer": spec(name), "steps": 7, "accumulate": 2, "weight_decay": 0.1}

    def go_on(folder: str, to: int) -> dict[str, torch.Tensor]:
        session, learner = ready(tiny, tmp_path / folder, **settings)
        keeper = Keeper(tmp_path / folder / "checkpoints", 2, session.name, {"before": {}})
        found, _, _ = checkpoint.newest(keeper.folder)
        done = keeper.restore(found, learner) if found else Progressed()

        def after_step(result: StepResult) -> bool:
            if done.step == 3:
                keeper.save(learner, done)
                with settled(learner.optimizer):
                    measure(session.model, session.tokenizer, session.splits.train.examples[:4])
            return done.step < to

        if found is None:
            seed_everything(0)
        train(
            learner, session.splits.train, session.recipe.train, done,
            pad_token=pad_token(session.tokenizer), after_step=after_step,
        )  # fmt: skip
        finish(learner.optimizer)
        return {key: p.detach().clone() for key, p in learner.parameters.items()}

    whole = go_on("whole", 7)
    go_on("parts", 4)  # one step beyond its checkpoint, which is lost
    parts = go_on("parts", 7)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_lora_plus_keeps_its_ratio_under_a_schedule(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path, lora_plus=16.0, optimizer="sgd", betas=(0.0, 0.9), clip_norm=None)
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    parts = micro_batches(session.splits.train.examples[:4], size=4, pad_token=1)
    with torch.enable_grad():
        backpropagate(learner, parts, session.recipe.train)
    gradients = {name: p.grad.clone() for name, p in learner.parameters.items()}
    learner.optimizer.zero_grad()
    train_step(learner, parts, session.recipe.train, rate=0.01, step=1)
    for name, p in learner.parameters.items():
        ratio = 16.0 if name.endswith(".B") else 1.0
        torch.testing.assert_close(p.detach(), before[name] - 0.01 * ratio * gradients[name])
    assert {group["lr"] for group in learner.optimizer.param_groups} == {0.01, 0.16}


def test_allora_scales_each_row_by_its_length(tiny, tmp_path):
    session, plain = ready(tiny, tmp_path / "a", optimizer="sgd", betas=(0.0, 0.9), clip_norm=None)
    _, scaled = ready(tiny, tmp_path / "b", optimizer="sgd", betas=(0.0, 0.9), clip_norm=None, allora=3.0)
    parts = micro_batches(session.splits.train.examples[:4], size=2, pad_token=1)
    for learner in (plain, scaled):
        backpropagate(learner, parts, session.recipe.train)
    for name, p in plain.parameters.items():
        wanted = torch.stack([g / math.sqrt(row.norm().item() + 1 / 9) for g, row in zip(p.grad, p, strict=True)])
        torch.testing.assert_close(scaled.parameters[name].grad, wanted)
        if name.endswith(".B"):  # rows at zero learn eta times faster
            torch.testing.assert_close(wanted, 3.0 * p.grad)
    for hook in scaled.hooks:
        hook.remove()
    scaled.optimizer.zero_grad()
    backpropagate(scaled, parts, session.recipe.train)
    torch.testing.assert_close(scaled.parameters[name].grad, p.grad)


def test_components_are_clipped_one_by_one(tiny, tmp_path):
    settings = {"optimizer": "sgd", "betas": (0.0, 0.9)}
    session, learner = ready(tiny, tmp_path, clip_norm=1e-3, clip_by="component", **settings)
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    one_step(session, learner, rate=1.0)
    moved: dict[str, float] = {}
    for name, p in learner.parameters.items():
        component = ".".join(name.split(".")[-2:])
        moved[component] = moved.get(component, 0.0) + (p.detach() - before[name]).square().sum().item()
    assert "q_proj.B" in moved
    assert all(m**0.5 == pytest.approx(1e-3, rel=1e-3) for name, m in moved.items() if name.endswith(".B"))


def test_mixout_is_dropout_towards_the_base(tiny, tmp_path):
    """The gradient at the mixture, by the formula of the paper, for the very masks that were drawn."""
    session, learner = ready(tiny, tmp_path, method="full", mixout=0.4, precision=None)
    with torch.no_grad():
        for p in learner.parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tuned = {name: p.detach().clone() for name, p in learner.parameters.items()}
    parts = micro_batches(session.splits.train.examples[:4], size=2, pad_token=1)
    torch.manual_seed(5)
    found = learner.gradient(learner, parts, session.recipe.train)
    gradients = {name: p.grad.clone() for name, p in learner.parameters.items()}
    assert all(torch.equal(p, tuned[name]) for name, p in learner.parameters.items())

    base = dict(zip(learner.parameters, learner.gradient.base, strict=True))
    torch.manual_seed(5)
    total, wanted = 0.0, {name: torch.zeros_like(p) for name, p in tuned.items()}
    for part in parts:
        # M is 1 where the base's own is taken
        kept = {name: torch.empty_like(p).bernoulli_(0.6) for name, p in tuned.items()}
        with torch.no_grad():
            for name, p in learner.parameters.items():
                masked = 1 - kept[name]
                p.copy_((masked * base[name] + (1 - masked) * tuned[name] - 0.4 * base[name]) / 0.6)
        learner.optimizer.zero_grad()
        count = sum(each.num_trained for each in parts)
        loss, _, _ = learner.loss_of(learner.model, part)
        (loss / count).backward()
        total += loss.item()
        for name, p in learner.parameters.items():
            wanted[name] += p.grad * kept[name] / 0.6
    assert found == pytest.approx(total, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_mixout_pulls_towards_the_base(tiny, tmp_path):
    away = {}
    for share in (0.0, 0.9):
        session, learner = ready(tiny, tmp_path / str(share), method="full", mixout=share, learning_rate=1e-2)
        start = {name: p.detach().clone() for name, p in learner.parameters.items()}
        for step in range(12):
            one_step(session, learner, rate=1e-2, step=step)
        found = sum((p - start[name]).square().sum().item() for name, p in learner.parameters.items())
        away[share] = found**0.5
    assert away[0.9] < away[0.0]


@pytest.mark.parametrize("queries", [1, 3])
def test_zeroth_order_follows_the_slopes_of_the_loss(tiny, tmp_path, queries):
    """A step of a run is that of the formula, with all parts in one loss, and leaves no gradient behind."""
    options = {"name": "mezo", "queries": queries, "perturbation": 1e-2}
    session, learner = ready(tiny, tmp_path, optimizer=options)
    optimizer = learner.optimizer
    assert isinstance(optimizer, ZerothOrder)
    seeds, before = optimizer.seeds(), {name: p.detach().clone() for name, p in learner.parameters.items()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    parts = micro_batches(session.splits.train.examples[:4], size=2, pad_token=1)
    count, moves = sum(part.num_trained for part in parts), dict.fromkeys(map(id, order), 0.0)

    def loss() -> float:
        with torch.no_grad():
            return sum(learner.loss_of(learner.model, part)[0].item() for part in parts) / count

    for seed in seeds:
        z = {
            id(p): torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)) for i, p in enumerate(order)
        }
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, p in learner.parameters.items():
                    p.copy_(before[name] + sign * 1e-2 * z[id(p)])
            sides.append(loss())
        slope = (sides[0] - sides[1]) / 2e-2
        moves = {key: move + slope * z[key] / queries for key, move in moves.items()}
    with torch.no_grad():
        for name, p in learner.parameters.items():
            p.copy_(before[name])
    result = train_step(learner, parts, session.recipe.train, rate=0.1, step=1)
    assert result.gradient_norm > 0
    for name, p in learner.parameters.items():
        assert p.grad is None
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * moves[id(p)], rtol=1e-3, atol=2e-5)


def test_zeroth_order_takes_float16_and_dropout_and_any_method(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path / "h", optimizer="mezo", precision="float16", steps=4)
    assert not learner.scaler.is_enabled()
    assert math.isfinite(one_step(session, learner, rate=1e-3).loss)
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "d", optimizer={"name": "mezo", "perturbation": 1e-6})
    session = prepare(recipe, lambda text: None)  # dropout 0.3
    attach_adapter(session)
    with torch.no_grad():
        for p in parameters(session.model):
            p.add_(0.1)
    session.model.train()
    learner = make_learner(session)
    # other dropout on the two sides would be a slope of its own, divided by a tiny move
    assert one_step(session, learner, rate=1e-6).gradient_norm < 5e3
    for method in ("norm_tuning", "prompt", "vera"):
        session, learner = ready(tiny, tmp_path / method, method=method, optimizer="adazeta")
        assert math.isfinite(one_step(session, learner, rate=1e-3).loss)


def test_zeroth_order_in_several_processes_is_refused(tiny, tmp_path, monkeypatch):
    from torch import distributed

    session, learner = ready(tiny, tmp_path, optimizer="mezo")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(WeftError, match="learn in one process, and here are 2"):
        one_step(session, learner)


def test_a_loss_that_is_not_a_number_leaves_the_tensors_and_no_slopes(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path, optimizer="mezo")
    before = [p.detach().clone() for p in learner.parameters.values()]
    plain = learner.loss_of
    learner.loss_of = lambda model, batch: (plain(model, batch)[0] * float("nan"), *plain(model, batch)[1:])
    with pytest.raises(WeftError, match="loss of step 7 is nan"):
        one_step(session, learner, step=7)
    learner.optimizer.step()
    for p, b in zip(learner.parameters.values(), before, strict=True):
        torch.testing.assert_close(p.detach(), b, rtol=0, atol=1e-7)


def test_schedule_free_measures_and_saves_the_average(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path, optimizer="schedulefree-adamw")
    assert session.recipe.train.schedule == "schedule-free"
    assert any("averaged weights" in note for note in learner.notes)
    for step in range(5):
        one_step(session, learner, step=step)
    training = [p.detach().clone() for p in learner.parameters.values()]
    with settled(learner.optimizer):
        average = [p.detach().clone() for p in learner.parameters.values()]
    assert all(torch.equal(p, t) for p, t in zip(learner.parameters.values(), training, strict=True))
    assert not all(torch.allclose(a, t) for a, t in zip(average, training, strict=True))
    state = learner.optimizer.state[next(iter(learner.parameters.values()))]
    x = (training[0] - 0.1 * state["z"]) / 0.9  # y = (1 - beta) z + beta x
    torch.testing.assert_close(average[0], x, rtol=1e-4, atol=1e-6)
    leave(learner)
    assert all(torch.allclose(p, a) for p, a in zip(learner.parameters.values(), average, strict=True))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("full", {}),
        ("tensor_train", {"optimizer": "adafactor"}),
        ("vera", {"optimizer": "smmf"}),
        ("dora", {"lora_plus": 4.0}),
        ("dora", {"optimizer": "scaled-adamw"}),
    ],
)
def test_memory_is_said_before_anything_is_allocated(tiny, tmp_path, method, settings):
    session, learner = ready(tiny, tmp_path, method=method, **settings)
    planned = planned_tensors(session.plan)
    assert all(t.parameter.device.type == "meta" for t in planned.trained)
    assert [t.name for t in planned.trained] == [t.name for t in trained_tensors(session.model, session.name).trained]
    one_step(session, learner)
    assert optimizer_bytes(planned, session.recipe.train) == pytest.approx(held_bytes(learner.optimizer), rel=0.02)


def test_master_weights_are_counted(tiny, tmp_path):
    settings = {"adapter_dtype": "bfloat16", "master_weights": True}
    session, learner = ready(tiny, tmp_path, **settings)
    planned = planned_tensors(session.plan)
    one_step(session, learner)
    said = optimizer_bytes(trained_tensors(session.model, session.name), session.recipe.train)
    assert said == pytest.approx(held_bytes(learner.optimizer), rel=0.02)
    assert len(planned.trained) == len(learner.parameters)


def test_pairs_are_known_by_their_method_and_not_by_their_name():
    model = llama()
    found = {}
    for name in ("lora", "dora", "loha", "full"):
        tensors = planned_tensors(resolve(model, methods()[name](), ["q_proj", "embed_tokens"][: 1 + (name == "lora")]))
        found[name] = (len(tensors.pairs), len(tensors.copies))
    assert found["lora"][0] == found["dora"][0] + 1 > 1
    mixture = methods()["top_k"](experts=experts(methods()["lora"](), 3))
    assert len(planned_tensors(resolve(model, mixture, ["q_proj"])).pairs) == 3 * found["dora"][0]
    assert found["loha"] == (0, 0)
    assert found["full"][0] == 0 < found["full"][1]
    assert all(issubclass(m, Router) or isinstance(m.pairs, tuple) for m in methods().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamwe"}, "did you mean 'adamw'"),
        ({"optimizer": {"name": "adamw", "epsilon": 1.0}}, "adamw has no option 'epsilon'; did you mean 'eps'"),
        ({"optimizer": "lion", "betas": (0.8, 0.9)}, "train.betas: lion does not read them"),
        ({"optimizer": "sm3", "weight_decay": 0.1}, "sm3 knows no weight decay"),
        ({"schedule": "schedule-free"}, "the rate would never fall"),
        ({"optimizer": "schedulefree-sgd", "schedule": "cosine"}, "averages weights instead of lowering the rate"),
        ({"optimizer": "mezo", "clip_norm": 1.0}, "there is no gradient whose norm could be cut"),
        ({"optimizer": "adazeta", "allora": 2.0}, "it scales gradients of a backward pass"),
        ({"optimizer": "mezo", "mixout": 0.1}, "it masks gradients of a backward pass"),
        ({"optimizer": "mezo", "activations": "recompute"}, "no activations are kept without a backward pass"),
        ({"optimizer": "mezo", "optimizer_in_backward": True}, "there is no backward pass"),
        ({"optimizer": "smmf", "optimizer_in_backward": True, "clip_norm": None}, "smmf steps all tensors together"),
        ({"mixout": 0.1, "optimizer_in_backward": True, "clip_norm": None}, "optimizer_in_backward steps them before"),
        ({"optimizer": {"name": "sgd", "nesterov": True}, "betas": (0.0, 0.9)}, "needs momentum"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(settings, message):
    p = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(WeftError, match=message):
        make_optimizer({"p": p}, Train(**settings))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("vera", {"lora_plus": 4.0}, "train.lora_plus: this method trains no low-rank pair"),
        ("vera", {"allora": 4.0}, "train.allora: vera trains no low-rank pair"),
        ("vera", {"optimizer": "scaled-adamw"}, "this method trains no pair"),
        ("lora", {"mixout": 0.1}, "lora trains none in their place"),
        ("lora", {"optimizer": {"name": "lisa", "layers": 3}}, "only 2 adapted layers"),
        ("dora", {"optimizer": "muon"}, "muon trains matrices"),
    ],
)
def test_what_the_method_cannot_have_is_refused(tiny, tmp_path, method, settings, message):
    with pytest.raises(WeftError, match=message):
        ready(tiny, tmp_path, method=method, **settings)


def test_the_recipe_follows_the_optimizer_where_it_says_nothing():
    assert Train(optimizer="mezo").clip_norm is None
    assert Train(optimizer={"name": "adazeta"}).clip_norm is None
    assert Train(optimizer="schedulefree-sgd").schedule == "schedule-free"
    assert Train().clip_norm == 1.0
    again = Train.model_validate(Train(optimizer="mezo").model_dump(mode="json"))
    assert again == Train(optimizer="mezo")
    with pytest.raises(ValueError, match="options stand beside a name"):
        Train(optimizer={"eps": 1.0})
    with pytest.raises(ValueError, match="clip_by says whose norm"):
        Train(clip_by="component", clip_norm=None)


def test_the_schema_and_the_optimisers_agree_on_what_they_are():
    from weft.optim import choices
    from weft.recipe import train

    classes = {name: load() for name, load in choices().items()}
    assert {name for name, cls in classes.items() if cls.forward_only} == train.FORWARD_ONLY
    assert {name for name, cls in classes.items() if cls.schedule_free} == train.SCHEDULE_FREE
    for name in train.FORWARD_ONLY | train.SCHEDULE_FREE:
        assert check_optimizer(Train(optimizer=name)).name == name
    assert Tensors.plain({"p": torch.nn.Parameter(torch.zeros(1))}).trained[0].layer is None
