"""Statistics of the study: intervals, paired differences, correlations, pass@k.

Intervals are 95 % by Student's t, over base policies: `mean`, `half` (the half-width) and `n`.
Values of runs are {(base policy, number): value}; groups are lists of (n, columns), one per prompt.
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


def over_bases(values):
    """Average the runs of each base policy, which are alike, then base policies: mean, half and n
    over these, and the number of runs."""
    by_base = {}
    for base, number in sorted(values):
        by_base.setdefault(base, []).append(values[base, number])
    return mean_t_ci([np.mean(of_base) for of_base in by_base.values()]) | dict(runs=len(values))


def average(numbers):
    """Average numbers: {(base policy, number): {name: value}} -> {name: interval}."""
    values = {}
    for key, of_run in numbers.items():
        for name, value in of_run.items():
            values.setdefault(name, {})[key] = value
    return {name: over_bases(of_name) for name, of_name in values.items()}


def paired_difference(one, other):
    """Difference of two variants over the runs that both have, or None without any."""
    pairs = one.keys() & other.keys()
    return over_bases({key: one[key] - other[key] for key in pairs}) if pairs else None


def pass_at_k(n, successes, k):
    """Probability that at least one of k draws succeeds, from n draws with some successes: 1 -
    C(n - successes, k) / C(n, k), which is unbiased (arXiv 2107.03374)."""
    return 1 - math.comb(n - successes, k) / math.comb(n, k)


def within(groups):
    """Subtract each group's mean."""
    return [group - group.mean(0) for group in groups]


def residuals(columns, held):
    """What least squares by the columns of `held` leaves of `columns`. (n, columns), (n, held)."""
    columns = columns - columns.mean(0)
    held = held - held.mean(0)
    return columns - held @ np.linalg.pinv(held) @ columns


def correlation(groups):
    """Pearson's correlation of the first two columns, the partial one given any others. NaN if one
    does not vary."""
    columns = np.concatenate(groups)
    left = residuals(columns[:, :2], columns[:, 2:])
    if (left.std(0) < 1e-9).any():
        return np.nan
    return float(np.corrcoef(left.T)[0, 1])


def slope(groups):
    """Slope of the second column on the first, others held. NaN if the first does not vary."""
    columns = np.concatenate(groups)
    x, y = residuals(columns[:, :2], columns[:, 2:]).T
    if x.std() < 1e-9:
        return np.nan
    return float(x @ y / (x @ x))
