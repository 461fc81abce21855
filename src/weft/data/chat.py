"""Conversations as pieces of text, each trained or not: by the tokenizer's own template, or plain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ROLES", "Piece", "RowProblem", "chat_pieces", "chat_turns", "plain_pieces"]

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RowProblem(Exception):
    """Why one row cannot be rendered: a reason for the count, and details. Becomes a BadRow with its place."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is trained or not; `end` puts the tokenizer's end token after it."""

    text: str
    trained: bool
    end: bool = False


def chat_turns(value: Any, system: str | None = None) -> list[Message]:
    """Messages in OpenAI's form from OpenAI's (role, content) or ShareGPT's (from, value); `system` for none."""
    if not isinstance(value, list):
        raise RowProblem("wrong type", f"a conversation is a list of messages, this is a {type(value).__name__}")
    turns = [_turn(item) for item in value]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowProblem("no trainable token" if turns else "empty", "the conversation has no assistant message")
    if all(turn["role"] != "assistant" or _is_blank(turn) for turn in turns):
        raise RowProblem("empty", "every assistant message is empty")
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _turn(item: Any) -> Message:
    if not isinstance(item, dict):
        raise RowProblem("wrong type", f"a message is an object, this is a {type(item).__name__}")
    fields = {key: value for key, value in item.items() if value is not None}  # Arrow fills absent keys with None
    role, content = fields.pop("role", fields.pop("from", None)), fields.pop("content", fields.pop("value", ""))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowProblem("wrong type", f"the role {role!r} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str | list):
        raise RowProblem("wrong type", f"the content of a message is text, this is a {type(content).__name__}")
    return {**fields, "role": ROLES[role.lower()], "content": content}


def _is_blank(turn: Message) -> bool:
    content = turn["content"]
    return not (content.strip() if isinstance(content, str) else content) and not turn.get("tool_calls")


def plain_pieces(turns: Sequence[Message]) -> list[Piece]:
    """A conversation without a template: "User: ...", "Assistant: ...", the end token after what the assistant says."""
    pieces = []
    for turn in turns:
        if not isinstance(turn["content"], str):
            raise RowProblem("wrong type", "content in parts needs a chat template")
        if turn["role"] == "assistant":
            pieces += [Piece("Assistant:", False), Piece(f" {turn['content']}", turn.get("weight") != 0, end=True)]
        else:
            pieces.append(Piece(f"{turn['role'].title()}: {turn['content']}\n\n", False))
    return pieces


def chat_pieces(
    turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, tools: list[Any] | None = None
) -> list[Piece]:
    """A conversation through the tokenizer's template, cut where training starts and stops.

    The template's own `{% generation %}` marks decide where it has them; otherwise each assistant turn is what its
    rendering adds to the rendering of all that came before.
    """
    turns = list(turns)
    template = tokenizer.get_chat_template(tools=tools)
    marked = _GENERATION.search(template) is not None
    render = _Renderer(template, tools, tokenizer.special_tokens_map)
    text, spans = render.marked(turns) if marked else _added_spans(turns, render)
    assistants = [turn for turn in turns if turn["role"] == "assistant"]
    if any("weight" in turn for turn in assistants):
        if len(spans) != len(assistants):
            raise RowProblem("template refused", "messages have weights, but the template marks other spans than them")
        spans = [span for span, turn in zip(spans, assistants, strict=True) if turn.get("weight") != 0]
    return _cut(text, spans)


@dataclass(frozen=True)
class _Renderer:
    """The template as a function of messages.

    The spans come from the same marks as transformers' `return_assistant_tokens_mask`, but as characters: its mask of
    tokens trains on the prompt's end where a token crosses the border, and on all that follows a span whose end has no
    token.
    """

    template: str
    tools: list[Any] | None
    special_tokens: Mapping[str, Any]

    def text(self, turns: Sequence[Message], *, reply: bool = False) -> str:
        return self._call(turns, reply=reply, marks=False)[0]

    def marked(self, turns: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        return self._call(turns, reply=False, marks=True)

    def _call(self, turns: Sequence[Message], *, reply: bool, marks: bool) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=reply,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowProblem("template refused", str(error)) from error
        texts, spans = rendered
        return texts[0], [(start, stop) for start, stop in spans[0]] if marks else []


def _shared_start(one: str, other: str) -> int:
    """How many characters two texts have in common from their start."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _added_spans(turns: Sequence[Message], render: _Renderer) -> tuple[str, list[tuple[int, int]]]:
    text = render.text(turns)
    spans = [_added_span(turns, i, text, render) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return text, spans


def _added_span(turns: Sequence[Message], index: int, text: str, render: _Renderer) -> tuple[int, int]:
    """Where the assistant turn `index` stands in `text`, from after its header to after its end mark."""
    header = render.text(turns[:index], reply=True)
    through = render.text(turns[: index + 1])
    if not text.startswith(header):
        raise RowProblem("template refused", "the template writes a turn's past otherwise once it is answered")
    if text.startswith(through):
        return len(header), len(through)
    # Some templates write the last turn otherwise than a past one (Qwen3: its reasoning): find the content itself, and
    # take of what follows as much as follows it in both forms, which is the end mark.
    content = turns[index]["content"]
    content = content.strip() if isinstance(content, str) else ""
    found, last = text.find(content, len(header)), through.rfind(content)
    if not content or found < 0 or last < 0:
        raise RowProblem("template refused", "the template does not show where the assistant's turn stands")
    stop = found + len(content)
    return len(header), stop + _shared_start(text[stop:], through[last + len(content) :])


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces, position = [], 0
    for start, stop in spans:
        pieces += [Piece(text[position:start], False), Piece(text[start:stop], True)]
        position = stop
    pieces.append(Piece(text[position:], False))
    return [piece for piece in pieces if piece.text]
