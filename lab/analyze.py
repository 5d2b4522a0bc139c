"""Tables and figures of a study, from its runs and records alone.

    bash train.sh lab.analyze              reads what lab.study left in out/study

    -> out/study/small/study.json (every number), study.md (the tables), figures/*.png

Intervals are 95 % by Student's t over base policies, of the means of each one's runs. A difference
is paired: both methods have base policy, training prompts and noise of the rollouts in common.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from lab import figures, study
from lab.one_sided_report import describe_one_sided, draw_dose, draw_gap, read_one_sided
from lab.stats import (
    average,
    describe_correlations,
    describe_crossings,
    describe_passes,
    describe_settings,
    describe_spread,
    over_bases,
    paired_difference,
)
from lab.tables import FELL, FOUND, MAIN_ROWS, SCORES, counterpart, label, report
from scenes import RARE_PAIRS, WORLDS


@dataclass(frozen=True)
class Config(common.BaseConfig):
    out: Path = Path("out/study")  # folder of the study


def area(run):
    """Mean of exact on rare pairs over training: the area under its curve, as a fraction."""
    steps = np.array([point["step"] for point in run["curve"]])
    values = np.array([point["rare_exact"] for point in run["curve"]])
    trapezoids = np.diff(steps) * (values[1:] + values[:-1]) / 2
    return float(trapezoids.sum() / (steps[-1] - steps[0]))


MEASURES = {  # of a run
    "reward": lambda run: run["scores"]["eval"]["reward"],
    "exact": lambda run: run["scores"]["eval"]["exact"],
    "rare exact": lambda run: run["scores"]["rare"]["exact"],
    "rare exact over training": area,
    "vendi": lambda run: run["scores"]["diversity"]["vendi"],
    "reward std": lambda run: run["scores"]["diversity"]["reward_std"],  # within a prompt
    "plan entropy": lambda run: run["end"]["plan_entropy"],  # of the last ten steps
    "image entropy": lambda run: run["end"]["image_entropy"],
    "KL": lambda run: run["end"]["kl"],
    "lambda": lambda run: run["end"]["lambda"],
    "turned signs": lambda run: run["end"]["turned_signs"],
}
OF_POLICIES = [*SCORES, "vendi", "reward std"]  # measures of base policies too

INTERACTIONS = {  # both, one, other, neither
    "text x image": ("eggrpo", "eggrpo-text", "eggrpo-image", "grpo"),
    "exclude x bonus": ("eggrpo", "exclude", "bonus", "grpo"),
}


def measure(runs, function):
    """Measure runs {(base, number): run}. Returns {(base, number): value}."""
    return {key: function(run) for key, run in runs.items()}


def describe_groups(runs, split, groups):
    """Average exact of a split's categories or rare pairs over runs. Returns {group: interval}."""
    exact = {}
    for key, run in runs.items():
        of_groups = run["scores"][split][groups]
        exact[key] = {}
        for name, group in of_groups.items():
            exact[key][name] = group["exact"]
    return average(exact)


def describe_variant(runs, grpo):
    """Reduce a variant's runs to numbers; differences are to the runs of grpo."""
    found = dict(runs=len(runs), bases=len({base for base, _ in runs}))
    found["categories"] = describe_groups(runs, "eval", "categories")
    found["rare_pairs"] = describe_groups(runs, "rare", "rare_pairs")
    trained = all("curve" in run for run in runs.values())  # else these are base policies
    found |= dict(measures={}, differences={}, values={})
    for name in MEASURES if trained else OF_POLICIES:
        values = measure(runs, MEASURES[name])
        found["measures"][name] = over_bases(values)
        found["values"][name] = {f"{base}-{number}": x for (base, number), x in values.items()}
        if grpo and trained:
            others = measure(grpo, MEASURES[name])
            found["differences"][name] = paired_difference(values, others)
    found["discovery"] = describe_discovery(runs)
    if trained:
        found |= describe_training(runs)
        of_runs = {key: run["scores"].get("gradient", {}) for key, run in runs.items()}
        found["gradient"] = average(of_runs)
    return found


def step_found(curve, pair):
    """Return the step of the second of two evaluations in succession with a pair above FOUND."""
    for points in zip(curve, curve[1:]):
        if all(point["rare_exact_by_pair"][pair] > FOUND for point in points):
            return points[1]["step"]
    return None


def describe_discovery(runs):
    """Describe exact on rare pairs by their frequency in the corpus, and when they were found."""
    discovery = {}
    for frequency in dict.fromkeys(RARE_PAIRS.values()):
        pairs = [" ".join(pair) for pair, its in RARE_PAIRS.items() if its == frequency]
        exact = {}
        steps = []
        for key, run in runs.items():
            scores = run["scores"]["rare"]["rare_pairs"]
            exact[key] = np.mean([scores[pair]["exact"] for pair in pairs])
            if "curve" in run:
                steps += [step_found(run["curve"], pair) for pair in pairs]
        of_frequency = dict(exact=over_bases(exact))
        if steps:
            found = [step for step in steps if step is not None]
            mean = float(np.mean(found)) if found else None
            of_frequency |= dict(found=len(found), of=len(steps), step=mean)
        discovery[f"{frequency:.1%}"] = of_frequency
    return discovery


def describe_interactions(runs):
    """Describe both - one - other + neither of the method's halves: {name: {score: difference}}."""
    found = {}
    for name, methods in INTERACTIONS.items():
        found[name] = {}
        variants = [runs.get(f"short-{method}", {}) for method in methods]
        keys = set.intersection(*map(set, variants))
        for score in SCORES:
            both, one, other, neither = (measure(v, MEASURES[score]) for v in variants)
            together = {key: both[key] + neither[key] for key in keys}
            apart = {key: one[key] + other[key] for key in keys}
            found[name][score] = paired_difference(together, apart)
    return found


def describe_training(runs):
    """Describe learning curves: means by step, the worst run, and falls of held-out exact."""
    found = {}
    for name in ("eval_exact", "rare_exact"):
        curves = {}
        for key, run in runs.items():
            curve = run["curve"]
            curves[key] = {point["step"]: point[name] for point in curve}
        found[name] = average(curves)
    curves = [[point["eval_exact"] for point in run["curve"]] for run in runs.values()]
    falls = [max(curve) - curve[-1] for curve in curves]
    found["worst_reward"] = min(measure(runs, MEASURES["reward"]).values())
    found["fell"] = sum(fall > FELL for fall in falls)
    found["largest_fall"] = max(falls)
    return found


def read_run(path):
    """Reduce a run to scores, learning curve and the end of its training. path: of its scores."""
    head, *log = study.read_lines(path.with_name("log.jsonl"))
    curve = []
    for record in log:
        if "eval_exact" in record:
            keys = ("eval_exact", "rare_exact", "rare_exact_by_pair")
            point = {key: record[key] for key in keys}
            curve.append(dict(step=record["step"] + 1, **point))
    end = {}
    for key in ("plan_entropy", "image_entropy", "kl", "lambda", "turned_signs"):
        steps = [record[key] for record in log if key in record]
        end[key] = float(np.mean(steps[-10:]))
    scores = json.loads(path.read_text())
    made = f"{head['commit']} on {head['device']}, torch {head['torch']}"
    return dict(made=made, scores=scores, curve=curve, end=end)


def read_study(config):
    """Read what is finished of a study. Returns runs, {variant: {(base, number): run}}; records,
    {setting: {base: rows}}; passes, {split: {setting: {base: rows}}}."""
    runs = {}
    records = {}
    passes = {}
    for job in study.plan(config):
        path = study.result_path(config, job)
        if not path.exists():
            continue
        if job.kind == "base":
            for variant, scores in json.loads(path.read_text()).items():
                runs.setdefault(variant, {})[job.base, 0] = dict(scores=scores)
        if job.kind == "runs":
            variant, _, number = job.last.rpartition("-")
            runs.setdefault(variant, {})[job.base, int(number)] = read_run(path)
        if job.kind == "records":
            policy = label(job.last.removesuffix("-0"))
            records.setdefault(policy, {})[job.base] = study.read_lines(path)
        if job.kind == "passes":
            policy = label(job.last.removesuffix("-0"))
            for row in study.read_lines(path):
                of_policy = passes.setdefault(row["split"], {}).setdefault(policy, {})
                of_policy.setdefault(job.base, []).append(row)
    return runs, records, passes


def analyze(runs, records, passes):
    """Reduce a study, see read_study, to its numbers: the content of study.json."""
    variants = {}
    made = set()
    for name, own in runs.items():
        other = counterpart(name)
        grpo = runs.get(other) if other != name else None
        variants[name] = describe_variant(own, grpo)
        made |= {run["made"] for run in own.values() if "made" in run}
    solved = {}
    for split, own in passes.items():
        solved[split] = describe_settings(own, describe_passes, paired=True)
    return dict(
        made=sorted(made),
        variants=variants,
        interactions=describe_interactions(runs),
        correlations=describe_settings(records, describe_correlations),
        spread=describe_settings(records, describe_spread, paired=True),
        passes=solved,
        crossings={split: describe_crossings(own) for split, own in passes.items()},
    )


def draw_figures(folder, numbers, records):
    """Draw every figure that the study has the data for."""
    variants = numbers["variants"]
    main = {name: variants[name] for name in MAIN_ROWS if name in variants}
    trained = {name: of for name, of in main.items() if name in study.MAIN}
    compared = {name: of for name, of in variants.items() if of["differences"]}
    if trained:
        figures.draw_curves(folder / "curves.png", trained)
    figures.draw_discovery(folder / "discovery.png", main)
    if compared:
        figures.draw_differences(folder / "differences.png", compared)
    if records:
        figures.draw_joint(folder / "entropy-mean.png", records)
    if numbers["passes"]:
        figures.draw_passes(folder / "pass-at-k.png", numbers["passes"])


@common.stage()
def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv)
    folder = config.folder
    values = dict(preset=config.preset, out=config.out)
    of_study = study.Config(**study.PRESETS[config.preset] | values)
    runs, records, passes = read_study(of_study)
    command = common.command_for("lab.study", config)
    common.check(runs, f"no study in {folder}: make it by `{command}`")
    numbers = analyze(runs, records, passes)
    numbers["one_sided"] = describe_one_sided(read_one_sided(config.out, config.preset))
    numbers = common.to_jsonable(numbers)  # rounded: tables and figures are those of the file
    content = json.dumps(numbers, indent=1)
    tables = report(numbers)
    common.write(folder / "study.json", f"{content}\n".encode())
    common.write(folder / "study.md", tables.encode())
    draw_figures(folder / "figures", numbers, records)
    if {"grpo", "bonus"} <= numbers["one_sided"].keys():
        draw_gap(folder / "figures/guidance-gap.png", numbers["one_sided"])
        draw_dose(folder / "figures/guidance-dose.png", numbers["one_sided"])
    print(tables)
    print(f"figures: {folder / 'figures'}")


if __name__ == "__main__":
    common.run(main)
