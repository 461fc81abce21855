"""A combination of one adapter with weight 1 is that adapter: every start of LoRA, and methods that start off zero."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import weft
from tests.common.language import ids, llama
from weft.attach import records
from weft.combining import combine, rule_of
from weft.core.starts import NEEDS, Start

M = weft.methods()
STARTS = [s for s in get_args(Start) if "original" not in NEEDS.get(s, ())]  # those repair a quantised base
METHODS = {
    **{f"lora, {start}": M["lora"](rank=2, start=start) for start in STARTS},
    "lora, olora, rank-stabilised": M["lora"](rank=2, start="olora", rank_stabilised=True),
    "lora, eva, dealt": M["lora"](rank=2, start="eva", rho=2.0),
    "kasa": M["kasa"](rank=2),
    "lamda": M["lamda"](rank=4),
    "triadaptlora": M["triadaptlora"](rank=2),
    "delora": M["delora"](rank=2),
    "hira": M["hira"](rank=2),
    "loldu": M["loldu"](rank=2),
    "svft": M["svft"](),
}


def data() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    rows = ids(4, 8)
    return [{"input_ids": rows, "labels": rows}]


def outputs(model, route) -> torch.Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(data()[0]["input_ids"]).logits


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_with_weight_one_is_that_adapter(name, trained):
    torch.manual_seed(0)
    model, method = llama(), METHODS[name]
    weft.attach(model, method, "all-linear", name="a", calibration=data() if method.needs() else None)
    if trained:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in weft.parameters(model, "a"):
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    wanted, base = outputs(model, "a"), outputs(model, None)
    for rule in ("linear", "task_arithmetic"):
        combine(model, ["a"], rule, name=rule)
        assert torch.equal(outputs(model, rule), wanted)
        assert {s.method.name for s in records(model)[rule].plan.sites} == {method.name}
    # parts of it that add up to 1: no copy, and nothing that a start subtracts is counted twice or lost
    combine(model, {"linear": 0.75, "task_arithmetic": 0.25}, "task_arithmetic", name="parts")
    torch.testing.assert_close(outputs(model, "parts"), wanted, rtol=1e-4, atol=1e-4)
    # a rule that sees dense changes, and keeps all of this one
    combine(model, ["a"], rule_of("ties", {"density": 1.0}), name="dense")
    torch.testing.assert_close(outputs(model, "dense"), wanted, rtol=1e-4, atol=1e-4)
    if trained:
        assert float((wanted - base).abs().max()) > 1e-3
    else:
        torch.testing.assert_close(wanted, base, rtol=1e-4, atol=1e-4)
