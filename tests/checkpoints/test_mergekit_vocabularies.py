"""mergekit's files with modules and with tokenizers that differ: the same numbers, token by token."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from tests.checkpoints.test_merge import tensors
from weft.checkpoints import CheckpointError
from weft.checkpoints.merge import run
from weft.checkpoints.mergekit import read_mergekit

WORDS = {
    "base": ["<unk>", "a", "b", "c", "d"],
    "one": ["<unk>", "c", "b", "a", "x", "y"],
    "two": ["<unk>", "d", "x", "a", "z", "b", "c"],
}
ADDED = {"base": [], "one": ["<s>"], "two": ["<s>", "<t>"]}
TWO = {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 0.3}},
                                            {"model": "two", "parameters": {"weight": 0.7}}]}  # fmt: skip
BASED = {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.6, "weight": 0.5},
         "models": [{"model": "one"}, {"model": "two"}]}  # fmt: skip
CASES = {
    "union": {**TWO, "tokenizer_source": "union"},
    "base's": {**BASED, "tokenizer_source": "base"},
    "a model's": {**BASED, "tokenizer_source": "two"},
    "union with a base": {**BASED, "tokenizer_source": "union", "dtype": "float32"},
    "tokens": {
        **BASED,
        "merge_method": "task_arithmetic",  # padding makes equal rows, of which a density could keep any
        "parameters": {"weight": 0.5},
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 8,
            "tokens": {
                "a": {"source": "one", "force": True},
                "z": {"source": {"kind": "zero"}},
                "<t>": {"source": {"kind": "model_token", "model": "two", "token": "d"}},
                "<new>": {"source": {"kind": "model_token", "model": "base", "token_id": 2}},
            },
        },
    },
    "means": {**TWO, "models": [*TWO["models"], {"model": "base", "parameters": {"weight": 0.5}}],
              "tokenizer": {"source": "one", "tokens": {"<t>": {"source": "two"}}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("worded")
    for seed, (name, words) in enumerate(WORDS.items()):
        inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.add_special_tokens([AddedToken(token, special=True) for token in ADDED[name]])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in WORDS}


def write(body: dict, models: dict[str, str], folder: Path) -> Path:
    text = json.dumps(body)
    for name, place in models.items():
        text = text.replace(f'"{name}"', json.dumps(place))
    text = (
        text.replace(json.dumps(models.get("base", "")), '"base"') if body.get("tokenizer_source") == "base" else text
    )
    body = json.loads(text)
    if "base_model" in body:
        body["base_model"] = models["base"]
    (folder / "merge.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return folder / "merge.yaml"


def mergekits(file: Path, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge = pytest.importorskip("mergekit.merge")
        from mergekit.config import MergeConfiguration
        from mergekit.options import MergeOptions

        config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
        merge.run_merge(config, str(out), MergeOptions(quiet=True))


def by_token(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The rows of both embeddings by their token, and all other tensors. New tokens are numbered in any order there."""
    tokens = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    found = tensors(folder)
    rows = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held = found.pop(name)
        rows |= {f"{name} {token}": held[i] for token, i in tokens.items()}
        rows |= {f"{name} {i}": held[i] for i in range(len(tokens), len(held))}
    return rows, found


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_laid_out_as_mergekit_does(case, worded, tmp_path) -> None:
    file = write(CASES[case], worded, tmp_path)
    run(read_mergekit(file), tmp_path / "ours")
    mergekits(file, tmp_path / "theirs")
    ours, theirs = by_token(tmp_path / "ours"), by_token(tmp_path / "theirs")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(mine[name], other[name], rtol=1e-6, atol=1e-6)
    mine, other = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert mine["vocab_size"] == other["vocab_size"]
    special = [
        set(transformers.AutoTokenizer.from_pretrained(tmp_path / side).all_special_tokens)
        for side in ("ours", "theirs")
    ]
    assert special[0] == special[1]


def test_the_result_loads_and_a_chat_template_comes_along(worded, tmp_path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = write({**CASES["union"], "chat_template": template}, worded, tmp_path)
    run(read_mergekit(file), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model(torch.tensor([[tokenizer.convert_tokens_to_ids("z")]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "give all models one tokenizer"),
        ({"tokenizer": {"sorce": "union"}}, "tokenizer has no key 'sorce'; did you mean 'source'"),
        ({"tokenizer": {"tokens": {"q": {"force": True}}}}, "tokens.q.source should be a model"),
        ({"tokenizer": {"tokens": {"q": {"source": "two"}}}}, "is to come from .*two, which has no 'q'"),
        ({"tokenizer": {"tokens": {"q": {"source": "base"}}}}, "is to come from .*base, which has no"),
        ({"tokenizer_source": "union", "tokenizer": {"source": "union"}}, "say the same"),
        ({"tokenizer_source": "union", "chat_template": "chatml"}, "neither auto nor a template"),
    ],
)
def test_what_does_not_fit_is_said(change, said, worded, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_mergekit(write({**TWO, **change}, worded, tmp_path))


@pytest.fixture(scope="module")
def stacked(tmp_path_factory) -> dict[str, str]:
    """An encoder of three layers beside a decoder of two."""
    folder = tmp_path_factory.mktemp("stacked")
    config = transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=40,
        feed_forward_proj="gated-gelu",
    )
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "one", "two")}


MODULES = {
    "each in its own way": {
        "merge_method": "linear",
        "modules": {
            "encoder": {
                "models": [{"model": "one", "parameters": {"weight": [0.0, 1.0]}},
                           {"model": "two", "parameters": {"weight": 0.5}}],
            },
            "decoder": {
                "slices": [
                    {"sources": [{"model": "one", "layer_range": [0, 2]}, {"model": "two", "layer_range": [0, 2]}]},
                    {"sources": [{"model": "two", "layer_range": [1, 2]}, {"model": "one", "layer_range": [1, 2]}],
                     "parameters": {"weight": [{"filter": "SelfAttention", "value": 0.2}, {"value": 0.9}]}},
                ],
                "parameters": {"weight": 0.4},
            },
            "shared": {"models": [{"model": "one"}, {"model": "two"}], "parameters": {"weight": 1.0}},
        },
        "parameters": {"normalize": False},
    },
    "one rule for stacks of two depths": {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "one"}],
        "parameters": {"t": [0.0, 0.3, 1.0]},
    },
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("case", MODULES)
def test_modules_are_merged_as_mergekit_does(case, stacked, tmp_path) -> None:
    file = write(MODULES[case], stacked, tmp_path)
    run(read_mergekit(file), tmp_path / "ours")
    mergekits(file, tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    mine, other = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert (mine["num_layers"], mine["num_decoder_layers"]) == (other["num_layers"], other["num_decoder_layers"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shared": None}, "holds shared.weight .* such tensors"),
        ({"encodr": {"models": [{"model": "one"}]}}, "there is no module 'encodr'; did you mean 'encoder'"),
        ({"vision_tower": {"models": [{"model": "one"}]}}, "have no module 'vision_tower'"),
        ({"encoder": {"models": [], "slices": []}}, "expected of the module encoder"),
    ],
)
def test_modules_that_do_not_fit_are_said(change, said, stacked, tmp_path) -> None:
    body = MODULES["each in its own way"]
    modules = {k: v for k, v in {**body["modules"], **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=said):
        read_mergekit(write({**body, "modules": modules}, stacked, tmp_path))
