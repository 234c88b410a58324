"""Mutated study files and data files, each checked as `autopeft validate` checks it: `make chaos`.

    python -m autopeft.tests.chaos.mutations [--studies 10000] [--data 2000] [--seed 0]

A case is a failure if it ends in anything but "no problems" or an error for users, if it takes more than `LIMIT_S`, or
if a line of its message has no key and no line. The same seed makes the same cases, each alone too:
`--only study:17` repeats one, and prints its file and message.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import io
import json
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic, process_time
from typing import Any

from ..support.chat_templates import LLAMA
from ..support.tiny_models import byte_tokenizer, save, seeded
from ..support.tiny_study import save_study, settings

#: Time of the processor for one file, and how many times that a file may take where other processes have it.
LIMIT_S = 5.0
WAITING = 6
TASKS = ("classification", "causal-lm")
FORMATS = ("jsonl", "csv", "json", "parquet")
#: What stands in a file for a text that no data format can write; it is replaced afterwards.
RAW = "@@{}@@"


# Values


def _values(rng: Random) -> list[Any]:
    """Hostile values of every type that JSON has."""
    deep: Any = 1
    for _ in range(rng.choice((3, 60, 300))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return [
        None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-320, 1e308, -1e308, 10**6, 10**9, 10**18, 2**63,
        -(2**63), 10**40,
        float("nan"), float("inf"), float("-inf"), "", " ", "\t", "\n", "x", "é", "\u202e", "\u2028", "🙂",
        "\ud83d", "a\0b",
        "\x1b[31m", "..", "/", "~", "/dev/null", "/dev/zero", "a" * 300, "a" * 5000, "../" * 50, "null", "true", "1e5",
        "0x10", "2001-01-01", "=", "<<", "*", "&a", "!x", "%", "{", "[", "lora", "attn.q", "auto", "packed",
        "tpe", "bo",
        "accuracy", "files", "embedded", "head", "-5", "1" * 4000, [], {}, [[]], [None], {"": 1}, {"a": {"b": []}},
        [1, "a", None, {}], list(range(1500)), {str(i): i for i in range(1500)}, deep, [0], [1, 1], [1, 2.0],
        {"low": 1},
        {"low": 1, "high": 0}, {"low": 0, "high": 1e308, "log": True}, {"low": 1, "high": 10**15},
    ]  # fmt: skip


#: YAML that plain data cannot say: numbers too long to read, tags, anchors, keys of other types.
SNIPPETS = (
    "1" * 5000, "0x" + "f" * 6000, "1" * 400 + ".5", "1e" + "9" * 50, ".inf", "-.INF", ".nan", "2001-99-99",
    "1:2:3", "0o9",
    "!!int abc", "!!float x", "!!binary '*'", "!!timestamp x", "!!set [a]", "!!omap {a: 1}", "!!python/name:os.system",
    "!!python/object/apply:os.getcwd []", "!foo {a: 1}", "!!str [a]", "!!bool maybe", "!!null x", "&z [*z]",
    "*nothing",
    "&a [1, 2]", "{? [1, 2] : 3}", "{null: 1}", "{1: 2, '1': 3}", "{.nan: 1}", "{a: 1, a: 2}", "{<<: 1}",
    "{<<: {a: 1}}",
    "{<<: [{a: 1}, 2]}", "[" * 300 + "]" * 300, "{a: " * 300 + "}" * 300, "[" * 5000, '"\\ud800"', '"\\0"',
    '"\\x"', "'", '"',
    "|\n  x", ">-\n\n\n x", "- a", "? a", ": b", "@", "`", "\x01", "\ufeff", "\u0085", "{a: &b 1, c: *b}",
    "# x", "--- x", "...",
)  # fmt: skip


def _bomb(rng: Random) -> str:
    wide, tall = rng.choice((2, 10, 40)), rng.choice((3, 9, 30))
    lines = ["x0: &x0 [a, a]"]
    for i in range(1, tall):
        what = ", ".join([f"*x{i - 1}"] * wide)
        lines.append(f"x{i}: &x{i} " + (f"[{what}]" if rng.random() < 0.7 else f"{{a: [{what}]}}"))
    return "\n".join(lines) + "\n"


# Changes of data


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _paths(entry, (*path, key))
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            yield from _paths(entry, (*path, position))


def _changed(rng: Random, data: Any, value: Callable[[], Any]) -> Any:
    """The data with one entry replaced, removed, renamed, added, doubled or wrapped."""
    data = json.loads(json.dumps(data))
    *parents, last = rng.choice([path for path in _paths(data) if path])
    node = data
    for key in parents:
        node = node[key]
    how = rng.choice(("replace", "replace", "replace", "remove", "rename", "add", "wrap", "double"))
    if how == "replace":
        node[last] = value()
    elif how == "remove":
        del node[last]
    elif how == "wrap":
        node[last] = [node[last]] if rng.random() < 0.5 else {"a": node[last]}
    elif isinstance(node, list):
        node.insert(last, node[last] if how == "double" else value())
    elif how == "rename":
        node[rng.choice((last.upper(), last + "s", last[1:] or "x", "", "a b", "a.b", "é", "-", "1", "x" * 5000))] = (
            node.pop(last)
        )
    else:
        node[rng.choice(("extra", "seed", "rank", last * 2))] = value()
    return data


def _mangled(rng: Random, content: bytes) -> bytes:
    """The bytes with a part changed, cut, doubled, moved or inserted."""
    if not content:
        return b"\x00"
    at, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    other = min(other, at + rng.choice((1, 3, 20, 400)))
    odd = rng.choice(
        (b"\x00", b"\xff", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b" ", b'"', b"{", b"[", b":", b"#", b"\xef\xbb\xbf")
    )
    return rng.choice(
        (
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            content[:at],
            content[:at] + content[other:],
            content[:other] + content[at:],
            content[:at] + odd * rng.choice((1, 2, 300)) + content[at:],
            content[:at] + content[at:other][::-1] + content[other:],
        )
    )


# Study files


def study_data() -> list[dict[str, Any]]:
    """Valid studies over the tiny model that have, together, every section and most settings."""
    plain = settings()
    rich = settings(
        seed=3,
        objectives=[{"name": "accuracy", "bound": 0.1, "reference": 0.0}, "num_params", {"name": "flops_per_token"}],
        space={
            "stages": 3,
            "layer_gate": True,
            "adapters": {
                "lora": {"at": ["attn.q", "attn.v"], "rank": [0, 1, 2], "placement": "layer",
                "alpha": {"low": 1, "high": 9}},
                "ia3": {"layers": [0, 1]},
                "moe": {"kind": "lora", "rank": [1, 2], "experts": [2, 3], "top_k": 1, "vary": {"rank": "expert"}},
                "bottleneck": {"size": {"low": 2, "high": 8, "step": 2}, "vary": {"size": "stage"}},
            },
            "one_of": {"kind": {"members": ["ia3", "bottleneck"], "per": "stage", "optional": True}},
        },
        constraints={"num_params": 9000, "trainable_fraction": 0.9},
        search={"searcher": "bo", "trials": 8, "batch": 4, "rungs": [0.25, 0.5], "keep": 0.5, "initial": 4,
                "start": [{"lora.rank": 1}], "timeout_s": 100},
        evaluation={"evaluator": "packed", "pack": 2, "cache_bytes": 1000},
        recommend={"within": 0.02},
        minutes=5,
        output="out",
        storage="sqlite:///ledger.db",
    )  # fmt: skip
    preset = settings(
        space={"preset": "autopeft"}, search={"searcher": "proxy", "trials": 4}, proxy={"subnets": 20, "epochs": 1}
    )
    return [plain, rich, preset]


def mutated_study(seed: int, number: int, bases: list[dict[str, Any]]) -> bytes:
    """The content of the study file with this number."""
    rng = Random(f"study {seed} {number}")
    data: Any = rng.choice(bases)
    snippets: list[str] = []

    def value() -> Any:
        if rng.random() < 0.3:
            snippets.append(rng.choice(SNIPPETS))
            return RAW.format(len(snippets) - 1)
        return rng.choice(_values(rng))

    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        data = _changed(rng, data, value) if isinstance(data, (dict, list)) and data else value()
    text = json.dumps(data, indent=1, ensure_ascii=rng.random() < 0.5)
    for position, snippet in enumerate(snippets):
        text = text.replace(f'"{RAW.format(position)}"', snippet)
    if rng.random() < 0.1:
        text = _bomb(rng) + "study: s\n"
    if rng.random() < 0.03:
        text = rng.choice(
            ("", "---\n", "%YAML 1.1\n---\n", "- ", "# x\n" * 9, "[" * 2000, "a: " * 200, "\n".join(map(str, range(9))))
        )
    content = text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
        content = _mangled(rng, content)
    return content


# Data files


def rows(task: str, count: int = 12) -> list[dict[str, Any]]:
    """Valid rows of a task."""
    if task == "classification":
        return [{"text": f"w{i} hot w{i % 5}", "label": ("cold", "hot", "warm")[i % 3]} for i in range(count)]
    return [
        {"messages": [{"role": "user", "content": f"say w{i}"}, {"role": "assistant", "content": f"w{i}"}]}
        if i % 2
        else {"prompt": f"say w{i}:", "completion": f" w{i}"}
        for i in range(count)
    ]  # fmt: skip


def _written(form: str, found: list[Any]) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in found).encode("utf-8", "surrogatepass")
    if form == "json":
        return json.dumps(found).encode("utf-8", "surrogatepass")
    if form == "csv":
        flat = [row if isinstance(row, dict) else {"text": row} for row in found]
        names = list(dict.fromkeys(name for row in flat for name in row)) or ["text"]
        writer = csv.DictWriter(text := io.StringIO(), names)
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in flat)
        return text.getvalue().encode("utf-8", "surrogatepass")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([row if isinstance(row, dict) else {"text": row} for row in found])
    pq.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


def _odd_table(rng: Random) -> bytes:
    """A Parquet file whose columns have types of which no text or label is made."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = rng.choice((0, 1, 12))
    columns = {
        "int64": pa.array([2**62] * n), "time": pa.array([2**62] * n, pa.timestamp("us")),
        "us": pa.array([1] * n, pa.time64("ns")),
        "day": pa.array([10**6] * n, pa.date32()), "bytes": pa.array([b"\xff\x00"] * n),
        "list": pa.array([[["a"], []]] * n),
        "map": pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())), "null": pa.nulls(n),
        "bool": pa.array([True] * n),
        "words": pa.array(["a"] * n).dictionary_encode(), "nan": pa.array([float("nan")] * n),
        "span": pa.array([2**60] * n, pa.duration("us")), "half": pa.array([1.5] * n),
        "text": pa.array(["hot w1"] * n),
    }  # fmt: skip
    names = ["text", "label", "prompt", "completion", "messages", rng.choice(("label", "extra"))]
    made = [columns[rng.choice(list(columns))] for _ in names]
    pq.write_table(pa.table(made, names=names), sink := io.BytesIO())
    return sink.getvalue()


def mutated_data(seed: int, number: int) -> tuple[str, str, bytes]:
    """Task, format and content of the data file with this number."""
    rng = Random(f"data {seed} {number}")
    task, form = rng.choice(TASKS), rng.choice(FORMATS)
    found: Any = rows(task)
    snippets: list[str] = []

    def value() -> Any:
        if form in ("jsonl", "json") and rng.random() < 0.2:
            snippets.append(
                rng.choice(
                    ("1" * 5000, "[" * 100_000, "NaN", "-Infinity", "1e999", '{"a":' * 2000, "'a'", "// x", "\x00")
                )
            )
            return RAW.format(len(snippets) - 1)
        return rng.choice(_values(rng))

    content: bytes | None = None
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        found = _changed(rng, found, value) if isinstance(found, list) and found else found
    if form == "parquet" and rng.random() < 0.3:
        content = _odd_table(rng)
    if content is None:
        try:
            content = _written(form, found)
        except Exception:  # such as columns of several types, which Parquet cannot hold
            content = _written(form, rows(task))
    for position, snippet in enumerate(snippets):
        content = content.replace(f'"{RAW.format(position)}"'.encode(), snippet.encode())
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        content = _mangled(rng, content)
    return task, form, content


# Cases


class _HangError(BaseException):
    """The case took longer than `LIMIT_S`; not an Exception, so that nothing on the way takes it for its own."""


@dataclass
class Found:
    """What the cases of a run ended in."""

    ends: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""


class Chaos:
    """The folders that mutated files are put into, and the check of one of them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        from autopeft.studies.cli.files import validate

        self.seed = seed
        self.folders = {task: folder / task for task in TASKS}
        save_study(self.folders["classification"])
        language = self.folders["causal-lm"]
        save_study(language)
        _save_language_model(language / "model")
        self.bases = study_data()
        for task in TASKS:
            for split in ("train", "validation", "test"):
                (self.folders[task] / f"{split}.jsonl").write_bytes(_written("jsonl", rows(task)))
        # What is imported for the first file would count as its time.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            validate(self.folders["classification"] / "study.yaml")

    def study(self, number: int, found: Found) -> str:
        """Check the mutated study file with this number; return what is said of it."""
        path = self.folders["classification"] / "mutated.yaml"
        path.write_bytes(mutated_study(self.seed, number, self.bases))
        return self.case(f"study:{number}", path, found, lambda line: _placed(line, path))

    def data(self, number: int, found: Found) -> str:
        """Check the mutated data file with this number; return what is said of it."""
        task, form, content = mutated_data(self.seed, number)
        folder = self.folders[task]
        file = folder / f"mutated.{form}"
        file.write_bytes(content)
        path = folder / "of-data.yaml"
        changed = {**settings()["data"], "max_length": 64, "train": file.name}
        if number % 3 == 0:
            changed = {**changed, "train": "train.jsonl", "validation": file.name}
        objectives = ["loss", "num_params"] if task == "causal-lm" else ["accuracy", "num_params"]
        path.write_text(json.dumps(settings(task=task, data=changed, objectives=objectives)))

        def placed(line: str) -> bool:
            return _placed(line, path) and (file.name in line or "data.max_length" in line)

        said = self.case(f"data:{number}", path, found, placed)
        file.unlink()
        return said

    def case(self, name: str, path: Path, found: Found, placed: Callable[[str], bool]) -> str:
        """Check the file at `path` and count its end in `found`; `placed` tells whether a problem has a place."""
        from autopeft.studies.cli.files import validate
        from autopeft.studies.errors import UserError

        start = process_time()
        signal.signal(signal.SIGPROF, _stop)
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WAITING * LIMIT_S)
        faulthandler.dump_traceback_later(60, exit=True)  # for what no signal interrupts
        try:
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    validate(path)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
        except UserError as error:
            said = str(error)
            bad = [line for line in _problems(error) if not placed(line)]
            end = "refused"
            if bad or not said:
                end = "no place"
                found.failures.append(f"{name}: no key, line or file in: {bad[:1] or said}")
        except _HangError:
            said = end = "hang"
            found.failures.append(f"{name}: more than {LIMIT_S:g} s")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            end, last = "traceback", traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error!s:.200}"
            found.failures.append(f"{name}: {said} ({Path(last.filename).name}:{last.lineno})")
        else:
            said = end = "valid"
        found.ends[end] += 1
        if (took_s := process_time() - start) > found.slowest_s:
            found.slowest_s, found.slowest = took_s, name
        return said


def _stop(*_: object) -> None:
    raise _HangError


def _problems(error: Exception) -> list[str]:
    return list(getattr(error, "problems", None) or [str(error)])


def _placed(line: str, path: Path) -> bool:
    """Whether a problem begins with the file and a line or a key, or is about the file as a whole."""
    rest = line.removeprefix(str(path))
    whole = (": is larger than",)
    return rest != line and bool(re.match(r":\d+ |\s\S+: ", rest) or rest.startswith(whole))


def _save_language_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**shape, vocab_size=300, max_position_embeddings=64)
    tokenizer = byte_tokenizer(["say w1: w2"])
    tokenizer.chat_template = LLAMA
    shutil.rmtree(folder)
    save(seeded(LlamaForCausalLM, config), folder, tokenizer)


def run(chaos: Chaos, studies: int, data: int, progress: bool = False) -> Found:
    """Check so many mutated files of both kinds."""
    found = Found()
    cases = [(chaos.study, number) for number in range(studies)] + [(chaos.data, number) for number in range(data)]
    for done, (check, number) in enumerate(cases, start=1):
        failed = len(found.failures)
        check(number, found)
        if progress:
            for failure in found.failures[failed:]:
                print(failure, flush=True)
            if done % 500 == 0:
                print(f"{done:,} of {len(cases):,}: {dict(found.ends)}", flush=True)
    return found


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--data", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one case, such as study:17 or data:5")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos, start = Chaos(Path(folder), asked.seed), monotonic()
        if asked.only:
            kind, _, number = asked.only.partition(":")
            found = Found()
            content = (
                mutated_study(asked.seed, int(number), chaos.bases)
                if kind == "study"
                else mutated_data(asked.seed, int(number))[2]
            )
            print(content[:3000])
            print(getattr(chaos, kind)(int(number), found))
        else:
            found = run(chaos, asked.studies, asked.data, progress=True)
            print(f"{asked.studies:,} study files and {asked.data:,} data files with the seed {asked.seed}:")
            took_s = monotonic() - start
            print(f"{dict(found.ends)} in {took_s:.0f} s; the slowest, {found.slowest}: {found.slowest_s:.1f} s")
    for failure in found.failures:
        print(failure)
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
