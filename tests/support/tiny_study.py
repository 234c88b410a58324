"""A study that runs in seconds: a tiny random BERT, a toy task, and a study file over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("cold", "hot", "warm")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, *LABELS, *(f"w{i}" for i in range(30)))
ROWS = {"train": 48, "validation": 30, "test": 30}


def save_model(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**{**shape, **changes}, vocab_size=len(WORDS))
    BertForSequenceClassification(config).base_model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_data(folder: Path) -> None:
    """The label is a word of the text."""
    rng = Random(0)
    for split, count in ROWS.items():
        rows = []
        for i in range(count):
            label = LABELS[i % len(LABELS)]
            words = [f"w{rng.randrange(30)}" for _ in range(rng.randrange(4, 9))]
            words.insert(rng.randrange(len(words)), label)
            rows.append({"text": " ".join(words), "label": label})
        write_rows(folder / f"{split}.jsonl", rows)


#: Data settings of the forms that rows of a classification may have beside a text and a label; `save_data` of each.
PAIR = {"text": "premise", "text_pair": "hypothesis", "label": "relation"}
SEVERAL = {"labels": "tags"}


def _words(rng: Random, *of: str) -> str:
    words = [*(f"w{rng.randrange(30)}" for _ in range(rng.randrange(3, 6))), *of]
    rng.shuffle(words)
    return " ".join(words)


def save_pairs(folder: Path) -> None:
    """Pairs of texts with a label in each: the class is whether they have the same one."""
    rng = Random(1)
    for split, count in ROWS.items():
        rows = []
        for i in range(count):
            one = rng.choice(LABELS)
            other = one if i % 2 else rng.choice([label for label in LABELS if label != one])
            relation = "same" if one == other else "other"
            rows.append({"premise": _words(rng, one), "hypothesis": _words(rng, other), "relation": relation})
        write_rows(folder / f"{split}.jsonl", rows)


def save_several(folder: Path) -> None:
    """The labels are the words of the text that are names of labels: any number of them, none too."""
    rng = Random(2)
    for split, count in ROWS.items():
        rows = []
        for _ in range(count):
            tags = [label for label in LABELS if rng.random() < 0.5]
            rows.append({"text": _words(rng, *tags), "tags": tags})
        write_rows(folder / f"{split}.jsonl", rows)


FORMS: dict[str, tuple[dict[str, str], Callable[[Path], None]]] = {
    "pair": (PAIR, save_pairs),
    "several": (SEVERAL, save_several),
}


def save_study_of(form: str, folder: Path, **changes: Any) -> Path:
    """Like `save_study`, with rows of a form of `FORMS`."""
    columns, save_rows = FORMS[form]
    path = save_study(folder, **{"data": settings()["data"] | columns, **changes})
    save_rows(folder)
    return path


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settings(**changes: Any) -> dict[str, Any]:
    """The study file as data; `changes` replace whole sections."""
    return {
        "study": "tiny",
        "model": {"id": "model"},
        "data": {
            "source": "files",
            "train": "train.jsonl",
            "validation": "validation.jsonl",
            "test": "test.jsonl",
            "max_length": 16,
        },
        "space": {
            "adapters": {"lora": {"at": ["attn.q", "attn.v"], "rank": [0, 1, 2, 4], "vary": {"rank": "layer"}}},
        },
        "training": {"learning_rate": {"low": 1.0e-3, "high": 1.0e-1, "log": True}, "epochs": 4, "batch_size": 8},
        "search": {"searcher": "tpe", "trials": 6, "batch": 3},
        "baselines": {"names": ["head", "lora-r8-qv"], "learning_rates": [1.0e-2]},
        "finalists": {"seeds": 2, "most": 2},
        "tracking": {"enabled": False},
        "device": "cpu",
        **changes,
    }


def save_study(folder: Path, **changes: Any) -> Path:
    """Model, data and study file in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model")
    save_data(folder)
    path = folder / "study.yaml"
    YAML().dump(settings(**changes), path)
    return path
