"""Statistics of the study: intervals, paired differences, correlations, pass@k.

Used by lab.analyze. All intervals are 95 % by Student's t: `mean`, `half` (the half-width) and `n`.
Values of runs are {(base policy, number): value}; groups are lists of (n, columns), one array per
prompt.
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


def average(numbers):
    """Average numbers of the same name over runs or base policies. numbers: {key: {name: value}}.
    Returns {name: interval}."""
    values = {}
    for of_one in numbers.values():
        for name, value in of_one.items():
            values.setdefault(name, []).append(value)
    return {name: mean_t_ci(found) for name, found in values.items()}


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


def residuals(columns, held):
    """What least squares by the columns of `held` leaves of `columns`. (n, columns), (n, held)."""
    columns = columns - columns.mean(0)
    held = held - held.mean(0)
    return columns - held @ np.linalg.pinv(held) @ columns


def correlation(groups):
    """Pearson's correlation of the first two columns, with further columns held: the partial
    correlation given them. groups: a list of (n, columns). NaN if a column does not vary."""
    columns = np.concatenate(groups)
    left = residuals(columns[:, :2], columns[:, 2:])
    if (left.std(0) < 1e-9).any():
        return np.nan
    return float(np.corrcoef(left.T)[0, 1])


def slope(groups):
    """Slope of the second column on the first, with further columns held. groups: a list of (n,
    columns). NaN if the first column does not vary."""
    columns = np.concatenate(groups)
    x, y = residuals(columns[:, :2], columns[:, 2:]).T
    if x.std() < 1e-9:
        return np.nan
    return float(x @ y / (x @ x))
