"""Start configurations of a study: from the entries of `search.start` to genes of its space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.declaration import OFF, SpaceError
from autopeft.search_space.domains import Choice, Domain, Float, Value
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.spaces.genes import TRAINING, Assignment, Gene
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.spaces.rules import ALL_BASELINES
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.spelling import did_you_mean

if TYPE_CHECKING:
    from autopeft.studies.config.study_file import StudyFile


def start_points(study: StudyFile, space: SearchSpace, limits: Limits) -> tuple[Assignment, ...]:
    """Return the genes of every entry of `search.start`. Raises SpaceError with all problems."""
    points, problems = [], []
    for i, entry in enumerate(study.search.start):
        try:
            point = _baseline(space, entry) if isinstance(entry, str) else assignment_of(space, entry)
            _check_worth(space, point, limits)
            points.append(point)
        except SpaceError as error:
            problems += [(("search", "start", i, *path), what) for path, what in error.problems]
    if problems:
        raise SpaceError(problems)
    return tuple(points)


def _baseline(space: SearchSpace, name: str) -> Assignment:
    """Return a baseline as a point of the space, with training settings in the middle of their ranges."""
    point = locate(space, Candidate(architecture=ALL_BASELINES[name](space.backbone)))
    if point is None:
        raise SpaceError([((), f"the space does not contain the architecture of the baseline {name!r}")])
    return point


def _check_worth(space: SearchSpace, point: Assignment, limits: Limits) -> None:
    """Raise SpaceError for a point that the search would reject."""
    architecture = space.decode(point).architecture
    if not architecture:
        raise SpaceError([((), "no adapter is on: the baseline `head` trains this configuration (baselines.names)")])
    rejection = limits.rejection(declared_costs(architecture, space.backbone))
    if rejection is not None:
        raise SpaceError([((), rejection[1])])


def assignment_of(space: SearchSpace, given: Mapping[str, Value]) -> Assignment:
    """Return the point of the space that has the `given` values. Raises SpaceError.

    A key is the name of a gene or a leading part of it that includes the setting: "lora.rank" is the rank in every
    stage, "lora.rank.stages.0" the rank in one stage; the longer key wins. A size of 0 means "off".

    Defaults: an adapter without keys is off if possible; an adapter with keys is on everywhere, or only where a key
    switches it on if there is such a key; layers are on; a group takes the member with keys, or else "off", or else a
    member that can be off; all other genes take the middle of their domain.
    """
    domains = {gene.name: gene.domain for gene in space.genes}
    genes_of: dict[str, list[Gene]] = {key: [] for key in given}
    accepted: set[str] = set()
    values: Assignment = {}
    for gene in space.genes:
        for key in reversed([key for key in _keys(gene) if key in given]):
            value = given[key]
            genes_of[key].append(gene)
            if gene.size is not None and not f"{key}.".startswith(f"{gene.setting}.on."):
                # A size also answers whether the adapter is on.
                if value is not False and (value == 0 or domains[gene.size].contains(value)):
                    values[gene.name] = value != 0
                    accepted.add(key)
            elif gene.domain.contains(value):
                values[gene.name] = _in_domain(gene.domain, value)
                accepted.add(key)
    problems = [((key,), what) for key, what in _key_problems(space, given, genes_of, accepted)]
    if problems:
        raise SpaceError(problems)
    named = [key.split(".")[0] for key, value in given.items() if not _is_off(value)]
    present = {*named, *(value for value in given.values() if value in space.adapters)}
    gates = {gate.gene for place in space.placements for gate in place.gates}
    switched_on = {(gene.adapter, gene.setting) for gene in space.genes if values.get(gene.name) is True}

    def fill(gene: Gene) -> Value:
        if gene.name not in gates:
            return gene.domain.from_unit(0.5)
        if gene.adapter is not None:
            return gene.adapter in present and (gene.adapter, gene.setting) not in switched_on
        if gene.setting == "layers":
            return True
        assert isinstance(gene.domain, Choice)
        choices = gene.domain.choices
        can_be_off = [OFF, *(other.adapter for other in space.genes if other.size is not None)]
        return next((member for member in (*named, *can_be_off) if member in choices), choices[0])

    point = space.complete(values, fill)
    idle = [key for key, value in given.items() if genes_of[key] and not _is_off(value)
            and not any(gene.name in point for gene in genes_of[key])]  # fmt: skip
    if idle:
        raise SpaceError([((key,), "has no effect: its adapter is off in this entry") for key in idle])
    return point


def _keys(gene: Gene) -> Iterator[str]:
    """Yield the keys that set a gene, the longest first."""
    for name, last in ((gene.name, gene.setting + (".on" if gene.size else "")), (gene.size, gene.setting)):
        while name is not None:
            yield name
            name = None if name == last else name.rpartition(".")[0]


def _is_off(value: Value) -> bool:
    return value is False or value == OFF or (isinstance(value, int) and value == 0)


def _in_domain(domain: Domain, value: Value) -> Value:
    """Return `value` with the type that the domain itself uses: 16 and 16.0 are one number."""
    if isinstance(domain, Choice):
        return domain.choices[domain.index(value)]
    return float(value) if isinstance(domain, Float) else value


def _key_problems(
    space: SearchSpace, given: Mapping[str, Value], genes_of: Mapping[str, list[Gene]], accepted: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield unknown keys and values outside the space, each with a message."""
    for key, value in given.items():
        owner, _, setting = key.partition(".")
        declared: Mapping[str, Domain | Value] = space.training if owner + "." == TRAINING else {}
        if owner in space.adapters:
            declared = space.adapters[owner].fields
        if genes_of[key]:
            if key not in accepted:
                yield (
                    key,
                    f"{value!r} is not in this space; use {_shown(declared.get(setting, genes_of[key][0].domain))}",
                )
        elif setting not in declared:
            settings = {gene.setting for gene in space.genes}
            names = settings | {gene.name for gene in space.genes}
            yield key, f"unknown gene or setting{did_you_mean(key, names) or did_you_mean(key, settings)}"
        elif declared[setting] != value:
            yield key, f"has the fixed value {declared[setting]!r} in this space, got {value!r}"


def _shown(domain: Domain | Value) -> str:
    if isinstance(domain, Choice):
        return f"one of {', '.join(map(str, domain.choices))}"
    assert not isinstance(domain, Value)
    return f"{domain.low} to {domain.high}"
