"""Fused experts as transformers 5 stores them: one [E, O, I] parameter per projection, tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core.adapter import Adapter, run
from weft.core.affine import Affine, WeightOp
from weft.core.op import DataOp, Op, _cast
from weft.core.route import Route, Rows, Stack, Weighted, apply, merged, names
from weft.core.site import Site
from weft.kinds.seat import Seat, WovenWeight, prove, read_once, split_rows


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused expert weights: 3-d parameters with as many entries as it says it has experts."""
    return bool(ExpertsSeat.params(module))


def is_transposed(module: nn.Module) -> bool:
    """Whether the projections are stored as [E, I, O]."""
    said = module.__dict__.get("is_transposed")
    if said is not None:
        return bool(said)
    shapes = [p.shape for n in ExpertsSeat.params(module) if (p := module._parameters[n]) is not None]
    first, last = shapes[0], shapes[-1]  # the hidden size goes in first and comes out last
    return len(shapes) > 1 and first[2] != last[1] and first[1] == last[2]


class ExpertsSeat(Seat):
    """One projection of all experts, [E, O, I]."""

    kind = "experts"

    @classmethod
    def params(cls, module: nn.Module) -> list[str]:
        counts = {
            v for k, v in vars(module).items() if "expert" in k and isinstance(v, int) and not isinstance(v, bool)
        }
        return [n for n, p in module._parameters.items() if p is not None and p.ndim == 3 and p.shape[0] in counts]

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        experts, out_features, in_features = module._parameters[param].shape  # type: ignore[union-attr]
        if is_transposed(module):
            out_features, in_features = in_features, out_features
        return {"out_features": out_features, "in_features": in_features, "experts": experts}

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.mT if is_transposed(self.module) else weight

    def value(self, route: Route) -> Affine:
        """The merge reading of every expert: weight [E, O, I], bias [E, O]."""
        weight, bias = self.weight(), self.bias()
        here = {n: self.adapters[n] for n in sorted(names(route) & self.adapters.keys())}
        if not here:
            return Affine(weight, bias)
        own: dict[str, Any] = {n: {**a._parameters, **a._buffers} for n, a in here.items()}

        def one(w: Tensor, b: Tensor | None, tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, ...]:
            mine = {n: OneExpert(here[n], t) for n, t in tensors.items()}
            v = merged(route, WeightOp(self.site, w, b), mine)  # type: ignore[arg-type]
            return (v.dense(w),) if v.bias is None else (v.dense(w), v.bias)

        found = torch.vmap(one, in_dims=(0, None if bias is None else 0, 0))(weight, bias, own)
        return Affine(found[0], found[1] if len(found) > 1 else None)


class OneExpert:
    """An adapter with the tensors of one expert: what `Adapter` is to a site that holds a single map."""

    def __init__(self, adapter: Adapter, own: Mapping[str, Tensor]):
        shared: Any = adapter.__dict__["shared"]
        self.method, self.tensors = adapter.method, {**({} if shared is None else shared.tensors()), **own}

    def run(self, x: Affine, op: Op, *, keep: bool = False) -> Affine:
        # methods see an expert's weight alone when they start, so they compute their coefficients from it alone
        return run(self.method, self.method.coefficients(self.tensors, WeightOp(op.site, op.weight())), x, op)


class Grouped(DataOp):
    """Verbs on tokens sorted by expert [S, C], with coefficients [E, ...]: each segment meets its own expert's."""

    def __init__(self, site: Site, source: Seat, ids: Tensor, sizes: list[int]):
        super().__init__(site, source)
        self.ids, self.sizes = ids, sizes

    def __call__(self, x: Tensor) -> Tensor:
        y = self._matmul(x, self.weight())
        bias = self.bias()
        return y if bias is None else self.shift(y, bias)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return self._matmul(x, _cast(a, x))

    def expand(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        y = self._matmul(h, _cast(b, h))
        return y if onto is None else onto + y

    def scale(self, y: Tensor, g: Tensor) -> Tensor:
        return y * _cast(g, y)[self.ids]

    def shift(self, y: Tensor, b: Tensor) -> Tensor:
        return y + _cast(b, y)[self.ids]

    def rotate(self, x: Tensor, q: Tensor) -> Tensor:
        q = _cast(q, x)  # [E, N, block out, block in]
        parts = x.unflatten(-1, (q.shape[1], q.shape[3])).movedim(1, 0)  # [N, S, block in]
        each = [p @ q[e].mT for e, p in enumerate(parts.split(self.sizes, dim=1)) if p.shape[1]]
        return torch.cat(each, dim=1).movedim(0, 1).flatten(-2)

    def permute(self, x: Tensor, order: Tensor) -> Tensor:
        return x.gather(-1, order[self.ids])

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.gather(-1, indices[self.ids])

    def place(self, h: Tensor, indices: Tensor, size: int, onto: Tensor | None = None) -> Tensor:
        base = h.new_zeros(*h.shape[:-1], size) if onto is None else onto
        return base.scatter_add(-1, indices[self.ids], h.to(base.dtype))

    def _matmul(self, x: Tensor, a: Tensor) -> Tensor:
        return grouped_linear(x, a, self.sizes)


def grouped_linear(x: Tensor, a: Tensor, sizes: list[int]) -> Tensor:
    """x [S, I] sorted by expert, a [E, O, I]: rows of expert e meet a[e], giving [S, O]."""
    # one kernel where there is one: it wants bfloat16 and rows of whole 16 bytes (torch 2.13)
    if x.is_cuda and x.dtype == a.dtype == torch.bfloat16 and a.shape[1] % 8 == 0 and a.shape[2] % 8 == 0:
        ends = torch.tensor(sizes, device=x.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(x, a.mT, offs=ends)
    return torch.cat([F.linear(part, a[e]) for e, part in enumerate(x.split(sizes)) if len(part)])


class WovenExperts(WovenWeight):
    """Fused experts: adapters run on each expert's tokens where the layout is known, else in the weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seats = [*self.seats.values()]
        weave = seats[0].weave
        own = seats[0].inner_forward or self.base_class.forward.__get__(self)
        if not names(weave.route) & {n for s in seats for n in s.adapters}:
            return own(*args, **kwargs)
        forward: Callable[..., Any] = partial(read_once, self, own)
        if _is_standard(self, weave.route) and seats[0].inner_forward is None:
            forward = partial(sorted_forward, self)
        if isinstance(weave.route, Rows):
            if len(args) + len(kwargs) < 2:
                raise ValueError(
                    f"{seats[0].site.address}: {self.base_class.__name__} is given tokens that are sorted by expert "
                    "already, so rows of one batch cannot use different adapters there; call the model once per adapter"
                )
            return split_rows(self, forward, weave.route, args, kwargs)
        return forward(*args, **kwargs)


def _is_standard(module: Any, route: Route) -> bool:
    """Whether `sorted_forward` computes what this module does, and can under this route and tracer."""
    marks = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    return (
        all(hasattr(module, m) for m in marks)
        and not getattr(module, "_is_expert_parallel", False)
        and not torch.compiler.is_compiling()  # how many tokens an expert gets would break the graph
        and not _nests(route)  # a nested map's weight is computed expert by expert, in the merge reading
    )


def _nests(route: Route) -> bool:
    match route:
        case Stack():
            return True
        case Weighted(weights=weights):
            return any(_nests(r) for r, _ in weights)
        case Rows(routes=routes):
            return any(_nests(r) for r in routes)
    return False


def sorted_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' experts compute (`transformers.integrations.moe`), with adapters at either projection."""
    num_tokens, top_k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)  # [S], S = tokens x top_k
    sizes = ids.bincount(minlength=module.num_experts).tolist()
    x = hidden_states[order // top_k]  # [S, I]
    y = _projection(module, "gate_up_proj" if module.has_gate else "up_proj", x, ids, sizes)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _projection(module, "down_proj", y, ids, sizes)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    y = torch.empty_like(y).index_copy(0, order, y)
    return y.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _projection(module: Any, param: str, x: Tensor, ids: Tensor, sizes: list[int]) -> Tensor:
    seat = module.seats.get(param)
    if seat is not None:
        prove(seat)
        return apply(seat.weave.route, x, Grouped(seat.site, seat, ids, sizes), seat.adapters)
    weight, bias = module._parameters[param], module._parameters.get(f"{param}_bias")
    y = grouped_linear(x, weight.mT if module.is_transposed else weight, sizes)
    return y if bias is None else y + bias[ids]
