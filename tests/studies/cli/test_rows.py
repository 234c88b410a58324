"""The rows of a study on the command line: problems with their line, and losses that are shown before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from autopeft import Study
from autopeft.studies.errors import UserError

from ...support.chat_templates import GEMMA, LLAMA, R1
from ...support.tiny_models import byte_tokenizer, save, seeded
from ...support.tiny_study import save_study, settings, write_rows

SHORT = {
    "baselines": {"names": []},
    "finalists": {"seeds": 1, "most": 1},
    "search": {"searcher": "random", "trials": 1},
}


def causal_study(folder: Path, rows: list[dict[str, Any]], template: str | None = None, **data: Any) -> Path:
    """A study of a tiny Llama over these rows; the splits differ by a number that is appended to the questions."""
    data = {"max_length": 100, **data}
    path = save_study(
        folder, task="causal-lm", objectives=["loss", "num_params"], data=settings()["data"] | data, **SHORT
    )
    words = byte_tokenizer(["be short question answer"], size=280)
    words.chat_template = template
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**shape, vocab_size=280, max_position_embeddings=256)
    save(seeded(LlamaForCausalLM, config), folder / "model", words)
    for number, split in enumerate(("train", "validation", "test")):
        text = json.dumps(rows).replace("question", f"question {number}")
        write_rows(folder / f"{split}.jsonl", json.loads(text))
    return path


def chat(answer: str = "answer", *before: dict[str, str], **row: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": "question"}
    return {"messages": [*before, asked, {"role": "assistant", "content": answer}], **row}


# Problems


def test_chat_templates_that_do_not_fit(cli, tmp_path: Path) -> None:
    system = {"role": "system", "content": "be short"}
    cases = {
        "nosys": (GEMMA, chat("answer", system), "System role not supported: write the text of the role 'system' into"),
        "notemplate": (None, chat(), "rows with 'messages' need a chat template, but the model's tokenizer has none"),
        "reasoning": (R1, chat("<think>\nhm\n</think>\nanswer"), "'<think>\\n' is no longer there"),
    }
    for name, (template, row, problem) in cases.items():
        path = causal_study(tmp_path / name, [row] * 4, template)
        for command in ("validate", "plan", "run"):
            code, out, err = cli(command, path)
            assert (code, out) == (2, "")
            assert len(err.splitlines()) == 3, err
            assert "study.yaml:" in err
            assert " data: train.jsonl:1: " in err
            assert problem in err
            assert "(also train.jsonl:2, train.jsonl:3, 1 more rows)" in err
        assert not (tmp_path / name / "runs").exists()


def test_half_of_an_emoji(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[6]["text"] += " \ud83d"
    write_rows(tmp_path / "train.jsonl", rows)
    for command in ("validate", "run"):
        code, _, err = cli(command, path)
        assert code == 2
        assert "data: train.jsonl:7: has half of a character, '\\ud83d' after " in err
    tables = {"train": rows, "validation": rows[:6], "test": rows[:6]}
    with pytest.raises(UserError, match=r"train, row 6: has half of a character, '\\ud83d' after "):
        Study(tmp_path / "model", tables, settings()["space"], folder=tmp_path / "notebook").check()


def test_a_model_without_a_task(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8)).save_pretrained(tmp_path / "model")
    code, out, err = cli("validate", path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.endswith(
        "the task classification takes no models of the type 'vit', because transformers has no"
        " AutoModelForSequenceClassification of that type: docs/tasks.md shows how to add a task that does\n"
    )


# Losses


@pytest.mark.slow
def test_cut_rows_are_shown_by_every_command_that_comes_before_training(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, data=settings()["data"] | {"max_length": 5}, **SHORT)
    rows = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    tokens = sum(len(row["text"].split()) + 2 - 5 for row in rows)
    line = (
        "warning: data.max_length: 5 cuts 48 of 48 train, 30 of 30 validation and 30 of 30 test rows,"
        f" {tokens} tokens in all: 108 lose their end; 11 would keep 99 % of the rows whole\n"
    )
    found = {command: cli(command, path) for command in ("validate", "plan", "run")}
    assert [code for code, _, _ in found.values()] == [0, 0, 0]
    for command, (_, _, err) in found.items():
        assert err.count("data.max_length") == 1, command
        assert line in err
    for command in ("validate", "plan"):
        code, out, _ = cli(command, path, "--json")
        data = json.loads(out)
        assert data["warnings"] == [line.removeprefix("warning: ").strip()]
        assert data["truncation"]["rows"] == {"train": 48, "validation": 30, "test": 30}
        assert data["truncation"]["tokens"] == tokens
        assert data["truncation"]["max_length_for_99_percent"] == 11
        assert data["unread_fields"] == {}
        assert code == 0
    with pytest.warns(UserWarning, match="data.max_length: 5 cuts 48 of 48 train"):
        Study.load(path).check()


def test_prompts_that_are_cut_off(cli, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}: ", "completion": "z" * 30} for i in range(8)]
    code, _, err = cli("validate", causal_study(tmp_path / "most", rows, max_length=16))
    assert code == 2
    assert "data: data.max_length: 16 leaves nothing of the prompt of 8 of 8 train rows; " in err
    rows[3:] = [{**row, "completion": "zz"} for row in rows[3:]]
    code, _, err = cli("validate", causal_study(tmp_path / "some", rows, max_length=16))
    assert code == 0
    assert "9 lose their whole prompt, 9 lose their end; " in err


def test_calls_of_tools_are_learnt_or_missed(cli, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    rows = [chat("", tools=[call])] * 4
    for row in rows:
        row["messages"][-1]["tool_calls"] = [call]
    assert cli("validate", causal_study(tmp_path / "read", rows, LLAMA, max_length=200))[::2] == (0, "")
    code, _, err = cli("validate", causal_study(tmp_path / "empty", rows, GEMMA, max_length=200))
    assert code == 2
    assert "train.jsonl:1: nothing is left of the answer: the model's chat template does not write 'tool_calls'" in err
    for row in rows:
        row["messages"][-1]["content"] = "answer"
    code, out, err = cli("validate", causal_study(tmp_path / "missed", rows, GEMMA, max_length=200), "--json")
    assert code == 0
    shares = "4 of 4 train, 4 of 4 validation and 4 of 4 test rows"
    for name in ("messages.tool_calls", "tools"):
        assert f"warning: {name} is not read, in {shares}: the model's chat template does not write it\n" in err
        assert json.loads(out)["unread_fields"][name]["rows"] == {"train": 4, "validation": 4, "test": 4}


def test_columns_of_other_formats(cli, tmp_path: Path) -> None:
    rows = [{"instruction": f"question {i}", "input": "x" * (i % 2), "output": "answer"} for i in range(4)]
    path = causal_study(tmp_path / "alpaca", rows, max_length=250)
    assert cli("validate", path)[::2] == (0, "")
    code, _, err = cli("validate", path, "--set", "data.prompt=instruction", "--set", "data.completion=output")
    assert code == 0
    shares = "2 of 4 train, 2 of 4 validation and 2 of 4 test rows"
    advice = "leave out data.prompt and data.completion, and Alpaca's template has it"
    assert err == f"warning: input is not read, in {shares}: {advice}\n"
    rows = [{"query": f"question {i}", "response": "answer"} for i in range(4)]
    code, _, err = cli("validate", causal_study(tmp_path / "unset", rows))
    assert code == 2
    assert (
        "train.jsonl:1: a row needs the fields 'prompt' and 'completion', or 'messages', or 'text'; this row has" in err
    )
    assert "'query', 'response': set data.prompt: query and data.completion: response\n" in err
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    path = causal_study(tmp_path / "sharegpt", [{"conversations": turns}] * 4, LLAMA)
    assert cli("validate", path)[::2] == (0, "")


def test_all_problems_of_conversations_have_their_line(cli, tmp_path: Path) -> None:
    """Those of the form first: rows that no template is asked about."""
    good, user = chat(), {"role": "user", "content": "question"}
    rows = [
        good,
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"conversations": [{"from": "narrator", "value": "question"}]},
    ]
    code, _, err = cli("validate", causal_study(tmp_path / "form", rows, LLAMA))
    assert code == 2
    for problem in (
        "train.jsonl:2: 'messages' must have a message of the role 'assistant' that answers an earlier message",
        "train.jsonl:3: message 1: an answer to learn is empty: remove it, or the row",
        "train.jsonl:4: message 0: unknown 'from' 'narrator': known are human, ",
        "test.jsonl:4: message 0: unknown 'from' 'narrator'",
    ):
        assert problem in err
    rows = [good, {"messages": [*good["messages"], {"role": "bot", "content": "answer"}]}, good,
            {"messages": [{"role": "narrator", "content": "question"}, *good["messages"]]}]  # fmt: skip
    code, _, err = cli("validate", causal_study(tmp_path / "roles", rows, LLAMA))
    assert code == 2
    assert "train.jsonl:2: the role 'bot' is called 'assistant' in chat templates: rename it" in err
    assert "train.jsonl:4: unknown role 'narrator': the roles are system, user, assistant and tool" in err


def test_the_second_text_of_a_pair(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, data=settings()["data"] | {"text": "premise"}, **SHORT)
    for split in ("train", "validation", "test"):
        rows = [{"premise": f"w{i} {split}", "hypothesis": f"w{i}", "label": ("cold", "hot")[i % 2]} for i in range(6)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    code, _, err = cli("validate", path)
    assert code == 0
    assert "warning: hypothesis is not read, in 6 of 6 train, " in err
    assert "set data.text_pair to 'hypothesis' if the rows are pairs\n" in err
    assert cli("validate", path, "--set", "data.text_pair=hypothesis")[::2] == (0, "")
