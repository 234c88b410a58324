"""What a user sees of a family that is not like the others: in `validate`, `plan` and `run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    NystromformerConfig,
    NystromformerForSequenceClassification,
    RoFormerConfig,
    RoFormerForSequenceClassification,
)

from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_ledger, read_snapshot

from ...support.tiny_models import seeded
from ...support.tiny_study import WORDS, save_study

SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
SHORT: dict[str, Any] = {
    "training": {"learning_rate": 1e-2, "epochs": 1, "batch_size": 8},
    "search": {"searcher": "random", "trials": 3, "batch": 3},
    "baselines": {"names": ["head"], "learning_rates": [1e-2]},
    "finalists": {"seeds": 1, "most": 1},
}


def study_of(folder: Path, make: Any, config: Any, **changes: Any) -> Path:
    path = save_study(folder, **SHORT, **changes)
    seeded(make, config).base_model.save_pretrained(folder / "model")
    return path


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_an_adapter_that_the_family_cannot_take_is_said_at_its_line(
    cli: Callable[..., Any],
    tmp_path: Path,
    command: str,
) -> None:
    adapters = {"lora": {"rank": [1, 2]}, "prefix": {"length": [2, 4]}}
    config = RoFormerConfig(**SHAPE)
    path = study_of(tmp_path, RoFormerForSequenceClassification, config, space={"adapters": adapters})
    code, out, errors = cli(command, path)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.strip() == "prefix:")
    assert (code, out) == (2, "")
    assert errors == (
        f"{path}:{line} space.adapters.prefix.at: prefix fits no site with role attn of this model: it needs attention"
        " by transformers' attention interface, and known sizes of the key and value heads; leave it out\n"
    )


def test_layers_that_return_tuples_are_shared(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = study_of(tmp_path, RoFormerForSequenceClassification, RoFormerConfig(**SHAPE))
    code, _, errors = cli("run", path)
    assert code == 0
    assert "do not share" not in errors
    settings = load_study(path)
    states = {trial.state for trial in read_snapshot(settings, open_ledger(settings)).trials}
    assert states <= {"complete", "infeasible"}, "also the head, and candidates without an adapter in layer 0"


@pytest.mark.parametrize("command", ["plan", "run"])
def test_layers_that_cannot_be_shared_are_said_once(
    cli: Callable[..., Any],
    tmp_path: Path,
    command: str,
) -> None:
    config = NystromformerConfig(**SHAPE)
    path = study_of(tmp_path, NystromformerForSequenceClassification, config)
    code, _, errors = cli(command, path)
    assert code == 0, errors
    assert errors.count("warning: candidates do not share the outputs of the layers below their adapters, because") == 1
    assert "trainings take longer, with the same results" in errors


def test_a_supernet_needs_modules_that_can_be_packed(cli: Callable[..., Any], tmp_path: Path) -> None:
    """DeBERTa projects its relative positions by the query and the key, once for all candidates."""
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    config = DebertaV2Config(**SHAPE, **positions, position_buckets=4, max_relative_positions=8)
    path = study_of(tmp_path, DebertaV2ForSequenceClassification, config)
    code, _, errors = cli("run", path, "--set", "search.searcher=gates")
    assert code == 2
    assert "search.searcher: gates trains candidates side by side, which this model does not permit" in errors
    assert "with adapters at attn.q: leave these roles out of `at`" in errors
