"""What a run works on: the recipe with everything it names loaded, and the plan of what will be adapted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft.attach import attach_plan, use
from weft.core import Method
from weft.data import Batch, Dataset, Splits, batches, collate, load_data
from weft.errors import WeftError
from weft.interop.folder import Opened, open_folder
from weft.quantise import Originals
from weft.recipe import Recipe, load_recipe, resolve_method
from weft.registry import methods
from weft.reopen import adapter_folder
from weft.targets import Plan, resolve
from weft.tune.evaluate import context_length, device_of, load_forgetting, pad_token
from weft.tune.loop import num_steps
from weft.tune.offload import check_offload
from weft.tune.optimizers import check_optimizer
from weft.tune.packing import choose_packing
from weft.tune.random_state import seed_everything
from weft.tune.repair import check_repair, load_quantised, start_statistics
from weft.tune.schedules import resolve_schedule
from weft.tune.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Session", "attach_adapter", "prepare", "resolve_plan", "short_plan", "threads"]

_CALIBRATION_BATCHES = 32

Say = Callable[[str], None]


@dataclass
class Session:
    """A recipe and what it names. `name` is the adapter's, after the folder of the run."""

    recipe: Recipe
    name: str
    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    base_like: Dataset | None
    task: Task
    plan: Plan
    originals: Originals = field(default_factory=Originals)
    """The base's layers before it was quantised, while a start or a correction needs them."""
    packed_from: int | None = None
    """The first position of packed rows; None: rows are padded."""
    rows: str = ""
    """What was chosen about packing, and why: one line, known once the adapter is attached."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return num_steps(self.recipe.train, len(self.splits.train))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @property
    def held_out(self) -> Dataset:
        """Rows to show and to compare: not trained on, where there are such."""
        return self.splits.validation or self.splits.test or self.splits.train

    def calibration(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of the training data in the order of the run, for starts that read statistics of data."""
        settings, examples = self.recipe.train, self.splits.train.examples
        stream = batches(len(examples), batch_size=settings.batch_size, seed=settings.seed)
        for rows, _ in islice(stream, _CALIBRATION_BATCHES):
            yield model_inputs(self.batch([examples[row] for row in rows]), labels=True)

    def batch(self, examples: Any) -> Batch:
        """Examples as one batch on the model's device."""
        return collate(examples, pad_token=pad_token(self.tokenizer)).to(self.device)


def prepare(recipe: Recipe | str | Path, say: Say, *, beside: Session | None = None, planned: bool = True) -> Session:
    """Load everything that a recipe names and resolve what will be adapted; nothing is written and nothing attached.

    beside: a session whose base, the same as this recipe's, is used instead of loading another.
    planned: False leaves the plan empty, for a base and data that others will be prepared on.
    Raises RecipeError, DataError or TargetError for whatever cannot be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    method = resolve_method(recipe.method, methods())
    check_optimizer(recipe.train)
    if planned and recipe.start is None:
        check_levers(recipe, method)
    resolve_schedule(recipe.train.schedule)
    folder = Path(recipe.output or "runs/adapter")
    seed_everything(recipe.train.seed)
    check_repair(recipe, method)
    if beside is None:
        model, tokenizer, originals = load_quantised(recipe, method)
    else:
        model, tokenizer, originals = beside.model, beside.tokenizer, beside.originals
    splits = load_data(recipe.data, tokenizer, task=recipe.task, context=context_length(model))
    for report in splits.reports:
        say(report.as_text())
    base_like = load_forgetting(recipe, model, tokenizer)
    task = TASKS[recipe.task]
    model = task.prepare(model, splits)
    originals.follow(model)
    name = _adapter_name(folder)
    plan = resolve_plan(model, recipe, name=name) if planned else Plan(name, method, ())
    if planned and recipe.start is not None:
        check_levers(recipe, plan.method)
    return Session(recipe, name, folder, model, tokenizer, splits, base_like, task, plan, originals)


def check_levers(recipe: Recipe, method: Method) -> None:
    """Raise WeftError for levers that this method or machine cannot have, before anything is loaded."""
    train = recipe.train
    if train.allora is not None and not method.pairs:
        raise WeftError(
            f"train.allora: {method.name} trains no low-rank pair A, B; set it to null, or use lora or dora"
        )
    if train.mixout and not (method.copies or recipe.save_modules or TASKS[recipe.task].save_modules):
        raise WeftError(
            f"train.mixout: it mixes trained weights with the base's own, and {method.name} trains none in their "
            "place; set it to 0, or use the method full or save_modules"
        )
    if train.offload_activations and not torch.cuda.is_available():
        check_offload(torch.device("cpu"))


def resolve_plan(model: nn.Module, recipe: Recipe, *, name: str, any_base: bool = False) -> Plan:
    """What a recipe adapts in a model that was prepared for its task.

    any_base: take an adapter to go on from as it is, without a look at the weights that it was made on.
    """
    if recipe.start is not None:
        return _opened(model, recipe, name, any_base=any_base).plan
    return resolve(
        model,
        resolve_method(recipe.method, methods()),
        recipe.targets,
        name=name,
        layers=recipe.layers,
        save_modules=tuple(dict.fromkeys([*TASKS[recipe.task].save_modules, *recipe.save_modules])),
        tied=recipe.tied,
        dtype=_dtype(recipe),
        seed=recipe.train.seed,
    )


def attach_adapter(session: Session) -> None:
    """Carry out the plan, and use the adapter."""
    model, plan, recipe = session.model, session.plan, session.recipe
    if recipe.start is not None:
        opened = _opened(model, recipe, session.name)
        attach_plan(model, plan, tensors=opened.tensors, shared=opened.shared)
    else:
        found = start_statistics(model, plan, session.originals, session.calibration())
        session.plan = attach_plan(model, plan, statistics=found).plan
    use(model, session.name)
    session.packed_from, session.rows = choose_packing(
        model, session.splits.train.examples, session.recipe.train, task=session.recipe.task
    )


def _opened(model: nn.Module, recipe: Recipe, name: str, *, any_base: bool = False) -> Opened:
    """The adapter that a run goes on from."""
    assert recipe.start is not None, "asked for a recipe that has a start"
    return open_folder(model, adapter_folder(recipe.start), name, any_base=any_base, dtype=_dtype(recipe))


def _dtype(recipe: Recipe) -> torch.dtype | None:
    """The number format of the adapter, where the recipe says it."""
    wanted = recipe.train.adapter_dtype
    return None if wanted is None else getattr(torch, wanted)


def model_inputs(batch: Batch, *, labels: bool = False) -> dict[str, torch.Tensor]:
    """A batch as the arguments of a transformers model."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs | ({"labels": batch.labels} if labels else {})


def short_plan(plan: Plan) -> str:
    """What will be trained, in a few lines: each name once, with its layers."""
    layers: dict[tuple[str, str], list[int]] = {}
    for planned in plan.sites:
        site = planned.site
        where = site.address.rsplit(".", 1)[-1] if site.layer is not None else site.address
        numbers = layers.setdefault((where, planned.method.name), [])
        if site.layer is not None:
            numbers.append(site.layer)
    groups: dict[tuple[str, str], list[str]] = {}
    for (where, method), numbers in layers.items():
        found = f" in layers {ranges(numbers)}" if numbers else ""
        groups.setdefault((found, method), []).append(where)
    lines = [f"  {method}: {', '.join(names)}{found}" for (found, method), names in groups.items()]
    return "\n".join([str(plan).splitlines()[-1], *lines])


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: 0-3, 7."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """A number of CPU threads inside the `with`; None leaves it as it is."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _adapter_name(folder: Path) -> str:
    """A name that adapters may have, made of the folder's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-") or "adapter"
