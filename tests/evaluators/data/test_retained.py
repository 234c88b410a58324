"""Retained rows: read as other rows are, divided by a fixed rule, and refused with their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators import contents
from autopeft.evaluators.data.retained import RetainedConfig, with_retained
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import DataConfig

FILE = "general.jsonl"
TEXTS = [{"text": f"text number {i}"} for i in range(11)]


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def found(folder: Path, rows: list[Any] | None, max_rows: int | None = None, **changes: Any) -> Splits:
    task = changes.pop("task", "causal-lm")
    for i, split in enumerate(("train", "validation", "test")):
        rows_of_task = [{"prompt": f"ask {i} {k}", "completion": "say", "label": f"l{k}"} for k in range(3)]
        write(folder / f"{split}.jsonl", rows_of_task)
    if rows is not None:
        write(folder / FILE, rows)
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    data = DataConfig(source="files", folder=folder, **files, **changes)
    retained = RetainedConfig(source="files", file=changes.get("file", FILE), max_rows=max_rows)
    return with_retained(load_splits(data, task), retained, data, task)


def test_the_halves_are_random_always_the_same_and_nothing_is_in_both(tmp_path: Path) -> None:
    one = found(tmp_path, TEXTS)
    assert (len(one.retained), len(one.retained_test)) == (6, 5)
    assert sorted(row["text"] for row in [*one.retained, *one.retained_test]) == sorted(row["text"] for row in TEXTS)
    assert found(tmp_path, TEXTS) == one
    positions = [TEXTS.index({"text": row["text"]}) for row in one.retained]
    assert positions == sorted(positions)
    assert positions not in (list(range(6)), list(range(0, 11, 2))), "neither the first rows nor every second one"
    assert one.place("retained", 0) == f"{FILE}:{positions[0] + 1}"
    fewer = found(tmp_path, TEXTS, max_rows=5)
    assert (len(fewer.retained), len(fewer.retained_test)) == (3, 2)
    assert one.names == ("train", "validation", "test", "retained", "retained_test")


def test_conversations_and_texts_are_rows_of_a_language_model(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    one = found(tmp_path, [*TEXTS[:3], chat, {"prompt": "a", "completion": "b"}])
    assert {key for row in (*one.retained, *one.retained_test) for key in row} >= {"text", "messages", "prompt"}


def test_the_digests_have_the_retained_rows(tmp_path: Path) -> None:
    digests = contents.of_rows(found(tmp_path, TEXTS))
    assert {name: one["rows"] for name, one in digests.items()} == {
        "train": 3, "validation": 3, "test": 3, "retained": 6, "retained_test": 5,
    }  # fmt: skip
    changed = contents.of_rows(found(tmp_path, [*TEXTS[:-1], {"text": "another"}]))
    assert [name for name in digests if digests[name] != changed[name]] in (["retained"], ["retained_test"])
    without = replace(found(tmp_path, TEXTS), retained=[], retained_test=[])
    assert list(contents.of_rows(without)) == ["train", "validation", "test"]


BAD: list[tuple[list[Any] | None, Mapping[str, Any], str]] = [
    (None, {}, "general.jsonl: no such file"),
    ([], {}, "general.jsonl: has no retained rows; it needs 4 at least: two to compare candidates, two to test"),
    (TEXTS[:1], {}, "general.jsonl: has one retained row; it needs 4 at least"),
    (TEXTS[:3], {}, "general.jsonl: has 3 retained rows; it needs 4 at least"),
    ([*TEXTS[:4], {"label": "x"}], {}, "general.jsonl:5: a row needs the fields 'prompt' and 'completion'"),
    ([*TEXTS[:4], ["x"]], {}, "general.jsonl:5: not a JSON object"),
    (TEXTS, {"task": "classification", "text": "prompt"}, "general.jsonl:1: field 'prompt' is missing"),
    (
        [{"prompt": f"a {i}", "label": "l7"} for i in range(5)],
        {"task": "classification", "text": "prompt"},
        "general.jsonl:1: labels 'l7' do not occur in the training split, train.jsonl",
    ),
]


@pytest.mark.parametrize(("rows", "changes", "said"), BAD)
def test_what_cannot_be_retained_is_refused_with_its_place(
    rows: list[Any] | None, changes: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        found(tmp_path, rows, **changes)
    assert any(problem.startswith(said) for problem in caught.value.problems), caught.value.problems


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("a text\n")
    one = found(tmp_path, TEXTS)
    retained = RetainedConfig(source="files", file="general.txt")
    with pytest.raises(DataError, match=r"general.txt: files of type '.txt' are not supported"):
        with_retained(one, retained, DataConfig(source="files", folder=tmp_path), "causal-lm")


def test_retained_rows_that_are_trained_on_or_in_both_halves_are_a_warning(tmp_path: Path) -> None:
    assert found(tmp_path, TEXTS).warnings == ()
    trained = {"prompt": "ask 0 1", "completion": "another answer"}
    warnings = found(tmp_path, [*TEXTS, trained]).warnings
    assert [w.partition(":")[0] for w in warnings] == ["1 retained input is among the training rows"]
    warnings = found(tmp_path, [*TEXTS, *TEXTS]).warnings
    assert any("inputs occur in both retained and retained_test" in warning for warning in warnings)


def test_the_embedded_prose_has_its_own_columns(tmp_path: Path) -> None:
    found(tmp_path, TEXTS)
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    data = DataConfig(source="files", folder=tmp_path, **files, text="body", messages="text")
    one = with_retained(load_splits(data, "causal-lm"), RetainedConfig(source="embedded-prose"), data, "causal-lm")
    assert all(row.keys() == {"text", "ended"} for row in one.retained)
    assert one.place("retained", 0).startswith("embedded-prose:")
