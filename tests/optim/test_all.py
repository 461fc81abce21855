"""Every optimiser by name: it learns, goes on from a checkpoint with the same bits, and keeps what was said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from tests.optim.problems import (
    MATRICES_ONLY,
    choice,
    groups_of,
    make,
    make_tensors,
    names,
    regression,
    setting_of,
    walk,
)
from weft.errors import MissingExtra, WeftError
from weft.optim import Setting, choices, flatten_state, held_bytes, resolve, restore_state, state_bytes

RATES = {
    "adagrad": 0.3, "adafactor": 0.1, "came": 0.01, "dadapt-adam": 1.0, "grams": 0.01, "lars": 5.0, "lamb": 0.05,
    "lion": 0.01, "lion-8bit": 0.01, "mezo": 0.01, "adazeta": 0.01, "spsa-gc": 0.01, "prodigy": 1.0, "racs": 1.0,
    "radam": 0.2, "riemannion": 0.3, "rmsprop": 0.01, "scaled-sgd": 0.05, "schedulefree-sgd": 0.5, "sgd": 0.05,
    "shampoo": 0.3, "signsgd": 0.01,
    "sm3": 0.1, "tiger": 0.01, "rmsprop-8bit": 0.01, "galore": 0.1, "fira": 0.1, "apollo": 0.1,
    "natural-galore": 0.1, "laprop": 0.05, "smmf": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_learns(name):
    trained, loss = regression()
    if name in MATRICES_ONLY:
        trained = [t for t in trained if t.parameter.ndim == 2]
    options = {"update_gap": 50} if name in ("frugal", "natural-galore") else {}
    options |= {"update_proj_gap": 50} if name in ("galore", "fira", "apollo") else {}
    options |= {"queries": 8} if name in ("mezo", "adazeta", "spsa-gc") else {}
    chosen = choice(name, **options)
    optimizer = chosen.make(groups_of(trained), setting_of(trained, steps_per_epoch=5))
    rate, first = RATES.get(name, 0.03), loss().item()
    num_steps = 150 if chosen.forward_only or rate == 1.0 else 60  # those that find their rate begin slowly
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate if chosen.schedule_free else rate * (1 - step / num_steps)
        if chosen.forward_only:
            with torch.no_grad():
                for seed in optimizer.seeds():
                    sides = []
                    for move in (1e-3, -2e-3):
                        optimizer.move(seed, move)
                        sides.append(loss().item())
                    optimizer.move(seed, 1e-3)
                    optimizer.tell(seed, (sides[0] - sides[1]) / 2e-3)
        else:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if chosen.schedule_free:
        optimizer.eval()
    assert loss().item() < 0.7 * first, (first, loss().item())


@pytest.mark.parametrize("name", names())
def test_goes_on_with_the_same_bits_after_a_checkpoint(name):
    runs = []
    size = 1100 if choices()[name]().source == "bitsandbytes" else 12  # eight bits are for tensors of 4096 and more
    for broken in (False, True):
        trained = make_tensors(vector=name not in MATRICES_ONLY, size=size)
        torch.manual_seed(0)  # some of the package's draw from it, and a checkpoint of a run holds it
        optimizer = make(choice(name), trained, 0.0)
        walk(optimizer, trained, range(5))
        drawn = torch.get_rng_state()
        if broken:
            named = {t.name: t.parameter for t in trained}
            tensors, plain = flatten_state(optimizer, named)
            tensors = load(save({key: value.contiguous() for key, value in tensors.items()}))
            again = make_tensors(vector=name not in MATRICES_ONLY, size=size)
            for old, new in zip(trained, again, strict=True):
                new.parameter.data.copy_(old.parameter.data)
            trained, optimizer = again, make(choice(name), again, 0.0)
            restore_state(optimizer, {t.name: t.parameter for t in again}, tensors, json.loads(json.dumps(plain)))
        torch.set_rng_state(drawn)
        walk(optimizer, trained, range(5, 10))
        runs.append([t.parameter.detach().clone() for t in trained])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 12) for name in names()), *((name, 1100) for name in names("bitsandbytes"))]
)
def test_the_state_is_as_large_as_said_beforehand(name, size):
    trained = make_tensors(vector=name not in MATRICES_ONLY, size=size)
    optimizer = make(choice(name), trained)
    walk(optimizer, trained, range(1))
    real = held_bytes(optimizer)
    ghosts = [type(t)(t.name, torch.nn.Parameter(t.parameter.data.to("meta")), t.layer, t.component) for t in trained]
    said = state_bytes(choice(name), groups_of(ghosts), setting_of(ghosts))
    if name in ("badam", "lisa"):  # said for the largest turn
        assert 0.5 * said <= real <= said + 64
    else:
        # counts of steps and other single numbers apart
        assert abs(real - said) <= 32 * len(trained), (real, said)


def test_small_states_are_small():
    """Bytes for each of a large matrix's parameters."""
    trained = [t for t in make_tensors(1, size=4096) if t.name == "l.0.A"]
    setting = Setting(trained)
    bytes_of = {
        name: state_bytes(choice(name), groups_of(trained), setting) / trained[0].parameter.numel()
        for name in ("adamw", "adamw-8bit", "lion-8bit", "smmf", "frugal", "mezo", "sgd")
    }
    assert bytes_of["adamw"] == pytest.approx(8, abs=0.01)
    assert bytes_of["adamw-8bit"] < 2.2
    assert bytes_of["lion-8bit"] < 1.1
    assert bytes_of["smmf"] < 0.3
    assert bytes_of["frugal"] == pytest.approx(2, abs=0.1)
    assert bytes_of["mezo"] == 0
    assert bytes_of["sgd"] == 4


def test_a_wrong_name_option_or_value_is_a_sentence():
    with pytest.raises(WeftError, match=r"train.optimizer: there is no optimiser 'adamwe'; did you mean 'adamw'"):
        resolve("adamwe")
    with pytest.raises(WeftError, match="frugal has no option 'densety'; did you mean 'density'"):
        resolve({"name": "frugal", "densety": 0.1})
    with pytest.raises(WeftError, match=r"frugal.density=2.0: must be at most 1"):
        resolve({"name": "frugal", "density": 2.0})
    with pytest.raises(WeftError, match="expected one of 'columns', 'blocks', 'svd'"):
        resolve({"name": "frugal", "projection": "rows"})
    with pytest.raises(WeftError, match=r"galore.rank=0: must be at least 1"):
        resolve({"name": "galore", "rank": 0})
    with pytest.raises(WeftError, match="it has no options"):
        resolve({"name": "adamw-paged", "eps": 1e-3})
    with pytest.raises(WeftError, match="no pair"):
        choice("scaled-adamw").make([], setting_of([]))
    with pytest.raises(WeftError, match=r"muon trains matrices, and l.0.v is \[8\]"):
        make(choice("muon"), make_tensors(1))


def test_lists_of_a_file_are_tuples_where_tuples_are_wanted():
    assert resolve({"name": "lion", "betas": [0.8, 0.9]}).betas == (0.8, 0.9)


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(monkeypatch):
    import sys

    from weft.optim import library

    library._choice.cache_clear()
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'weft\[optim\]'"):
        resolve("lamb")
    with pytest.raises(MissingExtra, match=r"pip install 'weft\[quant\]'"):
        make(resolve("adamw-8bit"), make_tensors(1))
    assert "lamb" in choices()


def test_every_optimiser_says_what_it_is():
    for name, load_class in choices().items():
        cls = load_class()
        assert cls.what, name
        assert cls.source in ("weft", "torch", "bitsandbytes", "pytorch-optimizer"), name
        assert cls.source != "weft" or cls.paper, name
