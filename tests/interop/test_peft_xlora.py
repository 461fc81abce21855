"""X-LoRA folders of PEFT are read, with the experts that lie beside their classifier."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.common.language import ids, llama
from tests.interop.architectures import assert_close, outputs, quiet, reloaded, shake
from weft.adapter import AdapterFileError
from weft.attach import records
from weft.interop import peft as ours

pytestmark = pytest.mark.oracle

BATCH = {"input_ids": ids(3, 6)}
TARGETS = (["q_proj", "up_proj"], ["up_proj", "v_proj"], ["q_proj", "up_proj"])
"""What each of the three experts adapts: no site but up_proj has them all."""


def base() -> Any:
    torch.manual_seed(0)
    return llama(use_cache=False)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives PEFT's X-LoRA over three LoRAs in this folder, and saves it there.

    PEFT 0.21 loses the layers of the classifier whose number is an expert's name; older ones kept them, as here.
    """
    monkeypatch.chdir(tmp_path)  # PEFT takes the experts' paths from where it runs

    def write(complete: bool = True, names: tuple[str, ...] = ("0", "1", "2"), **options: Any) -> Any:
        for i, targets in enumerate(TARGETS):
            with quiet():
                one = peft.get_peft_model(base(), peft.LoraConfig(r=2 + i, lora_alpha=3, target_modules=targets))
                shake([p for n, p in one.named_parameters() if "lora_" in n], 0.2 + 0.1 * i)
                one.save_pretrained(f"experts/{i}")
        adapters = {name: f"experts/{i}" for i, name in enumerate(names)}
        with quiet():
            config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **options)
            model = peft.get_peft_model(base(), config)
            shake(model.base_model.internal_xlora_classifier.parameters(), 0.3)
            model.save_pretrained(".")
        if complete:
            state = model.base_model.internal_xlora_classifier.state_dict()
            save_file(
                {f"base_model.internal_xlora_classifier.{k}": v for k, v in state.items()},
                Path("adapter_model.safetensors"),
            )
        return model.eval()

    return write


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (
        {"xlora_depth": 3, "xlora_size": 10, "softmax_temperature": 0.5, "global_scaling_weight": 2.0},
        {"depth": 3, "width": 10, "temperature": 0.5, "scale": 2.0},
    ),
    (
        {"layerwise_scalings": True, "top_k_lora": 2, "xlora_depth": 2, "xlora_size": 7, "xlora_dropout_p": 0.0},
        {"layerwise": True, "k": 2, "depth": 2, "width": 7, "dropout": 0.0},
    ),
    (
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "softmax_temperature": 3.0},
        {"softmax": "chosen", "k": 2},
    ),
    ({"enable_softmax": False, "use_trainable_adapters": True}, {"softmax": "none", "train_experts": True}),
]


@pytest.mark.parametrize(("theirs", "mine"), OPTIONS)
def test_what_peft_wrote_computes_the_same_here(theirs: Any, mine: Any, written: Any, tmp_path: Path) -> None:
    made, model = written(**theirs), base()
    plain, wanted = outputs(model, BATCH), outputs(made, BATCH)
    weft.attach(model, weft.LoRA(rank=2), "v_proj", name="before")  # another count of sites, at some of them
    weft.load(model, tmp_path, name="x")
    weft.use(model, "x")
    assert_close(outputs(model, BATCH), wanted, plain)
    assert_close(outputs(reloaded(base(), tmp_path), BATCH), wanted, plain)  # the layout is one that PEFT reads
    method = records(model)["x"].plan.method
    assert [e.name for e in method.experts] == ["0", "1", "2"]
    expected = weft.XLoRA(**{"hidden_size": 32, "train_experts": False} | mine)
    assert method.over(()) == expected


def test_it_is_saved_in_weft_s_layout_and_loaded(written: Any, tmp_path: Path) -> None:
    written(layerwise_scalings=True)
    model, again = base(), base()
    weft.load(model, tmp_path, name="x")
    weft.save(model, tmp_path / "native", "x")
    weft.load(again, tmp_path / "native", name="x")
    assert torch.equal(outputs(again, BATCH), outputs(model, BATCH))
    assert "each expert lies in one of its own" in str(ours.cannot_write(model, records(model)["x"]))


def test_what_peft_lost_is_said(written: Any, tmp_path: Path) -> None:
    written(complete=False)
    with pytest.raises(AdapterFileError, match=r"lacks .*layers\.0\.bias.* PEFT 0\.21 leaves those layers"):
        weft.load(base(), tmp_path)


def changed(folder: Path, **options: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    return folder


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapters": {"0": "/elsewhere", "1": "experts/1", "2": "experts/2"}}, "expert 0 by the path '/elsewhere'"),
    ({"adapters": {"0": "experts/0", "1": "../x", "2": "experts/2"}}, "expert 1 by the path '../x'"),
    ({"adapters": {"a": "experts/0", "b": "experts/1"}}, "named a, b, and PEFT"),
    ({"adapters": {}}, "named nowhere"),
    ({"adapters": {"0": "experts/0", "1": "experts/1"}}, "3 scores does not fit 2 experts"),
    ({"enable_softmax_topk": True, "top_k_lora": 2}, "a softmax of a softmax"),
    ({"scaling_pass_value": 0.5}, "scaling_pass_value=0.5 is an option"),
    ({"xlora_depth": 0}, "depth"),
]


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_is_refused(options: dict[str, Any], match: str, written: Any, tmp_path: Path) -> None:
    written()
    if "../x" in match:
        shutil.copytree(tmp_path / "experts" / "1", tmp_path.parent / "x", dirs_exist_ok=True)
    with pytest.raises(AdapterFileError, match=match):
        weft.load(base(), changed(tmp_path, **options))


def test_experts_that_it_cannot_weigh(written: Any, tmp_path: Path) -> None:
    written()
    changed(tmp_path / "experts" / "0", use_dora=True)
    with pytest.raises(AdapterFileError, match="experts/0"):
        weft.load(base(), tmp_path)
    with quiet():
        peft.get_peft_model(base(), peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained("experts/0")
    with pytest.raises(AdapterFileError, match=r"adapts model\.embed_tokens, and Weft's xlora"):
        weft.load(base(), tmp_path)
    with quiet():
        peft.get_peft_model(base(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
            "experts/0"
        )
    with pytest.raises(AdapterFileError, match="experts/0 is ia3"):
        weft.load(base(), tmp_path)


def test_a_stray_tensor(written: Any, tmp_path: Path) -> None:
    written()
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.other": torch.zeros(2)}, file)
    with pytest.raises(AdapterFileError, match=r"base_model\.other, which is no part"):
        weft.load(base(), tmp_path)
