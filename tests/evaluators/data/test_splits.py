"""The rows of a study: read alike from every format, and every problem named with its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from autopeft.evaluators.data.splits import load_splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import DataConfig

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]
FILES = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good splits, for a test to spoil."""
    for start, file in enumerate(FILES.values()):
        jsonl(tmp_path / file, [row | {"text": f"{row['text']} of {start}"} for row in ROWS])
    return tmp_path


def load(folder: Path, task: str = "classification", **settings: Any) -> Any:
    return load_splits(DataConfig(source="files", folder=folder, **{**FILES, **settings}), task)


def problems(folder: Path, task: str = "classification", **settings: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        load(folder, task, **settings)
    assert str(error.value) == "\n".join(error.value.problems)
    return list(error.value.problems)


def test_good_rows(folder):
    splits = load(folder)
    assert splits.train[0] == {"text": "text 0 of 0", "label": "a"}
    assert len(splits.test) == 6
    assert splits.labels == ("a", "b")
    assert splits.warnings == ()


def test_embedded_rows():
    splits = load_splits(DataConfig(), "classification")
    assert len(splits.labels) == 16
    assert splits.warnings == ()
    assert len(splits.train) > 3000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "train.jsonl: no such file"),
        ("", "train.jsonl: the train split is empty"),
        ("\n  \n", "train.jsonl: the train split is empty"),
        ('{"text": "x", "label": "a"}\n{"label": "b"}\n',
         "train.jsonl:2: field 'text' is missing; this row has 'label'"),
        ('{"text": "x"}\n', "train.jsonl:1: field 'label' is missing; this row has 'text'"),
        ('\n{"text": null, "label": "a"}\n', "train.jsonl:2: field 'text' is empty"),
        ('{"text": "", "label": "a"}\n', "train.jsonl:1: field 'text' is empty"),
        ("{}\n", "train.jsonl:1: field 'text' is missing; this row has none"),
        ('{"text": "x", "label": "a"}\n{"text": "y", \n', "train.jsonl:2: not valid JSON: "),
        ("[1, 2]\n", "train.jsonl:1: not a JSON object"),
        ('"words"\n', "train.jsonl:1: not a JSON object"),
        ('{"text": 5, "label": "a"}\n', "train.jsonl:1: field 'text' must be a non-empty text, got 5"),
        ('{"text": "  ", "label": "a"}\n', "train.jsonl:1: field 'text' must be a non-empty text, got '  '"),
        ('{"text": "x", "label": ["a"]}\n', "train.jsonl:1: field 'label' must be a label"),
        ('{"text": "x", "label": NaN}\n', "train.jsonl:1: field 'label' must be a label"),
        ('{"text": "x", "label": " "}\n', "train.jsonl:1: field 'label' must be a label"),
    ],
)  # fmt: skip
def test_bad_training_file(folder, content, expected):
    (folder / "train.jsonl").unlink()
    if content is not None:
        (folder / "train.jsonl").write_text(content)
    (problem,) = problems(folder)
    assert problem.startswith(expected)


def test_unknown_suffix_and_encoding(folder):
    (folder / "train.txt").write_text("x")
    assert problems(folder, train="train.txt") == [
        "train.txt: files of type '.txt' are not supported: use .jsonl, .json, .csv or .parquet"
    ]
    (folder / "train.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    assert problems(folder) == ["train.jsonl: not UTF-8 text: invalid continuation byte at byte 10"]
    (folder / "train.parquet").write_bytes(b"nothing of the kind")
    (problem,) = problems(folder, train="train.parquet")
    assert problem.startswith("train.parquet: not a Parquet file that can be read: ")


def test_all_problems_come_at_once(folder):
    jsonl(folder / "train.jsonl", [{"text": "x"}] * 7)
    (folder / "validation.jsonl").unlink()
    jsonl(folder / "test.jsonl", [{"text": "x", "label": "zebra"}, {"label": "a"}])
    assert problems(folder) == [
        *(f"train.jsonl:{i}: field 'label' is missing; this row has 'text'" for i in range(1, 6)),
        "train.jsonl: 2 more rows with problems",
        "validation.jsonl: no such file",
        "test.jsonl:2: field 'text' is missing; this row has 'label'",
    ]


def test_labels_that_training_lacks(folder):
    jsonl(folder / "validation.jsonl", [{"text": "x", "label": "z"}, {"text": "y", "label": "a"}])
    jsonl(folder / "test.jsonl", [{"text": "u", "label": "y"}, {"text": "v", "label": "b"}])
    assert problems(folder) == [
        "validation.jsonl:1: labels 'z' do not occur in the training split, train.jsonl, which has 'a', 'b'",
        "test.jsonl:1: labels 'y' do not occur in the training split, train.jsonl, which has 'a', 'b'",
    ]


def test_labels_that_differ_by_spaces(folder):
    jsonl(folder / "train.jsonl", [*ROWS, {"text": "x", "label": "a "}, {"text": "y", "label": "\tb"}])
    jsonl(folder / "test.jsonl", [{"text": "z", "label": "b"}, {"text": "u", "label": " a"}])
    assert problems(folder) == [
        "train.jsonl:7: label 'a ' differs from 'a' in train.jsonl:1 only by surrounding spaces: remove the spaces",
        "train.jsonl:8: label '\\tb' differs from 'b' in train.jsonl:2 only by surrounding spaces: remove the spaces",
        "test.jsonl:2: label ' a' differs from 'a' in train.jsonl:1 only by surrounding spaces: remove the spaces",
        "test.jsonl:2: labels ' a' do not occur in the training split, train.jsonl, which has '\\tb', 'a', 'a ', 'b'",
    ]
    jsonl(folder / "train.jsonl", [{"text": "x", "tags": ["a", "a "]}])
    for file in ("validation.jsonl", "test.jsonl"):
        jsonl(folder / file, [{"text": file, "tags": ["a"]}] * 2)
    assert problems(folder, labels="tags") == [
        "train.jsonl:1: label 'a ' differs from 'a' in train.jsonl:1 only by surrounding spaces: remove the spaces"
    ]


def test_labels_that_differ_by_case(folder):
    jsonl(folder / "train.jsonl", [*ROWS, {"text": "x", "label": "A"}])
    splits = load(folder)
    assert splits.labels == ("A", "a", "b")
    assert splits.warnings == (
        "labels 'a' (train.jsonl:1) and 'A' (train.jsonl:7) differ only by letter case or spaces and are separate:"
        " give them one spelling if they are the same",
    )


def test_targets_of_a_regression(folder):
    for start, file in enumerate(FILES.values()):
        jsonl(folder / file, [{"text": f"{start} {i}", "label": i / 10} for i in range(30)])
    assert problems(folder) == [
        "train.jsonl: the labels have 27 distinct numbers with a fraction, such as '0.1', which looks like a regression"
        " target: group the numbers into a few classes, or add a letter to each label if they are names of classes"
    ]
    for start, file in enumerate(FILES.values()):
        jsonl(folder / file, [{"text": f"{start} {i}", "label": i % 9 / 7} for i in range(30)])
    (problem,) = problems(folder)
    assert problem.startswith(
        "train.jsonl: the labels have 7 distinct numbers with a fraction, such as '0.1428571428571428"
    )
    for start, file in enumerate(FILES.values()):
        jsonl(folder / file, [{"text": f"{start} {i}", "label": i % 9 / 4} for i in range(30)])
    assert len(load(folder).labels) == 9, "quarters"
    for start, file in enumerate(FILES.values()):
        jsonl(folder / file, [{"text": f"{start} {i}", "label": i / 2} for i in range(30)])
    assert len(load(folder).labels) == 30, "few fractions, such as ratings"
    for start, file in enumerate(FILES.values()):
        jsonl(folder / file, [{"text": f"{start} {i}", "label": f"v{i / 10}"} for i in range(30)])
    assert len(load(folder).labels) == 30, "names"


def test_pairs(folder):
    rows = [{"text": f"a {i}", "other": f"b {i}", "label": "ab"[i % 2]} for i in range(6)]
    jsonl(folder / "train.jsonl", rows)
    jsonl(folder / "validation.jsonl", [{"text": f"a {i}", "other": "c", "label": "a"} for i in range(2)])
    jsonl(folder / "test.jsonl", [{"text": "a 1", "other": other, "label": "a"} for other in ("b 1", "d")])
    splits = load(folder, text_pair="other")
    assert splits.train[0] == {"text": "a 0", "text_pair": "b 0", "label": "a"}
    assert splits.warnings == ("1 input occurs in both train and test: the scores will be too optimistic",), "as a pair"
    jsonl(folder / "test.jsonl", [{"text": "x", "label": "a"}, {"text": "x", "other": " ", "label": "a"}])
    assert problems(folder, text_pair="other") == [
        "test.jsonl:1: field 'other' is missing; this row has 'text', 'label'",
        "test.jsonl:2: field 'other' must be a non-empty text, got ' '",
    ]


def test_several_labels(folder):
    for number, file in enumerate(FILES.values()):
        jsonl(folder / file, [{"text": f"{number} {i}", "tags": tags} for i, tags in enumerate((["b"], [], [10, "a"]))])
    splits = load(folder, labels="tags")
    assert splits.train == [
        {"text": "0 0", "labels": ["b"]},
        {"text": "0 1", "labels": []},
        {"text": "0 2", "labels": ["10", "a"]},
    ]
    assert splits.labels == ("10", "a", "b")
    drawn = load(folder, labels="tags", max_train_rows=3)
    assert {label for row in drawn.train for label in row["labels"]} == {"10", "a", "b"}

    jsonl(folder / "validation.jsonl", [{"text": "x", "tags": ["z", "a"]}] * 2)
    found = "validation.jsonl:1: labels 'z' do not occur in the training split, train.jsonl, which has '10', 'a', 'b'"
    assert problems(folder, labels="tags") == [found]
    wrong = [{"tags": "a"}, {"tags": None}, {"tags": ["a", " "]}, {"tags": [["a"]]}]
    jsonl(folder / "validation.jsonl", [{"text": "x", **row} for row in wrong])
    assert problems(folder, labels="tags") == [
        "validation.jsonl:1: field 'tags' must be a list of labels, got 'a'",
        "validation.jsonl:2: field 'tags' is empty",
        "validation.jsonl:3: field 'tags' must be a list of labels (texts or whole numbers), got ['a', ' ']",
        "validation.jsonl:4: field 'tags' must be a list of labels (texts or whole numbers), got [['a']]",
    ]
    for file in FILES.values():
        jsonl(folder / file, [{"text": file, "tags": []}] * 2)
    assert problems(folder, labels="tags") == [
        "train.jsonl: no row has a label: multi-label classification needs at least one label"
    ]


def test_several_labels_of_the_hub(monkeypatch):
    names = datasets.List(datasets.ClassLabel(names=["bad", "good"]))
    features = datasets.Features({"text": datasets.Value("string"), "tags": names})

    def load_dataset(path: str, split: str, **settings: Any) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [split, f"{split} 2"], "tags": [[1, 0], []]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_splits(DataConfig(source="org/data", labels="tags"), "classification")
    assert splits.train == [{"text": "train", "labels": ["good", "bad"]}, {"text": "train 2", "labels": []}]


def test_one_label_only(folder):
    for file in FILES.values():
        jsonl(folder / file, [{"text": "x", "label": "a"}] * 2)
    assert problems(folder) == ["train.jsonl: all rows have the label 'a': classification needs at least two labels"]


ODD = [
    {"text": 'one, "two"\nthree', "label": 3},
    {"text": "NA", "label": 10},
    {"text": "007", "label": 3},
    {"text": "\u2028 line \x85 separators \x0b", "label": 10},
    {"text": " spaces kept ", "label": -1},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_rows(folder, suffix):
    jsonl(folder / "train.jsonl", ODD)
    jsonl(folder / "validation.jsonl", ODD[:2])
    jsonl(folder / "test.jsonl", ODD[1:3])
    expected = load(folder)
    assert [row["text"] for row in expected.train] == [row["text"] for row in ODD]
    # Whole numbers are labels, in the order of their values.
    assert expected.labels == ("-1", "3", "10")
    assert expected.train[0]["label"] == "3"

    for split in FILES:
        frame = pandas.DataFrame([json.loads(line) for line in (folder / f"{split}.jsonl").open()])
        path = folder / f"{split}.{suffix}"
        if suffix == "csv":
            frame.to_csv(path, index=False, lineterminator="\n")
        elif suffix == "parquet":
            frame.to_parquet(path)
    assert load(folder, **{split: f"{split}.{suffix}" for split in FILES}) == expected


def test_lines_of_csv(folder):
    (folder / "train.csv").write_text('text,label\n"two\nlines",a\nx,\ny,b,c\nz,b\n')
    assert problems(folder, train="train.csv") == [
        "train.csv:4: field 'label' is empty",
        "train.csv:5: has more values than the header has columns",
    ]
    (folder / "train.csv").write_text("")
    assert problems(folder, train="train.csv") == ["train.csv: the train split is empty"]
    (folder / "train.csv").write_text('text,label\n"never closed,a\n')
    assert problems(folder, train="train.csv") == ["train.csv:2: not valid CSV: unexpected end of data"]


def test_csv_with_a_byte_order_mark_and_long_texts(folder):
    (folder / "train.csv").write_text(f"text,label\n{'word ' * 60_000},a\ny,b\n", encoding="utf-8-sig")
    assert load(folder, train="train.csv").labels == ("a", "b")


def test_missing_values_do_not_change_numbers_of_parquet(folder):
    pandas.DataFrame({"text": ["x", "y", "z"], "label": [1, 2, None]}).to_parquet(folder / "train.parquet")
    assert problems(folder, train="train.parquet") == ["train.parquet:3: field 'label' is empty"]
    for split in FILES:
        pandas.DataFrame({"text": ["x", "y"], "label": [1.0, 2.0]}).to_parquet(folder / f"{split}.parquet")
    assert load(folder, **{split: f"{split}.parquet" for split in FILES}).labels == ("1", "2")


def test_suffixes_in_capitals(folder):
    wanted = load(folder)
    (folder / "train.jsonl").rename(folder / "train.JSONL")
    frames = {split: pandas.read_json(folder / f"{split}.jsonl", lines=True) for split in ("validation", "test")}
    frames["validation"].to_csv(folder / "validation.CSV", index=False)
    frames["test"].to_parquet(folder / "test.Parquet")
    assert load(folder, train="train.JSONL", validation="validation.CSV", test="test.Parquet") == wanted
    (folder / "train.TXT").write_text("x")
    assert problems(folder, train="train.TXT")[0].startswith("train.TXT: files of type '.TXT' are not supported")


def test_arrays_of_json(folder):
    wanted = load(folder)
    for split, file in FILES.items():
        rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        (folder / f"{split}.json").write_text("\n" + json.dumps(rows, indent=2))
    files = {split: f"{split}.json" for split in FILES}
    assert load(folder, **files) == wanted
    (folder / "train.json").write_text('[{"text": "x", "label": "a"}, 5, {"text": "y"}]')
    (folder / "validation.json").write_text('[\n{"text": "x", "label": "a"},\n{"text": }]')
    (folder / "test.json").write_text("[]")
    assert problems(folder, **files) == [
        "train.json[1]: not a JSON object",
        "train.json[2]: field 'label' is missing; this row has 'text'",
        "validation.json:3: not valid JSON: Expecting value",
        "test.json: the test split is empty",
    ]


def test_lines_of_json(folder):
    wanted = load(folder)
    (folder / "train.jsonl").rename(folder / "train.json")
    assert load(folder, train="train.json") == wanted


def test_own_column_names(folder):
    jsonl(folder / "train.jsonl", [{"sentence": "x", "text": "-", "topic": "a"}, {"sentence": "y", "topic": "b"}])
    for file in ("validation.jsonl", "test.jsonl"):
        jsonl(folder / file, [{"sentence": "z", "topic": "b"}] * 2)
    assert load(folder, text="sentence", label="topic").train[0] == {"text": "x", "label": "a"}


# Fewer rows


def test_fewer_training_rows_keep_every_label(folder):
    """Files are often sorted by label: their first rows have one label only."""
    rows = [{"text": f"{label} {i}", "label": label} for label in "abcdefgh" for i in range(25)]
    for file in FILES.values():
        jsonl(folder / file, rows)
    some = load(folder, max_train_rows=40).train
    assert some == load(folder, max_train_rows=40).train
    assert len(some) == 40
    assert [row["text"] for row in some] == [row["text"] for row in rows if row in some], "in the order of the file"
    counts = Counter(row["label"] for row in some)
    assert len(counts) == 8
    assert max(counts.values()) <= 12
    assert len({row["label"] for row in load(folder, max_train_rows=8).train}) == 8
    assert load(folder, max_train_rows=10_000).train == rows
    assert problems(folder, max_train_rows=7) == [
        "data.max_train_rows: 7 is too small: each of the 8 labels needs a row"
    ]
    # The others are whole.
    assert len(load(folder, max_train_rows=40).validation) == len(rows)


def test_fewer_rows_to_score(folder):
    rows = [{"text": f"{label} {i}", "label": label} for label in "abcdefgh" for i in range(25)]
    for file in FILES.values():
        jsonl(folder / file, rows)
    some = load(folder, max_eval_rows=40)
    assert len(some.train) == len(rows)
    for split in (some.validation, some.test):
        assert len(split) == 40
        assert {row["label"] for row in split} == set("abcdefgh")
    assert problems(folder, max_eval_rows=7, max_train_rows=3) == [
        "data.max_train_rows: 3 is too small: each of the 8 labels needs a row",
        "data.max_eval_rows: 7 is too small: each of the 8 labels needs a row",
    ]


def test_fewer_training_rows_of_a_language_model(folder):
    for file in FILES.values():
        jsonl(folder / file, [{"text": str(i)} for i in range(100)])
    some = [int(row["text"]) for row in load(folder, "causal-lm", max_train_rows=20).train]
    assert len(some) == 20
    assert some == sorted(some)
    assert max(some) > 50


# Domains

MIXED = [row | {"source": ["news", "mail"][i // 2 % 2]} for i, row in enumerate(ROWS)]


@pytest.fixture
def mixed(folder: Path) -> Path:
    """Three good splits of two sources."""
    for start, file in enumerate(FILES.values()):
        jsonl(folder / file, [row | {"text": f"{row['text']} of {start}"} for row in MIXED])
    return folder


def test_domains_that_differ_by_spaces_or_case(mixed):
    jsonl(mixed / "train.jsonl", [*MIXED, {"text": "x", "source": "News"}])
    (warning,) = load(mixed, "causal-lm", domain="source").warnings
    assert warning.startswith("domains 'news' (train.jsonl:1) and 'News' (train.jsonl:7) differ only by letter case")
    jsonl(mixed / "train.jsonl", [*MIXED, {"text": "x", "source": "news "}])
    (problem,) = problems(mixed, "causal-lm", domain="source")
    assert problem.startswith("train.jsonl:7: domain 'news ' differs from 'news' in train.jsonl:1 only by surrounding")


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_domains(mixed, task):
    splits = load(mixed, task, domain="source")
    assert splits.domains == ("mail", "news")
    assert splits.train[0]["domain"] == "news"
    without = load(mixed, task)
    assert without.domains is None
    assert without.train == [{key: value for key, value in row.items() if key != "domain"} for row in splits.train]


def test_domains_may_be_numbers_and_one_may_be_enough(mixed):
    for file in FILES.values():
        jsonl(mixed / file, [row | {"source": 10 - i % 2} for i, row in enumerate(MIXED)])
    assert load(mixed, domain="source").domains == ("9", "10")
    for file in FILES.values():
        jsonl(mixed / file, [row | {"source": 1.0} for row in MIXED])
    assert load(mixed, domain="source").domains == ("1",)


def test_domains_that_are_missing_or_none(mixed):
    bad = [None, "", " ", ["news"], "news"]
    jsonl(mixed / "train.jsonl", [row | {"source": value} for row, value in zip(MIXED, bad, strict=False)])
    jsonl(mixed / "test.jsonl", ROWS)
    assert problems(mixed, domain="source") == [
        "train.jsonl:1: field 'source' is empty",
        "train.jsonl:2: field 'source' is empty",
        "train.jsonl:3: field 'source' must be a domain (a text or a whole number), got ' '",
        "train.jsonl:4: field 'source' must be a domain (a text or a whole number), got ['news']",
        *(f"test.jsonl:{i}: field 'source' is missing; this row has 'text', 'label'" for i in range(1, 6)),
        "test.jsonl: 1 more rows with problems",
    ]


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_domains_that_training_lacks(mixed, task):
    jsonl(mixed / "validation.jsonl", [MIXED[0] | {"text": "x", "source": "blogs"}] * 2)
    assert problems(mixed, task, domain="source") == [
        "validation.jsonl:1: domains 'blogs' do not occur in the training split, train.jsonl, which has 'mail', 'news'"
    ]


def test_fewer_training_rows_keep_every_domain(mixed):
    rows = [{"text": str(i), "label": "ab"[i % 2], "source": "often" if i < 195 else f"rare {i}"} for i in range(200)]
    for file in FILES.values():
        jsonl(mixed / file, rows)
    found = load(mixed, domain="source", max_train_rows=8)
    assert len(found.train) == 8
    assert len(found.domains) == len({row["domain"] for row in found.train}) == 6
    assert len({row["label"] for row in found.train}) == 2
    assert problems(mixed, domain="source", max_train_rows=7) == [
        "data.max_train_rows: 7 is too small: each of the 2 labels and 6 domains needs a row"
    ]
    assert len({row["domain"] for row in load(mixed, "causal-lm", domain="source", max_train_rows=6).train}) == 6
    assert problems(mixed, "causal-lm", domain="source", max_train_rows=5) == [
        "data.max_train_rows: 5 is too small: each of the 6 domains needs a row"
    ]


# Rows of language models


def test_causal_rows(folder):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", "extra": 1}]
    jsonl(folder / "train.jsonl", [
        {"prompt": "a", "completion": "b", "text": "not this"},
        {"text": "c"},
        {"prompt": None, "completion": None, "text": "d"},
        {"messages": chat},
    ])  # fmt: skip
    splits = load(folder, "causal-lm")
    assert splits.labels is None
    assert splits.train == [
        {"prompt": "a", "completion": "b"},
        {"text": "c"},
        {"text": "d"},
        {"messages": chat, "turns": "all"},
    ]
    assert load(folder, "causal-lm", train_on_turns="last").train[3] == {"messages": chat}
    frame = pandas.DataFrame({"messages": [splits.train[3]["messages"]]})
    frame.to_parquet(folder / "train.parquet")
    assert load(folder, "causal-lm", train="train.parquet").train == splits.train[3:]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, "field 'completion' is missing; this row has 'prompt'"),
        ({"completion": "a", "text": "b"}, "field 'prompt' is missing"),
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": 4}, "field 'completion' must be a non-empty text, got 4"),
        (
            {"words": "a"},
            "a row needs the fields 'prompt' and 'completion', or 'messages', or 'text'; this row has 'words'",
        ),
        ({"messages": "a"}, "'messages' must be a list of objects"),
        ({"messages": ["a", "b"]}, "'messages' must be a list of objects"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "'messages' must have a message of the role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "'messages' must have a message of the role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0: 'role' and 'content' must be texts"),
    ],
)
def test_bad_causal_rows(folder, row, expected):
    jsonl(folder / "train.jsonl", [{"text": "fine"}, row])
    (problem,) = problems(folder, "causal-lm")
    assert problem.startswith(f"train.jsonl:2: {expected}")


# Leaks


def test_inputs_in_two_splits_are_named(folder):
    shared = ROWS[:2]
    jsonl(folder / "train.jsonl", [*ROWS])
    jsonl(folder / "validation.jsonl", [{"text": "new", "label": "a"}, *shared])
    jsonl(folder / "test.jsonl", [{"text": text, "label": "b"} for text in ("new", "newer")])
    assert load(folder).warnings == (
        "2 inputs occur in both train and validation: the scores will be too optimistic",
        "1 input occurs in both validation and test: the scores will be too optimistic",
    )


def test_leaks_of_chats_are_sought_in_what_is_answered(folder):
    def chat(answer: str) -> list[dict]:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        return [{"messages": messages}]

    jsonl(folder / "train.jsonl", chat("yes"))
    jsonl(folder / "validation.jsonl", [*chat("no"), {"text": "new"}])
    (warning,) = load(folder, "causal-lm").warnings
    assert warning.startswith("1 input occurs in both train and validation")


# The hub


def test_rows_of_the_hub(monkeypatch):
    asked = []
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def load_dataset(path: str, **settings: Any) -> datasets.Dataset:
        asked.append((path, settings))
        labels = [1, 0] if settings["split"] != "test" else [1, -1]
        columns = {"sentence": [f"{settings['split']} {i}" for i in range(2)], "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"source": "org/data", "revision": "abc", "text": "sentence", "validation": "dev"}
    with pytest.raises(DataError) as error:
        load_splits(DataConfig(**settings), "classification")
    assert error.value.problems == ("test[1]: field 'label' is empty",)  # -1: not told

    splits = load_splits(DataConfig(**settings, test="other"), "classification")
    assert splits.train == [{"text": "train 0", "label": "good"}, {"text": "train 1", "label": "bad"}]
    assert splits.labels == ("bad", "good")
    assert asked[-1] == ("org/data", {"split": "other", "revision": "abc"})


def test_named_domains_of_the_hub(monkeypatch):
    names = {"label": datasets.ClassLabel(names=["bad", "good"]), "origin": datasets.ClassLabel(names=["b", "a"])}
    features = datasets.Features({"text": datasets.Value("string"), **names})

    def load_dataset(path: str, split: str, **settings: Any) -> datasets.Dataset:
        columns = {"text": [split, f"{split} 2"], "label": [0, 1], "origin": [0, 1 if split != "test" else -1]}
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings: dict[str, Any] = {"source": "org/data", "domain": "origin"}
    with pytest.raises(DataError) as error:
        load_splits(DataConfig(**settings), "classification")
    assert error.value.problems == ("test[1]: field 'origin' is empty",)
    splits = load_splits(DataConfig(**settings, test="other"), "classification")
    assert splits.train[0] == {"text": "train", "label": "bad", "domain": "b"}
    assert splits.domains == ("a", "b")


@pytest.mark.parametrize("message", ["no connection\nand much more", ""])
def test_failure_of_the_hub(monkeypatch, message):
    def load_dataset(path: str, **settings: Any) -> datasets.Dataset:
        raise ConnectionError(message)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        load_splits(DataConfig(source="org/data", train="train"), "classification")
    reason = message.split("\n")[0] or "ConnectionError"
    assert error.value.problems[0] == f"train: org/data could not be loaded: {reason}"
    assert len(error.value.problems) == 3


def test_an_array_of_conversations(folder):
    """The form in which ShareGPT's rows are shared."""
    rows = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]}
        for i in range(3)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=2))
    files = {split: f"{split}.json" for split in ("train", "validation", "test")}
    assert load(folder, "causal-lm", **files).train[2] == {
        "messages": [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "a"}],
        "turns": "all",
    }
    rows[1]["conversations"][0]["from"] = "narrator"
    (folder / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as error:
        load(folder, "causal-lm", **files)
    assert error.value.problems[0].startswith("train.json[1]: message 0: unknown 'from' 'narrator': known are human")


def test_a_column_of_system_prompts_that_no_row_has(folder):
    """Rows may lack a system prompt, but a misspelt name would leave out all of them in silence."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for file in FILES.values():
        jsonl(folder / file, [{"messages": chat, "rules": "be short"}, {"messages": chat}])
    assert load(folder, "causal-lm", system="rules").train[0]["messages"][0]["content"] == "be short"
    assert problems(folder, "causal-lm", system="ruls") == [
        "data.system: no row has a column 'ruls'; did you mean 'rules'?"
    ]
