"""compress, extract, convert --to lora: what they state holds for what they write; what they refuse is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import weft as package
from tests.cli.conftest import DATA
from weft import compressed, compressing
from weft.cli import compress
from weft.differences import differences


@pytest.fixture(scope="module")
def tokens() -> dict[str, torch.Tensor]:
    return dict(package.load_base("pico")[1]("def add(a, b):\n    return", return_tensors="pt"))


@pytest.fixture(scope="module")
def loha(tmp_path_factory: pytest.TempPathFactory, tokens) -> tuple[Path, torch.Tensor]:
    """An adapter that PEFT made, whose change is no product of thin matrices, and its logits."""
    folder = tmp_path_factory.mktemp("loha")
    model, _ = package.load_base("pico")
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["k_proj"], layers_to_transform=[0, 1])
    theirs = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
        theirs.save_pretrained(folder)
        return folder, theirs.eval()(**tokens).logits


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "few.jsonl"
    file.write_text("".join((DATA / "validation.jsonl").read_text().splitlines(keepends=True)[:3]))
    return file


@pytest.mark.oracle
def test_an_adapter_of_peft_becomes_a_lora_of_peft(weft, loha, tokens, tmp_path: Path) -> None:
    folder, logits = loha
    done = weft("convert", folder, "--to", "lora", "--base", "pico", "-o", tmp_path / "lora", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["method"] == "loha"
    assert found["passed"]
    assert max(found["losses"].values()) < 1e-4
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    again = peft.PeftModel.from_pretrained(package.load_base("pico")[0], tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**tokens).logits, logits, rtol=1e-4, atol=1e-3)
    assert (
        json.loads((tmp_path / "lora/weft.json").read_text())["provenance"]["converted"]["parent"]["method"]["name"]
        == "loha"
    )


def test_a_lora_that_is_cut_says_what_it_lost(weft, loha, tmp_path: Path) -> None:
    done = weft("convert", loha[0], "--to", "lora", "--rank", 1, "--base", "pico", "-o", tmp_path / "lora")
    assert done.code == 0, done.err
    assert "loha as lora" in done.out
    assert "logits against the original" in done.out
    share = float(done.out.partition("at most ")[2].partition(" of the norm")[0])
    model, _ = package.load_base("pico")
    package.load(model, loha[0], "before")
    package.load(model, tmp_path / "lora", "after")
    before, after = differences(model, "before"), differences(model, "after")
    losses = [(before[a].weight() - after[a].weight()).norm() / before[a].weight().norm() for a in before]
    assert share == pytest.approx(max(losses).item(), rel=1e-2)
    assert (tmp_path / "lora/README.md").read_text().startswith("# lora\n\nAn adapter for `pico`, converted out of")


def test_what_no_lora_expresses_is_refused(weft, tmp_path: Path) -> None:
    model, _ = package.load_base("pico")
    package.attach(model, package.methods()["bottleneck"](), name="a", layers="0")
    package.save(model, tmp_path / "a", "a")
    done = weft("convert", tmp_path / "a", "--to", "lora", "-o", tmp_path / "lora")
    assert done.code == 2
    assert "bottleneck changes no weight" in done.err
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(("options", "said"), [
    (["--to", "peft", "--rank", 2], "--to peft changes no tensor"),
    (["--to", "lora", "--rank", 2, "--loss", "1%"], "give one of them"),
    (["--to", "lora", "--loss", "much"], "expected a share from 0 up to 1, as in 0.5% or 0.005"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(weft, loha, tmp_path: Path, options: list, said: str) -> None:
    done = weft("convert", loha[0], *options, "--base", "pico", "-o", tmp_path / "x")
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (tmp_path / "x").exists()


def test_compress_holds_the_loss_of_the_weights(weft, adapter: Path, tmp_path: Path) -> None:
    done = weft("compress", adapter, "--loss", "70%", "-o", tmp_path / "small", "--json")
    assert done.code == 0, done.err
    (found,) = done.json()
    assert 0 < max(found["losses"].values()) <= 0.7
    assert found["bytes_after"] < found["bytes_before"]
    assert {1} <= set(found["ranks"].values()) <= {1, 2}
    info = json.loads((tmp_path / "small/weft.json").read_text())
    assert info["provenance"]["compressed"]["parent"]["name"] == "short"
    assert info["provenance"]["recipe"]["base"]["model"] == "pico"  # what the parent was made of is still known
    assert "bytes before" in (tmp_path / "small/README.md").read_text()
    assert weft("check", tmp_path / "small", "--rows", 2).code == 0  # an ordinary adapter


def test_compress_holds_the_loss_per_token(weft, adapter: Path, few_rows: Path, tmp_path: Path) -> None:
    rows = few_rows
    done = weft("compress", adapter, "--loss", "2%", "--eval", rows, "-o", tmp_path / "small", "--json")
    assert done.code == 0, done.err
    (found,) = done.json()
    assert found["growth"] == pytest.approx((found["after"] - found["before"]) / found["before"])
    assert found["growth"] <= 0.02
    assert found["source"] == str(rows)
    again = weft("compress", tmp_path / "small", "--loss", "70%", "-o", tmp_path / "smaller")
    assert again.code in (0, 1), again.err  # what was compressed is an adapter like any other


def test_an_adapter_in_code_is_an_adapter(weft, adapter: Path, few_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = weft("compress", adapter, "--way", "compeft", "--loss", "20%", "--eval", few_rows, "-o", out, "--json")
    assert done.code == 0, done.out + done.err
    (found,) = done.json()
    assert found["growth"] <= 0.2
    sizes = [
        sum((folder / name).stat().st_size for name in ("weft.json", "adapter_model.safetensors"))
        for folder in (adapter / "adapter", out)
    ]
    assert sizes[1] == found["disk_after"] < 0.2 * sizes[0]
    assert sizes[0] <= found["disk_before"]
    checked = weft("check", out, "--rows", 2, "--json")
    assert checked.code == 0, checked.err
    combined = weft("combine", "linear", out, adapter, "-o", tmp_path / "both")
    assert combined.code == 0, combined.err


def test_a_code_that_cannot_hold_the_loss_is_refused_with_the_figures(weft, adapter: Path, tmp_path: Path) -> None:
    done = weft("compress", adapter, "--way", "compeft", "--loss", "0.5%", "-o", tmp_path / "small")
    assert done.code == 1
    assert re.search(r"refused: with compeft, at least \d+\.\d+% is lost at model\.layers", done.out)
    assert not (tmp_path / "small").exists()


def test_a_size_is_spent_on_what_the_outputs_need(weft, adapter: Path, few_rows: Path, tmp_path: Path) -> None:
    options = ["--way", "bits", "--size", "20%", "--loss-in", "output", "--calibrate", few_rows]
    done = weft("compress", adapter, *options, "-o", tmp_path / "small", "--json")
    assert done.code == 0, done.err
    (found,) = done.json()
    assert found["of"] == "output"
    assert found["bytes_after"] <= 0.2 * found["bytes_before"]
    assert f"outputs are compared on 3 rows of {few_rows}" in done.err


def test_a_set_shares_a_file_and_each_of_it_is_an_adapter(weft, adapter: Path, few_rows: Path, tmp_path: Path) -> None:
    options = ["--way", "joint", "--rank", 2, "--eval", few_rows, "--json"]
    done = weft("compress", adapter, adapter, *options, "-o", tmp_path / "set")
    assert done.code == 0, done.err
    found = done.json()
    assert max(map(abs, found["growth"].values())) < 1e-4
    assert found["source"] == str(few_rows)
    assert found["worst"][2] < 1e-3  # the two are one
    assert found["names"] == ["short", "short-2"]
    files = [f for f in (tmp_path / "set").rglob("*") if f.suffix in (".safetensors", ".json")]
    assert found["bytes_after"] == sum(f.stat().st_size for f in files)
    assert found["bytes_shared"] == (tmp_path / "set/basis.safetensors").stat().st_size
    assert weft("check", tmp_path / "set/short-2", "--rows", 2).code == 0
    info = json.loads((tmp_path / "set/short/weft.json").read_text())
    assert info["provenance"]["compressed"]["set"] == ["short", "short-2"]
    done = weft("compress", adapter, adapter, "--way", "joint", "--rank", 64, "-o", tmp_path / "large")
    assert (done.code, (tmp_path / "large").exists()) == (2, False)
    assert "together the 2 adapters would take" in done.err


def test_the_command_knows_the_ways_that_there_are() -> None:
    assert (compress.WAYS, compress.SETS) == (compressing.WAYS, compressing.SETS)
    assert get_args(compressed.LossIn) == compress.LOSS_IN
    assert (get_args(compressing.Way), get_args(compressing.SetWay)) == (compressing.WAYS, compressing.SETS)


@pytest.mark.parametrize(("options", "said"), [
    (["--loss", "1%", "--size", "5%"], "give one of them"),
    ([], "give one of them"),
    (["--way", "bit", "--loss", "1%"], "--way bit: there is no such"),
    (["--loss-in", "inputs", "--loss", "1%"], "--loss-in inputs: there is no such"),
    (["--loss", "1%", "--calibrate", "x"], "the weights are compared without any"),
    (["--loss", "0"], "something has to be lost"),
    (["--loss", "1%", "--rank", 3], "--rank is not of --way principal, but of joint, eigenlorax"),
    (["--way", "joint", "--size", "5%"], "--size is not of --way joint, but of principal, bits, one_bit, compeft"),
    (["--way", "joint"], "--loss or --rank says how much is kept"),
    (["--way", "joint", "--rank", 2, "--calibrate", "x"], "--calibrate is not of --way joint"),
    (["--way", "joint", "--rank", 3], "joint keeps what adapters have in common: give two or more"),
])  # fmt: skip
def test_compress_options_that_do_not_fit_are_refused(weft, adapter, tmp_path: Path, options: list, said: str) -> None:
    done = weft("compress", adapter, *options, "-o", tmp_path / "x")
    assert (done.code, said in done.err) == (2, True), done.err


def test_nothing_is_written_where_one_is_refused(weft, adapter: Path, loha, tmp_path: Path) -> None:
    done = weft("compress", adapter, adapter, "--loss", "0.001%", "-o", tmp_path / "small")
    assert done.code == 1
    assert "short: refused: a loss of at most 0.001% takes" in done.out
    assert "nothing was written" in done.err
    assert not (tmp_path / "small").exists()


def test_several_are_written_side_by_side(weft, adapter: Path, tmp_path: Path) -> None:
    done = weft("compress", adapter, adapter, "--loss", "70%", "-o", tmp_path / "small")
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["short", "short-2"]
    assert done.out.count("written: ") == 2


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that differs from pico by matrices of rank 3, a norm, and the embedding that the head shares."""
    folder = tmp_path_factory.mktemp("tuned") / "pico-1.1"
    model, tokenizer = package.load_base("pico")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight, rank in ((model.model.layers[0].mlp.up_proj.weight, 3), (model.model.embed_tokens.weight, 2)):
            left, right = (torch.randn(n, rank, generator=draw) for n in weight.shape)
            weight.add_(0.02 * left @ right.mT)
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_extract_finds_the_adapter_in_a_checkpoint(weft, tuned: Path, tokens, tmp_path: Path) -> None:
    done = weft("extract", "pico", tuned, "--loss", "0.1%", "-o", tmp_path / "found", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["ranks"] == {"model.embed_tokens": 2, "model.layers.0.mlp.up_proj": 3, "model.norm": None}
    assert found["whole"] == ["model.norm"]
    assert not found["left_out"]
    model, _ = package.load_base("pico")
    package.load(model, tmp_path / "found")
    with torch.no_grad():
        wanted = package.load_base(str(tuned))[0](**tokens).logits
        torch.testing.assert_close(model(**tokens).logits, wanted, rtol=1e-4, atol=1e-3)


def test_extract_at_a_rank_says_what_it_lost(weft, tuned: Path, tmp_path: Path) -> None:
    done = weft("extract", "pico", tuned, "--rank", 2, "-o", tmp_path / "found")
    assert done.code == 0, done.err
    assert "kept in full, for a norm or bias that changed: model.norm" in done.out
    share = float(done.out.partition("at most ")[2].partition("%")[0])
    assert 10 < share < 80
    assert "(model.layers.0.mlp.up_proj)" in done.out


def test_extract_refuses_what_it_cannot_do(weft, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert "nothing to extract" in weft("extract", "pico", "pico", "--rank", 2, "-o", out).err
    assert "give one of them" in weft("extract", "pico", tuned, "-o", out).err
    assert "is there already" in weft("extract", "pico", tuned, "--rank", 2, "-o", tmp_path).err
    assert not out.exists()


def test_extract_reads_weights_that_are_stored_transposed(weft, tokens, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=64, vocab_size=4096)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokenizer = package.load_base("pico")[1]
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            weight = model.transformer.h[0].mlp.c_fc.weight  # [I, O]
            weight.add_(0.1 * torch.randn(16, 2) @ torch.randn(2, 64))
            model.transformer.h[0].attn.c_attn.bias.add_(0.1)
            model.transformer.wpe.weight.add_(0.1 * torch.randn(64, 1))
    done = weft("extract", tmp_path / "base", tmp_path / "tuned", "--loss", "0.1%", "-o", tmp_path / "found", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["ranks"]["transformer.h.0.mlp.c_fc"] == 2
    assert found["whole"] == ["transformer.h.0.attn.c_attn"]  # its bias changed
    again, _ = package.load_base(str(tmp_path / "base"))
    package.load(again, tmp_path / "found")
    with torch.no_grad():
        wanted = package.load_base(str(tmp_path / "tuned"))[0](**tokens).logits
        torch.testing.assert_close(again(**tokens).logits, wanted, rtol=1e-4, atol=1e-4)
