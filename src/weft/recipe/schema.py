"""The recipe: every key of a run with its type, default, limits and description; documents are made from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from weft.recipe.section import Positive, Section
from weft.recipe.train import Train

__all__ = ["Base", "Check", "Data", "Forgetting", "Preference", "Recipe", "Report", "Section", "Train"]

Paths = str | tuple[str, ...]


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
    conditions: tuple[str, ...] = Field(default=(), description="columns of whole numbers that adapters read: [task]")
    limit: Positive | None = Field(default=None, description="use only the first rows of each split")


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
        description="how the base is adapted: a name from `weft methods` and its hyper-parameters, or a combination of "
        "methods, mam or unipelt",
    )
    start: str | None = Field(
        default=None,
        description="folder of an adapter or a run to go on from, instead of a new one: it says its own method, "
        "targets and sizes; null: a new adapter",
    )
    targets: str | tuple[str, ...] | dict[str, dict[str, Any]] | None = Field(
        default=None,
        description="what is adapted: all-linear, attention, mlp, a list of names or globs, or "
        "{pattern: {hyper-parameters}}, where {method: name} puts another method; null: the method's own default, "
        "all-linear for most",
    )
    layers: str | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description='only these layers, as "4-7" or [4, 5, 6, 7]; null: all'
    )
    save_modules: tuple[str, ...] = Field(
        default=(), description="modules that are trained in full and saved, such as a new head"
    )
    tied: Literal["refuse", "share", "separate"] = Field(
        default="refuse",
        description="an adapter at one of two modules that hold one weight (an input embedding and a head): refuse it, "
        "share it between both, or keep it separate, for the chosen one alone",
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

    @model_validator(mode="after")
    def _start_says_the_method(self) -> Recipe:
        if self.start is None:
            return self
        said = [k for k in ("method", "targets", "layers", "save_modules", "tied") if getattr(self, k) != _default(k)]
        if said:
            raise ValueError(f"start: {self.start} says by itself what is trained: leave {', '.join(said)} out")
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


def _default(key: str) -> Any:
    return Recipe.model_fields[key].get_default()
