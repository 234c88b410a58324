"""The benchmark: its loop does the work of ours, it refuses to compare what is not alike, its figures are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

from autopeft.benchmarks import __main__ as cli
from autopeft.benchmarks.speed import arms, kernels, ranking
from autopeft.benchmarks.speed.arms import ArmRow, Bench, EqualWork, ParityError, check_parity
from autopeft.benchmarks.speed.benchmark import run_bench
from autopeft.benchmarks.speed.kernels import KernelCase, KernelRow, kernel_cases
from autopeft.benchmarks.speed.loop import CandidateRun
from autopeft.benchmarks.speed.overhead import Overhead, measure_overhead
from autopeft.benchmarks.speed.ranking import (
    SHARES,
    Agreement,
    Budget,
    Correlation,
    Course,
    Ending,
    LoopCosts,
    agreement,
    hyperband,
    matched,
    rungs,
    spent_share,
    top_half,
)
from autopeft.benchmarks.speed.report import EarlyRanking, HourRow, SpeedResult, to_markdown
from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.costs.timing import Spread, interleaved
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.kernels import slot_products
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.problem import Fidelity
from autopeft.search_space.training import Training
from autopeft.studies.config.loading import load_study

from ...support.slow import slow
from ...support.tiny_models import byte_tokenizer, save, seeded
from ...support.tiny_study import save_study

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def tiny_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their times say nothing here."""
    monkeypatch.setitem(kernels.SHAPES, "cpu", TINY)


TINY = (4, 16, 2, 32)
CPU = torch.device("cpu")
QUICK = ("--candidates", "2", "--rounds", "1", "--ranking", "0")


class Silent:
    def __init__(self) -> None:
        self.planned = self.done = 0

    def plan(self, steps: int) -> None:
        self.planned = steps

    def stage(self, what: str) -> None: ...

    def advance(self, steps: int) -> None:
        self.done += steps


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study with larger weights: with its own, nothing is learnt, and all losses are alike."""
    path = save_study(tmp_path_factory.mktemp("bench"))
    model = BertModel.from_pretrained(path.parent / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    model.save_pretrained(path.parent / "model")
    return path


@pytest.fixture(scope="module")
def bench(study: Path) -> Bench:
    settings = load_study(study)
    return Bench.of(settings, load_splits(settings.data_settings(), settings.task), 2, Silent())


def requests(bench: Bench, share: float = 1.0, **training: Any) -> list[Request]:
    """LoRA at sites and of ranks that are not all the same."""
    candidates = [
        Architecture.of({f"layers.{layer}.attn.{role}": [Lora(rank=layer + 1, **fields)] for layer in range(lowest, 3)})
        for lowest, role, fields in ((0, "q", {}), (1, "v", {"scaling": "rslora", "init": "gaussian"}))
    ]
    chosen = {"learning_rate": 2e-2, "epochs": 4.0, "batch_size": 8, **training}
    return [
        Request(candidate=Candidate(architecture=c, training=chosen), seed=3, fidelity=Fidelity(share=share))
        for c in candidates
    ]


# The loop


@pytest.mark.parametrize(
    ("share", "training"),
    [
        slow(1.0, {"weight_decay": 0.3, "schedule": "cosine", "warmup": 0.2, "max_grad_norm": 0.1}),
        (0.5, {"weight_decay": 0.1, "schedule": "linear", "max_grad_norm": 0.0, "batch_size": 7}),
    ],
)
def test_the_loop_trains_what_the_evaluator_trains(bench: Bench, share: float, training: dict[str, Any]) -> None:
    asked = requests(bench, share, **training)
    outcomes = bench.single.evaluate(asked)
    for run, outcome in zip(bench.loop.prepare(asked), outcomes, strict=True):
        own = outcome.measurement
        assert own is not None, outcome.reason
        assert len(set(own.losses)) == len(own.losses)
        assert max(own.losses) > 1.05 * min(own.losses)
        assert run.losses == pytest.approx(own.losses, rel=1e-4, abs=1e-5)
        assert run.loss == pytest.approx(own.values["loss"], rel=1e-4)
        assert run.accuracy == pytest.approx(own.values["accuracy"])
        assert run.seconds > run.step_s * len(run.losses) + run.validation_s > 0
    assert not any(module.training for module in bench.single.model.modules()), "it trained copies"


def test_what_peft_does_not_hold(bench: Bench) -> None:
    (candidate, _) = (request.candidate for request in requests(bench))
    assert bench.loop.holds(candidate)
    assert not bench.loop.holds(replace(candidate, architecture=Architecture()))


# Time


def test_ratios_are_of_neighbours_and_taken_in_turns() -> None:
    asked: list[str] = []

    def arm(name: str, seconds: float) -> float:
        asked.append(name)
        return seconds if len(asked) > 4 else 100.0 * len(asked)

    ratio = interleaved(lambda: arm("other", 2.0), lambda: arm("own", 1.0), repeats=4)
    assert asked == ["other", "own", "own", "other"] * 3, "two pairs to warm up, and four"
    assert ratio == Spread(median=2.0, low=2.0, high=2.0)


def test_the_overhead_for_a_language_model_in_bfloat16(tmp_path: Path) -> None:
    texts = [f"{word} or {word[::-1]}" for word in ("abc", "bcd", "cde", "def", "efg", "fgh")]
    tokenizer = byte_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    folder = save(seeded(LlamaForCausalLM, config), tmp_path, tokenizer)
    loaded = load_backbone(folder, task="causal-lm", dtype="bfloat16")
    rows = [{"text": text} for text in texts]
    evaluator = PackedEvaluator(loaded, "causal-lm", Splits(rows, rows, rows, None), 16, share_lower_layers=False)
    found = measure_overhead(evaluator, Training(batch_size=2), 0, repeats=2)
    assert found.tokens % (2 * found.slots) == 0
    assert found.rho.median > 0
    assert not any(parameter.grad is not None for parameter in loaded.model.parameters())


# Kernels


def found_by(run: kernels.Pass, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The result, and the gradient of each input."""
    out = run()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weight, allow_unused=True)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_what_kernels_are_compared_with_does_the_same(
    monkeypatch: Any, native: bool, dtype: torch.dtype, adapter_dtype: torch.dtype, tolerance: float
) -> None:
    """`native`: with the operation for the cross-entropy that PyTorch 2.13 has."""
    if not native:
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    cases = list(kernel_cases(CPU, TINY, dtype, adapter_dtype))
    assert len({case.name for case in cases}) == len(cases) == 6
    for case in cases:
        ways = [case.kernel, case.batched]
        if "over one LoRA" not in case.name:  # the reference there is other work
            ways.append(case.reference)
        expected, *others = (found_by(way, case.inputs) for way in reversed(ways))
        for found in others:
            for tensor, ours, theirs in zip([None, *case.inputs], found, expected, strict=True):
                if theirs is None:
                    assert ours is None
                    continue
                assert ours is not None
                assert ours.shape == theirs.shape
                if tensor is not None:
                    # A gate of zero gets no gradient from a top-k, and only some ways compute one.
                    assert ours.dtype == theirs.dtype == tensor.dtype
                    ours, theirs = ours * (tensor != 0), theirs * (tensor != 0)
                distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
                assert distance < tolerance, (case.name, distance)


@pytest.mark.parametrize(("batched", "without", "smaller"), [(3.0, 2.0, 2.0), (1.5, 2.0, 1.5)])
def test_pytorch_is_the_better_one_of_its_two_ways(
    monkeypatch: Any, batched: float, without: float, smaller: float
) -> None:
    """By a clock that backward passes move: without Triton means that there is none in these either."""
    clock = [0.0]

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float, without: float) -> torch.Tensor:
            ctx.seconds, ctx.without = seconds, without
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            clock[0] += ctx.without if slot_products.triton is None else ctx.seconds
            return gradient, None, None

    monkeypatch.setattr(kernels, "now", lambda device: clock[0])
    triton = object()
    monkeypatch.setattr(slot_products, "triton", triton)
    x = torch.ones(1, requires_grad=True)
    case = KernelCase(
        name="",
        shape="",
        inputs=[x],
        kernel=lambda: Operator.apply(x, 1.0, without),
        reference=lambda: x,
        batched=lambda: Operator.apply(x, batched, batched),
        pull=torch.ones(1),
    )
    found = kernels._over_pytorch(case, torch.device("cuda"))  # which is only a name here
    assert found is not None
    assert found.median == smaller
    assert slot_products.triton is triton
    assert kernels._over_pytorch(case, CPU) is None


# What needs little


#: Of our requirements, those that a machine with torch, transformers and peft need not have.
HEAVY = (
    *("botorch", "datasets", "gpytorch", "matplotlib", "mlflow", "optuna", "pandas", "plotly", "pyarrow", "pydantic"),
    *("rich", "ruamel", "scipy", "sklearn", "sqlalchemy", "threadpoolctl", "typer"),
)
LIGHT = (
    "benchmarks.speed.trainer",
    "benchmarks.speed.overhead",
    "benchmarks.speed.kernels",
    "evaluators.training.packed",
)


IMPORTS = "".join(f"import autopeft.{name}\n" for name in LIGHT)


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_parts_of_the_benchmark_run_where_little_is_installed() -> None:
    python(f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n{IMPORTS}")  # None: as if it were missing


@pytest.mark.slow
def test_and_load_no_more_where_there_is_more() -> None:
    # transformers' Trainer itself loads datasets where that is installed, and datasets the others.
    python(
        "import sys\n"
        "from transformers import PrinterCallback, Trainer, TrainingArguments\n"
        f"theirs = {set(HEAVY)} & set(sys.modules)\n"
        "assert theirs <= {'datasets', 'pandas', 'pyarrow', 'scipy'}, theirs\n"
        f"{IMPORTS}"
        f"assert not (ours := {set(HEAVY)} & set(sys.modules) - theirs), ours\n"
    )


# Parity


def alike(**changes: Any) -> dict[str, list[CandidateRun]]:
    runs = {name: [CandidateRun(losses=[1.0] * 30, loss=1.0, accuracy=0.5, seconds=1.0)] * 2 for name in arms.ARMS}
    return runs | changes


def test_arms_that_agree_pass() -> None:
    check_parity(alike())
    # Beyond the first twenty steps rounding has grown.
    check_parity(alike(packed=[CandidateRun(losses=[1.0] * 20 + [1.1] * 10, loss=1.01, accuracy=0.4, seconds=9.0)] * 2))


@pytest.mark.parametrize(
    ("arm", "losses", "loss", "what"),
    [
        ("packed", [1.0] * 4 + [1.0002] + [1.0] * 25, 1.0, "packed, candidate 1: the loss of step 5 is 1.000200"),
        ("loop", [1.002] * 30, 1.0, "loop, candidate 1: the loss of step 1 is 1.002000, expected 1.000000"),
        (
            "packed+prefix",
            [1.0] * 30,
            1.03,
            "packed+prefix, candidate 1: the validation loss is 1.03000, expected 1.00000",
        ),
        ("loop", [1.0] * 29, 1.0, "loop, candidate 1: took 29 steps, expected 30"),
        ("loop", [float("nan")] * 30, 1.0, "loop, candidate 1: the loss of step 1 is nan"),
    ],
)
def test_arms_that_do_not_agree(arm: str, losses: list[float], loss: float, what: str) -> None:
    runs = alike()
    runs[arm] = [runs[arm][0], CandidateRun(losses=losses, loss=loss, accuracy=0.5, seconds=1.0)]
    with pytest.raises(ParityError, match=re.escape(what)):
        check_parity(runs)


@pytest.mark.slow
def test_a_broken_arm_ends_the_benchmark(study: Path, monkeypatch: Any, capsys: Any) -> None:
    whole = arms.ARMS["packed"]

    def broken(bench: Bench, requests: Sequence[Request]) -> Iterator[CandidateRun]:
        for run in whole(bench, requests):
            losses = list(run.losses)
            losses[2] *= 1.01
            yield replace(run, losses=losses)

    monkeypatch.setitem(arms.ARMS, "packed", broken)
    with pytest.raises(SystemExit) as exited:
        cli.main(["speed", str(study), *QUICK, "--json"])
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (1, "")
    assert "packed, candidate 0: the loss of step 3" in err
    assert "their times are not compared" in err
    assert "packed+prefix, candidate" not in err
    assert "loop, candidate" not in err


# Ranking


def test_correlations() -> None:
    exact = Correlation.of([3.0, 1.0, 2.0, 5.0], [0.3, 0.1, 0.2, 0.9])
    assert exact == Correlation(value=pytest.approx(1.0), low=pytest.approx(1.0), high=pytest.approx(1.0))
    assert Correlation.of([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).value == pytest.approx(-1.0)
    assert Correlation.of([1.0, 1.0, 1.0], [3.0, 2.0, 1.0]) == Correlation(value=None, low=None, high=None)
    loose = Correlation.of([1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 4, 3, 6, 5, 8, 7])
    assert loose.value is not None
    assert loose.low is not None
    assert loose.high is not None
    assert loose.value == pytest.approx(19 / 21)
    assert loose.low < loose.value <= loose.high <= 1.0


def test_the_top_half() -> None:
    quality = [0.1, 0.9, 0.2, 0.8, 0.7, 0.3]
    assert top_half(quality) == [1, 3, 4]
    assert top_half([0.5, 0.4, 0.5]) == [0, 2]
    # Right about which half is better, and wrong about the order within the better one.
    found = agreement([0.1, 0.7, 0.2, 0.8, 0.9, 0.3], quality)
    assert found.top_half.value == pytest.approx(-1.0)
    assert found.all.value == pytest.approx(27 / 35)


def budgets(*top: float | None) -> list[Budget]:
    anything = Correlation(value=0.9, low=0.9, high=0.9)
    values = [Correlation(value=value, low=value, high=value) for value in top]
    return [
        Budget(share=share, agreement=Agreement(all=anything, top_half=value))
        for share, value in zip(SHARES, values, strict=False)
    ]


def test_the_matched_budget() -> None:
    assert matched(budgets(0.2, 0.79, 0.8, 0.7, 0.95)) == (0.2, True)
    assert matched(budgets(0.2, None, 0.6, 0.79, 0.5)) == (0.3, False)


def test_rungs_double() -> None:
    assert rungs(0.15) == (0.15, 0.3, 0.6)
    assert rungs(0.5) == (0.5,)
    assert rungs(1.0) == ()


def courses(count: int) -> list[Course]:
    """Losses fall with the share, and candidates are in order from the first step on: the last is the best."""
    shares = [*rungs(0.1), 1.0]
    return [Course(loss={s: 3.0 - s - 0.01 * i for s in shares}, accuracy=0.5 + 0.01 * i) for i in range(count)]


def test_hyperband_spends_less_than_all_and_counts_every_candidate() -> None:
    seen = courses(30)[::-1]
    endings = hyperband(seen, 0.1)
    assert len(endings) == len(seen)
    assert {ending.share for ending in endings} <= {*rungs(0.1), 1.0}
    assert endings[0].share == 1.0, "the best one comes first and is never pruned"
    assert all(ending.loss == course.loss[ending.share] for ending, course in zip(endings, seen, strict=True))
    costs = LoopCosts(setup_s=0.5, step_s=0.1, rung_s=0.05, validation_s=1.0)
    spent = spent_share(endings, [64] * 30, costs, 0.1)
    assert 0.0 < spent < 1.0
    assert endings == hyperband(seen, 0.1), "the same every time"


def test_what_a_pruned_loop_spends() -> None:
    costs = LoopCosts(setup_s=1.0, step_s=0.1, rung_s=0.5, validation_s=2.0)
    endings = [Ending(share=0.2, loss=2.0, accuracy=0.0), Ending(share=1.0, loss=1.0, accuracy=0.7)]
    # 20 steps and two scorings (at 0.1 and 0.2); 100 steps, the four rungs on the way and the last scoring.
    pruned = (1.0 + 2.0 + 2 * 0.5) + (1.0 + 10.0 + 4 * 0.5 + 2.0)
    assert spent_share(endings, [100, 100], costs, 0.1) == pytest.approx(pruned / (2 * (1.0 + 10.0 + 2.0)))
    assert spent_share(endings[1:], [100], costs, 1.0) == pytest.approx(1.0)


def test_pruned_candidates_rank_below_the_others() -> None:
    endings = [
        Ending(share=0.1, loss=2.0, accuracy=0.9),
        Ending(share=1.0, loss=1.9, accuracy=0.2),
        Ending(share=0.2, loss=1.5, accuracy=0.1),
        Ending(share=1.0, loss=1.8, accuracy=0.3),
    ]
    scores = ranking.ranking(endings)
    assert sorted(range(4), key=lambda i: scores[i]) == [0, 2, 1, 3]


# The result


def made_up(peak: int | None = None) -> SpeedResult:
    spread = Spread(median=2.34, low=2.11, high=2.56)
    found = Correlation(value=0.67, low=0.12, high=0.89)
    both = Agreement(all=found, top_half=Correlation(value=None, low=None, high=None))
    rows = [ArmRow(arm=arm, speedup=spread, seconds=7.89, peak_memory_bytes=peak) for arm in arms.ARMS]
    return SpeedResult(
        conditions={
            "study": "s", "seed": 5, "candidates": 8, "rounds": 3, "model": "m", "dtype": "float32",
            "train_rows": 1000, "validation_rows": 467, "device": "cpu", "cpu": "c", "threads": 2, "cores": 4,
            "load": 0.3, "versions": {"torch": "2.13.0", "triton": None},
        },
        equal_work=(EqualWork(title="t", candidates=8, steps=64, lowest_layer=None, rows=tuple(rows)),),
        kernels=(KernelRow(kernel="LoRA", shape="8 x 2", over_reference=Spread.of([1.51, 1.52]), over_pytorch=None),),
        overhead=Overhead(slots=8, rank=16, tokens=4096, rho=Spread(median=1.31, low=1.29, high=1.37), bare_s=0.5),
        ranking=EarlyRanking(
            candidates=24, ceiling=both, budgets=(Budget(share=0.15, agreement=both),), matched_share=0.15,
            reached=False,
            rows=(HourRow(arm="loop", over_loop=spread, over_pruned_loop=spread.times(0.5), steps_share=0.44,
                          agreement=both),),
        ),
    )  # fmt: skip


def figures(data: Any) -> Iterator[float]:
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from figures(value)
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield data


def test_markdown_and_json_have_the_same_figures() -> None:
    result = made_up()
    text = to_markdown(result)
    data = json.loads(json.dumps(result.to_dict()))
    assert data == json.loads(json.dumps(asdict(result)))
    for value in figures({key: data[key] for key in ("equal_work", "overhead", "kernels", "ranking")}):
        forms = {f"{value:,}"} if isinstance(value, int) else {f"{value:.2f}", f"{value:.0%}"}
        assert any(form in text for form in forms), value
    assert "| t (64 steps) | 2.34 (2.11 to 2.56) |" in text
    assert "| 15% | 0.67 (0.12 to 0.89) | - |" in text
    assert "| loop | 2.34 (2.11 to 2.56) | 1.17 (1.05 to 1.28) | 44% |" in text
    assert "No share ranks" in text
    assert "triton missing" in text
    assert "Peak memory" not in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_memory_is_shown_where_it_was_measured() -> None:
    assert "| t | 3.20 | 3.20 | 3.20 | 3.20 |" in to_markdown(made_up(peak=3_200_000_000))


# The whole of it


@pytest.mark.slow
def test_the_command(study: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["speed", str(study), *QUICK, "--json", "--seed", "4"])
    out, err = capsys.readouterr()
    assert exited.value.code == 0, err
    data = json.loads(out)
    assert data["conditions"]["seed"] == 4
    assert data["conditions"]["versions"]["peft"]
    assert data["ranking"] is None
    assert [table["lowest_layer"] for table in data["equal_work"][1:]] == [1, 2]
    for table in data["equal_work"]:
        assert [row["arm"] for row in table["rows"]] == list(arms.ARMS)
        assert table["rows"][0]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert all(row["speedup"]["median"] > 0 and row["peak_memory_bytes"] is None for row in table["rows"])
    assert data["overhead"]["rho"]["median"] > 0
    assert "packed+prefix, round 1 of 1" in err


@pytest.mark.slow
def test_the_ranking_part(study: Path) -> None:
    settings = load_study(study)
    watch = Silent()
    splits = load_splits(settings.data_settings(), settings.task)
    result = run_bench(settings, splits, candidates=2, rounds=1, ranked=6, watch=watch)
    found = result.ranking
    assert found is not None
    assert watch.done == watch.planned > 0
    assert [budget.share for budget in found.budgets] == list(SHARES)
    assert found.matched_share in SHARES
    by_arm = {row.arm: row for row in found.rows}
    assert list(by_arm) == ["loop", "loop, Hyperband", "single", "packed", "packed+prefix", "packed+prefix, halving"]
    whole = ("loop", "single", "packed", "packed+prefix")
    assert len({by_arm[arm].agreement for arm in whole}) == 1, "the same values, the same ranking"
    assert all(by_arm[arm].steps_share == 1.0 for arm in whole)
    assert by_arm["loop"].over_loop.median == 1.0
    assert by_arm["loop, Hyperband"].over_pruned_loop.median == pytest.approx(1.0)
    halved = by_arm["packed+prefix, halving"]
    assert 0.0 < halved.steps_share <= 1.0
    assert (halved.steps_share < 1.0) == (found.matched_share < 1.0)
    to_markdown(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(study: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["speed", str(study), *QUICK, "--device", "cuda"])
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (4, "")
    assert "no GPU" in err
