"""The sites found are where the tensors really flow, and models of other families are refused usefully."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

import pytest
import torch
import transformers
from ruamel.yaml import YAML
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site
from autopeft.search_space.backbones.introspection import UnknownBackboneError, describe

LAYERS, WIDTH, INNER, HEADS, VOCAB = 3, 32, 48, 4, 64

_ENCODER = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
_TEXT = _ENCODER | {"vocab_size": VOCAB, "pad_token_id": 0}
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
_BERT_ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
_LLAMA_ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    """Prefix of the classes in transformers."""
    config: Any
    tasks: tuple[str, ...]
    """Suffixes of those classes; the first is the bare model."""
    layers: str
    """The list of layers in the bare model."""
    attention: str
    """The module within a layer that computes attention."""
    linears: tuple[str, ...]
    norms: str
    """Where the norms sit: "pre" a sub-layer, "post" the residual sum, or "sandwich": around a sub-layer."""
    outer: tuple[str, ...]
    heads: tuple[str, ...] = ("score",)
    causal: bool = True


def _llama_like(
    name: str,
    config: Any,
    *,
    norms: str = "pre",
    tasks: tuple[str, ...] = ("Model", "ForCausalLM", "ForSequenceClassification"),
) -> Family:
    return Family(
        name=name,
        config=config,
        tasks=tasks,
        layers="layers",
        attention="self_attn",
        linears=_LLAMA_ROLES,
        norms=norms,
        outer=("embed", "norm.final", "backbone"),
    )


def _families() -> list[Family]:
    t = transformers
    encoder_tasks = ("Model", "ForSequenceClassification")
    encoder_outer = ("embed", "norm.embed", "backbone")
    return [
        Family(
            name="Bert",
            config=t.BertConfig(**_TEXT),
            tasks=(*encoder_tasks, "ForMaskedLM"),
            layers="encoder.layer",
            attention="attention.self",
            linears=_BERT_ROLES,
            norms="post",
            outer=encoder_outer,
            heads=("classifier",),
            causal=False,
        ),
        Family(
            name="Roberta",
            config=t.RobertaConfig(**_TEXT),
            tasks=(*encoder_tasks, "ForMaskedLM"),
            layers="encoder.layer",
            attention="attention.self",
            linears=_BERT_ROLES,
            norms="post",
            outer=encoder_outer,
            heads=("classifier",),
            causal=False,
        ),
        Family(
            name="DistilBert",
            tasks=(*encoder_tasks, "ForMaskedLM"),
            config=t.DistilBertConfig(
                vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INNER, pad_token_id=0
            ),
            layers="transformer.layer",
            attention="attention",
            linears=_BERT_ROLES,
            norms="post",
            outer=encoder_outer,
            heads=("pre_classifier", "classifier"),
            causal=False,
        ),
        Family(
            name="ViT",
            config=t.ViTConfig(**_ENCODER, image_size=8, patch_size=4),
            tasks=("Model", "ForImageClassification"),
            layers="layers",
            attention="attention",
            linears=_BERT_ROLES,
            norms="pre",
            outer=("norm.final", "backbone"),
            heads=("classifier",),
            causal=False,
        ),
        Family(
            name="GPT2",
            tasks=("Model", "LMHeadModel", "ForSequenceClassification"),
            config=t.GPT2Config(
                vocab_size=VOCAB,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                n_inner=INNER,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            ),
            layers="h",
            attention="attn",
            linears=("attn.qkv", "attn.o", "mlp.up", "mlp.down"),
            norms="pre",
            outer=("embed", "norm.final", "backbone"),
        ),
        _llama_like("Llama", t.LlamaConfig(**_DECODER)),
        _llama_like("Qwen2", t.Qwen2Config(**_DECODER | {"head_dim": WIDTH // HEADS})),
        _llama_like("Qwen3", t.Qwen3Config(**_DECODER | {"head_dim": WIDTH})),  # its q_norm is WIDTH wide
        _llama_like("Mistral", t.MistralConfig(**_DECODER)),
        _llama_like("Gemma", t.GemmaConfig(**_DECODER)),
        _llama_like("Gemma2", t.Gemma2Config(**_DECODER), norms="sandwich"),
        _llama_like(
            "Gemma3",
            t.Gemma3TextConfig(**_DECODER),
            norms="sandwich",
            tasks=("TextModel", "ForCausalLM", "TextForSequenceClassification"),
        ),
    ]


FAMILIES = _families()
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
every_model = pytest.mark.parametrize(
    ("family", "task"),
    [(family, task) for family in FAMILIES for task in family.tasks],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


def _build(family: Family, task: str) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(transformers, family.name + task)(copy.deepcopy(family.config)).eval()
    for parameter in model.parameters():
        # Biases and norms start at constants, which would hide a tensor taken at the wrong place.
        nn.init.normal_(parameter, std=0.3)
    return model


def _run(model: Any) -> None:
    tokens = torch.arange(1, 11).reshape(2, 5)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(pixels) if model.main_input_name == "pixel_values" else model(tokens)


def _base_path(model: Any) -> str:
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


class Trace:
    """Runs a model and keeps the first input and output of each module, by path."""

    def __init__(self, model: Any, paths: set[str]) -> None:
        self.x: dict[str, torch.Tensor] = {}
        self.y: dict[str, torch.Tensor] = {}
        hooks = [model.get_submodule(path).register_forward_hook(self._keep(path)) for path in paths]
        _run(model)
        for hook in hooks:
            hook.remove()

    def _keep(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.x[path] = inputs[0]
            self.y[path] = output[0] if isinstance(output, tuple) else output

        return hook


@every_model
def test_every_site_of_every_family_is_found(family: Family, task: str) -> None:
    model = _build(family, task)
    backbone = describe(model, id="tiny", revision="main")

    per_layer = 4 if family.norms == "sandwich" else 2
    inside = (*family.linears, "attn", "mlp", *(f"norm.{j}" for j in range(per_layer)))
    expected = {*family.outer, *(f"layers.{i}.{part}" for i in range(LAYERS) for part in inside)}
    assert Counter(site.name for site in backbone.sites) == Counter(expected)
    assert (backbone.id, backbone.revision, backbone.family) == ("tiny", "main", model.config.model_type)
    assert (backbone.hidden_size, backbone.num_layers, backbone.causal) == (WIDTH, LAYERS, family.causal)

    head = family.heads if task.endswith("Classification") else ()
    head_params = sum(p.numel() for name in head for p in getattr(model, name).parameters())
    assert backbone.head_modules == head
    assert backbone.num_head_params == head_params
    assert backbone.num_params == sum(p.numel() for p in model.parameters()) - head_params


@every_model
def test_sites_have_the_shapes_of_their_weights(family: Family, task: str) -> None:
    model = _build(family, task)
    for site in describe(model, id="tiny").sites:
        assert (site.role in ("attn", "mlp")) == (site.input_module != site.module)
        if site.role == "backbone":
            continue
        module = model.get_submodule(site.module)
        assert site.bias == ("bias" in dict(module.named_parameters()))
        shape = tuple(module.weight.shape)
        if site.role in LINEAR_ROLES:
            stored_transposed = type(module).__name__ == "Conv1D"
            assert shape == (
                (site.in_features, site.out_features) if stored_transposed else (site.out_features, site.in_features)
            )
        elif site.role == "embed":
            assert shape == (site.in_features, site.out_features) == (VOCAB, WIDTH)
        else:
            assert site.in_features == site.out_features == WIDTH


@every_model
def test_a_sub_layer_reads_its_input_and_writes_the_residual_stream(family: Family, task: str) -> None:
    model = _build(family, task)
    backbone = describe(model, id="tiny")
    paths = {path for site in backbone.sites for path in (site.module, site.input_module) if path}
    stack = _base_path(model) + family.layers
    trace = Trace(model, paths | {f"{stack}.{i}" for i in range(LAYERS)})

    for site in backbone.sites:
        if site.role not in ("embed", "backbone"):
            assert trace.x[site.input_module].shape[-1] == site.in_features
            assert trace.y[site.module].shape[-1] == site.out_features
    for i in range(LAYERS):
        before, after = trace.x[f"{stack}.{i}"], trace.y[f"{stack}.{i}"]
        attn, mlp = backbone.site(f"layers.{i}.attn"), backbone.site(f"layers.{i}.mlp")
        norm = [site.module for site in backbone.select(roles=["norm"], layers=[i])]
        attn_x, attn_y = trace.x[attn.input_module], trace.y[attn.module]
        mlp_x, mlp_y = trace.x[mlp.input_module], trace.y[mlp.module]
        if family.norms == "post":
            torch.testing.assert_close(attn_x, before)
            torch.testing.assert_close(trace.x[norm[0]], before + attn_y)
            torch.testing.assert_close(mlp_x, trace.y[norm[0]])
            torch.testing.assert_close(trace.x[norm[1]], mlp_x + mlp_y)
            torch.testing.assert_close(after, trace.y[norm[1]])
        elif family.norms == "pre":
            torch.testing.assert_close(attn_x, trace.y[norm[0]])
            torch.testing.assert_close(mlp_x, trace.y[norm[1]])
            torch.testing.assert_close(trace.x[norm[1]], before + attn_y)
            torch.testing.assert_close(after, before + attn_y + mlp_y)
        else:
            torch.testing.assert_close(attn_x, trace.y[norm[0]])
            torch.testing.assert_close(trace.x[norm[1]], attn_y)
            torch.testing.assert_close(mlp_x, trace.y[norm[2]])
            torch.testing.assert_close(trace.x[norm[3]], mlp_y)
            torch.testing.assert_close(after, before + trace.y[norm[1]] + trace.y[norm[3]])


@every_family
def test_the_attention_module_is_the_one_transformers_passes_to_its_attention_function(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _build(family, family.tasks[0])
    sites = describe(model, id="tiny").select(roles=["attn"])
    called: list[tuple[nn.Module, int, int]] = []

    def recording(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> Any:
        called.append((module, key.shape[1], key.shape[3]))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recording", recording)
    model.set_attn_implementation("recording")
    _run(model)
    assert [site.attention_module for site in sites] == [
        f"{family.layers}.{i}.{family.attention}" for i in range(LAYERS)
    ]
    assert called == [
        (model.get_submodule(site.attention_module), site.num_key_value_heads, site.head_dim) for site in sites
    ]


def test_a_bert_that_is_a_decoder_is_causal() -> None:
    model = transformers.BertModel(transformers.BertConfig(**_TEXT, is_decoder=True))
    assert describe(model, id="tiny").causal


def test_the_language_half_of_a_vision_language_model_is_described() -> None:
    with torch.device("meta"):
        # As wide as the text: widths cannot tell the two halves apart.
        vision = _ENCODER | {"image_size": 8, "patch_size": 4}
        model = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=_DECODER, vision_config=vision, mm_tokens_per_image=4)
        )
    backbone = describe(model, id="tiny")
    assert all(site.module.startswith("model.language_model.") for site in backbone.sites[:-1])
    assert backbone.site("layers.0.attn").num_key_value_heads == 2
    assert "norm.embed" not in {site.name for site in backbone.sites}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_experts_in_stacked_weights_are_no_sites(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**{**_DECODER, "head_dim": 8})
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    backbone = describe(model, id="tiny")
    assert backbone.roles == ("attn.q", "attn.k", "attn.v", "attn.o", "attn", "norm", "embed", "backbone")
    assert "as with experts in stacked weights: use attn.*" in backbone.absence(["mlp.up"])


def test_a_dense_layer_among_layers_of_experts_keeps_its_mlp() -> None:
    config = transformers.Qwen3MoeConfig(**{**_DECODER, "head_dim": 8, "mlp_only_layers": [1]})
    with torch.device("meta"):
        backbone = describe(transformers.Qwen3MoeForCausalLM(config), id="tiny")
    assert [site.layer for site in backbone.sites if site.role == "mlp.down"] == [1]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Mamba", {}, "no list of layers has an attention output projection"),
        ("FalconH1", {}, r"model.layers.0.mamba.in_proj has no known role"),
        ("RecurrentGemma", {}, "no list of layers has an attention output projection"),
    ],
)
def test_models_of_which_layers_have_no_attention_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    config = getattr(transformers, f"{name}Config")(**_DECODER, **settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(UnknownBackboneError, match=words):
        describe(model, id="tiny")


def test_older_attention_without_a_flag_is_causal_by_its_mask() -> None:
    t = transformers
    shape = {"vocab_size": VOCAB, "pad_token_id": 0}
    with torch.device("meta"):
        bloom = t.BloomModel(t.BloomConfig(**shape, hidden_size=WIDTH, n_layer=2, n_head=HEADS))
        encoder, decoder = (t.RoFormerModel(t.RoFormerConfig(**_TEXT, is_decoder=flag)) for flag in (False, True))
        deberta = t.DebertaV2Model(t.DebertaV2Config(**_TEXT))
    assert [describe(model, id="x").causal for model in (bloom, encoder, decoder, deberta)] == [
        True,
        False,
        True,
        False,
    ]
    assert not any(site.attention_interface for site in describe(bloom, id="x").select(roles=["attn"]))


def test_a_quantised_linear_is_measured_by_its_attributes() -> None:
    model = _build(FAMILIES[0], "Model")
    expected = describe(model, id="tiny")
    for site in expected.select(roles=["attn.q"]):
        linear = model.get_submodule(site.module)
        linear.weight = nn.Parameter(linear.weight.reshape(-1, 1))
    assert describe(model, id="tiny") == expected


class ToyAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.out = (nn.Linear(width, width) for _ in range(4))


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = ToyAttention(width)
        self.grow, self.shrink = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)


class Toy(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(2))
        self.last_norm = nn.LayerNorm(width)
        self.topics = nn.Linear(width, 3)


TOY_MODULES = {
    "layers": "blocks",
    "attn.q": "attention.wq",
    "attn.k": "attention.wk",
    "attn.v": "attention.wv",
    "attn.o": "attention.out",
    "mlp.up": "grow",
    "mlp.down": "shrink",
    "embed": "words",
    "head": "topics",
}


def test_an_unknown_model_is_refused_with_what_was_seen_and_the_way_by_hand() -> None:
    with pytest.raises(UnknownBackboneError) as caught:
        describe(Toy(), id="toy")
    message = str(caught.value)
    assert "blocks (2 layers): attention.wq 8->8" in message
    assert "shrink 24->8" in message
    named = YAML(typ="safe").load(dedent(message[message.index("    model:") :]))["model"]["modules"]
    assert named.pop("layers") == "blocks"
    assert {*named} < {*LINEAR_ROLES}, "a part of a study file"


def test_a_model_named_by_hand_has_the_same_kind_of_sites() -> None:
    backbone = describe(Toy(), id="toy", modules=TOY_MODULES)
    assert [site.name for site in backbone.select(layers=[1])] == [
        f"layers.1.{part}"
        for part in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "attn", "mlp", "norm.0")
    ]
    assert {"embed", "norm.final", "backbone"} <= {site.name for site in backbone.sites}
    attn, mlp = backbone.site("layers.0.attn"), backbone.site("layers.0.mlp")
    assert (attn.input_module, attn.module) == ("blocks.0.attention.wq", "blocks.0.attention.out")
    assert attn.attention_module == "blocks.0.attention"
    assert (mlp.input_module, mlp.module) == ("blocks.0.grow", "blocks.0.shrink")
    assert (backbone.family, backbone.hidden_size, backbone.head_modules) == ("Toy", 8, ("topics",))
    assert backbone.num_head_params == 27


def test_only_the_roles_named_by_hand_have_sites() -> None:
    backbone = describe(Toy(), id="toy", modules={"layers": "blocks", "attn.v": "attention.wv"})
    assert backbone.roles == ("attn.v", "norm", "backbone")


def test_all_bad_paths_named_by_hand_are_listed_with_suggestions() -> None:
    wrong = TOY_MODULES | {"attn.q": "attn.wq", "mlp.down": "shrnk", "embed": "word", "attn.w": "x"}
    with pytest.raises(UnknownBackboneError) as caught:
        describe(Toy(), id="toy", modules=wrong)
    message = str(caught.value)
    assert "'attn.q': no linear layer 'attn.wq' in 2 of 2 layers" in message
    assert "did you mean 'attention.wq'?" in message
    assert "'mlp.down': no linear layer 'shrnk'" in message
    assert "did you mean 'shrink'?" in message
    assert "'embed': no embedding 'word'; did you mean 'words'?" in message
    assert "'attn.w' is not one of" in message
    with pytest.raises(UnknownBackboneError, match=r"no list of layers 'block'; did you mean 'blocks'\?"):
        describe(Toy(), id="toy", modules=TOY_MODULES | {"layers": "block"})
    with pytest.raises(UnknownBackboneError, match="'layers' is missing"):
        describe(Toy(), id="toy", modules={"attn.q": "attention.wq"})


def test_a_layer_that_does_not_fit_is_refused() -> None:
    llama = next(family for family in FAMILIES if family.name == "Llama")
    model = _build(llama, "Model")
    model.layers[1].self_attn.q_proj = nn.Identity()
    with pytest.raises(UnknownBackboneError, match=r"layers\.1 has no linear layer for attn\.q"):
        describe(model, id="tiny")
    model = _build(llama, "Model")
    model.layers[2].mlp.router = nn.Linear(WIDTH, 2)
    with pytest.raises(UnknownBackboneError, match=r"layers\.2\.mlp\.router has no known role"):
        describe(model, id="tiny")
    model = _build(llama, "Model")
    model.layers[0].self_attn.o_proj = nn.Linear(64, WIDTH + 1)
    with pytest.raises(UnknownBackboneError, match=r"33 at layers\.0\.self_attn\.o_proj"):
        describe(model, id="tiny")


def test_two_stacks_are_ambiguous_until_one_is_named() -> None:
    llama = next(family for family in FAMILIES if family.name == "Llama")
    both = nn.ModuleDict({"left": _build(llama, "Model"), "right": _build(llama, "Model")})
    with pytest.raises(UnknownBackboneError, match=r"several lists .* left\.layers, right\.layers"):
        describe(both, id="pair")
    right = describe(both, id="pair", modules={"layers": "right.layers", "embed": "right.embed_tokens"})
    assert all(site.module.startswith("right.") for site in right.sites if site.role != "backbone")


@pytest.fixture(scope="module")
def bert() -> Backbone:
    return describe(_build(FAMILIES[0], "ForSequenceClassification"), id="tiny")


def test_a_backbone_survives_json(bert: Backbone) -> None:
    data = bert.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert Backbone.from_dict(data) == bert


def test_select_and_site(bert: Backbone) -> None:
    assert [site.name for site in bert.select(roles=["attn.q", "mlp"], layers=[0, 2])] == [
        "layers.0.attn.q",
        "layers.0.mlp",
        "layers.2.attn.q",
        "layers.2.mlp",
    ]
    assert bert.select() == bert.sites
    assert [site.name for site in bert.select(roles=["norm"])][:2] == ["norm.embed", "layers.0.norm.0"]
    with pytest.raises(ValueError, match=r"has no layers \[3\]"):
        bert.select(layers=[0, 3])
    with pytest.raises(ValueError, match=r"did you mean 'layers\.0\.attn\.q'\?"):
        bert.site("layer.0.attn.q")


def test_require_names_every_unknown_and_absent_role(bert: Backbone) -> None:
    bert.require(bert.roles)
    with pytest.raises(ValueError, match="unknown role") as caught:
        bert.require(["attn.q", "atn.q", "mlp.gate", "attn.qkv"])
    message = str(caught.value)
    assert "unknown role 'atn.q'; did you mean 'attn.q'?" in message
    assert "no site has role 'mlp.gate' (its mlp is not gated: use mlp.up)" in message
    assert "use attn.q, attn.k, attn.v" in message
    gpt2 = next(family for family in FAMILIES if family.name == "GPT2")
    with pytest.raises(ValueError, match=r"its query, key and value are one linear: use attn\.qkv"):
        describe(_build(gpt2, "Model"), id="tiny").require(["attn.q"])


def test_a_site_refuses_a_role_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'attn\.q'\?"):
        Site(
            name="layers.0.attn.query",
            layer=0,
            role="attn.query",
            module="q",
            input_module="q",
            in_features=1,
            out_features=1,
            bias=False,
        )


def test_describing_needs_no_torch() -> None:
    code = (
        "import sys, autopeft.search_space.backbones.introspection\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
