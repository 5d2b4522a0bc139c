"""Tables and figures of a study, from its runs and records alone.

    bash train.sh lab.analyze              reads what lab.study left in out/study

    -> out/study/small/study.json (every number), study.md (the tables), figures/*.png

A study that was stopped early is analysed as far as it went. All intervals are 95 % by Student's t,
`mean ± half`: over runs for scores, over base policies for what is recorded of single policies,
each of which is described by itself. A difference is paired: both methods have the base policy, the
training prompts and the noise of the rollouts in common. Pairs of one base policy are not
independent of it; the interval "over base policies" is over the mean difference of each.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from lab import figures, study
from lab.findings import (
    describe_changes,
    describe_correlations,
    describe_crossings,
    describe_passes,
    describe_settings,
    describe_spread,
)
from lab.stats import average, over_bases, paired_difference
from lab.tables import FELL, FOUND, MAIN_ROWS, SCORES, SETTINGS, counterpart, report
from scenes import RARE_PAIRS, WORLDS


@dataclass(frozen=True)
class Config(common.BaseConfig):
    out: Path = Path("out/study")  # folder of the study


# --- runs -----------------------------------------------------------------------------------------


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

INTERACTIONS = {
    "text x image": ("eggrpo-text", "eggrpo-image"),
    "exclude x bonus": ("exclude", "bonus"),
}


def measure(runs, function):
    """Measure runs {(base, number): run}. Returns {(base, number): value}."""
    return {key: function(run) for key, run in runs.items()}


def describe_groups(runs, split, groups):
    """Average exact of a split's categories or rare pairs over runs. Returns {group: interval}."""
    exact = {}
    for key, run in runs.items():
        of_groups = run["scores"][split][groups]
        exact[key] = {name: group["exact"] for name, group in of_groups.items()}
    return average(exact)


def describe_variant(runs, grpo):
    """Reduce a variant's runs to numbers; differences are to the runs of grpo."""
    found = dict(runs=len(runs), bases=len({base for base, _ in runs}))
    found["categories"] = describe_groups(runs, "eval", "categories")
    found["rare_pairs"] = describe_groups(runs, "rare", "rare_pairs")
    trained = all("curve" in run for run in runs.values())  # else these are base policies
    names = list(MEASURES) if trained else OF_POLICIES
    found["measures"] = {}
    found["differences"] = {}
    found["values"] = {}
    for name in names:
        values = measure(runs, MEASURES[name])
        found["measures"][name] = over_bases(values)
        found["values"][name] = {f"{base}-{number}": x for (base, number), x in values.items()}
        if grpo and trained:
            others = measure(grpo, MEASURES[name])
            found["differences"][name] = paired_difference(values, others)
    found["discovery"] = describe_discovery(runs)
    if trained:
        found |= describe_training(runs)
        found["gradient"] = describe_gradient(runs)
    return found


def step_found(curve, pair):
    """Return the step of the second of two evaluations in succession in which a rare pair is above
    FOUND, or None."""
    above = [point["rare_exact_by_pair"][pair] > FOUND for point in curve]
    for i in range(1, len(curve)):
        if above[i - 1] and above[i]:
            return curve[i]["step"]
    return None


def describe_discovery(runs):
    """Describe exact on rare pairs by their frequency in the corpus, with its interval; of
    trained policies also how many of the pairs were found, and after how many steps in the
    mean."""
    by_frequency = {}
    for pair, frequency in RARE_PAIRS.items():
        by_frequency.setdefault(frequency, []).append(" ".join(pair))
    discovery = {}
    for frequency, pairs in by_frequency.items():
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


def describe_gradient(runs):
    """Average the parts of the gradient over the runs in which they were measured."""
    return average({key: run["scores"].get("gradient", {}) for key, run in runs.items()})


def describe_interactions(runs):
    """Interactions of the halves of the method: both - one - other + neither, paired by base policy
    and number. Returns {name: {measure: difference}}."""
    found = {}
    for name, (one, other) in INTERACTIONS.items():
        variants = [runs.get(f"short-{method}", {}) for method in ("eggrpo", one, other, "grpo")]
        for measure_name in SCORES:
            both, first, second, neither = (measure(v, MEASURES[measure_name]) for v in variants)
            keys = both.keys() & first.keys() & second.keys() & neither.keys()
            together = {key: both[key] + neither[key] for key in keys}
            apart = {key: first[key] + second[key] for key in keys}
            found.setdefault(name, {})[measure_name] = paired_difference(together, apart)
    return found


def describe_training(runs):
    """Describe learning curves: means by step, the worst run, and falls of held-out exact."""
    found = {}
    for name in ("eval_exact", "rare_exact"):
        curves = {}
        for key, run in runs.items():
            curves[key] = {point["step"]: point[name] for point in run["curve"]}
        found[name] = average(curves)
    falls = []
    for run in runs.values():
        exact = [point["eval_exact"] for point in run["curve"]]
        falls.append(max(exact) - exact[-1])
    found["worst_reward"] = min(measure(runs, MEASURES["reward"]).values())
    found["fell"] = sum(fall > FELL for fall in falls)
    found["largest_fall"] = max(falls)
    return found


# --- the study ------------------------------------------------------------------------------------


def jobs_of(config):
    """List the jobs of the default study that are done, and those that are not, with the study's
    settings."""
    values = study.PRESETS[config.preset] | dict(preset=config.preset, out=config.out)
    of_study = study.Config(**values)
    done = []
    missing = []
    for job in study.plan(of_study):
        (done if study.result_path(of_study, job).exists() else missing).append(job)
    return done, missing, of_study


def read_run(path):
    """Reduce a finished run to its scores, its learning curve, and the end of its training. path:
    of its scores."""
    head, *log = study.read_lines(path.with_name("log.jsonl"))
    curve = []
    for record in log:
        if "eval_exact" in record:
            keys = ("eval_exact", "rare_exact", "rare_exact_by_pair")
            point = {key: record[key] for key in keys}
            curve.append(dict(step=record["step"] + 1, **point))
    end = {}
    steps = [record for record in log if record["step"] >= 0]  # without the first evaluation
    for key in ("plan_entropy", "image_entropy", "kl", "lambda", "turned_signs"):
        end[key] = float(np.mean([record[key] for record in steps[-10:]]))
    scores = json.loads(path.read_text())
    made = f"{head['commit']} on {head['device']}, torch {head['torch']}"
    return dict(made=made, scores=scores, curve=curve, end=end)


def read_runs(config, done):
    """Read the base policies and the finished runs of a study. Returns {variant: {(base, number):
    run}}."""
    runs = {}
    for job in done:
        path = study.result_path(config, job)
        if job.kind == "base":
            for variant, scores in json.loads(path.read_text()).items():
                runs.setdefault(variant, {})[job.base, 0] = dict(scores=scores)
        if job.kind == "runs":
            variant, _, number = job.last.rpartition("-")
            runs.setdefault(variant, {})[job.base, int(number)] = read_run(path)
    return runs


def read_records(config, kind, ending=""):
    """Read the records of every base policy. Returns {setting: {base: rows}}."""
    records = {}
    for name, setting in SETTINGS.items():
        pattern = f"base-*/{config.preset}/{kind}/{name}{ending}.jsonl"
        for path in sorted(Path(config.out).glob(pattern)):
            base = path.parts[-4]
            records.setdefault(setting, {})[base] = study.read_lines(path)
    return records


def read_passes(config):
    """Read the counts for pass@k. Returns {split: {setting: {base: rows}}}."""
    passes = {}
    for setting, of_bases in read_records(config, "passes").items():
        for base, rows in of_bases.items():
            for row in rows:
                of_setting = passes.setdefault(row["split"], {}).setdefault(setting, {})
                of_setting.setdefault(base, []).append(row)
    return passes


def analyze(runs, records, guided, passes):
    """Reduce a study to its numbers: the content of study.json. runs: {variant: {(base, number):
    run}}; records and guided, of images sampled with guidance 2: {setting: {base: rows}}; passes,
    of many images per prompt: {split: {setting: {base: rows}}}."""
    variants = {}
    for name, own in runs.items():
        other = counterpart(name)
        variants[name] = describe_variant(own, runs.get(other) if other != name else None)
    trained = [run for of_variant in runs.values() for run in of_variant.values() if "curve" in run]
    return dict(
        made=sorted({run["made"] for run in trained}),
        variants=variants,
        interactions=describe_interactions(runs),
        correlations=describe_settings(records, describe_correlations),
        spread=describe_changes(records, describe_spread),
        guided_correlations=describe_settings(guided, describe_correlations),
        guided_spread=describe_changes(guided, describe_spread),
        passes={split: describe_changes(own, describe_passes) for split, own in passes.items()},
        crossings={split: describe_crossings(own) for split, own in passes.items()},
    )


def draw_figures(folder, numbers, records, guided):
    """Draw every figure that the study has the data for."""
    variants = numbers["variants"]
    main = {name: variants[name] for name in study.MAIN if name in variants}
    with_base = {name: variants[name] for name in MAIN_ROWS if name in variants}
    compared = {}
    for name, of_variant in variants.items():
        if of_variant["differences"] and not name.startswith("mixed-"):  # off the scale
            compared[name] = of_variant
    if main:
        figures.draw_curves(folder / "curves.png", main)
    figures.draw_discovery(folder / "discovery.png", with_base)
    figures.draw_diversity(folder / "diversity.png", variants)
    if compared:
        figures.draw_differences(folder / "differences.png", compared)
    if records:
        figures.draw_joint(folder / "entropy-mean.png", records, "image_entropy")
        figures.draw_joint(folder / "entropy-std.png", records, "image_entropy_std")
    if guided:
        figures.draw_joint(folder / "entropy-mean-guided.png", guided, "image_entropy")
    if numbers["passes"]:
        figures.draw_passes(folder / "pass-at-k.png", numbers["passes"])


@common.stage()
def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv)
    folder = Path(config.out) / config.preset
    done, missing, of_study = jobs_of(config)
    command = common.command_for("lab.study", config)
    common.check(done, f"no study in {folder}: make it by `{command}`")
    runs = read_runs(of_study, done)
    records = read_records(config, "records")
    guided = read_records(config, "records", study.GUIDED)
    numbers = analyze(runs, records, guided, read_passes(config))
    content = json.dumps(common.to_jsonable(numbers), indent=1)
    numbers = json.loads(content)  # rounded, so that the tables are those of the file
    tables = report(numbers)
    common.write(folder / "study.json", f"{content}\n".encode())
    common.write(folder / "study.md", tables.encode())
    draw_figures(folder / "figures", numbers, records, guided)
    print(tables)
    print(f"figures: {folder / 'figures'}")
    if missing:
        names = ", ".join(job.name for job in missing)
        print(f"{len(missing)} jobs of the study are missing; make them by `{command}`: {names}")


if __name__ == "__main__":
    common.run(main)
