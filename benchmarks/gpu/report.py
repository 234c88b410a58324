"""Report of the kit in docs/performance.md: `python -m autopeft.benchmarks.gpu.report [runs/gpu/gpu.json]`.

With a file, its phases are merged into `benchmarks/results/gpu-<card>.json`, each in place of its former result, so
that a second run may repeat some of them. Then the section on GPUs is rewritten from all files of that folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autopeft.benchmarks.gpu.phases import PHASES
from autopeft.benchmarks.gpu.phases.equal_work import REGIMES
from autopeft.benchmarks.gpu.phases.kernel_speed import WANTED
from autopeft.benchmarks.gpu.phases.pack_parity import COMPARED, TOLERANCES
from autopeft.benchmarks.gpu.phases.step_overhead import TARGETS
from autopeft.benchmarks.gpu.runner import SCHEMA
from autopeft.evaluators.atomic import atomic_write_text
from autopeft.studies.reports import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- written by benchmarks/gpu/report.py -->", "<!-- end of what it writes -->"
#: Rows of a parity phase that are named where they fail.
MOST_NAMED = 12

#: A gpu.json, or the merged results of a card.
KitResults = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Write the report; return 0, or 1 for a file that is not of a GPU."""
    parser = argparse.ArgumentParser(prog="autopeft.benchmarks.gpu.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="a gpu.json to merge into benchmarks/results")
    options = parser.parse_args(arguments)
    if options.file is not None:
        try:
            merge(json.loads(options.file.read_text(encoding="utf-8")), RESULTS)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            print(f"{options.file}: {type(problem).__name__}: {problem}", file=sys.stderr)
            return 1
    text = PAGE.read_text(encoding="utf-8")
    atomic_write_text(PAGE, markdown.with_section(text, BEGIN, END, section(load(RESULTS))))
    return 0


def load(folder: Path) -> list[KitResults]:
    """Read the files of all cards, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]


def merge(found: KitResults, folder: Path) -> Path:
    """Merge the phases of a run into the file of its card, each with the commit and the time of its run.

    A phase that was aborted does not replace one with more rows. Raises ValueError for a dry run, another layout, or a
    run that does not name its card.
    """
    if found.get("schema") != SCHEMA:
        raise ValueError(f"is not a gpu.json of layout {SCHEMA}")
    if found["device"] != "cuda":
        raise ValueError("is the result of a dry run without a GPU, whose figures have no meaning")
    card = _card(found)
    if card is None:
        raise ValueError("lacks the phase 'environment', which names the card: run it too (--only environment,...)")
    path = folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card['name'].lower()).strip('-')}.json"
    whole: KitResults = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": SCHEMA, "phases": {}}
    )
    for name, phase in found["phases"].items():
        before = whole["phases"].get(name, {"rows": []})
        if phase["status"] in ("ok", "cut") or len(phase["rows"]) >= len(before["rows"]):
            whole["phases"][name] = phase | {"commit": found["commit"], "started": found["started"]}
    whole["phases"] = {name: whole["phases"][name] for name in PHASES if name in whole["phases"]}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(whole, indent=1) + "\n")
    return path


def section(cards: Sequence[KitResults]) -> str:
    """Return the section as Markdown."""
    if not cards:
        return f"**Not measured.** No card was available yet. Targets:\n\n{_targets(None)}"
    return "\n\n".join(part for card in cards for part in _of_card(card))


def _of_card(found: KitResults) -> Iterable[str]:
    card = _card(found) or {}
    versions = next((row for row in _rows(found, "environment") if row["what"] == "versions"), {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "what" and version)
    yield f"### {card.get('name', 'a card')}"
    yield (
        f"{card.get('memory_bytes', 0) / 2**30:.0f} GiB, {card.get('multiprocessors')} multiprocessors, driver"
        f" {card.get('driver')}; {named}. {_ceilings(found)}"
    )
    yield _targets(found)
    for part in (_tests(found), _operators(found), _products(found), _graphs(found), _memory(found)):
        if part:
            yield part
    yield _phases(found)


def _targets(found: KitResults | None) -> str:
    lines = [["", "target", "measured"]]
    for dtype, tolerance in TOLERANCES.items():
        name = str(dtype)
        rows = [row for row in _rows(found, "pack-parity") if row["dtype"] == name and "relative_difference" in row]
        worst = max((float(row["relative_difference"]) for row in rows), default=None)
        steps = f"the first {COMPARED[dtype]} steps" if COMPARED[dtype] else "20 steps and held out"
        words = f"loss, {steps}, packed against alone, {name.removeprefix('torch.')}"
        lines.append([words, f"{tolerance:.0e}", "" if worst is None else f"{worst:.1e} at most, {len(rows)} packs"])
    whole = {row["model"]: row for row in _rows(found, "step-overhead") if row.get("extrapolated")}
    for model, target in TARGETS.items():
        rho = f"{whole[model]['rho']:.2f}" if model in whole else ""
        lines.append([f"rho, K = 8, rank 16, {model} (a few layers, extrapolated)", f"{target:.2f}", rho])
    works = {row["regime"]: row for row in _rows(found, "equal-work")}
    for regime in REGIMES:
        row = works.get(regime.name)
        words = f"time of the loop over the pack's, K = 8, {regime.rows * regime.words:,} tokens each ({regime.name})"
        lines.append([words, f"{regime.target}", _spread(row, "speedup") if row else ""])
    ratios = [row["device_over_pytorch"] for row in _rows(found, "kernel-speed") if "device_over_pytorch" in row]
    measured = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} operators and shapes" if ratios else ""
    lines.append(["PyTorch's best way over each Triton kernel's", f"{WANTED}", measured])
    if demo := _rows(found, "demo"):
        lines.append(["the demo, from start to front, s", "", f"{demo[0]['wall_s']:.0f}"])
    return markdown.table(lines if found else [line[:2] for line in lines])


def _tests(found: KitResults) -> str:
    parts = []
    for name in found["phases"]:
        tested = [row for row in _rows(found, name) if "passed" in row]
        failed = [row for row in tested if not row["passed"]]
        if tested:
            parts.append(f"- {name}: {len(tested) - len(failed)} of {len(tested)} tests passed")
        parts += [f"  - failed: {_failed(row)}" for row in failed[:MOST_NAMED]]
        if len(failed) > MOST_NAMED:
            parts.append(f"  - and {len(failed) - MOST_NAMED} more")
    return "\n".join(parts)


def _failed(row: Mapping[str, Any]) -> str:
    names = ("op", "adapter", "model", "regime", "types", "dtype", "shape", "slots")
    where = ", ".join(str(row[key]) for key in names if key in row)
    if "error" in row:
        return f"{where}: {_line(row['error'])}"
    if "ratio" in row:
        return f"{where}: {row['ratio']:.2f} times its forecast"
    error = row.get("relative_error", row.get("relative_difference"))
    return f"{where}: {error}, allowed is {row['tolerance']}"


def _line(text: str, width: int = 80) -> str:
    """Return the first line of a message, escaped for a cell of a table."""
    return next(iter(text.splitlines()), "").replace("|", "/")[:width]


def _operators(found: KitResults) -> str:
    lines = [["Forward and backward pass", "types", "shape", "ms", "PyTorch's best over it", "with the host's time"]]
    for row in _rows(found, "kernel-speed"):
        if row["what"] != "operator":
            continue
        if "error" in row:
            lines.append([row["kernel"], row["types"], row["shape"], "-", _line(row["error"]), "-"])
            continue
        own = row.get("kernel_device_s")
        ratio = row.get("device_over_pytorch")
        lines.append(
            [row["kernel"], row["types"], row["shape"], "-" if own is None else f"{1e3 * own:.3f}",
             "-" if ratio is None else f"{ratio:.2f}", _spread(row, "over_pytorch")]
        )  # fmt: skip
    return markdown.table(lines) if len(lines) > 1 else ""


def _products(found: KitResults) -> str:
    """Return how near each product is to the card's ceilings, and whether the rule's tiles are the best tried."""
    rates = {row["what"]: row for row in _rows(found, "environment")}
    if "copy" not in rates or "product, bfloat16" not in rates:
        return ""
    lines = [
        ["Product", "types", "shape", "us", "of what the card allows", "the rule's time over the best", "the best"]
    ]
    for row in _rows(found, "kernel-speed"):
        if row["what"] != "product" or "device_s" not in row:
            continue
        # The time of its bytes or of its operations, whichever is longer, is a lower bound.
        floor_s = max(
            row["nbytes"] / rates["copy"]["bytes_per_s"], row["flops"] / rates["product, bfloat16"]["flops_per_s"]
        )
        share = floor_s / row["device_s"]
        lines.append(
            [row["product"], row["types"], row["shape"], f"{1e6 * row['device_s']:.1f}", f"{share:.0%}",
             f"{row['device_s'] / row['best_s']:.2f}", row["best_way"]]
        )  # fmt: skip
    return markdown.table(lines) if len(lines) > 1 else ""


def _graphs(found: KitResults) -> str:
    lines = [["Step", "regime", "way", "ms", "times as fast as eager", "first call, s", "pays after steps"]]
    for row in _rows(found, "graphs"):
        head = [row["step"], row["regime"], row["way"]]
        if "over_eager" in row:
            after = float(row["steps_to_pay"])
            pays = "-" if row["way"] == "eager" else "never" if after == float("inf") else f"{after:.0f}"
            lines.append(
                [*head, f"{1e3 * row['step_s']:.1f}", f"{row['over_eager']:.2f}", f"{row['first_s']:.1f}", pays]
            )
        else:
            lines.append([*head, "-", _line(row.get("error", row.get("note", ""))), "-", "-"])
    return markdown.table(lines) if len(lines) > 1 else ""


def _memory(found: KitResults) -> str:
    ratios = sorted(row["ratio"] for row in _rows(found, "memory") if "ratio" in row)
    if not ratios:
        return ""
    return (
        f"Memory: a pack held {ratios[0]:.2f} to {ratios[-1]:.2f} times its forecast (median"
        f" {ratios[len(ratios) // 2]:.2f}, {len(ratios)} packs)."
    )


def _phases(found: KitResults) -> str:
    lines = [["Phase", "outcome", "s", "commit"]]
    for name, phase in found["phases"].items():
        words = phase["status"]
        if phase["error"]:
            words += f": {phase['error']['type']}"
        if phase["left_out"]:
            words += f", left out: {len(phase['left_out'])}"
        lines.append([name, words, f"{phase['seconds']:.0f}", (phase["commit"] or "unknown")[:10]])
    return markdown.table(lines)


def _ceilings(found: KitResults) -> str:
    rates = {row["what"]: row for row in _rows(found, "environment")}
    words = []
    if "copy" in rates:
        words.append(f"a copy moves {rates['copy']['bytes_per_s'] / 1e12:.2f} TB/s")
    words += [
        f"{what} {row['flops_per_s'] / 1e12:.0f} TFLOP/s" for what, row in rates.items() if "flops_per_s" in row
    ]  # fmt: skip
    return f"Ceilings: {', '.join(words)}." if words else ""


def _rows(found: KitResults | None, phase: str) -> list[dict[str, Any]]:
    return found["phases"].get(phase, {}).get("rows", []) if found else []


def _card(found: KitResults) -> dict[str, Any] | None:
    return next((row for row in _rows(found, "environment") if row["what"] == "card"), None)


def _spread(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
