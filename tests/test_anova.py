"""The ANOVA measure against scipy and statsmodels."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests

from lightning_invariance import functional
from lightning_invariance.measures import Anova
from lightning_invariance.measures.f_distribution import f_survival, rejected


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


def test_one_way_is_that_of_scipy():
    expected = scipy.stats.f_oneway(*cube().transpose(0, 1).numpy())
    np.testing.assert_allclose(measured(cube(), statistic="f").numpy(), expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(measured(cube(), statistic="p").numpy(), expected.pvalue, rtol=1e-9)


def test_paired_is_that_of_statsmodels():
    st = cube(k=3)
    f, p, effect = (measured(st, statistic=statistic, paired=True) for statistic in ("f", "p", "effect"))
    for unit in range(3):
        rows = [(i, j, float(st[i, j, unit])) for i in range(9) for j in range(4)]
        table = (
            AnovaRM(pd.DataFrame(rows, columns=["sample", "t", "value"]), "value", "sample", ["t"]).fit().anova_table
        )
        assert f[unit].item() == pytest.approx(table["F Value"].item(), rel=1e-9)
        assert p[unit].item() == pytest.approx(table["Pr > F"].item(), rel=1e-9)
        ratio = table["F Value"].item() * table["Num DF"].item() / table["Den DF"].item()
        assert effect[unit].item() == pytest.approx(ratio / (1 + ratio), rel=1e-9)


@pytest.mark.parametrize("d1", [1, 2, 15, 4223])
@pytest.mark.parametrize("d2", [1, 7, 240, 159984])
def test_the_f_distribution_is_that_of_scipy(d1, d2):
    f = torch.cat([torch.zeros(1), torch.logspace(-6, 4, 300, dtype=torch.float64)])
    expected = scipy.stats.f.sf(f.numpy(), d1, d2)
    np.testing.assert_allclose(f_survival(f, d1, d2).numpy(), expected, rtol=1e-8, atol=1e-290)


@pytest.mark.parametrize("correction", ["bonferroni", "holm", "fdr_bh"])
@pytest.mark.parametrize("effect", [0.0, 0.6, 1.0])
def test_corrections_are_those_of_statsmodels(correction, effect):
    p = functional.anova(cube(effect=effect), paired=True)[1]
    expected = multipletests(p.numpy(), 0.05, correction)[0]
    value = measured(cube(effect=effect), correction=correction, paired=True)
    assert value.tolist() == expected.astype(float).tolist()
    assert measured(cube(effect=effect), correction=None, paired=True).tolist() == (p <= 0.05).double().tolist()


def test_corrections_find_different_numbers_and_leave_out_nan():
    p = torch.tensor([0.001, 0.014, 0.018, 0.03, float("nan"), 0.6])
    # Of 5 known: Bonferroni 0.01; Holm 0.01, 0.0125, ...; Benjamini-Hochberg 0.01, 0.02, 0.03, 0.04.
    assert rejected(p, 0.05, "bonferroni").tolist() == [True, False, False, False, False, False]
    assert rejected(p, 0.05, "holm").tolist() == [True, False, False, False, False, False]
    assert rejected(p, 0.05, "fdr_bh").tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("paired", [False, True])
def test_the_false_positive_rate_under_a_true_null_is_alpha(paired):
    # Independent values, so that both tests hold their level; 20,000 tests give a standard error of 0.0015.
    st = torch.randn(12, 6, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = Anova(correction=None, paired=paired)
    metric.update(st)
    assert metric.compute().mean().item() == pytest.approx(0.05, abs=0.006)


def test_with_samples_that_differ_only_the_paired_test_holds_its_level():
    generator = torch.Generator().manual_seed(2)
    samples = 3 * torch.randn(12, 1, 20_000, generator=generator, dtype=torch.float64)
    st = samples + torch.randn(12, 6, 20_000, generator=generator, dtype=torch.float64)
    rates = {}
    for paired in (False, True):
        metric = Anova(correction=None, paired=paired)
        metric.update(st)
        rates[paired] = metric.compute().mean().item()
    assert rates[True] == pytest.approx(0.05, abs=0.006)
    assert rates[False] < 0.001  # it takes the samples for noise


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
