"""Kill each stage at random moments, start it again by the same command, and hold what it leaves
against a run never interrupted: log, weights and pictures, bit for bit.

    python -m lab.kills 20          20 kills a stage, in the smoke preset, and the figures
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint

ROOT = Path(__file__).parent.parent


class Stage(NamedTuple):
    command: list
    needs: tuple  # checkpoints of earlier stages
    file: str  # its checkpoint
    log: str


STAGES = {
    "tiny_vq": Stage(
        [
            "-m",
            "tiny_vq.train",
            "--images",
            "100",
            "--batch",
            "16",
            "--scored",
            "14",
            "--steps",
            "60",
            "--save-every",
            "7",
        ],
        (),
        "tokenizer.pt",
        "tokenizer.jsonl",
    ),
    "base": Stage(
        ["pretrain.py", "--items", "100", "--batch", "16", "--steps", "60", "--save-every", "7"],
        ("tokenizer.pt",),
        "base.pt",
        "base.jsonl",
    ),
    "eggrpo": Stage(
        [
            "eggrpo.py",
            "--eval-prompts",
            "4",
            "--steps",
            "12",
            "--save-every",
            "5",
            "--eval-every",
            "6",
        ],
        ("tokenizer.pt", "base.pt"),
        "eggrpo-0/policy.pt",
        "eggrpo-0/log.jsonl",
    ),
}


def prepare(stage, made, out):
    """Give a new output folder what a stage needs. made: an output folder of a whole pipeline."""
    (out / "smoke").mkdir(parents=True)
    for name in stage.needs:
        shutil.copy(made / "smoke" / name, out / "smoke" / name)


def command_of(stage, out):
    return [sys.executable, *stage.command, "--preset", "smoke", "--out", str(out)]


def start(stage, out):
    return subprocess.Popen(
        command_of(stage, out),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_log(process, log, since):
    """Wait until a process has opened its log, which it does as its loop begins, or has ended."""
    while process.poll() is None and not (log.exists() and log.stat().st_mtime > since):
        time.sleep(0.01)


def finish(stage, out):
    """Run a stage to its end. Returns the seconds it took, and those after it opened its log."""
    started, process = time.time(), start(stage, out)
    await_log(process, out / "smoke" / stage.log, started)
    begun = time.time()
    _, printed = process.communicate()
    assert process.returncode == 0, printed
    return time.time() - started, time.time() - begun


def without_seconds(path):
    """The records of a log, but for its header and its clock."""
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records]


def assert_same(stage, ours, theirs):
    """Hold one finished run against another, bit for bit; nothing temporary is left."""
    ours, theirs = ours / "smoke", theirs / "smoke"
    assert without_seconds(ours / stage.log) == without_seconds(theirs / stage.log)
    weights = [checkpoint.load(f / stage.file)["model"] for f in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    pictures = [
        {
            p.name: p.read_bytes()
            for p in (f / stage.file).parent.glob("*.[pg]*")
            if p.suffix in (".png", ".gif")
        }
        for f in (ours, theirs)
    ]
    assert pictures[0] == pictures[1]
    assert not list(ours.rglob("*.tmp"))


def kill(stage, made, whole, seconds, folder, kills, seed=0):
    """Kill a stage `kills` times at random moments, and start it again until it ends; then compare.
    A run that ends before its kill is compared and another one begun.

    Start-up is long and the loop short: every other kill is drawn over all the stage's seconds, the
    others over those after it opened its log. made, whole: output folders of a pipeline and of this
    stage uninterrupted; seconds: as finish returns them. Returns how many kills landed before the
    first checkpoint, how many after the log was opened, how many runs were compared.
    """
    draw, early, running, compared = random.Random(f"{seed} {stage.file}"), 0, 0, 0
    out, left = None, kills
    while left or out:
        if not out:
            out = folder / f"{compared}"
            prepare(stage, made, out)
        file, log = (out / "smoke" / name for name in (stage.file, stage.log))
        started, process = time.time(), start(stage, out)
        if left % 2:
            await_log(process, log, started)
        delay = draw.uniform(0, seconds[left % 2])
        try:
            _, printed = process.communicate(timeout=delay if left else None)
            assert process.returncode == 0, printed
            assert_same(stage, out, whole)
            out, compared = None, compared + 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            left -= 1
            early += not file.exists()
            running += log.exists() and log.stat().st_mtime > started
    return early, running, compared


def main(kills):
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        for name, stage in STAGES.items():
            (made / "smoke").mkdir(parents=True, exist_ok=True)
            whole = Path(folder) / f"whole-{name}"
            prepare(stage, made, whole)
            seconds = finish(stage, whole)
            early, running, compared = kill(stage, made, whole, seconds, Path(folder) / name, kills)
            print(
                f"{name}: {kills} of {kills} kills survived, {early} before the first checkpoint,"
                f" {running} after the log was opened; {compared} runs compared, "
                f"{seconds[0]:.1f} s uninterrupted",
                flush=True,
            )
            if stage.file != "eggrpo-0/policy.pt":
                shutil.copy(whole / "smoke" / stage.file, made / "smoke")


if __name__ == "__main__":
    main(int(sys.argv[1]))
