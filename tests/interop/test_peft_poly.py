"""Folders of Polytropon and multi-head routing cross to PEFT and back, with the task of every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import weft
from tests.interop.architectures import ARCHITECTURES, assert_close, base, outputs, quiet, reloaded, shake, tensors_of
from tests.interop.architectures import trained as trained_by_peft
from weft.adapter import AdapterFileError
from weft.attach import records
from weft.interop import peft as ours

pytestmark = pytest.mark.oracle

TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "intermediate.dense"]}
SIZES = [(1, "llama"), (4, "llama"), (2, "bert")]
TASKS = [2, 0]


def theirs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), quiet():
        # past the outermost model, which keeps the tasks to itself where it is for no kind of task (PEFT 0.21.2)
        return model.base_model(**batch, task_ids=torch.tensor(TASKS)).logits


def mine(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with weft.given(model, task=TASKS):
        return outputs(model, batch)


@pytest.mark.parametrize(("splits", "architecture"), SIZES)
def test_what_peft_wrote_computes_the_same_here(splits: int, architecture: str, tmp_path: Path) -> None:
    config = peft.PolyConfig(r=3, n_tasks=3, n_skills=2, n_splits=splits, target_modules=TARGETS[architecture])
    batch, model = ARCHITECTURES[architecture].batch(), base(architecture)
    made = trained_by_peft(base(architecture), config, tmp_path, size=0.5)
    plain = outputs(model, batch)
    weft.load(model, tmp_path, name="from_peft")
    assert records(model)["from_peft"].plan.method == weft.Poly(rank=3, num_tasks=3, num_skills=2, num_splits=splits)
    assert_close(mine(model, batch), theirs(made, batch), plain)


@pytest.mark.parametrize(("splits", "architecture"), SIZES)
def test_what_we_wrote_computes_the_same_there(splits: int, architecture: str, tmp_path: Path) -> None:
    batch, model = ARCHITECTURES[architecture].batch(), base(architecture)
    plain = outputs(model, batch)
    method = weft.Poly(rank=3, num_tasks=3, num_skills=2, num_splits=splits)
    weft.attach(model, method, TARGETS[architecture], name="ours")
    shake(weft.parameters(model), 0.5)
    weft.save(model, tmp_path / "it", format="peft")
    wanted = mine(model, batch)
    assert_close(wanted, theirs(reloaded(base(architecture), tmp_path / "it"), batch), plain)
    (tmp_path / "it" / "weft.json").unlink()
    again = base(architecture)
    weft.load(again, tmp_path / "it")
    before, after = tensors_of(model, "ours"), tensors_of(again, "it")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"order": 2}, {"routing": "mean"}], ids=str)
def test_what_peft_lacks_is_said(options: dict[str, Any]) -> None:
    model = base("llama")
    weft.attach(model, weft.Poly(rank=3, **options), TARGETS["llama"], name="a")
    assert "scale 1 / rank, plain factors and gates of tasks" in str(ours.cannot_write(model, records(model)["a"]))


def test_another_routing_is_refused(tmp_path: Path) -> None:
    trained_by_peft(base("llama"), peft.PolyConfig(r=3, n_tasks=3, target_modules=TARGETS["llama"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"poly_type": "poly"', '"poly_type": "other"'))
    with pytest.raises(AdapterFileError, match="poly_type='other'"):
        weft.load(base("llama"), tmp_path)
