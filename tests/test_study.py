"""The study: its jobs, its statistics by hand, its records against what was drawn, tables and
figures from files alone, and the page about one step."""

import copy
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import eggrpo
import rewards
from common import UserError
from conftest import ROOT, run, vary
from lab import analyze, bench, measure, one_step
from lab import pictures, stats, study, tables, world
from scenes import RARE_PAIRS, make_scene


def test_an_interval_over_runs_is_students():
    """Three runs: mean 2, std 1, t = 4.303. Beyond 31 runs the quantile stays that of 31."""
    x = stats.mean_t_ci([1.0, 2.0, 3.0])
    assert x["mean"] == 2 and x["n"] == 3 and abs(x["half"] - 4.303 / 3**0.5) < 1e-9
    many = [0.0, 1.0] * 50
    assert abs(stats.mean_t_ci(many)["half"] - 2.042 * np.std(many, ddof=1) / 10) < 1e-9
    assert np.isnan(stats.mean_t_ci([1.0])["half"])


def test_a_paired_difference_cancels_what_a_pair_shares():
    """Base 0: differences 1 and 3, in the mean 2; base 1: -4 (its other run has no partner)."""
    one = {(0, 0): 11.0, (0, 1): 23.0, (1, 0): 26.0, (1, 1): 0.0}
    other = {(0, 0): 10.0, (0, 1): 20.0, (1, 0): 30.0, (2, 0): 0.0}
    x = stats.paired_difference(one, other)
    assert x["mean"] == -1 and x["n"] == 2 and x["runs"] == 3
    assert abs(x["half"] - 12.706 * 18**0.5 / 2**0.5) < 1e-9  # std of (2, -4) is 18 ** .5
    assert stats.paired_difference(one, {}) is None


def test_correlations_are_numpys():
    points = np.random.RandomState(0).randn(50, 2)
    found = stats.correlation(np.split(points, 10))
    assert abs(found - np.corrcoef(points.T)[0, 1]) < 1e-12
    assert abs(stats.slope(np.split(points, 10)) - np.polyfit(*points.T, 1)[0]) < 1e-12
    assert np.isnan(stats.correlation([np.ones((5, 2))] * 3))
    assert np.isnan(stats.slope([np.ones((5, 2))] * 3))


def test_correlation_within_prompts_does_not_see_what_is_between_them():
    """Prompts with high x have high y; within each, y falls with x."""
    x = np.arange(5.0)
    groups = [np.stack([x + 10 * i, 30 * i - x], 1) for i in range(4)]
    assert stats.correlation(groups) > 0.9
    assert abs(stats.correlation(stats.within(groups)) + 1) < 1e-12
    assert abs(stats.slope(stats.within(groups)) + 1) < 1e-12


def test_what_a_third_column_causes_is_held():
    """x and y both rise with z; besides, y falls with x."""
    draw = np.random.RandomState(0).randn
    z, noise = draw(2, 1000)
    x = 5 * z + noise
    y = 10 * z - (x - 5 * z) + 0.1 * draw(1000)
    assert stats.correlation([np.stack([x, y], 1)]) > 0.8
    assert stats.correlation([np.stack([x, y, z], 1)]) < -0.98
    assert abs(stats.slope([np.stack([x, y, z], 1)]) + 1) < 0.02


def test_every_job_has_a_name_of_its_own_and_comes_after_what_it_needs():
    jobs = study.plan(study.Config())
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    for i, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:i]), job.name
    runs = [job for job in jobs if job.kind == "runs"]
    assert [job.name for job in runs[:2]] == ["base-0/runs/grpo-0", "base-0/runs/eggrpo-0"]
    assert {job.flags[1] for job in runs} == set(eggrpo.METHODS)


@pytest.fixture
def tiny(env, policy, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "vary", vary)
    return env, policy


def test_the_vendi_score_is_the_effective_number_of_images():
    """Two images that share half of their cells: K / 2 has the eigenvalues .75 and .25."""
    assert measure.vendi_score([[1, 2, 3]] * 5) == pytest.approx(1)
    assert measure.vendi_score([[0, 0], [1, 1], [2, 2]]) == pytest.approx(3)
    half = 0.75**-0.75 * 0.25**-0.25
    assert measure.vendi_score([[0, 1], [0, 2]]) == pytest.approx(half)


SETTINGS = eggrpo.Config(preset="smoke", prompts=2, group_size=4, micro_batch=3, beta=0.0)


def test_records_tell_of_the_images_that_were_drawn(tiny):
    """Images of a plan share it; entropies lie in [0, 1]; distances are those of the pixels."""
    env, policy = tiny
    config = study.Config(plans=3, images=2)
    scene = make_scene(env.world, "eval", 0, 4)
    rows = measure.record_rows(config, env, policy, scene, "base 0, colour 0")
    assert [row["plan_index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["plan"] == rows[1]["plan"] != rows[2]["plan"]
    assert rows[0]["plan_entropy"] == rows[1]["plan_entropy"] != rows[2]["plan_entropy"]
    for row in rows:
        for key in ("plan_entropy", "image_entropy", "distance", "paint"):
            assert 0 < row[key] < 1
    again = measure.record_rows(config, env, policy, scene, "base 0, colour 0")
    direct = measure.record_rows(config, env, policy, scene, "base 0, colour 0", no_plan=True)
    assert again == rows and {row["plan"] for row in direct} == {""}


def test_the_parts_of_the_gradient_are_parts_of_the_update(tiny):
    """Those on low, middle and high tokens are GRPO's; the bonus for those on low is EG-GRPO's,
    which is the gradient of a training step without KL term, on the same batch."""
    env, policy = tiny
    gradients = []
    for step in (1, 0):
        found = measure.training_batch(env, policy, SETTINGS, step)
        parts = world.gradient_parts(found, SETTINGS)
        gradients += [dict(zip(parts, world.part_gradients(policy, found, parts, SETTINGS)))]
    g = gradients[1]
    levels = "low", "middle", "high", "bonus on"
    low, middle, high, bonus = (g[f"{x} words"] + g[f"{x} image tokens"] for x in levels)
    assert torch.allclose(low + middle + high, g["GRPO"], atol=1e-6)
    assert torch.allclose(g["GRPO"] - low + bonus, g["EG-GRPO"], atol=1e-6)
    assert min(x.norm() for x in g.values()) > 1e-4

    learner = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(learner.parameters(), 1.0)
    logged = eggrpo.train_step(learner, None, optimizer, env, SETTINGS, step=0)
    moved = [new - old for new, old in zip(learner.parameters(), policy.parameters())]
    moved = torch.cat([x.flatten() for x in moved]) * max(logged["grad_norm"], 1)  # unclipped
    assert torch.allclose(moved, g["EG-GRPO"], atol=1e-5)

    sizes = world.gradient_sizes(env, policy, SETTINGS, 2)
    for name, size in sizes.items():
        by_hand = [x[name].norm() / x["GRPO"].norm() for x in gradients]
        assert abs(size - sum(by_hand) / 2) < 1e-4


@pytest.fixture(scope="module")
def small(out, tmp_path_factory):
    """The first jobs of the smoke study, their training done by the pipeline, and the analysis."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(out[0] / "smoke", folder / "base-0" / "smoke")
    arguments = ["--preset", "smoke", "--out", str(folder)]
    names = ["base-0", "base-0/runs/grpo-0", "base-0/runs/eggrpo-0"]
    names += [f"base-0/records/{name}" for name in study.RECORDED]
    names += ["base-0/passes/base"]
    for name in names:
        study.main([*arguments, "--only", name])
    analyze.main(arguments)
    return folder


def test_a_study_that_was_stopped_early_leaves_tables_and_figures(small):
    drawn = {path.name: path.stat().st_size for path in (small / "smoke/figures").iterdir()}
    names = "curves differences discovery entropy-mean pass-at-k"
    assert set(drawn) == {f"{name}.png" for name in names.split()}
    assert max(drawn.values()) < 50_000
    numbers = json.loads((small / "smoke/study.json").read_text())
    assert list(numbers["variants"]) == ["base-no-plan", "base", "grpo", "eggrpo"]
    assert set(numbers["spread"]) > set(tables.NAMES.values())
    page = (small / "smoke/study.md").read_text()
    assert page == tables.report(numbers)
    assert "| EG-GRPO | 1 | 0.000 |" in page and "| plan entropy, within prompts |" in page
    rows = study.read_lines(small / "base-0/smoke/records/base.jsonl")
    assert len(rows) == 6 * 2 * 2  # categories, plans, images


@pytest.mark.parametrize("name, page", [("study", tables.report), ("one-step", one_step.page)])
def test_the_committed_page_is_that_of_the_committed_numbers(name, page):
    numbers = json.loads((ROOT / f"assets/{name}.json").read_text())
    assert (ROOT / f"docs/{name}.md").read_text() == page(numbers)
    if name == "study":
        assert tables.main_table(numbers["variants"]) in (ROOT / "docs/results.md").read_text()


def synthetic_runs():
    """Runs of two base policies and two numbers, EG-GRPO .01 below GRPO; one run of exclusion."""
    effects = {"base": 0.0, "grpo": 0.0, "eggrpo": -0.01, "exclude": 0.02}
    effects |= {"guided-grpo": 0.0, "guided-eggrpo": -0.04, "short-grpo": 0.0}
    effects |= {"short-exclude": -0.03, "short-bonus": -0.02, "short-eggrpo": 0.01}
    end = dict(plan_entropy=0.1, image_entropy=0.05, kl=0.2, turned_signs=0.0)
    runs = {}
    pairs = lambda red: {" ".join(pair): red * (pair[0] == "red") for pair in RARE_PAIRS}
    for variant, effect in effects.items():
        numbers = [(0, 0), (0, 1), (1, 0), (1, 1)]
        for base, number in numbers[: 1 if variant == "exclude" else 4]:
            reward = 0.8 + 0.1 * base + 0.02 * number + effect
            categories = dict(colour=dict(exact=reward))
            found = {pair: dict(exact=share) for pair, share in pairs(0.2 * base).items()}
            scores = dict(
                eval=dict(reward=reward, exact=reward - 0.2, categories=categories),
                rare=dict(exact=0.1, rare_pairs=found),
                diversity=dict(vendi=2.0 + effect, reward_std=0.1),
            )
            run = dict(scores=scores)
            if variant != "base":
                run |= dict(made="abc on cpu", end=end | {"lambda": 1.0})
                run["curve"] = [
                    dict(step=0, eval_exact=0.4, rare_exact=0.0, rare_exact_by_pair=pairs(0.0)),
                    dict(step=30, eval_exact=0.7, rare_exact=0.1, rare_exact_by_pair=pairs(0.4)),
                    dict(step=60, eval_exact=0.6, rare_exact=0.4, rare_exact_by_pair=pairs(0.5)),
                ]
            runs.setdefault(variant, {})[base, number] = run
    return runs


def test_tables_of_runs_by_hand():
    """A guided method is compared with guided GRPO; a variant with one run has no interval."""
    found = analyze.analyze(synthetic_runs(), {}, {})
    eggrpo = found["variants"]["eggrpo"]
    assert eggrpo["runs"] == 4 and eggrpo["bases"] == 2
    assert eggrpo["measures"]["reward"]["mean"] == pytest.approx(0.85)
    difference = eggrpo["differences"]["reward"]
    assert difference["mean"] == pytest.approx(-0.01) and difference["runs"] == 4
    guided = found["variants"]["guided-eggrpo"]["differences"]["reward"]
    assert guided["mean"] == pytest.approx(-0.04)
    assert found["variants"]["exclude"]["differences"]["reward"]["n"] == 1
    # area: (0 + .1) / 2 over the first half, (.1 + .4) / 2 over the second
    area = eggrpo["measures"]["rare exact over training"]
    assert area["mean"] == pytest.approx((0.05 + 0.25) / 2)
    assert eggrpo["fell"] == 4 and eggrpo["largest_fall"] == pytest.approx(0.1)  # from .7 to .6
    page = tables.report(json.loads(json.dumps(found)))
    main = page.split("## The main methods")[1].splitlines()[6]
    assert "| EG-GRPO | 4 | 0.850 ± 0.635 | 0.650 ± 0.635 | -0.010 ± 0.000 |" in main
    assert "| 4 of 24 |" in main  # rare pairs found
    assert "| EG-GRPO | 4 | -0.010 ± 0.000 | -0.010 ± 0.000 | +0.000 ± 0.000 |" in page
    assert "| `exclude` | 1 | 1 | 0.820 | 0.620 |" in page
    assert "| base + plan | 0.100 ± 1.271 | 0.000 ± 0.000 |" in page
    # of red cross and yellow circle, both 1 % of the corpus, one is found at the third evaluation
    rare = eggrpo["discovery"]["1.0%"]
    assert rare["found"] == 4 and rare["of"] == 8 and rare["step"] == 60
    assert rare["exact"]["mean"] == pytest.approx(0.05)
    assert "| EG-GRPO | 0.050 ± 0.635 | 4 of 8, step 60 |" in page
    interaction = found["interactions"]["exclude x bonus"]["reward"]  # .01 + .03 + .02
    assert interaction["mean"] == pytest.approx(0.06) and interaction["runs"] == 4
    assert found["interactions"]["text x image"]["reward"] is None  # no such runs


def test_pass_at_k_by_hand():
    """Of 4 draws 1 is right: one draw has it with 1/4, two with 1 - C(3, 2) / C(4, 2) = 1/2."""
    assert [stats.pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert stats.pass_at_k(4, 0, 4) == 0
    rows = [dict(n=4, exact=1), dict(n=4, exact=0)]
    assert stats.describe_passes(rows) == {1: 0.125, 2: 0.25, 4: 0.5}


def test_intervals_of_records_are_over_base_policies():
    """Each base policy is described by itself; a change is that of the same base policy."""
    total = lambda rows: dict(total=sum(rows))
    records = {"before": {0: [1], 1: [2]}, "after": {0: [1, 2], 1: [5, 1], 2: [9]}}
    found = stats.describe_settings(records, total, paired=True)
    assert found["before"]["total"]["mean"] == 1.5 and found["after"]["total"]["mean"] == 6
    change = found["after - before"]["total"]  # 2 and 4
    assert change["mean"] == 3 and change["n"] == 2 and abs(change["half"] - 12.706) < 1e-9


def test_a_study_goes_on_with_its_own_settings_only(small):
    """A finished job was once skipped whatever the flags, and stayed as it was."""
    flags = ["--preset", "smoke", "--out", str(small), "--only", "base-0", "--prompts", "24"]
    with pytest.raises(UserError, match="settings.json was made with --prompts 12, not 24"):
        study.main(flags)


def test_a_study_that_is_not_there_is_named():
    with pytest.raises(UserError, match="no study in nowhere/small: make it by"):
        analyze.main(["--out", "nowhere"])


def test_the_page_about_one_step_is_that_of_its_numbers(small):
    """Figure, numbers and page of the smoke preset."""
    one_step.main(["--preset", "smoke", "--out", str(small / "base-0")])
    folder = small / "base-0/smoke"
    numbers = json.loads((folder / "one-step.json").read_text())
    assert (folder / "one-step.md").read_text() == one_step.page(numbers)
    assert (folder / "one-step.png").stat().st_size < 300_000
    tokens = numbers["tokens"]["good"]
    assert sum(tokens["image"]["low"]) == 7 and sum(tokens["image"]["high"]) == 18  # of 36


@pytest.mark.filterwarnings("error")
def test_pictures_fit_the_page_and_can_be_read(small, monkeypatch):
    """At most 830 pixels wide, with text of at least 11; they name the functions of the code."""
    drawn = {}

    def keep(figure, path):
        assert figure.get_figwidth() <= 8.3
        drawn[path.name] = [text for text in figure.findobj(Text) if text.get_text()]
        figure.savefig(io.BytesIO())  # warns if the layout does not fit

    monkeypatch.setattr(pictures, "save_figure", keep)
    pictures.main(["--preset", "smoke", "--out", str(small / "base-0")])
    assert set(drawn) == {"entropy.png", "data.png", "categories.png"}
    assert min(text.get_fontsize() for texts in drawn.values() for text in texts) * 100 / 72 > 11
    words = " ".join(text.get_text() for text in drawn["data.png"])
    assert "4. images (B, 3, h, w)\n(8, 3, 30, 30)" in words and "group_advantages" in words


def test_the_world_is_measured_in_one_line_of_json(small, capsys):
    world.main(["--preset", "smoke", "--out", str(small / "base-0")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= found["q10"] <= found["q50"] <= found["q90"] <= 1
    assert {"objects", "high_on_objects", "gradient"} < set(found)


@pytest.mark.slow
def test_the_benchmark_measures_the_overhead(capsys):
    bench.main(["--preset", "smoke", "--seconds", "0.01"])
    printed = capsys.readouterr().out
    assert re.search(r"EG-GRPO adds to GRPO: [0-9.]+ ms of \d+ ms per step", printed)


def test_ctrl_c_ends_the_runs_in_hand_and_starts_no_others(tmp_path):
    flags = ["--preset", "smoke", "--jobs", "1", "--out", tmp_path]
    first = tmp_path / "smoke/logs/base-0.txt"
    printed = run(sys.executable, "-m", "lab.study", *flags, status=130, interrupt_at=first)
    assert "the same command goes on" in printed and [*first.parent.iterdir()] == [first]


@pytest.mark.slow
def test_train_sh_makes_the_whole_study_and_goes_on_where_it_was(tmp_path):
    make = lambda module: run("bash", "train.sh", module, "--preset", "smoke", "--out", tmp_path)
    assert re.search(r"study: (\d+) jobs, \1 to do", make("lab.study"))
    assert re.search(r"study: \d+ jobs, 0 to do", make("lab.study"))
    assert "| `exclude`, fewer steps |" in make("lab.analyze")
