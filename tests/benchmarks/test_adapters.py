"""The table of adapter types: its rows, a run that is killed and goes on, and what the table says of known results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from scipy.special import stdtrit

from autopeft.benchmarks.__main__ import main
from autopeft.benchmarks.adapters import report
from autopeft.benchmarks.adapters.rows import HEAD, LARGE, PARTS, RATES, SMALL, rows_of
from autopeft.benchmarks.adapters.runs import TUNING_SEED, Results, RowCosts, Run, read
from autopeft.evaluators.costs import measurement
from autopeft.search_space.adapters import ADAPTERS
from autopeft.search_space.problem import METRICS
from autopeft.studies.config.loading import load_study
from autopeft.studies.reports.markdown import with_section
from autopeft.testing.spaces import encoder

from ..support.tiny_study import save_study

KINDS = ("ia3", "norm")


# Rows


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_type_has_rows_by_itself(kind: str) -> None:
    """A small and a large one by the default size, where the type has one; each trains something."""
    rows = rows_of([kind])
    assert len({str(row.setting) for row in rows}) == len(rows)
    sizes = {row.size: row.place(encoder()).num_params(encoder()) for row in rows}
    assert all(sizes.values())
    if ADAPTERS[kind].size_field is not None:
        assert sizes.keys() == {SMALL, LARGE}
    if len(sizes) > 1:
        assert sizes[SMALL] < sizes[LARGE]


def test_the_parts_name_types_that_there_are() -> None:
    for name, part in PARTS.items():
        assert {*part.default_kinds} <= {HEAD, *ADAPTERS}, name
        assert load_study(part.study).objectives_list()[-1].name == "num_params", name
    given = {kind for kind in ADAPTERS if ADAPTERS[kind].takes_given}
    assert {*PARTS["encoder"].default_kinds} == {HEAD, *ADAPTERS} - given, "nothing is given here"


# Runs


def run_command(capsys: pytest.CaptureFixture[str], study: Path, results: Path, seeds: str) -> dict[str, Any]:
    words = ("--model", str(study), "--results", str(results), "--kinds", ",".join(KINDS), "--seeds", seeds, "--json")
    with pytest.raises(SystemExit) as ended:
        main(["adapters", *words])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


def tiny(folder: Path) -> Path:
    return save_study(
        folder,
        training={"epochs": 1, "batch_size": 16},
        objectives=["accuracy", "loss", "num_params"],
        baselines={"names": []},
    )


def test_a_killed_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "MAX_REPEATS", measurement.MIN_REPEATS)
    study, path = tiny(tmp_path / "study"), tmp_path / "adapters.jsonl"
    found = run_command(capsys, study, path, "1")
    assert [line["kind"] for line in found["rows"]] == ["ia3", "norm"]
    whole = read(path)
    for costs in whole.costs:
        own = [run for run in whole.runs if run.architecture == costs.architecture]
        *tuned, fresh = own
        accuracy = {run.learning_rate: run.values["accuracy"] for run in tuned}
        assert tuple(accuracy) == RATES
        assert {run.seed for run in tuned} == {TUNING_SEED}
        assert fresh.seed == 1
        assert fresh.learning_rate == max(RATES, key=lambda rate: (accuracy[rate], -rate))
        assert [bool(run.test) for run in own] == [False] * len(RATES) + [True]

    # Killed in the middle of the line of the first training with a fresh seed.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(RATES)]) + lines[len(RATES)][:300])
    assert read(path) == Results(whole.runs[: len(RATES)])
    again = run_command(capsys, study, path, "1,2")
    resumed = read(path)
    assert resumed.runs[: len(RATES)] == whole.runs[: len(RATES)], "what is there is not trained again"
    assert {(run.architecture, run.learning_rate, run.seed): run.test for run in resumed.runs if run.seed < 2} == {
        (run.architecture, run.learning_rate, run.seed): run.test for run in whole.runs
    }
    assert len(resumed.runs) == len(whole.runs) + len(KINDS)
    assert [line["seeds"] for line in again["rows"]] == [[1, 2]] * len(KINDS)


def test_results_with_other_inputs_are_apart() -> None:
    results = Results(tuple(made("lora", "rank 2", (1,), 0)), ())
    other = replace(results.runs[0], inputs="other")
    both = Results((*results.runs, other))
    assert both.of("made") == Results((other,)), "the last ones"
    assert both.of("made", "") == results


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--kinds", "lora,lroa"), "lroa"),
        (("--seeds", "0,1"), "at least 1"),
        (("--model", "nothing.yaml"), "nothing.yaml"),
    ],
)
def test_bad_words(words: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", *words])
    assert ended.value.code == 2
    assert what in capsys.readouterr().err


# The table

ROWS = 200


def made(kind: str, setting: str, seeds: Sequence[int], right: int) -> list[Run]:
    """Trainings of a row that is right on its first `right` test rows with each seed; the third rate is the best."""
    return [
        Run(
            study="made", inputs="", kind=kind, size=SMALL, setting=setting, architecture=f"{kind} {setting}",
            learning_rate=rate, seed=seed,
            values={"accuracy": 0.5 - 0.01 * abs(RATES.index(rate) - 2)},
            test={} if seed == TUNING_SEED else {"accuracy": [1] * right + [0] * (ROWS - right)},
            train_s=1.0,
        )
        for seed, rates in ((TUNING_SEED, RATES), *((seed, RATES[2:3]) for seed in seeds))
        for rate in rates
    ]  # fmt: skip


def costs(kind: str, setting: str, num_params: float, step: float) -> RowCosts:
    return RowCosts(
        study="made", inputs="", kind=kind, size=SMALL, setting=setting, architecture=f"{kind} {setting}",
        costs={"num_params": num_params, "stored_bytes": 4 * num_params, "step_s": step, "peak_memory_bytes": 3e6},
        lora={"step_s": 2.0, "peak_memory_bytes": 2e6},
    )  # fmt: skip


#: Type, setting, parameters, test rows of 200 that are right.
MADE = (
    ("oft", "block_size 8", 2000.0, 120),
    ("ia3", "", 100.0, 100),
    ("vera", "rank 64", 1500.0, 158),
    ("lora", "rank 8", 1000.0, 160),
)


def results_of() -> Results:
    runs = [run for kind, setting, _, right in MADE for run in made(kind, setting, (1, 2), right)]
    failed = replace(made("lora", "rank 8", (3,), 0)[-1], test={}, failure="the training loss became nan")
    return Results((*runs, failed), tuple(costs(kind, setting, size, 3.0) for kind, setting, size, _ in MADE))


def test_the_table_of_known_results() -> None:
    found = report.table_of(results_of(), [METRICS["accuracy"]])
    assert [line.kind for line in found.lines] == ["ia3", "lora", "vera", "oft"], "by their parameters"
    # Both seeds agree, so that only the rows spread: Agresti and Coull's interval with Student's quantile.
    lora = found.lines[1].estimates["accuracy"]
    centre, rows = 162 / 204, 204
    half = stdtrit(ROWS - 1, 0.975) * sqrt(centre * (1 - centre) / (rows - 1))
    assert (lora.value, lora.low, lora.high) == pytest.approx((0.8, centre - half, centre + half))
    # 80 and 79 % cannot be told apart, though the second has more parameters; 60 % is shown to be worse than 80 %.
    assert [line.on_front for line in found.lines] == ["yes", "yes", "open", "no"]
    assert found.lines[1].seeds == (1, 2), "the third has no result"
    text = report.to_markdown(found)
    assert "| `lora` | rank 8 | 1,000 | 4.0 | 80.0 (73.8 to 85.0) | 1.50 | 1.50 | 0.003 | yes |" in text
    assert "No place on the front, in either setting: `oft`." in text
    assert "Trainings without a result: lora rank 8 at 0.003, seed 3: the training loss became nan." in text
    assert "lora rank 8 is the best" in text


def test_a_row_lacks_until_it_is_measured() -> None:
    whole = results_of()
    tuned = Results(tuple(run for run in whole.runs if run.kind != "ia3" or run.seed == TUNING_SEED), whole.costs)
    assert [line.kind for line in report.table_of(tuned, [METRICS["accuracy"]]).lines] == ["lora", "vera", "oft"]
    assert report.to_markdown(report.table_of(Results(), [METRICS["accuracy"]])) == f"{report.NOT_MEASURED}\n"


def test_a_best_rate_at_the_end_of_the_grid_is_marked() -> None:
    whole = results_of()
    runs = [replace(run, values={"accuracy": run.learning_rate}) for run in whole.runs]
    runs = [run if run.seed == TUNING_SEED else replace(run, learning_rate=RATES[-1]) for run in runs]
    text = report.to_markdown(report.table_of(Results(tuple(runs), whole.costs), [METRICS["accuracy"]]))
    assert text.count("| 0.03 (edge) |") == len(MADE)


def test_the_page_is_what_the_results_say() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    results = read(report.PAGE.parents[1] / "benchmarks" / "results" / "adapters.jsonl")
    assert with_section(page, report.BEGIN, report.END, report.section(results)) == page


def test_the_report_is_written_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    study = load_study(PARTS["encoder"].study).study
    whole = results_of()
    runs = tuple(
        replace(run, study=study, test={**run.test, "loss": [1.0] * ROWS} if run.test else {}) for run in whole.runs
    )
    report.write(Results(runs, tuple(replace(found, study=study) for found in whole.costs)), page)
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "### An encoder" in text
    assert "old" not in text
    assert "| `ia3` |" in text
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="lacks the marks"):
        report.write(whole, page)
