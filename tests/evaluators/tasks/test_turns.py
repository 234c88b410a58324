"""Which tokens of a conversation are learnt if all turns of the assistant are."""

from __future__ import annotations

from typing import Any

import pytest

from autopeft.evaluators.errors import DataError
from autopeft.evaluators.tasks import Example
from autopeft.evaluators.tasks.base import IGNORED
from autopeft.evaluators.tasks.causal_lm import CausalLM
from autopeft.evaluators.tasks.turns import learnt_tokens, learnt_turns

from ...support.chat_templates import EARLY_MISTRAL, GEMMA, LLAMA, MARKED, MISTRAL, PHI, QWEN, R1
from ...support.tiny_models import byte_tokenizer
from .test_chat import CALL, CALLED, SYSTEM, THOUGHT, TOOL, TWO, tokenizer, turns

LEFT_OUT = "a whole answer in 'messages'"


def encoded(template: str | None, messages: list[dict[str, Any]], max_length: int = 500, **row: Any) -> Example:
    (example,) = CausalLM(tokenizer(template), max_length, None).encode([{"messages": messages, "turns": "all", **row}])
    return example


def marked(example: Example) -> str:
    """The text of an example, with what is learnt in brackets."""
    words, text, was_learnt = tokenizer(None), "", False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token)
        learnt = label != IGNORED
        text += ("[" if learnt else "]") if learnt != was_learnt else ""
        text, was_learnt = text + words.decode([token]), learnt
    return text + ("]" if was_learnt else "")


# Styles of templates


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (LLAMA, [SYSTEM, *TWO],
         "<s><|system|>be short</s><|user|>q1</s><|assistant|>[a1</s>]<|user|>q2</s><|assistant|>[a2</s>]"),
        (GEMMA, TWO, "<s><|user|>q1<|end|><|model|>[a1<|end|>]<|user|>q2<|end|><|model|>[a2<|end|>]"),
        # A system prompt in the last turn: the answers stay, though what precedes them does not.
        (MISTRAL, [SYSTEM, *TWO], "<s>[INST]q1[/INST][ a1</s>][INST]be short q2[/INST][ a2</s>]"),
        (EARLY_MISTRAL, TWO, "<s>[INST]q1[/INST][ a1</s>][INST]q2[/INST][ a2</s>]"),
        # The end-of-text token follows the last message alone.
        (PHI, TWO, "<|user|>q1<|end|><|assistant|>[a1<|end|>]<|user|>q2<|end|><|assistant|>[a2<|end|></s>]"),
        # Neighbouring answers, and a question that has none.
        (LLAMA, [*TWO[:2], *turns("", "more")[1:], *turns("q2")],
         "<s><|user|>q1</s><|assistant|>[a1</s>]<|assistant|>[more</s>]<|user|>q2</s>"),
        # Calls of tools are answers, their results are not.
        (LLAMA, CALLED, '<s><|user|>q</s><|assistant|>[{"name": "look", "arguments": {"at": "x"}}</s>]'
         "<|ipython|>found</s><|assistant|>[a</s>]"),
    ],
)  # fmt: skip
def test_every_answer_is_learnt_with_its_end(template, messages, text):
    example = encoded(template, messages)
    assert marked(example) == text
    assert "unread" not in example


def test_one_answer_is_learnt_as_the_last_one_alone():
    for template in (LLAMA, GEMMA, MISTRAL, QWEN, PHI):
        words = tokenizer(template)
        for messages in (TWO[:2], turns("q", " a "), turns("q1 question\n", "\nan answer")):
            row = {"messages": messages}
            assert CausalLM(words, 500, None).encode([{**row, "turns": "all"}]) == CausalLM(words, 500, None).encode(
                [row]
            )


def test_answers_that_lose_their_reasoning_later_are_not_learnt():
    """Learnt without it, they would teach answers without reasoning."""
    example = encoded(QWEN, THOUGHT)
    assert marked(example) == (
        "<|user|>\nq1</s><|assistant|>\na1</s><|user|>\nq2</s><|assistant|>\n[<think>\nt2\n</think>\n\na2</s>]"
    )
    assert "it is not learnt" in example["unread"][LEFT_OUT]
    # All steps after the last question keep theirs.
    steps = [
        *turns("q"),
        {"role": "assistant", "content": "c", "reasoning_content": "t1"},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "a", "reasoning_content": "t2"},
    ]
    example = encoded(QWEN, steps)
    assert marked(example) == (
        "<|user|>\nq</s><|assistant|>\n[<think>\nt1\n</think>\n\nc</s>]<|tool|>\nfound</s>"
        "<|assistant|>\n[<think>\nt2\n</think>\n\na</s>]"
    )
    assert "unread" not in example


def test_the_first_message_answers_nothing():
    example = encoded(LLAMA, [*turns("", "hello")[1:], *TWO])
    assert marked(example).startswith("<s><|assistant|>hello</s><|user|>q1</s><|assistant|>[a1</s>]")
    assert example["unread"].keys() == {"the first message, an answer,"}


def test_marks_of_the_template_are_what_is_found_without_them():
    for messages in (TWO, [SYSTEM, *TWO], turns("q", "a"), [*TWO, *turns("q3")]):
        words = tokenizer(MARKED)
        whole = words.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = encoded(MARKED, messages)
        assert example["input_ids"] == whole["input_ids"]
        assert [int(label != IGNORED) for label in example["labels"]] == whole["assistant_masks"]


# Tokens


def test_a_token_may_not_reach_from_the_prompt_into_the_answer():
    """Texts are tokenised as a whole; a prompt and its answer apart from each other where a token would join them."""
    words = byte_tokenizer(["q: a1 q: a2 "] * 9, size=270)
    words.chat_template = (
        "{% for m in messages %}{{ 'q:' if m.role == 'user' else '' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    messages = turns(" ", "a1 ", " ", "a2")
    (example,) = CausalLM(words, 50, None).encode([{"messages": messages, "turns": "all"}])
    assert len(words("q: a1 q: a2", add_special_tokens=False)["input_ids"]) < len(example["input_ids"])
    assert words.decode([label for label in example["labels"] if label != IGNORED]) == "a1 a2"
    assert words.decode(example["input_ids"]) == "q: a1 q: a2"


class _Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, words: Any) -> None:
        self.words = words

    def __getattr__(self, name: str) -> Any:
        return getattr(self.words, name)

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        assert not settings.get("return_offsets_mapping")
        return self.words(texts, **settings)


def test_tokenizers_without_offsets():
    row = {"messages": TWO, "turns": "all"}
    (example,) = CausalLM(_Slow(tokenizer(LLAMA)), 500, None).encode([row])
    assert example == encoded(LLAMA, TWO)


def test_learnt_tokens_are_those_of_the_spans():
    offsets = [(0, 2), (2, 5), (5, 5), (5, 9), (9, 10)]
    assert learnt_tokens(offsets, [(2, 5), (9, 10)]) == [False, True, False, False, True]
    assert learnt_tokens(offsets, [(2, 7)]) == [False, True, True, True, False]
    assert learnt_tokens(offsets, [(3, 9)]) is None


# max_length


def test_a_long_conversation_loses_its_end():
    whole = encoded(LLAMA, TWO)
    n = len(whole["input_ids"])
    example = encoded(LLAMA, TWO, max_length=n - 3)
    assert example["input_ids"] == whole["input_ids"][:-3]
    assert (example["cut"].prompt, example["cut"].text, example["cut"].learnt) == (0, 3, 3)
    assert not example["cut"].no_prompt


def test_what_precedes_the_first_answer_loses_its_beginning_if_the_answer_would_be_cut():
    whole = encoded(LLAMA, turns("question " * 9, "answer", "q2", "a2"))
    first = whole["labels"].index(next(label for label in whole["labels"] if label != IGNORED))
    length = len(tokenizer(None)("answer</s>", add_special_tokens=False)["input_ids"])
    example = encoded(LLAMA, turns("question " * 9, "answer", "q2", "a2"), max_length=first + length - 5)
    assert example["input_ids"] == whole["input_ids"][5 : first + length]
    assert (example["cut"].prompt, example["cut"].no_prompt) == (5, False)
    assert "[answer</s>]" in marked(example)
    example = encoded(LLAMA, turns("question", "a long answer to it"), max_length=4)
    assert example["cut"].no_prompt
    with pytest.raises(DataError, match=r"data\.max_length: 1 is too short: no token is left to predict"):
        encoded(LLAMA, TWO, max_length=1)


def test_a_shortened_conversation_ends_with_what_is_learnt():
    words = tokenizer(LLAMA)
    own = CausalLM(words, 500, None)
    short = own.shortened(encoded(LLAMA, [*TWO, *turns("a question without an answer")]), 8)
    assert marked(short).endswith("[a2</s>]")
    assert own.length(short) == len(short["labels"]) == 8


# Refusals

CHANGES = "the model's chat template changes the text before the last message when it follows: "


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (None, TWO, "rows with 'messages' need a chat template, but the model's tokenizer has none"),
        (GEMMA, [SYSTEM, *TWO], "the model's chat template refuses the messages: System role not supported: write the"),
        (GEMMA, [*TWO[:2], *TWO[1:]], "the model's chat template refuses the messages: Conversation roles must altern"),
        (EARLY_MISTRAL, [SYSTEM, *TWO], f"{CHANGES}'be short q2[/INST]' is no longer there"),
        (R1, THOUGHT, f"{CHANGES}'<think>\\n' is no longer there"),
        (QWEN, [*TWO, *turns("", "a3")[1:]], f"{CHANGES}'<think>\\n\\n</think>\\n\\na' is no longer there"),
        (LLAMA, [*TWO, {"role": "gpt", "content": "a"}], "the role 'gpt' is called 'assistant' in chat templates: re"),
        (LLAMA, [{"role": "narrator", "content": "a"}, *TWO], "unknown role 'narrator': the roles are system, user,"),
        ("{{ messages | length }}", TWO, f"{CHANGES}'3' is no longer there"),
        ("{{ messages[-1].role }}{{ add_generation_prompt }}", TWO, CHANGES),
        # As templates for texts and images do.
        ("{% for m in messages %}<|{{ m.role }}|></s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{%endif%}",
         TWO, "nothing is left of the answer: the model's chat template does not write texts"),
        ("{{ bos_token }}{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", TWO,
         "no answer is left to learn: the model's chat template writes none as it is asked"),
        (GEMMA, [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
         "nothing is left of the answer: the model's chat template does not write 'tool_calls'"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_learnt(template, messages, problem):
    with pytest.raises(DataError) as error:
        encoded(template, messages)
    (found,) = error.value.problems
    assert found.startswith(problem)


def test_a_role_that_the_template_names_is_known():
    named = LLAMA.replace("m.role == 'tool'", "m.role in ('tool', 'narrator')")
    assert "<|ipython|>it rains</s>" in marked(encoded(named, [{"role": "narrator", "content": "it rains"}, *TWO]))


def test_a_template_that_reverses_the_conversation():
    newest_first = (
        "{% for m in messages[::-1] %}{{ '[A]' if m.role == 'assistant' else '[Q]' }}{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(DataError, match="changes the text before the last message when it follows"):
        encoded(newest_first, TWO)
    # System prompts that move to the front change nothing of the answers.
    to_the_front = (
        "{% for m in messages if m.role == 'system' %}{{ m.content }}</s>{% endfor %}"
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert marked(encoded(to_the_front, [*TWO[:2], SYSTEM, *TWO[2:]])) == (
        "be short</s><|user|>q1</s><|assistant|>[a1</s>]<|user|>q2</s><|assistant|>[a2</s>]"
    )


def test_a_template_that_writes_no_end_of_turn():
    endless = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    example = encoded(endless, TWO)
    assert marked(example) == "<|user|>q1<|assistant|>[a1]<|user|>q2<|assistant|>[a2]"
    assert example["unread"].keys() == {"the end of an answer"}


def test_parts_that_no_answer_has_are_named():
    told = [
        *turns("q1"),
        {"role": "assistant", "content": "unsaid", "tool_calls": [CALL], "weight": 1},
        *turns("q2", "a2"),
    ]
    found = learnt_turns(tokenizer(LLAMA), told, [TOOL])
    assert found.unread.keys() == {"messages.weight", "the answer in 'messages'"}
