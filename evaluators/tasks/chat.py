"""The chat template, which writes the messages of a conversation as one text: its prompts, answers and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.errors import DataError, first_line
from autopeft.evaluators.tasks.conversations import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = (
    "rows with 'messages' need a chat template, but the model's tokenizer has none: use the model's variant for chats,"
    " or rows with a prompt and a completion"
)
#: Names of one field, which transformers gives to templates under each of them.
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
#: Characters of a text in a message.
_SHOWN = 20


# Texts


def prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> tuple[str, str]:
    """Return the text that asks for the answer (the last message), and the text of the answer.

    Chat templates seldom mark the answers (`{% generation %}`), so the answer is what the template writes after the
    prompt for generation. Raises DataError if the template refuses the messages, or writes the prompt otherwise when
    the answer follows.
    """
    prompt, whole = prompt_and_whole(tokenizer, messages, tools)
    if not whole.startswith(prompt):
        raise DataError([first_change(prompt, whole)])
    return prompt, whole[len(prompt) :]


def prompt_and_whole(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> tuple[str, str]:
    """Return the text that asks for the last message, and that of all messages.

    Raises DataError if there is no template, or if it refuses the messages.
    """
    with _refusals(tokenizer, messages, tools):
        prompt = written(tokenizer, messages[:-1], tools, add_generation_prompt=True)
        return prompt, written(tokenizer, messages, tools)


def whole_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> str:
    """Return the text of all messages. Raises DataError as `prompt_and_whole` does."""
    with _refusals(tokenizer, messages, tools):
        return written(tokenizer, messages, tools)


@contextmanager
def _refusals(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> Iterator[None]:
    if tokenizer.chat_template is None:
        raise DataError([NO_TEMPLATE])
    try:
        yield
    except Exception as error:  # a template may raise any exception: a refusal, a missing field, a wrong type
        advice = _advice(tokenizer, messages, tools)
        raise DataError([f"the model's chat template refuses the messages: {first_line(error)}{advice}"]) from error


def first_change(prompt: str, whole: str) -> str:
    """Return the problem of a text that does not begin with its prompt."""
    same = next(i for i, letter in enumerate(prompt) if whole[i : i + 1] != letter)
    return (
        f"the model's chat template changes the text before the last message when it follows:"
        f" {prompt[same : same + _SHOWN]!r} is no longer there, so the answer cannot be cut off: use rows with a"
        " prompt and a completion, or a chat template that only appends"
    )


def written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of messages. A template may raise any exception."""
    text = tokenizer.apply_chat_template(
        list(messages),
        tools=None if tools is None else list(tools),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text


# Parts that are not read


def unread_parts(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    answer: str,
) -> dict[str, str]:
    """Return the parts of messages that the chat template leaves out, each with what to do about it.

    `answer`: the text of the last message as the template wrote it. Raises DataError if nothing of it is left.
    """
    words = template_words(tokenizer, tools)
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


def template_words(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] | None) -> frozenset[str]:
    """Return the words of the chat template, among them the names of all fields and roles that it treats.

    Raises DataError if there is no template.
    """
    if tokenizer.chat_template is None:
        raise DataError([NO_TEMPLATE])
    return _words(str(tokenizer.get_chat_template(tools=None if tools is None else list(tools))))


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
            written(tokenizer, messages[:-1], tools, add_generation_prompt=True)
            written(tokenizer, messages, tools)
        except Exception:  # as in `_refusals`
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
