"""The recipe: every key of a run with its type, default, limits and description; documents are made from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from weft.recipe.sizes import parse_bytes

__all__ = ["Base", "Check", "Data", "Forgetting", "Preference", "Recipe", "Report", "Section", "Train"]

Positive = Annotated[int, Field(ge=1)]
Paths = str | tuple[str, ...]
FORWARD_ONLY = frozenset({"mezo", "adazeta"})
"""Optimisers that make no backward pass, so that there is no gradient to clip."""
SCHEDULE_FREE = frozenset({"schedulefree-adamw", "schedulefree-sgd"})
"""Optimisers that average weights instead of lowering the rate."""


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Base(Section):
    """The pretrained model that stays fixed; `base: pico` is short for `base: {model: pico}`."""

    model: str = Field(default="pico", description="pico (bundled), a folder, or a model id on the hub", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="number format in which the weights are held; auto is that of the checkpoint"
    )
    quantize: (
        Literal[
            "nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "packed-int8", "packed-int4", "packed-int3",
            "packed-int2", "packed-mixed",
        ]
        | None
    ) = Field(
        default=None,
        description="hold the frozen weights compressed; all but the ones named packed need the extra weft[quant]",
    )  # fmt: skip
    group_size: Literal[32, 64, 128] | None = Field(
        default=None, description="weights that share a scale, with torchao-int4 and packed-int2 to -int8; null: 64"
    )
    bits: float | None = Field(
        default=None, gt=0, le=9,
        description="packed-mixed: bits per weight on average, scales included, spent where they help most (LQ-LoRA)",
    )  # fmt: skip
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")

    @model_validator(mode="after")
    def _fits_scheme(self) -> Base:
        grouped = self.quantize is not None and self.quantize.startswith(("torchao-int4", "packed-int"))
        if self.group_size is not None and not grouped:
            raise ValueError(
                f"group_size={self.group_size} is for quantize: torchao-int4 or packed-int2 to packed-int8, and "
                f"quantize is {self.quantize or 'null'}"
            )
        if (self.bits is not None) != (self.quantize == "packed-mixed"):
            raise ValueError(
                "packed-mixed needs a budget, as in bits: 3.25"
                if self.bits is None
                else f"bits={self.bits} is the budget of quantize: packed-mixed, and quantize is "
                f"{self.quantize or 'null'}"
            )
        return self


class Data(Section):
    """What is learnt from; `data: train.jsonl` is short for `data: {train: train.jsonl}`."""

    train: Paths = Field(
        description="training rows: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder, a glob, a datasets "
        "folder, or a list of these; relative to the recipe's folder"
    )
    validation: Paths | None = Field(default=None, description="rows for the loss during and after training")
    test: Paths | None = Field(default=None, description="rows that are measured once, at the end")
    format: (
        Literal["prompt-completion", "messages", "alpaca", "sharegpt", "text", "text-label", "preference"] | None
    ) = Field(default=None, description="how a row is built; null: found from its columns")
    columns: dict[str, str] | None = Field(
        default=None,
        description="where the columns have other names, for example {prompt: question, completion: answer}",
    )
    template: Literal["chat", "plain"] | None = Field(
        default=None,
        description="the tokenizer's chat template or plain text; null: chat for conversations, plain for the rest",
    )
    train_on: Literal["completion", "all"] = Field(
        default="completion", description="completion: only what the model should say carries loss; all: the prompt too"
    )
    max_length: int | None = Field(
        default=None, ge=2, description="longest example in tokens; null: what the base reads, at most 2048"
    )
    too_long: Literal["drop", "truncate", "split", "error"] | None = Field(
        default=None,
        description="what happens to a longer one; split is for text rows; null: split for text, drop for the rest",
    )
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, description="the run stops when a larger share of the rows is bad"
    )
    system: str | None = Field(default=None, description="system message for conversations that have none")
    limit: Positive | None = Field(default=None, description="use only the first rows of each split")


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
        low = self.adapter_dtype in ("bfloat16", "float16")
        if self.master_weights and not low:
            raise ValueError("master_weights: the trained tensors are float32 already; set adapter_dtype to bfloat16")
        if self.adapter_dtype == "float16" and not self.master_weights:
            raise ValueError("adapter_dtype float16 loses small steps; set master_weights to true, or use bfloat16")
        return self


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


class Preference(Section):
    """How the chosen of two answers is made likelier; for `task: preference`."""

    loss: Literal["sigmoid", "ipo", "simpo", "orpo"] = Field(
        default="sigmoid",
        description="sigmoid: DPO; ipo: its squared form; simpo, orpo: per token, without the base as reference",
    )
    beta: float | None = Field(
        default=None, gt=0, description="weight of the margin; null: 2 for simpo, 0.1 for the others"
    )
    gamma: float | None = Field(default=None, ge=0, description="margin that simpo asks for; null: 1")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of pairs that are taken to be the wrong way round; with sigmoid"
    )

    @model_validator(mode="after")
    def _known_by_the_loss(self) -> Preference:
        if self.gamma is not None and self.loss != "simpo":
            raise ValueError(f"gamma is a key of loss: simpo, and {self.loss} has no such margin; leave it out")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is a key of loss: sigmoid, and {self.loss} has none; leave it out")
        return self


class Forgetting(Section):
    """Text like that of the base's own training: its loss before and after shows what was forgotten."""

    data: Paths | None = Field(
        default=None, description="plain text that the base knows; null: what is bundled with it, if any"
    )
    limit: Positive = Field(default=64, description="windows of text that are measured")


class Check(Section):
    """The parity gate: the same inputs through every form of the adapter."""

    ways: tuple[Literal["saved", "merged", "unmerged", "peft", "quantized"], ...] = Field(
        default=("saved", "merged", "unmerged", "peft"), description="forms that are compared with the live adapter"
    )
    tolerance: float | None = Field(
        default=None, gt=0, description="largest difference of logits that passes; null: by number format"
    )
    rows: Positive = Field(default=8, description="rows that are compared")


class Report(Section):
    """What is written beside the adapter."""

    examples: Annotated[int, Field(ge=0)] = Field(default=5, description="rows shown before and after training")
    forecast: bool = Field(
        default=True, description="say before the run what it will take, and keep what it took for the next forecast"
    )
    html: bool = Field(default=True, description="write report.html, one file without outside parts")
    tensorboard: bool = Field(default=False, description="write TensorBoard events; needs the extra weft[tensorboard]")


class Recipe(Section):
    """A run of `weft tune`."""

    base: Base = Field(default=Base(), description="the pretrained model that stays fixed")
    task: Literal["causal-lm", "classification", "preference"] = Field(
        default="causal-lm",
        description="causal-lm: go on with a text; classification: name the label of a text; preference: prefer one "
        "answer to another",
    )
    data: Data = Field(description="what is learnt from")
    method: dict[str, Any] = Field(
        default={"name": "lora"},
        description="how the base is adapted: a name from `weft methods`, and its hyper-parameters",
    )
    targets: str | tuple[str, ...] | dict[str, dict[str, Any]] | None = Field(
        default=None,
        description="what is adapted: all-linear, attention, mlp, a list of names or globs, or "
        "{pattern: {hyper-parameters}}; null: the method's own default, all-linear for most",
    )
    layers: str | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description='only these layers, as "4-7" or [4, 5, 6, 7]; null: all'
    )
    save_modules: tuple[str, ...] = Field(
        default=(), description="modules that are trained in full and saved, such as a new head"
    )
    train: Train = Field(default=Train(), description="how it is learnt")
    preference: Preference = Field(default=Preference(), description="the loss of task: preference")
    forgetting: Forgetting | None = Field(default=Forgetting(), description="what was forgotten; null: not measured")
    check: Check | None = Field(default=Check(), description="the parity gate after training; null: none")
    report: Report = Field(default=Report(), description="what is written beside the adapter")
    output: str | None = Field(
        default=None,
        description="folder of the run, relative to where weft is started; null: runs/<name of the recipe>",
    )

    @model_validator(mode="after")
    def _preference_is_the_task(self) -> Recipe:
        if self.task != "preference" and self.preference != Preference():
            raise ValueError(f"the section preference is for task: preference, and the task is {self.task}")
        return self

    @field_validator("method")
    @classmethod
    def _has_name(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str) or not method["name"]:
            raise ValueError("a method has a name, as in {name: lora, rank: 8}")
        return method

    @field_validator("layers")
    @classmethod
    def _is_range(cls, layers: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
        if isinstance(layers, str):
            bounds = [part.split("-") for part in layers.replace(" ", "").split(",")]
            if not all(len(bound) <= 2 and all(end.isdecimal() for end in bound) for bound in bounds):
                raise ValueError('layers are written as "4-7", "0,2,4-7" or a list of numbers')
            if any(int(bound[0]) > int(bound[-1]) for bound in bounds):
                raise ValueError("a range of layers goes up, as in 4-7")
        return layers
