"""Rows as a model reads them: each problem at its line, and each loss counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.backbones import load_backbone, load_processor, skeleton
from autopeft.evaluators.data import encoding
from autopeft.evaluators.data.encoding import Encoded, encode_splits
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import DataConfig
from autopeft.evaluators.tasks import TASKS, Example, Task
from autopeft.evaluators.training.train import TrainEvaluator

from ...support.chat_templates import GEMMA, LLAMA
from ...support.tiny_models import byte_tokenizer, save, seeded
from ...support.tiny_study import save_model

FILES = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
LABELS = ("cold", "hot")


def write(folder: Path, **rows: list[Any]) -> None:
    """Files of these splits; the others have the rows of `train`."""
    for split, file in FILES.items():
        found = rows.get(split, rows["train"])
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in found))


def splits_of(folder: Path, task: str, **settings: Any) -> Splits:
    return load_splits(DataConfig(source="files", folder=folder, **FILES, **settings), task)


def encode(folder: Path, splits: Splits, task: str, max_length: int = 16, template: str | None = None) -> Encoded:
    if task == "classification":
        model = str(save_model(folder / "model"))
    else:
        words = byte_tokenizer(["w1 w2 w3 cold hot is "], size=280)
        words.chat_template = template
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        config = LlamaConfig(**size, vocab_size=280, max_position_embeddings=256)
        model = save(seeded(LlamaForCausalLM, config), folder / "model", words)
    kind = TASKS[task].for_rows(splits.train)
    own = kind(load_processor(model, task), max_length, splits.labels, splits.domains)
    return encode_splits(own, splits, skeleton(model, None, task, splits.labels))


def problems(*arguments: Any, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        encode(*arguments, **settings)
    return list(error.value.problems)


def texts(*texts: str) -> list[dict[str, str]]:
    return [{"text": text, "label": LABELS[i % 2]} for i, text in enumerate(texts)]


# Problems


def test_half_of_a_character_is_found_before_a_tokenizer_dies_of_it(tmp_path):
    half = "a text was cut inside an emoji or the like; remove the half or restore the character"
    write(
        tmp_path,
        train=[*texts("w1", "w2"), {"text": "w1 w2 w3 \ud83d w4", "label": "hot"}],
        validation=texts("w3", "w4"),
        test=[{"text": "w5 \ud83d\ude00", "label": "hot\udc00"}],
    )
    with pytest.raises(DataError) as error:
        splits_of(tmp_path, "classification")
    assert error.value.problems == (
        f"train.jsonl:3: has half of a character, '\\ud83d' after 'w1 w2 w3 ': {half}",
        f"test.jsonl:1: has half of a character, '\\udc00' after 'hot': {half}",
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\ud83d"}]
    write(tmp_path, train=[{"messages": chat}])
    with pytest.raises(DataError, match=r"train.jsonl:1: has half of a character, '\\ud83d' after 'a'"):
        splits_of(tmp_path, "causal-lm")


def chats(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]}


def test_every_row_that_a_template_refuses_has_its_line(tmp_path):
    good, bad, other = (
        chats("user", "assistant"),
        chats("system", "user", "assistant"),
        chats("user", "user", "assistant"),
    )
    write(tmp_path, train=[good, bad, other, bad, bad, bad, other], validation=[good] * 2, test=[good, bad])
    found = problems(tmp_path, splits_of(tmp_path, "causal-lm"), "causal-lm", 64, template=GEMMA)
    refused = "the model's chat template refuses the messages: "
    system = "System role not supported: write the text of the role 'system' into the first message of the role 'user'"
    assert found == [
        f"train.jsonl:2: {refused}{system} (also train.jsonl:4, train.jsonl:5, 1 more rows)",
        f"train.jsonl:3: {refused}Conversation roles must alternate: join neighbouring messages of one role"
        " (also train.jsonl:7)",
        f"test.jsonl:2: {refused}{system}",
    ]


def test_the_lines_are_those_of_the_rows_that_were_drawn(tmp_path):
    rows = [chats("user", "assistant") if i % 3 else chats("system", "user", "assistant") for i in range(60)]
    write(tmp_path, train=rows)
    splits = splits_of(tmp_path, "causal-lm", max_train_rows=10)
    (first, *_) = problems(tmp_path, splits, "causal-lm", 64, template=GEMMA)
    at = next(i for i, row in enumerate(splits.train) if len(row["messages"]) == 3)
    assert first.startswith(f"{splits.places['train'][at]}: the model's chat template refuses")
    line = int(splits.places["train"][at].removeprefix("train.jsonl:"))
    assert rows[line - 1]["messages"] == splits.train[at]["messages"]


def test_rows_that_the_model_cannot_read(tmp_path):
    write(
        tmp_path,
        train=[{"text": "w1 w2"}, {"text": "w1 " * 300}, {"text": "w3"}],
        test=[{"text": "is " * 300}, {"text": "w4"}],
    )
    splits = splits_of(tmp_path, "causal-lm")
    long = "has more tokens than the model takes: set data.max_length to at most 256"
    assert problems(tmp_path, splits, "causal-lm", 2000) == [
        f"train.jsonl:2: {long}", f"validation.jsonl:2: {long}", f"test.jsonl:1: {long}",
    ]  # fmt: skip
    assert encode(tmp_path, splits, "causal-lm", 100).truncation.enough == 256, "the model takes no more"


def test_ids_without_an_embedding(tmp_path):
    write(tmp_path, train=texts("w1 w2", "w3"), test=texts("w1 w29", "w2"))
    splits = splits_of(tmp_path, "classification")
    folder = str(save_model(tmp_path / "model"))
    own = TASKS["classification"](load_processor(folder, "classification"), 16, splits.labels)
    last = own.tokenizer.convert_tokens_to_ids("w29")
    model = skeleton(folder, None, "classification", splits.labels)
    encode_splits(own, splits, model)
    model.set_input_embeddings(nn.Embedding(last, 16, device="meta"))
    beyond = f"has token ids beyond the model's {last} embeddings: the tokenizer does not fit the model"
    with pytest.raises(DataError) as error:
        encode_splits(own, splits, model)
    assert error.value.problems == (f"test.jsonl:1: {beyond}",)
    own.tokenizer.pad_token = "w29"
    with pytest.raises(DataError) as error:
        encode_splits(own, splits, model)
    assert error.value.problems == (
        f"the tokenizer does not fit: its padding token has the id {last}, beyond the model's {last} embeddings",
        f"test.jsonl:1: {beyond}",
    )


class Fragile(TASKS["classification"]):  # type: ignore[misc]
    """A task whose tokenizer dies of some rows."""

    def encode(self, rows: Any) -> list[Example]:
        if any("w7" in row["text"] for row in rows):
            raise TypeError("TextEncodeInput must be\nsomething else")
        return super().encode(rows)


def test_any_error_of_a_tokenizer_has_the_line_of_its_row(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "classification", Fragile)
    write(tmp_path, train=texts("w1", "w7 w1", "w2", "w7"), validation=texts("w3", "w4"), test=texts("w5", "w6"))
    splits = splits_of(tmp_path, "classification")
    what = "cannot be encoded: TypeError: TextEncodeInput must be"
    assert problems(tmp_path, splits, "classification") == [f"train.jsonl:2: {what} (also train.jsonl:4)"]
    monkeypatch.setattr(encoding, "CHUNK", 2)
    monkeypatch.setattr(encoding, "MOST_BAD_ROWS", 1)
    assert problems(tmp_path, splits, "classification") == [
        f"train.jsonl:2: {what}", "train: the check stopped after 1 rows with problems",
    ]  # fmt: skip


def test_many_distinct_problems_are_not_all_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(Fragile, "encode", lambda self, rows: [{}["no " + row["text"]] for row in rows])
    monkeypatch.setitem(TASKS, "classification", Fragile)
    write(tmp_path, train=texts(*(f"w{i}" for i in range(8))), validation=texts("x", "x"), test=texts("y", "y"))
    found = problems(tmp_path, splits_of(tmp_path, "classification"), "classification")
    assert found[4:6] == ["train.jsonl:5: cannot be encoded: KeyError: 'no w4'", "train: 3 more problems of rows"]
    assert len(found) == 8


def test_a_recipe_or_a_script_gets_the_lines_too(tmp_path):
    write(tmp_path, train=texts("w1", "w2"), test=texts("w3", "w4"))
    folder = str(save_model(tmp_path / "model"))
    splits = splits_of(tmp_path, "classification")
    loaded = load_backbone(folder, task="classification", labels=splits.labels)
    loaded.model.set_input_embeddings(nn.Embedding(1, 16))
    with pytest.raises(DataError, match=r"test.jsonl:1: has token ids beyond the model's 1 embeddings"):
        TrainEvaluator(loaded, "classification", splits, 16)
    with pytest.raises(DataError, match=r"train row 1: has token ids beyond"):
        TrainEvaluator(loaded, "classification", Splits(splits.train, splits.test, splits.test, LABELS), 16)


# Losses


def test_cut_texts_are_counted(tmp_path):
    lengths = (3, 3, 9, 12)  # words; the tokenizer adds two special tokens
    write(tmp_path, train=texts(*(f"w{i} " + "w1 " * (n - 1) for i, n in enumerate(lengths))), test=texts("w3", "w4"))
    splits = splits_of(tmp_path, "classification")
    encoded = encode(tmp_path, splits, "classification", 8)
    cut = encoded.truncation
    assert (cut.rows, cut.ends) == ({"train": 2, "validation": 2}, {"train": 2, "validation": 2})
    assert cut.tokens == 2 * (3 + 6)
    assert (cut.enough, cut.prompts, cut.no_prompt) == (14, {}, {})
    assert list(encoded.warnings()) == [
        "data.max_length: 8 cuts 2 of 4 train and 2 of 4 validation rows, 18 tokens in all: 4 lose their end;"
        " 14 would keep 99 % of the rows whole"
    ]
    assert [len(example["input_ids"]) for example in encoded.examples["train"]] == [5, 5, 8, 8]
    assert encoded.to_dict()["truncation"] == {
        "max_length": 8,
        "max_length_for_99_percent": 14,
        "tokens": 18,
        "learnt_tokens": 0,
        "rows": {"train": 2, "validation": 2, "test": 0},
        "rows_with_cut_prompt": {"train": 0, "validation": 0, "test": 0},
        "rows_without_prompt": {"train": 0, "validation": 0, "test": 0},
        "rows_with_cut_end": {"train": 2, "validation": 2, "test": 0},
    }
    whole = encode(tmp_path, splits, "classification", 14)
    assert (whole.truncation.tokens, list(whole.warnings())) == (0, [])


def test_the_length_for_most_rows_leaves_out_a_few(tmp_path):
    rows = [*("w1 w2" for _ in range(198)), "w3 " * 20, "w4 " * 30]
    write(tmp_path, train=texts(*rows), validation=texts("w1", "w2"), test=texts("w2", "w1"))
    encoded = encode(tmp_path, splits_of(tmp_path, "classification"), "classification", 10)
    assert encoded.truncation.enough == 4
    (warning,) = encoded.warnings()
    assert warning == "data.max_length: 10 cuts 2 of 200 train rows, 34 tokens in all: 2 lose their end"


def test_cut_pairs_lose_what_the_tokenizer_cuts(tmp_path):
    rows = [{"text": "w1 " * 5, "text_pair": "w2 " * 9, "label": label} for label in LABELS]
    write(tmp_path, train=rows)
    splits = splits_of(tmp_path, "classification", text_pair="text_pair")
    encoded = encode(tmp_path, splits, "classification", 12)
    assert encoded.truncation.tokens == 6 * (17 - 12)
    assert [example["token_type_ids"] for example in encoded.examples["test"]] == [[0] * 6 + [1] * 6] * 2


def test_nothing_would_be_left_of_a_text(tmp_path):
    write(tmp_path, train=texts("w1", "w2"), validation=texts("w3", "w4"), test=texts("w5", "w6"))
    splits = splits_of(tmp_path, "classification")
    what = "data.max_length: 2 is too short: the tokenizer adds 2 special tokens, so nothing of a text would be left"
    assert problems(tmp_path, splits, "classification", 2)[0] == f"train.jsonl:1: {what} (also train.jsonl:2)"
    assert encode(tmp_path, splits, "classification", 3).truncation.tokens == 0


def prompts(*lengths: tuple[int, int]) -> list[dict[str, str]]:
    return [{"prompt": "w" * prompt, "completion": "c" * completion} for prompt, completion in lengths]


def test_cut_prompts_and_completions_are_counted(tmp_path):
    """Start and end of text add a token to each part."""
    words = byte_tokenizer(["x"], size=258)
    write(tmp_path, train=prompts((3, 3), (9, 3), (3, 11), (3, 12), (3, 3), (3, 3)), validation=prompts((3, 3), (3, 3)),
          test=prompts((3, 4), (3, 4)))  # fmt: skip
    splits = splits_of(tmp_path, "causal-lm")
    encoded = encode_splits(TASKS["causal-lm"](words, 12, None), splits, Anything())
    cut = encoded.truncation
    assert (cut.rows, cut.prompts) == ({"train": 3}, {"train": 3})
    assert (cut.no_prompt, cut.ends) == ({"train": 2}, {"train": 1})
    assert cut.tokens == 2 + 4 + (4 + 1)
    assert list(encoded.warnings()) == [
        "data.max_length: 12 cuts 3 of 6 train rows, 11 tokens in all, 1 of them learnt: 1 lose the beginning of their"
        " prompt, 2 lose their whole prompt, 1 lose their end; 17 would keep 99 % of the rows whole"
    ]
    # When most rows have lost their prompt, nothing is left to learn from it.
    splits = replace(splits, train=splits.train[2:5], places={})
    with pytest.raises(DataError) as error:
        encode_splits(TASKS["causal-lm"](words, 12, None), splits, Anything())
    assert error.value.problems == (
        "data.max_length: 12 leaves nothing of the prompt of 2 of 3 train rows; 17 would keep 99 % of the rows whole",
    )


class Anything(nn.Module):
    """A model that takes all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(max_position_embeddings=1000)

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(1000, 1)


def test_rows_without_a_token_to_predict(tmp_path):
    words = byte_tokenizer(["x"], size=258, begin=False)
    words.eos_token = None
    write(
        tmp_path, train=[{"text": "ab"}, {"text": "a"}], validation=[{"text": "abc"}] * 2, test=[{"text": "abcd"}] * 2
    )
    own, splits = TASKS["causal-lm"](words, 12, None), splits_of(tmp_path, "causal-lm")
    with pytest.raises(DataError) as error:
        encode_splits(own, splits, Anything())
    assert error.value.problems == ("train.jsonl:2: no token is left to predict: the row is too short",)
    with pytest.raises(DataError) as error:
        encode_splits(TASKS["causal-lm"](words, 1, None), splits, Anything())
    short = "test.jsonl:1: data.max_length: 1 is too short: no token is left to predict (also test.jsonl:2)"
    assert short in error.value.problems


def test_fields_that_a_template_leaves_out_are_counted(tmp_path):
    chat = chats("user", "assistant")["messages"]
    weighted = {"messages": [chat[0], {**chat[1], "weight": 1}], "tools": [{"type": "function"}], "system": "be short"}
    write(tmp_path, train=[{"messages": chat}, weighted, weighted], test=[{"messages": chat}] * 2)
    encoded = encode(tmp_path, splits_of(tmp_path, "causal-lm"), "causal-lm", 100, template=GEMMA)
    left_out, shares = "the model's chat template does not write it", "2 of 3 train and 2 of 3 validation rows"
    assert list(encoded.warnings()) == [
        f"system is not read, in {shares}: name the column of the system prompt in data.system",
        f"messages.weight is not read, in {shares}: {left_out}",
        f"tools is not read, in {shares}: {left_out}",
    ]
    assert encoded.to_dict()["unread_fields"]["tools"] == {
        "rows": {"train": 2, "validation": 2, "test": 0}, "advice": left_out,
    }  # fmt: skip
    read = encode(tmp_path, splits_of(tmp_path, "causal-lm"), "causal-lm", 100, template=LLAMA)
    assert read.unread.keys() == {"system", "messages.weight"}


def test_texts_in_a_language_that_the_tokenizer_does_not_know(tmp_path):
    write(
        tmp_path,
        train=texts("w1 uno dos", "w2 w3 tres"),
        validation=texts("w4", "w5"),
        test=texts("uno w5 w6 dos", "w6"),
    )
    encoded = encode(tmp_path, splits_of(tmp_path, "classification"), "classification")
    assert list(encoded.warnings()) == [
        "most of a text is not read, in 1 of 2 train rows: the model's tokenizer does not know its words: use a model"
        " of its language"
    ]


# Speed


def test_rows_are_encoded_once(tmp_path, monkeypatch):
    write(
        tmp_path, train=texts(*(f"w{i}" for i in range(20))), validation=texts("w21", "w22"), test=texts("w23", "w24")
    )
    splits = splits_of(tmp_path, "classification")
    monkeypatch.setattr(encoding, "CHUNK", 8)
    folder = str(save_model(tmp_path / "model"))
    loaded = load_backbone(folder, task="classification", labels=splits.labels)

    def task(max_length: int) -> Task:
        return TASKS["classification"](load_processor(folder, "classification"), max_length, splits.labels)

    seen: list[tuple[int, int]] = []
    encoded = encode_splits(task(16), splits, loaded.model, lambda done, total: seen.append((done, total)))
    assert seen == [(8, 24), (16, 24), (20, 24), (22, 24), (24, 24)]
    known = replace(splits, encoded=encoded)
    assert encode_splits(task(16), known, loaded.model) is encoded
    assert encode_splits(task(8), known, loaded.model) is not encoded
    assert TrainEvaluator(loaded, "classification", known, 16).examples["train"] is encoded.examples["train"]
    assert TrainEvaluator(loaded, "classification", known, 8).examples["train"] is not encoded.examples["train"]
