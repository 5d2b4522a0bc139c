"""Statistics of the study: intervals, paired differences, bootstrap, correlations.

Used by lab.analyze. Intervals are 95 %: `mean` and `half`, the half-width, by Student's t; `value`,
`low` and `high` by bootstrap over prompts. Values of runs are {(base policy, number): value};
groups are lists of (n, columns), one array per prompt.
"""

import math

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
    half = np.nan
    if n > 1:
        error = np.std(values, ddof=1) / n**0.5
        half = T95[min(n, 31) - 2] * error
    return dict(mean=float(np.mean(values)), half=float(half), n=n)


def paired_difference(one, other):
    """Difference of two variants over the (base policy, number) that both have; None without any.

    one, other: {(base, number): value}. Returns mean, half and n over pairs, the number of positive
    pairs, and `bases`: mean, half and n over the base policies' mean differences.
    """
    by_base = {}
    for base, number in sorted(one.keys() & other.keys()):
        difference = one[base, number] - other[base, number]
        by_base.setdefault(base, []).append(difference)
    if not by_base:
        return None
    pairs = np.concatenate([*by_base.values()])
    means = [np.mean(differences) for differences in by_base.values()]
    found = mean_t_ci(pairs)
    found["positive"] = int((pairs > 0).sum())
    found["bases"] = mean_t_ci(means)
    return found


def pass_at_k(n, successes, k):
    """Probability that at least one of k draws succeeds, from n draws with some successes: 1 -
    C(n - successes, k) / C(n, k), which is unbiased (arXiv 2107.03374)."""
    return 1 - math.comb(n - successes, k) / math.comb(n, k)


def within(groups):
    """Subtract each group's mean."""
    return [group - group.mean(0) for group in groups]


def bootstrap(sums, statistic, config):
    """A statistic and its 95 % percentile interval over resampled prompts.

    sums: (prompts, ...), what each prompt adds to the sums; statistic: (m, ...) sums -> (m,).
    """
    n = len(sums)
    draw = np.random.RandomState(config.seed)
    counts = draw.multinomial(n, [1 / n] * n, config.resamples)  # (resamples, n)
    values = statistic(np.tensordot(counts, sums, 1))
    values = values[~np.isnan(values)]
    low = high = np.nan
    if len(values):
        low, high = np.percentile(values, (2.5, 97.5))
    value = statistic(sums.sum(0)[None])[0]
    return dict(value=float(value), low=float(low), high=float(high), n=n)


def bootstrap_mean(groups, config):
    """Mean of all values with its bootstrap interval. groups: a list of (n,), one per prompt."""
    sums = np.array([(len(group), np.sum(group)) for group in groups], float)
    return bootstrap(sums, lambda s: s[:, 1] / s[:, 0], config)


def correlate(groups, config):
    """Pearson's correlation of two columns with its bootstrap interval. groups: a list of (n, 2),
    one per prompt. NaN if a column does not vary."""
    together = np.concatenate(groups)
    mean = together.mean(0)
    scale = together.std(0)
    if (scale < 1e-9).any():
        return dict(value=np.nan, low=np.nan, high=np.nan, n=len(groups))
    sums = []
    for group in groups:
        columns = np.insert((group - mean) / scale, 0, 1, axis=1)  # (n, 3): 1, x, y
        sums.append(columns.T @ columns)
    return bootstrap(np.array(sums), correlation, config)


def correlation(sums):
    """Correlation from sums of products of (1, x, y). (m, 3, 3) -> (m,)."""
    mean = sums[:, 0] / sums[:, :1, 0]  # (m, 3)
    products = sums / sums[:, :1, :1]
    cov = products - mean[:, :, None] * mean[:, None]
    square = cov[:, 1, 1] * cov[:, 2, 2]
    scale = np.sqrt(np.maximum(square, 1e-12))
    return np.where(square > 1e-12, cov[:, 1, 2] / scale, np.nan)
