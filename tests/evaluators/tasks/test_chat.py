"""Conversations: what is read of them, and what chat templates in the styles of model families make of them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import DataConfig
from autopeft.evaluators.tasks import Example
from autopeft.evaluators.tasks.base import IGNORED
from autopeft.evaluators.tasks.causal_lm import CausalLM

from ...support.chat_templates import EARLY_MISTRAL, GEMMA, LLAMA, MISTRAL, QWEN, R1
from ...support.tiny_models import byte_tokenizer

SYSTEM = {"role": "system", "content": "be short"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    words = byte_tokenizer(["a question and an answer"], size=270)
    words.chat_template = template
    return words


def encoded(template: str | None, messages: list[dict[str, Any]], **row: Any) -> Example:
    (example,) = CausalLM(tokenizer(template), 500, None).encode([{"messages": messages, **row}])
    return example


def texts(template: str, messages: list[dict[str, Any]], **row: Any) -> tuple[str, str]:
    """The text without a loss, and the text with one."""
    words, example = tokenizer(template), encoded(template, messages, **row)
    assert "cut" not in example
    learnt = [label for label in example["labels"] if label != IGNORED]
    assert example["labels"] == [*[IGNORED] * (len(example["labels"]) - len(learnt)), *learnt]
    assert example["input_ids"][-len(learnt) :] == learnt
    return words.decode(example["input_ids"][: -len(learnt)]), words.decode(learnt)


# Styles

TWO = turns("q1", "a1", "q2", "a2")
THOUGHT = turns("q1", "<think>\nt1\n</think>\n\na1", "q2", "<think>\nt2\n</think>\n\na2")


@pytest.mark.parametrize(
    ("template", "messages", "prompt", "answer"),
    [
        (LLAMA, [SYSTEM, *TWO], "<s><|system|>be short</s><|user|>q1</s><|assistant|>a1</s><|user|>q2</s><|assistant|>",
         "a2</s>"),
        (LLAMA, [*turns("q1", "a1"), *turns("q2"), *turns("q3", " a3 ")],
         "<s><|user|>q1</s><|assistant|>a1</s><|user|>q2</s><|user|>q3</s><|assistant|>", "a3</s>"),
        (QWEN, [SYSTEM, *TWO],
         "<|system|>\nbe short</s><|user|>\nq1</s><|assistant|>\na1</s><|user|>\nq2</s><|assistant|>\n",
         "<think>\n\n</think>\n\na2</s>"),
        (QWEN, THOUGHT, "<|user|>\nq1</s><|assistant|>\na1</s><|user|>\nq2</s><|assistant|>\n",
         "<think>\nt2\n</think>\n\na2</s>"),
        (GEMMA, TWO, "<s><|user|>q1<|end|><|model|>a1<|end|><|user|>q2<|end|><|model|>", "a2<|end|>"),
        (MISTRAL, [SYSTEM, *TWO], "<s>[INST]q1[/INST] a1</s>[INST]be short q2[/INST]", " a2</s>"),
    ],
)  # fmt: skip
def test_the_answer_alone_is_learnt(template, messages, prompt, answer):
    assert "generation" not in template.replace("add_generation_prompt", ""), "no template marks the answers"
    assert texts(template, messages) == (prompt, answer)
    assert "unread" not in encoded(template, messages)


REFUSES = "the model's chat template refuses the messages: "
NO_SYSTEM = "System role not supported: write the text of the role 'system' into the first message of the role 'user'"
ALTERNATE = "Conversation roles must alternate: "
JOIN = "join neighbouring messages of one role"
CHANGES = "the model's chat template changes the text before the last message when it follows: "
CALLED = [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "found"},
          *turns("", "a")[1:]]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (None, TWO, "rows with 'messages' need a chat template, but the model's tokenizer has none: use the model's"),
        (GEMMA, [SYSTEM, *TWO], f"{REFUSES}{NO_SYSTEM}"),
        (GEMMA, [*turns("q1"), *turns("q2", "a2")], f"{REFUSES}{ALTERNATE}{JOIN}"),
        (MISTRAL, [SYSTEM, *turns("q1"), *TWO], f"{REFUSES}{ALTERNATE}{JOIN}"),
        (GEMMA, [SYSTEM, *turns("q1"), *TWO], f"{REFUSES}{NO_SYSTEM}, and {JOIN}"),
        (MISTRAL, CALLED, f"{REFUSES}{ALTERNATE}leave out messages of the role 'tool', and {JOIN}"),
        ("{{ messages[0].content + 1 }}", TWO, f"{REFUSES}can only concatenate str"),
        (
            EARLY_MISTRAL,
            [SYSTEM, *TWO],
            f"{CHANGES}'be short q2[/INST]' is no longer there, so the answer cannot be cut",
        ),
        (R1, THOUGHT, f"{CHANGES}'<think>\\n' is no longer there"),
        (QWEN, [*TWO, *turns("", "a3")[1:]], f"{CHANGES}'<think>\\n\\n</think>\\n\\na' is no longer there"),
    ],
)
def test_templates_that_cannot_be_used(template, messages, problem):
    with pytest.raises(DataError) as error:
        encoded(template, messages)
    (found,) = error.value.problems
    assert found.startswith(problem)


# Parts of messages


def test_calls_of_tools_are_learnt():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    prompt, answer = texts(LLAMA, [*turns("q"), call], tools=[TOOL])
    written = '[{"type": "function", "function": {"name": "look", "parameters": {}}}]'
    assert prompt == f"<s><|system|>{written}</s><|user|>q</s><|assistant|>"
    assert answer == '{"name": "look", "arguments": {"at": "x"}}</s>'
    assert texts(LLAMA, CALLED)[0].endswith('"x"}}</s><|ipython|>found</s><|assistant|>')
    assert "unread" not in encoded(LLAMA, CALLED, tools=[TOOL])


def test_what_a_template_leaves_out_is_named():
    told = [*turns("q"), {"role": "assistant", "content": "unsaid", "tool_calls": [CALL], "weight": 1, "name": ""}]
    advice = "the model's chat template does not write it"
    assert encoded(GEMMA, told, tools=[TOOL])["unread"] == {
        "messages.tool_calls": advice, "messages.weight": advice, "tools": advice,
    }  # fmt: skip
    assert encoded(LLAMA, told, tools=[TOOL])["unread"].keys() == {"messages.weight", "the answer in 'messages'"}
    silent = [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="nothing is left of the answer: the model's chat template does not write"):
        encoded(GEMMA, silent)


def test_reasoning_that_a_template_leaves_out_of_the_answer():
    without_prompt = R1.replace("<think>\\n' }}", "' }}")
    example = encoded(without_prompt, THOUGHT)
    (advice,) = example["unread"].values()
    assert advice == "the model's chat template leaves out or changes a part of it, such as a <think> block"
    assert "unread" not in encoded(without_prompt, TWO)


def test_reasoning_in_a_field_of_its_own_under_any_of_its_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        told = [*turns("q"), {"role": "assistant", "content": "a", name: "t"}]
        assert texts(QWEN, told)[1] == "<think>\nt\n</think>\n\na</s>"
        assert "unread" not in encoded(QWEN, told)
        assert encoded(LLAMA, told)["unread"].keys() == {f"messages.{name}"}


def read(**row: Any) -> Any:
    return CausalLM.row(row, DataConfig(train_on_turns="last"))


def test_contents_of_several_parts():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}, " three"]
    assert read(messages=[{"role": "user", "content": parts}, *turns("", "a")[1:]])["messages"][0] == {
        "role": "user", "content": "one two three",
    }  # fmt: skip
    parts = [{"type": "image", "url": "x"}]
    with pytest.raises(ValueError, match="message 0: its content has a part of the type 'image', but only texts are"):
        read(messages=[{"role": "user", "content": parts}, *turns("", "a")[1:]])


def test_fields_of_parquet_and_of_openai():
    """Parquet gives every message all fields; OpenAI's calls of tools have no content."""
    told = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    assert read(messages=told, tools='[{"type": "function"}]') == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [{"type": "function"}],
    }


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": turns("q", " ")}, "the last message, the answer to learn, is empty"),
        ({"messages": [*turns("q"), {"role": "assistant", "content": "", "tool_calls": []}]}, "the last message, the"),
        ({"messages": [*turns("q"), {"role": "assistant", "tool_calls": "x"}]}, "1: 'tool_calls' must be a list"),
        ({"messages": TWO, "tools": "look"}, "'tools' is not valid JSON: Expecting value"),
        ({"messages": TWO, "tools": ["look"]}, "'tools' must be a list of JSON schemas, one object per tool"),
    ],
)  # fmt: skip
def test_bad_messages(row, problem):
    with pytest.raises(ValueError, match=problem):
        read(**row)
