"""The embedded data set `topics`: nothing leaks between its splits, and its sources alone decide its rows."""

import json
import platform
import sysconfig
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from autopeft.evaluators.data.topics import build

FOLDER = Path(build.__file__).parent

SOURCES = {
    "socket.py": '"""Low-level networking interface of the operating system."""\n',
    "json/decoder.py": '''
class Decoder:
    """Decoder(strict=True) -> decoder

    Turns a document into Python objects.
    -------------------------------------
    >>> Decoder().decode("[1]")
    [1]

    The rest of the explanation.
    """
    def decode(self):
        """Return the Python representation of the document number 1."""
    async def other(self):
        """Return the Python representation of the document, number 2!"""
    def short(self):
        """Return it."""
''',
    "asyncio/queues.py": 'def get():\n    """Wait for, remove and return one item from the queue."""\n',
    "tarfile.py": 'def get():\n    """Wait for, remove, and return an item from the queue."""\n',
    "asyncio/tests/case.py": '"""Checks of the event loop that nobody should read here."""\n',
    "unknown.py": '"""A module that is assigned to no topic at all."""\n',
}


def committed(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, source in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path


def test_rows_have_a_text_and_a_label():
    for split in build.SPLITS:
        for row in committed(split):
            assert set(row) == {"text", "label"}
            assert len(build.words(row["text"])) >= build.MIN_WORDS
            assert len(row["text"].split()) <= build.MAX_WORDS


def test_every_split_has_all_labels_in_equal_shares():
    counts = {split: Counter(row["label"] for row in committed(split)) for split in build.SPLITS}
    for split, share in build.SPLITS.items():
        assert set(counts[split]) == set(build.TOPICS)
        for label in build.TOPICS:
            assert counts[split][label] == pytest.approx(share * sum(count[label] for count in counts.values()), abs=1)


def test_no_text_has_a_near_duplicate_in_any_split():
    texts = [row["text"] for split in build.SPLITS for row in committed(split)]
    assert all(len(group) == 1 for group in build.near_duplicates(texts))


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    texts = [row["text"] for row in committed("test")[:150]]
    texts += [" ".join(text.split()[1:]) for text in texts[:100]]
    groups = build.near_duplicates(texts)
    group_of = {index: group for group, members in enumerate(groups) for index in members}
    assert sorted(group_of) == list(range(len(texts)))
    sets = [build.words(text) for text in texts]
    for one, other in combinations(range(len(texts)), 2):
        if len(sets[one] & sets[other]) >= build.NEAR_DUPLICATE * len(sets[one] | sets[other]):
            assert group_of[one] == group_of[other]
    assert 150 <= len(groups) < len(texts)


def test_docstrings_are_cleaned_deduplicated_and_labelled(library: Path):
    assert {row.text: row.label for row in build.select(build.documented(library))} == {
        "Low-level networking interface of the operating system.": "internet protocols and sockets",
        "Turns a document into Python objects. The rest of the explanation.": "markup and file formats",
        # The hash chooses between the duplicates number 1 and 2.
        "Return the Python representation of the document, number 2!": "markup and file formats",
    }


def test_the_build_depends_on_the_sources_alone(library: Path):
    assert build.build(library) == build.build(library)
    rows = list(build.documented(library))
    assert build.select(rows) == build.select(reversed(rows))


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != build.BUILT_WITH, reason="the library of another Python")
def test_a_rebuild_equals_the_committed_files():
    for split, rows in build.build(Path(sysconfig.get_path("stdlib"))).items():
        assert (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") == build.to_jsonl(rows)
