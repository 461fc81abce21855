"""The recipe: every key of a run with its type, default, limits and description; documents are made from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["Base", "Check", "Data", "Forgetting", "Recipe", "Report", "Section", "Train"]

Positive = Annotated[int, Field(ge=1)]
Paths = str | tuple[str, ...]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Base(Section):
    """The pretrained model that stays fixed; `base: pico` is short for `base: {model: pico}`."""

    model: str = Field(default="pico", description="pico (bundled), a folder, or a model id on the hub", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="number format in which the weights are held; auto is that of the checkpoint"
    )
    quantize: Literal["nf4", "int8", "torchao-int8"] | None = Field(
        default=None, description="hold the frozen weights compressed; needs the extra weft[quant]"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")


class Data(Section):
    """What is learnt from; `data: train.jsonl` is short for `data: {train: train.jsonl}`."""

    train: Paths = Field(
        description="training rows: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder, a glob, a datasets "
        "folder, or a list of these; relative to the recipe's folder"
    )
    validation: Paths | None = Field(default=None, description="rows for the loss during and after training")
    test: Paths | None = Field(default=None, description="rows that are measured once, at the end")
    format: Literal["prompt-completion", "messages", "alpaca", "sharegpt", "text", "text-label"] | None = Field(
        default=None, description="how a row is built; null: found from its columns"
    )
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
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="optimiser")
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay: decoupled with adamw, part of the gradient with sgd"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="AdamW's averages; the first is the momentum of sgd"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine", description="how the learning rate falls; wsd: constant, then linear over the last fifth"
    )
    warmup: float = Field(
        default=0.03, ge=0, description="steps of rising learning rate; below 1: a share of all steps"
    )
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient; null: no clipping")
    seed: int = Field(default=0, ge=0, description="the seed of every random draw")
    threads: Positive | None = Field(default=None, description="CPU threads; null: one per core")
    evaluate_every: Positive | None = Field(
        default=None, description="steps between validations; null: before and after only"
    )
    checkpoint_every: Positive | None = Field(
        default=200, description="steps between checkpoints; null: only the last one"
    )
    keep_checkpoints: Positive = Field(default=2, description="how many checkpoints stay on disk")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, about a third slower"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    log_every: Positive = Field(default=10, description="steps between lines of the log")
    precision: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="autocast: the number format of the arithmetic; null: that of the weights"
    )
    bucket_by_length: bool = Field(default=False, description="put rows of similar length in one batch: less padding")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; give one, or set the other to null")
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
    html: bool = Field(default=True, description="write report.html, one file without outside parts")
    tensorboard: bool = Field(default=False, description="write TensorBoard events; needs the extra weft[tensorboard]")


class Recipe(Section):
    """A run of `weft tune`."""

    base: Base = Field(default=Base(), description="the pretrained model that stays fixed")
    task: Literal["causal-lm", "classification"] = Field(
        default="causal-lm", description="causal-lm: go on with a text; classification: name the label of a text"
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
    forgetting: Forgetting | None = Field(default=Forgetting(), description="what was forgotten; null: not measured")
    check: Check | None = Field(default=Check(), description="the parity gate after training; null: none")
    report: Report = Field(default=Report(), description="what is written beside the adapter")
    output: str | None = Field(
        default=None,
        description="folder of the run, relative to where weft is started; null: runs/<name of the recipe>",
    )

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
