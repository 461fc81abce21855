"""A tangent composition is linear in its weights, and it is the slope of the model along the change."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.common.language import gpt2, llama
from weft.errors import AdapterError
from weft.tangent import tangent


def carrying(model):
    for seed, (name, method) in enumerate({"a": weft.LoRA(rank=2), "b": weft.DoRA(rank=2)}.items()):
        weft.attach(model, method, "all-linear", name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in weft.parameters(model, name):
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
    weft.use(model, "a")
    return model.double()


INPUTS = {"input_ids": torch.arange(1, 8)[None]}


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_it_is_the_slope_of_the_model(make) -> None:
    torch.manual_seed(0)
    model, step = carrying(make()), 1e-4
    weft.combine(model, {"a": step, "b": -0.5 * step}, name="near")
    with weft.using(model, None):
        base = model(**INPUTS).logits
    with weft.using(model, "near"):
        near = model(**INPUTS).logits
    found = tangent(model, {"a": 1.0, "b": -0.5})(INPUTS)
    slope = (near - base) / step
    torch.testing.assert_close(found - base, slope, rtol=2e-3, atol=2e-3 * float(slope.abs().max()))
    assert float(slope.abs().max()) > 0.1


def test_parts_add_up_and_one_can_be_forgotten() -> None:
    torch.manual_seed(0)
    model = carrying(llama())
    with torch.no_grad(), weft.using(model, None):
        base = model(**INPUTS).logits
    each = {name: tangent(model, {name: 1.0})(INPUTS) - base for name in ("a", "b")}
    both = tangent(model, {"a": 2.0, "b": 1.0})(INPUTS) - base
    torch.testing.assert_close(both, 2 * each["a"] + each["b"], rtol=1e-4, atol=1e-5)  # Llama takes roots in float32
    torch.testing.assert_close(tangent(model, {"a": 1.0, "b": 0.0})(INPUTS) - base, each["a"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(**INPUTS).logits, base)  # the route in use is still a's


def test_what_has_no_tangent_is_said() -> None:
    model = carrying(llama())
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        tangent(model, {"c": 1.0})
    weft.attach(model, weft.Bottleneck(), "mlp-blocks", name="bent")
    with pytest.raises(AdapterError, match="changes no weight"):
        tangent(model, {"bent": 1.0})
