"""Conversations: reading of `messages` and `tools`, and the chat template, which writes them as one text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

NO_TEMPLATE = (
    "rows with 'messages' need a chat template, but the model's tokenizer has none: use the model's variant for chats,"
    " or rows with a prompt and a completion"
)
#: Names of one field, which transformers gives to templates under each of them.
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
#: Characters of a text in a message.
_SHOWN = 20


# Reading


def messages_of(value: Any) -> list[Message]:
    """Return messages whose content is a text, with all other fields of theirs. Raises ValueError."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("'messages' must be a list of objects with 'role' and 'content'")
    messages = []
    for number, message in enumerate(value):
        # Parquet gives every message the fields of all messages.
        message = {name: entry for name, entry in message.items() if entry is not None}
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"message {number}: 'tool_calls' must be a list of objects")
        content = message.get("content", "" if calls else None)
        content = _joined_parts(content, number) if isinstance(content, list) else content
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise ValueError(f"message {number}: 'role' and 'content' must be texts")
        messages.append({"role": message.pop("role"), **message, "content": content})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("'messages' must end with a message of the role 'assistant' that answers an earlier message")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise ValueError("the last message, the answer to learn, is empty")
    return messages


def _joined_parts(parts: list[Any], number: int) -> str:
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"message {number}: its content has a part of the type {kind!r}, but only texts are read")
        texts.append(part["text"])
    return "".join(texts)


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return tools as JSON schemas, from a list or its JSON text. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is not valid JSON: {error.msg}") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("'tools' must be a list of JSON schemas, one object per tool")
    return value


# The chat template


def prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> tuple[str, str]:
    """Return the text that asks for the answer (the last message), and the text of the answer.

    Chat templates seldom mark the answers (`{% generation %}`), so the answer is what the template writes after the
    prompt for generation. Raises DataError if the template refuses the messages, or writes the prompt otherwise when
    the answer follows.
    """
    if tokenizer.chat_template is None:
        raise DataError([NO_TEMPLATE])
    try:
        prompt = _written(tokenizer, messages[:-1], tools, add_generation_prompt=True)
        whole = _written(tokenizer, messages, tools)
    except Exception as error:  # a template may raise any exception: a refusal, a missing field, a wrong type
        advice = _advice(tokenizer, messages, tools)
        raise DataError([f"the model's chat template refuses the messages: {first_line(error)}{advice}"]) from error
    if not whole.startswith(prompt):
        same = next(i for i, letter in enumerate(prompt) if whole[i : i + 1] != letter)
        raise DataError(
            [f"the model's chat template changes the text before the last message when it follows:"
             f" {prompt[same : same + _SHOWN]!r} is no longer there, so the answer cannot be cut off: use rows with a"
             " prompt and a completion, or a chat template that only appends"]
        )  # fmt: skip
    return prompt, whole[len(prompt) :]


def _written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    text = tokenizer.apply_chat_template(
        list(messages),
        tools=None if tools is None else list(tools),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text


def unread_parts(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    answer: str,
) -> dict[str, str]:
    """Return the parts of messages that the chat template leaves out, each with what to do about it.

    `answer`: the text of the last message as the template wrote it. Raises DataError if nothing of it is left.
    """
    words = _words(str(tokenizer.get_chat_template(tools=None if tools is None else list(tools))))
    names = {name for message in messages for name, value in message.items() if value} - {"role", "content"}
    unread = {
        f"messages.{name}": _OF_MESSAGES
        for name in sorted(names)
        if not words & (_REASONING if name in _REASONING else {name})
    }
    if tools and "tools" not in words:
        unread["tools"] = _OF_MESSAGES
    content = messages[-1]["content"]
    if not content.strip() and "messages.tool_calls" in unread:
        raise DataError(["nothing is left of the answer: the model's chat template does not write 'tool_calls'"])
    if _squeezed(content) not in _squeezed(answer):
        unread["the answer in 'messages'"] = (
            "the model's chat template leaves out or changes a part of it, such as a <think> block"
        )
    return unread


_OF_MESSAGES = "the model's chat template does not write it"


@lru_cache(maxsize=8)
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", template))


def _squeezed(text: str) -> str:
    """Return the text without spaces, which templates strip and add."""
    return "".join(text.split())


# Advice


def _without(role: str) -> Callable[[Sequence[Message]], list[Message]]:
    return lambda messages: [message for message in messages if message["role"] != role]


def _joined(messages: Sequence[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n{message['content']}"}
        else:
            joined.append(message)
    return joined


#: Changes of a conversation that templates often ask for.
_REPAIRS: Mapping[str, Callable[[Sequence[Message]], list[Message]]] = {
    "write the text of the role 'system' into the first message of the role 'user'": _without("system"),
    "leave out messages of the role 'tool'": _without("tool"),
    "join neighbouring messages of one role": _joined,
}


def _advice(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> str:
    """Return the changes after which the template takes the messages, as the end of an error; "" if there are none."""

    def takes(messages: Sequence[Message]) -> bool:
        try:
            _written(tokenizer, messages[:-1], tools, add_generation_prompt=True)
            _written(tokenizer, messages, tools)
        except Exception:  # as in `prompt_and_answer`
            return False
        return True

    for advice, repair in _REPAIRS.items():
        if takes(repair(messages)):
            return f": {advice}"
    done: list[str] = []
    for advice, repair in _REPAIRS.items():
        repaired = repair(messages)
        if repaired != list(messages):
            messages, done = repaired, [*done, advice]
    return f": {', and '.join(done)}" if done and takes(messages) else ""
