"""It survives: kills, full disks, bad numbers, bad input. What is finished is never lost, and what
is wrong is said in one line."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import common
import eggrpo
import evaluate
import pretrain
import rewards
import sample
from conftest import one_line, run
from common import UserError
from scenes import make_scene
from stages import (
    ROOT,
    STAGES,
    assert_same,
    launch,
    launch_stage,
    prepare,
    wait_until,
    without_seconds,
)
from tiny_vq import train as tiny_vq_train

TINY = {
    "tiny_vq": (tiny_vq_train, "--images 16 --steps 5 --batch 4 --scored 7 --save-every 2"),
    "base": (pretrain, "--items 16 --steps 5 --batch 4 --save-every 2"),
    "eggrpo": (
        eggrpo,
        "--steps 3 --prompts 1 --plans-per-prompt 2 --eval-prompts 2 --eval-every 2 --save-every 2",
    ),
}


def tiny(name, out):
    """Run a stage in this process, as small as it goes; what it left is in `out`."""
    module, flags = TINY[name]
    common.run(lambda: module.main([*flags.split(), "--preset", "smoke", "--out", str(out)]))


@pytest.fixture
def folders(out, tmp_path):
    """A function: name of a stage -> two output folders, in the first of which it has run."""

    def make(name):
        for folder in ("whole", "other"):
            prepare(STAGES[name], out[0], tmp_path / folder)
        tiny(name, tmp_path / "whole")
        return tmp_path / "whole", tmp_path / "other"

    return make


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_goes_on_and_ends_as_if_it_never_was(out, whole, tmp_path, name):
    stage, cut = STAGES[name], tmp_path / "cut"
    prepare(stage, out[0], cut)
    process = launch_stage(stage, cut)
    wait_until(process, (cut / "smoke" / stage.checkpoint).exists)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert launch_stage(stage, cut).wait() == 0
    assert_same(stage, cut, whole(name))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_killed_at_any_of_its_renames_or_records_ends_as_if_it_never_was(
    out, tmp_path, monkeypatch, name
):
    """A single kill hardly ever lands in the narrow windows between two writes: here each is hit. A
    copy of the files at each fsync is what a kill there leaves."""
    whole, stage = tmp_path / "whole", STAGES[name]
    prepare(stage, out[0], whole)
    fsync, copies = os.fsync, []

    def copy_files(file):
        fsync(file)
        copies.append(tmp_path / str(len(copies)))
        shutil.copytree(whole, copies[-1])

    monkeypatch.setattr(os, "fsync", copy_files)  # each rename and each record has one
    tiny(name, whole)
    monkeypatch.undo()
    for copy in copies:
        tiny(name, copy)
        assert_same(stage, copy, whole)
    assert len(copies) > 5


def test_a_second_signal_ends_at_once(tmp_path):
    code = (
        "import os, signal, checkpoint, common\n"
        "config = type('Config', (), dict(steps=9, out='out'))\n"
        "checkpoint.result_config = lambda config: {}\n"
        f"stop = checkpoint.Run('base', '{tmp_path}/a.pt', 'a.jsonl', config, '')\n"
        "with stop.progress('steps'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('noted', stop.signal, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still there', flush=True)\n"
    )
    printed = run(sys.executable, "-c", code, status=143)
    assert "noted 2\n" in printed  # beside the progress bar
    assert "still there" not in printed


@pytest.mark.parametrize(
    "stage, command, doing, number",
    [
        ("tiny_vq", "-m tiny_vq.train --images 1000000", "render", signal.SIGINT),
        ("base", "pretrain.py --items 1000000", "corpus", signal.SIGTERM),
        ("eggrpo", "evaluate.py --prompts 500 --batch 8", "base, no plan, eval", signal.SIGINT),
    ],
)
def test_a_signal_outside_the_loop_is_one_line(out, tmp_path, stage, command, doing, number):
    prepare(STAGES[stage], out[0], tmp_path)
    output = tmp_path / "printed.txt"
    process = launch([*command.split(), "--preset", "smoke", "--out", tmp_path], output)
    wait_until(process, lambda: doing in output.read_text())
    process.send_signal(number)
    status, printed = process.wait(60), output.read_text()
    assert status == 128 + number and "Traceback" not in printed, printed
    assert "\ninterrupted; the same command goes on" in printed


def test_train_sh_ends_with_the_stage_that_is_interrupted(tmp_path):
    process = subprocess.Popen(
        ["bash", "train.sh", "--preset", "smoke", "--out", tmp_path],
        cwd=ROOT,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHON": sys.executable},
    )
    log = tmp_path / "smoke" / "tokenizer.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert "go on with `python -m tiny_vq.train" in printed and "corpus" not in printed


# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(size):
    """Within it no file grows beyond so many bytes; Python ignores the signal and sees EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(
    folders, monkeypatch, capsys, name
):
    whole, other = folders(name)
    save, path = checkpoint.save, other / "smoke" / STAGES[name].checkpoint
    with contextlib.ExitStack() as stack:

        def save_and_fill(path, record):
            save(path, record)
            if record["step"] == 2:
                stack.enter_context(full_disk(20000))

        monkeypatch.setattr(checkpoint, "save", save_and_fill)
        line = one_line(capsys, 2, tiny, name, other)
    assert re.match(f"error: cannot write {path.parent}/.*: File too large; .*same command", line)
    assert checkpoint.load(path)["step"] == 2 and not list(other.rglob("*.tmp"))
    monkeypatch.undo()
    tiny(name, other)
    assert_same(STAGES[name], other, whole)


def test_a_picture_on_a_full_disk_is_one_line_and_status_2(out, tmp_path, capsys):
    prepare(STAGES["eggrpo"], out[0], tmp_path)
    argv = ["a red circle and a blue square", "--preset", "smoke", "--policy", "base"]
    with full_disk(1000):
        line = one_line(capsys, 2, common.run, lambda: sample.main([*argv, "--out", str(tmp_path)]))
    assert re.match("error: cannot write .*blue-square.png: File too large", line)


def test_a_record_that_did_not_fit_is_dropped_when_the_run_goes_on(tmp_path):
    path, run = tmp_path / "log.jsonl", begin(tmp_path, steps=2)
    run.log(step=0, x=1)
    run.save(0, LINEAR, torch.optim.SGD(LINEAR.parameters(), 0.1))
    with full_disk(path.stat().st_size + 5), pytest.raises(UserError, match="cannot write"):
        run.log(step=1, x=1)
    run.lock.close()
    begin(tmp_path, steps=2).log(step=1, x=2)
    assert without_seconds(path) == [dict(step=0, x=1), dict(step=1, x=2)]


LINEAR = torch.nn.Linear(2, 2)
LINEAR.config = {}


def begin(folder, steps):
    """Begin a run, or go on with it, that trains nothing."""
    config = pretrain.Config(preset="smoke", steps=steps)
    run = checkpoint.Run("base", folder / "a.pt", folder / "log.jsonl", config, "make it")
    run.start("cpu", LINEAR, torch.optim.SGD(LINEAR.parameters(), 0.1))
    return run


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_that_is_none_is_one_line(tmp_path, capsys, name):
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot write" in one_line(capsys, 2, tiny, name, out)


@pytest.mark.parametrize("name", STAGES)
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys, name):
    claim = checkpoint.lock_file(tmp_path / "smoke" / STAGES[name].checkpoint)
    assert "another run is at it" in one_line(capsys, 2, tiny, name, tmp_path)
    claim.close()
    if name != "tiny_vq":
        assert "not there: make it with" in one_line(capsys, 2, tiny, name, tmp_path)


def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(capsys):
    def allocate():
        torch.empty(10**15)

    def cuda():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for function in (allocate, cuda):
        line = one_line(capsys, 2, common.run, function)
        assert re.search("lower --micro-batch.*--batch.*--prompts or --plans-per-prompt", line)


def test_a_run_that_ran_out_of_memory_may_go_on_in_smaller_portions(folders):
    """What the message says to lower first must not be refused."""
    whole, _ = folders("eggrpo")
    path = whole / "smoke" / "eggrpo-0" / "policy.pt"
    configs = [checkpoint.result_config(eggrpo.Config(micro_batch=n)) for n in (8, 64)]
    assert configs[0] == configs[1] and "micro_batch" not in checkpoint.load(path)["config"]


@pytest.mark.parametrize("name", ["meta", "hpu", "abacus", "cuda:99999999999999999999", "\0", ""])
def test_a_device_that_cannot_hold_a_number_is_refused(name):
    with pytest.raises(UserError, match="cannot be used.*try --device cpu"):
        common.pick_device(name)


def test_a_bug_of_ours_keeps_its_traceback():
    def bug():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        common.run(bug)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, function, term, tensors",
    [
        ("tiny_vq", "loss_terms", "error", {"images"}),
        ("base", "token_logp", "plan_nll", {"prompt", "plan", "codes"}),
        ("eggrpo", "micro_batch_loss", "loss", set(eggrpo.Batch._fields)),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    folders, monkeypatch, capsys, name, function, term, tensors
):
    whole, other = folders(name)
    module, calls = TINY[name][0], []
    right = getattr(module, function)

    def wrong(*arguments):
        calls.append(arguments)
        result = right(*arguments)
        if len(calls) != 3:  # step 2 is the third
            return result
        if name == "eggrpo":
            return result[0], result[1] | dict(loss=torch.tensor(float("nan")))
        return (result[0] * float("nan"), *result[1:]) if name == "tiny_vq" else result / 0

    monkeypatch.setattr(module, function, wrong)
    line = one_line(capsys, 2, tiny, name, other)
    path = other / "smoke" / STAGES[name].checkpoint
    dump = path.with_name("bad-batch.pt")
    assert re.match(f"error: step 2: {term} is .*{dump}.*Last good checkpoint: {path}$", line)
    record, batch = checkpoint.load(path), checkpoint.load(dump, keys=set())
    assert record["step"] == batch["step"] == 2 and set(batch["batch"]) == tensors
    assert len({len(x) for x in batch["batch"].values()}) == 1
    monkeypatch.undo()
    tiny(name, other)
    assert_same(STAGES[name], other, whole)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model, run = torch.nn.Linear(2, 2), begin(tmp_path, steps=1)
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="weights that are not finite.*checkpoint: none yet"):
        run.save(0, model, None)
    assert not run.path.exists()


# --- a user's rewards -----------------------------------------------------------------------------


def raises(images, detections, targets):
    return images[0, 0, 0, 0, 0]


BAD_REWARDS = {
    "shape": (lambda images, detections, targets: images.mean(), r"must return floats \(2,\)"),
    "column": (
        lambda images, detections, targets: images[:, 0, 0, :1],
        r"must return floats \(2,\)",
    ),
    "type": (lambda images, detections, targets: [1.0, 2.0], "not list"),
    "none": (lambda images, detections, targets: None, "not NoneType"),
    "integer": (lambda images, detections, targets: torch.ones(2, dtype=torch.long), "torch.int64"),
    "signature": (lambda images: images[:, 0, 0, 0], "raised TypeError"),
    "raises": (raises, "raised IndexError"),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_what_is_wrong_with_a_users_reward_is_said_in_its_name(monkeypatch, world, name):
    function, words = BAD_REWARDS[name]
    monkeypatch.setitem(rewards.REWARDS, name, function)
    targets = rewards.encode_targets(world, [make_scene(world, "eval", 0, i) for i in range(2)])
    with pytest.raises(UserError, match=f"{name!r} in rewards.REWARDS.*{words}"):
        rewards.compute_rewards(
            torch.rand(2, 3, world.image_size, world.image_size), targets, world
        )


def test_a_reward_without_bounds_stops_a_run_and_is_named(folders, monkeypatch, capsys):
    def endless(images, detections, targets):
        return torch.full_like(images[:, 0, 0, 0], float("inf"))

    whole, other = folders("eggrpo")
    monkeypatch.setattr(
        evaluate,
        "evaluate_and_save_gallery",
        lambda *arguments: monkeypatch.setitem(rewards.REWARDS, "endless", endless) or {},
    )
    line = one_line(capsys, 2, tiny, "eggrpo", other)
    assert "in rewards.REWARDS: 'endless' returned an infinite value" in line


def test_a_reward_without_bounds_is_named_and_so_is_a_picture_that_none_judges(
    monkeypatch, policy, env
):
    full = lambda value: (
        lambda images, detections, targets: torch.full_like(images[:, 0, 0, 0], value)
    )
    monkeypatch.setitem(rewards.REWARDS, "endless", full(float("inf")))
    with pytest.raises(UserError, match="REWARDS: 'endless' returned an infinite value"):
        evaluate.evaluate(env, policy, "eval", 2)
    monkeypatch.setattr(rewards, "REWARDS", {"mute": full(float("nan"))})
    with pytest.raises(UserError, match="REWARDS: all of them returned NaN"):
        evaluate.evaluate(env, policy, "eval", 2)


def test_the_batch_of_an_evaluation_changes_no_image(monkeypatch, policy, env):
    light = lambda images, detections, targets: images.mean(dim=(1, 2, 3))
    monkeypatch.setattr(rewards, "REWARDS", {"light": light})
    once, often = (evaluate.evaluate(env, policy, "eval", 130, batch).rewards for batch in (200, 9))
    assert torch.allclose(once, often, atol=1e-5) and once.unique().numel() > 100
    assert torch.allclose(once[:20], evaluate.evaluate(env, policy, "eval", 20).rewards, atol=1e-5)


# --- determinism ----------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_same_seed_gives_the_same_run_and_evaluating_more_often_changes_nothing(
    two_threads, folders, monkeypatch
):
    whole, other = folders("eggrpo")
    tiny("eggrpo", other)
    assert_same(STAGES["eggrpo"], other, whole)
    (other / "smoke" / "eggrpo-0" / "policy.pt").unlink()
    monkeypatch.setitem(TINY, "eggrpo", (eggrpo, TINY["eggrpo"][1].replace("every 2", "every 1")))
    tiny("eggrpo", other)
    logs = [
        [
            {k: v for k, v in r.items() if not k.startswith(("eval_", "rare_"))}
            for r in without_seconds(f / "smoke" / "eggrpo-0" / "log.jsonl")
        ]
        for f in (whole, other)
    ]
    weights = [
        checkpoint.load(f / "smoke" / "eggrpo-0" / "policy.pt")["model"] for f in (whole, other)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_after_500_steps_is_that_after_50(out, tmp_path):
    prepare(STAGES["eggrpo"], out[0], tmp_path)
    process = subprocess.Popen(
        [
            sys.executable,
            "eggrpo.py",
            "--preset",
            "smoke",
            "--out",
            tmp_path,
            "--steps",
            "501",
            "--eval-every",
            "501",
            "--eval-prompts",
            "2",
            "--save-every",
            "100",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, pages = tmp_path / "smoke" / "eggrpo-0" / "log.jsonl", []
    for lines in (52, 502):  # the header, step -1, and the steps
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.01)
        pages.append(int(open(f"/proc/{process.pid}/statm").read().split()[1]))
    assert process.wait() == 0
    print(
        f"resident: {pages[0] * 4096 / 1e6:.1f} MB after 50 steps, "
        f"{pages[1] * 4096 / 1e6:.1f} MB after 500"
    )
    assert abs(pages[1] / pages[0] - 1) < 0.02
