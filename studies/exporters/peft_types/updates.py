"""Types of HF peft that add to the output of a linear layer, or train its weight or bias."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.c3a import C3a
from autopeft.search_space.adapters.delora import Delora
from autopeft.search_space.adapters.gralora import Gralora
from autopeft.search_space.adapters.hira import Hira
from autopeft.search_space.adapters.loha import Loha
from autopeft.search_space.adapters.lokr import Lokr
from autopeft.search_space.adapters.lora import FROM_SITE, Lora
from autopeft.search_space.adapters.miss import Miss
from autopeft.search_space.adapters.randlora import Randlora
from autopeft.search_space.adapters.shira import RANDOM, Shira
from autopeft.search_space.adapters.vblora import Vblora
from autopeft.search_space.adapters.vera import Vera
from autopeft.search_space.backbones.linear import weight_of
from autopeft.studies.exporters.peft_types.base import (
    ADAPTER,
    NO_QUANTISED,
    NO_TRANSPOSED,
    Arguments,
    PeftType,
    Placed,
    common_values,
    lost_values,
    most_common,
    one_for_all,
    patterns,
    whole,
)

if TYPE_CHECKING:
    from torch import Tensor

_DRAWN_INITS = {"kaiming": True, "gaussian": "gaussian"}
_LORA_INITS = _DRAWN_INITS | {name: name for name in ("pissa", "pissa_niter_4", "olora")}


def _lora(placed: Placed) -> Arguments:
    loras = [(site, spec) for site, spec in placed if isinstance(spec, Lora)]
    root = all(spec.scaling == "rslora" for _, spec in loras)
    ranks = {site.module: spec.rank for site, spec in loras}
    # One flag decides how alpha becomes a scale; where the rules are mixed, alpha is converted to keep each scale.
    alphas = {
        site.module: whole(spec.alpha if root or spec.scaling == "alpha" else spec.alpha * sqrt(spec.rank))
        for site, spec in loras
    }
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    common = common_values(placed, "dropout", "init")
    init, lost = common["init"], lost_values(placed, common)
    if init not in _LORA_INITS:
        reason = f"peft needs a pass over rows for init {init!r}" if init in FROM_SITE else f"peft has no init {init!r}"
        lost += [f"{site.name} {spec.kind}: {reason} (affects only training)" for site, spec in loras]
    arguments = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": common["dropout"],
        "init_lora_weights": _LORA_INITS.get(init, True),
        "bias": "none",
        "use_rslora": root,
        "use_dora": loras[0][1].kind == "dora",
    }
    return arguments, lost


def _fill_lora(module: Any, values: Mapping[str, Tensor], spec: Any) -> None:
    module.lora_A[ADAPTER].weight.copy_(values["A"])
    module.lora_B[ADAPTER].weight.copy_(values["B"])
    scale = module.scaling[ADAPTER]
    assert abs(scale - spec.scale) <= 1e-6 * abs(spec.scale), (scale, spec)


def _fill_dora(module: Any, values: Mapping[str, Tensor], spec: Any) -> None:
    # peft divides the magnitudes by the norms of the rows, and rows of zeros would become nan.
    values = spec.without_zero_rows(values, weight_of(module.base_layer))
    module.lora_magnitude_vector[ADAPTER].weight.copy_(values["m"])
    _fill_lora(module, values, spec)


def _hira(placed: Placed) -> Arguments:
    hiras = [spec for _, spec in placed if isinstance(spec, Hira)]
    # peft 0.21 ignores rank_pattern here. A smaller rank is the largest rank with zeros in the additional rows.
    rank = max(spec.rank for spec in hiras)
    common = common_values(placed, "dropout", "init")
    arguments = {"r": rank, "hira_dropout": common["dropout"], "init_weights": _DRAWN_INITS[common["init"]]}
    return arguments, lost_values(placed, {"rank": rank, **common})


def _fill_hira(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    rank = len(values["A"])
    module.hira_A[ADAPTER].zero_()[:rank] = values["A"]
    module.hira_B[ADAPTER].zero_()[:, :rank] = values["B"]


def _one_key(placed: Placed) -> list[str]:
    keys = {spec.projection_key for _, spec in placed if isinstance(spec, Vera | Randlora)}
    if len(keys) == 1:
        return []
    site, spec = placed[0]
    return [f"{site.name} {spec.kind}: peft supports one pair of projections per file, here there are {len(keys)}"]


def _vera(placed: Placed) -> Arguments:
    veras = [spec for _, spec in placed if isinstance(spec, Vera)]
    # A smaller rank is the largest rank with zeros in the additional rows.
    rank = max(spec.rank for spec in veras)
    common = common_values(placed, "dropout", "d_initial")
    arguments = {
        "r": rank,
        "projection_prng_key": veras[0].projection_key,
        "save_projection": True,
        "vera_dropout": common["dropout"],
        "d_initial": common["d_initial"],
    }
    return arguments, lost_values(placed, {"rank": rank, **common})


def _fill_vera(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.vera_A[ADAPTER].copy_(values["A"])
    module.vera_B[ADAPTER].copy_(values["B"])
    module.vera_lambda_b[ADAPTER].copy_(values["b"])
    module.vera_lambda_d[ADAPTER].zero_()[: len(values["d"])] = values["d"]


def _randlora(placed: Placed) -> Arguments:
    randloras = [spec for _, spec in placed if isinstance(spec, Randlora)]
    common = common_values(placed, "alpha", "dropout")
    arguments = {
        "r": randloras[0].rank,
        "projection_prng_key": randloras[0].projection_key,
        "save_projection": True,
        "randlora_alpha": whole(common["alpha"]),
        "randlora_dropout": common["dropout"],
    }
    return arguments, lost_values(placed, common)


def _fill_randlora(module: Any, values: Mapping[str, Tensor], spec: Any) -> None:
    # Where the largest input and the largest output belong to different sites, peft has room that no site reads.
    for name, value in (("A", values["A"][:, None]), ("B", values["B"])):
        room = getattr(module, f"randlora_{name}")[ADAPTER].zero_()
        room[tuple(slice(n) for n in value.shape)] = value
    module.randlora_lambda[ADAPTER].copy_(values["L"])
    module.randlora_gamma[ADAPTER].copy_(values["G"] * (spec.alpha / spec.rank / module.scaling[ADAPTER]))


def _vblora_obstacles(placed: Placed) -> list[str]:
    return [
        *_one_rank(placed),
        *one_for_all(placed, "number of vectors", lambda site, spec: spec.vectors),
        *one_for_all(placed, "length of vectors", lambda site, spec: spec.length(site)),
        *one_for_all(placed, "top_k", lambda site, spec: spec.top_k),
    ]


def _vblora(placed: Placed) -> Arguments:
    site, first = next((site, spec) for site, spec in placed if isinstance(spec, Vblora))
    common = common_values(placed, "dropout")
    arguments = {
        "r": first.rank,
        "num_vectors": first.vectors,
        "vector_length": first.length(site),
        "topk": first.top_k,
        "vblora_dropout": common["dropout"],
    }
    return arguments, lost_values(placed, common)


def _fill_vblora(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.vblora_vector_bank[ADAPTER].copy_(values["V"])
    module.vblora_logits_A[ADAPTER].copy_(values["a"])
    module.vblora_logits_B[ADAPTER].copy_(values["b"])


def _shira(placed: Placed) -> Arguments:
    shiras = [(site, spec) for site, spec in placed if isinstance(spec, Shira)]
    lost = [
        f"{site.name} {spec.kind}: scale {spec.scale} becomes part of the values (affects only training)"
        for site, spec in shiras
        if spec.scale != 1.0
    ] + [
        f"{site.name} {spec.kind}: peft trains random places, which stay (affects only training)"
        for site, spec in shiras
        if spec.places != RANDOM or spec.moves
    ]
    return {"r": shiras[0][1].rank, "mask_type": "random"}, lost


def _fill_shira(module: Any, values: Mapping[str, Tensor], spec: Any) -> None:
    import torch

    places, width = values["places"], module.in_features
    module.shira_weight[ADAPTER].copy_(spec.scale * values["S"])
    module.shira_indices[ADAPTER] = torch.stack([places // width, places % width]).int()


def _by_alpha(placed: Placed, lost: list[str]) -> Arguments:
    """Return the ranks and alphas of LoHa and LoKr."""
    sized = [(site.module, spec) for site, spec in placed if isinstance(spec, Loha | Lokr)]
    rank, rank_pattern = patterns({module: spec.rank for module, spec in sized})
    alpha, alpha_pattern = patterns({module: whole(spec.alpha) for module, spec in sized})
    return {"r": rank, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern}, lost


def _loha(placed: Placed) -> Arguments:
    return _by_alpha(placed, [])


def _fill_loha(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    for n in (1, 2):
        getattr(module, f"hada_w{n}_a")[ADAPTER].copy_(values[f"B{n}"])
        getattr(module, f"hada_w{n}_b")[ADAPTER].copy_(values[f"A{n}"])


def _lokr(placed: Placed) -> Arguments:
    lokrs = [(site, spec) for site, spec in placed if isinstance(spec, Lokr)]
    lost = [
        f"{site.name} lokr: rank {spec.rank} of a matrix of {rows} x {columns}, which peft has whole (affects only"
        " training)"
        for site, spec in lokrs
        for rows in [site.out_features // spec.parts(site.out_features)]
        for columns in [site.in_features // spec.parts(site.in_features)]
        if spec.rank >= max(rows, columns) / 2
    ]
    arguments, lost = _by_alpha(placed, lost)
    return arguments | {"decompose_factor": lokrs[0][1].factor}, lost


def _fill_lokr(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.lokr_w1[ADAPTER].copy_(values["C"])
    if ADAPTER in module.lokr_w2:
        module.lokr_w2[ADAPTER].copy_(values["B"] @ values["A"])
    else:
        module.lokr_w2_a[ADAPTER].copy_(values["B"])
        module.lokr_w2_b[ADAPTER].copy_(values["A"])


def _miss(placed: Placed) -> Arguments:
    misses = [spec for _, spec in placed if isinstance(spec, Miss)]
    common = common_values(placed, "dropout")
    return {"r": misses[0].rank, "miss_dropout": common["dropout"]}, lost_values(placed, common)


def _fill_miss(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.miss_block[ADAPTER].copy_(values["D"].T)


def _c3a(placed: Placed) -> Arguments:
    sizes = {site.module: spec.block(site) for site, spec in placed if isinstance(spec, C3a)}
    size = most_common(sizes.values())
    # Other than in rank_pattern, the names are looked up as they are.
    others = {module: other for module, other in sizes.items() if other != size}
    return {"block_size": size, "block_size_pattern": others, "init_weights": True}, []


def _fill_c3a(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.c3a_kernel[ADAPTER].copy_(values["w"])


def _gralora_grids(placed: Placed) -> list[str]:
    return one_for_all(
        placed,
        "grid and rank",
        lambda site, spec: f"{spec.grid(site.in_features, site.out_features)} x {spec.rank}",
    )


def _gralora(placed: Placed) -> Arguments:
    graloras = [(site, spec) for site, spec in placed if isinstance(spec, Gralora)]
    site, first = graloras[0]
    blocks = first.grid(site.in_features, site.out_features)
    common = common_values(placed, "alpha", "dropout")
    arguments = {
        "r": blocks * first.rank,
        "gralora_k": blocks,
        "alpha": whole(common["alpha"]),
        "gralora_dropout": common["dropout"],
    }
    return arguments, lost_values(placed, common)


def _fill_gralora(module: Any, values: Mapping[str, Tensor], spec: Any) -> None:
    # peft has A by the blocks of the input, and B by those of the output.
    a = values["A"].permute(1, 3, 0, 2).flatten(2)
    b = values["B"].permute(0, 1, 3, 2).flatten(1, 2)
    module.gralora_A[ADAPTER].copy_(a)
    module.gralora_B[ADAPTER].copy_(b * (spec.alpha / module.alpha[ADAPTER]))


def _delora(placed: Placed) -> Arguments:
    deloras = [(site, spec) for site, spec in placed if isinstance(spec, Delora)]
    rank, rank_pattern = patterns({site.module: spec.rank for site, spec in deloras})
    strength, lambda_pattern = patterns({site.module: whole(spec.strength) for site, spec in deloras})
    common = common_values(placed, "dropout")
    arguments = {
        "r": rank,
        "rank_pattern": rank_pattern,
        "delora_lambda": strength,
        "lambda_pattern": lambda_pattern,
        "module_dropout": common["dropout"],
    }
    return arguments, lost_values(placed, common)


def _fill_delora(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.delora_A[ADAPTER].copy_(values["A"])
    module.delora_B[ADAPTER].copy_(values["B"])
    module.delora_lambda[ADAPTER].copy_(values["lambda"])
    module.delora_w_norm[ADAPTER].copy_(values["n"])


def _one_rank(placed: Placed) -> list[str]:
    return one_for_all(placed, "rank", lambda site, spec: spec.rank)


SHIRA = PeftType(
    config="ShiraConfig",
    arguments=_shira,
    fill=_fill_shira,
    obstacles=_one_rank,
    transposed=NO_TRANSPOSED,
    quantised="peft adds it to the weight itself",
    decayed="values",
)
UPDATES: dict[str, PeftType] = {
    "lora": PeftType(config="LoraConfig", arguments=_lora, fill=_fill_lora),
    "dora": PeftType(config="LoraConfig", arguments=_lora, fill=_fill_dora, decayed="magnitude"),
    "hira": PeftType(config="HiraConfig", arguments=_hira, fill=_fill_hira, quantised=NO_QUANTISED),
    "vera": PeftType(config="VeraConfig", arguments=_vera, fill=_fill_vera, obstacles=_one_key, decayed="vectors"),
    "randlora": PeftType(
        config="RandLoraConfig",
        arguments=_randlora,
        fill=_fill_randlora,
        obstacles=lambda placed: _one_rank(placed) + _one_key(placed),
        decayed="vectors",
    ),
    "vblora": PeftType(config="VBLoRAConfig", arguments=_vblora, fill=_fill_vblora, obstacles=_vblora_obstacles),
    "shira": SHIRA,
    "spiel": SHIRA,
    "loha": PeftType(
        config="LoHaConfig",
        arguments=_loha,
        fill=_fill_loha,
        transposed=NO_TRANSPOSED,
        quantised=NO_QUANTISED,
    ),
    "lokr": PeftType(
        config="LoKrConfig",
        arguments=_lokr,
        fill=_fill_lokr,
        obstacles=lambda placed: one_for_all(placed, "factor", lambda site, spec: spec.factor),
        transposed=NO_TRANSPOSED,
        quantised=NO_QUANTISED,
    ),
    "miss": PeftType(
        config="MissConfig",
        arguments=_miss,
        fill=_fill_miss,
        obstacles=_one_rank,
        transposed=NO_TRANSPOSED,
    ),
    "c3a": PeftType(config="C3AConfig", arguments=_c3a, fill=_fill_c3a, transposed=NO_TRANSPOSED),
    "gralora": PeftType(config="GraloraConfig", arguments=_gralora, fill=_fill_gralora, obstacles=_gralora_grids),
    "delora": PeftType(
        config="DeloraConfig",
        arguments=_delora,
        fill=_fill_delora,
        transposed=NO_TRANSPOSED,
        quantised=NO_QUANTISED,
        decayed="strength",
    ),
}
