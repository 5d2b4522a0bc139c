"""Statistics of the study: intervals, correlations, and by them findings 1 to 3 of the paper.

Intervals are 95 % by Student's t, over base policies: `mean`, `half` (the half-width) and `n`.
Values of runs are {(base policy, number): value}; groups are lists of (n, columns), one per prompt;
rows are of lab.measure.record_rows; a setting (base + plan, GRPO) has the rows of each base policy.
"""

import math

import numpy as np

from lab.tables import NAMES

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
    """Unbiased probability that one of k draws succeeds, from n draws (arXiv 2107.03374)."""
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
    """Pearson's correlation of the first two columns, others held. NaN if one does not vary."""
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


def changes(old, new):
    """Subtract what has the same key and name. old, new: {key: {name: value}}, as is the result."""
    found = {}
    for key in old.keys() & new.keys():
        names = [name for name in new[key] if name in old[key]]
        found[key] = {name: new[key][name] - old[key][name] for name in names}
    return found


def describe_settings(records, describe, paired=False):
    """Describe what policies drew: {setting: {base: rows}} -> {setting: {name: interval}}, and if
    `paired` the changes between successive settings. describe: rows -> {name: value}."""
    described = {}
    for setting, of_bases in records.items():
        described[setting] = {(base, 0): describe(rows) for base, rows in of_bases.items()}
    found = {setting: average(of_bases) for setting, of_bases in described.items()}
    settings = list(described)
    for before, after in zip(settings, settings[1:] if paired else []):
        differences = changes(described[before], described[after])
        if differences:
            found[f"{after} - {before}"] = average(differences)
    return found


def group_by(rows, *keys):
    """Collect rows that have some values in common. Returns a list of lists of rows."""
    groups = {}
    for row in rows:
        common = tuple(row[key] for key in keys)
        groups.setdefault(common, []).append(row)
    return list(groups.values())


def by_prompt(rows, *keys):
    """Collect columns of rows by prompt. Returns a list of (n, keys)."""
    columns = []
    for group in group_by(rows, "number"):
        columns.append(np.array([[row[key] for key in keys] for row in group], float))
    return columns


def average_plans(rows):
    """Average the images of each plan. Returns a dict per plan."""
    plans = []
    for group in group_by(rows, "number", "plan_index"):
        plan = dict(number=group[0]["number"])
        for key in ("reward", "plan_entropy", "image_entropy_std"):
            plan[key] = float(np.mean([row[key] for row in group]))
        plans.append(plan)
    return plans


def describe_correlations(rows):
    """Relate reward to image entropy, also within prompts and with the painted area held."""
    found = {}
    for key in ("image_entropy", "image_entropy_std"):
        name = key.replace("_", " ")
        groups = by_prompt(rows, key, "reward", "paint")
        pairs = [group[:, :2] for group in groups]
        found[name] = correlation(pairs)
        found[f"{name}, within prompts"] = correlation(within(pairs))
        found[f"{name}, paint held"] = correlation(groups)
        found[f"{name}, within prompts, paint held"] = correlation(within(groups))
        found[f"slope on {name}"] = slope(pairs)
        found[f"slope on {name}, within prompts"] = slope(within(pairs))
    return found | correlate_plans(rows)


def correlate_plans(rows):
    """Relate the mean reward of a plan's images to the plan's entropy: over all plans, within
    prompts, and within prompts and thirds of the std of image entropy; and their interaction."""
    plans = average_plans(rows)
    pairs = by_prompt(plans, "plan_entropy", "reward")
    found = {
        "plan entropy": correlation(pairs),
        "plan entropy, within prompts": correlation(within(pairs)),
    }
    stds = [plan["image_entropy_std"] for plan in plans]
    thirds = np.searchsorted(np.quantile(stds, (1 / 3, 2 / 3)), stds)
    for third, label in enumerate(("lowest", "middle", "highest")):
        inside = [plan for plan, its in zip(plans, thirds) if its == third]
        if inside:
            name = f"plan entropy, within prompts, {label} third of image entropy std"
            found[name] = correlation(within(by_prompt(inside, "plan_entropy", "reward")))
    columns = within(by_prompt(plans, "plan_entropy", "image_entropy_std", "reward"))
    entropy, std, reward = np.concatenate(columns).T
    both = np.stack([entropy * std, reward, entropy, std], 1)
    found["plan entropy x image entropy std, within prompts"] = correlation([both])
    return found


PASS_AT = (1, 2, 4, 8, 16, 32, 64, 100)

SPREADS = {  # of the images of a prompt
    "reward": lambda rows: np.mean([row["reward"] for row in rows]),
    "std of reward": lambda rows: np.std([row["reward"] for row in rows], ddof=1),
    "distance of images": lambda rows: np.mean([row["distance"] for row in rows]),
    "distinct plans": lambda rows: len({row["plan"] for row in rows}),
    "plan entropy": lambda rows: np.mean([row["plan_entropy"] for row in rows]),
    "image entropy": lambda rows: np.mean([row["image_entropy"] for row in rows]),
    "its std over tokens": lambda rows: np.mean([row["image_entropy_std"] for row in rows]),
    "its std over images": lambda rows: np.std([row["image_entropy"] for row in rows], ddof=1),
}


def describe_spread(rows):
    """Describe the images that a policy draws for a prompt: means over prompts."""
    found = {}
    for name, function in SPREADS.items():
        found[name] = float(np.mean([function(group) for group in group_by(rows, "number")]))
    return found


def mean_pass(rows, k):
    """pass@k: the fraction of prompts that k images would solve."""
    return float(np.mean([pass_at_k(row["n"], row["exact"], k) for row in rows]))


def describe_passes(rows):
    """Describe pass@k of a policy."""
    return {k: mean_pass(rows, k) for k in PASS_AT if k <= rows[0]["n"]}


def describe_crossings(passes):
    """Find the least k with which base + plan solves more prompts than a trained policy, in the
    mean over base policies that both have: {setting: {base: rows}} -> {setting: k or None}."""
    before = passes.get(NAMES["base"], {})
    found = {}
    for name in (NAMES["grpo"], NAMES["eggrpo"]):
        after = passes.get(name, {})
        both = before.keys() & after.keys()
        if not both:
            continue
        crossings = []
        for k in range(1, min(row["n"] for base in both for row in before[base]) + 1):
            ahead = sum(mean_pass(before[base], k) - mean_pass(after[base], k) for base in both)
            if ahead > 0:
                crossings.append(k)
        found[name] = crossings[0] if crossings else None
    return found
