"""Every command as a person runs it, in the smoke preset: outputs, skipping, going on, bad
input."""

import json
import re
import shlex
import signal
import sys
import time

import pytest
import torch
from PIL import Image

import eggrpo
import pretrain
from conftest import run
from kills import ROOT, STAGES, assert_same, prepare, start
from tiny_vq import train as tiny_vq_train


def test_train_sh_runs_all_stages_and_writes_all_outputs(out):
    folder, printed, seconds = out
    smoke = folder / "smoke"
    for name in ("tokenizer.pt", "tokenizer.jsonl", "base.pt", "base.jsonl", "results.json", "results.md", "before-after.png",
                 "eggrpo-0/policy.pt", "eggrpo-0/log.jsonl", "eggrpo-0/gallery-00000.png", "eggrpo-0/training.gif"):
        assert (smoke / name).stat().st_size > 0, name
    assert Image.open(smoke / "eggrpo-0" / "training.gif").n_frames == 3          # steps 0, 2 and 4
    assert "| base + plan (n = 24) |" in printed and "| eggrpo-0 (n = 24) |" in printed
    assert seconds < 120                                                # under 60 on an idle laptop


def test_finished_stages_are_skipped_with_a_line_that_says_so(out):
    folder, _, _ = out
    before = {p: p.stat().st_mtime_ns for p in (folder / "smoke").rglob("*.pt")}
    printed = run("bash", "train.sh", "--preset", "smoke", "--out", folder)
    assert len(re.findall("finished earlier", printed)) == 3
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "smoke").rglob("*.pt")}


def test_the_log_has_every_key_of_the_table(out):
    """The README documents each logged key, and nothing that is not logged."""
    records = [
        json.loads(line)
        for line in (out[0] / "smoke" / "eggrpo-0" / "log.jsonl").read_text().splitlines()
    ]
    logged = {key for r in records[2:] for key in r}
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| key |"):].split("\n\n")[0]
    documented = {
        key
        for row in table.splitlines()[2:]
        for key in re.findall(r"`(\w+)`",
                              row.split("|")[1])
    }
    assert logged == documented


def test_sample_draws_what_is_typed(out):
    printed = run(sys.executable, "sample.py", "a red circle left of a blue square", "--preset",
                  "smoke", "--out", out[0], "--guidance", 2)
    assert (out[0] / "smoke" / "samples" /
            "a-red-circle-left-of-a-blue-square.png").exists() and "picture:" in printed
    run(sys.executable, "sample.py", "three green crosses", "--preset", "smoke", "--out", out[0],
        "--policy", "base", "--direct")


@pytest.mark.parametrize("command, words", [
    (["sample.py", "a rde circle"], "unknown word 'rde' .nearest known: .*red.*grammar"),
    (["sample.py", ""], "prompt is empty"),
    (["eggrpo.py", "--method", "ppo"], "no method 'ppo': choose one of grpo, eggrpo"),
    (["eggrpo.py", "--group", "1"], "--group 1: .* at least 2"),
    (["eggrpo.py", "--low-frac", "0.6", "--high-frac", "0.5"], "add up to at most 1"),
    (["eggrpo.py", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["pretrain.py", "--preset", "huge"], "no preset 'huge': choose one of smoke, cpu, gpu"),
    (["pretrain.py", "--width", "65"], "must be a multiple of --heads"),
    (["pretrain.py", "--save-every", "0"], "--save-every 0: must be at least 1"),
    (["-m", "tiny_vq.train", "--width", "20"], "must be a multiple of 8"),
    (["eggrpo.py", "--guidance", "3", "--score-guidance", "1", "--minibatches", "2"], "one update"),
    (["eggrpo.py", "--seed", "9", "--device", "abacus"], "device 'abacus' cannot be used"),
])
def test_bad_input_is_one_line_and_status_2(out, command, words):
    preset = [] if "--preset" in command else ["--preset", "smoke"]
    printed = run(sys.executable, *command, *preset, "--out", out[0], status=2)
    assert re.search("error: .*" + words, printed) and len(printed.strip().splitlines()) == 1


def test_a_missing_stage_names_the_command_that_makes_it(tmp_path):
    for script, maker in (("pretrain.py", "python -m tiny_vq.train --preset smoke"), ("evaluate.py", "python -m tiny_vq.train"),
                          ("eggrpo.py", "python -m tiny_vq.train"), ("sample.py", "python -m tiny_vq.train")):
        arguments = ["a red circle and a blue square"] if script == "sample.py" else []
        assert maker in run(sys.executable,
                            script,
                            *arguments,
                            "--preset",
                            "smoke",
                            "--out",
                            tmp_path,
                            status=2)


def test_train_sh_refuses_what_it_does_not_know():
    assert "unknown argument --epochs" in run("bash", "train.sh", "--epochs", "3", status=2)
    assert "--preset without a value" in run("bash", "train.sh", "--preset", status=2)
    assert "no preset 'big'" in run("bash", "train.sh", "--preset", "big", status=2)


@pytest.mark.parametrize("stage, number", [("tiny_vq", signal.SIGINT), ("base", signal.SIGTERM),
                                           ("eggrpo", signal.SIGINT)])
def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_is_the_uninterrupted_one(
        out, whole, tmp_path, stage, number):
    """Bit for bit: the same log, but for its clock, the same weights and pictures. The command that
    goes on is the one that was printed."""
    there, stage = whole(stage)[0], STAGES[stage]
    cut = tmp_path / "cut"
    prepare(stage, out[0], cut)
    process, log = start(stage, cut), cut / "smoke" / stage.log
    deadline = time.time() + 60
    while not (log.exists() and '"step": 0' in log.read_text()) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    go_on = re.search("go on with `python (.*)`", printed)[1]
    run(sys.executable, *shlex.split(go_on))
    assert_same(stage, cut, there)


def test_learner_and_reference_are_loaded_apart_and_frozen(out):
    """They start equal and share no memory, or the KL term would always be 0."""
    one, other = (pretrain.load_base("smoke", str(out[0])) for _ in range(2))
    pairs = list(zip(one.parameters(), other.parameters()))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert not any(p.requires_grad for pair in pairs for p in pair)


def test_logs_are_json_that_any_reader_takes(out):
    """NaN, for a component that no prompt of a batch asks for, is null."""
    refuse = lambda constant: pytest.fail(f"{constant} in a log")
    paths = [*out[0].rglob("*.jsonl"), out[0] / "smoke" / "results.json"]
    assert len(paths) == 4
    for path in paths:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)


def test_a_corpus_drawn_by_several_processes_is_the_one_drawn_by_one(eye, world, monkeypatch):
    config = pretrain.Config(preset="cpu", items=44)
    alone = pretrain.make_corpus(config, world, eye.tokenizer, eye.device)
    monkeypatch.setattr(pretrain, "PIECE", 4)
    together = pretrain.make_corpus(config, world, eye.tokenizer, eye.device)
    assert all(torch.equal(a, b) for a, b in zip(alone, together)) and len(alone[0]) == 44


def test_help_lists_every_method_with_what_it_is():
    printed = run(sys.executable, "eggrpo.py", "--help")
    for name, method in eggrpo.METHODS.items():
        assert re.search(rf"^  {name} +{re.escape(method.about)}$", printed, re.M)


def test_bonus_says_how_it_is_used():
    assert "usage: python bonus.py" in run(sys.executable, "bonus.py", "all", status=2)


@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_gpu_preset_runs_two_steps_of_every_stage_on_the_cpu(tmp_path, layers):
    """Nothing in it is untried: its pictures, textures, width and slots; steps and batches are cut,
    and in the fast version layers too."""
    small = ["--preset", "gpu", "--out", tmp_path, "--device", "cpu"]
    run(sys.executable, "-m", "tiny_vq.train", *small, "--pictures", 8, "--steps", 2, "--batch", 4,
        "--scored", 7)
    run(sys.executable, "pretrain.py", *small, "--items", 8, "--steps", 2, "--batch", 4, "--layers",
        layers)
    run(sys.executable, "eggrpo.py", *small, "--steps", 2, "--prompts", 1, "--group", 2,
        "--eval-prompts", 1)
    run(sys.executable, "evaluate.py", *small, "--prompts", 1)


def test_the_gpu_preset_is_of_the_size_it_claims():
    from scenes import WORLDS
    config = pretrain.Config(**pretrain.PRESETS["gpu"])
    policy = pretrain.make_policy(config, WORLDS["gpu"], torch.randn(tiny_vq_train.PRESETS["gpu"]["codes"], 16))
    assert 20e6 < sum(p.numel() for p in policy.parameters()) < 60e6
    assert WORLDS["gpu"].image_tokens == 256 and WORLDS[
        "gpu"].image_size == 64 and tiny_vq_train.PRESETS["gpu"]["codes"] >= 512
