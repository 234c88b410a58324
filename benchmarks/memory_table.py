"""How many candidates fit into a GPU's memory, by arithmetic: models without values (command `memory`).

The models have the shapes of real ones and lie on torch's meta device: a forward pass there computes shapes and no
numbers, so the code that sizes packs (`evaluators/costs/pack_sizing.py`) counts an 8B model's step on any machine. The
GPU kit's memory phase holds the same forecasts against an allocator.

What the counts take for granted: attention by a flash kernel, which keeps queries, keys, values, outputs and a number
per query; the backbone's weights and nothing else on the device before a pack. NF4 weights of the layers' linears take
half a byte, and a float32 scale for 64 of them; embeddings, output layer and norms stay in bfloat16. A 4-bit linear
keeps the same activations as a plain one; its dequantised weight lives within one operation and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbolic
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.base import Attaching, Request
from autopeft.evaluators.costs.pack_sizing import MAX_SLOTS, Levers, forecasts, slots_in
from autopeft.evaluators.tasks import TASKS, Batch
from autopeft.search_space.adapters import AdapterSpec, Lora
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone
from autopeft.search_space.backbones.introspection import describe
from autopeft.studies.reports.markdown import table

#: hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, head_dim,
#: tie_word_embeddings of Llama 3.2 (1B, 3B) and Llama 3.1 (8B).
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1B": (2048, 16, 32, 8, 8192, 64, True),
    "3B": (3072, 28, 24, 8, 8192, 128, True),
    "8B": (4096, 32, 32, 8, 14336, 128, False),
}
VOCABULARY = 128256
#: Bytes of a GPU that a process can use: 24 and 80 GB without half a gigabyte for the driver's context.
GPUS = {"24 GB": 24e9 - 0.5e9, "80 GB": 80e9 - 0.5e9}
#: Bytes per weight of a linear in 4 bits: half a byte, and a float32 scale for a block of 64.
NF4_BYTES = 0.5 + 4 / 64
ATTENTION = "autopeft_without_values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The slots of one model, format of its weights and GPU, by levers.

    `backbone_bytes`: weights. `slot_bytes`: forecast that a slot adds. `slots`: 0 if not even one fits.
    """

    model: str
    weights: str
    gpu: str
    levers: str
    backbone_bytes: int
    slot_bytes: int
    slots: int


class WithoutValues(Attaching):
    """A model on torch's meta device, whose steps have sizes. `rows`: of a minibatch, of `tokens` tokens.

    Every token has a loss.
    """

    def __init__(self, model: nn.Module, rows: int, tokens: int) -> None:
        self.model = model.eval()
        self.backbone: Backbone = describe(model, id="without values")
        self.device = torch.device("meta")
        self.task = TASKS["causal-lm"](None, tokens, None, ())
        self._shape = rows, tokens

    @override
    def attach(self, request: Request) -> Attachment:
        return Attachment(self.model, self.backbone, [request.candidate.architecture], [request.seed])

    @override
    def longest_batch(self, candidate: Candidate) -> Batch:
        ids = torch.zeros(self._shape, dtype=torch.long, device=self.device)
        return {"input_ids": ids, "targets": ids}

    def candidate(self, spec: AdapterSpec) -> Request:
        """Return a candidate with an adapter at all linears of the layers."""
        places = {site.name: [spec] for site in self.backbone.sites if site.role in LINEAR_ROLES}
        training = {"batch_size": self._shape[0], "epochs": 1}
        return Request(candidate=Candidate(architecture=Architecture.of(places), training=training))


def fits(
    names: Sequence[str] = tuple(SHAPES), rows: int = 8, tokens: int = 1024, spec: AdapterSpec | None = None
) -> Iterator[Fit]:
    """Yield the slots that fit, with LoRAs of rank 16 at all linears (or `spec`)."""
    tried = (Levers(), Levers(1), Levers(checkpointing=True), Levers(1, checkpointing=True))
    for name in names:
        evaluator = WithoutValues(decoder(name), rows, tokens)
        with shapes_only():
            forecast = forecasts(evaluator, evaluator.candidate(spec or Lora(rank=16)), lambda _: True)
            needed = {levers: forecast(levers) for levers in tried}
        for weights, held in backbone_bytes(evaluator).items():
            for gpu, size in GPUS.items():
                for levers in tried:
                    yield Fit(
                        model=name, weights=weights, gpu=gpu, levers=str(levers), backbone_bytes=held,
                        slot_bytes=needed[levers],
                        slots=slots_in(int(size - held), needed[levers], MAX_SLOTS["cuda"]),
                    )  # fmt: skip


def decoder(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a model of the shapes of `name` without values."""
    hidden, layers, heads, key_heads, mlp, features, tied = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=mlp,
        head_dim=features,
        tie_word_embeddings=tied,
        vocab_size=VOCABULARY,
    )
    return without_values(config, dtype)


def without_values(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    """Return a Llama on the meta device with an attention that keeps what a flash kernel keeps."""
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return model


def backbone_bytes(evaluator: WithoutValues) -> dict[str, int]:
    """Return the bytes of the backbone's weights by format."""
    total = sum(parameter.nbytes for parameter in evaluator.model.parameters())
    sites = [site for site in evaluator.backbone.sites if site.role in LINEAR_ROLES]
    linears: list[Any] = [evaluator.model.get_submodule(site.module) for site in sites]
    in_layers = sum(linear.weight.nbytes for linear in linears)
    in_four_bits = NF4_BYTES * sum(linear.weight.numel() for linear in linears)
    return {"bf16": total, "NF4": int(total - in_layers + in_four_bits)}


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let boolean masks select everything, because they have no values either."""
    before = symbolic.meta_nonzero_assume_all_nonzero
    symbolic.meta_nonzero_assume_all_nonzero = True
    try:
        yield
    finally:
        symbolic.meta_nonzero_assume_all_nonzero = before


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


def to_dict(found: Sequence[Fit]) -> list[dict[str, Any]]:
    """Return the rows as JSON."""
    return [asdict(fit) for fit in found]


def to_markdown(found: Sequence[Fit]) -> str:
    """Return a table with a row per model, format and GPU, and the slots by levers: with the bytes of one in GB."""
    levers = list(dict.fromkeys(fit.levers for fit in found))
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for fit in found:
        key = fit.model, fit.weights, f"{fit.backbone_bytes / 1e9:.1f} GB", fit.gpu
        rows.setdefault(key, []).append(f"{fit.slots} ({fit.slot_bytes / 1e9:.1f} GB)")
    head = ["model", "weights", "their size", "GPU", *levers]
    return table([head, *([*key, *cells] for key, cells in rows.items())])
