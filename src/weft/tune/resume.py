"""Going on with a broken run: what its recipe and data must have in common with the checkpoint's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.data import Dataset, Example
from weft.tune.checkpoint import CheckpointError

__all__ = ["check_same_run", "data_digest"]

HARMLESS = (
    "output", "report", "check", "forgetting.data", "data.train", "data.validation", "data.test",
    "train.steps", "train.epochs", "train.threads", "train.sharding", "train.log_every", "train.evaluate_every",
    "train.checkpoint_every", "train.keep_checkpoints",
)  # fmt: skip
"""Keys that may differ: they do not change what is learnt; data is compared by content, and other steps are said."""


def data_digest(*datasets: Dataset | None) -> str:
    """What identifies the data: a digest of all its tokens and labels."""
    digest = hashlib.blake2b(digest_size=16)
    for example in (example for dataset in datasets for example in _examples(dataset)):
        labels = str(example.labels).encode() if isinstance(example.labels, int) else example.labels.tobytes()
        digest.update(len(example.input_ids).to_bytes(8, "little") + example.input_ids.tobytes() + labels)
    return digest.hexdigest()


def _examples(dataset: Dataset | None) -> Sequence[Example]:
    return () if dataset is None else dataset.examples


def check_same_run(now_facts: Mapping[str, Any], state: Mapping[str, Any], *, step: int, where: str) -> list[str]:
    """What to say about harmless differences. Raises CheckpointError naming what makes it another run.

    now_facts: `recipe`, `data`, `base` and `num_steps` as they are now; state: as they were at `step`.
    """
    old, now = _flat(state["recipe"]), _flat(now_facts["recipe"])
    keys = [k for k in dict.fromkeys([*old, *now]) if old.get(k) != now.get(k) and not _harmless(k)]
    if keys:
        told = "; ".join(f"{k} was {old.get(k)!r} and is {now.get(k)!r}" for k in keys)
        raise CheckpointError(
            f"{where} was written by another recipe: {told}. Put these back to go on, or start anew in another output"
        )
    for key, name in (("data", "data"), ("base", "weights of the base")):
        if state[key] != now_facts[key]:
            raise CheckpointError(f"{where} was written with other {name}: put them back, or choose another output")
    num_steps = now_facts["num_steps"]
    if num_steps < step:
        raise CheckpointError(
            f"{where} is at step {step}, and the recipe now has {num_steps} steps: give train.steps of {step} or more"
        )
    if num_steps != state["num_steps"]:
        before = state["num_steps"]
        return [f"the run had {before} steps and now has {num_steps}; the learning rate follows the new length"]
    return []


def _harmless(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in HARMLESS)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
