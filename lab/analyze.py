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
from lab.stats import correlation, mean_t_ci, paired_difference, pass_at_k, slope, within
from lab.tables import FELL, FOUND, SCORES, SETTINGS, counterpart, report
from scenes import RARE_PAIRS, WORLDS


@dataclass(frozen=True)
class Config(common.BaseConfig):
    out: str = "out/study"


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
    values = {}
    for run in runs.values():
        for name, group in run["scores"][split][groups].items():
            values.setdefault(name, []).append(group["exact"])
    return {name: mean_t_ci(found) for name, found in values.items()}


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
        found["measures"][name] = mean_t_ci([*values.values()])
        found["values"][name] = {f"{base}-{number}": x for (base, number), x in values.items()}
        if grpo and trained:
            others = measure(grpo, MEASURES[name])
            found["differences"][name] = paired_difference(values, others)
    if trained:
        found |= describe_training(runs)
        found["discovery"] = describe_discovery(runs)
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
    """Describe by a rare pair's frequency in the corpus: exact, with its interval over runs; how
    many of the pairs were found in training, and after how many steps in the mean."""
    by_frequency = {}
    for pair, frequency in RARE_PAIRS.items():
        by_frequency.setdefault(frequency, []).append(" ".join(pair))
    discovery = {}
    for frequency, pairs in by_frequency.items():
        exact = []
        steps = []
        for run in runs.values():
            scores = run["scores"]["rare"]["rare_pairs"]
            exact.append(np.mean([scores[pair]["exact"] for pair in pairs]))
            steps += [step_found(run["curve"], pair) for pair in pairs]
        found = [step for step in steps if step is not None]
        discovery[f"{frequency:.1%}"] = dict(
            exact=mean_t_ci(exact),
            found=len(found),
            of=len(steps),
            step=float(np.mean(found)) if found else None,
        )
    return discovery


def describe_gradient(runs):
    """Average the parts of the gradient over the runs in which they were measured."""
    parts = {}
    for run in runs.values():
        for name, size in run["scores"].get("gradient", {}).items():
            parts.setdefault(name, []).append(size)
    return {name: mean_t_ci(sizes) for name, sizes in parts.items()}


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
    for key in ("eval_exact", "rare_exact"):
        values = {}
        for run in runs.values():
            for point in run["curve"]:
                values.setdefault(point["step"], []).append(point[key])
        found[key] = {step: mean_t_ci(values[step]) for step in sorted(values)}
    falls = []
    for run in runs.values():
        exact = [point["eval_exact"] for point in run["curve"]]
        falls.append(max(exact) - exact[-1])
    found["worst_reward"] = min(measure(runs, MEASURES["reward"]).values())
    found["fell"] = sum(fall > FELL for fall in falls)
    found["largest_fall"] = max(falls)
    return found


# --- records --------------------------------------------------------------------------------------


def over_bases(of_bases):
    """Average numbers over base policies. of_bases: {base: {name: value}}. Returns {name:
    interval}."""
    values = {}
    for numbers in of_bases.values():
        for name, value in numbers.items():
            values.setdefault(name, []).append(value)
    return {name: mean_t_ci(found) for name, found in values.items()}


def describe_settings(records, describe):
    """Describe what each setting's policies drew. records: {setting: {base: rows}}; describe: rows
    of one policy -> {name: value}. Returns {setting: {name: interval}}."""
    found = {}
    for setting, of_bases in records.items():
        found[setting] = over_bases({base: describe(rows) for base, rows in of_bases.items()})
    return found


def describe_changes(records, describe):
    """Describe settings, and the differences of neighbouring ones, paired by base policy."""
    found = describe_settings(records, describe)
    settings = list(records)
    for before, after in zip(settings, settings[1:]):
        changes = {}
        for base in records[before].keys() & records[after].keys():
            old = describe(records[before][base])
            new = describe(records[after][base])
            changes[base] = {name: new[name] - old[name] for name in new}
        if changes:
            found[f"{after} - {before}"] = over_bases(changes)
    return found


def by_prompt(rows, *keys):
    """Collect columns of rows by prompt. Returns a list of (n, keys)."""
    groups = {}
    for row in rows:
        groups.setdefault(row["number"], []).append([row[key] for key in keys])
    return [np.array(group, float) for group in groups.values()]


def average_plans(rows):
    """Average the images of each plan. Returns a dict per plan."""
    groups = {}
    for row in rows:
        groups.setdefault((row["number"], row["plan_index"]), []).append(row)
    plans = []
    for (number, _), group in groups.items():
        plan = dict(number=number)
        for key in ("reward", "plan_entropy", "image_entropy_std"):
            plan[key] = float(np.mean([row[key] for row in group]))
        plans.append(plan)
    return plans


def correlate_images(rows):
    """Relate reward to the mean and the std of image entropy: over all images, within prompts, and
    with the painted area held."""
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
    return found


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


def describe_correlations(rows):
    """Correlate reward with entropies."""
    return correlate_images(rows) | correlate_plans(rows)


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
    prompts = {}
    for row in rows:
        prompts.setdefault(row["number"], []).append(row)
    found = {}
    for name, function in SPREADS.items():
        found[name] = float(np.mean([function(group) for group in prompts.values()]))
    return found


def mean_pass(rows, k):
    """pass@k: the fraction of prompts that k images would solve."""
    return float(np.mean([pass_at_k(row["n"], row["exact"], k) for row in rows]))


def describe_passes(rows):
    """Describe pass@k of a policy."""
    return {k: mean_pass(rows, k) for k in PASS_AT if k <= rows[0]["n"]}


def crossing(before, after):
    """Find the least number of images with which the base policies `before` solve more prompts than
    the trained ones `after`, in the mean over those that both have. {base: rows} each. Returns None
    if there is none."""
    both = before.keys() & after.keys()
    n = min(row["n"] for base in both for row in before[base])
    for k in range(1, n + 1):
        ahead = sum(mean_pass(before[base], k) - mean_pass(after[base], k) for base in both)
        if ahead > 0:
            return k
    return None


def describe_crossings(passes):
    """Find where pass@k of the base policy crosses that of the trained ones. passes: {setting:
    {base: rows}}. Returns {setting: k or None}."""
    before = passes.get(SETTINGS["base"], {})
    found = {}
    for name in ("grpo-0", "eggrpo-0"):
        after = passes.get(SETTINGS[name], {})
        if before.keys() & after.keys():
            found[SETTINGS[name]] = crossing(before, after)
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
    return dict(commit=head["commit"], scores=scores, curve=curve, end=end)


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
    run}}; records and guided, of images sampled with guidance 2: {setting: {base: rows}}; passes, of
    many images per prompt: {split: {setting: {base: rows}}}."""
    variants = {}
    for name, own in runs.items():
        other = counterpart(name)
        variants[name] = describe_variant(own, runs.get(other) if other != name else None)
    trained = [run for of_variant in runs.values() for run in of_variant.values() if "curve" in run]
    return dict(
        commits=sorted({run["commit"] for run in trained}),
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
    compared = {name: numbers for name, numbers in variants.items() if numbers["differences"]}
    if main:
        figures.draw_curves(folder / "curves.png", main)
        figures.draw_discovery(folder / "discovery.png", main)
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
    print(tables)
    draw_figures(folder / "figures", numbers, records, guided)
    print(f"figures: {folder / 'figures'}")
    if missing:
        names = ", ".join(job.name for job in missing)
        print(f"{len(missing)} jobs of the study are missing; make them by `{command}`: {names}")


if __name__ == "__main__":
    common.run(main)
