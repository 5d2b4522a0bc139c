"""Checkpoints, and the files and signals of a training run: what is saved is never lost or mixed.

A run that is interrupted or killed and started again by the same command ends with the log and the
weights of an uninterrupted one. Files are written whole, carry a checksum and hold no code.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import platform
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common import TrainingDiverged, UserError, check, to_jsonable, write

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

MAGIC = b"eggrpo checkpoint 3\n"
KEYS = {"kind", "config", "step", "steps", "model_config", "model", "optimizer"}
# config fields that do not change results
FREE = ("device", "out", "name", "micro_batch", "save_every", "eval_every", "eval_prompts")


def save(path, record):
    """Write a checkpoint: MAGIC, the SHA-256 of the rest, and tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    write(path, _header(buffer.getvalue()) + buffer.getvalue())


def _header(data):
    return MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n"


def require(condition, path, problem, command, advice="remove it and run"):
    """Raise UserError for a file unless the condition holds. command: what makes it, or None for a
    file that the user named, which no message advises to remove."""
    hint = f"{advice} `{command}`" if command else "name another file"
    check(condition, f"{path} {problem}: {hint}")


def load(path, command=None, keys=KEYS):
    """Read a checkpoint. Raises UserError if it is missing, damaged or of another version."""
    path, record = Path(path), None
    require(path.exists(), path, "is not there", command, "make it with")
    require(path.is_file(), path, "is not a file", command)
    content = path.read_bytes()
    data = content[len(_header(b"")) :]
    require(content.startswith(MAGIC), path, "is not a checkpoint of this version", command)
    require(content == _header(data) + data, path, "is truncated or damaged", command)
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError):
        record = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    right = isinstance(record, dict) and record.keys() >= keys
    require(right, path, "does not hold what this version writes", command)
    return record


def load_weights(model, record, path, command=None):
    """Load a checkpoint's weights into a model. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(record["model"])
    except (RuntimeError, TypeError):
        require(False, path, "holds weights of another version", command)


def load_model(model_class, path, kind, preset, command=None, device="cpu"):
    """Read the model of a finished stage. Returns it, frozen, and the config it was trained with.
    Raises UserError if the checkpoint is of another stage or unfinished."""
    record = load(path, command)
    found, other = (record["kind"], record["config"]["preset"]), f"not a {preset} {kind}"
    require(found == (kind, preset), path, f"is a {found[1]} {found[0]}, {other}", command)
    progress = f"step {record['step']} of {record['steps']}"
    finished = record["step"] == record["steps"]
    require(finished, path, f"is unfinished ({progress})", command, "go on with")
    model = model_class(**record["model_config"])
    load_weights(model, record, path, command)
    return model.to(device).requires_grad_(False), record["config"]


def lock_file(path):
    """Lock a checkpoint for this process, as two runs would mix. Returns the open lock file."""
    hidden = Path(path).with_name(f".{Path(path).name}.lock")
    write(hidden, b"", append=True)
    file = open(hidden, "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"{path}: another run is at it; let it end, or choose another --out"
        raise UserError(message) from None
    return file


def result_config(config):
    """Return the fields of a config that decide results, as a dict."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}


class Run:
    """Checkpoint, log and signals of a training run, which an earlier process may have begun.

    Raises UserError if another process is at it, or if the earlier one used another config.
    """

    def __init__(self, kind, path, log_path, config, command):
        self.kind, self.path, self.log_path = kind, Path(path), Path(log_path)
        self.config, self.command, self.signal = config, command, 0
        self.lock = lock_file(path)  # held until the process ends
        self.record = load(path, command) if self.path.exists() else None
        self.first_step = self.record["step"] if self.record else 0
        self.finished = self.first_step == config.steps
        new = result_config(config)
        old = self.record["config"] if self.record else new
        changed = [f"{k} {old.get(k)!r}, now {new[k]!r}" for k in new if old.get(k) != new[k]]
        remedy = "use the old values, another --out, or remove it"
        check(not changed, f"{path} was made with {'; '.join(changed)}: {remedy}")

    def start(self, device, model, optimizer):
        """Begin the log by a line that says what runs where; or load the weights and the optimizer
        of the earlier process, and drop the lines of steps that will be run again."""
        if self.record:
            load_weights(model, self.record, self.path, self.command)
            optimizer.load_state_dict(self.record["optimizer"])
            exists = self.log_path.is_file()
            check(exists, f"{self.log_path} is missing: remove {self.path} too, to start over")
            lines = self.log_path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may cut off the last
            lines = [x for x in whole if json.loads(x).get("step", -1) < self.first_step]
        else:
            lines = [json.dumps(self._header(device)) + "\n"]
        write(self.log_path, "".join(lines).encode())

    def _header(self, device):
        command, commit = ["git", "-C", Path(__file__).parent, "describe", "--always"], ""
        with contextlib.suppress(OSError):  # no git; outside a repository it prints nothing
            done = subprocess.run([*command, "--dirty"], capture_output=True, text=True)
            commit = done.stdout.strip()
        return dict(commit=commit or "unknown", device=str(device),
                    config=result_config(self.config), torch=torch.__version__,
                    python=platform.python_version())  # fmt: skip

    @contextlib.contextmanager
    def progress(self, title):
        """Show a progress bar over the steps that are left. Meanwhile a SIGINT or SIGTERM lets the
        step end, and `save` saves and exits; a second one ends the process at once."""

        def note(number, frame):
            if self.signal:
                os._exit(128 + number)
            self.signal = number

        numbers, steps = (signal.SIGINT, signal.SIGTERM), range(self.first_step, self.config.steps)
        handlers = [signal.signal(number, note) for number in numbers]
        try:
            with tqdm(steps, title, self.config.steps, initial=self.first_step) as self.bar:
                yield self.bar
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)

    def log(self, **values):
        """Append a line to the log."""
        write(self.log_path, (json.dumps(to_jsonable(values)) + "\n").encode(), append=True)

    @contextlib.contextmanager
    def guard(self, step, batch, explain=None):
        """Write the batch, {name: tensor}, to bad-batch.pt if TrainingDiverged is raised within.
        explain: a function that is called first and may raise a more specific error."""
        try:
            yield
        except TrainingDiverged as error:
            if explain:
                explain()
            dump = self.path.with_name("bad-batch.pt")
            save(dump, dict(kind="bad batch", step=step, reason=str(error), batch=batch))
            advice = f"that update was not made: lower --lr, or look at the batch in {dump}"
            self._stop(f"step {step}: {error}; {advice}")

    def _stop(self, problem):
        last = self.path if self.path.exists() else "none yet"
        raise TrainingDiverged(f"{problem}. Last good checkpoint: {last}") from None

    def save(self, step, model, optimizer, **more):
        """Write the checkpoint if it is due: after the first step, every save_every steps, after
        the last step, and after a signal, which then ends the process."""
        done, last = step + 1, self.config.steps
        if not (self.signal or done in (1, last) or done % self.config.save_every == 0):
            return
        weights = model.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            self._stop(f"step {step} made weights that are not finite, not saved: lower --lr")
        state = optimizer.state_dict() if done < last else {}  # a finished run needs none
        record = dict(kind=self.kind, config=result_config(self.config), step=done, steps=last,
                      model_config=model.config, model=weights, optimizer=state)  # fmt: skip
        save(self.path, record | more)
        if self.signal:
            self.bar.close()  # ends its line
            hint = f"saved in {self.path}; go on with `{self.command}`"
            print(f"interrupted; {hint}", file=sys.stderr)
            sys.exit(128 + self.signal)
