"""Tables and figures of a study, from its runs and records alone.

    python -m lab.analyze --preset cpu     reads what lab.study left in out/study

    -> out/study/cpu/study.json (every number), study.md (the tables), figures/*.png

A study that was stopped early is analysed as far as it went. Intervals are 95 %: `mean ± half` by
Student's t over runs; `value [low, high]` by bootstrap over prompts. A difference is paired: both
methods have the base policy, the training prompts and the noise of the rollouts in common. Pairs of
one base policy are not independent of it; the interval "over base policies" is Student's t over the
mean difference of each base policy. Prompts are resampled as if they were independent, although
each base policy is recorded on a fifth of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from lab import figures
from lab.stats import bootstrap_mean, compare_spread, correlate, mean_t_ci, paired_difference
from lab.stats import ranked, within
from lab.study import MAIN, RIVALS, read_lines
from lab.tables import FELL, FOUND, GROUPS, SCORES, report, split_variant
from scenes import WORLDS

SETTINGS = {"base, no plan": "base-no-plan", "base + plan": "base",
            "GRPO": "grpo-0", "EG-GRPO": "eggrpo-0"}  # fmt: skip


@dataclass(frozen=True)
class Config:
    preset: str = ""  # smoke, cpu or gpu
    device: str = "cpu"
    out: str = "out/study"
    seed: int = 0  # of bootstrap and permutations
    resamples: int = 1000

    def check(self):
        common.check_at_least(1, self, "resamples")
        common.check_at_least(0, self, "seed")


# --- runs -----------------------------------------------------------------------------------------


def area(run):
    """Mean of exact on rare pairs over training: the area under its curve, as a fraction."""
    steps, values = np.array(run["curve"])[:, [0, 4]].T
    return float((np.diff(steps) * (values[1:] + values[:-1]) / 2).sum() / (steps[-1] - steps[0]))


MEASURES = {  # of a run
    "reward": lambda run: run["scores"]["eval"]["reward"],
    "exact": lambda run: run["scores"]["eval"]["exact"],
    "rare exact": lambda run: run["scores"]["rare"]["exact"],
    "rare exact over training": area,
    "plan entropy": lambda run: run["train"][-1][3],  # of the last 10 steps or fewer
    "image entropy": lambda run: run["train"][-1][4],
}


def values(runs, variant, measure):
    """Measure a variant's runs. Returns {(base, number): value}; empty without runs."""
    return {key: measure(run) for key, run in runs.get(variant, {}).items()}


def describe_variant(runs, variant):
    """Reduce a variant's runs to numbers; differences are to `grpo` of its group."""
    own, grpo, found = runs[variant], split_variant(variant)[0] + "grpo", {}
    for name, measure in MEASURES.items():
        measured = values(runs, variant, measure)
        found[name] = mean_t_ci([*measured.values()])
        others = values(runs, grpo, measure) if grpo != variant else {}
        found[f"{name} - grpo"] = paired_difference(measured, others)
    curves = [{step: row for step, *row in run["curve"]} for run in own.values()]
    steps = sorted({step for curve in curves for step in curve})
    for column, name in ((1, "exact"), (3, "rare exact")):
        points = {step: [c[step][column] for c in curves if step in c] for step in steps}
        found[f"{name} by step"] = {step: mean_t_ci(p) for step, p in points.items()}
    exact = [[row[1] for row in curve.values()] for curve in curves]
    falls = [max(e) - e[-1] for e in exact]
    found["worst reward"] = min(values(runs, variant, MEASURES["reward"]).values())
    found["fell"], found["largest fall"] = sum(fall > FELL for fall in falls), max(falls)
    return dict(runs=len(own), bases=len({base for base, _ in own}), **found)


def describe_bases(runs):
    """Average the runs of each base policy: exact on usual and rare pairs, by GRPO and EG-GRPO."""
    found = {}
    for method in ("grpo", "eggrpo"):
        for base in sorted({base for base, _ in runs.get(method, {})}):
            own = [run for (b, _), run in runs[method].items() if b == base]
            found.setdefault(f"base policy {base}", {})[method] = {
                name: mean_t_ci([MEASURES[name](run) for run in own]) for name in SCORES
            }
    return found


def describe_before(runs):
    """Scores of the base policies, from the evaluation before the first step of GRPO."""
    start = {base: run["curve"][0] for (base, _), run in runs.get("grpo", {}).items()}
    columns = dict(zip(SCORES, (1, 2, 4)))
    return {m: mean_t_ci([row[i] for row in start.values()]) for m, i in columns.items() if start}


def describe_between_runs(runs, config):
    """Compare the spread between runs of EG-GRPO with that of GRPO, by permutation."""
    found = {}
    for variant in runs:
        prefix, method = split_variant(variant)
        if method == "eggrpo":
            test = lambda f: compare_spread(
                values(runs, variant, f), values(runs, prefix + "grpo", f), config.seed
            )
            found[variant] = {name: test(MEASURES[name]) for name in SCORES}
    return found


def describe_categories(runs, records, config):
    """Exact by category: of base policies over recorded prompts, after training over runs."""
    found = {}
    for setting in ("base, no plan", "base + plan"):
        rows = records.get(setting, [])
        for c in dict.fromkeys(row["category"] for row in rows):
            groups = by_prompt([row for row in rows if row["category"] == c], "exact")
            found.setdefault(setting, {})[c] = bootstrap_mean(groups, config)
    if "grpo" in runs and "eggrpo" in runs:
        for c in next(iter(runs["grpo"].values()))["scores"]["eval"]["categories"]:
            of = lambda run: run["scores"]["eval"]["categories"][c]["exact"]
            grpo, eggrpo = values(runs, "grpo", of), values(runs, "eggrpo", of)
            found.setdefault("GRPO", {})[c] = mean_t_ci([*grpo.values()])
            found.setdefault("EG-GRPO", {})[c] = mean_t_ci([*eggrpo.values()])
            found.setdefault("EG-GRPO - GRPO", {})[c] = paired_difference(eggrpo, grpo)
    return found


# --- records --------------------------------------------------------------------------------------


def by_prompt(rows, *keys):
    """Collect columns of rows by prompt. Returns a list of (n, keys)."""
    groups = {}
    for row in rows:
        groups.setdefault(row["number"], []).append([row[key] for key in keys])
    return [np.array(group, float) for group in groups.values()]


def average_plans(rows):
    """Average the images of each plan. Returns a list of dicts, one per plan."""
    groups = {}
    for row in rows:
        groups.setdefault((row["number"], row["plan_index"]), []).append(row)
    keys = ("reward", "plan_entropy", "image_entropy", "image_entropy_std")
    mean = lambda group, key: float(np.mean([row[key] for row in group]))
    return [dict(number=k[0], **{key: mean(g, key) for key in keys}) for k, g in groups.items()]


def describe_correlations(rows, config):
    """Correlate reward with image entropy over images, and with plan entropy over plans.

    Pooled over prompts and within prompts, Pearson and rank. For plan entropy also within prompts
    and thirds of the std of image entropy, and given the mean image entropy (partial).
    """
    found, plans = {}, average_plans(rows)
    for key in ("image_entropy", "image_entropy_std", "plan_entropy"):
        groups = by_prompt(plans if key == "plan_entropy" else rows, key, "reward")
        name = key.replace("_", " ")
        found[name] = correlate(groups, config)
        found[f"{name}, ranks"] = correlate(ranked(groups), config)
        found[f"{name}, within prompts"] = correlate(within(groups), config)
        found[f"{name}, within prompts, ranks"] = correlate(within(ranked(groups)), config)
    stds = np.array([p["image_entropy_std"] for p in plans])
    thirds = np.searchsorted(np.quantile(stds, (1 / 3, 2 / 3)), stds)
    for third, label in enumerate(("lowest", "middle", "highest")):
        inside = [p for p, t in zip(plans, thirds) if t == third]
        groups = within(by_prompt(inside, "plan_entropy", "reward"))
        found[f"plan entropy, within prompts, {label} third of image entropy std"] = correlate(
            groups, config
        )
    groups = within(by_prompt(plans, "plan_entropy", "reward", "image_entropy"))
    found["plan entropy, within prompts, given image entropy"] = correlate(groups, config)
    return found


def describe_spread(records, config):
    """Spread of what each policy draws for a prompt, and differences paired by prompt."""
    measures = {
        "std of reward": lambda rows: np.std([r["reward"] for r in rows], ddof=1),
        "distance of images": lambda rows: np.mean([r["distance"] for r in rows]),
        "distinct plans": lambda rows: len({r["plan"] for r in rows}),
    }
    found = {}
    for name, measure in measures.items():
        spread = {}  # {setting: {prompt: value}}
        for setting, rows in records.items():
            prompts = {}
            for row in rows:
                prompts.setdefault(row["number"], []).append(row)
            spread[setting] = {number: measure(group) for number, group in prompts.items()}
        for before, after in [*zip(records, list(records)[1:])]:
            both = spread[after].keys() & spread[before].keys()
            change = {number: spread[after][number] - spread[before][number] for number in both}
            spread |= {f"{after} - {before}": change} if both else {}
        for setting, numbers in spread.items():
            groups = [[numbers[number]] for number in sorted(numbers)]
            found.setdefault(setting, {})[name] = bootstrap_mean(groups, config)
    return found


def describe_tokens(rows, config):
    """Average what is recorded of the tokens that draw objects, with intervals over prompts."""
    keys = "objects_share low_on_objects high_on_objects object_entropy background_entropy"
    keys += " image_entropy image_entropy_std plan_entropy"
    mean = lambda key: bootstrap_mean(by_prompt(rows, key), config)
    return {key.replace("_", " "): mean(key) for key in keys.split()}


def describe_gradients(rows):
    """Average what the parts of the gradient weigh over base policies. rows: of all of them."""
    found = {}
    for row in rows:
        for key in ("size", "cosine", "along"):
            found.setdefault(row["part"], {}).setdefault(key, []).append(row[key])
    return {part: {key: mean_t_ci(x) for key, x in found[part].items()} for part in found}


def describe_rare(rows):
    """Exact of each rare pair by base policy and variant: mean over runs; and how many pairs the
    runs of a variant found. rows: (base policy, variant, row). Returns exact, {pair: {base:
    {variant: mean}}}, and found, {variant: (found, all)}."""
    values, counts = {}, {}
    for base, variant, row in rows:
        of_pair = values.setdefault(row["pair"], {}).setdefault(f"base policy {base}", {})
        of_pair.setdefault(variant, []).append(row["exact"])
        found, n = counts.get(variant, (0, 0))
        counts[variant] = found + (row["exact"] > FOUND), n + 1
    for bases in values.values():
        for base, variants in bases.items():
            bases[base] = {variant: float(np.mean(x)) for variant, x in variants.items()}
    return dict(exact=values, found=counts)


# --- the study ------------------------------------------------------------------------------------


def read(folder, config):
    """Read runs.jsonl and the records. Returns {variant: {(base, number): run}}, {setting: rows} of
    images and of gradients, and (base, variant, row) of rare pairs."""
    runs, records, gradients = {}, {}, {}
    path = folder / config.preset / "runs.jsonl"
    for run in read_lines(path) if path.exists() else []:
        runs.setdefault(run["variant"], {})[run["base"], run["number"]] = run
    order = [prefix + method for prefix in GROUPS for method in (*MAIN, *RIVALS)]
    for setting, name in SETTINGS.items():
        for found, suffix in ((records, ""), (gradients, ".gradients")):
            paths = sorted(folder.glob(f"base-*/{config.preset}/records/{name}{suffix}.jsonl"))
            rows = [row for path in paths for row in read_lines(path)]
            found |= {setting: rows} if rows else {}
    rare = []
    for path in sorted(folder.glob(f"base-*/{config.preset}/records/*.rare.jsonl")):
        name, base = path.name.removesuffix(".rare.jsonl"), int(path.parts[-4].rpartition("-")[2])
        variant = name if name == "base" else name.rpartition("-")[0]
        rare += [(base, variant, row) for row in read_lines(path)]
    rare.sort(key=lambda of: ["base", *order].index(of[1]))
    return {v: runs[v] for v in order if v in runs}, records, gradients, rare


def analyze(runs, records, gradients, rare, config):
    """Reduce a study to its numbers: the content of study.json."""
    return dict(
        variants={variant: describe_variant(runs, variant) for variant in runs},
        before=describe_before(runs),
        bases=describe_bases(runs),
        between_runs=describe_between_runs(runs, config),
        categories=describe_categories(runs, records, config),
        correlations={s: describe_correlations(rows, config) for s, rows in records.items()},
        spread=describe_spread(records, config),
        tokens={s: describe_tokens(rows, config) for s, rows in records.items()},
        gradients={s: describe_gradients(rows) for s, rows in gradients.items()},
        rare=describe_rare(rare),
    )


# --- command --------------------------------------------------------------------------------------


def main(argv=None):
    presets = {name: {} for name in WORLDS}
    config, _ = common.parse("-m lab.analyze", Config, presets, __doc__, argv)
    folder = Path(config.out) / config.preset
    runs, records, gradients, rare = read(Path(config.out), config)
    problem = f"no study in {folder}: make it with `python -m lab.study --preset {config.preset}`"
    common.check(runs or records, problem)
    study = json.loads(
        json.dumps(common.to_jsonable(analyze(runs, records, gradients, rare, config)))
    )
    common.write(folder / "study.json", (json.dumps(study, indent=1) + "\n").encode())
    common.write(folder / "study.md", report(study).encode())
    print(report(study))
    plans = {s: average_plans(rows) for s, rows in records.items() if rows[0]["plan"]}
    figures.draw_all(folder / "figures", study, records, plans)
    print(f"figures: {folder / 'figures'}")


if __name__ == "__main__":
    common.run(main)
