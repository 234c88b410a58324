"""Metrics of generated texts: the numbers of the packages that papers use, patterns, and functions of the user."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.search_space.metrics import (
    QUALITIES,
    MetricError,
    OfTexts,
    OwnOfTexts,
    RegexMatch,
    user_defined,
)
from autopeft.search_space.metrics.texts import GENERATED, PROMPTS, REFERENCES, ExactMatch, with_numbers
from autopeft.testing import check_metric

#: Texts with words that recur, so that pairs overlap, and any others.
WORDS = st.lists(st.sampled_from(["a", "cat", "The", "sat.", "on", "MAT", "1,5", "é", "", "\n"]), max_size=9)
SOME = WORDS.map(" ".join) | st.text(max_size=12)
PAIRS = st.lists(st.tuples(SOME, SOME), min_size=1, max_size=4)
OF_TEXTS = [name for name, metric in QUALITIES.items() if isinstance(metric, OfTexts) and not metric.runs_code]


def numbers(name: str, generated: list[str], references: list[str]) -> list[float]:
    metric: Any = QUALITIES[name]
    return list(metric.of([""] * len(generated), generated, references))


@pytest.mark.parametrize("name", [*OF_TEXTS, "pass-at-1"])
def test_a_metric_of_texts_is_a_mean_with_its_standard_error(name: str) -> None:
    check_metric(QUALITIES[name])


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_rouge_l_is_that_of_rouge_score(pairs: list[tuple[str, str]]) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"])
    own, references = map(list, zip(*pairs, strict=True))
    expected = [scorer.score(target, text)["rougeL"].fmeasure for text, target in pairs]
    assert numbers("rouge-l", own, references) == expected


@given(PAIRS)
@settings(deadline=None, max_examples=60)
def test_chrf_and_bleu_are_those_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    own, references = map(list, zip(*pairs, strict=True))
    chrf = [sacrebleu.sentence_chrf(text, [target]).score / 100 for text, target in pairs]
    assert numbers("chrf", own, references) == pytest.approx(chrf, abs=1e-12)
    bleu = [sacrebleu.sentence_bleu(text, [target]).score / 100 for text, target in pairs]
    assert numbers("bleu", own, references) == pytest.approx(bleu, abs=1e-12)
    assert all(0 <= number <= 1 for name in ("chrf", "bleu") for number in numbers(name, own, references))


def test_white_space_around_a_text_is_no_part_of_an_exact_match() -> None:
    assert numbers("exact-match", [" a b\n", "a  b", "", "A b"], ["a b", "a b", "", "a b"]) == [1, 0, 1, 0]


@pytest.mark.parametrize("name", OF_TEXTS)
def test_an_empty_text_is_a_text(name: str) -> None:
    metric: Any = QUALITIES[name]
    (number,) = metric.of(["q"], [""], ["a b"])
    # A regular expression without a pattern is found in every text; a study has one.
    assert number == (name == "regex-match")


def test_a_pattern_is_found_or_its_groups_agree_with_the_reference() -> None:
    found = RegexMatch().with_pattern(r"^\d+$").of(["", ""], ["12", "twelve"], ["", ""])
    assert list(found) == [1, 0]
    answer = RegexMatch().with_pattern(r"#### (-?\d+)")
    texts = ["so #### 5", "#### 6 no #### 5", "5"]
    assert list(answer.of([""] * 3, texts, ["#### 5"] * 3)) == [1, 0, 0]
    with pytest.raises(MetricError, match="not found in the reference 'five'"):
        answer.of([""], ["#### 5"], ["five"])


def test_the_numbers_take_the_place_of_the_texts() -> None:
    columns = {"loss": [1.0, 2.0], PROMPTS: ["p", "q"], GENERATED: ["a", "b"], REFERENCES: ["a", "c"]}
    metric: Any = QUALITIES["exact-match"]
    found = with_numbers(columns, [metric])
    assert found == {"loss": [1.0, 2.0], "exact-match": [1.0, 0.0]}
    assert metric.computable(columns)
    assert metric.computable(found)
    assert metric.value(found) == 0.5


def test_a_missing_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.search_space.metrics.base.find_spec", lambda name: None)
    metric: Any = QUALITIES["rouge-l"]
    assert metric.lacking() == (
        "the metric rouge-l needs the package rouge-score, which is not installed: pip install rouge-score"
    )
    exact: Any = QUALITIES["exact-match"]
    assert exact.lacking() is None


def own(folder: Path, body: str) -> Any:
    (folder / "mine.py").write_text(f"def score(prompts, generated, references):\n    x = 0\n    {body}\n")
    return user_defined("mine", "mine:score", True, of_texts=True).loaded(folder)


def test_an_own_function_returns_a_number_per_row_and_gets_copies(tmp_path: Path) -> None:
    metric = own(tmp_path, "generated.clear(); return (float(p == r) for p, r in zip(prompts, references))")
    with pytest.raises(MetricError, match="not a number per row"):
        metric.of(["a"], ["b"], ["a"])
    metric = own(tmp_path, "return [len(g) - len(r) for p, g, r in zip(prompts, generated, references)]")
    assert isinstance(metric, OwnOfTexts)
    assert metric.of(["q", "q"], ["abc", ""], ["a", "b"]) == [2.0, -1.0]


@pytest.mark.parametrize(
    ("body", "line", "what"),
    [
        ("return 1 / 0", 3, "raised ZeroDivisionError: division by zero"),
        ("return [0.5, float('nan')]", 1, "returned nan, not a finite number for a row"),
        ("return [0.5]", 1, "returned 1 numbers for 2 rows"),
        ("return 0.5", 1, "returned 0.5, not a number per row"),
        ("return ['0.5', 1]", 1, "returned a text for a row"),
        ("return None", 1, "returned None, not a number per row"),
    ],
)
def test_an_error_of_an_own_function_has_its_file_and_line(tmp_path: Path, body: str, line: int, what: str) -> None:
    with pytest.raises(MetricError) as caught:
        own(tmp_path, body).of(["q", "q"], ["abc", ""], ["a", "b"])
    assert str(caught.value) == f"the metric mine (mine:score, {tmp_path / 'mine.py'}:{line}) {what}"


def test_an_own_function_that_goes_on_is_named_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("autopeft.search_space.metrics.own.SLOW_S", 0.01)
    body = "\n    ".join(
        (
            "import logging, time",
            "root, end = logging.getLogger(), time.monotonic() + 60",
            "while prompts[0] not in root.said and time.monotonic() < end: time.sleep(0.001)",
            "return [1.0] * len(prompts)",
        )
    )
    metric = own(tmp_path, body)
    root: Any = logging.getLogger()

    class Said:
        """The warnings so far, as the function asks for them."""

        def __contains__(self, what: str) -> bool:
            return what in caplog.text

    monkeypatch.setattr(root, "said", Said(), raising=False)
    assert metric.of(["has run for 0.02 s on 2 rows", "q"], ["a", "b"], ["a", "b"]) == [1.0, 1.0]
    first, second = caplog.messages[:2]
    assert first.startswith(f"the metric mine (mine:score, {tmp_path / 'mine.py'}:1) has run for 0.01 s on 2 rows")
    assert "has run for 0.02 s" in second
    said = len(caplog.messages)
    assert metric.of(["", "q"], ["a", "b"], ["a", "b"]) == [1.0, 1.0]
    assert len(caplog.messages) == said


@pytest.mark.parametrize(
    ("numbers", "what"),
    [([1.5, 0.0], "is 1.5 in row 1, not from 0 to 1"), ([0.0, float("nan")], "is nan in row 2"),
     ([0.0], "has 1 numbers for 2 rows")],
)  # fmt: skip
def test_numbers_that_a_metric_cannot_have_are_refused(numbers: list[float], what: str) -> None:
    class Wrong(ExactMatch):
        def of(self, *texts: Any) -> list[float]:
            return numbers

    columns = {PROMPTS: ["p", "q"], GENERATED: ["a", "b"], REFERENCES: ["a", "c"]}
    with pytest.raises(MetricError, match=what):
        with_numbers(columns, [Wrong()])
