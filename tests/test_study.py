"""The study: its jobs, its statistics by hand, its records against what was drawn, tables and
figures from files alone, and the page about one step."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eggrpo
import rewards
from common import UserError
from conftest import tiny_policy
from lab import analyze, one_step, records, stats, study, tables
from rollout import make_rollout, training_scenes
from scenes import make_scene

ROOT = Path(__file__).parent.parent
CONFIG = analyze.Config(resamples=300)


# --- statistics -----------------------------------------------------------------------------------


def test_an_interval_over_runs_is_students():
    """Three runs: mean 2, std 1, t = 4.303. Beyond 31 runs the quantile stays that of 31."""
    x = stats.mean_t_ci([1.0, 2.0, 3.0])
    assert x["mean"] == 2 and x["n"] == 3 and abs(x["half"] - 4.303 / 3**0.5) < 1e-9
    many = [0.0, 1.0] * 50
    assert abs(stats.mean_t_ci(many)["half"] - 2.042 * np.std(many, ddof=1) / 10) < 1e-9
    assert np.isnan(stats.mean_t_ci([1.0])["half"])


def test_a_paired_difference_cancels_what_a_pair_shares():
    """Base 0: differences 1 and 3, base 1: difference -4 (its other run has no partner)."""
    one = {(0, 0): 11.0, (0, 1): 23.0, (1, 0): 26.0, (1, 1): 0.0}
    other = {(0, 0): 10.0, (0, 1): 20.0, (1, 0): 30.0, (2, 0): 0.0}
    x = stats.paired_difference(one, other)
    assert x["mean"] == 0 and x["n"] == 3 and x["positive"] == 2
    assert abs(x["half"] - 4.303 * 13**0.5 / 3**0.5) < 1e-9  # std of (1, 3, -4) is 13 ** .5
    # over base policies: 2 and -4
    assert x["bases"]["mean"] == -1 and x["bases"]["n"] == 2
    assert abs(x["bases"]["half"] - 12.706 * 18**0.5 / 2**0.5) < 1e-9
    assert stats.paired_difference(one, {}) is None


def test_the_permutation_test_of_spread_on_two_pairs():
    """(1, -1) against (2, -2): std 2 ** .5 and 8 ** .5. Of the four swaps none and both give the
    log ratio 1/2 or 2, a single one gives (2, -1) and (1, -2): ratio 1. So p = 2 of 4."""
    one, other = {(0, 0): 1.0, (0, 1): -1.0}, {(0, 0): 2.0, (0, 1): -2.0}
    x = stats.compare_spread(one, other)
    assert abs(x["std"] - 2**0.5) < 1e-9 and abs(x["std_other"] - 8**0.5) < 1e-9
    assert x["n"] == 2 and x["p"] == 0.5
    shifted = {key: value + 7 for key, value in other.items()}  # a difference of means is no spread
    assert stats.compare_spread(one, shifted) == x
    assert stats.compare_spread({(0, 0): 1.0, (1, 0): 1.0}, {(0, 0): 1.0, (1, 0): 2.0}) is None


def test_the_permutation_test_sees_a_real_difference_and_no_false_one():
    """20 pairs of five base policies, whose means differ by far more than the runs."""
    draw = np.random.RandomState(0).randn
    runs = lambda scale: {(b, s): 100.0 * b + scale * draw() for b in range(5) for s in range(4)}
    assert stats.compare_spread(runs(5.0), runs(1.0))["p"] < 0.01
    assert stats.compare_spread(runs(1.0), runs(1.0))["p"] > 0.05


def test_ranks_share_ties_and_correlations_are_numpys():
    assert stats.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    points = np.random.RandomState(0).randn(50, 2)
    found = stats.correlate(np.split(points, 10), CONFIG)
    assert abs(found["value"] - np.corrcoef(points.T)[0, 1]) < 1e-12 and found["n"] == 10
    assert found["low"] < found["value"] < found["high"]
    assert np.isnan(stats.correlate([np.ones((5, 2))] * 3, CONFIG)["value"])
    assert stats.ranked([np.array([[5.0], [1.0]]), np.array([[3.0]])])[0].tolist() == [[2], [0]]


def test_a_partial_correlation_is_that_of_the_residuals():
    """x and y are both z and noise: correlated, but not given z."""
    draw = np.random.RandomState(0).randn
    z = draw(300)
    points = np.stack([z + 0.3 * draw(300), z + 0.3 * draw(300), z], 1)
    residual = lambda v: v - np.polyval(np.polyfit(z, v, 1), z)
    expected = np.corrcoef(residual(points[:, 0]), residual(points[:, 1]))[0, 1]
    found = stats.correlate(np.split(points, 30), CONFIG)
    assert abs(found["value"] - expected) < 1e-9 and abs(expected) < 0.2
    assert stats.correlate([g[:, :2] for g in np.split(points, 30)], CONFIG)["value"] > 0.8


def test_correlation_within_prompts_does_not_see_what_is_between_them():
    """Prompts with high x have high y; within each, y falls with x."""
    x = np.arange(5.0)
    groups = [np.stack([x + 10 * i, 30 * i - x], 1) for i in range(4)]
    assert stats.correlate(groups, CONFIG)["value"] > 0.9
    assert abs(stats.correlate(stats.within(groups), CONFIG)["value"] + 1) < 1e-12


def test_a_bootstrap_interval_holds_the_truth_and_narrows_with_prompts():
    """Prompts are resampled, not images: ten copies of each image narrow nothing."""
    draw = np.random.RandomState(1).randn
    prompts = [draw(1) for _ in range(500)]
    few, copied, many = (
        stats.bootstrap_mean(groups, CONFIG)
        for groups in (prompts[:20], [np.repeat(g, 10) for g in prompts[:20]], prompts)
    )
    width = lambda x: x["high"] - x["low"]
    assert few["low"] < 0 < few["high"] and width(many) < 0.4 * width(few)
    assert abs(width(copied) - width(few)) < 1e-9


# --- jobs and records -----------------------------------------------------------------------------


def test_every_job_has_a_name_of_its_own_and_comes_after_what_it_needs():
    jobs = study.plan(study.Config(preset="cpu"))
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    for i, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:i]), job.name
    first = [job.name for job in jobs if job.kind == "run"][:2]
    assert first == ["base-0/grpo-0", "base-0/eggrpo-0"]
    variants = {job.name.split("/")[1].rpartition("-")[0] for job in jobs if job.kind == "run"}
    methods = {analyze.split_variant(v)[1] for v in variants}
    assert methods == {*study.MAIN, *study.RIVALS}


def test_records_tell_of_the_images_that_were_drawn(env, world):
    """Images of a plan share it; entropies lie in [0, 1]; distances are those of the pixels."""
    policy, config = tiny_policy(world, codes=32), study.Config(plans=3, images=2)
    scene = make_scene(world, "eval", 0, 4)
    rows = records.record_rows(config, env, policy, scene, "base 0, colour 0")
    assert [r["plan_index"] for r in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["plan"] == rows[1]["plan"] != rows[2]["plan"]
    assert rows[0]["plan_entropy"] == rows[1]["plan_entropy"] != rows[2]["plan_entropy"]
    assert all(0 < r[k] < 1 for r in rows for k in ("plan_entropy", "image_entropy", "distance"))
    again = records.record_rows(config, env, policy, scene, "base 0, colour 0")
    direct = records.record_rows(config, env, policy, scene, "base 0, colour 0", no_plan=True)
    assert again == rows and {r["plan"] for r in direct} == {""}


def test_the_parts_of_the_gradient_are_parts_of_the_update(env, world, monkeypatch):
    """Those on low, middle and high tokens are GRPO's; the bonus for those on low is EG-GRPO's,
    which is the gradient that an update of eggrpo.py has without KL term. Progress is additive too;
    it is by hand that of two batches. Rewards are random: an untrained policy's are all equal."""
    score = rewards.compute_rewards

    def score_at_random(images, targets, world):
        reward, components, exact = score(images, targets, world)
        return images.flatten(1).mean(1) * 1e4 % 1, components, exact

    monkeypatch.setattr(rewards, "compute_rewards", score_at_random)
    policy = tiny_policy(world, codes=32).requires_grad_(True)
    sizes = dict(prompts=2, plans_per_prompt=4, micro_batch=3)
    config = eggrpo.Config(preset="smoke", beta=0.0, **sizes)

    def gradients(step):
        rollout = make_rollout(policy, env, training_scenes(world, config, step), config, step)
        batch = eggrpo.make_batch(rollout, config)
        parts = records.gradient_parts(batch, policy.C)
        return batch, dict(zip(parts, records.part_gradients(policy, batch, parts, config)))

    (batch, g), (_, other) = gradients(0), gradients(1)
    halves = "low", "middle", "high", "bonus on"
    low, middle, high, bonus = (g[f"{x} words"] + g[f"{x} image tokens"] for x in halves)
    assert torch.allclose(low + middle + high, g["GRPO"], atol=1e-6)
    assert torch.allclose(g["GRPO"] - low + bonus, g["EG-GRPO"], atol=1e-6)
    assert min(x.norm() for x in g.values()) > 1e-4
    loss, _ = eggrpo.micro_batch_loss(policy, None, batch, batch.valid.sum(), config)
    loss.backward()
    own = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert torch.allclose(-own, g["EG-GRPO"], atol=1e-6)
    rows = {row["part"]: row for row in records.gradient_rows(env, policy, config, 2)}
    of_two = lambda x: (g[x] @ other["GRPO"] + other[x] @ g["GRPO"]).item()
    for name, row in rows.items():
        assert abs(row["along"] - of_two(name) / of_two("GRPO")) < 1e-3
        sizes = [x[name].norm() / x["GRPO"].norm() for x in (g, other)]
        assert abs(row["size"] - sum(sizes) / 2) < 1e-4
    assert rows["GRPO"]["cosine"] == pytest.approx(1) and rows["EG-GRPO"]["cosine"] < 0.9999


# --- tables, figures, page ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(out, tmp_path_factory):
    """The first jobs of the smoke study on the pipeline's base policy, and their analysis."""
    made, folder = out[0] / "smoke", tmp_path_factory.mktemp("study")
    base = folder / "base-0" / "smoke"
    base.mkdir(parents=True)
    for name in ("tokenizer.pt", "base.pt", "base.jsonl"):
        (base / name).write_bytes((made / name).read_bytes())
    (base / "base.done").write_bytes(b"")
    arguments = ["--preset", "smoke", "--out", str(folder)]
    names = [*analyze.SETTINGS.values(), "base.gradients", "grpo-0.gradients", "base.rare"]
    for job in ("grpo-0", "eggrpo-0", *(f"records/{name}" for name in names)):
        study.main([*arguments, "--only", f"base-0/{job}"])
    config = study.Config(out=str(folder), **dict(study.PRESETS["smoke"], preset="smoke"))
    study.collect(config, study.plan(config))
    analyze.main([*arguments, "--resamples", "20"])
    return folder


def test_a_study_that_was_stopped_early_leaves_tables_and_figures(small):
    figures = {path.name: path.stat().st_size for path in (small / "smoke/figures").iterdir()}
    names = "entropy-mean entropy-std spread plan-entropy curves differences"
    assert set(figures) == {f"{name}.png" for name in names.split()}
    assert max(figures.values()) < 150_000
    numbers = json.loads((small / "smoke/study.json").read_text())
    assert list(numbers["variants"]) == ["grpo", "eggrpo"]
    assert set(numbers["tokens"]) == set(analyze.SETTINGS)
    page = (small / "smoke/study.md").read_text()
    assert page == tables.report(numbers) and "| EG-GRPO - GRPO |" in page
    rows = study.read_lines(small / "base-0/smoke/records/base.jsonl")
    assert len(rows) == 6 * 2 * 2  # categories, plans, images
    assert len(numbers["gradients"]["GRPO"]) == 10 and "| bonus on words |" in page
    assert "| red cross | base policy 0 | 0.000 |" in page


def synthetic_runs():
    """Runs of two base policies and two numbers, EG-GRPO .01 below GRPO; one run of each rival."""
    runs = {}
    for variant, effect in (("grpo", 0.0), ("eggrpo", -0.01), ("lr-high-grpo", 0.0),
                            ("lr-high-eggrpo", -0.04), ("exclude", 0.02), ("no-kl-grpo", 0.0),
                            ("no-kl-eggrpo", 0.0)):  # fmt: skip
        for base, number in ((0, 0), (0, 1), (1, 0), (1, 1))[: 1 if variant == "exclude" else 4]:
            reward = 0.8 + 0.1 * base + 0.02 * number + effect
            scores = dict(
                reward=reward, exact=reward - 0.2, categories={"colour": {"exact": reward}}
            )
            curve = [
                [0, 0.6, 0.4, 0.5, 0.0],
                [30, reward, 0.7, 0.5, 0.1],
                [60, reward, 0.6, 0.5, 0.4],
            ]
            runs.setdefault(variant, {})[base, number] = dict(
                scores={"eval": scores, "rare": scores},
                curve=curve,
                train=[[0, 0, 0, 0.1, 0.05, 0]],
            )
    return runs


def test_tables_of_runs_by_hand():
    """Pairs are of one learning rate or regime; a variant with one run has no interval."""
    rare = [(0, "base", 0.0), (0, "grpo", 0.2), (0, "grpo", 0.0), (1, "grpo", 0.3)]
    rare = [(base, variant, dict(pair="red cross", exact=x)) for base, variant, x in rare]
    found = analyze.analyze(synthetic_runs(), {}, {}, rare, CONFIG)
    eggrpo = found["variants"]["eggrpo"]
    assert (
        eggrpo["runs"] == 4 and eggrpo["bases"] == 2 and abs(eggrpo["reward"]["mean"] - 0.85) < 1e-9
    )
    difference = eggrpo["reward - grpo"]
    assert abs(difference["mean"] + 0.01) < 1e-9 and difference["positive"] == 0
    high = found["variants"]["lr-high-eggrpo"]["reward - grpo"]
    assert abs(high["mean"] + 0.04) < 1e-9
    assert found["variants"]["exclude"]["reward - grpo"]["n"] == 1
    # area: (0 + .1) / 2 over the first half, (.1 + .4) / 2 over the second
    assert abs(eggrpo["rare exact over training"]["mean"] - (0.05 + 0.25) / 2) < 1e-9
    assert eggrpo["fell"] == 4 and abs(eggrpo["largest fall"] - 0.1) < 1e-9  # from .7 to .6
    laid = tables.tables(json.loads(json.dumps(found)))
    pairs = "| preset's learning rate | EG-GRPO | 4 | -0.010 ± 0.000 | -0.010 ± 0.000 |"
    assert pairs in laid["differences"]
    assert "| `exclude` | 1 | 0.820 | 0.620 |" in laid["ablations"]
    assert "| red cross | base policy 0 | 0.000 | 0.100 |" in laid["rare"]
    assert "| red cross | base policy 1 | - | 0.300 |" in laid["rare"]
    assert "| found: above 0.1 | all | 0 of 1 | 2 of 3 |" in laid["rare"]
    assert "| no KL term | EG-GRPO | 4 |" in laid["regimes"] and "spread" not in laid


def test_a_study_that_is_not_there_is_named():
    with pytest.raises(UserError, match="no study in nowhere/cpu: make it with"):
        analyze.main(["--preset", "cpu", "--out", "nowhere"])


def test_the_page_about_one_step_is_that_of_its_numbers(small):
    """The committed page; and figure, numbers and page of the smoke preset."""
    numbers = json.loads((ROOT / "assets/one-step.json").read_text())
    assert (ROOT / "docs/one-step.md").read_text() == one_step.page(numbers)
    one_step.main(["--preset", "smoke", "--out", str(small / "base-0"), "--run", "eggrpo-0"])
    folder = small / "base-0/smoke"
    numbers = json.loads((folder / "one-step.json").read_text())
    assert (folder / "one-step.md").read_text() == one_step.page(numbers)
    assert (folder / "one-step.png").stat().st_size < 300_000
    tokens = numbers["tokens"]["good"]
    assert sum(tokens["image"]["low"]) == 7 and sum(tokens["image"]["high"]) == 18  # of 36


# --- stopping and going on ------------------------------------------------------------------------


def test_ctrl_c_ends_the_runs_in_hand_and_starts_no_others(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.study", "--preset", "smoke", "--out", tmp_path, "--jobs", "1"],
        cwd=ROOT,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    logs = tmp_path / "smoke" / "logs"
    while not (logs.exists() and list(logs.iterdir())) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in printed, printed
    assert [log.name for log in logs.iterdir()] == ["base-0.txt"]


@pytest.mark.slow
def test_train_sh_makes_the_whole_study_and_goes_on_where_it_was(tmp_path):
    from test_commands import run

    command = ["bash", "train.sh", "study", "--preset", "smoke", "--out", tmp_path]
    printed = run(*command)
    assert re.search(r"study: (\d+) jobs, \1 to do", printed) and "| `exclude` |" in printed
    assert re.search(r"study: \d+ jobs, 0 to do", run(*command))
