"""Tables of a study: the numbers of study.json as Markdown, and the names of what they compare.

Used by lab.analyze.
"""

import numpy as np

from evaluate import markdown_table
from lab.study import MAIN

SCORES = ("reward", "exact", "rare exact")
FELL = 0.05  # of held-out exact, from its best evaluation in training to its last
FOUND = 0.1  # exact of a rare pair, above which a run has found it
NAMES = {"grpo": "GRPO", "eggrpo": "EG-GRPO"}
GROUPS = {  # prefix of the variants: what was changed
    "": "preset's learning rate",
    "lr-high-": "learning rate x 10/3",
    "lr-low-": "learning rate x 1/3",
    "long-": "five times the steps",
    "no-kl-": "no KL term",
    "rarer-": "rarer pairs",
}


def split_variant(variant):
    """Split the name of a variant into a prefix of GROUPS and a method."""
    prefix = next((p for p in GROUPS if p and variant.startswith(p)), "")
    return prefix, variant[len(prefix) :]


def format_ci(x, digits=3, sign=False):
    """Format a mean and its half-width, or a value and its interval; "-" for what is missing."""
    show = lambda v: "-" if v is None or np.isnan(v) else f"{v:{'+' if sign else ''}.{digits}f}"
    if x is None or x.get("value", 0.0) is None:
        return "-"
    if "low" in x:
        return f"{show(x['value'])} [{show(x['low'])}, {show(x['high'])}]"
    return show(x["mean"]) + ("" if x["n"] == 1 else f" ± {x['half']:.{digits}f}")


def label(variant):
    """Name a variant in tables and figures."""
    method = split_variant(variant)[1]
    return NAMES.get(method, f"`{method}`")


def title(variant):
    """Name a variant and what was changed for it."""
    prefix, _ = split_variant(variant)
    return f"{label(variant)}, {GROUPS[prefix]}" if prefix else label(variant)


def grouped(study, groups, methods=None):
    """List (what was changed, variant, numbers) of the variants in some groups."""
    rows = []
    for variant, numbers in study["variants"].items():
        prefix, method = split_variant(variant)
        if prefix in groups and (methods is None or method in methods):
            rows.append((GROUPS[prefix], variant, numbers))
    return rows


def comparison_tables(study):
    """Tables of the main comparison: scores, differences, spread between runs."""
    comparisons = grouped(study, ("", "lr-high-", "lr-low-", "long-"), MAIN)
    scores = [[group, label(v), x["runs"], x["bases"], *(format_ci(x[m]) for m in SCORES)]
              for group, v, x in comparisons]  # fmt: skip
    if study["before"]:
        before = study["before"].values()
        n = study["before"]["exact"]["n"]
        scores.insert(0, ["before training", "base + plan", "-", n, *map(format_ci, before)])
    minus = [f"{m} - grpo" for m in SCORES]
    differences = [
        [group, label(v), x[minus[0]]["n"], *(format_ci(x[m], 3, True) for m in minus),
         x[minus[0]]["bases"]["n"], *(format_ci(x[m]["bases"], 3, True) for m in minus)]
        for group, v, x in comparisons if x[minus[0]]
    ]  # fmt: skip
    show = lambda s: f"{s['std']:.4f}, {s['std_other']:.4f}, {s['p']:.3f}"
    tested = [(group, v, study["between_runs"].get(v, {})) for group, v, _ in comparisons]
    spread = [[group, label(v), x["reward"]["n"], *(show(x[m]) for m in SCORES)]
              for group, v, x in tested if x.get("reward")]  # fmt: skip
    methods = ("grpo", "eggrpo")
    bases = [
        [base, x["grpo"]["exact"]["n"],
         *(format_ci(x.get(m, {}).get(s)) for s in SCORES for m in methods)]
        for base, x in study["bases"].items() if "grpo" in x
    ]  # fmt: skip
    return {
        "comparison": (["", "method", "runs", "base policies", *SCORES], scores),
        "bases": (["preset's learning rate", "runs",
                   *(f"{s}, {NAMES[m]}" for s in SCORES for m in methods)], bases),
        "differences": (["", "method", "pairs", *(f"{m} - GRPO" for m in SCORES), "base policies",
                         *(f"{m}, over base policies" for m in SCORES)], differences),
        "between runs": (["", "method", "pairs", *SCORES], spread),
    }  # fmt: skip


def variant_tables(study):
    """Tables of ablations, regimes, exploration and stability."""
    everything, preset = grouped(study, GROUPS), grouped(study, ("",))
    minus = lambda x, name: format_ci(x[name], 3, True)
    ablations = [
        [label(v), x["runs"], *(format_ci(x[m]) for m in SCORES),
         *(minus(x, f"{m} - grpo") for m in SCORES),
         *(format_ci(x[m]) for m in ("plan entropy", "image entropy"))]
        for _, v, x in preset
    ]  # fmt: skip
    regimes = [
        [group, label(v), x["runs"], *(format_ci(x[m]) for m in SCORES),
         *(minus(x, f"{m} - grpo") if not v.endswith("-grpo") else "" for m in SCORES)]
        for group, v, x in grouped(study, ("no-kl-", "rarer-"))
    ]  # fmt: skip
    area, by_step = "rare exact over training", "rare exact by step"

    def against_step(rows, count):
        """Exact on rare pairs at `count` steps of training and over all of it."""
        steps = [*dict.fromkeys(step for _, _, x in rows for step in x[by_step])]
        steps = steps[:: max((len(steps) - 1) // (count - 1), 1)] if steps else []
        head = ["method", "runs", *(f"step {s}" for s in steps), "mean over training", "minus GRPO"]
        return head, [
            [label(v), x["runs"], *(format_ci(x[by_step].get(s)) for s in steps),
             format_ci(x[area]), minus(x, f"{area} - grpo")]
            for _, v, x in rows
        ]  # fmt: skip

    stability = [
        [group, label(v), x["runs"], f"{x['worst reward']:.3f}", x["fell"],
         f"{x['largest fall']:.3f}"]
        for group, v, x in everything
    ]  # fmt: skip
    to = [f"{m} - GRPO" for m in SCORES]
    fell = f"exact fell by more than {FELL}"
    return {
        "ablations": (["method", "runs", *SCORES, *to, "plan entropy", "image entropy"], ablations),
        "regimes": (["", "method", "runs", *SCORES, *to], regimes),
        "exploration": against_step(preset, 5),
        "horizon": against_step(grouped(study, ("long-",)), 6),
        "stability": (["", "method", "runs", "worst reward", fell, "largest fall"], stability),
    }  # fmt: skip


TITLES = {
    "comparison": "Main comparison, by learning rate and horizon: means over runs",
    "differences": "Differences to GRPO, paired; over pairs and over base policies",
    "between runs": "Spread between runs of a base policy: std, std of GRPO, p of permutations",
    "bases": "By base policy",
    "ablations": "Ablations and rivals, preset's learning rate; entropies at the end of training",
    "regimes": "Regimes: one change, made to GRPO and to EG-GRPO; scores by the true reward",
    "categories": "Exact by category: base policies on recorded prompts, the others over runs",
    "correlations": "Reward against entropy: over images; plan entropy: over plans",
    "spread": "Spread of what is drawn for a prompt",
    "tokens": "Where entropy lies: means over images",
    "exploration": "Exact on rare pairs during training",
    "horizon": "The same in five times the steps",
    "rare": "Exact by rare pair and base policy, mean over runs; pairs that runs have found",
    "gradients": "Parts of the gradient: size, cosine, progress, over those of GRPO's gradient",
    "stability": "Stability: worst run, and falls of held-out exact from its best to its last",
}


def tables(study):
    """Lay a study out. Returns {name: Markdown} of the tables of TITLES that have rows."""
    found = comparison_tables(study) | variant_tables(study)
    columns = study["categories"]
    names = [*dict.fromkeys(c for x in columns.values() for c in x)]
    row = lambda setting, x: [setting, *(format_ci(x.get(c), 3, " - " in setting) for c in names)]
    found["categories"] = ["exact", *names], [row(*item) for item in columns.items()]
    for name, head, digits in (
        ("correlations", "reward against", 2),
        ("spread", "within a prompt", 3),
        ("tokens", "mean", 3),
    ):
        columns = study[name]
        rows = [*dict.fromkeys(key for x in columns.values() for key in x)]
        cell = lambda s, key: format_ci(
            columns[s].get(key), digits, name == "correlations" or " - " in s
        )
        found[name] = [head, *columns], [[key, *(cell(s, key) for s in columns)] for key in rows]
    variants = list(study["rare"]["found"])
    found["rare"] = (
        ["pair", "", *("base + plan" if v == "base" else title(v) for v in variants)],
        [[pair, base, *(f"{x[v]:.3f}" if v in x else "-" for v in variants)]
         for pair, bases in study["rare"]["exact"].items() for base, x in bases.items()]
    )  # fmt: skip
    if variants:
        counts = [f"{k} of {n}" for k, n in study["rare"]["found"].values()]
        found["rare"][1].append([f"found: above {FOUND}", "all", *counts])
    columns, kinds = study["gradients"], ("size", "cosine", "along")
    parts = next(iter(columns.values()), {})
    found["gradients"] = (
        ["part", *(f"{setting}: {kind}" for setting in columns for kind in kinds)],
        [[part, *(format_ci(x[part][kind]) for x in columns.values() for kind in kinds)]
         for part in parts],
    )  # fmt: skip
    return {name: markdown_table(*found[name]) for name in TITLES if found[name][1]}


def report(study):
    """Lay all tables out, as study.md."""
    found = tables(study)
    return "\n".join(f"## {TITLES[name]}\n\n{table}\n" for name, table in found.items())
