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


def test_it_is_trained_in_that_form_where_it_is_linear_in_what_is_trained() -> None:
    """Two steps of full changes, each learnt alone in its tangent: they add up, and half of one has half its effect."""
    torch.manual_seed(0)
    model = llama()
    for name in ("a", "b"):
        weft.attach(model, weft.methods()["full"](), ["q_proj", "up_proj"], name=name)
    model.double()
    start = [p.detach().clone() for p in weft.parameters(model, "a")]  # `full` holds the new weight, not the change
    with torch.no_grad(), weft.using(model, None):
        base = model(**INPUTS).logits
    for name, answer in (("a", 3), ("b", 7)):
        learnt, losses = [*weft.parameters(model, name)], []
        optimizer = torch.optim.SGD(learnt, lr=0.5)
        call = tangent(model, {name: 1.0}, learn=True)
        for _ in range(8):
            loss = -call(INPUTS).log_softmax(-1)[0, :, answer].mean()
            loss.backward()
            assert all(p.grad is None for p in model.parameters() if all(p is not q for q in learnt))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.1
    each = {name: tangent(model, {name: 1.0})(INPUTS) - base for name in ("a", "b")}
    both = tangent(model, {"a": 1.0, "b": 1.0}, learn=True)(INPUTS).detach() - base
    torch.testing.assert_close(both, each["a"] + each["b"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for p, first in zip(weft.parameters(model, "a"), start, strict=True):
            p.lerp_(first, 0.5)
    torch.testing.assert_close(tangent(model, {"a": 1.0})(INPUTS) - base, 0.5 * each["a"], rtol=1e-4, atol=1e-5)
    assert float(each["a"].abs().max()) > 0.01


def test_what_has_no_tangent_is_said() -> None:
    model = carrying(llama())
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        tangent(model, {"c": 1.0})
    weft.attach(model, weft.Bottleneck(), "mlp-blocks", name="bent")
    with pytest.raises(AdapterError, match="changes no weight"):
        tangent(model, {"bent": 1.0})
