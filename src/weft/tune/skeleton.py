"""A session without numbers: the model of a recipe on fake tensors, adapted, and its training step traced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from weft.attach import attach_plan, use
from weft.base import find_base
from weft.core.method import Frozen
from weft.data import Batch, Splits
from weft.fresh import fresh
from weft.optim import state_tensors
from weft.patterns import layer_of
from weft.plan.depth import Depth, shorten
from weft.plan.quantised import quantise_fake
from weft.plan.trace import Trace
from weft.recipe import Recipe
from weft.targets import Plan, PlannedSite, structure, walk
from weft.tune.learn import leave, make_learner
from weft.tune.packing import choose_packing, packed_attention
from weft.tune.session import Session, resolve_plan
from weft.tune.step import Learner, train_step
from weft.tune.tasks import TASKS
from weft.tune.turns import STAND_IN, Turn, turns

__all__ = ["Skeleton", "skeleton"]

_NAME = "adapter"
_STRETCH = 16 * 4096  # what Linux maps around a page that is read


@dataclass
class Skeleton:
    """The model of a recipe without numbers, what will be adapted in it, and which layers are run for all."""

    recipe: Recipe
    model: Any
    plan: Plan
    depth: Depth
    layers: dict[int, nn.Module]
    fake: FakeTensorMode
    session: Session
    stored: torch.dtype | None
    """The number format of the checkpoint."""
    turn: Turn | None = None
    """The layers that train, where an optimiser lets layers take turns."""

    def trace(self, batch: Batch, *, held: bool) -> Trace:
        """One training step on a batch, recorded. held: with gradients of batches before it in the same step."""
        found = Trace()
        with found.recording(self.fake), _short(self.layers, self.depth), _pointers_of_nothing():
            found.on = False
            learner = self._learner()
            _make_states(learner)
            found.on = True
            self._give(found, learner, held=held)
            handles = found.watch_layers({i: self.layers[i] for i in self.depth.kept}, learner.optimizer)
            handles += [p.register_post_accumulate_grad_hook(found.gradient) for p in _training(learner).values()]
            try:
                with packed_attention(self.model, self.session.packed_from):
                    train_step(learner, [batch], self.recipe.train, rate=1e-6, step=1)
            finally:
                for handle in handles:
                    handle.remove()
                learner.optimizer.zero_grad(set_to_none=True)
                leave(learner)
        return found

    @property
    def num_frozen(self) -> int:
        """Numbers of the base, a tied one once; packed bytes count as what they are."""
        return sum(t.numel() for name, t in self.model.named_parameters() if ".adapters." not in f".{name}")

    @property
    def num_body(self) -> int:
        """Numbers of the base without its embeddings and its head."""
        tables = [getattr(self.model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
        sizes = {id(t.weight): t.weight.numel() for t in tables if t is not None}
        return self.num_frozen - sum(sizes.values())

    def untouched_bytes(self) -> int:
        """Of a table of embeddings that is read from its file as it is, the rows that no token of the data names.

        A CPU maps such a file, so that a row takes memory when it is read, in stretches of 16 pages.
        """
        get = getattr(self.model, "get_input_embeddings", None)
        table = get().weight if get is not None else None
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        tied = head is not None and head.weight is table
        if (
            table is None or tied or self.stored != table.dtype or self.recipe.base.quantize is not None
        ):  # copied, not mapped
            return 0
        row = table.shape[1] * table.element_size()
        seen = {token for example in self.session.splits.train.examples for token in example.input_ids}
        return max(table.shape[0] * row - len({token * row // _STRETCH for token in seen}) * _STRETCH, 0)

    def _learner(self) -> Learner:
        changed: dict[str, Any] = {"compile": False, "activation_budget": None, "coto": 0.0, "adapter_bits": None}
        if self.turn is not None:
            changed["optimizer"] = STAND_IN
        settings = self.recipe.train.model_copy(update=changed)
        self.model.train()
        learner = make_learner(replace(self.session, recipe=self.recipe.model_copy(update={"train": settings})))
        learner.evolution = None  # it goes by numbers, and there are none
        if self.turn is not None:
            for name, parameter in learner.parameters.items():
                parameter.requires_grad_(layer_of(name) in self.turn)
        return learner

    def _give(self, trace: Trace, learner: Learner, *, held: bool) -> None:
        """All that is there before the step."""
        trained = {id(p) for p in learner.parameters.values()}
        for name, tensor in _tensors(self.model):
            own = ".adapters." in f".{name}" or id(tensor) in trained
            trace.give(tensor, "adapters" if own else "weights", layer_of(name) if own else None)
        for name, parameter in _training(learner).items():
            if held:
                parameter.grad = torch.zeros_like(parameter)
                trace.give(parameter.grad, "gradients", layer_of(name))
            for value in state_tensors(learner.optimizer.state.get(parameter, {})):
                trace.give(value, "optimizer", layer_of(name))


def skeleton(recipe: Recipe, tokenizer: Any, splits: Splits, *, middling: bool = False) -> Skeleton:
    """The model that a recipe names, from its configuration alone, with the adapter that it asks for.

    middling: where layers take turns, a turn that takes middling time instead of the one that takes the most memory.
    Raises TargetError for whatever the method or the targets cannot be.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with Trace().recording(fake), _no_init(), _pointers_of_nothing():
        model, stored = _model(recipe)
        if recipe.base.quantize is not None:
            quantise_fake(model, recipe.base.quantize, group_size=recipe.base.group_size, bits=recipe.base.bits)
        task = TASKS[recipe.task]
        model = task.prepare(model, splits)
        _no_cache(model)
        with _disable_current_modes() if recipe.start is not None else nullcontext():  # a folder holds real numbers
            plan = resolve_plan(model, recipe, name=_NAME, any_base=True)
        layers = _layers(model)
        session = Session(recipe, _NAME, Path(), model, tokenizer, splits, None, task, plan)
        with _disable_current_modes():  # what is drawn at random are real numbers
            turn = turns(recipe.train, plan, num_steps=session.num_steps, middling=middling)
        depth = shorten(_signatures(model, plan, len(layers), turn))
        sites = tuple(s for s in plan.sites if _is_run(s.site.layer, layers, depth))
        attach_plan(model, replace(plan, sites=sites), tensors=_fresh(model, sites, known=recipe.start is not None))
        use(model, _NAME)
        with _short(layers, Depth(depth.kept[:1], {})):  # layers are alike in what they do with packed rows
            session.packed_from, session.rows = choose_packing(
                model, splits.train.examples, recipe.train, task=recipe.task
            )
    return Skeleton(recipe, model, plan, depth, layers, fake, session, stored, turn)


@torch.no_grad()
def _fresh(
    model: nn.Module, sites: tuple[PlannedSite, ...], *, known: bool
) -> dict[str, Mapping[str, Tensor | Frozen]]:
    """What every site holds at the start; where that goes by data, by what quantising lost, or by a folder (known),
    tensors of its shapes."""
    modules, found = dict(walk(model)), dict[str, Mapping[str, Tensor | Frozen]]()
    for planned in sites:
        site, method = planned.site, planned.method
        if known or method.needs():
            found[site.address] = {k: _like(v, site.device) for k, v in structure(method, site).items()}
        else:
            found[site.address] = fresh(planned, modules[planned.path])
    return found


def _like(value: Tensor | Frozen, device: torch.device | str) -> Tensor | Frozen:
    if isinstance(value, Frozen):
        return Frozen(torch.empty_like(value.tensor, device=device))
    return torch.empty_like(value, device=device)


def _model(recipe: Recipe) -> tuple[Any, torch.dtype | None]:
    """The model of a configuration, and the number format in which its checkpoint is stored."""
    import transformers

    place, base = find_base(recipe.base.model), recipe.base
    config = transformers.AutoConfig.from_pretrained(place, revision=base.revision or "main")
    named = [getattr(transformers, a, None) for a in config.architectures or ()]
    cls: Any = next((c for c in named if c is not None), transformers.AutoModel)
    stored = config.dtype
    auto = stored if stored is not None and torch.cuda.is_available() else torch.float32
    dtype = auto if base.dtype == "auto" else getattr(torch, base.dtype)
    build = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    model = build(config, dtype=dtype).eval()
    model.tie_weights()  # which building leaves to loading
    return model, stored


@contextmanager
def _pointers_of_nothing() -> Iterator[None]:
    """Readings ask where tensors lie to know them again; those without numbers lie nowhere, and torch warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def _no_init() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def _no_cache(model: Any) -> None:
    if getattr(getattr(model, "config", None), "use_cache", None):
        model.config.use_cache = False


def _layers(model: nn.Module) -> dict[int, nn.Module]:
    """The layers of the longest list of modules that are alike, by number."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(c) for c in m}) == 1]
    longest: Any = max(lists, key=len, default=None)
    return {} if longest is None else dict(enumerate(longest))


def _signatures(model: Any, plan: Plan, count: int, turn: Turn | None) -> list[Any]:
    """What makes layers different: what is adapted in them, whether it trains, whether gradients go through them, and
    their attention."""
    sites: dict[int | None, list[Any]] = {}
    for planned in plan.sites:
        site = planned.site
        local = re.sub(r"\.\d+(?=\.|$)", ".N", site.address, count=1)
        sites.setdefault(site.layer, []).append((local, planned.method, site.shape))
    trained = sites.keys() if turn is None else turn
    lowest = min((n for n in trained if n is not None), default=0) if None not in trained else 0
    config: Any = getattr(model, "config", None)
    types = getattr(config.get_text_config() if config is not None else None, "layer_types", None) or [None] * count
    return [
        (tuple(sites.get(i, ())), i in trained, i >= lowest, types[i] if i < len(types) else None) for i in range(count)
    ]


def _is_run(number: int | None, layers: dict[int, nn.Module], depth: Depth) -> bool:
    return number is None or number not in layers or number in depth.kept


@contextmanager
def _short(layers: dict[int, nn.Module], depth: Depth) -> Iterator[None]:
    """Inside the `with`, layers that others stand for hand on what they are given."""
    skipped = [layer for i, layer in layers.items() if i not in depth.kept]
    for layer in skipped:
        layer.__dict__["forward"] = _hand_on
    try:
        yield
    finally:
        for layer in skipped:
            layer.__dict__.pop("forward")


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _make_states(learner: Learner) -> None:
    """What the optimiser keeps from its first step on."""
    for parameter in _training(learner).values():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def _training(learner: Learner) -> dict[str, nn.Parameter]:
    """The parameters whose turn it is."""
    return {name: p for name, p in learner.parameters.items() if p.requires_grad}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
