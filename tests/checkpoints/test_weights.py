"""Runs of entries of a stored tensor: the bits of the whole, from any place to any other; a file cut short is said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints import CheckpointError, Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_runs_are_the_entries_of_the_tensor(tmp_path, dtype):
    drawn = (10 * torch.randn(13, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    save_file({"a": torch.ones(3), "b": drawn, "c": torch.ones(2)}, tmp_path / "model.safetensors")
    stored = Weights(tmp_path)["b"]
    wide = torch.empty(20, dtype=torch.float64 if dtype.is_floating_point else dtype)
    runs = [run.clone() for run in stored.runs(5, 88, torch.empty(20, dtype=dtype), wide)]
    assert [len(run) for run in runs] == [20, 20, 20, 20, 3]
    assert torch.equal(torch.cat(runs), drawn.flatten()[5:88].to(wide.dtype))


def test_a_file_that_shrinks_while_it_is_read_is_said(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    stored = Weights(tmp_path)["a"]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="has become shorter"):
        list(stored.runs(0, 100, torch.empty(50), torch.empty(50)))
