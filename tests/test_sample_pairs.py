"""The sample distance of a walk: pairs of samples in groups, against the definition, and its standard error."""

import math
from functools import reduce

import pytest
import torch
from definitions import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch import nn
from torch.utils.data import IterableDataset

from lightning_invariance import InvarianceResult, TransformationSet, evaluate, functional, quarter_turns, rotations
from lightning_invariance.accumulators import GroupedPairs
from lightning_invariance.accumulators.grouped_pairs import mean_and_error
from lightning_invariance.accumulators.rows import Rows
from lightning_invariance.measures import (
    DistanceSameEquivariance,
    NormalizedDistance,
    SampleDistance,
    TransformationDistance,
)

TURNS = rotations(4)
FLAT = nn.Sequential(nn.Flatten())
IMAGES = torch.rand(50, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()


def in_order(data):
    """The samples as a walk takes them."""
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]


def activations_of(model, images):
    with torch.no_grad():
        return model(TURNS(in_order(images)).flatten(0, 1)).unflatten(0, (len(images), len(TURNS)))


def defined(cube, groups, metric="cityblock"):
    """The mean distance of pairs that share a group, times (n − 1) / n: ``(vectors,)`` of ``(n, m, vectors, size)``."""
    n, m, vectors, _ = cube.shape
    distances = torch.zeros(vectors, dtype=torch.float64)
    pairs = 0
    for group in groups:
        for column in range(m):
            found = [pdist(cube[group, column, vector].numpy(), metric).sum() for vector in range(vectors)]
            distances += torch.tensor(found, dtype=torch.float64)
            pairs += math.comb(len(group), 2)
    return distances / pairs * (n - 1) / n


@pytest.mark.parametrize("samples", [2, 3, 16, 49])
@pytest.mark.parametrize("batch_size", [3, 4, 30, 64, 200])
def test_the_sample_distance_is_over_pairs_in_groups(samples, batch_size):
    model = network()
    found = evaluate(model, IMAGES, TURNS, SampleDistance(samples=samples), batch_size=batch_size, progress=False)
    expected = defined(activations_of(model, IMAGES)[..., None], groups_of(50, samples))
    torch.testing.assert_close(found["SampleDistance"]["3"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("distance", "metric"), [("abs", "cityblock"), ("euclidean",) * 2, ("cosine",) * 2])
def test_distances_of_feature_maps_in_groups(distance, metric):
    model = network()[:1]
    measure = SampleDistance(distance, "channel", samples=7)
    found = evaluate(model, IMAGES, TURNS, measure, batch_size=12, progress=False)["SampleDistance"]["0"]
    expected = defined(activations_of(model, IMAGES).flatten(3), groups_of(50, 7), metric)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_smaller_groups_lie_within_larger_ones():
    model = network()
    measures = {"3": SampleDistance(samples=3), "10": SampleDistance(samples=10)}
    found = evaluate(model, IMAGES, TURNS, measures, batch_size=12, progress=False)
    cube = activations_of(model, IMAGES)[..., None]
    torch.testing.assert_close(found["10"]["3"], defined(cube, groups_of(50, 10)), rtol=1e-9, atol=0)
    smaller = [[run[i] for i in group] for run in groups_of(50, 10) for group in groups_of(len(run), 3)]
    torch.testing.assert_close(found["3"]["3"], defined(cube, smaller), rtol=1e-9, atol=0)


def test_maps_that_are_mapped_back_are_grouped_too_whatever_else_is_measured():
    model, turns = network()[:1], quarter_turns()
    measure = DistanceSameEquivariance(distance="abs", normalize=False, normalized_by="samples", samples=7)
    alone = evaluate(model, IMAGES, turns, {"DSE": measure}, progress=False)["DSE"]["0"]
    with torch.no_grad():
        st = model(turns(in_order(IMAGES)).flatten(0, 1)).unflatten(0, (50, 4))
    back = torch.stack([st[:, turn].rot90(-turn, (-2, -1)) for turn in range(4)], 1)
    rows = [functional.transformation_distance(back, "abs", "channel"), defined(back.flatten(3), groups_of(50, 7))]
    torch.testing.assert_close(alone, rows[0] / rows[1], rtol=1e-9, atol=0)
    beside = evaluate(model, IMAGES, turns, {"DSE": measure, "SD": SampleDistance(samples=7)}, progress=False)
    assert torch.equal(beside["DSE"]["0"], alone)


def test_units_that_fire_for_one_sample_are_finite():
    values = torch.zeros(160, 1, 2, 2, dtype=torch.float64)
    values[77, 0, 0, 1] = 3.0
    found = evaluate(FLAT, values, TURNS, NormalizedDistance(), progress=False)["NormalizedDistance"]
    expected = functional.normalized_distance(TURNS(values).flatten(2))
    assert expected.isfinite().all()
    torch.testing.assert_close(found["0"], expected, rtol=1e-9, atol=0)  # the same for every choice of ten groups of 16


class Sorted(IterableDataset):
    """Four classes far apart, one after the other."""

    def __init__(self, seed):
        noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.values = noise + 5.0 * (torch.arange(64) // 16)[:, None, None, None]

    def __iter__(self):
        return iter(self.values)


@pytest.mark.parametrize("stream", [False, True])
def test_data_sorted_by_class_do_not_bias_it(stream):
    ratios = []
    for seed in range(30):
        data = Sorted(seed)
        found = evaluate(
            FLAT,
            data if stream else data.values,
            TURNS,
            SampleDistance(samples=4),
            max_samples=64,
            progress=False,
        )
        exact = functional.sample_distance(TURNS(data.values).flatten(2))
        ratios.append((found["SampleDistance"]["0"] / exact).mean())
    ratio = torch.stack(ratios)
    if stream:  # one choice of samples for all seeds: its own error stays, about 0.7 / √(4 · 4) of the distance
        assert ratio.mean().item() == pytest.approx(1, abs=0.35)
    else:
        assert ratio.mean().item() == pytest.approx(1, abs=0.1)


def test_equal_rows_without_numbers_are_kept_one_by_one():
    # Nine of ten rows are equal: were they named by their values, all or none of them would be kept.
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(300):
        values = torch.randn(100, generator=generator, dtype=torch.float64)
        cube = torch.where(torch.arange(100) < 90, values[0], values)
        cube = cube[torch.randperm(100, generator=generator)][:, None].expand(100, 4)[..., None]
        metric = SampleDistance(samples=8)
        metric.update(cube)
        ratios.append(metric.compute().item() / (2 * pdist(cube[:, 0].numpy(), "cityblock").sum() / 100**2))
    ratio = torch.tensor(ratios)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 0.7  # 32 values are kept, of which about three are others


class Gate(nn.Module):
    """Some batches take a way of their own."""

    def __init__(self):
        super().__init__()
        self.rare = nn.ReLU()

    def forward(self, x):
        return self.rare(x) if x[0, 0, 0, 0] > 0.5 else x


@pytest.mark.filterwarnings("ignore:1 layer is reached")
def test_a_layer_that_runs_for_some_blocks_only():
    images = IMAGES[:24].clone()
    fires = torch.zeros(24, dtype=torch.bool)
    fires[torch.tensor([0, 3, 4, 5, 11, 17, 18, 23])] = True
    shuffled = in_order(images)
    shuffled[:, 0] = torch.where(fires, 0.9, 0.1).double()[:, None, None]
    images[torch.randperm(24, generator=torch.Generator().manual_seed(0))] = shuffled
    found = evaluate(Gate(), images, TURNS, SampleDistance(samples=4), batch_size=4, layers="rare", progress=False)
    assert found.reached == {"rare": 8}
    cube = TURNS(shuffled).flatten(2)[..., None]
    groups = [[i for i in group if fires[i]] for group in groups_of(24, 4)]
    expected = defined(cube, groups) / (23 / 24) * (7 / 8)
    torch.testing.assert_close(found["SampleDistance"]["rare"].flatten(), expected, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:NaN")
def test_not_a_number_stays_in_its_unit():
    images = IMAGES.clone()
    images[20, 1, 2, 3], images[40, 0, 1, 1] = math.inf, math.nan
    model = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten()).double()
    same = TransformationSet.from_callables({"as it is": lambda x: x, "half": lambda x: x / 2})
    for over in ("activation", "channel"):
        found = evaluate(model, IMAGES.clone(), same, SampleDistance(over=over), layers="0", progress=False)
        assert not found["SampleDistance"]["0"].isnan().any()
        found = evaluate(model, images, same, SampleDistance(over=over), layers="0", progress=False)
        assert found["SampleDistance"]["0"].isnan().sum() == 2  # one of each channel


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 40),
    samples=st.integers(2, 6),
    more=st.integers(0, 7),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_split_and_order_of_merging_gives_the_pairs_in_groups(n, samples, more, ranks, seed, data):
    generator = torch.Generator().manual_seed(seed)
    cube = torch.randn(n, 3, 2, generator=generator, dtype=torch.float64)
    arrives = torch.rand(n, generator=generator) < data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    pairs = GroupedPairs("abs", "activation", samples, samples + more, n)
    runs = groups_of(n, samples + more)
    groups = [[run[i] for i in group] for run in runs for group in groups_of(len(run), samples)]
    parts = []
    for rank in range(ranks):
        own = [i for run in runs[rank::ranks] for i in run if arrives[i]]
        states, before = pairs.empty(), 0
        while before < len(own):
            taken = own[before : before + data.draw(st.integers(1, 9))]
            pairs.add(states, Rows(cube[taken], torch.tensor(taken), before=before))
            before += len(taken)
        parts.append(states)
    parts = [parts[i] for i in torch.randperm(ranks, generator=generator).tolist() if parts[i]["groups"].numel()]
    if not parts:
        return
    mean = mean_and_error(reduce(pairs.merge, parts) | pairs.added(reduce(pairs.merge, parts)))[0]
    seen = [[i for i in group if arrives[i]] for group in groups]
    if all(len(group) < 2 for group in seen):
        assert mean.isnan().all()
    else:
        torch.testing.assert_close(mean, defined(cube[..., None], seen) * n / (n - 1), rtol=1e-9, atol=0)


def test_the_standard_error_is_over_groups(tmp_path):
    model = network()
    measures = [SampleDistance(samples=10), NormalizedDistance(samples=10), TransformationDistance()]
    result = evaluate(model, IMAGES, TURNS, measures, progress=False)
    cube = activations_of(model, IMAGES)[..., None]
    of_groups = torch.stack([defined(cube, [group]) for group in groups_of(50, 10)])  # five groups of equal size
    error = of_groups.std(0) / math.sqrt(5)
    torch.testing.assert_close(result.standard_errors["SampleDistance"]["3"], error, rtol=1e-9, atol=0)
    sd, nd = result["SampleDistance"]["3"], result["NormalizedDistance"]["3"]
    torch.testing.assert_close(result.standard_errors["NormalizedDistance"]["3"], nd * error / sd, rtol=1e-9, atol=0)
    assert "TransformationDistance" not in result.standard_errors
    result.save(tmp_path / "result.npz")
    read = InvarianceResult.load(tmp_path / "result.npz")
    assert torch.equal(read.standard_errors["SampleDistance"]["3"], result.standard_errors["SampleDistance"]["3"])
    assert result.reduced().standard_errors == {}


def test_the_standard_error_is_the_spread_over_other_samples():
    generator = torch.Generator().manual_seed(1)
    values, errors = [], []
    for _ in range(60):
        images = torch.randn(160, 1, 3, 3, generator=generator, dtype=torch.float64)
        result = evaluate(FLAT, images, TURNS, SampleDistance(), progress=False)
        values.append(result["SampleDistance"]["0"])
        errors.append(result.standard_errors["SampleDistance"]["0"])
    spread, error = torch.stack(values).std(0), torch.stack(errors).square().mean(0).sqrt()
    assert (error / spread).log().mean().exp().item() == pytest.approx(1, abs=0.1)


def test_one_group_has_no_error():
    result = evaluate(network(), IMAGES[:9], TURNS, SampleDistance(), progress=False)
    assert result.standard_errors["SampleDistance"]["3"].isnan().all()
