"""The embedded data set `functions`: nothing leaks between its splits, and its sources alone decide its rows."""

from __future__ import annotations

import json
import platform
import sysconfig
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators.data.functions import build
from autopeft.evaluators.data.splits import load_splits
from autopeft.evaluators.data.topics.build import near_duplicates
from autopeft.evaluators.rows import DataConfig

FOLDER = Path(build.__file__).parent

SOURCE = '''
class Queue:
    @property
    def size(self):
        """Return the number of items in the queue.

        It may be wrong by the time that it is read.
        """
        # the lock
        return len(self.items)  # items only

    def __len__(self):
        """Return the number of items there are."""
        return self.size

    def put(self, item):
        """Put an item
        into the queue."""
        self.items.append(item)

    def nothing(self):
        """Do nothing with the queue."""

    def short(self):
        """Too short."""
        return self

    def open(self):
        """Do not end with a full stop"""
        return self

def long(x):
    """Call the function many times in a row."""
    return [''' + ", ".join(f"x{i}" for i in range(60)) + "]\n"  # fmt: skip


def committed(split: str) -> list[list[dict[str, str]]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


ROWS = {split: committed(split) for split in build.SPLITS}


def test_each_row_is_a_chat_of_three_messages_with_either_question() -> None:
    for rows in ROWS.values():
        for system, user, assistant in rows:
            assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
            assert system["content"] == build.SYSTEM
            if user["content"].startswith(build.ASKS_DOCSTRING):
                compile(user["content"].removeprefix(build.ASKS_DOCSTRING).strip(), "row", "exec")
                assert assistant["content"].endswith(".")
            else:
                assert user["content"].startswith(build.ASKS_NAME)
                assert assistant["content"].isidentifier()


def test_the_splits_have_hundreds_of_rows_and_both_questions_in_like_shares() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 732, "validation": 160, "test": 160}
    for rows in ROWS.values():
        asked = [user["content"].startswith(build.ASKS_DOCSTRING) for _, user, _ in rows]
        assert 0.4 < sum(asked) / len(asked) < 0.6


def test_no_question_and_no_docstring_has_a_near_duplicate_in_any_split() -> None:
    rows = list(chain.from_iterable(ROWS.values()))
    assert len({user["content"] for _, user, _ in rows}) == len(rows)
    docstrings = [answer["content"] for _, user, answer in rows if user["content"].startswith(build.ASKS_DOCSTRING)]
    docstrings += [user["content"] for _, user, _ in rows if user["content"].startswith(build.ASKS_NAME)]
    assert all(
        len(group) == 1 for group in near_duplicates([text.removeprefix(build.ASKS_NAME) for text in docstrings])
    )
    sources = [user["content"] for _, user, _ in rows if user["content"].startswith(build.ASKS_DOCSTRING)]
    assert all(
        len(group) == 1 for group in near_duplicates([text.removeprefix(build.ASKS_DOCSTRING) for text in sources])
    )


def test_functions_are_read_without_docstring_comments_and_decorators() -> None:
    found = list(build.functions(SOURCE.encode(), "queue.py"))
    assert found == [
        build.Function(
            "size",
            "def size(self):\n    return len(self.items)",
            "Return the number of items in the queue.",
            "queue.py",
        )
    ]


def test_a_module_is_in_one_split(tmp_path: Path) -> None:
    names = ["red", "green", "blue", "black", "white", "amber", "coral", "ivory", "olive", "plum"]
    for module in names:
        body = "".join(
            f'def {module}_{other}(x):\n    """Paint the {module} {other} of x."""\n    return {module} + {other}\n\n'
            for other in ["door", "wall", "roof", "floor"]
        )
        (tmp_path / f"{module}.py").write_text(body)
    splits = build.split(build.select(build.read(tmp_path)))
    modules = [{each.module for each in members} for members in splits.values()]
    assert sum(map(len, modules)) == len(set().union(*modules)) == len(names)
    assert build.build(tmp_path) == build.build(tmp_path)


def test_the_rows_are_those_of_the_source_embedded_functions() -> None:
    splits = load_splits(DataConfig(source="embedded-functions"), "causal-lm")
    assert [row["messages"] for row in splits.validation] == ROWS["validation"]
    assert not splits.warnings


def shown(rows: Any) -> list[Any]:
    return [json.loads(line)["messages"] for line in build.to_jsonl(rows).splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != build.BUILT_WITH, reason="the library of another Python")
def test_a_rebuild_equals_the_committed_files() -> None:
    for split, rows in build.build(Path(sysconfig.get_path("stdlib"))).items():
        assert shown(rows) == ROWS[split]
        assert (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") == build.to_jsonl(rows)
