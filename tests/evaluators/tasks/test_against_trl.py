"""All turns learnt, against TRL's `assistant_only_loss` on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from autopeft.evaluators.tasks.base import IGNORED
from autopeft.evaluators.tasks.causal_lm import CausalLM

from ...support.tiny_models import byte_tokenizer, seeded
from .test_chat import CALL, SYSTEM, TOOL, turns

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

CHAT = turns("a question", "an answer", "another question", "another answer\nof two lines", "q3", "a3")
SHORT = [SYSTEM, *turns("a question", "an answer", "and?", "no")]
CALLED = [
    *turns("a question"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "found"},
    *turns("", "an answer", "and?", "no")[1:],
]
#: Stock templates whose training variants in TRL write the same text and mark what follows the prompt for generation.
STOCK = (
    "cohere", "cohere2", "gemma", "gemma3", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "qwen3_instruct_2507",
    "qwen3_vl",
)  # fmt: skip
#: Templates with marks: of their own, or TRL's training variant of one that leaves reasoning out or has no end of turn.
MARKED = ("lfm2_2_5", "lfm2_2_5_v2", "qwen3_training", "glm4moe_training")


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    words = byte_tokenizer(["a question and an answer"], size=280)
    words.add_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"])
    words.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return words


def by_marks(name: str, messages: list[dict[str, Any]], **tools: Any) -> tuple[list[int], list[int]]:
    """The tokens, and the labels that TRL's collator makes of the marks."""
    whole = tokenizer(name).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False, **tools
    )
    pairs = zip(whole["input_ids"], whole["assistant_masks"], strict=True)
    return whole["input_ids"], [token if learnt else IGNORED for token, learnt in pairs]


def ours(name: str, messages: list[dict[str, Any]], **tools: Any) -> tuple[list[int], list[int]]:
    (example,) = CausalLM(tokenizer(name), 10_000, None).encode([{"messages": messages, "turns": "all", **tools}])
    assert "unread" not in example
    return example["input_ids"], example["labels"]


@pytest.mark.parametrize("name", STOCK)
def test_tokens_and_labels_are_those_of_trl(name):
    """TRL needs the template with marks; prefixes of the conversation find the same in the stock template."""
    for messages in (CHAT, SHORT[1:] if name == "gemma" else SHORT):  # Gemma refuses system prompts
        theirs = by_marks(f"{name}_training", messages)
        assert ours(name, messages) == theirs
        assert ours(f"{name}_training", messages) == theirs


@pytest.mark.parametrize("name", MARKED)
def test_marks_are_what_prefixes_find(name):
    for messages in (CHAT, SHORT):
        assert ours(name, messages) == by_marks(name, messages)


@pytest.mark.parametrize(("name", "trained"), [("lfm2_v2", "lfm2_v2_training"), ("qwen3_vl", "qwen3_vl_training")])
def test_calls_of_tools_are_learnt_as_in_trl(name, trained):
    tools = {"tools": [TOOL]}
    assert ours(name, CALLED, **tools) == by_marks(trained, CALLED, **tools)


@pytest.mark.slow
def test_the_loss_is_that_of_trl(tmp_path):
    """Of a batch of one row; TRL averages over the tokens of a batch, the task over rows."""
    words = tokenizer("llama3")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = seeded(LlamaForCausalLM, LlamaConfig(**shape, vocab_size=300, max_position_embeddings=1000))
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False,
            report_to="none", per_device_train_batch_size=1,
        ),
        train_dataset=Dataset.from_list([{"messages": CHAT}]),
        processing_class=words,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    own = CausalLM(tokenizer("llama3"), 1000, None)
    mine = own.collate(own.encode([{"messages": CHAT, "turns": "all"}]))
    assert torch.equal(batch["input_ids"], mine["input_ids"])
    assert torch.equal(batch["labels"], mine["targets"])
    with torch.no_grad():
        theirs = trainer.compute_loss(model.eval(), dict(batch))
        torch.testing.assert_close(own.scores(model, mine)["loss"][0], theirs)
