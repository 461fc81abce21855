"""The bundled base's own tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import weft
from weft.data import BadRow, Layout, RenderOptions, Row, make_renderer, marked_text


@pytest.fixture(scope="module")
def pico() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(weft.__file__).parent / "assets" / "pico")


def test_its_chat_template_trains_the_answer_and_its_end(pico: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "\n\ndef f(): ..."}]
    render = make_renderer(pico, Layout("messages", {"messages": "messages"}), RenderOptions(max_length=64))
    rendered = render(Row({"messages": turns}, "f", 1))
    assert not isinstance(rendered, BadRow)
    text = marked_text(rendered[0], pico)
    assert "«\n\ndef f(): ...<|end|>»" in text
    prompt = pico.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    ids = pico(prompt, add_special_tokens=False)["input_ids"]
    assert list(rendered[0].input_ids[: len(ids)]) == ids


def test_prompt_and_completion_end_with_its_end_token(pico: PreTrainedTokenizerBase) -> None:
    columns = {"prompt": "prompt", "completion": "completion"}
    render = make_renderer(pico, Layout("prompt-completion", columns), RenderOptions(max_length=64))
    rendered = render(Row({"prompt": "def f(x):\n    #", "completion": " Return x."}, "f", 1))
    assert not isinstance(rendered, BadRow)
    assert marked_text(rendered[0], pico) == f"def f(x):\n    #« Return x.{pico.eos_token}»"
