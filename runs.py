"""Checkpoint (for torch.load) and log (a JSON object per line) of a run of a stage: to look up, not
to read. A finished stage is skipped, an interrupted one goes on."""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import subprocess
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import check


class Unfinished(common.UserError):
    """A run that has not been trained to its end."""


def load_checkpoint(path, origin, command):
    """Read a checkpoint. origin: see load_model; command: what makes it. Raises UserError if it is
    missing or damaged, or was made from other files."""
    check(path.is_file(), f"{path} is not there: make it by `{command}`")
    again = f"remove it and run `{command}`"
    content = path.read_bytes()
    try:
        # torch.load does not compare checksums
        whole = zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        record = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        whole = False
    check(whole and "origin" in record, f"{path} is damaged, or of another version: {again}")
    problem = f"{path} was made from other files than those at hand: choose another, or {again}"
    check(record["origin"] == origin, problem)
    return record


def load_model(model_class, path, origin, script, config):
    """Read a finished run, made by `script`. Returns its model, with the attribute `log`, and its
    settings. Files that do not belong together are refused: a checkpoint names by one string, its
    origin, what it was made from, and that must be at hand. A tokenizer is made from a preset's
    world, a policy from a model, whose attribute `origin` is a digest of its weights and of its own
    origin. Parameters keep requires_grad: without it autocast casts them at each use."""
    command = common.command_for(script, config)
    record = load_checkpoint(path, origin, command)
    done, steps = record["step"], record["config"]["steps"]
    if done < steps:
        raise Unfinished(f"{path} stands at step {done} of {steps}: go on by `{command}`")
    model = model_class(**record["model_config"])
    model.load_state_dict(record["model"])
    digest = hashlib.sha256(origin.encode())
    for value in record["model"].values():
        digest.update(value.numpy().tobytes())
    model.origin = digest.hexdigest()
    model.log = record["log"]
    return model, record["config"]


def check_settings(path, old, new):
    """Raise UserError if a file was made with other settings, {name: value}."""
    for name, value in new.items():
        problem = f"{path} was made with {common.flag(name)} {old.get(name)}, not {value}"
        check(old.get(name) == value, f"{problem}: use that, another --out, or remove it")


class Run:
    """One run, which an earlier process may have begun. The checkpoint has the log too, so that a
    run that goes on writes it again as it was then. name, log_name: of the files in config.folder;
    origin, script: see load_model; more: settings besides those of the config. Raises UserError if
    the run was begun with other settings or files."""

    FREE = ("device", "out", "name", "micro_batch", "eval_every")  # change no result
    PAUSE = 180  # seconds between checkpoints

    def __init__(self, name, log_name, config, device, origin, script, **more):
        self.path = config.folder / name
        self.log_path = config.folder / log_name
        self.saved = time.monotonic()
        settings = dataclasses.asdict(config) | more
        settings = {name: settings[name] for name in settings if name not in self.FREE}
        head = dict(commit=commit(), device=str(device), torch=str(torch.__version__))
        head["config"] = settings
        self.record = dict(config=settings, origin=origin, step=0, log=[head])
        if self.path.exists():
            command = common.command_for(script, config)
            self.record = load_checkpoint(self.path, origin, command)
            check_settings(self.path, self.record["config"], settings)
        self.steps = range(self.record["step"], config.steps)  # that are left; none: finished
        if not self.steps:
            print(f"finished earlier: {self.path}")
            return
        # Whose the run is: the process that began it or went on with it last.
        self.process = os.urandom(8).hex()
        self.record["log"][0]["process"] = self.process
        lines = [json.dumps(line) + "\n" for line in self.record["log"]]
        common.write(self.log_path, "".join(lines).encode())

    def progress(self, title, model, optimizer):
        """Load the weights and the optimizer of an earlier process, if there was one. Returns a
        progress bar over the steps that are left."""
        if self.steps.start:
            model.load_state_dict(self.record["model"])
            optimizer.load_state_dict(self.record["optimizer"])
        return tqdm(self.steps, title, total=self.steps.stop, initial=self.steps.start)

    def open_log(self):
        """Open the log. Raises UserError if another process has the run."""
        file = open(self.log_path, "r+")
        mine = self.process in file.readline()
        check(mine, f"another process goes on with {self.log_path}: this one ends")
        return file

    def log(self, step, **values):
        """Append a line to the log. Raises UserError if a value is not finite, except of a
        component of the reward, which may not apply."""
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            problem = f"step {step}: {name} is {value}: lower --lr, and use another --name or --out"
            check(finite or name.startswith("reward/"), problem)
        values = common.to_jsonable(dict(step=step, **values))
        with self.open_log() as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(values) + "\n")
        self.record["log"].append(values)

    def save(self, step, model, optimizer):
        """Write the checkpoint after the last step, and before it every PAUSE seconds."""
        last = step + 1 == self.steps.stop
        if not last and time.monotonic() - self.saved < self.PAUSE:
            return
        self.open_log().close()
        self.record |= dict(step=step + 1, model_config=model.config, model=model.state_dict())
        self.record["optimizer"] = {} if last else optimizer.state_dict()
        buffer = io.BytesIO()
        torch.save(self.record, buffer)
        common.write(self.path, buffer.getvalue())
        self.saved = time.monotonic()


def commit():
    """Return the commit of this code, or "unknown" outside of a repository of its own."""
    git = "git --git-dir=.git --work-tree=. describe --always --dirty || echo unknown"
    environment = {"PATH": os.environ.get("PATH", "")}  # without GIT_DIR and the like
    options = dict(cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    return subprocess.run(git, shell=True, **options).stdout.strip()
