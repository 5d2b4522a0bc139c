"""Every command as a person runs it, in the smoke preset: outputs, skipping, going on, bad
input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import eggrpo
import pretrain
from tiny_vq import train as tiny_vq_train

ROOT = Path(__file__).parent.parent


def run(*command, status=0):
    """Run a command in the repository; return what it printed (both streams)."""
    done = subprocess.run([*map(str, command)],
                          cwd=ROOT,
                          capture_output=True,
                          text=True,
                          env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """The whole pipeline, once, by train.sh."""
    folder = tmp_path_factory.mktemp("out")
    started = time.time()
    printed = run("bash", "train.sh", "--preset", "smoke", "--out", folder)
    return folder, printed, time.time() - started


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
    assert "no preset 'big'" in run("bash", "train.sh", "--preset", "big", status=2)


def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_is_the_uninterrupted_one(out, tmp_path):
    """Bit for bit: the same log (but for seconds) and the same weights."""
    import runtime
    import torch
    (tmp_path / "smoke").mkdir()
    for name in ("tokenizer.pt", "base.pt"):
        (tmp_path / "smoke" / name).write_bytes((out[0] / "smoke" / name).read_bytes())
    command = [sys.executable, "eggrpo.py", "--preset", "smoke", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "smoke" / "eggrpo-0" / "log.jsonl"
    while not (log.exists() and '"step": 0' in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    if process.returncode != 0:                          # 0: it had finished before the signal came
        assert process.returncode == 130 and "go on with `python eggrpo.py" in printed
        run(*command)
    strip = lambda path: [{k: v
                           for k, v in json.loads(line).items() if "seconds" not in k}
                          for line in path.read_text().splitlines()]
    assert strip(log)[1:] == strip(out[0] / "smoke" / "eggrpo-0" / "log.jsonl")[1:]
    ours, theirs = (runtime.load(folder / "smoke" / "eggrpo-0" / "policy.pt", "")["model"]
                    for folder in (tmp_path, out[0]))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


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
    policy = pretrain.make_policy(config, WORLDS["gpu"], tiny_vq_train.PRESETS["gpu"]["codes"])
    assert 20e6 < sum(p.numel() for p in policy.parameters()) < 60e6
    assert WORLDS["gpu"].image_tokens == 256 and WORLDS[
        "gpu"].image_size == 64 and tiny_vq_train.PRESETS["gpu"]["codes"] >= 512
