"""Rows with a chosen and a rejected answer: texts, messages, conversations; what is shared, trained and refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from weft.data import BadRow, Example, RenderOptions, Row, detect, make_renderer
from weft.errors import DataError

OPTIONS = RenderOptions(max_length=200)
USER = {"role": "user", "content": "what is the answer?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rendered(tokenizer: PreTrainedTokenizerBase, options: RenderOptions = OPTIONS, **values: Any) -> Example | BadRow:
    row = Row(values, "f", 1)
    result = make_renderer(tokenizer, detect([row], task="preference"), options)(row)
    return result if isinstance(result, BadRow) else result[0]


def texts(example: Example | BadRow, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The shared part, the chosen and the rejected answer."""
    assert isinstance(example, Example), example
    ids, cuts = list(example.input_ids), (0, example.shared, example.rejected, len(example.input_ids))
    return tuple(tokenizer.decode(ids[a:b]) for a, b in pairwise(cuts))  # type: ignore[return-value]


def test_texts_share_the_prompt_and_end_with_the_end_token(byte_bpe: PreTrainedTokenizerBase) -> None:
    example = rendered(byte_bpe, prompt="The answer is", chosen=" 42.", rejected=" the fox.")
    assert texts(example, byte_bpe) == ("The answer is", " 42.<|eos|>", " the fox.<|eos|>")
    assert isinstance(example, Example)
    assert isinstance(example.labels, type(example.input_ids))
    assert example.labels[example.shared :] == example.input_ids[example.shared :]
    assert set(example.labels[: example.shared]) == {-100}
    assert (example.num_trained, example.num_trained_tokens) == (1, len(example.input_ids) - example.shared)
    chosen, rejected = example.answers()
    assert byte_bpe.decode(list(rejected.input_ids)) == "The answer is the fox.<|eos|>"
    assert len(chosen.input_ids) == example.rejected


def test_a_pair_is_the_two_rows_that_prompt_and_completion_would_make(byte_bpe: PreTrainedTokenizerBase) -> None:
    pair = rendered(byte_bpe, prompt="The answer", chosen=" is 42.", rejected="s are 42.")
    assert isinstance(pair, Example)
    for answer, completion in zip(pair.answers(), (" is 42.", "s are 42."), strict=True):
        row = Row({"prompt": "The answer", "completion": completion}, "f", 1)
        alone = make_renderer(byte_bpe, detect([row]), OPTIONS)(row)
        assert isinstance(alone, tuple)
        assert (answer.input_ids, answer.labels) == (alone[0].input_ids, alone[0].labels)


FORMS: dict[str, dict[str, Any]] = {
    "a prompt, and answers as messages": {"prompt": [USER], "chosen": [said("42")], "rejected": [said("fox")]},
    "a prompt as messages, answers as texts": {"prompt": [USER], "chosen": "42", "rejected": "fox"},
    "whole conversations": {"chosen": [USER, said("42")], "rejected": [USER, said("fox")]},
    "whole conversations and their prompt": {
        "prompt": USER["content"], "chosen": [USER, said("42")], "rejected": [USER, said("fox")],
    },
    "ShareGPT's names": {
        "chosen": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "42"}],
        "rejected": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "fox"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_messages_are_the_same_pair(byte_bpe: PreTrainedTokenizerBase, form: str) -> None:
    shared, chosen, rejected = texts(rendered(byte_bpe, **FORMS[form]), byte_bpe)
    assert shared == "<|user|>\nwhat is the answer?<|end|>\n<|assistant|>\n"
    assert (chosen, rejected) == ("42<|end|>\n", "fox<|end|>\n")


def test_text_rows_go_through_the_template_where_it_is_asked_for(byte_bpe: PreTrainedTokenizerBase) -> None:
    chat = RenderOptions(max_length=200, template="chat", system="Be brief.")
    shared, chosen, _ = texts(rendered(byte_bpe, chat, prompt="hello", chosen="42", rejected="fox"), byte_bpe)
    assert shared == "<|system|>\nBe brief.<|end|>\n<|user|>\nhello<|end|>\n<|assistant|>\n"
    assert chosen == "42<|end|>\n"


def test_turns_that_both_have_are_no_answer(byte_bpe: PreTrainedTokenizerBase) -> None:
    before = [USER, said("hello"), USER]
    pair = rendered(byte_bpe, chosen=[*before, said("42")], rejected=[*before, said("fox")])
    shared, chosen, rejected = texts(pair, byte_bpe)
    assert "hello<|end|>" in shared
    assert (chosen, rejected) == ("42<|end|>\n", "fox<|end|>\n")


def test_answers_that_start_alike_share_only_the_prompt(byte_bpe: PreTrainedTokenizerBase) -> None:
    pair = rendered(byte_bpe, prompt="what?", chosen=" The answer is 42.", rejected=" The answer is the fox.")
    assert texts(pair, byte_bpe)[0] == "what?"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no preference"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "wrong type"),
        ({"chosen": "b", "rejected": "c"}, "wrong type"),
        ({"prompt": "a", "chosen": "b" * 900, "rejected": "c"}, "over-long"),
        ({"prompt": "other", "chosen": [USER, said("42")], "rejected": [USER, said("fox")]}, "wrong type"),
    ],
)
def test_bad_rows_say_why(byte_bpe: PreTrainedTokenizerBase, values: dict[str, Any], reason: str) -> None:
    found = rendered(byte_bpe, **values)
    assert isinstance(found, BadRow)
    assert found.reason == reason


def test_options_without_meaning_are_refused(byte_bpe: PreTrainedTokenizerBase) -> None:
    for options, why in (
        (RenderOptions(max_length=20, train_on="all"), "only answers are compared"),
        (RenderOptions(max_length=20, too_long="truncate"), "answers that were cut off"),
    ):
        with pytest.raises(DataError, match=why):
            rendered(byte_bpe, options, prompt="a", chosen="b", rejected="c")
