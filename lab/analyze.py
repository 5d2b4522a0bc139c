"""What entropy has to do with it: tables and figures of a study, from its logs and records alone.

    python -m lab.analyze --preset cpu     reads out/study/cpu/, as lab.study left it

    -> out/study/cpu/study.json (every number), study.md (the tables), figures/*.png and *.csv

Intervals are 95 %: Student's t over runs where runs are compared (each with its own seed, paired
where methods are compared), bootstrap over prompts where pictures are. Runs of a method share the
base policy, so that no interval here tells what another base policy would have given.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from evaluate import markdown_table
from lab import figures
from lab.study import ABLATIONS, MAIN, REGIMES, SWEEPS, read_lines
from scenes import WORLDS

# two-sided 95 % quantiles of Student's t, by degrees of freedom
T95 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
SETTINGS = {"base": "base-no-plan", "base + plan": "base", "GRPO": "grpo", "EG-GRPO": "eggrpo"}
ENTROPIES = ("image_entropy", "image_entropy_std", "plan_entropy")


@dataclass(frozen=True)
class Config:
    preset: str = ""  # smoke, cpu or gpu
    device: str = "cpu"
    out: str = "out/study"
    seed: int = 0  # of the bootstrap
    resamples: int = 1000

    def check(self):
        common.check_at_least(1, self, "resamples")
        common.check_at_least(0, self, "seed")


# --- statistics -----------------------------------------------------------------------------------


def mean_t_ci(values):
    """Mean and half-width of its 95 % interval by Student's t. values: one a run."""
    n = len(values)
    half = T95[min(n - 1, 10)] * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return dict(mean=float(np.mean(values)), half=float(half), n=n)


def ranks(values):
    """Rank values from 0, ties by their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def bootstrap(sums, statistic, config):
    """A statistic of prompts and its 95 % interval over resampled prompts (percentiles).

    sums: (prompts, k), what each prompt adds to k sums; statistic: (..., k) sums -> (...).
    """
    n = len(sums)
    picks = np.random.RandomState(config.seed).randint(n, size=(config.resamples, n))
    values = statistic(sums[picks].sum(1))
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
    value = float(statistic(sums.sum(0)))
    return dict(value=value, low=float(low), high=float(high), n=n)


def bootstrap_mean(groups, config):
    """Mean of everything, with its bootstrap interval. groups: a list of (n,), one a prompt."""
    sums = np.array([(len(g), np.sum(g)) for g in groups], float)
    return bootstrap(sums, lambda s: s[..., 1] / s[..., 0], config)


def correlation_of(groups, config):
    """Pearson's correlation of everything, likewise. groups: a list of (n, 2), one a prompt."""
    centre = np.concatenate(groups).mean(0)  # for precision

    def add(group):
        x, y = (group - centre).T
        return len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y

    return bootstrap(np.array([add(g) for g in groups], float), correlation, config)


def correlation(sums):
    """Pearson's correlation from the sums of 1, x, y, x x, y y, x y; NaN where one does not vary.
    (..., 6) -> (...)."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    square = (xx - x * x / n) * (yy - y * y / n)
    return np.where(square > 1e-12, (xy - x * y / n) / np.sqrt(np.maximum(square, 1e-12)), np.nan)


def within(groups):
    """Take each prompt's mean off: what is left, the prompt's difficulty cannot explain."""
    return [g - g.mean(0) for g in groups]


# --- reading --------------------------------------------------------------------------------------


def read_runs(folder):
    """Read every finished run. Returns {variant: {seed: dict(log=[...], scores={...})}}."""
    runs = {}
    for path in sorted(folder.glob("*/scores.json")):
        variant, _, seed = path.parent.name.rpartition("-")
        if not seed.isdigit():  # the base policies
            variant, seed = path.parent.name, "0"
        log, scores = path.with_name("log.jsonl"), json.loads(path.read_text())
        lines = read_lines(log)[1:] if log.exists() else []
        runs.setdefault(variant, {})[int(seed)] = dict(log=lines, scores=scores)
    return runs


def read_records(folder):
    """Read the records of each setting. Returns {setting: list of rows, each with its run}."""
    found = {}
    for setting, name in SETTINGS.items():
        paths = [
            p
            for p in sorted(folder.glob("records/*.jsonl"))
            if p.stem == name or p.stem.rpartition("-")[0] == name and name in MAIN
        ]
        found[setting] = [row | dict(run=p.stem) for p in paths for row in read_lines(p)]
    return {setting: rows for setting, rows in found.items() if rows}


# --- numbers --------------------------------------------------------------------------------------


def last(run, key, steps=10):
    """Mean of a logged key over the last steps of a run."""
    values = [r[key] for r in run["log"] if r["step"] >= 0 and r.get(key) is not None]
    return float(np.mean(values[-steps:]))


def by_category(runs, name, key):
    """{category: mean and interval over runs} of a method, and `all` and `rare`."""
    scores = [run["scores"] for run in runs[name].values()]
    table = {
        c: mean_t_ci([s["eval"]["categories"][c][key] for s in scores])
        for c in scores[0]["eval"]["categories"]
    }
    return {
        "all": mean_t_ci([s["eval"][key] for s in scores]),
        **table,
        "rare": mean_t_ci([s["rare"][key] for s in scores]),
    }


def difference(runs, one, other, get):
    """Paired difference of two variants, over the seeds that both have."""
    seeds = sorted(runs.get(one, {}).keys() & runs.get(other, {}).keys())
    return mean_t_ci([get(runs[one][s]) - get(runs[other][s]) for s in seeds]) if seeds else None


def compare(runs, one, other):
    """What two variants differ in at the end, paired."""
    score = lambda key: lambda run: run["scores"]["eval"][key]
    found = {key: difference(runs, one, other, score(key)) for key in ("reward", "exact")}
    for key in ("image_entropy", "plan_entropy"):
        found[key] = difference(runs, one, other, lambda run: last(run, key))
    return found


def describe(runs, name):
    """What a variant ends with, over its runs."""
    score = lambda key: [run["scores"]["eval"][key] for run in runs[name].values()]
    end = lambda key: [last(run, key) for run in runs[name].values()]
    return dict(
        reward=mean_t_ci(score("reward")),
        exact=mean_t_ci(score("exact")),
        image_entropy=mean_t_ci(end("image_entropy")),
        plan_entropy=mean_t_ci(end("plan_entropy")),
    )


def stability(runs, name):
    """The worst run, and the share of runs that fell by more than .05 from their best: training
    reward, mean of 10 steps."""
    falls = []
    for run in runs[name].values():
        rewards = np.array([r["reward"] for r in run["log"] if r["step"] >= 0])
        smooth = figures.running_mean(rewards)
        falls.append(float(smooth.max() - smooth[-1]))
    finals = [run["scores"]["eval"]["reward"] for run in runs[name].values()]
    return dict(
        n=len(finals),
        worst=min(finals),
        fell=float(np.mean(np.array(falls) > 0.05)),
        largest_fall=max(falls),
        **describe(runs, name),
    )


def by_prompt(rows, *keys):
    """Collect columns of rows by prompt. Returns a list of (n, keys)."""
    groups = {}
    for row in rows:
        groups.setdefault(row["number"], []).append([row[key] for key in keys])
    return [np.array(group, float) for group in groups.values()]


def correlations(rows, config):
    """Correlate reward with each entropy. Over pictures; for the plan's entropy over plans, each
    with the mean reward of its pictures."""
    found = {}
    for key in ENTROPIES:
        groups = by_prompt(plans(rows) if key == "plan_entropy" else rows, key, "reward")
        together = np.concatenate(groups)
        ranked = np.stack([ranks(column) for column in together.T], 1)
        ranked = np.split(ranked, np.cumsum([len(g) for g in groups])[:-1])
        name = key.replace("_", " ")
        found[name] = correlation_of(groups, config)
        found[f"{name}, ranks"] = correlation_of(ranked, config)
        found[f"{name}, within prompts"] = correlation_of(within(groups), config)
        found[f"{name}, within prompts, ranks"] = correlation_of(within(ranked), config)
    return found


def plans(rows):
    """Average the pictures of each plan."""
    by = {}
    for row in rows:
        by.setdefault((row["run"], row["number"], row["plan_index"]), []).append(row)
    keys = ("reward", "plan_entropy", "image_entropy_std")
    return [
        dict(number=k[1], **{key: float(np.mean([r[key] for r in group])) for key in keys})
        for k, group in by.items()
    ]


def spread(rows, config):
    """How widely a policy explores a prompt: std of reward, distance of pictures, plans."""
    by = {}
    for row in rows:
        by.setdefault(row["number"], {}).setdefault(row["run"], []).append(row)
    measures = {
        "std of reward": lambda rs: np.std([r["reward"] for r in rs], ddof=1),
        "distance of pictures": lambda rs: np.mean([r["distance"] for r in rs]),
        "distinct plans": lambda rs: len({r["plan"] for r in rs}),
    }
    return {
        name: bootstrap_mean([[f(rs) for rs in runs.values()] for runs in by.values()], config)
        for name, f in measures.items()
    }


def tokens(rows, config):
    """Average what is recorded of the tokens that draw objects, with intervals over prompts."""
    keys = (
        "objects_share",
        "low_on_objects",
        "high_on_objects",
        "object_entropy",
        "ground_entropy",
        "image_entropy",
        "plan_entropy",
    )
    return {
        key.replace("_", " "): bootstrap_mean([g[:, 0] for g in by_prompt(rows, key)], config)
        for key in keys
    }


def analyze(runs, records, config):
    """Reduce a study to its numbers: what study.json holds."""
    has = lambda *names: all(name in runs for name in names)
    study = {
        "A": {},
        "B": {},
        "C": {},
        "D": {},
        "regimes": {},
        "correlations": {},
        "spread": {},
        "tokens": {},
    }
    for setting, name in SETTINGS.items():
        if has(name):
            study["A"][setting] = {key: by_category(runs, name, key) for key in ("reward", "exact")}
    if has("grpo", "eggrpo"):
        categories = runs["grpo"][0]["scores"]["eval"]["categories"]
        get = lambda split, key: lambda run: run["scores"][split][key]
        of = lambda c, key: lambda run: run["scores"]["eval"]["categories"][c][key]
        pair = lambda f: difference(runs, "eggrpo", "grpo", f)
        study["A"]["EG-GRPO - GRPO"] = {
            key: {
                "all": pair(get("eval", key)),
                **{c: pair(of(c, key)) for c in categories},
                "rare": pair(get("rare", key)),
            }
            for key in ("reward", "exact")
        }
    methods = [name for name in (*MAIN, *ABLATIONS) if has(name)]
    for name in methods:
        study["B"][name] = dict(
            describe(runs, name),
            minus_grpo=compare(runs, name, "grpo"),
            minus_eggrpo=compare(runs, name, "eggrpo"),
        )
        study["D"][name] = stability(runs, name)
    # values that methods of table B stand for
    named = {
        "low-frac-0": "bonus",
        "low-frac-0.2": "eggrpo",
        "high-frac-0.5": "eggrpo",
        "bonus-coef-0": "exclude",
        "bonus-coef-0.3": "eggrpo",
    }
    swept = {name: name for name in runs if name in SWEEPS}
    for label, name in sorted((named | swept).items()):
        if has(name):
            study["C"][label] = dict(describe(runs, name), minus_grpo=compare(runs, name, "grpo"))
    for regime in REGIMES:
        names = f"{regime}-eggrpo", f"{regime}-grpo"
        if has(*names):
            study["regimes"][regime] = dict(
                grpo=describe(runs, names[1]),
                eggrpo=describe(runs, names[0]),
                difference=compare(runs, *names),
            )
    for setting, rows in records.items():
        study["correlations"][setting] = correlations(rows, config)
        study["spread"][setting] = spread(rows, config)
        study["tokens"][setting] = tokens(rows, config)
    return study


# --- tables ---------------------------------------------------------------------------------------


def format_ci(x, digits=3, sign=False):
    """Print a mean and its half-width, or a value and its interval."""
    if x is None:
        return "-"
    f = lambda v: "-" if v is None or np.isnan(v) else f"{v:{'+' if sign else ''}.{digits}f}"
    if "low" in x:
        return f"{f(x['value'])} [{f(x['low'])}, {f(x['high'])}]"
    return f(x["mean"]) + ("" if x["n"] == 1 else f" ± {x['half']:.{digits}f}")


def tables(study):
    """Lay a study out. Returns {name: Markdown}, the text of study.md and of docs/results.md."""
    found = {}
    for key in ("reward", "exact"):
        settings = study["A"].items()
        head = ["runs", *next(iter(study["A"].values()))[key]]
        found[f"A, {key}"] = markdown_table(
            [key, *head],
            [
                [s, t[key]["all"]["n"], *(format_ci(x, 3, " - " in s) for x in t[key].values())]
                for s, t in settings
            ],
        )
    ends = ("reward", "exact", "image_entropy", "plan_entropy")
    heads = [
        "reward",
        "exact",
        "image entropy",
        "plan entropy",
        "reward - GRPO's",
        "exact - GRPO's",
    ]
    line = lambda name, t: [
        name,
        t["reward"]["n"],
        *(format_ci(t[k]) for k in ends),
        *(format_ci(t["minus_grpo"][k], 3, True) for k in ("reward", "exact")),
    ]
    found["B"] = markdown_table(
        ["method", "runs", *heads, "reward - EG-GRPO's"],
        [
            [*line(f"`{n}`", t), format_ci(t["minus_eggrpo"]["reward"], 3, True)]
            for n, t in study["B"].items()
        ],
    )
    found["C"] = markdown_table(
        ["value", "runs", *heads], [line(f"`{n}`", t) for n, t in study["C"].items()]
    )
    found["D"] = markdown_table(
        [
            "method",
            "runs",
            "worst reward",
            "runs that fell by .05",
            "largest fall",
            "image entropy at the end",
            "plan entropy at the end",
        ],
        [
            [
                f"`{n}`",
                t["n"],
                f"{t['worst']:.3f}",
                f"{t['fell']:.0%}",
                f"{t['largest_fall']:.3f}",
                format_ci(t["image_entropy"]),
                format_ci(t["plan_entropy"]),
            ]
            for n, t in study["D"].items()
        ],
    )
    found["regimes"] = markdown_table(
        [
            "regime",
            "runs",
            "reward, GRPO",
            "reward, EG-GRPO",
            "difference",
            "exact: difference",
            "image entropy: difference",
        ],
        [
            [
                n,
                t["difference"]["reward"]["n"],
                format_ci(t["grpo"]["reward"]),
                format_ci(t["eggrpo"]["reward"]),
                *(
                    format_ci(t["difference"][k], 3, True)
                    for k in ("reward", "exact", "image_entropy")
                ),
            ]
            for n, t in study["regimes"].items()
        ],
    )
    for name, title, digits, sign in (
        ("correlations", "reward against", 2, True),
        ("spread", "within a prompt", 3, False),
        ("tokens", "mean over pictures", 3, False),
    ):
        columns = study[name]
        found[name] = markdown_table(
            [title, *columns],
            [
                [k, *(format_ci(t[k], digits, sign) for t in columns.values())]
                for k in next(iter(columns.values()), {})
            ],
        )
    return found


TITLES = {
    "A, reward": "Held-out reward by category",
    "A, exact": "Held-out `exact` by category",
    "B": "Methods and ablations",
    "C": "Sweeps of the three knobs, against the same GRPO runs",
    "D": "Stability: falls of training reward, mean of 10 steps, from its best to its last",
    "regimes": "Where might it matter? One change, made to GRPO and to EG-GRPO",
    "correlations": "Reward against entropy, over pictures (plan entropy: over plans)",
    "spread": "How widely a policy explores a prompt: 64 pictures of 8 plans",
    "tokens": "What the tokens draw: share on objects of all, of low, of high ones; entropies",
}


def report(study):
    """Lay all tables out, as study.md."""
    found = tables(study)
    return "\n".join(f"## {title}\n\n{found[name]}\n" for name, title in TITLES.items())


def main(argv=None):
    presets = {name: {} for name in WORLDS}
    config, _ = common.parse("-m lab.analyze", Config, presets, __doc__, argv)
    folder = Path(config.out) / config.preset
    runs, records = read_runs(folder), read_records(folder)
    common.check(
        runs and records,
        f"no study in {folder}: make it with `python -m lab.study --preset {config.preset}`",
    )
    study = json.loads(json.dumps(common.to_jsonable(analyze(runs, records, config))))
    common.write(folder / "study.json", (json.dumps(study, indent=1) + "\n").encode())
    common.write(folder / "study.md", report(study).encode())
    print(report(study))
    planned = {s: plans(rows) for s, rows in records.items() if s != "base"}
    figures.draw_all(folder, runs, records, planned, study)
    print(f"\nfigures: {folder / 'figures'}")


if __name__ == "__main__":
    common.run(main)
