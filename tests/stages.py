"""Training stages as processes: start, wait, compare what they leave bit for bit."""

import json
import shutil
import subprocess
import sys
import time
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


def prepare(stage, pipeline, out):
    """Copy the inputs of a stage to a new output folder. pipeline: output folder of all stages."""
    (out / "smoke").mkdir(parents=True)
    for name in stage.inputs:
        shutil.copy(pipeline / "smoke" / name, out / "smoke" / name)


def launch(arguments, output):
    """Start `python ARGUMENTS`. Returns the process; Path `output` gets both of its streams."""
    command = [sys.executable, *map(str, arguments)]
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def launch_stage(stage, out):
    """Start a stage; its streams go to printed.txt in its output folder."""
    arguments = [*stage.command.split(), "--preset", "smoke", "--out", out]
    return launch(arguments, out / "printed.txt")


def wait_until(process, condition, seconds=60):
    """Wait until a condition holds while the process runs."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)


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
