"""The assistant's turns in the text of a conversation: which characters of it are to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.errors import DataError
from autopeft.evaluators.tasks.chat import (
    first_change,
    prompt_and_whole,
    template_words,
    unread_parts,
    whole_text,
    written,
)
from autopeft.evaluators.tasks.conversations import Message, answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Roles of the field's formats; a template must name any other one.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
#: Names in other formats, which a template would write as they are.
_OTHER_NAMES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant",
}  # fmt: skip
#: A character for private use, which hardly a text has: it shows where a template writes the end of a message.
_MARK = "\ue000"
_REWRITTEN = (
    "the model's chat template writes it otherwise than after its prompt for generation, such as without a <think>"
    " block once later messages follow: it is not learnt; one row per answer may have it learnt"
)
_ENDLESS = "the model's chat template writes none, so the model does not learn to stop"
_FIRST = "nothing precedes it, so it answers nothing: it is not learnt"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The text of a conversation, the spans of its characters that are learnt, in order, and parts that are not read.

    `unread`: each part with what to do about it.
    """

    text: str
    spans: list[tuple[int, int]]
    unread: dict[str, str]


def learnt_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> Conversation:
    """Return the text of a conversation with the spans of the answers in it.

    An answer is what the template writes after the prompt for generation if nothing follows, with its end-of-turn
    token. It is learnt where the text of the whole conversation has it in these words: templates that leave the
    reasoning out of earlier turns (Qwen 3) would teach answers without reasoning. What precedes it may differ, such as
    a system prompt that stands in the last turn (Mistral).

    Raises DataError if the template refuses the messages, or if no answer is left to learn.
    """
    _check_roles(tokenizer, messages)
    turns = [(i, *prompt_and_whole(tokenizer, messages[: i + 1], tools)) for i in answers(messages)]
    text = turns[-1][2] if turns[-1][0] == len(messages) - 1 else whole_text(tokenizer, messages, tools)
    spans, unread = [], {}
    if messages[0]["role"] == "assistant":
        unread["the first message, an answer,"] = _FIRST
    changed: DataError | None = None
    for i, prompt, end in turns:
        # Some templates write the end-of-text token after the last message, whoever's it is (Phi 3).
        without = end.removesuffix(tokenizer.eos_token or "")
        end = without if text.startswith(without) and not text.startswith(end) else end
        span, answer = None, end[len(prompt) :]
        if not end.startswith(prompt):
            changed = DataError([first_change(prompt, end)])
        elif text.startswith(end):
            span = (len(prompt), len(end))
        else:
            span = _moved(tokenizer, messages, i, tools, text, answer)
        if span is None or not answer.strip():
            unread["a whole answer in 'messages'"] = _REWRITTEN
            continue
        spans.append(span)
        unread |= unread_parts(tokenizer, messages[: i + 1], tools, answer)
        content = messages[i]["content"].strip()
        if content and not messages[i].get("tool_calls") and not any(word in answer for word in content.split()):
            raise DataError(["nothing is left of the answer: the model's chat template does not write texts"])
        if content and end.rstrip().endswith(content):
            unread["the end of an answer"] = _ENDLESS
    if not spans:
        raise changed or DataError(["no answer is left to learn: the model's chat template writes none as it is asked"])
    return Conversation(text, sorted(spans), unread)


def _check_roles(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Raise DataError for a role that no format has and the template does not name: it may be a misspelt assistant."""
    problems = []
    for role in dict.fromkeys(message["role"] for message in messages):
        if role in _OTHER_NAMES:
            problems.append(f"the role {role!r} is called {_OTHER_NAMES[role]!r} in chat templates: rename it")
        elif role not in _ROLES | template_words(tokenizer, None):
            problems.append(f"unknown role {role!r:.40}: the roles are system, user, assistant and tool")
    if problems:
        raise DataError(problems)


def _moved(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    i: int,
    tools: Sequence[dict[str, Any]] | None,
    text: str,
    answer: str,
) -> tuple[int, int] | None:
    """Return the span of the answer `messages[i]` in a text that changes what precedes it; None if it changes, too."""
    marked = list(messages)
    marked[i] = {**marked[i], "content": marked[i]["content"] + _MARK}
    try:
        whole, alone = written(tokenizer, marked, tools), written(tokenizer, marked[: i + 1], tools)
    except Exception:  # a template may raise any exception
        return None
    _, found, rest = whole.rpartition(_MARK)
    _, found_alone, tail = alone.rpartition(_MARK)
    if not (found and found_alone and rest.startswith(tail) and text.endswith(rest)):
        return None
    end = len(text) - len(rest) + len(tail)
    start = end - len(answer)
    return (start, end) if start >= 0 and text[start:end] == answer else None


def learnt_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool] | None:
    """Return for each token whether it is in one of the spans; None if a token reaches over the start of one.

    `offsets`: the start and end of each token in the text. A generation that continues the prompt cannot produce a
    token that reaches over its end.
    """
    learnt = [False] * len(offsets)
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        if token < len(offsets) and offsets[token][0] < start:
            return None
        while token < len(offsets) and offsets[token][0] < end:
            learnt[token] = True
            token += 1
    return learnt
