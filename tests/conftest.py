"""Shared by the tests: a tiny random policy and tokenizer, and the smoke preset's pipeline, run
once. No trained weights and no network."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Tensors are small: more threads than one wait for each other, for minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and by commands
os.environ.pop("CALLED_FROM", None)  # of train.sh test: the tests say where they are

import torch
from matplotlib.figure import Figure

import common
import evaluate
import runs
from eggrpo import logp_difference
from model import Policy, score
from scenes import WORLDS
from tiny_vq.vqvae import VQVAE

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared bit for bit runs on a CPU
    elif torch.cuda.is_available():
        common.set_up_cuda(torch.device("cuda"))  # as pick_device does in every command


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and bash train.sh test -m gpu"))


def run(*command, status=0, cwd=ROOT, interrupt_at=None):
    """Run a command; return what it printed (both streams). interrupt_at: a file; when it has two
    lines, Ctrl-C is sent, as a terminal sends it (numpy may lose it while images are drawn)."""
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=cwd,
        start_new_session=interrupt_at is not None,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"},
    )
    if interrupt_at:
        lines = lambda: interrupt_at.read_text().splitlines() if interrupt_at.exists() else []
        while process.poll() is None and len(lines()) < 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=600)
    if interrupt_at:
        with pytest.raises(ProcessLookupError):  # none of its processes is left
            os.killpg(process.pid, 0)
    assert process.returncode == status and "Traceback" not in printed, printed
    return printed


def one_line(capsys, status, main, *arguments, runner=common.run):
    """Run a command's main() that must exit with this status; return the one line it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runner(lambda: main(*arguments))
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith(("error", "interrupted"))]
    assert stop.value.code == status and len(lines) == 1 and "Traceback" not in printed, printed
    return lines[0]


def read_log(path):
    """Return the header of a log and its records."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def killed_after(step, monkeypatch):
    """Kill a run after a step was logged, before its checkpoint is saved."""
    log = runs.Run.log

    def killed(run, logged, **values):
        log(run, logged, **values)
        if logged >= step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "log", killed)
        yield


@torch.no_grad()
def difference(policy, rollout, guidance=1.0):
    """Score a rollout. Returns the mean absolute difference of log-probs, nats."""
    logp = score(policy, rollout.prompt, rollout.plan, rollout.codes, guidance)
    return logp_difference(rollout, logp).item()


def vary(images, *_):
    """A reward that differs from image to image: an untrained policy's others are all equal."""
    return images.flatten(1).mean(1) * 1e4 % 1


@pytest.fixture
def no_galleries(monkeypatch):
    """To draw them takes longer than to train the smoke preset."""
    monkeypatch.setattr(evaluate, "draw_gallery", lambda *_: Figure(figsize=(0.2, 0.2)))


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """Run the pipeline by train.sh, through a link and from another folder, the methods side by
    side. Returns its output folder and what it printed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "link.sh").symlink_to(ROOT / "train.sh")
    folder = tmp_path_factory.mktemp("out")
    relative = os.path.relpath(folder, elsewhere)
    command = "env", "OMP_NUM_THREADS=2", "bash", "link.sh", "--preset=smoke", f"--out={relative}"
    return folder, run(*command, cwd=elsewhere)


@pytest.fixture
def world():
    return WORLDS["small"]


def tiny_policy(world, codes=32, seed=0, scale=8.0):
    """A random policy whose distributions are far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    policy = Policy(world, codes, 4, width=32, layers=2, heads=2)
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return policy


@pytest.fixture
def policy(world):
    return tiny_policy(world)


def tiny_env(world, device):
    """The environment of tiny_policy, with a random tokenizer."""
    torch.manual_seed(0)
    tokenizer = VQVAE(world.patch, width=16, blocks=1, codebook_size=32, dim=4)
    return evaluate.Env(tokenizer.to(device), world, device)


@pytest.fixture
def env(world):
    return tiny_env(world, torch.device("cpu"))
