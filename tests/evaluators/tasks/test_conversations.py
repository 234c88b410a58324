"""Formats of conversations and instructions: what is read of them as messages, or as prompt and completion."""

from __future__ import annotations

from typing import Any

import pytest

from autopeft.evaluators.rows import DataConfig
from autopeft.evaluators.tasks.causal_lm import CausalLM

from .test_chat import CALL, SYSTEM, TWO, turns

SHAREGPT = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]


def read(row: dict[str, Any], **settings: Any) -> Any:
    return CausalLM.row(row, DataConfig(**settings))


def unread(row: dict[str, Any], **settings: Any) -> Any:
    return CausalLM.unread(row, DataConfig(**settings))


def test_conversations_of_sharegpt_are_messages():
    told = [{"from": "system", "value": "be short"}, *SHAREGPT, {"from": "user", "value": "q2", "weight": None}]
    assert read({"conversations": told}) == {"messages": [SYSTEM, *turns("q1", "a1", "q2")], "turns": "all"}
    assert read({"conversations": SHAREGPT, "system": "be short"})["messages"] == [SYSTEM, *turns("q1", "a1")]
    assert read({"messages": SHAREGPT}) == read({"conversations": SHAREGPT})
    assert unread({"conversations": SHAREGPT, "system": "be short", "history": ["x"]}).keys() == {"history"}


def test_calls_of_tools_in_sharegpt():
    """In the names of LLaMA-Factory."""
    call = '{"name": "look", "arguments": {"at": "x"}}'
    told = [
        SHAREGPT[0],
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "a1"},
    ]
    assert read({"conversations": told, "tools": '[{"name": "look"}]'}) == {
        "messages": [
            *turns("q1"),
            {"role": "assistant", "tool_calls": [CALL], "content": ""},
            {"role": "tool", "content": "found"},
            *turns("", "a1")[1:],
        ],
        "tools": [{"name": "look"}],
        "turns": "all",
    }


def test_a_column_of_another_name_has_the_messages():
    assert read({"chat": TWO, "text": "x"}, messages="chat")["messages"] == TWO
    assert read({"chat": SHAREGPT}, messages="chat")["messages"] == turns("q1", "a1")
    with pytest.raises(ValueError, match="'chat' must be a list of objects"):
        read({"chat": "q"}, messages="chat")


def test_a_column_has_the_system_prompt():
    row = {"messages": TWO, "rules": "be short"}
    assert read(row, system="rules")["messages"] == [SYSTEM, *TWO]
    assert read({"messages": TWO}, system="rules")["messages"] == TWO
    with pytest.raises(ValueError, match="has two system prompts, in 'rules' and as the first of 'messages': remove"):
        read({"messages": [SYSTEM, *TWO], "rules": "be long"}, system="rules")
    # Rows with `messages` define no column for it, so it must be named.
    assert unread({"messages": TWO, "system": "be short"}) == {
        "system": "name the column of the system prompt in data.system"
    }
    assert unread({"messages": TWO, "system": "be short"}, system="system") == {}
    asked = {"prompt": "q", "completion": "a", "rules": "be short"}
    assert unread(asked, system="rules") == {"rules": "make rows with 'messages'"}
    assert unread({"text": "t", "rules": "be short"}, system="rules") == {"rules": "make rows with 'messages'"}


START = "Below is an instruction that describes a task"
END = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


def test_rows_of_alpaca_have_their_input():
    """The template as Axolotl's type `alpaca` writes it."""
    row = {"instruction": "add", "input": "1 and 2", "output": "3"}
    assert read(row) == {
        "prompt": f"{START}, paired with an input that provides further context. {END}add\n\n### Input:\n1 and 2\n\n"
        "### Response:\n",
        "completion": "3",
    }
    assert read({**row, "input": " "})["prompt"] == f"{START}. {END}add\n\n### Response:\n"
    assert read({"instruction": "add", "output": "3", "system": "be short"})["prompt"] == (
        "be short\n\n### Instruction:\nadd\n\n### Response:\n"
    )
    assert unread(row) == {}
    assert unread({**row, "history": [["a", "b"]]}).keys() == {"history"}


def test_columns_that_are_named_are_read_as_they_are():
    """So studies of before go on; what they leave unread is said."""
    row = {"instruction": "add", "input": "1 and 2", "output": "3"}
    named = {"prompt": "instruction", "completion": "output"}
    assert read(row, **named) == {"prompt": "add", "completion": "3"}
    assert unread(row, **named) == {"input": "leave out data.prompt and data.completion, and Alpaca's template has it"}
    assert read({"text": "t", "conversations": SHAREGPT}) == {"text": "t"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]},
         "message 0: unknown 'from' 'narrator': known are human, user, gpt"),
        ({"conversations": [{"from": "human"}]}, "message 0: 'role' and 'content' must be texts"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "look"}]},
         "message 1: the value of 'function_call' is not valid JSON"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "1"}]}, "must have 'name' and 'arguments'"),
        ({"conversations": SHAREGPT[:1]}, "'conversations' must have a message of the role 'assistant' that answers"),
        ({"messages": []}, "'messages' must have a message of the role 'assistant' that answers an earlier message"),
        ({"messages": turns("", "hello")[1:]}, "must have a message of the role 'assistant' that answers an earlier"),
        ({"messages": turns("q1", " ", "q2", "a", "q3", "")}, "messages 1, 5: an answer to learn is empty: remove it"),
        ({"messages": turns("q1", "", "q2", "a")}, "message 1: an answer to learn is empty"),
        ({"instruction": "add", "input": 3, "output": "3"}, "field 'input' must be a non-empty text, got 3"),
        ({"question": "q", "answer": "a"}, "set data.prompt: question and data.completion: answer"),
        ({"dialog": TWO}, "needs the fields 'prompt' and 'completion', or 'messages', or 'text'"),
    ],
)  # fmt: skip
def test_bad_rows(row, problem):
    with pytest.raises(ValueError, match=problem):
        read(row)


def test_the_last_turn_alone_is_checked_as_before():
    assert read({"messages": turns("q1", "", "q2", "a")}, train_on_turns="last") == {
        "messages": turns("q1", "", "q2", "a")
    }
    with pytest.raises(ValueError, match="'messages' must end with a message of the role 'assistant'"):
        read({"messages": [*TWO, *turns("q3")]}, train_on_turns="last")
