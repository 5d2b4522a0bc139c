"""Every command as a person runs it, in the smoke preset: outputs, skipping, going on, bad
input."""

import json
import re
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import common
import eggrpo
import evaluate
import pretrain
import sample
from conftest import one_line, run
from model import load_base
from stages import ROOT, STAGES, assert_same, launch, launch_stage, prepare, wait_until
from tiny_vq import train as tiny_vq_train


def test_train_sh_runs_all_stages_and_writes_all_outputs(out):
    folder, printed, seconds = out
    smoke = folder / "smoke"
    for name in (
        "tokenizer.pt",
        "tokenizer.jsonl",
        "base.pt",
        "base.jsonl",
        "results.json",
        "results.md",
        "before-after.png",
        "eggrpo-0/policy.pt",
        "eggrpo-0/log.jsonl",
        "eggrpo-0/gallery-00000.png",
        "eggrpo-0/training.gif",
    ):
        assert (smoke / name).stat().st_size > 0, name
    assert Image.open(smoke / "eggrpo-0" / "training.gif").n_frames == 3  # steps 0, 2 and 4
    assert "| base + plan (n = 24) |" in printed and "| eggrpo-0 (n = 24) |" in printed
    assert seconds < 120  # under 60 on an idle laptop


def test_finished_stages_are_skipped_with_a_line_that_says_so(out, capsys):
    folder, _, _ = out
    before = {p: p.stat().st_mtime_ns for p in (folder / "smoke").rglob("*.pt")}
    for module in (tiny_vq_train, pretrain, eggrpo):
        module.main(["--preset", "smoke", "--out", str(folder)])
    assert len(re.findall("finished earlier", capsys.readouterr().out)) == 3
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "smoke").rglob("*.pt")}


def test_the_log_has_every_key_of_the_table(out):
    """docs/methods.md documents each logged key, and nothing that is not logged."""
    records = [
        json.loads(line)
        for line in (out[0] / "smoke" / "eggrpo-0" / "log.jsonl").read_text().splitlines()
    ]
    logged = {key for r in records[2:] for key in r}
    page = (ROOT / "docs" / "methods.md").read_text()
    table = page[page.index("| key |") :].split("\n\n")[0]
    documented = {
        key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert logged == documented


def test_sample_draws_what_is_typed(out, capsys):
    """By train.sh, which knows the Python that has the packages."""
    prompt = "a red circle left of a blue square"
    printed = run("bash", "train.sh", "sample", prompt, "--preset", "smoke", "--out", out[0])
    name = "a-red-circle-left-of-a-blue-square.png"
    assert (out[0] / "smoke" / "samples" / name).exists() and "image:" in printed
    sample.main(
        [
            "three green crosses",
            "--preset",
            "smoke",
            "--out",
            str(out[0]),
            "--policy",
            "base",
            "--no-plan",
        ]
    )
    assert "(no plan)" in capsys.readouterr().out


def test_sample_uses_the_guidance_that_the_policy_was_trained_under(out, tmp_path, monkeypatch):
    prepare(STAGES["eggrpo"], out[0], tmp_path / "out")
    flags = ["--preset", "smoke", "--out", str(tmp_path / "out")]
    eggrpo.main(
        [
            *flags,
            "--steps",
            "1",
            "--prompts",
            "1",
            "--plans-per-prompt",
            "2",
            "--eval-prompts",
            "1",
            "--guidance",
            "3",
        ]
    )
    used, original = [], sample.sample_images
    monkeypatch.setattr(
        sample,
        "sample_images",
        lambda *x, **how: used.append(how["guidance"]) or original(*x, **how),
    )
    for more in ([], ["--guidance", "2"], ["--policy", "base"]):
        sample.main(["a red circle and a blue square", *flags, *more])
    assert used == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "command, words",
    [
        (["sample.py", "a rde circle"], "unknown word 'rde' .nearest known: .*red.*grammar"),
        (["sample.py", ""], "prompt is empty"),
        (
            ["eggrpo.py", "--method", "ppo"],
            "--method: invalid choice: 'ppo' .choose from .?grpo.?, .?eggrpo",
        ),
        (["eggrpo.py", "--plans-per-prompt", "1"], "--plans-per-prompt 1: .* at least 2"),
        (["eggrpo.py", "--low-frac", "0.6", "--high-frac", "0.5"], "add up to at most 1"),
        (["eggrpo.py", "--colour", "red"], "unrecognized arguments: --colour red"),
        (
            ["pretrain.py", "--preset", "huge"],
            "--preset: invalid choice: 'huge' .choose from .?smoke.?, .?cpu.?, .?gpu",
        ),
        (["pretrain.py", "--width", "65"], "must be a multiple of --heads"),
        (["pretrain.py", "--save-every", "0"], "--save-every 0: must be at least 1"),
        (["-m", "tiny_vq.train", "--width", "20"], "must be a multiple of 8"),
        (["eggrpo.py", "--seed", "9", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_status_2(out, capsys, command, words):
    module = {
        "-m": tiny_vq_train,
        "eggrpo.py": eggrpo,
        "pretrain.py": pretrain,
        "sample.py": sample,
    }[command[0]]
    argv = [*command[1 + (command[0] == "-m") :], "--out", str(out[0])]
    argv += [] if "--preset" in command else ["--preset", "smoke"]
    line = one_line(capsys, 2, common.run, lambda: module.main(argv))
    assert re.search("error: .*" + words, line)


def test_a_missing_stage_names_the_command_that_makes_it(tmp_path, capsys):
    prompt = ["a red circle and a blue square"]
    for module, arguments in ((pretrain, []), (evaluate, []), (eggrpo, []), (sample, prompt)):
        main = lambda: module.main([*arguments, "--preset", "smoke", "--out", str(tmp_path)])
        line = one_line(capsys, 2, common.run, main)
        assert "python -m tiny_vq.train --preset smoke" in line


def test_train_sh_refuses_what_it_does_not_know():
    flags = ["--epochs 3", "--preset", "--preset big", "--preset smoke --device abacus"]
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(lambda x: run("bash", "train.sh", *x.split(), status=2), flags)
    epochs, nothing, preset, device = printed
    assert "unknown argument --epochs" in epochs and "--preset without a value" in nothing
    assert "invalid choice: 'big'" in preset
    assert "stage 1 of 4" in device and "device 'abacus' cannot be used" in device


def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_is_the_uninterrupted_one(
    out, whole, tmp_path
):
    """Bit for bit: the same log, but for its clock, the same weights and pictures. The command that
    goes on is the one that was printed."""
    stage, cut = STAGES["eggrpo"], tmp_path / "cut"
    prepare(stage, out[0], cut)
    process = launch_stage(stage, cut)
    wait_until(process, (cut / "smoke" / stage.checkpoint).exists)
    process.send_signal(signal.SIGINT)
    status, printed = process.wait(60), (cut / "printed.txt").read_text()
    assert status == 130, printed
    go_on = re.search("go on with `python (.*)`", printed)[1]
    assert launch(shlex.split(go_on), cut / "resumed.txt").wait() == 0
    assert_same(stage, cut, whole("eggrpo"))


def test_learner_and_reference_are_loaded_apart_and_frozen(out):
    """They start equal and share no memory, or the KL term would always be 0."""
    one, other = (load_base("smoke", str(out[0])) for _ in range(2))
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


def test_a_corpus_drawn_by_several_processes_is_the_one_drawn_by_one(env, world, monkeypatch):
    config = pretrain.Config(preset="cpu", items=44)
    alone = pretrain.make_corpus(config, world, env.tokenizer, env.device)
    monkeypatch.setattr(pretrain, "CHUNK", 4)
    together = pretrain.make_corpus(config, world, env.tokenizer, env.device)
    assert all(torch.equal(a, b) for a, b in zip(alone, together)) and len(alone[0]) == 44


def test_help_lists_every_method_with_what_it_is():
    printed = run(sys.executable, "eggrpo.py", "--help")
    for name, method in eggrpo.METHODS.items():
        assert re.search(rf"^  --method {name} +{re.escape(method.about)}$", printed, re.M)


def test_bonus_says_how_it_is_used():
    printed = run(sys.executable, "-m", "lab.bonus", "all", status=2)
    assert "usage: python -m lab.bonus" in printed


@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_gpu_preset_runs_two_steps_of_every_stage_on_the_cpu(tmp_path, layers):
    """Nothing in it is untried: its pictures, textures, width and slots; steps and batches are cut,
    and in the fast version layers and width too."""
    width = 128 if layers == 2 else 512
    for module, flags in (
        (tiny_vq_train, "--images 8 --steps 2 --batch 4 --scored 7"),
        (pretrain, f"--items 8 --steps 2 --batch 4 --layers {layers} --width {width}"),
        (eggrpo, "--steps 2 --prompts 1 --plans-per-prompt 2 --eval-prompts 1"),
        (evaluate, "--prompts 1"),
    ):
        out = ["--preset", "gpu", "--out", str(tmp_path), "--device", "cpu"]
        module.main([*out, *flags.split()])
    assert (tmp_path / "gpu" / "results.md").exists()


def test_the_gpu_preset_is_of_the_size_it_claims():
    from scenes import WORLDS

    entries = tiny_vq_train.Config(**tiny_vq_train.PRESETS["gpu"]).codebook_size
    config = pretrain.Config(**pretrain.PRESETS["gpu"])
    policy = pretrain.make_policy(config, WORLDS["gpu"], torch.randn(entries, 16))
    assert 20e6 < sum(p.numel() for p in policy.parameters()) < 60e6
    world = WORLDS["gpu"]
    assert world.image_tokens == 256 and world.image_size == 64 and entries >= 512
