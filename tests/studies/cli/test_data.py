"""`autopeft data`: rows as the model reads them, with what is learnt, and their lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autopeft.evaluators.data.preview import ShownRow
from autopeft.studies.cli import data
from autopeft.studies.cli.app import main

from ...support.chat_templates import LLAMA, QWEN
from ...support.tiny_study import save_study, save_study_of, settings
from .test_rows import causal_study

TURNS = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer one"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def cli(capsys):
    def call(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out, captured.err

    return call


def test_what_is_learnt_is_in_brackets(cli, tmp_path):
    study = causal_study(tmp_path, [{"messages": TURNS}] * 4, LLAMA, max_length=200)
    out, err = cli("data", study, "--rows", 1)
    *_, title, row = out.splitlines()
    assert title.startswith("train.jsonl:1: ")
    assert title.endswith(" learnt")
    assert row == ("<s><|user|>question 0</s><|assistant|>[[answer one</s>]]<|user|>and?</s><|assistant|>[[no</s>]]")
    assert err == ""
    last, _ = cli("data", study, "--rows", 1, "--set", "data.train_on_turns=last", "--split", "test")
    assert last.endswith("question 2</s><|assistant|>answer one</s><|user|>and?</s><|assistant|>[[no</s>]]\n")


def test_tokens_one_by_one(cli, tmp_path):
    study = causal_study(tmp_path, [{"messages": TURNS}] * 4, LLAMA, max_length=200)
    out, _ = cli("data", study, "--rows", 1, "--tokens")
    lines = out.splitlines()
    assert lines[-1] == "[[       1  </s>]]"
    assert "       0  <s>" in lines


def test_lengths_and_cuts_fit_a_terminal(cli, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q" * n}, *TURNS[1:]]} for n in (1, 10, 20, 300)]
    study = causal_study(tmp_path, rows, LLAMA, max_length=100)
    out, err = cli("data", study, "--rows", 0)
    head, train, *_, cut = out.splitlines()
    assert max(map(len, out.splitlines())) <= 80
    assert head.split()[-1] == "learnt"
    found = json.loads(cli("data", study, "--json", "--rows", 4)[0])
    lengths = found["lengths"]["train"]
    # Of four rows, each share above three quarters ends in the longest one.
    assert [lengths["percentiles"][share] for share in ("90", "95", "99")] == [lengths["longest"]] * 3
    assert lengths["percentiles"]["50"] == len(found["rows"][1]["tokens"])
    assert lengths["learnt"] == sum(token["learnt"] for row in found["rows"] for token in row["tokens"])
    assert train.split()[:3] == ["train", "4", str(lengths["percentiles"]["50"])]
    assert lengths["cut_tokens"] == found["truncation"]["tokens"] / 3 == found["rows"][3]["cut_tokens"]
    assert f"1 rows (25.0%), {lengths['cut_tokens']:,} tokens (" in cut
    assert cut.endswith(f", {lengths['cut_learnt']} of them learnt")
    assert "warning: data.max_length: 100 cuts 1 of 4 train" in err


@pytest.mark.parametrize("form", ["pair", "several"])
def test_rows_with_labels_show_them(cli, tmp_path, form):
    study = save_study_of(form, tmp_path)
    out, _ = cli("data", study, "--rows", 2)
    found = json.loads(cli("data", study, "--json", "--rows", 2)[0])
    for row in found["rows"]:
        assert f"label {', '.join(row['labels']) or 'none'}" in out
        assert row["text"] in out
        assert not any(token["learnt"] for token in row["tokens"])
    assert found["lengths"]["train"]["learnt"] is None
    assert out.splitlines()[1].endswith(" -")


def test_an_unknown_split_has_a_suggestion(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", str(save_study(tmp_path, data=settings()["data"])), "--split", "valid"])
    assert "--split valid: unknown split; did you mean 'validation'?" in capsys.readouterr().err


def test_what_is_not_learnt_is_a_warning(cli, tmp_path):
    thoughts = [{**turn, "content": f"<think>\nhm\n</think>\n\n{turn['content']}"} for turn in TURNS[1::2]]
    messages: list[dict[str, Any]] = [TURNS[0], thoughts[0], TURNS[2], thoughts[1]]
    out, err = cli("data", causal_study(tmp_path, [{"messages": messages}] * 4, QWEN, max_length=200), "--rows", 1)
    assert "warning: a whole answer in 'messages' is not read, in 4 of 4 train" in err
    assert "answer one</s><|user|>\nand?</s><|assistant|>\n[[<think>\nhm\n</think>\n\nno</s>]]" in out


def shown(runs: list[tuple[str, bool]], *, full: bool = False, **terminal: Any) -> str:
    console = Console(soft_wrap=True, highlight=False, width=80, **terminal)
    with console.capture() as capture:
        data._print_row(console, ShownRow(place="train.jsonl:1", runs=runs), tokens=False, full=full)
    return capture.get()


def test_a_terminal_with_colours_has_no_brackets():
    runs = [("asked ", False), ("answered", True)]
    coloured = shown(runs, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[30;42manswered\x1b[0m" in coloured
    assert "[[" not in coloured
    plain = shown(runs, force_terminal=True, color_system="standard", no_color=True)
    assert "asked [[answered]]" in plain


def test_long_texts_are_shortened_and_no_row_commands_the_terminal():
    text = shown([("a" * 3000, False), ("\x1b[31mred\n", True)])
    assert " ...(2,400 characters)... " in text
    assert "[[\\x1b[31mred\n]]" in text
    assert "a" * 3000 in shown([("a" * 3000, False)], full=True)


def test_the_folder_of_a_study_will_do(cli, tmp_path: Path):
    causal_study(tmp_path, [{"messages": TURNS}] * 4, LLAMA, max_length=200)
    assert cli("data", tmp_path)[0].count("[[") == 3 * 2
