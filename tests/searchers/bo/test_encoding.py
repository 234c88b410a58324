"""What `bo` makes of many points at once, against the space one by one; and its search among them."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.search_space import PRESETS, AdapterChoice, Choice, Float, Int, SearchSpace
from autopeft.search_space.problem import declared_costs
from autopeft.searchers.bo.acquisition_optimizer import TIE, Acquisition, keys_of, mutants, neighbours, propose
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows, smallest
from autopeft.testing.spaces import SMALL, encoder

from ...support.spaces import spaces

RATE = Float(low=1e-4, high=1e-1, log=True)
RANKS = Choice.of([0, 1, 2, 4, 8])


def preset_space(name: str) -> SearchSpace:
    backbone = encoder(num_layers=3)
    training = {"learning_rate": RATE, "batch_size": Int(low=1, high=200), "schedule": Choice.of(("linear", "cosine"))}
    return SearchSpace(backbone=backbone, training=training, **PRESETS[name].space(backbone))


any_space = st.one_of(spaces(), st.sampled_from(sorted(PRESETS)).map(preset_space))


def points_of(space: SearchSpace, seed: int, count: int = 10) -> list[dict]:
    return [*(space.sample(Random(f"{seed}/{i}")) for i in range(count)), space.smallest(), space.largest()]


# Rows


@settings(max_examples=60, deadline=None)
@given(any_space, st.integers(0, 99))
def test_rows_are_what_the_space_encodes(space: SearchSpace, seed: int) -> None:
    encoding = Encoding(space)
    points = points_of(space, seed)
    rows = encoding.rows(points)
    active = encoding.active(rows)
    for point, row, on in zip(points, rows, active, strict=True):
        unit, mask = space.encode(point)
        assert on.tolist() == mask
        assert row[on].tolist() == np.array(unit)[on].tolist()
        assert encoding.assignment(row) == point
    assert np.array_equal(encoding.snapped(rows), rows), "inactive genes stand at values too"


@settings(max_examples=60, deadline=None)
@given(any_space, st.integers(0, 99))
def test_declared_costs_are_exact(space: SearchSpace, seed: int) -> None:
    encoding = Encoding(space)
    points = points_of(space, seed)
    rows = encoding.rows(points)
    active = encoding.active(rows)
    costs = encoding.costs(rows, active)
    empty = encoding.is_empty(rows, active)
    for i, point in enumerate(points):
        architecture = space.decode(point).architecture
        assert {name: column[i] for name, column in costs.items()} == declared_costs(architecture, space.backbone)
        assert empty[i] == (not architecture)


@settings(max_examples=60, deadline=None)
@given(any_space, st.integers(0, 99))
def test_what_is_inactive_does_not_count(space: SearchSpace, seed: int) -> None:
    """And all that is active does: points with other active genes have other features."""
    encoding = Encoding(space)
    rows = encoding.rows(points_of(space, seed))
    active = encoding.active(rows)
    others = np.where(active, rows, encoding.draw(len(rows), np.random.default_rng(seed)))
    assert np.array_equal(encoding.active(others), active)
    features = encoding.features(rows, active)
    assert features.shape == (len(rows), len(encoding.gene_of_feature))
    assert np.array_equal(encoding.features(others, active), features)
    assert keys_of(others, active) == keys_of(rows, active)
    assert [encoding.assignment(row) for row in others] == [encoding.assignment(row) for row in rows]
    for name, column in encoding.costs(others, active).items():
        assert np.array_equal(column, encoding.costs(rows, active)[name])
    assert features.min(initial=0.0) >= 0.0
    assert features.max(initial=1.0) <= 1.0
    assert len(np.unique(features, axis=0)) == len(set(keys_of(rows, active)))


def test_distances_of_features() -> None:
    """Rank 0 is one step from rank 1, values without order are at distance 1, and what is inactive is at none."""
    fields = {"rank": RANKS, "scaling": Choice(choices=("alpha", "rslora")), "dropout": Float(low=0.0, high=0.5)}
    space = SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", fields=fields)})
    encoding = Encoding(space)
    on = {"lora.rank.on": True, "lora.scaling": "alpha", "lora.dropout": 0.25}
    points = [{"lora.rank.on": False}, *({**on, "lora.rank": rank} for rank in (1, 2, 4, 8)),
              {**on, "lora.rank": 8, "lora.scaling": "rslora"}]  # fmt: skip
    rows = encoding.rows(points)
    features = encoding.features(rows, encoding.active(rows))
    size = features[:, encoding.gene_of_feature.index("lora.rank")]
    assert size[0] == 0.0
    steps = np.diff(size[:5])
    assert np.allclose(steps, steps[0])
    assert steps[0] > 0.2
    assert np.linalg.norm(features[4] - features[5]) == pytest.approx(1.0)
    middle = features[:, encoding.gene_of_feature.index("lora.dropout")]
    assert np.allclose(middle, 0.5), "the middle of the range, as far from all values as can be"


@settings(max_examples=40, deadline=None)
@given(any_space, st.integers(0, 99))
def test_draws_are_points_of_the_space(space: SearchSpace, seed: int) -> None:
    encoding = Encoding(space)
    rng = np.random.default_rng(seed)
    drawn = encoding.draw(20, rng)
    for rows in (drawn, mutants(encoding, drawn, rng)):
        active = encoding.active(rows)
        assert np.array_equal(encoding.snapped(rows), rows)
        for row, on in zip(rows, active, strict=True):
            point = encoding.assignment(row)
            assert space.contains(point)
            again = encoding.rows([point])[0]
            assert np.array_equal(again[on], row[on])


def test_draws_come_near_the_ends() -> None:
    """Of 24 gates, independent draws have 12 open and never fewer than 3."""
    backbone = encoder(num_layers=12)
    encoding = Encoding(SearchSpace(backbone=backbone, **PRESETS["lora-per-layer"].space(backbone)))
    gates = [g for g, gene in enumerate(encoding.genes) if gene.size is not None]
    assert len(gates) == 24
    rows = encoding.draw(400, np.random.default_rng(0))
    num_open = (rows[:, gates] > 0.5).sum(1)
    assert num_open.min() <= 1
    assert num_open.max() >= 23
    assert np.quantile(num_open, 0.15) < 6
    assert np.quantile(num_open, 0.85) > 18
    sizes = rows[:, [g for g, gene in enumerate(encoding.genes) if gene.name.startswith("attn.rank.layers")]].mean(1)
    assert sizes.min() < 0.2
    assert sizes.max() > 0.8


# Search


def finite_space(num_layers: int = 3) -> SearchSpace:
    fields = {"rank": RANKS, "scaling": Choice(choices=("alpha", "rslora"))}
    lora = AdapterChoice(kind="lora", at=("attn.q",), fields=fields, vary={"rank": "layer"})
    beside = AdapterChoice(kind="bottleneck", at=("mlp",), fields={"size": Choice.of([0, 2, 4, 8])},
                           vary={"size": "layer"})  # fmt: skip
    adapters = {"lora": lora} if num_layers == 3 else {"lora": lora, "beside": beside}
    return SearchSpace(backbone=SMALL, adapters=adapters)


def every_point(encoding: Encoding) -> Rows:
    """Each point once."""
    levels = [level for level in encoding.levels if level is not None]
    rows = np.array(list(product(*levels)))
    places = {key: i for i, key in enumerate(keys_of(rows, encoding.active(rows)))}
    return rows[list(places.values())]


def hill(encoding: Encoding, seed: int) -> Acquisition:
    """One summit, somewhere: a sum of concave terms over the features."""
    rng = np.random.default_rng(seed)
    width = len(encoding.gene_of_feature)
    summit, weight = rng.random(width), rng.uniform(0.5, 4.0, size=width)
    return lambda rows, active: -((encoding.features(rows, active) - summit) ** 2) @ weight


nothing = np.zeros((0, 0))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_layers", [3, 6])
def test_the_best_point_is_found(num_layers: int, seed: int) -> None:
    """Of 250 points, which the draws cover, and of 16,000, where the steps have to lead there."""
    encoding = Encoding(finite_space(num_layers))
    judge = hill(encoding, seed)
    rows = every_point(encoding)
    best = judge(rows, encoding.active(rows)).max()
    found = propose(encoding, judge, nothing, np.random.default_rng(seed))
    assert found is not None
    assert judge(found[None], encoding.active(found[None]))[0] > best - TIE - TIE / 4


def test_real_numbers_are_tuned() -> None:
    training = {"learning_rate": RATE, "weight_decay": Float(low=0.0, high=0.1), "batch_size": Int(low=1, high=500)}
    space = SearchSpace(backbone=SMALL, adapters={"norm": AdapterChoice(kind="norm")}, training=training)
    encoding = Encoding(space)
    goal = np.array([0.31, 0.87, 0.55])
    found = propose(encoding, lambda rows, active: -4 * ((rows - goal) ** 2).sum(1), nothing, np.random.default_rng(0))
    assert found is not None
    assert np.abs(found - goal).max() < 0.1


def test_of_equals_the_smallest_is_taken() -> None:
    encoding = Encoding(finite_space())
    rows = every_point(encoding)
    active = encoding.active(rows)
    sizes = encoding.costs(rows, active)["num_params"]

    def flat(rows: Rows, active: Mask) -> Rows:
        """The larger, the better, by less than can be told."""
        return np.where(encoding.is_empty(rows, active), -np.inf, encoding.costs(rows, active)["num_params"] * 1e-6)

    found = propose(encoding, flat, nothing, np.random.default_rng(0))
    assert found is not None
    assert encoding.costs(found[None], encoding.active(found[None]))["num_params"][0] == sizes[sizes > 0].min()

    def steep(rows: Rows, active: Mask) -> Rows:
        return flat(rows, active) * 1e6

    found = propose(encoding, steep, nothing, np.random.default_rng(0))
    assert found is not None
    assert encoding.costs(found[None], encoding.active(found[None]))["num_params"][0] == sizes.max()


@pytest.mark.parametrize("seed", range(5))
def test_what_is_forbidden_is_not_proposed(seed: int) -> None:
    encoding = Encoding(finite_space())
    rows = every_point(encoding)
    rng = np.random.default_rng(seed)
    worth = hill(encoding, seed)
    order = np.argsort(-worth(rows, encoding.active(rows)))
    # The best half, where the search is heading, and the points that it starts from.
    best = rows[order[: len(rows) // 2]]
    keys = set(keys_of(best, encoding.active(best)))

    def judge(rows: Rows, active: Mask) -> Rows:
        return np.where([key in keys for key in keys_of(rows, active)], -np.inf, worth(rows, active))

    found = propose(encoding, judge, best[:5], rng)
    assert found is not None
    assert np.isfinite(judge(found[None], encoding.active(found[None])))[0]
    left = worth(rows, encoding.active(rows))[order[len(rows) // 2 :]]
    assert (left > worth(found[None], encoding.active(found[None]))[0] + TIE).mean() < 0.1


@pytest.mark.parametrize("starts", [nothing, np.full((1, 7), 0.5)])
def test_nothing_is_proposed_where_all_is_forbidden(starts: Rows) -> None:
    encoding = Encoding(finite_space())
    starts = encoding.snapped(starts) if len(starts) else starts

    def judge(rows: Rows, active: Mask) -> Rows:
        return np.full(len(rows), -np.inf)

    assert propose(encoding, judge, starts, np.random.default_rng(0)) is None


@settings(max_examples=60, deadline=None)
@given(any_space, st.integers(0, 99))
def test_neighbours(space: SearchSpace, seed: int) -> None:
    """All points of the space, and among them every change of one gene; a real number moves both ways."""
    encoding = Encoding(space)
    for point in points_of(space, seed, count=2):
        row = encoding.rows([point])[0]
        around = neighbours(encoding, row, np.random.default_rng(seed))
        assert np.array_equal(encoding.snapped(around), around)
        assert all(space.contains(encoding.assignment(other)) for other in around)
        found = {other.tobytes() for other in around}
        for g, gene in enumerate(encoding.genes):
            if gene.name not in point:
                continue
            if encoding.levels[g] is None:
                moves = [other[g] - row[g] for other in around if (np.delete(other, g) == np.delete(row, g)).all()]
                assert any(move > 0 for move in moves) or row[g] > 0.95
                assert any(move < 0 for move in moves) or row[g] < 0.05
                continue
            for value in gene.domain.neighbours(point[gene.name]):
                changed = row.copy()
                changed[g] = gene.domain.to_unit(value)
                assert changed.tobytes() in found


def test_neighbours_move_a_size_elsewhere() -> None:
    """Two layers change places: their ranks, or whether they have one."""
    encoding = Encoding(finite_space())
    point = {"lora.rank.on.layers.0": True, "lora.rank.on.layers.1": True, "lora.rank.on.layers.2": False,
             "lora.rank.layers.0": 1, "lora.rank.layers.1": 8, "lora.scaling": "alpha"}  # fmt: skip
    row = encoding.rows([point])[0]
    around = [neighbours(encoding, row, np.random.default_rng(seed)) for seed in range(20)]
    found = [encoding.assignment(other) for other in np.vstack(around)]
    assert {**point, "lora.rank.layers.0": 8, "lora.rank.layers.1": 1} in found
    assert any(not other["lora.rank.on.layers.0"] and other["lora.rank.on.layers.2"] for other in found)


def test_the_smallest_candidates_have_an_adapter() -> None:
    space = SearchSpace(
        backbone=SMALL,
        adapters={"lora": AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 1, 8])}, vary={"rank": "layer"})},
    )
    found = [candidate.architecture.num_params(SMALL) for candidate in smallest(space)]
    drawn = (space.decode(space.sample(Random(i))).architecture for i in range(500))
    assert min(found) == min(drawing.num_params(SMALL) for drawing in drawn if drawing) > 0


def test_the_size_is_in_the_unit_of_the_rate() -> None:
    encoding = Encoding(SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", fields={"rank": 4})},
                                    training={"learning_rate": Float(low=1e-4, high=1e-2, log=True)}))  # fmt: skip
    rows = encoding.rows([{"training.learning_rate": 1e-3}, {"training.learning_rate": 1e-2}])
    inputs = encoding.inputs(rows, encoding.active(rows), np.array([1000.0, 10.0]))
    # A rate ten times as high and a size a hundredth: with a tilt of 1/2 both are the same relative rate.
    assert inputs[0, 0] + 0.5 * inputs[0, 1] == pytest.approx(inputs[1, 0] + 0.5 * inputs[1, 1])
