"""The multi-head parallel adapter of the unified view, as a parallel adapter of the whole attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import weft
from tests.common.language import close, ids, llama
from weft.attach import records


@torch.no_grad()
def test_a_small_network_for_each_head_is_a_parallel_adapter_of_the_attention() -> None:
    torch.manual_seed(0)
    model, rows = llama(), ids()
    heads, width = model.config.num_attention_heads, 3
    plan = weft.attach(
        model,
        weft.Bottleneck(placement="parallel", width=heads * width, activation="relu", scale=4.0, bias=False),
        "attention-blocks",
    )
    inputs: dict[str, Tensor] = {}
    hooks, each = [], {}
    for planned in plan.sites:
        attention, t = (
            model.get_submodule(planned.path),
            records(model)["default"].adapters[planned.site.address].tensors(),
        )
        down, up = torch.randn(heads, width, 32), torch.randn(heads, 32 // heads, width)
        each[planned.path] = down, up
        t["down"].copy_(down.flatten(0, 1))
        t["up"].copy_(attention.o_proj.weight @ torch.block_diag(*up))
    found = model(rows).logits
    for path, (down, up) in each.items():
        attention = model.get_submodule(path)
        hooks.append(
            attention.register_forward_pre_hook(
                lambda _, args, kwargs, p=path: inputs.__setitem__(p, kwargs["hidden_states"]), with_kwargs=True
            )
        )

        def add(_: nn.Module, args: tuple[Tensor, ...], p: str = path, d: Tensor = down, u: Tensor = up) -> Any:
            h = torch.einsum("btc,hwc->bthw", inputs[p], d).relu()
            return (args[0] + 4.0 * torch.einsum("bthw,hsw->bths", h, u).flatten(2),)

        hooks.append(attention.o_proj.register_forward_pre_hook(add))
    with weft.using(model, None):
        close(model(rows).logits, found)
    for hook in hooks:
        hook.remove()
    with weft.using(model, None):
        assert (model(rows).logits - found).abs().max() > 1e-2
