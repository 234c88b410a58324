"""Deltas of weights in training: whole layers (`dense`) and sparse ones (`shira`, `spiel`), against slow references."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.schedule import rate
from autopeft.search_space.adapters import AdapterSpec, Dense, Norm, Shira, Spiel
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.declaration import AdapterChoice, OneOf
from autopeft.search_space.problem import Fidelity
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.testing.adapters import noisy

from .test_packed import alone, at, compare, loaded, requests, together  # noqa: F401

torch.set_num_threads(1)

KINDS = ("dense", "norm")


def trained_in_place(there: LoadedBackbone, request: Request) -> list[float]:
    """The losses of a training of the adapted layers' own tensors and the head by torch's AdamW."""
    evaluator, training = alone(there), alone(there).training(request.candidate)
    architecture, model = request.candidate.architecture, there.model
    before = copy.deepcopy(model.state_dict())
    losses = []
    with evaluator.attached([Architecture()], [request.seed]) as attachment:
        own = [p for name, _ in architecture for p in model.get_submodule(site_of(there, name)).parameters()]
        for parameter in own:
            parameter.requires_grad_(True)
        parameters = [parameter for parameter, _ in attachment.trainable()] + own
        optimizer = AdamW(parameters, weight_decay=0.0)
        order = batching.training_batches(evaluator.lengths["train"], training.batch_size, request.seed)
        full = evaluator.full_steps(training)
        for step in range(full):
            losses.append(evaluator.step_gradients(attachment, next(order), None).item())
            clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.param_groups[0]["lr"] = training.learning_rate * rate(step, full, training)
            optimizer.step()
            optimizer.zero_grad()
    model.load_state_dict(before)
    return losses


def site_of(there: LoadedBackbone, name: str) -> str:
    return there.backbone.site(name).module


def test_a_dense_delta_is_the_training_of_the_layer_itself(loaded: LoadedBackbone) -> None:  # noqa: F811
    architecture = at(loaded, Dense(), 2, ("attn.q", "mlp.up", "mlp.down"))
    (wanted,) = requests([architecture])
    training = {**wanted.candidate.training, "weight_decay": 0.0}
    wanted = replace(wanted, candidate=replace(wanted.candidate, training=training))
    (found,) = alone(loaded).evaluate([wanted])
    assert found.measurement is not None
    assert found.measurement.losses == pytest.approx(trained_in_place(loaded, wanted), rel=1e-5, abs=1.1e-5)


def test_layers_outside_the_region_stay_bit_by_bit(loaded: LoadedBackbone) -> None:  # noqa: F811
    model, backbone = loaded.model, loaded.backbone
    region = backbone.select(roles=("mlp.up", "mlp.down"), layers=(1, 2))
    before = copy.deepcopy(model.state_dict())
    with Attachment(model, backbone, [Architecture.of({site.name: [Dense()] for site in region})], [0]) as attachment:
        attachment.load_state(noisy(attachment))
        with attachment.merged():
            after = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {name.rpartition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {site.module for site in region} | set(backbone.head_modules)


def test_a_space_chooses_from_which_layer_on_layers_are_trained_whole(loaded: LoadedBackbone) -> None:  # noqa: F811
    """Telly's sweep, beside which a study may have anything else."""
    layers = {f"{kind}{k}": AdapterChoice(kind=kind, layers=tuple(range(k, 4))) for k in (2, 3) for kind in KINDS}
    space = SearchSpace(
        backbone=loaded.backbone,
        adapters=layers,
        one_of=[OneOf(name=kind, members=(f"{kind}2", f"{kind}3")) for kind in KINDS],
    )
    found = space.decode({"dense": "dense3", "norm": "norm3"}).architecture
    expected = {s.name for s in loaded.backbone.sites if s.layer == 3 and s.role in (*Dense.roles, *Norm.roles)}
    assert {name for name, _ in found} == expected
    assert {spec.kind for _, spec in found} == set(KINDS)


# Sparse deltas

#: Steps whose numbers are easy to follow: 20 of 8 rows.
PLAIN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "schedule": "constant",
    "warmup": 0,
}
SITE = "layers.2.attn.q"


def of_one(there: LoadedBackbone, spec: AdapterSpec, **settings: Any) -> Request:
    candidate = Candidate(architecture=Architecture.of({SITE: [spec]}), training=PLAIN)
    return Request(candidate=candidate, keep_weights=True, **settings)


def change_of(there: LoadedBackbone, spec: Shira, state: Mapping[str, Tensor]) -> Tensor:
    """The change of the weight, [D_out * D_in]."""
    site = there.backbone.site(SITE)
    own = {name.rpartition("/")[2]: value for name, value in state.items() if name.startswith(f"{SITE}/")}
    return spec.merge(own, torch.zeros(site.out_features, site.in_features), None)[0].flatten()


def test_places_of_shira_stay_and_nothing_else_changes(loaded: LoadedBackbone) -> None:  # noqa: F811
    for spec in (Shira(rank=2), Shira(rank=2, places="gradient")):
        request = of_one(loaded, spec)
        with alone(loaded).attach(request) as attachment:
            places = attachment.state()[f"{SITE}/shira/places"]
        (found,) = alone(loaded).evaluate([request])
        assert found.weights is not None
        assert torch.equal(found.weights[f"{SITE}/shira/places"], places)
        changed = change_of(loaded, spec, found.weights).nonzero().flatten()
        assert set(changed.tolist()) <= set(places.tolist())
        assert len(changed) > len(places) / 2


def spiel_by_hand(there: LoadedBackbone, request: Request, spec: Spiel) -> Tensor:
    """The change of the weight: a dense delta, of which only the entries of a set of places move."""
    evaluator, key = alone(there), f"{SITE}/spiel/places"
    with evaluator.attach(request) as attachment:
        active = set(attachment.state()[key].tolist())
    size, rate_ = len(active), PLAIN["learning_rate"]
    full = evaluator.full_steps(evaluator.training(request.candidate))
    with evaluator.attached([Architecture.of({SITE: [Dense()]})], [request.seed]) as attachment:
        delta = next(bank.values["D"] for bank in attachment.banks if "D" in bank.values)
        others = [p for bank in attachment.banks if "D" not in bank.values for p in bank.values.values()]
        head = AdamW(others, lr=rate_, weight_decay=0.0)
        order = batching.training_batches(evaluator.lengths["train"], 8, request.seed)
        values = delta.data.view(-1)
        first, second = torch.zeros_like(values), torch.zeros_like(values)
        for step in range(1, full + 1):
            evaluator.step_gradients(attachment, next(order), None)
            assert delta.grad is not None
            gradient = delta.grad.flatten().clone()
            delta.grad = None
            head.step()
            head.zero_grad()
            for i in active:
                first[i] = 0.9 * first[i] + 0.1 * gradient[i]
                second[i] = 0.999 * second[i] + 0.001 * gradient[i] ** 2
                corrected = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
                values[i] -= rate_ * first[i] / (1 - 0.9**step) / corrected
            place = (step - 1) % spec.every
            if place >= spec.window or step == full:
                continue
            if place == 0:
                largest = sorted(range(len(gradient)), key=lambda i: -abs(float(gradient[i])))[:size]
                sums, squares = dict.fromkeys(largest, 0.0), dict.fromkeys(largest, 0.0)
            for i in sums:
                sums[i] += float(gradient[i])
                squares[i] += float(gradient[i]) ** 2
            if place == spec.window - 1:
                count = size if step == spec.window else int(spec.share * (1 - step / full) * size)
                dropped = sorted(active, key=lambda i: abs(float(values[i])))[:count]
                free = [i for i in sums if i not in active.difference(dropped)]
                grown = sorted(free, key=lambda i: -abs(sums[i]))[:count]
                new = [i for i in grown if i not in dropped]
                old = [i for i in dropped if i not in grown][: len(new)]
                active = active.difference(old).union(new)
                values[old] = first[old] = second[old] = 0.0
                for i in new:
                    first[i], second[i] = sums[i] / spec.window, squares[i] / spec.window
        assert len(active) == size
        changed: Tensor = values.clone()
        return changed


def test_spiel_is_the_obvious_one(loaded: LoadedBackbone) -> None:  # noqa: F811
    """What is dropped is zero, what grows starts at zero with the gradients of the window as its moments."""
    spec = Spiel(rank=2, every=6, window=2, share=0.5)
    request = of_one(loaded, spec)
    (found,) = alone(loaded).evaluate([request])
    assert found.weights is not None
    assert len(found.weights[f"{SITE}/spiel/places"].unique()) == 2 * 48
    expected = spiel_by_hand(loaded, request, spec)
    torch.testing.assert_close(change_of(loaded, spec, found.weights), expected, atol=1e-5, rtol=1e-3)


def test_places_move_in_windows_and_fewer_towards_the_end(loaded: LoadedBackbone) -> None:  # noqa: F811
    request = of_one(loaded, Spiel(rank=2, every=6, window=2, share=0.5))
    states: dict[int, set[int]] = {}
    for step in (1, 2, 7, 8, 13, 14, 20):
        (found,) = alone(loaded).evaluate([replace(request, fidelity=Fidelity(share=step / 20))])
        assert found.weights is not None
        states[step] = set(found.weights[f"{SITE}/spiel/places"].tolist())
    assert states[2] == states[7]
    assert states[8] == states[13]
    assert states[14] == states[20], "in the last step there is nothing to learn at a new place"
    first, second, third = (len(states[step] - states[step - 1]) for step in (2, 8, 14))
    assert 96 >= first > second > third > 0
    assert second <= int(0.5 * (1 - 8 / 20) * 96)
    assert third <= int(0.5 * (1 - 14 / 20) * 96)


@pytest.mark.parametrize("rungs", [(0.35, 0.6), (0.1, 0.4)])
def test_a_pack_that_is_divided_in_a_window_goes_on(loaded: LoadedBackbone, rungs: tuple[float, ...]) -> None:  # noqa: F811
    """Places, moments and what a window has seen so far are part of a slot's state."""
    specs = [Spiel(rank=2, every=6, window=2, share=0.5), Spiel(rank=4, every=7, window=3, scale=2.0), Shira(rank=3)]
    wanted = [of_one(loaded, spec, fidelity=Fidelity(rungs=rungs)) for spec in specs]
    found = together(loaded, pack=2).evaluate(wanted)
    expected = alone(loaded).evaluate(wanted)
    compare(found, expected)
    for ours, theirs, spec in zip(found, expected, specs, strict=True):
        assert ours.weights is not None
        assert theirs.weights is not None
        ours_, theirs_ = (change_of(loaded, spec, weights) for weights in (ours.weights, theirs.weights))
        torch.testing.assert_close(ours_, theirs_, atol=1e-4, rtol=1e-3)


def test_bad_windows_are_refused() -> None:
    for fields, message in (
        ({"every": 4}, "every must be at least 5"),
        ({"window": 0}, "window must be at least 1"),
        ({"share": 1.5}, "share must be at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Spiel(**fields)
