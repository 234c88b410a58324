"""Studies from Python: the same as those of files, in one folder with them, and their results as objects."""

from __future__ import annotations

import json
import shutil
import signal
from math import isfinite
from pathlib import Path
from typing import Any

import pandas
import pytest
from matplotlib.figure import Figure

from autopeft.search_space.declaration import AdapterChoice, OneOf
from autopeft.search_space.domains import Choice, Float, Int
from autopeft.studies.cli.app import main
from autopeft.studies.cli.progress import ProgressView
from autopeft.studies.config.checks.settings import _model_with_everything
from autopeft.studies.config.declaration import declare
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.written import setting_of, space_section
from autopeft.studies.errors import ConfigurationError, NoFeasibleCandidateError, UserError
from autopeft.studies.notebook import Result, Study

from ...support.fresh import FreshProcess
from ...support.tiny_study import save_data, save_model, save_study, settings
from ..engine.test_study import Quiet, facts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_data(folder)
    return folder


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


SPACE = [
    AdapterChoice(
        kind="lora", at=("attn.q", "attn.v"), fields={"rank": Choice.of([0, 1, 2, 4])}, vary={"rank": "layer"}
    )
]


def declared(inputs: Path, folder: Path, **changes: Any) -> Study:
    """The study of `tiny_study.settings` in Python."""
    like = settings()
    tables = {split: pandas.DataFrame(rows_of(inputs, split)) for split in ("train", "validation", "test")}
    arguments: dict[str, Any] = {
        "model": inputs / "model",
        "data": {**tables, "max_length": 16},
        "space": SPACE,
        "trials": 6,
        "name": "tiny",
        "folder": folder,
        "training": {"learning_rate": Float(low=1e-3, high=1e-1, log=True), "epochs": 4, "batch_size": 8},
        "search": {"searcher": "tpe", "batch": 3},
        **{key: like[key] for key in ("baselines", "finalists", "tracking", "device")},
    }
    return Study(**{**arguments, **changes})


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Result]:
    study = declared(inputs, tmp_path_factory.mktemp("finished"))
    return study, study.run(progress=False)


# One study, whoever goes on with it


def run_command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def found(result: Result) -> Any:
    return facts(list(result.snapshot.trials))


def num_complete(result: Result) -> int:
    return sum(trial.state == "complete" for trial in result.snapshot.search_trials)


def test_python_and_a_file_find_the_same(finished: tuple[Study, Result], tmp_path: Path) -> None:
    study = Study.load(save_study(tmp_path))
    assert found(study.run(progress=False)) == found(finished[1])


@pytest.mark.slow
def test_started_in_python_and_resumed_by_the_command(
    inputs: Path, finished: tuple[Study, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = declared(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        study.run(progress=Quiet(stop_after=4))
    assert load_study(tmp_path).model_dump() == study.settings.model_dump()
    assert load_study(tmp_path).output_folder == tmp_path
    assert run_command("run", tmp_path, "--resume", "--json") == 0, capsys.readouterr().err
    printed = json.loads(capsys.readouterr().out)
    assert [row["trial"] for row in printed] == [member.trial for member in finished[1].front]
    assert found(study.result()) == found(finished[1])
    assert found(study.run(progress=False)) == found(finished[1]), "there is nothing left to do"


@pytest.mark.slow
def test_started_by_the_command_and_resumed_in_python(
    inputs: Path, finished: tuple[Study, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    save_study(tmp_path, output=".")
    text = file.read_text()
    assert run_command("run", file, "--set", "search.trials=3") == 0, capsys.readouterr().err
    tables = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    study = declared(inputs, tmp_path, model=tmp_path / "model", data={"source": "files", **tables, "max_length": 16})
    assert num_complete(study.result()) == 3
    result = study.run(progress=False)
    assert study.settings.model_dump() == load_study(tmp_path).model_dump()
    assert num_complete(result) == 6
    assert file.read_text() == text, "a file of somebody's own stays as it is"


@pytest.mark.slow
def test_an_interrupt_ends_it_between_two_steps(
    inputs: Path, finished: tuple[Study, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []

    def end(view: ProgressView, trial: Any, snapshot: Any) -> None:
        ended.append(trial)
        if len(ended) == 3:
            signal.raise_signal(signal.SIGINT)

    study = declared(inputs, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProgressView, "end", end)
        study.run(progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(ended) == 3
    assert found(study.run(progress=False)) == found(finished[1])


@pytest.mark.slow
def test_more_trials_may_be_asked_for(inputs: Path, tmp_path: Path) -> None:
    declared(inputs, tmp_path, trials=3).run(progress=False)
    result = declared(inputs, tmp_path, trials=6).run(progress=False)
    assert len(result.snapshot.search_trials) >= 6
    assert load_study(tmp_path).search.trials == 6


def test_other_rows_or_settings_are_refused(inputs: Path, tmp_path: Path) -> None:
    declared(inputs, tmp_path, trials=1, finalists={"seeds": 1, "most": 1}).run(progress=False)
    tables = {split: rows_of(inputs, split) for split in ("train", "validation", "test")}
    tables["train"] = tables["train"][1:]
    written_before = (tmp_path / "data" / "train.jsonl").read_text()
    with pytest.raises(ConfigurationError, match="the rows of train have changed"):
        declared(inputs, tmp_path, data={**tables, "max_length": 16}).run(progress=False)
    with pytest.raises(ConfigurationError, match="seed: was 0, is 7"):
        declared(inputs, tmp_path, seed=7).run(progress=False)
    assert (tmp_path / "data" / "train.jsonl").read_text() == written_before
    assert load_study(tmp_path).seed == 0


def test_the_file_of_another_study_is_kept(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("study: mine\nspace: {preset: autopeft}\n")
    with pytest.raises(ConfigurationError, match=r'study: was "mine", is "tiny"'):
        declared(inputs, tmp_path).run(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


# Results


def test_one_row_for_each_trial(finished: tuple[Study, Result]) -> None:
    result = finished[1]
    table = result.to_pandas()
    assert list(table.index) == [trial.number for trial in result.snapshot.trials]
    assert set(table[table.role == "search"].state) == {"complete", "infeasible"} & set(table.state)
    genes = table["training.learning_rate"]
    assert genes[table.role == "search"].between(1e-3, 1e-1).all()
    assert genes[table.role == "finalist"].isna().all()
    assert {"accuracy", "accuracy_std_err", "num_params", "error"} <= set(table.columns)
    assert list(table.index[table.recommended]) == [result.recommended.trial]
    first = result.snapshot.trials[0]
    assert table.loc[0, "accuracy"] == first.values["accuracy"]
    assert table.loc[0, "state"] == first.state
    assert set(table.of.dropna()) <= set(table.index)
    assert table.of.dtype == "Int64"


def test_the_front_and_its_members(finished: tuple[Study, Result], tmp_path: Path) -> None:
    result = finished[1]
    rows = {row.trial: row for row in result.snapshot.rows()}
    assert {member.trial for member in result.front} == {number for number, row in rows.items() if row.on_front}
    for member in result.candidates:
        assert member.values == rows[member.trial].values
        assert member.std_err == rows[member.trial].std_err
        assert member.architecture.num_params(result.snapshot.backbone) == member.values["num_params"]
    assert result.recommended.recommended
    assert result.pick("best") == result.front[0]
    assert repr(result).startswith("tiny: front of")
    assert "<table>" in result._repr_html_()
    with pytest.raises(NoFeasibleCandidateError):
        result.pick("num_params<0")
    with pytest.raises(UserError, match=r"^nonsense: use"):
        result.pick("nonsense")


def test_the_plot_is_the_picture_of_the_report(finished: tuple[Study, Result]) -> None:
    study, result = finished
    figure = result.plot()
    assert isinstance(figure, Figure)
    assert figure._repr_png_() == (study.folder / "report" / "front.png").read_bytes()


def test_exports(finished: tuple[Study, Result], tmp_path: Path) -> None:
    result = finished[1]
    member = result.recommended
    folder = member.export("native", tmp_path / "out")
    assert folder == tmp_path / "out"
    assert (folder / "recipe.yaml").is_file()
    with pytest.raises(UserError, match="force=True replaces it"):
        member.export("native", folder)
    member.export("native", folder, force=True)
    with pytest.raises(UserError, match="did you mean 'peft'"):
        member.export("pefd")


def test_peft_loads_an_export(finished: tuple[Study, Result], tmp_path: Path, fresh: FreshProcess) -> None:
    result = finished[1]
    weights = {int(path.stem.removeprefix("trial-")) for path in (finished[0].folder / "weights").iterdir()}
    member = next(m for m in result.candidates if m.trial in weights and m.architecture)
    member.export("peft", tmp_path / "peft", allow_lossy=True)
    (logits,) = fresh.read("readme", folder=tmp_path / "peft", texts=[["w1 w2"]])
    assert all(map(isfinite, logits))


# Arguments


def problems(**arguments: Any) -> tuple[str, ...]:
    arguments = {"space": {"adapters": {"lora": {"rank": [1, 2]}}}, **arguments}
    with pytest.raises(StudyFileError) as caught:
        Study(**arguments)
    return caught.value.problems


def test_errors_name_the_argument() -> None:
    assert problems(trials=0) == ("trials: must be greater than or equal to 1",)
    assert problems(trials=3, search={"trials": 3}) == (
        "trials: is set twice: in `search` and as the argument `trials`",
    )
    (text,) = problems(name="no name")
    assert text.startswith("name: ")
    assert problems(objectives=["accuracy", "num_parms"]) == (
        "objectives.1: unknown metric 'num_parms'; did you mean 'num_params'?",
    )
    (text,) = problems(trainin={"epochs": 2})
    assert text == "trainin: unknown key; did you mean 'training'?"
    (text,) = problems(space={"adapters": {"lora": {"rnk": [1, 2]}}})
    assert text.startswith("space.adapters.lora.rnk: ")
    (text,) = problems(model=object())
    assert text.startswith("model: must be a hub id or a folder, got a object")
    assert "save_pretrained" in text
    (text,) = problems(data=[{"text": "a", "label": "b"}])
    assert text.startswith("data: a single table has no splits")
    (text,) = problems(data={"train": [{"text": "a", "label": "b"}]})
    assert text == "data.validation: is missing: pass the rows on which candidates are compared"
    (text,) = problems(data={"train": [1], "validation": [{"text": "a", "label": "b"}]})
    assert text.startswith("data.train.0: must be a mapping")
    assert problems(seed=object())[0].startswith("seed: cannot be written to a study file: <object")


def test_bad_rows_are_found_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    tables = {split: rows_of(inputs, split) for split in ("train", "validation", "test")}
    del tables["train"][2]["label"]
    with pytest.raises(StudyFileError) as caught:
        declared(inputs, tmp_path, data=tables).run(progress=False)
    assert caught.value.problems == ("data: train, row 2: field 'label' is missing; this row has 'text'",)
    assert not list(tmp_path.iterdir())


def test_the_names_of_columns(inputs: Path, tmp_path: Path) -> None:
    tables = {
        split: [{"question": row["text"], "topic": row["label"], "n": None} for row in rows_of(inputs, split)]
        for split in ("train", "validation", "test")
    }
    declared(inputs, tmp_path, data={**tables, "text": "question", "label": "topic"}).check()


def test_data_sets_with_named_classes(inputs: Path, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    names = ["cold", "hot", "warm"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    tables = DatasetDict(
        {
            split: Dataset.from_list(
                [{**row, "label": names.index(row["label"])} for row in rows_of(inputs, split)], features=features
            )
            for split in ("train", "validation", "test")
        }
    )
    study = declared(inputs, tmp_path, data=tables)
    assert study._checked().labels == tuple(names)


def test_without_test_rows_some_are_set_aside(inputs: Path, tmp_path: Path) -> None:
    tables = {split: rows_of(inputs, split) for split in ("train", "validation")}
    study = declared(inputs, tmp_path, data=tables)
    with pytest.warns(UserWarning, match="15 of the validation rows were set aside"):
        splits = study._checked()
    assert len(splits.validation) == len(splits.test) == 15
    both = [row["text"] for row in (*splits.validation, *splits.test)]
    assert sorted(both) == sorted(row["text"] for row in tables["validation"])


def test_a_folder_of_files(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs.parent)
    study = declared(inputs, tmp_path, data=inputs.name, model=f"{inputs.name}/model")
    assert study.settings.data.train == str(inputs / "train.jsonl")
    assert study.settings.model.id == str(inputs / "model")
    study.check()
    capitals = tmp_path / "capitals"
    shutil.copytree(inputs, capitals)
    (capitals / "train.jsonl").rename(capitals / "train.JSONL")
    assert declared(inputs, tmp_path, data=capitals).settings.data.train == str(capitals / "train.JSONL")


# Spaces as a file says them


def as_declared(space: Any) -> dict[str, Any]:
    """What the engine makes of a space of objects, by way of a file."""
    found: list[Any] = []
    section = json.loads(json.dumps(space_section(space, found)))
    assert not found
    study = study_from_mapping({"study": "any", "space": section})
    return declare(study, _model_with_everything(12)).arguments


CHOICES: list[dict[str, AdapterChoice]] = [
    {
        "lora": AdapterChoice(
            kind="lora",
            at=("attn.q", "mlp.up"),
            layers=(0, 3),
            fields={"rank": Int(low=0, high=16, step=4), "alpha": Float(low=1, high=64, log=True), "dropout": 0.1},
            vary={"rank": "layer"},
        )
    },
    {
        "low": AdapterChoice(kind="lora", placement="layer", fields={"rank": Int(low=1, high=64, log=True)}),
        "high": AdapterChoice(
            kind="dora", fields={"rank": Choice.of([8, 2]), "scaling": Choice.of(["alpha", "rslora"])}
        ),
    },
    {
        "experts": AdapterChoice(
            kind="lora",
            fields={"rank": 4, "experts": Choice.of([0, 2, 4]), "router": "token", "top_k": 1},
            vary={"experts": "stage"},
            router_per="layer",
        )
    },
    {"norm": AdapterChoice(kind="norm", placement="site")},
]


@pytest.mark.parametrize("adapters", CHOICES, ids=lambda adapters: "-".join(adapters))
def test_objects_come_back_from_the_file(adapters: dict[str, AdapterChoice]) -> None:
    assert as_declared(adapters)["adapters"] == adapters
    assert as_declared({"adapters": adapters, "stages": 3})["stages"] == 3
    if {choice.kind for choice in adapters.values()} == adapters.keys():
        assert as_declared(list(adapters.values()))["adapters"] == adapters


def test_groups_come_back_from_the_file() -> None:
    group = OneOf(name="type", members=("lora", "bottleneck"), per="layer", optional=True)
    space = [AdapterChoice(kind="lora", fields={"rank": Choice.of([1, 2])}), AdapterChoice(kind="bottleneck"), group]
    assert as_declared(space)["one_of"] == (group,)
    assert as_declared({"preset": "llm-adapters"})["one_of"] == as_declared("llm-adapters")["one_of"]


def test_domains_in_a_mapping() -> None:
    found = as_declared({"adapters": {"lora": {"at": ["attn.q"], "rank": Choice.of([1, 2])}}})
    assert found["adapters"]["lora"].fields == {"rank": Choice.of([1, 2])}


def test_what_a_file_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use Choice\.of\(\[4, 1\]\)"):
        setting_of(Choice(choices=(4, 1)), int)
    with pytest.raises(ValueError, match=r"use Choice\.of"):
        setting_of(Choice(choices=("a", "b"), ordered=True), str)
    with pytest.raises(ValueError, match=r"use Float\(low=1, high=4\)"):
        setting_of(Int(low=1, high=4), float)
    found: list[Any] = []
    choice = AdapterChoice(kind="lora", sites=frozenset({"layers.0.attn.q"}), fields={"rank": Choice(choices=(2, 1))})
    space_section([choice, choice, 7], found)
    assert [path for path, _ in found] == [
        ("space", 2),
        ("space", "adapters", "lora"),
        ("space", "adapters", "lora", "sites"),
        ("space", "adapters", "lora", "rank"),
    ]


def test_retained_rows_are_a_table_a_file_or_a_name(inputs: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1}", "label": "hot", "other": None} for i in range(5)]
    (tmp_path / "general.csv").write_text("text,label\nw1,hot\n")

    def study_with(forgetting: Any) -> Study:
        objectives = ["accuracy", "num_params", "forgetting"]
        return declared(inputs, tmp_path / "study", forgetting=forgetting, objectives=objectives)

    table = study_with(pandas.DataFrame(rows))
    assert table.settings.forgetting is not None
    assert (table.settings.forgetting.source, table.settings.forgetting.file) == ("files", "data/retained.jsonl")
    assert [json.loads(line) for line in table._tables.files["data/retained.jsonl"].splitlines()] == [
        {"text": row["text"], "label": "hot"} for row in rows
    ]
    assert "data/train.jsonl" in table._tables.files
    file = study_with(tmp_path / "general.csv").settings.forgetting
    assert file is not None
    assert file.file == str(tmp_path / "general.csv")
    settings_ = study_with(
        {"source": "files", "file": str(tmp_path / "general.csv"), "max_rows": 8}
    ).settings.forgetting
    assert settings_ is not None
    assert (settings_.file, settings_.max_rows) == (str(tmp_path / "general.csv"), 8)
    with pytest.raises(StudyFileError, match=r"forgetting.source: embedded-prose is text without labels"):
        study_with("embedded-prose")
    with pytest.raises(StudyFileError, match=r"the untouched model, whose task head"):
        table.check()
    with pytest.raises(StudyFileError, match=r"retained, row 2: labels 'mild' do not occur"):
        study_with([rows[0], rows[1], {"text": "w1", "label": "mild"}, rows[2]]).check()
