"""Whole checkpoints, merged tensor by tensor: mergekit's numbers, ready for transformers, and safe to kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.common.language import llama
from weft.checkpoints import CheckpointError, Weights, merge, merge_checkpoints
from weft.checkpoints.jobs import Job
from weft.checkpoints.stream import Out, write_file
from weft.combine import rules
from weft.combining import rule_of


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A base and two models tuned from it."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "base")
    for name in ("one", "two"):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "one", "two")}


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("rule", ["linear", "ties", "slerp", "karcher", "passthrough"])
def test_every_tensor_is_what_the_rule_makes_of_it(models, tmp_path, rule):
    many = rule in ("linear", "ties", "karcher")
    parents = {models["one"]: 0.6, models["two"]: 0.4} if many else {models["one"]: 1.0}
    made = merge_checkpoints(
        parents, rule_of(rule), tmp_path / "out", base=models["base"] if rule != "linear" else None
    )
    found, base = tensors(tmp_path / "out"), tensors(models["base"])
    each = [tensors(folder) for folder in parents]
    for name, tensor in found.items():
        wanted = rule_of(rule)([e[name] for e in each], weights=[*parents.values()], base=base[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
    assert made.num_tensors == len(base)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], found["model.norm.weight"])


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_files_are_mergekits(models, tmp_path, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge = pytest.importorskip("mergekit.merge")
        from mergekit.config import MergeConfiguration
        from mergekit.options import MergeOptions

        body = {
            "merge_method": method,
            "models": [{"model": models[n], "parameters": {"weight": w}} for n, w in (("one", 0.6), ("two", 0.4))],
            "parameters": {"density": 0.5} if method == "ties" else {},
            **({"base_model": models["base"]} if method == "ties" else {}),
        }
        merge.run_merge(MergeConfiguration.model_validate(body), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    options = {"density": 0.5} if method == "ties" else {}
    merge_checkpoints(
        {models["one"]: 0.6, models["two"]: 0.4}, rule_of(method, options), tmp_path / "ours",
        base=models["base"] if method == "ties" else None,
    )  # fmt: skip
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [name for name, rule in rules().items() if rule.by_entry])
def test_pieces_of_tensors_are_merged_to_the_same_bits(models, tmp_path, rule, monkeypatch):
    both = [models["one"], models["two"]][: rules()[rule].most]
    base = models["base"] if rules()[rule].needs_base else None
    for piece, job in ((merge._PIECE, merge._JOB), (100, 350)):
        monkeypatch.setattr(merge, "_PIECE", piece)
        monkeypatch.setattr(merge, "_JOB", job)
        merge_checkpoints(both, rule_of(rule), tmp_path / str(piece), base=base, dtype=torch.bfloat16)
    whole, pieces = tensors(tmp_path / str(1 << 17)), tensors(tmp_path / "100")
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert max(t.numel() for t in whole.values()) > 350


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_a_wider_number_format_is_not_rounded_to_the_models_first(models, tmp_path, rule):
    base = models["base"] if rule == "ties" else None
    both = {name: models[name] for name in ("base", "one", "two")}
    for name, folder in both.items():
        merge_checkpoints([folder], rule_of("passthrough"), tmp_path / name, dtype=torch.bfloat16)
    parents = [str(tmp_path / "one"), str(tmp_path / "two")]
    start = None if base is None else str(tmp_path / "base")
    merge_checkpoints(parents, rule_of(rule), tmp_path / "out", base=start, dtype=torch.float32)
    found, name = tensors(tmp_path / "out"), "model.embed_tokens.weight"
    stored = [tensors(p)[name].float() for p in parents]
    wanted = rule_of(rule)(stored, base=None if start is None else tensors(start)[name].float())
    assert torch.equal(found[name], wanted)
    assert not torch.equal(found[name], wanted.bfloat16().float())


def test_shards_have_an_index_and_a_number_format_can_be_chosen(models, tmp_path):
    both = [models["one"], models["two"]]
    merge_checkpoints(both, rule_of("linear"), tmp_path / "out", dtype=torch.bfloat16, shard_bytes=30_000)
    assert len([*(tmp_path / "out").glob("model-*-of-*.safetensors")]) > 1
    weights = Weights(tmp_path / "out")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_what_does_not_fit_is_said_before_anything_is_written(models, tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    linear = rule_of("linear")
    for parents, rule, base, said in (
        ([models["one"], str(tmp_path / "gpt2")], linear, None, "is a .*GPT2LMHeadModel"),
        ([models["one"]], rule_of("ties"), None, "ties merges differences to a base: name"),
        ([models["one"]], rule_of("fisher"), None, "which files alone do not have"),
        ([str(tmp_path)], linear, None, "should hold model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=said):
            merge_checkpoints(parents, rule, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    wider = tmp_path / "wider"
    wider.mkdir()
    grown = tensors(models["one"])
    grown["model.embed_tokens.weight"] = torch.zeros(99, 32)
    save_file(grown, wider / "model.safetensors", {"format": "pt"})
    (wider / "config.json").write_text((Path(models["one"]) / "config.json").read_text())
    with pytest.raises(CheckpointError, match="another vocabulary"):
        merge_checkpoints([models["one"], str(wider)], linear, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="is there already"):
        merge_checkpoints([models["one"]], linear, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


KILLED = """
import sys, time
from weft.checkpoints import merge_checkpoints
from weft.checkpoints import merge
from weft.combine import rules
from weft.combining import rule_of
one, two, base, out = sys.argv[1:]
inner = merge._merged
def slow(*args):
    time.sleep(0.05)
    return inner(*args)
merge._merged = slow
print("go", flush=True)
merge_checkpoints([one, two], rule_of("dare"), out, base=base, shard_bytes=40_000)
"""


def test_a_killed_merge_goes_on_and_ends_with_the_same_bits(models, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, models["one"], models["two"], models["base"], str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "go\n"
        while not any(out.glob("*.part")) or len([*out.glob("*.safetensors")]) < 1:
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="another merge that was interrupted"):
        merge_checkpoints([models["one"]], rule_of("linear"), out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    options = {"base": models["base"], "shard_bytes": 40_000}
    merge_checkpoints([models["one"], models["two"]], rule_of("dare"), out, **options)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())  # not written again
    merge_checkpoints([models["one"], models["two"]], rule_of("dare"), tmp_path / "whole", **options)
    first, second = tensors(out), tensors(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not [*out.glob("*.part")]
    assert not (out / "merging.json").exists()


def test_a_file_is_gone_on_with_after_the_last_whole_tensor(tmp_path):
    outs = [Out(f"t{i}", (4, 3), torch.float32) for i in range(4)]
    made: list[str] = []
    broken = True

    def make(out: Out) -> list[Job]:
        return [Job(n, partial(piece, out.name, n)) for n in (7, 5)]

    def piece(name: str, count: int) -> torch.Tensor:
        if broken and name == "t2" and count == 5:
            raise KeyboardInterrupt
        made.append(name)
        return torch.full((count,), float(name[1]))

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x", outs, make)
    part = tmp_path / "x.part"
    part.write_bytes(part.read_bytes() + b"torn")
    broken = False
    made.clear()
    write_file(tmp_path / "x", outs, make)
    assert sorted(made) == ["t2", "t2", "t3", "t3"]
    assert {k: v[0, 0].item() for k, v in load_file(tmp_path / "x").items()} == {f"t{i}": float(i) for i in range(4)}
