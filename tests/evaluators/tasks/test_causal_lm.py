"""Language models: which tokens count, how long rows are cut, and that an adapter learns from them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone, describe_backbone, load_backbone, load_processor
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.tasks import output_layer
from autopeft.evaluators.tasks.base import IGNORED, Batch, Scored, Task
from autopeft.evaluators.tasks.causal_lm import CausalLM
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Full, Lora, Prefix
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.spaces.presets import everywhere, linears
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import problem_for
from autopeft.studies.examples import tiny_llama

from ...support.tiny_models import byte_tokenizer, save, seeded

torch.set_num_threads(1)

LETTERS = "abcdefgh"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows(split: str, count: int) -> list[dict[str, str]]:
    """Words of letters, to be written backwards."""
    rng = Random(split)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 5))) for _ in range(count)]
    return [{"prompt": f"{word} backwards is", "completion": f" {word[::-1]}."} for word in words]


TRAIN = rows("train", 160)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer([row["prompt"] + row["completion"] for row in TRAIN], size=280)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBackbone:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    # Large weights, so that the frozen output layer can say something.
    size = {"vocab_size": 280, "intermediate_size": 48, "max_position_embeddings": 64}
    config = LlamaConfig(**shape, **size, initializer_range=0.3)
    tokenizer = byte_tokenizer([row["prompt"] + row["completion"] for row in TRAIN], size=280)
    folder = save(seeded(LlamaForCausalLM, config), tmp_path_factory.mktemp("llama"), tokenizer)
    return load_backbone(folder, task="causal-lm")


def task(tokenizer: PreTrainedTokenizerBase, max_length: int = 64) -> CausalLM:
    return CausalLM(tokenizer, max_length, None)


def encoded(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], max_length: int = 64) -> dict[str, list[int]]:
    (example,) = task(tokenizer, max_length).encode([row])
    assert len(example["input_ids"]) == len(example["labels"]) <= max_length
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token)
    return dict(example)


def predicted(example: dict[str, list[int]]) -> list[int]:
    return [label for label in example["labels"] if label != IGNORED]


# Which tokens count


def test_the_completion_counts_and_the_end_of_text(tokenizer):
    example = encoded(tokenizer, {"prompt": "abc backwards is", "completion": " cba."})
    prompt = tokenizer("abc backwards is")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert tokenizer.decode(predicted(example)) == " cba.</s>"


def test_of_a_text_everything_counts(tokenizer):
    example = encoded(tokenizer, {"text": "abc is"})
    assert example["input_ids"] == example["labels"]
    assert tokenizer.decode(example["input_ids"]) == "<s>abc is</s>"


def test_special_tokens_stand_at_the_ends_only(tokenizer):
    """A tokenizer that ends every text, as classifiers want it, ends neither prompts nor the row twice."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    for row in ({"prompt": "abc is", "completion": " cba"}, {"text": "abc is cba"}):
        assert tokenizer.decode(encoded(tokenizer, row)["input_ids"]) == "<s>abc is cba</s>"


def test_the_seam(tokenizer):
    """Tokens are those of the whole text, but none of them reaches from the prompt into the completion."""
    assert tokenizer.tokenize("is") == ["is"]
    example = encoded(tokenizer, {"prompt": "abc i", "completion": "s"})
    assert tokenizer.decode(predicted(example)) == "s</s>"
    assert tokenizer.decode(example["input_ids"]) == "<s>abc is</s>"
    # Such tokenizers put a space before whatever they see: before a completion that has none, it would be wrong.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    example = encoded(tokenizer, {"prompt": "abc", "completion": ".d"})
    assert tokenizer.decode(predicted(example)) == ".d</s>"


# Long rows


def test_long_prompts_lose_their_beginning(tokenizer):
    prompt, completion = "ab" * 50 + " backwards is", " ba."
    example = encoded(tokenizer, {"prompt": prompt, "completion": completion}, max_length=12)
    whole = encoded(tokenizer, {"prompt": prompt, "completion": completion}, max_length=1000)
    assert len(whole["input_ids"]) > 50
    assert example["input_ids"] == whole["input_ids"][-12:]
    assert predicted(example) == predicted(whole)


def test_long_completions_lose_their_end(tokenizer):
    example = encoded(tokenizer, {"prompt": "ab is", "completion": " " + "xy" * 50}, max_length=9)
    assert len(predicted(example)) == 9
    assert tokenizer.eos_token_id not in example["input_ids"]
    long_text = encoded(tokenizer, {"text": "xy" * 50}, max_length=9)
    assert long_text["input_ids"] == tokenizer("xy" * 50)["input_ids"][:9]


def test_rows_in_which_nothing_is_left(tokenizer):
    with pytest.raises(DataError, match="1 is too short: no token is left to predict"):
        encoded(tokenizer, {"prompt": "a", "completion": "b"}, max_length=1)


# Chats


def test_messages(tokenizer):
    tokenizer.chat_template = CHATML
    chat = [{"role": role, "content": text} for role, text in (("user", "abc"), ("assistant", "cba"))]
    example = encoded(tokenizer, {"messages": [*chat, *chat]})
    assert tokenizer.decode(predicted(example)) == "cba</s>"
    text = "<|user|>abc</s><|assistant|>cba</s>"
    assert tokenizer.decode(example["input_ids"]) == text * 2, "the template has all special tokens"


def test_chat_templates_that_cannot_be_used(tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="need a chat template"):
        encoded(tokenizer, row)
    tokenizer.chat_template = "{{ messages|length }}: {{ messages[-1].content }}"
    with pytest.raises(DataError, match="chat template changes the text before the last message"):
        encoded(tokenizer, row)


# Scores


def scores(loaded: LoadedBackbone, examples: list[Any]) -> tuple[list[float], list[float]]:
    own = task(loaded.processor)
    batch = own.collate(examples)
    targets = batch.pop("targets")
    with torch.no_grad():
        columns = own.score(loaded.model(**batch).logits, targets)
    return columns["loss"].tolist(), columns["accuracy"].tolist()


def test_scores_are_those_of_transformers(loaded):
    for row in (TRAIN[0], TRAIN[1], {"text": "abc is cba"}):
        example = encoded(loaded.processor, row)
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        with torch.no_grad():
            out = loaded.model(input_ids=ids, labels=labels)
        (loss,), (accuracy,) = scores(loaded, [example])
        assert loss == pytest.approx(float(out.loss), rel=1e-5)
        right = [out.logits[0, i - 1].argmax() == label for i, label in enumerate(example["labels"])
                 if i and label != IGNORED]  # fmt: skip
        assert accuracy == pytest.approx(sum(map(float, right)) / len(right))


def test_padding_changes_nothing(loaded):
    examples = [encoded(loaded.processor, row) for row in [*TRAIN[:5], {"text": "a"}, {"text": "abc " * 12}]]
    together = scores(loaded, examples)
    alone = [scores(loaded, [example]) for example in examples]
    torch.testing.assert_close(together[0], [loss for (loss,), _ in alone], rtol=1e-5, atol=1e-5)
    assert together[1] == pytest.approx([accuracy for _, (accuracy,) in alone])


def test_loss_and_gradient_by_their_definition(loaded):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator).requires_grad_()
    targets = torch.randint(0, 11, (3, 6), generator=generator)
    targets[0, :4], targets[1], targets[2, 5] = IGNORED, IGNORED, IGNORED
    columns = task(loaded.processor).score(logits, targets)
    losses, accuracies = columns["loss"], columns["accuracy"]
    (gradient,) = torch.autograd.grad(losses.sum(), logits)

    expected = []
    for row in range(3):
        own = [cross_entropy(logits[row, t - 1], targets[row, t]) for t in range(1, 6) if targets[row, t] != IGNORED]
        expected.append(sum(own) / len(own) if own else torch.zeros(()))
    torch.testing.assert_close(losses, torch.stack(expected))
    torch.testing.assert_close(gradient, torch.autograd.grad(torch.stack(expected).sum(), logits)[0])
    assert losses[1] == 0
    assert accuracies[1] == 0

    perfect = torch.full((1, 3, 5), -9.0)
    perfect[0, 0, 4] = perfect[0, 1, 2] = 9.0
    assert task(loaded.processor).score(perfect, torch.tensor([[0, 4, 3]]))["accuracy"].tolist() == [0.5]
    low = task(loaded.processor).score(logits.bfloat16(), targets)["loss"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, losses, rtol=0.05, atol=0.05)


# Scores without logits of all tokens


def from_logits(own: CausalLM, model: nn.Module, batch: Batch) -> Scored:
    return Task.scores(own, model, batch)


def without_logits(own: CausalLM, model: nn.Module, batch: Batch) -> Scored:
    """`scores`, of a model that nothing is known of yet, and that is not allowed to make logits."""
    output_layer._plain.pop(model, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", only_probed(type(model).forward))
        return own.scores(model, batch)


def only_probed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self, input_ids, **kwargs):
        assert input_ids.shape == (1, 2), "the model makes its logits"
        return forward(self, input_ids=input_ids, **kwargs)

    return checked


@pytest.mark.parametrize("slots", [1, 2])
def test_a_pack_is_scored_without_its_logits(loaded, slots):
    own = task(loaded.processor)
    examples = own.encode([*TRAIN[:5], {"text": "abc is cba"}])
    # Examples of a slot lie next to each other; the second has its own, and both draw dropout.
    batch = own.collate([*examples, *reversed(examples)][: slots * len(examples)])
    batch["targets"][0] = IGNORED
    backbone = loaded.backbone
    loras = [everywhere(backbone, Lora(rank=r, dropout=0.1 * r), linears(backbone)) for r in (4, 2)]
    prefixes = everywhere(backbone, Prefix(length=3), ("attn",))
    pack = [loras[0], Architecture.of(dict((*loras[1].adapters, *prefixes.adapters)))][:slots]

    def outcome(scores: Callable[..., Scored]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with Attachment(loaded.model, backbone, pack, range(slots)) as attachment:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter, _ in attachment.trainable():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            columns = scores(own, loaded.model, batch)
            losses, correct = columns["loss"], columns["accuracy"]
            weights = torch.linspace(1.0, 2.0, len(losses))
            gradients = torch.autograd.grad((losses * weights).sum(), [p for p, _ in attachment.trainable()])
            attachment.eval()
            with torch.no_grad():
                evaluated = scores(own, loaded.model, batch)["loss"]
        return losses, correct, evaluated, torch.cat([gradient.flatten() for gradient in gradients])

    ours, expected = outcome(without_logits), outcome(from_logits)
    assert ours[0][0] == 0
    assert ours[0][1:].min() > 0
    assert not torch.equal(ours[0], ours[2])
    for own_part, part in zip(ours, expected, strict=True):
        assert (own_part - part).norm() <= 1e-6 * part.norm()


SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)


@pytest.mark.parametrize(
    ("make", "config", "plain"),
    [
        (LlamaForCausalLM, LlamaConfig(**SHAPE, **SIZE), True),
        (GPT2LMHeadModel, GPT2, True),
        (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **SIZE, final_logit_softcapping=None), True),
        (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **SIZE, final_logit_softcapping=3.0), False),
        (GraniteForCausalLM, GraniteConfig(**SHAPE, **SIZE, logits_scaling=4.0), False),
        (CohereForCausalLM, CohereConfig(**SHAPE, **SIZE, eos_token_id=1), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_do_something_to_their_logits_are_asked_for_them(make, config, plain, dtype):
    model = seeded(make, config).requires_grad_(False).to(dtype)
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": ids}
    own = CausalLM(None, 32, None)
    found, expected = own.scores(model, batch), from_logits(own, model, batch)
    assert output_layer._plain[model] == plain
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if plain:
        torch.testing.assert_close(without_logits(own, model, batch), found, rtol=0, atol=0)


def test_an_output_layer_that_is_trained_or_adapted_gives_its_own_logits(loaded):
    own = task(loaded.processor)
    batch = own.collate(own.encode(TRAIN[:3]))
    with Attachment(loaded.model, loaded.backbone, [Architecture.of({"backbone": [Full()]})], [0]) as attachment:
        attachment.eval()
        own.scores(loaded.model, batch)["loss"].sum().backward()
        assert loaded.model.lm_head.weight.grad.abs().max() > 0
    with Attachment(loaded.model, loaded.backbone, [Architecture()], [0]), torch.no_grad():
        plain = own.scores(loaded.model, batch)["loss"]
        handle = loaded.model.lm_head.register_forward_hook(lambda layer, args, output: 2 * output)
        try:
            found, expected = own.scores(loaded.model, batch)["loss"], from_logits(own, loaded.model, batch)["loss"]
        finally:
            handle.remove()
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().min() > 0.01


# Training


def test_lora_learns(loaded):
    splits = Splits(TRAIN, rows("validation", 40), rows("test", 10), None)
    evaluator = TrainEvaluator(loaded, "causal-lm", splits, max_length=32)
    lora = everywhere(loaded.backbone, Lora(rank=8), linears(loaded.backbone))
    candidate = Candidate(architecture=lora, training={"learning_rate": 1e-2, "batch_size": 16, "epochs": 6.0})
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    found = [evaluator.evaluate([Request(candidate=candidate, seed=seed)])[0].measurement for seed in (0, 0, 1)]
    first, again, other = found
    assert first.losses == again.losses != other.losses
    assert first.values == again.values
    assert first.values["loss"] < 0.5 * first.losses[0]
    assert first.values["accuracy"] > 0.2  # by chance: 0.004
    torch.testing.assert_close(loaded.model.state_dict(), before, rtol=0, atol=0)


# The example


def test_the_example_is_a_study(tmp_path):
    tiny_llama.write(tmp_path, num_steps=2)
    study = load_study(tmp_path)
    assert study.task == "causal-lm"
    assert study.model_id == str(tmp_path / "model")
    splits = load_splits(study.data_settings(), study.task)
    assert splits.warnings == ()
    assert len(splits.train) > 400
    described = describe_backbone(study.model_id, task=study.task)
    assert problem_for(study, described).space.cardinality == 625
    # No row is cut, and every letter is a token.
    words = load_processor(study.model_id, study.task)
    assert words.convert_ids_to_tokens(words(" a z")["input_ids"]) == ["<s>", "\u0120a", "\u0120z"]
    own = CausalLM(words, study.data.max_length, None)
    assert all(len(predicted(example)) == tiny_llama.CONTINUED + 1 for example in own.encode(splits.train))
    with pytest.raises(FileExistsError):
        tiny_llama.write(tmp_path, num_steps=2)


@pytest.mark.slow
def test_adapters_have_something_to_adapt_in_the_example(tmp_path):
    tiny_llama.write(tmp_path)
    study = load_study(tmp_path)
    loaded = load_backbone(study.model_id, task=study.task)
    splits = load_splits(study.data_settings(), study.task)
    evaluator = TrainEvaluator(loaded, study.task, splits, study.data.max_length)
    found = {}
    for name, rank in (("small", 1), ("large", 8)):
        lora = everywhere(loaded.backbone, Lora(rank=rank), ("attn.q", "attn.v", "mlp.up", "mlp.down"))
        training = {"learning_rate": 1e-2, "batch_size": 32, "epochs": 15.0}
        (outcome,) = evaluator.evaluate([Request(candidate=Candidate(architecture=lora, training=training))])
        found[name] = outcome.measurement.values["accuracy"]
    assert 0.2 < found["small"] < found["large"]


def test_long_examples_are_cut_where_the_loss_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    task = CausalLM(tokenizer, 64, None)
    (example,) = task.encode([{"prompt": "one two three four", "completion": " five six"}])
    short = task.shortened(example, 3)
    assert short["input_ids"] == example["input_ids"][-3:]
    assert short["labels"] == example["labels"][-3:]
    assert task.shortened(example, 100) == example
    assert task.collate([short])["targets"].shape == (1, 3)
