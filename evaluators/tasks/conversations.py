"""Conversations and instructions as files have them: OpenAI's messages, ShareGPT's, and the columns of Alpaca."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autopeft.evaluators.rows import DataConfig, Row, text_of

Message = dict[str, Any]

ASSISTANT = "assistant"
#: The column that ShareGPT's rows have in place of `messages`.
SHAREGPT = "conversations"
#: ShareGPT's `from` by role; `function_call` is an assistant's call, whose value is JSON.
_FROM = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "function_call": ASSISTANT,
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
#: Columns of Alpaca's rows: what to do, and the answer.
_ALPACA = ("instruction", "output")
_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
_WITH_INPUT = ", paired with an input that provides further context"


def column_of(row: Row, data: DataConfig) -> str | None:
    """Return the column of a row's conversation, if it has one."""
    return next((name for name in (data.messages, SHAREGPT) if name in row), None)


def system_column(row: Row, data: DataConfig) -> str | None:
    """Return the column that may have a row's system prompt: `data.system` or, in formats that define it, `system`."""
    return data.system or ("system" if data.messages not in row or data.messages == SHAREGPT else None)


def is_alpaca(row: Row) -> bool:
    """Return whether a row has Alpaca's columns."""
    return all(name in row for name in _ALPACA)


def alpaca_of(row: Row, data: DataConfig) -> Row:
    """Return prompt and completion of a row with Alpaca's columns, in Alpaca's template as Axolotl writes it.

    Stanford's own has no line break after "### Response:". A system prompt stands in place of the first sentences.
    Raises ValueError.
    """
    system, has_input = system_column(row, data), bool(str(row.get("input", "")).strip())
    preamble = (
        text_of(row, system) if system and row.get(system) else _PREAMBLE.format(_WITH_INPUT if has_input else "")
    )
    parts = [preamble, f"### Instruction:\n{text_of(row, 'instruction')}"]
    parts += [f"### Input:\n{text_of(row, 'input')}"] if has_input else []
    return {"prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": text_of(row, "output")}


def conversation_of(row: Row, column: str, data: DataConfig) -> Row:
    """Return `messages`, `tools` if the row has some, and `turns` if all turns are learnt. Raises ValueError.

    `column`: of a list of OpenAI's messages (`role`, `content`) or of ShareGPT's (`from`, `value`).
    """
    messages = messages_of(row[column], column)
    (_check_all_turns if data.train_on_turns == "all" else _check_last_turn)(messages, column)
    prompt = system_column(row, data)
    if prompt and row.get(prompt):
        if messages[0]["role"] == "system":
            raise ValueError(f"has two system prompts, in {prompt!r} and as the first of {column!r}: remove one")
        messages = [{"role": "system", "content": text_of(row, prompt)}, *messages]
    return {
        "messages": messages,
        **({"tools": tools_of(row["tools"])} if row.get("tools") else {}),
        # A row without the mark is of a study before there was a choice, or of one that chose so.
        **({"turns": "all"} if data.train_on_turns == "all" else {}),
    }


def answers(messages: Sequence[Message]) -> list[int]:
    """Return the positions of the assistant's messages that answer an earlier message."""
    return [i for i, message in enumerate(messages) if i and message["role"] == ASSISTANT]


def messages_of(value: Any, column: str = "messages") -> list[Message]:
    """Return messages whose content is a text, with all other fields of theirs. Raises ValueError."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{column!r} must be a list of objects with 'role' and 'content'")
    messages = []
    for number, message in enumerate(value):
        # Parquet gives every message the fields of all messages.
        message = {name: entry for name, entry in message.items() if entry is not None}
        if "from" in message and "role" not in message:
            message = _from_sharegpt(message, number)
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"message {number}: 'tool_calls' must be a list of objects")
        content = message.get("content", "" if calls else None)
        content = _joined_parts(content, number) if isinstance(content, list) else content
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise ValueError(f"message {number}: 'role' and 'content' must be texts")
        messages.append({"role": message.pop("role"), **message, "content": content})
    return messages


def _from_sharegpt(message: Mapping[str, Any], number: int) -> Message:
    sender, value = message["from"], message.get("value")
    role = _FROM.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise ValueError(f"message {number}: unknown 'from' {sender!r:.40}: known are {', '.join(_FROM)}")
    others = {name: entry for name, entry in message.items() if name not in ("from", "value")}
    if sender != "function_call":
        return {"role": role, **others, "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"message {number}: the value of 'function_call' is not valid JSON: {error.msg}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"message {number}: the value of 'function_call' must have 'name' and 'arguments'")
    return {"role": role, **others, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _joined_parts(parts: list[Any], number: int) -> str:
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"message {number}: its content has a part of the type {kind!r}, but only texts are read")
        texts.append(part["text"])
    return "".join(texts)


def _check_last_turn(messages: Sequence[Message], column: str) -> None:
    if len(messages) < 2 or messages[-1]["role"] != ASSISTANT:
        raise ValueError(f"{column!r} must end with a message of the role 'assistant' that answers an earlier message")
    if _is_empty(messages[-1]):
        raise ValueError("the last message, the answer to learn, is empty")


def _check_all_turns(messages: Sequence[Message], column: str) -> None:
    learnt = answers(messages)
    if not learnt:
        raise ValueError(f"{column!r} must have a message of the role 'assistant' that answers an earlier message")
    empty = [str(i) for i in learnt if _is_empty(messages[i])]
    if empty:
        names = f"message{'s' if empty[1:] else ''} {', '.join(empty)}"
        raise ValueError(f"{names}: an answer to learn is empty: remove it, or the row")


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


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
