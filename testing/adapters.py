"""Checks of an adapter type: declared costs, initial values, merging, slots in a pack, and complete removal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Mixture, spec_from_dict
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.testing.models import tiny, tokens

#: Families of `models.FAMILIES`: an encoder, a decoder with shared key heads, and one with fused projections.
FAMILIES = ("bert", "llama-causal", "gpt2")
AdapterCheck = Callable[[AdapterSpec, str, Sequence[str]], None]


def check_adapter(*specs: AdapterSpec, roles: Sequence[str] = (), families: Sequence[str] = FAMILIES) -> None:
    """Check an adapter type with these settings, which should have different sizes if the type has a size.

    `roles`: roles of the sites in the checks (default: the type's own). Raises AssertionError, which names the first
    check that fails, the settings and the family of the backbone.
    """
    kinds = sorted({spec.kind for spec in specs})
    assert len(kinds) == 1, f"all settings must be of one adapter type, got {kinds}"
    fitting = [family for family in families if placed(specs[0], tiny(family)[1], roles)]
    assert fitting, f"{kinds[0]} fits no site of {', '.join(families)} with the roles {roles or specs[0].default_roles}"
    for family in fitting:
        for check in CHECKS:
            for spec in specs:
                try:
                    check(spec, family, roles)
                except Exception as error:
                    raise AssertionError(f"{check.__name__} of {spec} on {family}: {error}") from error
        try:
            slots_in_a_pack(specs, family, roles)
        except Exception as error:
            raise AssertionError(f"slots_in_a_pack of {kinds[0]} on {family}: {error}") from error


def starts_as_the_identity(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check that the untrained adapter does not change the logits, if the type declares it."""
    if not spec.identity_at_start:
        return
    model, backbone = tiny(family)
    before = model(tokens()).logits
    with Attachment(model, backbone, [placed(spec, backbone, roles)], [1], pretrained_head=True) as attachment:
        attachment.eval()
        torch.testing.assert_close(
            model(tokens()).logits,
            before,
            atol=1e-5,
            rtol=0,
            msg=lambda m: f"identity_at_start is declared, and the untrained adapter changes the logits: {m}",
        )


def trained_values_change_the_output(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check that the adapter has an effect after its values have changed."""
    model, backbone = tiny(family)
    before = model(tokens()).logits
    with Attachment(model, backbone, [placed(spec, backbone, roles)], [1], pretrained_head=True) as attachment:
        head = {name: value for name, value in attachment.state().items() if name.startswith("head.")}
        attachment.load_state(noisy(attachment) | head)
        attachment.eval()
        change = float((model(tokens()).logits - before).detach().abs().max())
    assert change > 1e-3, f"trained values change the logits by {change:.2g} at most"


def parameters_are_the_formula(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check that `num_params` equals the number of parameters that an optimiser gets."""
    model, backbone = tiny(family)
    architecture = placed(spec, backbone, roles)
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        declared, found = architecture.num_params(backbone), attachment.num_adapter_params()
    assert declared == found > 0, f"num_params says {declared}, and {found} are trained"


def flops_are_the_formula(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check that `flops_per_token` equals the slope of torch's FLOP counter over the number of tokens."""
    if family == "gpt2" or isinstance(spec, Mixture):
        return  # the counter ignores Conv1D, and experts may run for tokens that are not routed to them
    model, backbone = tiny(family)
    model.set_attn_implementation("eager")  # type: ignore[operator]  # the counter ignores the fused attention
    architecture = placed(spec, backbone, roles)

    def count(length: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(2, length))
        total: int = counter.get_total_flops()
        return total

    bare = count(9) - count(5)
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.eval()
        model(tokens(2, 5))  # imports the kernels, because a counter uses only formulas that were registered before it
        added = count(9) - count(5) - bare
    declared, found = architecture.flops_per_token(backbone), added / (2 * (9 - 5))
    assert declared == found, f"flops_per_token says {declared}, and {found:g} are counted"


def merged_is_unmerged(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check for a mergeable type that merged weights give the same logits and can be restored."""
    if not spec.mergeable:
        return
    model, backbone = tiny(family)
    with Attachment(model, backbone, [placed(spec, backbone, roles)], [1]) as attachment:
        attachment.load_state(noisy(attachment))
        attachment.eval()
        apart = model(tokens()).logits
        weights = copy.deepcopy(model.state_dict())
        with attachment.merged(), attachment.bare():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)
        assert_same(model.state_dict(), weights, atol=0, rtol=0)
        assert torch.equal(model(tokens()).logits, apart), "merging and restoring change the logits"


def detaching_restores_the_model(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check that detaching restores weights, flags, gradients, hooks, modes and logits."""
    for was_training in (False, True):
        model, backbone = tiny(family)
        next(model.parameters()).requires_grad_(False)
        logits = model(tokens()).logits
        model.train(was_training)
        weights = copy.deepcopy(model.state_dict())
        flags = [p.requires_grad for p in model.parameters()]
        implementation = model.config._attn_implementation  # type: ignore[union-attr]
        with Attachment(model, backbone, [placed(spec, backbone, roles)], [1]) as attachment:
            attachment.load_state(noisy(attachment))
            model(tokens()).logits.square().sum().backward()
        assert_same(model.state_dict(), weights, atol=0, rtol=0)
        assert [p.requires_grad for p in model.parameters()] == flags, "requires_grad has changed"
        assert all(p.grad is None for p in model.parameters()), "the backbone has gradients"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks are left"
        assert {m.training for m in model.modules()} == {was_training}, "the training mode has changed"
        assert model.config._attn_implementation == implementation  # type: ignore[union-attr]
        assert torch.equal(model.eval()(tokens()).logits, logits), "the logits have changed"


def state_round_trip(spec: AdapterSpec, family: str, roles: Sequence[str] = ()) -> None:
    """Check that the trained tensors give the same logits in another attachment, and that all are required."""
    model, backbone = tiny(family)
    architecture = placed(spec, backbone, roles)
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.load_state(noisy(attachment))
        attachment.eval()
        state, logits = attachment.state(), model(tokens()).logits
    with Attachment(model, backbone, [architecture], [2]) as attachment:
        attachment.load_state(state)
        attachment.eval()
        assert_same(attachment.state(), state, atol=0, rtol=0)
        assert torch.equal(model(tokens()).logits, logits), "the logits depend on more than the state"
        try:
            attachment.load_state({})
        except KeyError:
            return
        raise AssertionError("load_state accepts an empty state, expected KeyError")


def dictionary_round_trip(spec: AdapterSpec, family: str = "", roles: Sequence[str] = ()) -> None:
    """Check that the settings survive a round trip through their dictionary, as in ledgers and recipes."""
    assert spec.kind in (*ADAPTERS, Mixture.kind), f"{spec.kind!r} is not a registered adapter: install its entry point"
    assert spec_from_dict(spec.to_dict()) == spec, "spec_from_dict of to_dict differs from the settings"


CHECKS: tuple[AdapterCheck, ...] = (
    dictionary_round_trip,
    parameters_are_the_formula,
    starts_as_the_identity,
    trained_values_change_the_output,
    flops_are_the_formula,
    merged_is_unmerged,
    detaching_restores_the_model,
    state_round_trip,
)


def slots_in_a_pack(specs: Sequence[AdapterSpec], family: str, roles: Sequence[str] = ()) -> None:
    """Check that each candidate of a pack, with all sizes and numbers of sites, equals the candidate alone."""
    model, backbone = tiny(family)
    sites = sites_of(specs[0], backbone, roles)
    if any(site.role == "backbone" for site in sites):
        return  # a candidate that trains the backbone itself has a pack of its own
    whole = [placed(spec, backbone, roles) for spec in specs]
    half = Architecture.of({site.name: [specs[0]] for site in sites[::2]})
    assert_slots_equal_alone(model, backbone, [*whole, half, Architecture(), whole[0]])


def assert_slots_equal_alone(model: nn.Module, backbone: Backbone, architectures: Sequence[Architecture]) -> None:
    """Check that outputs and gradients of every slot of a pack, with dropout, equal those of each candidate alone."""
    seeds, inputs = [10 + k for k in range(len(architectures))], tokens()
    alone = []
    for seed, architecture in zip(seeds, architectures, strict=True):
        with Attachment(model, backbone, [architecture], [seed]) as attachment:
            state = noisy(attachment, seed=seed)
            attachment.load_state(state)
            attachment.train()
            logits = model(inputs).logits
            if state:  # without adapters and head there is nothing to train
                logits.square().mean().backward()
            alone.append((state, logits.detach(), gradients(attachment)))
    with Attachment(model, backbone, architectures, seeds) as attachment:
        for k, (state, _, _) in enumerate(alone):
            attachment.load_state(state, k)
        attachment.train()
        packed = model(inputs.repeat(len(seeds), 1)).logits.unflatten(0, (len(seeds), -1))
        packed.square().flatten(1).mean(1).sum().backward()
        for k, (state, _, _) in enumerate(alone):
            assert_same(attachment.state(k), state, atol=0, rtol=0)
        for k, (_, logits, expected) in enumerate(alone):
            torch.testing.assert_close(packed[k], logits, atol=1e-6, rtol=1e-5)
            assert_same(gradients(attachment, k), expected, atol=1e-6, rtol=1e-5)


def sites_of(spec: AdapterSpec, backbone: Backbone, roles: Sequence[str] = ()) -> list[Site]:
    """Return the sites of `roles` (default: the type's own) that suit the type."""
    wanted = roles or spec.default_roles
    return [site for site in backbone.sites if site.role in wanted and spec.fits(site)]


def placed(spec: AdapterSpec, backbone: Backbone, roles: Sequence[str] = ()) -> Architecture:
    """Return the architecture with `spec` at each of `sites_of`."""
    return Architecture.of({site.name: [spec] for site in sites_of(spec, backbone, roles)})


def noisy(attachment: Attachment, k: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Return the trained tensors of slot k with noise, so that none has a special value; indices are unchanged."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: v + 0.1 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for name, v in attachment.state(k).items()
    }


def gradients(attachment: Attachment, k: int = 0) -> dict[str, Tensor]:
    """Return the gradients of slot k by the names of its state. Overwrites the trained tensors."""
    with torch.no_grad():
        for parameter, _ in attachment.trainable():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return attachment.state(k)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float, rtol: float) -> None:
    """Check that two mappings of tensors are equal within the tolerances."""
    assert ours.keys() == theirs.keys(), f"names differ: {sorted(ours.keys() ^ theirs.keys())}"
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")  # noqa: B023
