"""A short form of the mutations of `make chaos`, and that they find what they are for."""

from __future__ import annotations

import json
from time import sleep

import pytest

from . import mutations
from .mutations import Chaos, Found, mutated_data, mutated_study, run


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"))


def test_mutated_files(chaos):
    found = run(chaos, studies=80, data=40)
    assert not found.failures
    assert set(found.ends) == {"valid", "refused"}
    assert sum(found.ends.values()) == 120


def test_what_is_mutated_is_valid(chaos):
    path = chaos.folders["classification"] / "base.yaml"
    for base in chaos.bases:
        path.write_text(json.dumps(base))
        found = Found()
        assert chaos.case("base", path, found, lambda line: True) == "valid"


def test_a_seed_makes_the_same_files_each_alone(chaos):
    for number in (3, 11, 40):
        assert mutated_study(1, number, chaos.bases) == mutated_study(1, number, chaos.bases)
        assert mutated_data(1, number) == mutated_data(1, number)
    assert mutated_study(1, 3, chaos.bases) != mutated_study(2, 3, chaos.bases)


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (KeyError("x"), "traceback"),
        (RecursionError("x"), "traceback"),
        (None, "hang"),
        ("nothing of the file", "no place"),
        ("{path}: nothing of a line", "no place"),
        ("{path}:3 seed: is wrong", "refused"),
        ("{path} seed: is wrong", "refused"),
    ],
)
def test_failures_are_found(chaos, monkeypatch, error, end):
    from autopeft.studies.cli import files
    from autopeft.studies.config.source import StudyFileError

    path = chaos.folders["classification"] / "mutated.yaml"

    def validate(*_):
        if error is None:
            sleep(5)
        raise StudyFileError([error.format(path=path)]) if isinstance(error, str) else error

    monkeypatch.setattr(files, "validate", validate)
    monkeypatch.setattr(mutations, "LIMIT_S", 0.2)
    found = Found()
    chaos.study(0, found)
    assert dict(found.ends) == {end: 1}
    assert len(found.failures) == (end != "refused")
