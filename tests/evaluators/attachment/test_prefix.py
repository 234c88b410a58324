"""Prefixes: equal to a slow attention and to HF peft's, closed where a slot has none, gone when detached."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.attention import install
from autopeft.search_space.adapters import Bottleneck, Prefix
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.introspection import describe
from autopeft.search_space.runtime.bank import Bank

LAYERS, WIDTH, HEADS, VOCABULARY = 2, 24, 4, 61
_SHAPE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
}
_TEXT = _SHAPE | {"vocab_size": VOCABULARY, "pad_token_id": 0}
# Two query heads share a key head, and the queries are wider than the residual stream.
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Any] = {
    "Bert": ("BertModel", transformers.BertConfig(**_TEXT)),
    "Roberta": ("RobertaModel", transformers.RobertaConfig(**_TEXT)),
    "DistilBert": (
        "DistilBertModel",
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=40, pad_token_id=0
        ),
    ),
    "ViT": ("ViTModel", transformers.ViTConfig(**_SHAPE, image_size=8, patch_size=4)),
    "Llama": ("LlamaModel", transformers.LlamaConfig(**_DECODER)),
    "Qwen3": ("Qwen3Model", transformers.Qwen3Config(**_DECODER)),
    "Mistral": ("MistralModel", transformers.MistralConfig(**_DECODER, sliding_window=3)),
    "Gemma": ("GemmaModel", transformers.GemmaConfig(**_DECODER)),
    "Gemma2": ("Gemma2Model", transformers.Gemma2Config(**_DECODER, sliding_window=3)),
    "Gemma3": ("Gemma3TextModel", transformers.Gemma3TextConfig(**_DECODER, sliding_window=3)),
    "GPT2": (
        "GPT2Model",
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=40, pad_token_id=0
        ),
    ),
}
# Gemma 2 caps its scores, which sdpa cannot; transformers then runs it with eager attention.
CASES = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("Gemma2", "sdpa")]


def build(family: str, attention: str = "sdpa", task: str | None = None) -> tuple[nn.Module, Backbone]:
    """A random model in which no weight has a special value, and its description."""
    torch.manual_seed(0)
    name, config = FAMILIES[family]
    model = getattr(transformers, task or name)._from_config(copy.deepcopy(config), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval(), describe(model, id=family)


def inputs(family: str, examples: int) -> dict[str, Tensor]:
    """A batch; text has a padded example on either side."""
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        return {"pixel_values": torch.randn(examples, 3, 8, 8, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (examples, 6), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def repeated(batch: dict[str, Tensor], slots: int) -> dict[str, Tensor]:
    """The same examples for every slot."""
    return {name: torch.cat([value] * slots) for name, value in batch.items()}


def placed(backbone: Backbone, *lengths: int, init: str = "normal") -> Architecture:
    """A prefix of `lengths[i]` in layer i; 0 for none."""
    return Architecture.of(
        {f"layers.{i}.attn": [Prefix(length=length, init=init)] if length else [] for i, length in enumerate(lengths)}
    )


def prefixes_of(attachment: Attachment, k: int) -> dict[str, dict[str, Tensor]]:
    """The prefixes of slot k by the path of their attention module, as leaves of their own."""
    found = {}
    for bank, slots in zip(attachment.banks, attachment._slots_of, strict=True):
        served = list(range(attachment.num_slots)) if slots is None else slots.tolist()
        if k in served:
            values = bank.of_slot(served.index(k))
            found[bank.site.attention_module] = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    return found


def slow_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query at a time, over the prefix and the keys that it may see."""
    prefix = getattr(module, "slow_prefix", None)
    batch, heads, length, features = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, features)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // group], value[b, h // group]
            first = slice(h // group * features, (h // group + 1) * features)
            for t in range(length):
                seen = list(range(len(keys)))
                if attention_mask is not None:
                    row = attention_mask[b % len(attention_mask), 0, t]
                    seen = [s for s in seen if row[s] == 0]
                front = [] if prefix is None else [(prefix["K"][:, first], prefix["V"][:, first])]
                k = torch.cat([pair[0] for pair in front] + [keys[seen]])
                v = torch.cat([pair[1] for pair in front] + [values[seen]])
                scores = scaling * (k @ query[b, h, t])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, t, h] = scores.softmax(0) @ v
    return out, None


AttentionInterface.register("slow_reference", slow_attention)
AttentionMaskInterface.register("slow_reference", AttentionMaskInterface()["eager"])


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The last hidden states, zero at padded tokens: what a model computes there is nobody's business."""
    hidden = model(**batch).last_hidden_state
    return hidden * batch["attention_mask"][..., None] if "attention_mask" in batch else hidden


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_slot_equals_a_slow_attention(family: str, attention: str) -> None:
    model, backbone = build(family, attention)
    slow, _ = build(family, "slow_reference")
    batch = inputs(family, examples=2)
    lengths = [(4, 4), (0, 0), (2, 3), (0, 1)]
    architectures = [placed(backbone, *pair) for pair in lengths]
    with Attachment(model, backbone, architectures, seeds=[0, 1, 2, 3]) as attachment:
        packed = outputs(model, repeated(batch, 4)).unflatten(0, (4, 2))
        weight = torch.randn(packed.shape[1:], generator=torch.Generator().manual_seed(2))
        (packed * weight).sum().backward()
        for k in range(4):
            leaves = prefixes_of(attachment, k)
            for path, prefix in leaves.items():
                slow.get_submodule(path).slow_prefix = prefix
            alone = outputs(slow, batch)
            torch.testing.assert_close(packed[k], alone, rtol=1e-5, atol=1e-5)
            (alone * weight).sum().backward()
            for bank, slots in zip(attachment.banks, attachment._slots_of, strict=True):
                served = list(range(4)) if slots is None else slots.tolist()
                for name, value in bank.values.items():
                    if k in served:
                        reference = leaves[bank.site.attention_module][name].grad
                        own, rest = value.grad[served.index(k)].split([len(reference), value.shape[1] - len(reference)])
                        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
                        assert not rest.any()
            for path in leaves:
                del slow.get_submodule(path).slow_prefix


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_slot_without_a_prefix_is_untouched_and_detaching_restores_all(family: str, attention: str) -> None:
    model, backbone = build(family, attention)
    batch = inputs(family, examples=2)
    before, keys = outputs(model, batch).detach(), list(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    attachment = Attachment(model, backbone, [Architecture(), placed(backbone, 3, 5)], seeds=[0, 1])
    assert model.config._attn_implementation == f"autopeft_prefix_{attention}"
    bare, prefixed = outputs(model, repeated(batch, 2)).chunk(2)
    torch.testing.assert_close(bare, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    assert (prefixed - before).abs().max() > 1e-2
    assert list(model.state_dict()) == keys

    attachment.detach()
    assert model.config._attn_implementation == attention
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(outputs(model, batch), before)


def test_only_the_config_of_the_prefixed_attention_changes() -> None:
    text = transformers.BertConfig(**_TEXT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        FAMILIES["ViT"][1], text, projection_dim=8
    )
    model = transformers.VisionTextDualEncoderModel(config).eval()
    backbone = describe(model.text_model, id="text")
    vision = model.vision_model.config._attn_implementation
    with Attachment(model.text_model, backbone, [placed(backbone, 2)], seeds=[0]):
        assert model.text_model.config._attn_implementation == "autopeft_prefix_sdpa"
        assert model.vision_model.config._attn_implementation == vision
    assert model.text_model.config._attn_implementation == "sdpa"


def test_slots_that_share_a_bank_read_prefixes_of_it() -> None:
    model, backbone = build("Llama")
    batch = inputs("Llama", examples=2)
    site = backbone.site("layers.1.attn")
    specs = [Prefix(length=2, init="normal"), Prefix(length=5, init="normal")]
    shared = Bank(site, specs, model.get_submodule(site.module), seeds=[0, 0], bank_of_slot=[0, 0])
    (handle,) = install(model, [(shared, None)], 2)
    packed = outputs(model, repeated(batch, 2)).chunk(2)
    handle.remove()
    handle.remove()  # like torch's handles, a second time does nothing
    for k, spec in enumerate(specs):
        alone = Bank(site, [spec], model.get_submodule(site.module), seeds=["other"])
        alone.load_slot(0, shared.of_slot(k))
        (handle,) = install(model, [(alone, None)], 1)
        torch.testing.assert_close(packed[k], outputs(model, batch), rtol=0, atol=1e-5)
        handle.remove()


def test_two_prefixes_at_one_site_are_one_of_their_joint_length() -> None:
    model, backbone = build("Bert")
    batch = inputs("Bert", examples=2)
    two = Architecture.of({"layers.0.attn": [Prefix(length=2, init="normal"), Prefix(length=3, init="normal")]})
    with Attachment(model, backbone, [two], seeds=[0]) as attachment:
        expected = outputs(model, batch)
        halves = [bank.of_slot(0) for bank in attachment.banks]
    with Attachment(model, backbone, [placed(backbone, 5)], seeds=[0]) as attachment:
        attachment.banks[0].load_slot(0, {n: torch.cat([h[n] for h in halves]) for n in "KV"})
        torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=1e-5)


def test_generation_with_a_cache_equals_generation_without() -> None:
    model, backbone = build("Llama", task="LlamaForCausalLM")
    batch = repeated({"input_ids": torch.tensor([[5, 9, 7], [8, 3, 11]])}, 2)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with Attachment(model, backbone, [placed(backbone, 3, 2), Architecture()], seeds=[0, 1]):
        made = [
            model.generate(
                **batch,
                use_cache=cache,
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=None,
            )
            for cache in (True, False)
        ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    torch.testing.assert_close(torch.stack(made[0].logits), torch.stack(made[1].logits), rtol=0, atol=1e-5)


def test_half_precision_attention_reads_full_precision_prefixes() -> None:
    model, backbone = build("Llama")
    model.to(torch.bfloat16)
    with Attachment(model, backbone, [placed(backbone, 3, 2)], seeds=[0]) as attachment:
        hidden = outputs(model, inputs("Llama", examples=2))
        assert hidden.dtype == torch.bfloat16
        hidden.float().square().sum().backward()
        assert all(value.grad.isfinite().all() for bank in attachment.banks for value in bank.values.values())


# Hugging Face's peft


def peft_model(model: nn.Module, task: str, length: int) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=length)).eval()


def load_from_peft(attachment: Attachment, wrapped: Any, length: int) -> None:
    """peft keeps [L, layers x (key, value) x D_kv] in one embedding."""
    weight = wrapped.prompt_encoder["default"].embedding.weight.detach()
    by_layer = weight.reshape(length, LAYERS, 2, -1)
    for bank in attachment.banks:
        if bank.site.role == "attn":
            keys, values = by_layer[:, bank.site.layer].unbind(1)
            bank.load_slot(0, {"K": keys, "V": values})


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("Llama", "LlamaForCausalLM"),
        ("Qwen3", "Qwen3ForCausalLM"),
        ("Gemma", "GemmaForCausalLM"),
        ("GPT2", "GPT2LMHeadModel"),
        ("Bert", "BertForSequenceClassification"),
        ("Roberta", "RobertaForSequenceClassification"),
    ],
)
def test_equals_peft_when_the_positions_are_shifted_as_peft_does(family: str, task: str) -> None:
    length = 4
    batch = inputs(family, examples=3)
    batch["attention_mask"][1:] = 1  # padding on the left would shift positions by itself
    batch["input_ids"][1:] = batch["input_ids"][1:].clamp(min=3)
    positions = torch.arange(length, length + batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    if family == "Roberta":
        positions = (positions + 1) * batch["attention_mask"]  # it counts tokens from padding_idx + 1
    model, backbone = build(family, task=task)
    causal = "Classification" not in task
    wrapped = peft_model(build(family, task=task)[0], "CAUSAL_LM" if causal else "SEQ_CLS", length)
    with torch.no_grad():
        expected = wrapped(**batch).logits
        with Attachment(
            model, backbone, [placed(backbone, length, length)], seeds=[0], pretrained_head=True
        ) as attachment:
            load_from_peft(attachment, wrapped, length)
            ours = model(**batch, position_ids=positions).logits
    seen = batch["attention_mask"].bool() if causal else slice(None)
    torch.testing.assert_close(ours[seen], expected[seen], rtol=0, atol=1e-5)


# Costs


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_operations_equal_a_counter(family: str) -> None:
    model, backbone = build(family, "eager")
    batch = {"input_ids": torch.randint(3, VOCABULARY, (2, 6))}
    architecture = placed(backbone, 3, 5)

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        return counter.get_total_flops()

    bare = count()
    with Attachment(model, backbone, [architecture], seeds=[0]):
        assert count() - bare == 12 * architecture.flops_per_token(backbone)


def test_parameters_are_keys_and_values_of_every_key_head() -> None:
    _, backbone = build("Llama")
    architecture = placed(backbone, 3, 5)
    assert architecture.num_params(backbone) == (3 + 5) * 2 * 2 * 8
    model, backbone = build("GPT2")
    with Attachment(model, backbone, [placed(backbone, 3, 0)], seeds=[0]) as attachment:
        assert attachment.num_adapter_params() == 3 * 2 * WIDTH


def test_new_prefixes_have_the_deviation_of_their_init() -> None:
    site = build("Bert")[1].site("layers.0.attn")
    for init, deviation in (("small_normal", 0.02), ("normal", 1.0), ("zeros", 0.0)):
        values = Bank(site, [Prefix(length=200, init=init)], nn.Linear(1, 1), seeds=[0]).of_slot(0)
        assert math.isclose(values["K"].std(), deviation, rel_tol=0.05)
        assert init == "zeros" or not torch.equal(values["K"], values["V"])


def test_prefix_and_parallel_bottleneck_are_mam() -> None:
    model, backbone = build("Bert")
    mam = Architecture.of(
        {
            site.name: [Prefix(length=3) if site.role == "attn" else Bottleneck(form="parallel", scale=4.0)]
            for site in backbone.select(roles=["attn", "mlp"])
        }
    )
    with Attachment(model, backbone, [mam], seeds=[0]) as attachment:
        with_zero_bottleneck = outputs(model, inputs("Bert", examples=2))
        assert attachment.num_adapter_params() == mam.num_params(backbone)
    with Attachment(model, backbone, [placed(backbone, 3, 3, init="small_normal")], seeds=[0]):
        alone = outputs(model, inputs("Bert", examples=2))
    torch.testing.assert_close(with_zero_bottleneck, alone, rtol=0, atol=1e-6)


# Refusals


class HandMade(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def test_an_attention_of_its_own_is_refused_before_anything_changes() -> None:
    model, backbone = build("Bert")
    path = backbone.site("layers.1.attn").attention_module
    own = HandMade()
    own.query, own.config = model.get_submodule(path).query, model.config
    model.set_submodule(path, own)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1.*HandMade does not use transformers"):
        install(model, _banks(model, backbone), 1)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "autopeft_prefixes") for module in model.modules())


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_an_attention_without_masks_is_refused(attention: str) -> None:
    model, backbone = build("Llama")
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f"is '{attention}', not sdpa or eager"):
        install(model, _banks(model, backbone), 1)


def test_prefixes_are_not_attached_twice() -> None:
    model, backbone = build("Llama")
    with (
        Attachment(model, backbone, [placed(backbone, 2)], seeds=[0]),
        pytest.raises(ValueError, match="autopeft_prefix_sdpa"),
    ):
        install(model, _banks(model, backbone), 1)


def _banks(model: nn.Module, backbone: Backbone) -> list[tuple[Bank, None]]:
    sites = backbone.select(roles=["attn"])
    return [(Bank(s, [Prefix(length=2)], model.get_submodule(s.module), seeds=[0]), None) for s in sites]


@pytest.mark.parametrize("fields", [{"length": 0}, {"length": True}, {"init": "ones"}])
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Prefix(**fields)
