"""The study: its statistics by hand, its records against what was drawn, its figures from files
alone, and the README's numbers."""

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

from common import UserError
from conftest import tiny_policy
from lab import analyze, study
from scenes import make_scene

ROOT = Path(__file__).parent.parent


def test_an_interval_over_runs_is_students():
    """Three runs: mean 2, std 1, t = 4.303."""
    x = analyze.mean_t_ci([1.0, 2.0, 3.0])
    assert x["mean"] == 2 and x["n"] == 3 and abs(x["half"] - 4.303 / 3**0.5) < 1e-9


CONFIG = analyze.Config(resamples=300)


def test_ranks_share_ties_and_correlations_are_numpys():
    assert analyze.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    points = np.random.RandomState(0).randn(50, 2)
    found = analyze.correlation_of(np.split(points, 10), CONFIG)
    assert abs(found["value"] - np.corrcoef(points.T)[0, 1]) < 1e-12 and found["n"] == 10
    assert np.isnan(analyze.correlation_of([np.ones((5, 2))] * 3, CONFIG)["value"])


def test_correlation_within_prompts_does_not_see_what_is_between_them():
    """Prompts with high x have high y; within each, y falls with x."""
    x = np.arange(5.0)
    groups = [np.stack([x + 10 * i, 30 * i - x], 1) for i in range(4)]
    assert analyze.correlation_of(groups, CONFIG)["value"] > 0.9
    assert abs(analyze.correlation_of(analyze.within(groups), CONFIG)["value"] + 1) < 1e-12


def test_a_bootstrap_interval_holds_the_truth_and_narrows_with_prompts():
    """Prompts are resampled, not pictures: ten copies of each picture narrow nothing."""
    draw = np.random.RandomState(1).randn
    prompts = [draw(1) for _ in range(500)]
    few, copied, many = (
        analyze.bootstrap_mean(groups, CONFIG)
        for groups in (prompts[:20], [np.repeat(g, 10) for g in prompts[:20]], prompts)
    )
    width = lambda x: x["high"] - x["low"]
    assert few["low"] < 0 < few["high"] and width(many) < 0.4 * width(few)
    assert abs(width(copied) - width(few)) < 1e-9


def test_a_paired_difference_cancels_what_a_seed_shares():
    run = lambda x: dict(scores=x)
    runs = {
        "a": {s: run(10.0 * s + 1) for s in range(4)},
        "b": {s: run(10.0 * s) for s in (0, 2, 3)},
    }
    d = analyze.difference(runs, "a", "b", lambda r: r["scores"])
    assert d == dict(mean=1.0, half=0.0, n=3)
    assert analyze.difference(runs, "a", "c", lambda r: r["scores"]) is None


def test_every_job_has_a_name_of_its_own_and_what_matters_most_comes_first():
    names = [job.name for job in study.all_jobs(study.Config(preset="cpu"))]
    assert len(names) == len(set(names))
    assert names[:4] == ["grpo-0", "eggrpo-0", "grpo-1", "eggrpo-1"]
    assert sum(re.fullmatch(r"eggrpo-\d", name) is not None for name in names) == 5


def test_records_tell_of_the_pictures_that_were_drawn(env, world):
    """Pictures of a plan share it; entropies lie in [0, 1]; distances are those of the pixels."""
    policy, config = tiny_policy(world, codes=32), study.Config(plans=3, pictures=2)
    scene = make_scene(world, "eval", 0, 4)
    rows = study.record_rows(config, env, policy, scene, 0)
    assert [r["plan_index"] for r in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["plan"] == rows[1]["plan"] != rows[2]["plan"]
    assert rows[0]["plan_entropy"] == rows[1]["plan_entropy"] != rows[2]["plan_entropy"]
    assert all(0 < r[k] < 1 for r in rows for k in ("plan_entropy", "image_entropy", "distance"))
    again = study.record_rows(config, env, policy, scene, 0)
    direct = study.record_rows(config, env, policy, scene, 0, no_plan=True)
    assert again == rows and {r["plan"] for r in direct} == {""}


@pytest.fixture(scope="module")
def small(out, tmp_path_factory):
    """Half a dozen jobs of the smoke study, and its analysis."""
    made, out = out[0] / "smoke", str(tmp_path_factory.mktemp("study"))
    (Path(out) / "smoke").mkdir()
    for name in ("tokenizer.pt", "base.pt"):
        (Path(out) / "smoke" / name).write_bytes((made / name).read_bytes())
    common, threads = ["--preset", "smoke", "--out", out], torch.get_num_threads()
    torch.set_num_threads(1)
    for job in (
        "grpo-0",
        "eggrpo-0",
        "records-base-no-plan",
        "records-base",
        "records-grpo-0",
        "records-eggrpo-0",
        "records-pictures",
    ):
        study.main([*common, "--only", job])
    torch.set_num_threads(threads)
    analyze.main([*common, "--resamples", "20"])
    return Path(out) / "smoke"


def test_a_study_leaves_tables_figures_and_their_data(small):
    for name in ("entropy-mean", "entropy-std", "plan-entropy", "spread", "curves"):
        assert (small / "figures" / f"{name}.png").stat().st_size < 2e5
        assert len((small / "figures" / f"{name}.csv").read_text().splitlines()) > 1
    for name in (
        "study.json",
        "study.md",
        "figures/maps.png",
        "figures/before-after.png",
        "figures/training.gif",
    ):
        assert (small / name).exists(), name
    numbers = json.loads((small / "study.json").read_text())
    assert set(numbers["A"]) == {"base", "base + plan", "GRPO", "EG-GRPO", "EG-GRPO - GRPO"}
    rows = [json.loads(x) for x in (small / "records" / "base.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 2 * 2  # categories, plans, pictures


def test_a_study_that_is_not_there_is_named():
    with pytest.raises(UserError, match="no study in nowhere/cpu: make it with"):
        analyze.main(["--preset", "cpu", "--out", "nowhere"])


def test_ctrl_c_ends_the_runs_in_hand_and_starts_no_others(small, tmp_path):
    (tmp_path / "smoke").mkdir()
    for name in ("tokenizer.pt", "base.pt"):
        (tmp_path / "smoke" / name).write_bytes((small / name).read_bytes())
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
    assert [log.name for log in logs.iterdir()] == ["grpo-0.txt"]


@pytest.mark.slow
def test_train_sh_makes_the_whole_study_and_goes_on_where_it_was(tmp_path):
    from test_commands import run

    command = ["bash", "train.sh", "study", "--preset", "smoke", "--out", tmp_path]
    printed = run(*command)
    assert re.search(r"study: (\d+) jobs, \1 to do", printed) and "| `dapo` |" in printed
    assert re.search(r"study: \d+ jobs, 0 to do", run(*command))
