"""Adapters learnt in few bits: steps see what is written, what moves is of full precision, and runs go on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import weft
from tests.tune import runs
from tests.tune.test_step import finish, ready
from weft.adapter import native_tensors
from weft.attach import records
from weft.compress import few_bits, through
from weft.compress.one_bit import centroids
from weft.errors import WeftError
from weft.recipe import Train
from weft.tune import checkpoint, tune
from weft.tune.keeper import Keeper
from weft.tune.loop import Progressed


@pytest.mark.parametrize(("bits", "shape"), [(1, (3, 8)), (2, (8, 3))])
def test_the_gradient_passes_straight_through(bits: int, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, other = (torch.randn(shape, generator=draw).requires_grad_() for _ in range(2))
    rows = weight if shape[1] > shape[0] else weight.mT
    mean, deviation = rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
    standard = (rows - mean) / deviation
    known = centroids(bits).float()
    near = known[(standard.detach()[..., None] - known).abs().argmin(-1)]
    used = (near - standard.detach() + standard) * deviation + mean
    used = used if rows is weight else used.mT
    torch.testing.assert_close(few_bits(weight, bits=bits).tensor(), used.detach())
    loss = (used * other).square().sum()
    (wanted,) = torch.autograd.grad(loss, weight)
    gradient = 2 * (used * other.square()).detach()
    torch.testing.assert_close(through(weight, gradient, bits=bits), wanted)


def test_a_constant_row_has_the_plain_gradient() -> None:
    gradient = torch.randn(2, 6)
    torch.testing.assert_close(through(torch.zeros(2, 6), gradient, bits=1), gradient)


def test_steps_see_few_values_and_move_all_of_them(tiny: Path, tmp_path: Path) -> None:
    session, learner = ready(tiny, tmp_path / "x", adapter_bits=1, steps=4, learning_rate=1e-2)
    seen: list[dict[str, int]] = []
    inner = learner.gradient

    def watched(*args):
        seen.append({n: max(len(r.unique()) for r in _rows(p)) for n, p in learner.parameters.items()})
        return inner(*args)

    learner.gradient = watched
    results = finish(session, learner, Progressed(), 4)
    assert max(max(s.values()) for s in seen) == 2
    codes = learner.codes()
    assert codes.keys() == learner.parameters.keys()
    for name, p in learner.parameters.items():
        assert torch.equal(p.detach(), codes[name].tensor())
        latent = learner.optimizer.state[p]["latent"]
        assert max(len(r.unique()) for r in _rows(latent)) > 2
    assert results[-1].loss < results[0].loss


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.detach() if t.shape[1] >= t.shape[0] else t.detach().mT


def test_a_run_goes_on_where_it_stopped(tiny: Path, tmp_path: Path) -> None:
    options = {"adapter_bits": 2, "steps": 4, "learning_rate": 1e-2}
    session, learner = ready(tiny, tmp_path / "x", **options)
    finish(session, learner, whole := Progressed(), 4)
    wanted = {n: p.detach().clone() for n, p in learner.parameters.items()}
    session, learner = ready(tiny, tmp_path / "y", **options)
    finish(session, learner, done := Progressed(), 2)
    keeper = Keeper(tmp_path / "kept", 1, session.name)
    keeper.save(learner, done)
    session, learner = ready(tiny, tmp_path / "y", **options)
    again = keeper.restore(checkpoint.newest(tmp_path / "kept")[0], learner)
    assert all(torch.equal(p.detach(), learner.codes()[n].tensor()) for n, p in learner.parameters.items())
    finish(session, learner, again, 4)
    assert again.step == whole.step == 4
    assert all(torch.equal(p.detach(), wanted[n]) for n, p in learner.parameters.items())


def test_what_is_written_is_in_few_bits(tiny: Path, tmp_path: Path) -> None:
    sizes = {}
    for bits in (None, 1):
        recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / f"run-{bits}", adapter_bits=bits, steps=2)
        result = tune(recipe, console=runs.quiet())
        sizes[bits] = (result.adapter / "adapter_model.safetensors").stat().st_size
    assert sizes[1] < 0.6 * sizes[None]
    model = weft.load_base(str(tiny / "base"))[0]
    weft.load(model, result.adapter, "a")
    assert all(max(len(r.unique()) for r in _rows(t)) <= 2 for t in native_tensors(records(model)["a"]).values())


@pytest.mark.parametrize(("options", "said"), [
    ({"optimizer_in_backward": True, "clip_norm": None}, "optimizer_in_backward steps them where they are"),
    ({"merge_every": 2}, "merge_every writes into them"),
    ({"optimizer": "mezo"}, "mezo moves the trained tensors themselves"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Train(adapter_bits=1, **options)


def test_a_method_of_vectors_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="this method trains vectors only"):
        ready(tiny, tmp_path / "x", {"name": "ia3"}, adapter_bits=1)


def test_a_method_that_changes_its_own_tensors_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="adapter_bits"):
        ready(tiny, tmp_path / "x", {"name": "adalora"}, adapter_bits=1, steps=4)
