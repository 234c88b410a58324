"""Places of sparse changes and of pruned bottlenecks: by weights and by training rows, against obvious rankings."""

from __future__ import annotations

import copy
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.site_statistics import RATE
from autopeft.search_space.adapters import Shira, SparseAdapter
from autopeft.search_space.adapters.shira import PLACES
from autopeft.search_space.adapters.sparse_adapter import KEPT
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice
from autopeft.search_space.runtime.factors import Starts
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.testing.models import tiny

from .test_site_statistics import FAMILIES, batches, loss_of, site_statistics

torch.set_num_threads(1)

RANKED = PLACES[1:]
SITES = {"bert": "layers.1.mlp.down", "llama-causal": "layers.1.mlp.down", "gpt2": "layers.1.mlp.down"}


def scores(family: str, places: str) -> Tensor:
    """The scores of the elements of the site's weight, [D_out, D_in], from the model's own tensors."""
    model, backbone = tiny(family)
    module = backbone.site(SITES[family]).module
    weight = cast(nn.Parameter, model.get_submodule(module).weight)
    before = weight.detach().clone()
    if places == "movement":
        # Here the model itself is trained. The inner linear is the only one of its layer that reads so many inputs.
        own = list(model.get_submodule(module).parameters())
        head = [p for name in backbone.head_modules for p in model.get_submodule(name).parameters()]
        optimizer = torch.optim.Adam(own + head, lr=RATE)
        for batch in batches():
            optimizer.zero_grad()
            loss_of(model, batch).mean().backward()
            optimizer.step()
        found = (weight.detach() - before).abs()
    else:
        gradient = sum(torch.autograd.grad(loss_of(model, batch).sum(), weight)[0] for batch in batches())
        by_rule = {"magnitude": before.abs(), "gradient": gradient, "snip": before * gradient}
        found = cast(Tensor, by_rule[places]).abs()
    return found.T if family == "gpt2" else found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("places", RANKED)
def test_places_are_those_of_the_highest_scores(family: str, places: str) -> None:
    model, backbone = tiny(family)
    before = copy.deepcopy(model.state_dict())
    architectures = [Architecture.of({SITES[family]: [Shira(rank=rank, places=places)]}) for rank in (1, 4)]
    starts = Starts(site_statistics(model, backbone))
    found = []
    for architecture, seed in ((architectures[0], 1), (architectures[1], 2), (architectures[0], 3)):
        with Attachment(model, backbone, [architecture], [seed], pretrained_head=True, starts=starts) as attachment:
            found.append(attachment.state()[f"{SITES[family]}/shira/places"].long())
    assert torch.equal(found[0], found[2]), "the same for all seeds"
    assert torch.equal(found[0], found[1][: len(found[0])]), "a smaller one has the first of a larger one"
    assert len(found[1].unique()) == len(found[1])
    of_all = scores(family, places).flatten()
    chosen, least = of_all[found[1]], of_all.sort(descending=True).values[len(found[1]) - 1]
    torch.testing.assert_close(chosen.sort(descending=True).values, of_all.sort(descending=True).values[: len(chosen)],
                               rtol=1e-2 if places == "movement" else 1e-4, atol=1e-9)  # fmt: skip
    assert bool((chosen >= least * 0.99).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_places_by_rows_need_rows() -> None:
    model, backbone = tiny("bert")
    for places in RANKED[1:]:
        with pytest.raises(ValueError, match=f"'{places}' reads the .* of training rows, and there are none here"):
            Attachment(model, backbone, [Architecture.of({"layers.0.attn.q": [Shira(places=places)]})], [1])
    with pytest.raises(ValueError, match="places must be one of random, magnitude"):
        Shira(places="large")


def test_candidates_from_before_keep_their_keys() -> None:
    assert Shira().to_dict() == {"kind": "shira", "rank": 8, "scale": 1.0}
    assert Shira(places="snip").to_dict()["places"] == "snip"


# Pruned bottlenecks


@pytest.mark.parametrize("form", ["serial", "parallel"])
@pytest.mark.parametrize("kept", KEPT)
def test_pruning_keeps_the_highest_scores_of_each_projection(kept: str, form: str) -> None:
    """Against a bottleneck of two linears in a hook, of which everything is known."""
    model, backbone = tiny("bert")
    spec = SparseAdapter(size=5, form=form, init="kaiming", scale=2.0, kept=kept, density=0.3)
    site = backbone.site("layers.1.mlp")
    attach = partial(Attachment, model, backbone, pretrained_head=True)
    with attach([Architecture.of({site.name: [spec.before_pruning()]})], [7]) as attachment:
        whole = {name.rpartition("/")[2]: v for name, v in attachment.state().items() if name.startswith(site.name)}
    starts = Starts(site_statistics(model, backbone))
    architecture = Architecture.of({site.name: [spec]})
    with attach([architecture], [7], starts=starts) as attachment:
        state = {name.rpartition("/")[2]: v for name, v in attachment.state().items() if name.startswith(site.name)}
        assert attachment.num_adapter_params() == architecture.num_params(backbone)

    down, up = (whole[name].requires_grad_() for name in ("down", "up"))
    inputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + 2.0 * torch.relu((y if form == "serial" else inputs.pop()) @ down.T) @ up.T

    read = model.get_submodule(site.input_module).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    add = model.get_submodule(site.module).register_forward_hook(hook)
    loss = torch.stack([loss_of(model, batch).sum() for batch in batches()]).sum()
    gradients = dict(zip(("down", "up"), torch.autograd.grad(loss, (down, up)), strict=True))
    read.remove()
    add.remove()
    for name, values in (("down", down.detach()), ("up", up.detach())):
        scores = (values * gradients[name]).abs() if kept == "snip" else values.abs()
        values, scores = (values, scores) if name == "down" else (values.T, scores.T)
        count = 5 * round(0.3 * values.shape[1])
        expected = scores.flatten().topk(count).indices
        assert set(state[f"{name}_places"].tolist()) == set(expected.tolist())
        assert torch.equal(state[name], values.flatten()[state[f"{name}_places"].long()])


def test_pruning_is_refused_where_it_has_no_meaning() -> None:
    model, backbone = tiny("bert")
    with pytest.raises(ValueError, match="init must be houlsby or kaiming"):
        SparseAdapter(init="zero")
    with pytest.raises(ValueError, match="density must be at most 1"):
        SparseAdapter(density=1.5)
    with pytest.raises(ValueError, match="'snip' reads the gradient of training rows"):
        Attachment(model, backbone, [Architecture.of({"layers.0.mlp": [SparseAdapter(kept="snip")]})], [1])
    choice = AdapterChoice(kind="sparseadapter", fields={"size": Choice(choices=(2, 4))})
    with pytest.raises(ValueError, match="a smaller adapter is no part of a larger one"):
        SharedWeights(model, SearchSpace(backbone=backbone, adapters={"a": choice}), seed=0)
