"""The ANOVA measure against scipy and statsmodels."""

from functools import partial

import definitions
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests
from torch import nn

from lightning_invariance import TransformationSet, evaluate, functional
from lightning_invariance.measures import Anova
from lightning_invariance.measures.significance import f_survival, rejected


def cube(n=9, m=4, k=40, effect=1.0):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(n, 1, k, generator=generator, dtype=torch.float64)
    columns = effect * torch.arange(m)[None, :, None] * torch.rand(k, generator=generator, dtype=torch.float64)
    return samples + columns + torch.randn(n, m, k, generator=generator, dtype=torch.float64)


def measured(st, **arguments):
    metric = Anova(**arguments)
    for rows in st.split(4):
        metric.update(rows)
    return metric.compute()


def test_one_way_anova_equals_scipy():
    expected = scipy.stats.f_oneway(*cube().transpose(0, 1).numpy())
    np.testing.assert_allclose(measured(cube(), statistic="f").numpy(), expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(measured(cube(), statistic="p").numpy(), expected.pvalue, rtol=1e-9)


def epsilon_of(st):
    """Greenhouse and Geisser's ε of the covariances of all units together, from numpy's covariance."""
    _, m, k = st.shape
    centring = np.eye(m) - 1 / m
    pooled = sum(centring @ np.cov(st[:, :, u].numpy().T) @ centring for u in range(k))
    return np.trace(pooled) ** 2 / ((m - 1) * np.trace(pooled @ pooled))


def test_paired_anova_equals_statsmodels():
    st = cube(k=3)
    epsilon = measured(st, statistic="epsilon", paired=True)
    assert epsilon.tolist() == pytest.approx([epsilon_of(st)] * 3, rel=1e-9)
    f, p, effect = (measured(st, statistic=statistic, paired=True) for statistic in ("f", "p", "effect"))
    for unit in range(3):
        rows = [(i, j, float(st[i, j, unit])) for i in range(9) for j in range(4)]
        table = (
            AnovaRM(pd.DataFrame(rows, columns=["sample", "t", "value"]), "value", "sample", ["t"]).fit().anova_table
        )
        assert f[unit].item() == pytest.approx(table["F Value"].item(), rel=1e-9)
        corrected = scipy.stats.f.sf(table["F Value"].item(), 3 * epsilon[0].item(), 24 * epsilon[0].item())
        assert p[unit].item() == pytest.approx(corrected, rel=1e-9)
        ratio = table["F Value"].item() * table["Num DF"].item() / table["Den DF"].item()
        assert effect[unit].item() == pytest.approx(ratio / (1 + ratio), rel=1e-9)


@pytest.mark.parametrize("d1", [1, 2, 3.7, 15, 4223])
@pytest.mark.parametrize("d2", [1, 7, 240, 55.3, 159984])
def test_the_f_distribution_equals_scipy(d1, d2):
    f = torch.cat([torch.zeros(1), torch.logspace(-6, 4, 300, dtype=torch.float64)])
    expected = scipy.stats.f.sf(f.numpy(), d1, d2)
    np.testing.assert_allclose(f_survival(f, d1, d2).numpy(), expected, rtol=1e-8, atol=1e-290)


@pytest.mark.parametrize("correction", ["bonferroni", "holm", "fdr_bh"])
@pytest.mark.parametrize("effect", [0.0, 0.6, 1.0])
def test_corrections_equal_statsmodels(correction, effect):
    p = functional.anova(cube(effect=effect), paired=True)[1]
    expected = multipletests(p.numpy(), 0.05, correction)[0]
    value = measured(cube(effect=effect), correction=correction, paired=True)
    assert value.tolist() == expected.astype(float).tolist()
    assert measured(cube(effect=effect), correction=None, paired=True).tolist() == (p <= 0.05).double().tolist()


def test_corrections_find_different_numbers_and_leave_out_nan():
    p = torch.tensor([0.001, 0.014, 0.018, 0.03, float("nan"), 0.6])
    # Of 5 known p-values: Bonferroni 0.01; Holm 0.01, 0.0125, ...; Benjamini-Hochberg 0.01, 0.02, 0.03, 0.04.
    assert rejected(p, 0.05, "bonferroni").tolist() == [True, False, False, False, False, False]
    assert rejected(p, 0.05, "holm").tolist() == [True, False, False, False, False, False]
    assert rejected(p, 0.05, "fdr_bh").tolist() == [True, True, True, True, False, False]


def test_special_cases():
    generator = torch.Generator().manual_seed(7)
    samples, columns = torch.rand(11, 1, generator=generator), torch.rand(1, 6, generator=generator)
    st = torch.stack([samples.expand(11, 6), columns.expand(11, 6), torch.full((11, 6), 0.1)], 2)
    for paired in (False, True):
        assert measured(st, statistic="f", paired=paired).tolist() == [0, float("inf"), 0]
        assert measured(st, statistic="p", paired=paired).tolist() == [1, 0, 1]
        assert measured(st, statistic="reject", paired=paired).tolist() == [0, 1, 0]
        assert measured(st, statistic="effect", paired=paired).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"`alpha` to be in \(0, 1\), but got 1.5"),
        ({"statistic": "t"}, "`statistic` to be .* but got 't'"),
        ({"correction": "sidak"}, "`correction` to be one of .* but got 'sidak'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Anova(**arguments)


def test_the_direction_depends_on_the_statistic():
    assert not Anova("f").higher_is_better
    assert Anova("p").higher_is_better


def exact_f(st):
    """The paired F in float64 by a two-way decomposition that shares nothing with the measure."""
    x = st.double().numpy()
    n, m = x.shape[:2]
    rows, columns, mean = x.mean(1, keepdims=True), x.mean(0, keepdims=True), x.mean((0, 1), keepdims=True)
    between = n * ((columns - mean) ** 2).sum((0, 1))
    error = ((x - rows - (x - rows).mean(0, keepdims=True)) ** 2).sum((0, 1))
    return between / (m - 1) / (error / ((m - 1) * (n - 1)))


@pytest.mark.parametrize(
    ("scale", "outlier", "n", "dtype"),
    [
        *((scale, outlier, 100, torch.float32) for scale in (1e-2, 1e-4, 1e-6) for outlier in (False, True)),
        (1e-2, False, 10_000, torch.float32),
        (1e-6, True, 10_000, torch.float32),
        (1e-4, True, 10_000, torch.float64),
    ],
)
def test_paired_f_of_nearly_invariant_units(scale, outlier, n, dtype):
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(n, 1, 40, generator=generator, dtype=torch.float64)
    st = samples + scale * torch.randn(n, 16, 40, generator=generator, dtype=torch.float64)
    if outlier:
        st[0] *= 1e6
    st = st.to(dtype)
    metric = Anova("f", paired=True)
    for rows in st.split(37):
        metric.update(rows)
    np.testing.assert_allclose(metric.compute().numpy(), exact_f(st), rtol=1e-7)


@pytest.mark.parametrize("of_transformations", [0.0, 10.0, 1e3])
def test_paired_f_of_large_layers_that_all_samples_change_alike(of_transformations):
    generator = torch.Generator().manual_seed(4)
    st = 100 * torch.randn(20, 1, 1500, generator=generator) + 1e-4 * torch.randn(20, 16, 1500, generator=generator)
    st += of_transformations * torch.randn(1, 16, 1500, generator=generator)
    metric = Anova("f", paired=True)
    for rows in st.split(7):
        metric.update(rows)
    np.testing.assert_allclose(metric.compute().numpy(), exact_f(st), rtol=1e-8)


def pooled_epsilon(st):
    """Greenhouse and Geisser's ε of the finite rows of every activation, in float64."""
    products = 0
    for unit in st.double().flatten(2).movedim(2, 0).numpy():
        rows = unit[np.isfinite(unit).all(1)]
        if not len(rows):
            continue
        rest = rows - rows.mean(1, keepdims=True)
        rest = rest - rest.mean(0)
        products = products + rest.T @ rest
    return np.trace(products) ** 2 / ((len(products) - 1) * (products**2).sum())


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("sample", [0, 1, 8])
def test_rows_that_are_not_finite_are_left_out_of_the_paired_test_of_the_others(special, sample):
    st = cube(effect=0.2)
    n, m = st.shape[:2]
    st[sample, 1:3, 3] = torch.tensor([special, 1e8])
    others = torch.arange(st.shape[2]) != 3
    f = measured(st, statistic="f", paired=True)
    expected = definitions.anova(st[..., others].numpy().astype(np.longdouble), "f", True)
    np.testing.assert_allclose(f[others].numpy(), expected.astype(float), rtol=1e-9)
    epsilon = pooled_epsilon(st)
    p = measured(st, statistic="p", paired=True)
    expected = scipy.stats.f.sf(expected.astype(float), epsilon * (m - 1), epsilon * (m - 1) * (n - 1))
    np.testing.assert_allclose(p[others].numpy(), expected, rtol=1e-9)
    for statistic in ("f", "p", "effect", "reject"):
        assert measured(st, statistic=statistic, paired=True)[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_epsilon_with_rows_that_are_not_finite_does_not_depend_on_order_splits_and_merges(dtype):
    st = nulls("smooth", n=30, k=20).to(dtype)
    for sample, unit in ((0, 0), (7, 1), (8, 1), (29, 2), (0, 3), (29, 3)):
        st[sample, sample % 3, unit] = (float("nan"), float("inf"), -float("inf"))[unit % 3]
    st[:, 0, 4] = float("nan")  # no row is finite
    expected = pooled_epsilon(st)
    for order in (torch.arange(30), torch.arange(29, -1, -1), torch.randperm(30, generator=torch.manual_seed(0))):
        for sizes in ([30], [1] * 30, [7, 7, 16]):
            metric = Anova("epsilon", paired=True)
            for rows in st[order].split(sizes):
                metric.update(rows)
            assert metric.compute()[5].item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-6)
        left, right = Anova("epsilon", paired=True), Anova("epsilon", paired=True)
        left.update(st[order][:1])
        right.update(st[order][1:])
        left.merge_state(right)
        assert left.compute()[5].item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [5, 24, 33])
@pytest.mark.parametrize("k", [1, 100])  # columns of single activations, and of long blocks, are summed in other orders
@pytest.mark.parametrize("paired", [False, True])
def test_constant_rows_are_exactly_invariant(dtype, m, k, paired):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(200, 1, k, generator=generator, dtype=dtype).expand(200, m, k).contiguous()
    constants = (torch.rand(k, generator=generator, dtype=dtype) - 0.5).expand(200, m, k).contiguous()
    for st in (rows, constants):
        for statistic in ("f", "reject", "effect"):
            metric = Anova(statistic, paired=paired)
            for block in st.split(64):
                metric.update(block)
            assert metric.compute().flatten().tolist() == [0] * k
        f, p, effect = functional.anova(st, paired=paired)
        assert f.tolist() == [0] * k
        assert p.tolist() == [1] * k
        assert effect.tolist() == [0] * k


def nulls(kind, n=100, m=16, k=4000):
    """Units whose columns have the same mean, but do not vary alike."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(n, m, k, generator=generator, dtype=torch.float64)
    samples = torch.randn(n, 1, k, generator=generator, dtype=torch.float64)
    angle = torch.arange(m) * 2 * torch.pi / m
    if kind == "smooth":  # neighbouring angles vary together
        waves = torch.stack([f(h * angle) / h for h in (1, 2, 3) for f in (torch.cos, torch.sin)])
        parts = torch.randn(n, len(waves), k, generator=generator, dtype=torch.float64)
        return samples + torch.einsum("iwu,wj->iju", parts, waves.double()) + 0.05 * noise
    if kind == "one noisy column":
        return samples + noise * torch.where(torch.arange(m) == 3, 5.0, 1.0)[:, None]
    slope = torch.randn(n, 1, k, generator=generator, dtype=torch.float64)
    return samples + slope * (torch.arange(m)[:, None] - (m - 1) / 2) / m + 0.2 * noise


@pytest.mark.parametrize("kind", ["smooth", "one noisy column", "random slope"])
def test_the_paired_test_keeps_its_level_where_columns_do_not_vary_alike(kind):
    st = nulls(kind)
    p = measured(st, statistic="p", paired=True)
    assert 0.03 <= (p < 0.05).double().mean() <= 0.07
    assert (p < 0.001).double().mean() <= 0.003
    uncorrected = scipy.stats.f.sf(measured(st, statistic="f", paired=True).numpy(), 15, 15 * 99)
    assert (uncorrected < 0.05).mean() > 0.09  # what the correction is for


@pytest.mark.parametrize("correction", ["bonferroni", "holm", "fdr_bh", None])
def test_a_family_of_all_activations_of_the_network(correction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 50)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    moved = TransformationSet.from_callables({str(k): partial(lambda x, k: x + 0.02 * k, k=k) for k in range(3)})
    measures = {"p": Anova("p", paired=True), "r": Anova(correction=correction, paired=True, family="network")}
    result = evaluate(model, x, moved, measures, progress=False)
    p = np.concatenate([values.numpy() for values in result["p"].values()])
    expected = p <= 0.05 if correction is None else multipletests(p, 0.05, correction)[0]
    found = np.concatenate([values.numpy() for values in result["r"].values()])
    assert found.tolist() == expected.astype(float).tolist()
    assert 0 < expected.sum() < len(expected)
    with pytest.raises(ValueError, match="`family` to be .layer. or .network., but got .all."):
        Anova(family="all")


@pytest.mark.parametrize("d1", [1, 1.3, 2.7, 15])
def test_the_p_value_of_the_definition_equals_scipy(d1):
    for f in (0, 1e-6, 0.02, 0.9, 1.4, 30):
        for d2 in (3.1, 40, 1584.5):
            expected = scipy.stats.f.sf(f, d1, d2)
            assert functional.anova.__globals__["p_value"](f, d1, d2) == pytest.approx(expected, rel=1e-9, abs=1e-290)
