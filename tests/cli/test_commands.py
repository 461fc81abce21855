"""Each command does its job on a short run on pico: data on stdout, the rest on stderr."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from weft.recipe import load_recipe


def test_init_writes_a_recipe_that_loads(weft, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    done = weft("init", tmp_path / "my.yaml", "--train", "rows.jsonl")
    assert (done.code, done.out) == (0, f"{tmp_path / 'my.yaml'}\n")
    assert "weft tune" in done.err
    assert load_recipe(tmp_path / "my.yaml").data.train == str(tmp_path / "rows.jsonl")
    again = weft("init", tmp_path / "my.yaml")
    assert again.code == 2
    assert "--force" in again.err
    assert weft("init", "-").out.startswith("# A recipe")


def test_tune_made_a_run(adapter: Path) -> None:
    assert {"adapter", "report.html", "result.json", "log.jsonl", "recipe.yaml"} <= {p.name for p in adapter.iterdir()}


def test_tune_prints_the_result_on_stdout_only(weft, recipe: Path, tmp_path: Path) -> None:
    done = weft("tune", recipe, "train.steps=1", f"output={tmp_path / 'run'}", "forgetting=null", "check=null")
    assert done.code == 0
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in done.out
    assert "step 1/1" in done.err
    assert "step 1/1" not in done.out
    assert "validation loss" not in done.err.rpartition("trained 1 step")[2]


def test_dry_run_trains_nothing(weft, recipe: Path, tmp_path: Path) -> None:
    done = weft("tune", recipe, "--dry-run", "method.rank=4", f"output={tmp_path / 'dry'}")
    assert done.code == 0
    assert "rank: 4" in done.out
    assert "parameters" in done.out
    assert "base weights" in done.out
    assert not (tmp_path / "dry").exists()


def test_eval_measures_base_and_adapter(weft, recipe: Path, adapter: Path) -> None:
    done = weft("eval", recipe, "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert set(found) == {"validation", "forgetting"}
    result = json.loads((adapter / "result.json").read_text())
    for who, when in (("base", "before"), ("short", "after")):
        assert found["validation"][who]["loss"] == pytest.approx(result[when]["validation"]["loss"], abs=1e-5)
    table = weft("eval", recipe, "--adapter", adapter / "adapter").out.splitlines()
    assert table[0].split()[:3] == ["data", "of", "loss"]
    assert [row.split()[1] for row in table[1:3]] == ["base", "short"]


def test_generate_streams_what_the_adapter_says(weft, adapter: Path, monkeypatch) -> None:
    import weft as package

    prompt = "import os\nimport"
    model, tokenizer = package.load_base("pico")
    package.load(model, adapter / "adapter", "a")
    expected = {}
    for route in (None, "a"):
        with package.using(model, route):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            written = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
            expected[route] = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected[None] != expected["a"], "three steps should change a greedy continuation"
    assert weft("generate", prompt, "-n", 8).out == expected[None] + "\n"
    with_adapter = weft("generate", prompt, "-n", 8, "--adapter", adapter)
    assert with_adapter.out == expected["a"] + "\n"
    assert "short" in with_adapter.err
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    assert weft("generate", "-", "-n", 8, "-a", adapter, "-a", adapter, "--route", "none").out == expected[None] + "\n"


def test_sampling_is_seeded(weft) -> None:
    said = [weft("generate", "def f(x):", "-n", 6, "-t", 1.5, "--seed", seed).out for seed in (1, 1, 2, 3)]
    assert said[0] == said[1]
    assert len(set(said)) > 1


def test_chat_answers_every_line(weft, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/new\nhello\nagain\n"))
    done = weft("chat", "-a", adapter, "-n", 4)
    assert done.code == 0, done.err
    replies = done.out.splitlines()
    assert len(replies) >= 3
    assert "> " not in done.out


def test_check_is_a_gate(weft, adapter: Path) -> None:
    done = weft("check", adapter, "--rows", 2)
    assert done.code == 0, done.err
    assert done.out.split()[0] == "form"
    for way in ("saved", "merged", "unmerged", "peft"):
        assert f"\n{way} " in done.out
    assert "held-out" not in done.out
    assert "validation data" in done.err
    tight = weft("check", adapter, "--ways", "merged", "--tolerance", "1e-12", "--rows", 2, "--json")
    assert tight.code == 1
    found = tight.json()
    assert found["passed"] is False
    assert found["rows"][0]["way"] == "merged"
    assert 0 < found["rows"][0]["max_logit_difference"] < 1e-2


def test_merge_writes_a_checkpoint_that_is_the_adapter(weft, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import weft as package

    done = weft("merge", adapter, "--out", tmp_path / "merged", "--check")
    assert done.code == 0, done.err
    assert "writing them in bfloat16 moved one by at most" in done.out
    assert "checkpoint" in done.out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("def f(x):", return_tensors="pt").input_ids
    model, _ = package.load_base("pico")
    package.load(model, adapter / "adapter", "a")
    with torch.no_grad():
        live, base = model(ids).logits, package.using(model, None)
        with base:
            plain = model(ids).logits
        off = (merged(ids).logits - live).abs().max()
    assert off < 0.1 * (plain - live).abs().max()
    assert weft("merge", adapter, "--out", tmp_path / "merged").code == 2


def test_convert_there_and_back(weft, adapter: Path, tmp_path: Path) -> None:
    there = weft("convert", adapter, "--to", "peft", "--out", tmp_path / "peft")
    assert (there.code, there.out) == (0, f"{tmp_path / 'peft'}\n"), there.err
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    back = weft("convert", tmp_path / "peft", "--to", "weft", "--out", tmp_path / "back", "--json")
    assert back.json()["layout"] == "weft"
    import weft as package

    model, _ = package.load_base("pico")
    package.load(model, adapter / "adapter", "a")
    package.load(model, tmp_path / "back", "b")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        with package.using(model, "a"):
            first = model(ids).logits
        with package.using(model, "b"):
            assert torch.equal(model(ids).logits, first)


def test_methods_says_what_each_can_do(weft) -> None:
    found = {each["name"]: each for each in weft("methods", "--json").json()}
    assert found["lora"]["merges"]["linear"] == "yes"
    assert "gelu" in found["bottleneck"]["merges"]["linear"]
    assert found["lora"]["rows"]["experts"] == "yes"
    assert {option["name"]: option["default"] for option in found["lora"]["options"]}["rank"] == 8
    one = weft("methods", "dora").out
    assert "2402.09353" in one
    assert "rank" in one
    assert len(weft("methods").out.splitlines()) == len(found) + 1


def test_doctor(weft) -> None:
    done = weft("doctor", "--json")
    assert done.code == 0
    found = done.json()
    assert found["healthy"] is True
    assert found["threads"] == torch.get_num_threads()
    assert {"torch", "transformers"} <= {package["name"] for package in found["packages"]}
    assert "offline (HF_" in weft("doctor").out
