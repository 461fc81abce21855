"""What a task needs beside its loss: a head, rows to show, and what it is measured against. One class a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import nn

from weft.data import Example, Splits
from weft.tune.classify import linear_probe, named_labels
from weft.tune.shown import Shown, continuations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "Task"]


class Task(Protocol):
    """How a base becomes a model for a task, and how that model is looked at."""

    @property
    def save_modules(self) -> tuple[str, ...]:
        """Modules that are trained in full, because they are new."""

    def prepare(self, model: nn.Module, splits: Splits) -> nn.Module:
        """The model with what the task needs."""

    def show(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], splits: Splits
    ) -> list[Shown]:
        """What the model says to these rows."""

    def rival(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> dict[str, float]:
        """Accuracy by split of a simpler way on the frozen base; {} where there is none."""


class CausalLM:
    """Go on with a text."""

    save_modules: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, splits: Splits) -> nn.Module:  # noqa: ARG002
        """A language model is ready as it is."""
        return model

    def show(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        splits: Splits,  # noqa: ARG002
    ) -> list[Shown]:
        """Greedy continuations."""
        return continuations(model, tokenizer, examples)

    def rival(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> dict[str, float]:  # noqa: ARG002
        """The base itself is the rival, and is measured anyway."""
        return {}


class Classification:
    """Name the label of a text."""

    save_modules: tuple[str, ...] = ("head",)

    def prepare(self, model: nn.Module, splits: Splits) -> nn.Module:
        """A pooled classifier with one class per label of the training data."""
        from weft.classifier import PooledClassifier, make_classifier

        return model if isinstance(model, PooledClassifier) else make_classifier(model, len(splits.label_names))

    def show(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], splits: Splits
    ) -> list[Shown]:
        """The most likely label."""
        return named_labels(model, tokenizer, examples, splits.label_names)

    def rival(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> dict[str, float]:
        """A linear probe on the frozen encoder."""
        named = {"validation": splits.validation, "test": splits.test}
        held_out = {name: split.examples for name, split in named.items() if split is not None}
        return linear_probe(model, tokenizer, splits.train.examples, held_out) if held_out else {}  # type: ignore[arg-type]


class Preference:
    """Prefer one answer to another."""

    save_modules: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, splits: Splits) -> nn.Module:  # noqa: ARG002
        """A language model is ready as it is: without its adapter it is its own reference."""
        return model

    def show(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        splits: Splits,  # noqa: ARG002
    ) -> list[Shown]:
        """Greedy answers; what is expected is the chosen one."""
        return continuations(model, tokenizer, [example.answers()[0] for example in examples])

    def rival(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> dict[str, float]:  # noqa: ARG002
        """The base is the reference, and is measured anyway."""
        return {}


TASKS: dict[str, Task] = {
    "causal-lm": CausalLM(),
    "classification": Classification(),
    "preference": Preference(),
}
