"""Study files that nobody would write in earnest: refused at once, at their line, and never built."""

from __future__ import annotations

import os
from time import process_time

import pytest

from autopeft.search_space.adapters.mixture import MOST_EXPERTS
from autopeft.search_space.backbones.backbone import MOST_LAYERS
from autopeft.search_space.domains import MOST
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.sections.base import MOST_NAMED
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.yaml_text import MOST_BYTES, MOST_CHARACTERS, MOST_DEPTH, MOST_ENTRIES, MOST_VALUES

START = """\
study: small
space:
  adapters:
    lora:
      rank: [1, 4]
"""
#: Seconds that the reading of a file may take on a busy machine.
SOON_S = 5.0


@pytest.fixture
def problems(tmp_path):
    def problems(text, *overrides):
        path = tmp_path / "study.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        start = process_time()
        with pytest.raises(StudyFileError) as caught:
            load_study(path, overrides, {})
        assert process_time() - start < SOON_S
        return [line.replace(f"{tmp_path}/", "") for line in caught.value.problems]

    return problems


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("study: s\nspace: " + "[" * 300 + "]" * 300,
        f"study.yaml:2 not valid YAML: is nested deeper than {MOST_DEPTH}"),
        ("space: " + "{a: " * 3000 + "}" * 3000, "study.yaml:1 not valid YAML: is nested deeper than"),
        ("\n".join(" " * i + "a:" for i in range(300)), "study.yaml:50 not valid YAML: is nested deeper than"),
        (BOMB, "study.yaml:5 not valid YAML: has more than 10,000 keys and values, those behind aliases included"),
        (MERGES, "not valid YAML: has more than 10,000 keys and values"),
        ("study: &s [*s]\n", "study.yaml:1 not valid YAML: the alias *s is inside what it names"),
        ("a: [" + "1, " * MOST_VALUES + "1]", "study.yaml:1 not valid YAML: has more than 10,000"),
        ("#" * MOST_BYTES + "\n", "study.yaml: is larger than 250,000 bytes"),
        (b"study: s\nseed: \xff\n", "study.yaml:2 not UTF-8 text"),
        (b"\x00\x01\x02", "study.yaml:1 not valid YAML: unacceptable character"),
        (START + "seed: " + "1" * 5000, "study.yaml:6 not valid YAML: a number of 5,000 digits"),
        (START + "seed: 0x" + "f" * 5000, "study.yaml:6 seed: is a number of more than 64 bits"),
        (START + "seed: " + "1" * 400, "study.yaml:6 seed: is a number of more than 64 bits"),
        (START + "seed: 2001-99-99", "study.yaml:6 not valid YAML: 2001-99-99 cannot be read: month"),
        (START + "seed: !!float x", "study.yaml:6 not valid YAML: x cannot be read"),
        (START + "seed: !!omap {a: 1}", "study.yaml:6 not valid YAML: "),
        (START + "{<<: 1}: 1", "study.yaml:6 not valid YAML: "),
        (START + 'output: "a\\0b"', "study.yaml:6 output: has a NUL character"),
        (START + 'model: {id: "a\\ud800"}', "study.yaml:6 model.id: has an unpaired surrogate"),
        (START + '"a\\0": 1', "study.yaml:1 has a key that has a NUL character"),
        (START + f"output: {'x' * (MOST_CHARACTERS + 1)}", "study.yaml:6 output: has 4,097 characters"),
        (START + "".join(f"k{i}: 1\n" for i in range(MOST_ENTRIES)), "study.yaml:1 has 1,002 entries"),
        (START + f"search: {{start: [{'head, ' * 1001}]}}", "study.yaml:6 search.start: has 1,001 entries"),
        (START + "  stages: 1000000", f"study.yaml:6 space.stages: must be less than or equal to {MOST_LAYERS}"),
        (START + f"search: {{trials: {10**18}}}", f"study.yaml:6 search.trials: must be less than or equal to {MOST}"),
        (START + "search: {trials: 1e18}", "study.yaml:6 search.trials: must be a whole number"),
        (START + f"finalists: {{seeds: {10**18}}}", "study.yaml:6 finalists.seeds: must be less than"),
        (START + "minutes: 1e300", "study.yaml:6 minutes: must be less than"),
        (START + "minutes: 1e999", "study.yaml:6 minutes: must be a finite number"),
        (START + "training: {epochs: 1e308}", "study.yaml:6 training.epochs: epochs must be at most 1,000,000"),
        (START.replace("4", str(10**18)), "study.yaml:5 space.adapters.lora.rank: rank must be at most 1,000,000"),
        (START.replace("[1, 4]", f"{{low: 1, high: {10**18}}}"),
        "study.yaml:5 space.adapters.lora.rank: rank must be"),
        (
            START + f"      experts: {{low: 1, high: {10**12}}}\n      vary: {{rank: expert}}\n",
            f"study.yaml:6 space.adapters.lora.experts: experts must be at most {MOST_EXPERTS}",
        ),
        (
            START + "      experts: {low: 1, high: 256}\n      shared_experts: {low: 1, high: 256}\n"
            "      vary: {rank: expert, experts: site, shared_experts: site}\n",
            "study.yaml:3 space.adapters: has 314,592 places for adapters and experts; a space may have 50,000",
        ),
        (
            "study: s\nspace:\n  adapters:\n" + "".join(f"    a{i}: {{kind: ia3}}\n" for i in range(MOST_NAMED + 1)),
            "study.yaml:3 space.adapters: may have 100 entries, has 101",
        ),
        (
            START + "  one_of: {g: {members: [" + "x, " * (MOST_NAMED + 1) + "]}}",
            "study.yaml:6 space.one_of.g.members: may have 100 entries, has 101",
        ),
    ],
)  # fmt: skip
def test_refused(problems, text, problem):
    assert problem in problems(text)[0]


def test_as_an_option(problems):
    assert problems(START, "seed=" + "1" * 5000)[0].startswith("--set seed: not valid YAML: a number of 5,000 digits")
    assert problems(START, "search=" + "[" * 300)[0] == "--set search: not valid YAML: is nested deeper than 50"
    assert "is nested deeper than 50" in problems(START, ".".join("a" * 1000) + "=1")[0]


def test_data_that_contain_themselves():
    nested: list[object] = []
    for _ in range(300):
        nested = [nested]
    with pytest.raises(StudyFileError, match="is nested deeper than 50"):
        study_from_mapping({"study": "s", "space": nested})


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")  # reading it would wait for ever
    (tmp_path / "folder" / "study.yaml").mkdir(parents=True)
    for path in (tmp_path / "pipe.yaml", tmp_path / "folder", "/dev/zero"):
        with pytest.raises(StudyFileError, match="is not a file; give a study file"):
            load_study(path, (), {})
    for path in ("a\0b", "a" * 300):
        with pytest.raises(StudyFileError, match=r"null byte|name too long"):
            load_study(path, (), {})


def test_limits_are_far_from_what_people_write(tmp_path):
    """A preset of the largest kind, a start with a gene per site, and a model's name as long as a path."""
    start = ", ".join(f"lora.rank.layers.{i}.attn.q: 4" for i in range(500))
    path = tmp_path / "study.yaml"
    path.write_text(START + f"      vary: {{rank: site}}\n  stages: {MOST_LAYERS}\nmodel: {{id: {'m' * 4000}}}\n"
                    f"search: {{trials: {MOST}, start: [{{{start}}}]}}\n")  # fmt: skip
    assert load_study(path, (), {}).search.trials == MOST
