"""Metrics of quality against scikit-learn, with the checks of plug-ins for their errors."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from autopeft.search_space.metrics import ALWAYS, QUALITIES, MetricError, OverSet, Own, Quality
from autopeft.search_space.metrics.base import PREDICTION, PREDICTIONS, TARGET, TARGETS, standard_error
from autopeft.search_space.problem import METRICS, Objective
from autopeft.studies.analysis.statistics import estimate, paired_difference
from autopeft.testing import check_metric
from autopeft.testing.metrics import DEGENERATE

SKLEARN = {
    "macro-f1": lambda targets, predictions: f1_score(targets, predictions, average="macro", zero_division=0),
    "matthews": matthews_corrcoef,
}
OVER_SET = [metric for metric in QUALITIES.values() if isinstance(metric, OverSet)]
SETS = {**DEGENERATE, "one example": ([1], [0])}


def columns(targets, predictions):
    return {TARGET: [float(t) for t in targets], PREDICTION: [float(p) for p in predictions]}


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    size, labels = rng.integers(2, 80), rng.integers(2, 6)
    targets = rng.integers(labels, size=size)
    return targets, np.where(rng.random(size) < 0.5, targets, rng.integers(labels, size=size))


def test_what_is_built_in_has_an_independent_judge() -> None:
    assert SKLEARN.keys() == {metric.name for metric in OVER_SET}
    assert [metric.name for metric in ALWAYS] == ["loss", "accuracy"]
    assert all(METRICS[name] is metric for name, metric in QUALITIES.items())


@pytest.mark.parametrize("metric", OVER_SET, ids=lambda metric: metric.name)
@pytest.mark.parametrize("case", [*SETS, *range(40)])
def test_values_are_those_of_scikit_learn(metric, case) -> None:
    targets, predictions = SETS[case] if isinstance(case, str) else drawn(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = SKLEARN[metric.name](targets, predictions)
    value = metric.value(columns(targets, predictions))
    assert value == pytest.approx(expected, abs=1e-12)
    assert value <= metric.bound


@pytest.mark.parametrize("seed", range(5))
def test_of_several_labels_it_is_scikit_learns(seed: int) -> None:
    """Values, and errors by leaving one example out after the other; the last label never occurs."""
    rng = np.random.default_rng(seed)
    targets, predictions = (np.pad((rng.random((20, 3)) < 0.4).astype(int), ((0, 0), (0, 1))) for _ in range(2))
    columns = {TARGETS: targets.tolist(), PREDICTIONS: predictions.tolist()}
    able = [metric for metric in OVER_SET if metric.computable(columns)]
    assert [metric.name for metric in able] == ["macro-f1"]
    for metric in able:
        value = SKLEARN[metric.name](targets, predictions)
        assert metric.value(columns) == pytest.approx(value, abs=1e-12)
        without = [SKLEARN[metric.name](np.delete(targets, i, 0), np.delete(predictions, i, 0)) for i in range(20)]
        found = metric.contributions(columns)
        assert np.mean(found) == pytest.approx(value, abs=1e-12)
        expected = np.sqrt(19 / 20 * ((without - np.mean(without)) ** 2).sum())
        assert standard_error(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", OVER_SET, ids=lambda metric: metric.name)
def test_errors_cover(metric) -> None:
    """Of sets drawn from one population, 95 of 100 intervals have its value; and the same of paired differences."""
    rng = np.random.default_rng(5)
    size, draws = 150, 300

    def population(count):
        targets = rng.choice(3, p=[0.5, 0.3, 0.2], size=count)
        guesses = rng.integers(3, size=(2, count))
        hard = rng.random(count)  # what one gets wrong the other is likely to get wrong, too
        return targets, *(np.where(hard < part, targets, own) for part, own in zip((0.6, 0.5), guesses, strict=True))

    targets, *both = population(400_000)
    truth = [metric.of(targets, own) for own in both]
    within = paired = 0
    unpaired_width = paired_width = 0.0
    for _ in range(draws):
        targets, *both = population(size)
        first, second = (metric.contributions(columns(targets, own)) for own in both)
        alone, difference = estimate(first), paired_difference(first, second)
        within += alone.low <= truth[0] <= alone.high
        paired += difference.low <= truth[0] - truth[1] <= difference.high
        paired_width += difference.std_err
        unpaired_width += np.hypot(alone.std_err, estimate(second).std_err)
    assert 0.91 <= within / draws <= 0.98
    assert 0.91 <= paired / draws <= 0.98
    assert paired_width < 0.95 * unpaired_width, "pairing takes out what is hard for both"


# A user's own


def own(folder: Path, text: str, place: str = "mine:score") -> Own:
    (folder / "mine.py").write_text(text)
    return Own.declared("my_score", place).loaded(folder)


def test_an_own_metric(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("HALF = 0.5\n")
    found = own(
        tmp_path,
        "from helper import HALF\n"
        "def score(targets, predictions):\n"
        "    predictions[0] = 7  # of a copy\n"
        "    return HALF * (targets[1:] == predictions[1:]).sum()\n",
    )
    targets, predictions = np.array([0, 1, 1]), np.array([0, 1, 0])
    assert found.of(targets, predictions) == 0.5
    assert predictions[0] == 0
    assert found == Own.declared("my_score", "mine:score")
    assert str(tmp_path) not in sys.path


def test_modules_of_one_name_do_not_meet(tmp_path: Path) -> None:
    for value in (1, 2):
        folder = tmp_path / str(value)
        folder.mkdir()
        assert own(folder, f"def score(t, p): return {value}").of(np.array([0]), np.array([0])) == value
        assert own(folder, f"def score(t, p): return -{value}").of(np.array([0]), np.array([0])) == -value, "edited"


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "mine", "'mine' does not have the form module:function, such as my_module:my_score"),
        ("", "mine.py:a b", "'mine.py:a b' does not have the form module:function"),
        ("", "other:score", "no module other: put other.py into "),
        ("import nowhere_at_all", "mine:score", "the module mine cannot be imported: No module named 'nowhere_at_all'"),
        ("def score(:", "mine:score", "the module mine cannot be imported: SyntaxError: "),
        ("raise SystemExit(3)", "mine:score", "the module mine cannot be imported: SystemExit: 3"),
        ("def scores(t, p): pass", "mine:score", "the module mine has no function 'score'; did you mean 'scores'?"),
        ("score = 3", "mine:score", "the module mine has no function 'score'"),
    ],
)
def test_what_is_wrong_with_the_code_of_an_own_metric(tmp_path: Path, text, place, what) -> None:
    with pytest.raises(MetricError) as caught:
        own(tmp_path, text, place)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return 1 / 0", "the metric my_score (mine:score) raised ZeroDivisionError: division by zero"),
        ("return float('nan')", "the metric my_score (mine:score) returned nan, not a finite number"),
        ("return None", "the metric my_score (mine:score) returned None, not a finite number"),
        ("return '0.5'", "the metric my_score (mine:score) returned '0.5', not a finite number"),
        ("return 10 ** 400", "not a finite number"),
        ("return [1, 2]", "the metric my_score (mine:score) returned [1, 2], not a finite number"),
    ],
)
def test_what_an_own_metric_may_not_return(tmp_path: Path, body, what) -> None:
    found = own(tmp_path, f"def score(t, p):\n    {body}\n")
    with pytest.raises(MetricError) as caught:
        found.contributions(columns([0, 1], [1, 0]))
    assert what in str(caught.value)


@pytest.mark.parametrize("metric", QUALITIES.values(), ids=lambda metric: metric.name)
def test_it_passes_the_checks_of_plug_ins(metric: Quality) -> None:
    check_metric(metric)


def test_objectives_over_metrics_of_either_kind() -> None:
    mine = Own.declared("my_score", "mine:score", maximise=False)
    assert not Objective.of("my_score", own=mine).maximise
    assert Objective.of("my_score", own=mine).is_quality
    assert Objective.of("macro-f1").maximise
    assert Objective.of("macro-f1").is_quality
    assert not Objective.of("num_params").is_quality
    with pytest.raises(KeyError):
        Objective.of("my_score")


def test_metrics_are_declared_without_torch() -> None:
    words = "import sys, autopeft.search_space.problem; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
