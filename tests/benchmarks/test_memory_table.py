"""The table of what fits into a GPU's memory: counts without values are the counts with values."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autopeft.benchmarks.memory_table import (
    GPUS,
    SHAPES,
    Fit,
    WithoutValues,
    backbone_bytes,
    decoder,
    shapes_only,
    to_markdown,
    without_values,
)
from autopeft.evaluators.costs.pack_sizing import Levers, forecasts
from autopeft.search_space.adapters import AdapterSpec, Lora

LEVERS = (Levers(), Levers(1), Levers(checkpointing=True), Levers(1, checkpointing=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [Lora(rank=16), Lora(rank=4, dropout=0.1)], ids=["lora", "dropout"])
def test_a_step_without_values_takes_what_a_real_one_takes(dtype: torch.dtype, spec: AdapterSpec) -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=500,
    )  # fmt: skip
    counts = []
    for device in ("cpu", "meta"):
        model = without_values(config, dtype)
        if device == "cpu":
            model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
        evaluator = WithoutValues(model, rows=3, tokens=64)
        evaluator.device = torch.device(device)
        with shapes_only():
            forecast = forecasts(evaluator, evaluator.candidate(spec), lambda _: True)
            counts.append([forecast(levers) for levers in LEVERS])
    assert counts[0] == counts[1]
    whole, parts, checkpointed, both = counts[0]
    assert both < min(parts, checkpointed)
    assert max(parts, checkpointed) < whole


def test_the_shapes_have_the_sizes_of_their_models() -> None:
    """Parameters as the model cards say: 1.24, 3.21 and 8.03 billion."""
    evaluators = {name: WithoutValues(decoder(name), 1, 8) for name in SHAPES}
    billions = [round(sum(p.numel() for p in e.model.parameters()) / 1e9, 2) for e in evaluators.values()]
    assert billions == [1.24, 3.21, 8.03]
    found = backbone_bytes(evaluators["8B"])
    # 6.98 of 8.03 billion weights are in the layers' linears.
    assert found["bf16"] / 1e9 == pytest.approx(16.06, abs=0.01)
    assert found["NF4"] / 1e9 == pytest.approx(16.06 - 6.98 * (2 - 0.5625), abs=0.02)


def test_the_table_has_a_row_per_model_format_and_gpu() -> None:
    found = [
        Fit(model="8B", weights="NF4", gpu=gpu, levers=str(levers), backbone_bytes=6 * 10**9, slot_bytes=10**9, slots=3)
        for gpu in GPUS
        for levers in LEVERS
    ]
    head, _, *body = to_markdown(found).splitlines()
    assert head.count("|") == 9
    assert [line.split(" | ")[3] for line in body] == list(GPUS)
    assert "3 (1.0 GB)" in body[0]
