"""What many tests share: a tiny random policy and tokenizer, and the smoke preset's pipeline, run
once. No weights and no network."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

# Tensors are small: more threads than one wait for each other, for minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and by commands

import torch

import common
from model import Policy
from rollout import Env
from scenes import WORLDS
from stages import ROOT, STAGES, launch_stage, prepare
from words import WORDS
from tiny_vq.vqvae import VQVAE


def pytest_sessionstart():
    if torch.cuda.is_available():
        common.set_up_cuda(torch.device("cuda"))  # as pick_device does in every command


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA"))


def run(*command, status=0):
    """Run a command in the repository; return what it printed (both streams)."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def one_line(capsys, status, function, *arguments):
    """Call a function that must exit with this status; return the one line it has to say."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    printed = capsys.readouterr().err
    lines = [line for line in printed.split("\n") if re.match("error|interrupted", line)]
    assert stop.value.code == status and len(lines) == 1 and "Traceback" not in printed
    return lines[0]


def run_pipeline(folder):
    """Run the whole pipeline by train.sh. Returns its folder, what it printed and seconds."""
    started = time.time()
    printed = run("bash", "train.sh", "--preset", "smoke", "--out", folder)
    return folder, printed, time.time() - started


@pytest.fixture(scope="session", autouse=True)
def pipeline(request, tmp_path_factory):
    """Start the pipeline, if a test needs it, beside the first tests: these use one core."""
    needed = any("out" in item.fixturenames for item in request.session.items)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_pipeline, tmp_path_factory.mktemp("out")) if needed else None


@pytest.fixture(scope="session")
def out(pipeline):
    """The whole pipeline, once, by train.sh: its folder, what it printed and seconds."""
    return pipeline.result()


@pytest.fixture(scope="session")
def whole(out, tmp_path_factory):
    """A function: name of a stage -> the output folder of its run, uninterrupted."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / name
            prepare(STAGES[name], out[0], made[name])
            assert launch_stage(STAGES[name], made[name]).wait() == 0
        return made[name]

    return make


@pytest.fixture
def world():
    return WORLDS["cpu"]


def tiny_policy(world, codes=32, seed=0, scale=8.0):
    """A random policy whose distributions are far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    policy = Policy(
        len(WORDS),
        codes,
        4,
        world.prompt_slots,
        world.plan_slots,
        world.image_tokens,
        width=32,
        layers=2,
        heads=2,
    )
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return policy


@pytest.fixture
def policy(world):
    return tiny_policy(world)


@pytest.fixture
def env(world):
    torch.manual_seed(0)
    return Env(
        VQVAE(world.patch, width=16, blocks=1, codebook_size=32, dim=4), world, torch.device("cpu")
    )
