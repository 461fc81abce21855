"""Checkpoint folders: whole or not there, checked when read, pruned; states come back to the bit."""

from __future__ import annotations

import errno
import random

import numpy as np
import pytest
import torch

from weft.tune import checkpoint
from weft.tune.checkpoint import Checkpoint, Damaged
from weft.tune.optimizers import flatten_state, restore_state
from weft.tune.random_state import random_states, restore_random_states, seed_everything


def made(step: int) -> Checkpoint:
    tensors = {"a": torch.full((3, 2), float(step)), "b": torch.arange(5)}
    return Checkpoint(step, tensors, {"a|step": torch.tensor(1.0)}, {"torch": torch.get_rng_state()}, {"note": "ü"})


def test_what_is_written_is_read_and_old_ones_go(tmp_path):
    for step in (3, 20, 100):
        path = checkpoint.write(tmp_path, made(step))
        checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-00000020", "step-00000100"]
    back = checkpoint.read(path)
    assert back.step == 100
    assert back.state == {"note": "ü"}
    assert torch.equal(back.adapter["b"], torch.arange(5))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "empty"])
def test_any_harm_to_the_newest_falls_back_to_the_one_before(tmp_path, name, harm):
    checkpoint.write(tmp_path, made(1))
    file = checkpoint.write(tmp_path, made(2)) / name
    data = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2 if harm == "cut" else 0])
    with pytest.raises(Damaged):
        checkpoint.read(file.parent)
    found, path, complaints = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert path == tmp_path / "step-00000001"
    assert len(complaints) == 1
    assert "step-00000002 is damaged" in complaints[0]
    assert name in complaints[0]


def test_a_full_disk_leaves_what_was_there_and_no_rubbish(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, made(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, made(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.read(tmp_path / "step-00000001").step == 1


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    checkpoint.write(tmp_path, made(1))
    (tmp_path / ".writing-00000002").mkdir()
    (tmp_path / ".writing-00000002" / "adapter.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0].step == 1
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_random_states_come_back():
    seed_everything(3)
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    kept = random_states()

    def draws():
        return random.gauss(0, 1), random.random(), float(np.random.standard_normal()), torch.rand(2).tolist()  # noqa: NPY002

    first = draws()
    draws()
    restore_random_states(*kept)
    assert draws() == first


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_optimiser_states_come_back_to_the_bit(make):
    def fresh():
        torch.manual_seed(0)
        named = {"w": torch.nn.Parameter(torch.randn(4, 3)), "v": torch.nn.Parameter(torch.randn(3))}
        return named, make(list(named.values()))

    def steps(named, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in named.values():
                p.grad = torch.randn_like(p)
            optimizer.step()

    named, optimizer = fresh()
    steps(named, optimizer, range(3))
    kept = {k: v.detach().clone() for k, v in named.items()}, flatten_state(optimizer, named)
    kept = kept[0], ({k: v.clone() for k, v in kept[1][0].items()}, kept[1][1])
    steps(named, optimizer, range(3, 6))
    other, restored = fresh()
    with torch.no_grad():
        for key, value in kept[0].items():
            other[key].copy_(value)
    restore_state(restored, other, *kept[1])
    steps(other, restored, range(3, 6))
    assert all(torch.equal(named[k], other[k]) for k in named)
