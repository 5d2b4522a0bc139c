"""Statistics of the study: intervals, paired differences, permutation test, bootstrap.

Used by lab.analyze. Intervals are 95 %: `mean` and `half`, the half-width, by Student's t; `value`,
`low` and `high` by bootstrap over prompts. Values of runs are {(base policy, number): value};
groups are lists of (n, columns), one array per prompt.
"""

import itertools

import numpy as np

# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_t_ci(values):
    """Mean and half-width of its 95 % interval by Student's t; half is NaN for one value."""
    n = len(values)
    half = T95[min(n, 31) - 2] * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return dict(mean=float(np.mean(values)), half=float(half), n=n)


def paired_difference(one, other):
    """Difference of two variants over the (base policy, number) that both have; None without any.

    one, other: {(base, number): value}. Returns mean, half and n over pairs, the number of positive
    pairs, and `bases`: mean, half and n over the base policies' mean differences.
    """
    by_base = {}
    for base, number in sorted(one.keys() & other.keys()):
        by_base.setdefault(base, []).append(one[base, number] - other[base, number])
    if not by_base:
        return None
    pairs = [d for differences in by_base.values() for d in differences]
    bases = mean_t_ci([np.mean(differences) for differences in by_base.values()])
    return mean_t_ci(pairs) | dict(positive=sum(d > 0 for d in pairs), bases=bases)


def compare_spread(one, other, seed=0, swaps=10_000):
    """Test whether two variants differ in their spread between runs, by paired permutation.

    Statistic: log of the ratio of the standard deviations within base policies, of which those with
    one pair are left out. Each variant's mean is subtracted first. Under the null hypothesis the
    labels of any pair may be swapped: all swaps up to 12 pairs, else random ones. one, other:
    {(base, number): value}. Returns std, std_other, n pairs, two-sided p; None if n < 2.
    """
    keys = sorted(one.keys() & other.keys())
    bases = np.array([base for base, _ in keys])
    keep = [(bases == base).sum() > 1 for base in bases]
    x = np.array([(one[key], other[key]) for key in keys])[keep]  # (n, 2)
    if not len(x):
        return None
    bases, x, n = bases[keep], x - x.mean(0), len(x)
    if n <= 12:
        swapped = np.array(list(itertools.product((False, True), repeat=n)))
    else:
        swapped = np.random.RandomState(seed).rand(swaps, n) < 0.5
        swapped[0] = False  # the labels as they are count too: p is at least 1 / swaps

    def stds(x):  # (m, n) -> (m,)
        groups = [x[:, bases == base] for base in np.unique(bases)]
        squares = sum(((g - g.mean(1, keepdims=True)) ** 2).sum(1) for g in groups)
        return np.sqrt(squares / (n - len(groups)))

    std, std_other = stds(np.where(swapped, *x.T[::-1])), stds(np.where(swapped, *x.T))
    statistic = np.abs(np.log(np.maximum(std, 1e-9) / np.maximum(std_other, 1e-9)))
    p = float(np.mean(statistic >= statistic[0] - 1e-9))
    return dict(std=float(std[0]), std_other=float(std_other[0]), n=n, p=p)


def ranks(values):
    """Rank values from 0, ties by their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def ranked(groups):
    """Replace each column of the groups by its ranks over all groups. groups: list of (n, k)."""
    columns = np.stack([ranks(column) for column in np.concatenate(groups).T], 1)
    return np.split(columns, np.cumsum([len(g) for g in groups])[:-1])


def within(groups):
    """Subtract each group's mean."""
    return [g - g.mean(0) for g in groups]


def bootstrap(sums, statistic, config):
    """A statistic and its 95 % percentile interval over resampled prompts.

    sums: (prompts, ...), what each prompt adds to the sums; statistic: (m, ...) sums -> (m,).
    """
    n = len(sums)
    counts = np.random.RandomState(config.seed).multinomial(n, [1 / n] * n, config.resamples)
    values = statistic(np.tensordot(counts, sums, 1))
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
    return dict(value=float(statistic(sums.sum(0)[None])[0]), low=float(low), high=float(high), n=n)


def bootstrap_mean(groups, config):
    """Mean of all values with its bootstrap interval. groups: a list of (n,), one per prompt."""
    sums = np.array([(len(g), np.sum(g)) for g in groups], float)
    return bootstrap(sums, lambda s: s[:, 1] / s[:, 0], config)


def correlate(groups, config):
    """Pearson's correlation of the first two columns with its bootstrap interval; of three columns,
    their partial correlation given the third. groups: a list of (n, 2) or (n, 3), one per prompt.
    NaN if a column does not vary."""
    together = np.concatenate(groups)
    scale = together.std(0)
    if (scale < 1e-9).any():
        return dict(value=np.nan, low=np.nan, high=np.nan, n=len(groups))
    columns = [np.insert((g - together.mean(0)) / scale, 0, 1, axis=1) for g in groups]
    return bootstrap(np.array([x.T @ x for x in columns]), correlation, config)


def correlation(sums):
    """Correlation from sums of products of (1, x, y), partial if of (1, x, y, z). (m, k, k) ->
    (m,)."""
    mean = sums[:, 0] / sums[:, :1, 0]  # (m, k)
    cov = sums / sums[:, :1, :1] - mean[:, :, None] * mean[:, None]
    if sums.shape[1] == 4:  # what is left of x and y without their regression on z
        z = np.maximum(cov[:, 3:, 3:], 1e-12)
        cov = cov - cov[:, :, 3:] * cov[:, 3:, :] / z
    square = cov[:, 1, 1] * cov[:, 2, 2]
    return np.where(square > 1e-12, cov[:, 1, 2] / np.sqrt(np.maximum(square, 1e-12)), np.nan)
