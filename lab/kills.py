"""Kill each training stage at random moments, start it again by the same command, and compare its
log, weights and images bit for bit with those of an uninterrupted run.

    python -m lab.kills 20          20 kills per stage in the smoke preset; prints the counts

Commands run in processes forked from one that has imported torch: a start takes milliseconds, not
seconds, and every kill lands in the command's own code.
"""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint

ROOT = Path(__file__).parent.parent


class Stage(NamedTuple):
    command: str  # arguments of python
    inputs: tuple  # checkpoints of earlier stages
    checkpoint: str
    log: str


STAGES = {
    "tiny_vq": Stage(
        "-m tiny_vq.train --images 100 --batch 8 --scored 14 --steps 40 --save-every 7",
        (),
        "tokenizer.pt",
        "tokenizer.jsonl",
    ),
    "base": Stage(
        "pretrain.py --items 100 --batch 8 --steps 40 --save-every 7",
        ("tokenizer.pt",),
        "base.pt",
        "base.jsonl",
    ),
    "eggrpo": Stage(
        "eggrpo.py --eval-prompts 4 --steps 8 --save-every 3 --eval-every 4",
        ("tokenizer.pt", "base.pt"),
        "eggrpo-0/policy.pt",
        "eggrpo-0/log.jsonl",
    ),
}


# --- processes ------------------------------------------------------------------------------------

# multiprocessing reads the exit status of a process once: two threads must not try at a time
LOCK = threading.Lock()


@lru_cache(maxsize=1)
def fork_server():
    """Return a context whose processes are forked from one that has imported every command, but
    computed nothing: no threads of torch are lost in a fork."""
    context = multiprocessing.get_context("forkserver")
    commands = ["tiny_vq.train", "pretrain", "eggrpo", "evaluate", "sample"]
    context.set_forkserver_preload([*commands, "torch._dynamo"])  # imported by optimizers
    return context


def run_python(arguments, output):
    """Do what `python ARGUMENTS` does, in this process; both output streams go to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    multiprocessing.set_start_method(None, force=True)  # the default, as in a new interpreter
    as_module = arguments[0] == "-m"
    sys.argv = arguments[as_module:]
    if as_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def launch(arguments, output):
    """Start `python ARGUMENTS` in a forked process. Returns it; Path `output` gets its streams."""
    process = fork_server().Process(target=run_python, args=([*map(str, arguments)], str(output)))
    with LOCK:
        process.start()
    return process


def launch_stage(stage, out):
    """Start a stage; its streams go to printed.txt in its output folder."""
    arguments = [*stage.command.split(), "--preset", "smoke", "--out", out]
    return launch(arguments, out / "printed.txt")


def exit_status(process):
    """Return the exit status of a process, None while it runs."""
    with LOCK:
        return process.exitcode


def wait(process, condition=lambda: False, seconds=float("inf")):
    """Wait until a process ends, a condition holds or the seconds have passed. Returns the exit
    status, None if the process runs."""
    deadline = time.time() + seconds
    while (status := exit_status(process)) is None:
        if condition() or time.time() > deadline:
            return None
        time.sleep(0.005)
    return status


# --- runs -----------------------------------------------------------------------------------------


def prepare(stage, pipeline, out):
    """Copy the inputs of a stage to a new output folder. pipeline: output folder of all stages."""
    (out / "smoke").mkdir(parents=True)
    for name in stage.inputs:
        shutil.copy(pipeline / "smoke" / name, out / "smoke" / name)


def finish(stage, out):
    """Run a stage to its end. Returns the seconds that it took."""
    process, started = launch_stage(stage, out), time.time()  # returns once the server has forked
    status = wait(process)
    assert status == 0, (out / "printed.txt").read_text()
    return time.time() - started


def without_seconds(path):
    """Return the records of a log without its header and its times."""
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records]


def read_images(folder):
    """Return {name: bytes} of the images in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".gif")}


def assert_same(stage, out, reference):
    """Compare the log, weights and images of two finished runs bit for bit; `out` has no temporary
    files. out, reference: output folders."""
    out, reference = out / "smoke", reference / "smoke"
    assert without_seconds(out / stage.log) == without_seconds(reference / stage.log)
    paths = out / stage.checkpoint, reference / stage.checkpoint
    weights = [checkpoint.load(path)["model"] for path in paths]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert read_images(paths[0].parent) == read_images(paths[1].parent)
    assert not list(out.rglob("*.tmp"))


class Counts(NamedTuple):
    early: int  # kills before the first checkpoint
    logged: int  # kills after the log was opened
    compared: int  # finished runs


def kill(stage, pipeline, reference, seconds, folder, kills, seed=0):
    """Kill a stage `kills` times at random moments and start it again until it ends; then compare.

    A run that ends before its kill is compared and another one is begun. pipeline, reference:
    output folders of all stages and of this stage uninterrupted, which took `seconds`; folder: for
    the output folders of the killed runs. Returns Counts.
    """
    draw, early, logged, compared = random.Random(f"{seed} {stage.checkpoint}"), 0, 0, 0
    out, left = None, kills
    while left or out:
        if not out:
            out = folder / f"{compared}"
            prepare(stage, pipeline, out)
        started, process = time.time(), launch_stage(stage, out)
        status = wait(process, seconds=draw.uniform(0, seconds) if left else float("inf"))
        if status is None:
            process.kill()
            wait(process)
            log = out / "smoke" / stage.log
            left -= 1
            early += not (out / "smoke" / stage.checkpoint).exists()
            logged += log.exists() and log.stat().st_mtime > started
        else:
            assert status == 0, (out / "printed.txt").read_text()
            assert_same(stage, out, reference)
            out, compared = None, compared + 1
    return Counts(early, logged, compared)


def main(kills):
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / "pipeline"
        (pipeline / "smoke").mkdir(parents=True)
        for name, stage in STAGES.items():
            reference = Path(folder) / f"reference-{name}"
            prepare(stage, pipeline, reference)
            seconds = finish(stage, reference)
            counts = kill(stage, pipeline, reference, seconds, Path(folder) / name, kills)
            print(
                f"{name}: {kills} of {kills} kills survived, {counts.early} before the first "
                f"checkpoint, {counts.logged} after the log was opened; {counts.compared} runs "
                f"compared, {seconds:.1f} s uninterrupted",
                flush=True,
            )
            if stage.inputs != STAGES["eggrpo"].inputs:
                shutil.copy(reference / "smoke" / stage.checkpoint, pipeline / "smoke")


if __name__ == "__main__":
    main(int(sys.argv[1]))
