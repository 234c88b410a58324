"""Small tasks of lm-evaluation-harness over words, with their data on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML
from tokenizers import processors
from transformers import AutoTokenizer

COUNT = 14
CODE = """\
def likelihood(doc, results):
    return {"likelihood": float(results[0][0]), "greedy": int(results[0][1])}

def letters(doc, results):
    # Another number for each text.
    return {"letters": sum((i + 1) * ord(letter) for i, letter in enumerate(results[0]))}
"""
MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
}
TEXTS: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["w7", "w12 w3"], "max_gen_toks": 9},
    "metric_list": [{"metric": "exact_match", **MEAN}],
}


def documents(seed: int, count: int = COUNT) -> list[dict[str, Any]]:
    rng = Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(40)}" for _ in range(count))

    return [
        {
            "question": words(rng.randrange(2, 8)),
            "choices": [words(rng.randrange(1, 4)) for _ in range(3)],
            "gold": rng.randrange(3),
            "answer": words(2),
        }
        for _ in range(count)
    ]


def save_documents(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def save_task(folder: Path, name: str, settings: Mapping[str, Any], **changes: Any) -> Path:
    """Write a task; `!function` is the prefix of a text that names a function of `CODE`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "functions.py").write_text(CODE)
    files = {"validation": str(folder / "documents.jsonl")}
    if not (folder / "documents.jsonl").exists():
        save_documents(folder / "documents.jsonl", documents(1))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "validation_split": "validation"}
    file = folder / f"{name}.yaml"
    with file.open("w") as opened:
        YAML().dump({"task": name, **source, **settings, **changes}, opened)
    file.write_text(file.read_text().replace("'!function ", "!function '"))
    return folder


def without_appended_end(model: Path) -> Path:
    """Let the tokenizer of a saved model append no end of text, which lm-eval's own model takes for a word."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(model)
    return model
