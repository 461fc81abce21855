"""The section `train` of a recipe: steps, optimiser, memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from weft.recipe.section import Positive, Section
from weft.recipe.sizes import parse_bytes

__all__ = ["Train"]

FORWARD_ONLY = frozenset({"mezo", "adazeta", "spsa-gc"})
"""Optimisers that make no backward pass, so that there is no gradient to clip."""
SCHEDULE_FREE = frozenset({"schedulefree-adamw", "schedulefree-sgd"})
"""Optimisers that average weights instead of lowering the rate."""


class Train(Section):
    """How it is learnt."""

    steps: Positive | None = Field(default=None, description="optimiser steps; instead of epochs")
    epochs: float | None = Field(default=None, gt=0, description="passes over the data; null: 1, unless steps is given")
    batch_size: Positive = Field(default=8, description="rows that go through the model at once")
    accumulate: Positive = Field(default=1, description="batches per optimiser step")
    learning_rate: float = Field(default=2e-4, gt=0, description="the peak, after warm-up")
    optimizer: str | dict[str, Any] = Field(
        default="adamw",
        description="a name from docs/optimizers.md, or {name: ..., option: value}",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay: decoupled with adamw, part of the gradient with sgd"
    )
    lora_plus: float | None = Field(
        default=None, gt=0, description="LoRA+: learning rate of B as a multiple of that of A; null: the same"
    )
    allora: float | None = Field(
        default=None, gt=0, description="ALLoRA: how much faster rows of A and B learn while zero (eta); null: off"
    )
    mixout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Mixout: share of the weights of full that each batch sees as the base's own",
    )
    coto: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="CoTo: share of training over which ever more layers' adapters take part in a step; 0: all always",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="AdamW's averages; the first is the momentum of sgd"
    )
    schedule: str | dict[str, Any] = Field(
        default="cosine",
        description="how the learning rate falls: constant, linear, cosine, wsd, rewarm, infinite or schedule-free, or "
        "{name: ..., option: value}",
    )
    warmup: float = Field(
        default=0.03, ge=0, description="steps of rising learning rate; below 1: a share of all steps"
    )
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient; null: no clipping")
    clip_by: Literal["all", "component"] = Field(
        default="all",
        description="whose norm clip_norm bounds; component: that of each tensor name over all layers, for itself",
    )
    seed: int = Field(default=0, ge=0, description="the seed of every random draw")
    threads: Positive | None = Field(default=None, description="CPU threads; null: one per core")
    evaluate_every: Positive | None = Field(
        default=None, description="steps between validations; null: before and after only"
    )
    checkpoint_every: Positive | None = Field(
        default=200, description="steps between checkpoints; null: only the last one"
    )
    keep_checkpoints: Positive = Field(default=2, description="how many checkpoints stay on disk")
    loss_chunk: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="trained tokens whose logits are held at once; 0: those of all; null: as many as take 32 MiB",
    )
    activations: Literal["keep", "attention", "recompute"] = Field(
        default="keep",
        description="what the backward computes again instead of keeping it; attention: scores and their softmax; "
        "recompute: whole layers, about a third slower",
    )
    activation_budget: str | None = Field(
        default=None, description="memory for activations, such as 2GB: each layer is then kept or recomputed to fit it"
    )
    offload_activations: bool = Field(
        default=False, description="keep activations in the host's memory; needs an accelerator"
    )
    optimizer_in_backward: bool = Field(
        default=False, description="step each tensor and free its gradient as soon as that is known"
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="number format of the trained tensors; null: that of the base, at least float32"
    )
    adapter_bits: Annotated[int, Field(ge=1, le=8)] | None = Field(
        default=None,
        description="bits of an entry of the trained matrices, in every forward and in the saved adapter; null: all",
    )
    master_weights: bool = Field(default=False, description="step float32 copies of trained tensors of lower precision")
    merge_every: Positive | None = Field(
        default=None,
        description="steps to the first merge of a lora with freeze_a into the quantised base, and its restart (LoQT)",
    )
    merge_growth: float = Field(default=1.2, ge=1, description="by what the gap between merges grows each time")
    correct_steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="steps before training that make a base that Weft quantises answer as it did before (INT2.1)",
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    log_every: Positive = Field(default=10, description="steps between lines of the log")
    precision: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="autocast: the number format of the arithmetic; null: that of the weights"
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="with several processes (torchrun, accelerate launch): none: each holds the whole base; fsdp: each "
        "holds a share of every layer",
    )
    bucket_by_length: bool = Field(
        default=False, description="put rows of similar length in one batch: less padding; then nothing is packed"
    )
    packing: bool | None = Field(
        default=None,
        description="rows of a step one after another in one sequence, each seeing only itself, unpadded; null: where "
        "the model can, unless bucket_by_length is true; true: an error where it cannot; false: padded rows",
    )

    @model_validator(mode="after")
    def _one_way_to_pad_less(self) -> Train:
        if self.packing and self.bucket_by_length:
            raise ValueError(
                "packing leaves no padding that bucket_by_length could save, and bucket_by_length makes steps of rows "
                "that are alike; set bucket_by_length to false"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _follow_the_optimizer(cls, values: Any) -> Any:
        """Defaults of other keys that an optimiser changes; what is given stays as it is, and is checked later."""
        named = values.get("optimizer") if isinstance(values, dict) else None
        name = named.get("name") if isinstance(named, dict) else named
        if name in FORWARD_ONLY:
            return {"clip_norm": None, **values}
        if name in SCHEDULE_FREE:
            return {"schedule": "schedule-free", **values}
        return values

    @field_validator("optimizer", "schedule")
    @classmethod
    def _named(cls, chosen: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(chosen, dict) and not isinstance(chosen.get("name"), str):
            raise ValueError("options stand beside a name, as in {name: wsd, decay: 0.1}")
        return chosen

    @model_validator(mode="after")
    def _clips_what_it_bounds(self) -> Train:
        if self.clip_by == "component" and self.clip_norm is None:
            raise ValueError("clip_by says whose norm clip_norm bounds, and clip_norm is null: give a norm")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; give one, or set the other to null")
        return self

    @model_validator(mode="after")
    def _levers_fit(self) -> Train:
        if self.activation_budget is not None:
            parse_bytes(self.activation_budget)
            if self.activations != "keep":
                raise ValueError(
                    "activation_budget chooses what is recomputed; leave activations out, or set one of them to null"
                )
        if self.optimizer_in_backward:
            _check_in_backward(self)
        _check_bits(self)
        low = self.adapter_dtype in ("bfloat16", "float16")
        if self.master_weights and not low:
            raise ValueError("master_weights: the trained tensors are float32 already; set adapter_dtype to bfloat16")
        if self.adapter_dtype == "float16" and not self.master_weights:
            raise ValueError("adapter_dtype float16 loses small steps; set master_weights to true, or use bfloat16")
        return self


def _check_bits(train: Train) -> None:
    name = train.optimizer if isinstance(train.optimizer, str) else train.optimizer["name"]
    wrong = {
        "optimizer_in_backward steps them where they are": train.optimizer_in_backward,
        "merge_every writes into them between steps": train.merge_every is not None,
        f"{name} averages what is trained": name in SCHEDULE_FREE,
        f"{name} moves the trained tensors themselves": name in FORWARD_ONLY,
    }
    for why, is_wrong in wrong.items():
        if train.adapter_bits is not None and is_wrong:
            raise ValueError(f"adapter_bits keeps tensors of full precision beside those in use, and {why}")


def _check_in_backward(train: Train) -> None:
    if train.clip_norm is not None:
        raise ValueError(
            "optimizer_in_backward frees each gradient before the others are known, and clip_norm needs all of them: "
            "set clip_norm to null"
        )
    if train.accumulate > 1:
        raise ValueError(
            "optimizer_in_backward steps after every batch, and accumulate adds several up first: set accumulate to 1"
        )
    if train.precision == "float16":
        raise ValueError(
            "optimizer_in_backward steps before it is known whether a float16 gradient overflowed: use bfloat16"
        )
