"""Data files that are damaged or crafted: one line each, with file and row."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autopeft.evaluators.data import reading
from autopeft.evaluators.data.splits import load_splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import MOST_DEPTH, DataConfig

GOOD = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'


def refused(folder, name: str, task: str = "classification") -> str:
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text(GOOD)
    names = {"train": name, "validation": "validation.jsonl", "test": "test.jsonl"}
    with pytest.raises(DataError) as caught:
        load_splits(DataConfig(source="files", folder=folder, **names), task)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[" * 100_000, "not valid JSON: it is nested too deeply"),
        ('{"a": ' * 100_000, "not valid JSON: it is nested too deeply"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", "not valid JSON: a number has too many digits"),
        ('{"text": "a", "label": NaN}', "field 'label' must be a label"),
    ],
)
def test_a_line(tmp_path, line, problem):
    (tmp_path / "train.jsonl").write_text(GOOD + line + "\n")
    assert refused(tmp_path, "train.jsonl").startswith(f"train.jsonl:3: {problem}")
    (tmp_path / "train.json").write_text(f"[{line}]")
    assert problem in refused(tmp_path, "train.json")


def test_labels_that_are_very_long_numbers(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD + '{"text": "a", "label": "' + "1" * 5000 + '"}\n')
    names = {"train": "train.jsonl", "validation": "train.jsonl", "test": "train.jsonl"}
    labels = load_splits(DataConfig(source="files", folder=tmp_path, **names), "classification").labels
    assert labels == ("1" * 5000, "x", "y")


def test_messages_that_are_nested_too_deeply(tmp_path):
    deep = "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1)
    turns = '[{"role": "user", "content": "a", "more": ' + deep + '}, {"role": "assistant", "content": "b"}]'
    (tmp_path / "train.jsonl").write_text('{"messages": ' + turns + "}\n")
    assert refused(tmp_path, "train.jsonl", "causal-lm") == (
        f"train.jsonl:1: has values that are nested deeper than {MOST_DEPTH}"
    )


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    assert refused(tmp_path, "train.jsonl") == "train.jsonl: is a folder or a pipe, not a file"


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": pa.array([2**62], pa.timestamp("us"))}), path)
    assert refused(tmp_path, path.name).startswith("train.parquet: not a Parquet file that can be read: ")
    path.write_bytes(b"PAR1" + b"\x00" * 40 + b"PAR1")
    assert refused(tmp_path, path.name).startswith("train.parquet: not a Parquet file that can be read: ")
    monkeypatch.setattr(reading, "MOST_ROWS", 100)
    pq.write_table(pa.table({"text": ["a"] * 101, "label": ["x"] * 101}), path)
    assert refused(tmp_path, path.name) == "train.parquet: has 101 rows; a file may have 100"
