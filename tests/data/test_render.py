"""Rendering: the loss mask covers what the model should say, to the token, in every format and tokenizer family."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import MARKED, REWRITING, THINKING, UNMARKED
from weft.data.detect import FORMATS, Layout
from weft.data.render import RenderOptions, make_renderer, marked_text
from weft.data.rows import IGNORED, BadRow, Example, Row
from weft.errors import DataError

FAST = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "\n\nhello there"},
    {"role": "user", "content": "what is the answer?"},
    {"role": "assistant", "content": "42"},
]


def layout(name: str) -> Layout:
    kind = FORMATS[name]
    return Layout(name, {part: part for part in kind.needs + kind.allows})


def render(tokenizer: Any, name: str, values: dict, **options: Any) -> tuple[Example, ...] | BadRow:
    return make_renderer(tokenizer, layout(name), RenderOptions(**{"max_length": 512} | options))(Row(values, "f", 1))


def shown(tokenizer: Any, name: str, values: dict, **options: Any) -> str:
    rendered = render(tokenizer, name, values, **options)
    assert not isinstance(rendered, BadRow), rendered
    return marked_text(rendered[0], tokenizer)


def test_prompt_and_completion(byte_bpe: Any) -> None:
    row = {"prompt": "def add", "completion": "(left):"}
    assert shown(byte_bpe, "prompt-completion", row) == "def add«(left):<|eos|>»"
    assert shown(byte_bpe, "prompt-completion", row, template="chat") == (
        "<|user|>\ndef add<|end|>\n<|assistant|>\n«(left):<|end|>»\n"
    )
    everything = render(byte_bpe, "prompt-completion", row, train_on="all")
    assert list(everything[0].labels) == [IGNORED, *everything[0].input_ids[1:]]


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_only_the_assistant_is_trained(with_template: Any, template: str) -> None:
    tokenizer = with_template(template)
    text = shown(tokenizer, "messages", {"messages": TURNS})
    after = "" if template == MARKED else "\n"  # what the template adds after a turn belongs to it, unless marked
    rest = "\n" if template == MARKED else ""
    assert text == (
        f"<|user|>\nhello<|end|>\n<|assistant|>\n«\n\nhello there<|end|>{after}»{rest}<|user|>\n"
        f"what is the answer?<|end|>\n<|assistant|>\n«42<|end|>{after}»{rest}"
    )


def test_a_template_that_writes_the_last_turn_otherwise(with_template: Any) -> None:
    tokenizer = with_template(THINKING)
    assert shown(tokenizer, "messages", {"messages": TURNS}) == (
        "<|user|>\nhello<|end|>\n<|assistant|>\n«hello there<|end|>\n»<|user|>\n"
        "what is the answer?<|end|>\n<|assistant|>\n«<think></think>42<|end|>\n»"
    )


def test_a_template_that_hides_the_turns_is_a_bad_row(with_template: Any) -> None:
    rendered = render(with_template(REWRITING), "messages", {"messages": TURNS})
    assert isinstance(rendered, BadRow)
    assert rendered.reason == "template refused"
    refused = render(with_template("{{ raise_exception('no') }}"), "messages", {"messages": TURNS})
    assert isinstance(refused, BadRow)
    assert refused.detail == "no"


def test_the_prompt_is_tokenised_as_generation_sees_it(with_template: Any) -> None:
    """Whatever follows the header, the tokens up to it are those of the generation prompt."""
    for template in (MARKED, UNMARKED):
        tokenizer = with_template(template)
        [example] = render(tokenizer, "messages", {"messages": TURNS[:2]})
        text = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert set(example.labels[: len(prompt)]) == {IGNORED}
        assert IGNORED not in example.labels[len(prompt) : len(prompt) + 3]


def test_sharegpt_tools_system_and_weights(with_template: Any) -> None:
    tokenizer = with_template(MARKED)
    conversation = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
    assert shown(tokenizer, "sharegpt", {"conversations": conversation}, system="be short") == (
        "<|system|>\nbe short<|end|>\n<|user|>\nhello<|end|>\n<|assistant|>\n«there<|end|>»\n"
    )
    for template in (MARKED, UNMARKED):
        weighted = [{**turn, "weight": 0} if index == 1 else turn for index, turn in enumerate(TURNS)]
        text = shown(with_template(template), "messages", {"messages": weighted})
        assert text.count("«") == 1
        assert "«42" in text
    tools = "{% if tools %}{{ tools | length }} tools{% endif %}" + MARKED
    row = {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert shown(with_template(tools), "messages", row).startswith("1 tools<|user|>")


def test_conversations_without_a_template(with_template: Any) -> None:
    tokenizer = with_template(None)
    assert shown(tokenizer, "messages", {"messages": TURNS[:2]}) == "User: hello\n\nAssistant:« \n\nhello there<|eos|>»"
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert shown(tokenizer, "alpaca", row, system="sum") == (
        "sum\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n«3<|eos|>»"
    )
    assert "Input" not in shown(tokenizer, "alpaca", row | {"input": ""})


def test_alpaca_uses_the_chat_template(byte_bpe: Any) -> None:
    text = shown(byte_bpe, "alpaca", {"instruction": "add", "input": "1 2", "output": "3", "system": None})
    assert text == "<|user|>\nadd\n\n1 2<|end|>\n<|assistant|>\n«3<|end|>»\n"


def test_a_begin_token_stands_where_generation_puts_it(sentence_bpe: Any) -> None:
    [example] = render(sentence_bpe, "prompt-completion", {"prompt": "the quick", "completion": " brown fox"})
    prompt = sentence_bpe("the quick")["input_ids"]
    assert list(example.input_ids[: len(prompt)]) == prompt
    assert sentence_bpe.decode(list(example.input_ids), skip_special_tokens=True) == "the quick brown fox"


def test_a_word_cut_in_two_gains_no_space(sentence_bpe: Any) -> None:
    for prompt, completion in (("hel", "lo there"), ("the ans", "wer"), ("a", "nswer")):
        [example] = render(sentence_bpe, "prompt-completion", {"prompt": prompt, "completion": completion})
        assert sentence_bpe.decode(list(example.input_ids), skip_special_tokens=True) == prompt + completion
        assert list(example.input_ids[: example.labels.count(IGNORED)]) == sentence_bpe(prompt)["input_ids"]


@FAST
@given(prompt=st.text(min_size=1, max_size=20), completion=st.text(min_size=1, max_size=20))
def test_labels_cover_exactly_the_completion(byte_bpe: Any, prompt: str, completion: str) -> None:
    row = {"prompt": prompt, "completion": completion}
    rendered = render(byte_bpe, "prompt-completion", row)
    if isinstance(rendered, BadRow):
        assert rendered.reason == "empty"
        assert not (prompt.strip() and completion.strip())
        return
    [example] = rendered
    border = example.labels.count(IGNORED)
    assert list(example.input_ids[:border]) == byte_bpe(prompt)["input_ids"]
    assert byte_bpe.decode(list(example.input_ids[border:])) == completion + "<|eos|>"
    assert example.labels[border:] == example.input_ids[border:]


@FAST
@given(
    contents=st.lists(st.text(st.characters(exclude_characters="<|>"), min_size=1, max_size=12), min_size=2, max_size=6)
)
def test_marked_and_unmarked_templates_agree(byte_bpe: Any, contents: list[str]) -> None:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    texts = []
    for template in (MARKED.replace("{{ '\\n' }}", ""), UNMARKED.replace("<|end|>\n", "<|end|>")):
        byte_bpe.chat_template = template
        rendered = render(byte_bpe, "messages", {"messages": turns})
        texts.append(rendered.reason if isinstance(rendered, BadRow) else marked_text(rendered[0], byte_bpe))
    byte_bpe.chat_template = MARKED
    assert texts[0] == texts[1]


@FAST
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from"]), inner)
        ),
        max_leaves=8,
    ),
    name=st.sampled_from(list(FORMATS)),
)
def test_odd_values_are_bad_rows_not_errors(byte_bpe: Any, value: Any, name: str) -> None:
    row = dict.fromkeys(FORMATS[name].needs, value)
    rendered = render(byte_bpe, name, row, label_names=("a", "b"))
    assert isinstance(rendered, BadRow) or all(example.num_trained for example in rendered)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("prompt-completion", {"prompt": "a", "completion": " \n"}, "empty"),
        ("prompt-completion", {"prompt": "a", "completion": None}, "empty"),
        ("prompt-completion", {"prompt": "a"}, "missing column"),
        ("prompt-completion", {"prompt": "a", "completion": 3}, "wrong type"),
        ("messages", {"messages": "a"}, "wrong type"),
        ("messages", {"messages": []}, "empty"),
        ("messages", {"messages": TURNS[:1]}, "no trainable token"),
        ("messages", {"messages": [{"role": "assistant", "content": ""}]}, "empty"),
        ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "wrong type"),
        ("messages", {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "no trainable token"),
        ("text", {"text": ""}, "empty"),
        ("text", {"text": "a \ud800"}, "broken UTF-8"),
        ("text-label", {"text": "a \ud800", "label": "a"}, "broken UTF-8"),
        ("text-label", {"text": "a", "label": "c"}, "unknown label"),
        ("text-label", {"text": "a", "label": 1.5}, "wrong type"),
        ("text-label", {"text": "a", "label": ""}, "empty"),
    ],
)
def test_bad_rows_have_their_reason(byte_bpe: Any, name: str, values: dict, reason: str) -> None:
    rendered = render(byte_bpe, name, values, label_names=("a", "b"))
    assert isinstance(rendered, BadRow)
    assert rendered.reason == reason


def test_long_rows(byte_bpe: Any) -> None:
    row = {"prompt": "a b c", "completion": " hello" * 50}
    dropped = render(byte_bpe, "prompt-completion", row, max_length=16)
    assert isinstance(dropped, BadRow)
    assert dropped.reason == "over-long"
    [cut] = render(byte_bpe, "prompt-completion", row, max_length=16, too_long="truncate")
    assert (len(cut.input_ids), cut.note) == (16, "truncated")
    lost = render(
        byte_bpe, "prompt-completion", {"prompt": "a " * 50, "completion": "b"}, max_length=16, too_long="truncate"
    )
    assert isinstance(lost, BadRow)
    assert lost.reason == "no trainable token"


@FAST
@given(words=st.integers(1, 80), length=st.integers(2, 20))
def test_a_long_text_is_split_and_every_token_is_learnt_once(byte_bpe: Any, words: int, length: int) -> None:
    whole = [*byte_bpe("fox " * words)["input_ids"], byte_bpe.eos_token_id]
    examples = render(byte_bpe, "text", {"text": "fox " * words}, max_length=length)
    assert all(len(example.input_ids) <= length for example in examples)
    learnt = [label for example in examples for label in example.labels if label != IGNORED]
    assert learnt == whole[1:]


def test_classification(word_piece: Any) -> None:
    options = {"label_names": ("no", "yes")}
    [example] = render(word_piece, "text-label", {"text": "hello there", "label": "yes"}, **options)
    assert (example.labels, example.num_trained) == (1, 1)
    assert list(example.input_ids) == word_piece("hello there")["input_ids"]
    long = {"text": "hello " * 30, "label": "no"}
    assert isinstance(render(word_piece, "text-label", long, max_length=8, **options), BadRow)
    [cut] = render(word_piece, "text-label", long, max_length=8, too_long="truncate", **options)
    assert (len(cut.input_ids), cut.input_ids[-1], cut.note) == (8, word_piece.sep_token_id, "truncated")
    assert "«1»" in marked_text(example, word_piece)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("text", {"template": "chat"}, "no meaning for text rows"),
        ("prompt-completion", {"system": "be short"}, "no place in plain"),
        ("messages", {"too_long": "split"}, "split is for text rows"),
        ("text", {"max_length": 1}, "2 tokens"),
    ],
)
def test_options_without_effect_are_refused(byte_bpe: Any, name: str, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_renderer(byte_bpe, layout(name), RenderOptions(**{"max_length": 64} | options))


def test_a_template_that_is_not_there_is_refused(with_template: Any, word_piece: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        make_renderer(with_template(None), layout("messages"), RenderOptions(max_length=64, template="chat"))
    with pytest.raises(DataError, match="no end token"):
        make_renderer(word_piece, layout("text"), RenderOptions(max_length=64))
