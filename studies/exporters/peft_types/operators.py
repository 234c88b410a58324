"""Types of HF peft that rotate, reflect, scale or shift the input or the output of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.boft import Boft
from autopeft.search_space.adapters.hra import Hra
from autopeft.search_space.adapters.oft import Oft
from autopeft.search_space.adapters.road import Road
from autopeft.studies.exporters.peft_types.base import (
    ADAPTER,
    NO_QUANTISED,
    NO_TRANSPOSED,
    Arguments,
    PeftType,
    Placed,
    one_for_all,
    without_arguments,
)

if TYPE_CHECKING:
    from torch import Tensor


def _oft(placed: Placed) -> Arguments:
    sizes = [spec.block(site) for site, spec in placed if isinstance(spec, Oft)]
    return {"oft_block_size": sizes[0], "use_cayley_neumann": False}, []


def _fill_oft(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.oft_R[ADAPTER].weight.copy_(values["Q"])


def _boft_obstacles(placed: Placed) -> list[str]:
    several = [
        f"{site.name} boft: peft computes {spec.num_factors(site)} factors only where its CUDA extension can be"
        " compiled, and one elsewhere"
        for site, spec in placed
        if isinstance(spec, Boft) and spec.num_factors(site) > 1
    ]
    return several or _one_block(placed)


def _boft(placed: Placed) -> Arguments:
    sizes = [spec.block(site) for site, spec in placed if isinstance(spec, Boft)]
    return {"boft_block_size": sizes[0], "boft_block_num": 0, "boft_n_butterfly_factor": 1}, []


def _fill_boft(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.boft_R[ADAPTER].copy_(values["R"])
    module.boft_s[ADAPTER].copy_(values["s"][:, None])


def _one_block(placed: Placed) -> list[str]:
    return one_for_all(placed, "block size", lambda site, spec: spec.block(site))


def _hra(placed: Placed) -> Arguments:
    return {"r": next(2 * spec.pairs for _, spec in placed if isinstance(spec, Hra))}, []


def _fill_hra(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.hra_u[ADAPTER].copy_(values["U"])


def _road_obstacles(placed: Placed) -> list[str]:
    return one_for_all(placed, "variant", lambda site, spec: spec.variant) + one_for_all(
        placed, "group size", lambda site, spec: spec.group(site.out_features)
    )


def _road(placed: Placed) -> Arguments:
    site, spec = next((site, spec) for site, spec in placed if isinstance(spec, Road))
    return {"variant": f"road_{spec.variant}", "group_size": spec.group(site.out_features)}, []


def _fill_road(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.road_theta[ADAPTER].copy_(values["theta"])
    module.road_alpha[ADAPTER].copy_(values["alpha"])


def _ia3(placed: Placed) -> Arguments:
    return {"feedforward_modules": [site.module for site, _ in placed if site.role == "mlp.down"]}, []


def _fill_ia3(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    (vector,) = values.values()
    module.ia3_l[ADAPTER].copy_(vector.reshape(module.ia3_l[ADAPTER].shape))


def _fill_beft(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    module.beft_bias[ADAPTER].copy_(values["b"][None])


def _fill_norm(module: Any, values: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    own = module.ln_tuning_layers[ADAPTER]
    weight, bias = spec.merge(values, own.weight, getattr(own, "bias", None))
    own.weight.copy_(weight)
    if bias is not None:
        own.bias.copy_(bias)


OPERATORS: dict[str, PeftType] = {
    "oft": PeftType(config="OFTConfig", arguments=_oft, fill=_fill_oft, obstacles=_one_block, transposed=NO_TRANSPOSED),
    "boft": PeftType(
        config="BOFTConfig",
        arguments=_boft,
        fill=_fill_boft,
        obstacles=_boft_obstacles,
        transposed=NO_TRANSPOSED,
        decayed="scale",
        flat="boft_s",
    ),
    "hra": PeftType(
        config="HRAConfig",
        arguments=_hra,
        fill=_fill_hra,
        obstacles=lambda placed: one_for_all(placed, "number of pairs", lambda site, spec: spec.pairs),
        transposed=NO_TRANSPOSED,
        quantised=NO_QUANTISED,
    ),
    "road": PeftType(
        config="RoadConfig",
        arguments=_road,
        fill=_fill_road,
        obstacles=_road_obstacles,
        transposed=NO_TRANSPOSED,
        decayed="angles and scales",
    ),
    "ia3": PeftType(config="IA3Config", arguments=_ia3, fill=_fill_ia3, decayed="scale", flat="ia3_l"),
    "beft": PeftType(
        config="BeftConfig",
        arguments=without_arguments,
        fill=_fill_beft,
        transposed=NO_TRANSPOSED,
        flat="beft_bias",  # other trainers leave it out because of its name
    ),
    "norm": PeftType(config="LNTuningConfig", arguments=without_arguments, fill=_fill_norm),
}
