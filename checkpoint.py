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


def reject(path, problem, command, advice="remove it and run"):
    """Raise UserError for a file. command: what makes it, or None for a file that the user named,
    which no message advises to remove."""
    hint = f"{advice} `{command}`" if command else "name another file"
    raise UserError(f"{path} {problem}: {hint}")


def load(path, command=None, keys=KEYS):
    """Read a checkpoint. Raises UserError if it is missing, damaged or of another version."""
    path = Path(path)
    if not path.exists():
        reject(path, "is not there", command, "make it with")
    if not path.is_file():
        reject(path, "is not a file", command)
    content = path.read_bytes()
    data = content[len(_header(b"")) :]
    if not content.startswith(MAGIC):
        reject(path, "is not a checkpoint of this version", command)
    if content != _header(data) + data:
        reject(path, "is truncated or damaged", command)
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError):
        record = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if isinstance(record, dict) and record.keys() >= keys:
            return record
    reject(path, "does not hold what this version writes", command)


def load_finished(path, kind, preset, command=None):
    """Read the checkpoint of a finished stage. Raises UserError if it is another or unfinished."""
    record = load(path, command)
    found, step, steps = record["config"]["preset"], record["step"], record["steps"]
    if (record["kind"], found) != (kind, preset):
        reject(path, f"is a {found} {record['kind']}, not a {preset} {kind}", command)
    if step < steps:
        reject(path, f"is unfinished (step {step} of {steps})", command, "go on with")
    return record


def load_weights(model, record, path, command=None):
    """Load a checkpoint's weights into a model. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(record["model"])
        return model
    except (RuntimeError, TypeError):
        reject(path, "holds weights of another version", command)


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

    Within `with run:` a SIGINT or SIGTERM lets the step in progress end, save and exit; a second
    one ends the process at once. Raises UserError if the earlier process used another config.
    """

    def __init__(self, kind, path, log_path, config, command):
        self.kind, self.path, self.log_path = kind, Path(path), Path(log_path)
        self.config, self.command, self.signal = config, command, 0
        self.lock = lock_file(path)  # held until the process ends
        self.record = load(path, command) if self.path.exists() else None
        self.first_step = self.record["step"] if self.record else 0
        self.finished = self.first_step == config.steps
        old, new = self.record and self.record["config"], result_config(config)
        changed = [k for k in new if old and old.get(k) != new[k]]
        words = "; ".join(f"{k} {old.get(k)!r}, now {new[k]!r}" for k in changed)
        remedy = "use the old values, another --out, or remove it"
        check(not changed, f"{path} was made with {words}: {remedy}")

    def start(self, device, model, optimizer):
        """Load the weights and the optimizer of the earlier process. Begin the log by a line that
        says what runs where, or drop the lines of steps that will be run again."""
        command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = ""
        with contextlib.suppress(OSError):  # no git; outside a repository it prints nothing
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        versions = dict(torch=torch.__version__, python=platform.python_version())
        head = dict(
            commit=commit or "unknown", device=str(device), config=result_config(self.config)
        )
        lines = [json.dumps(head | versions)]
        if self.record:
            load_weights(model, self.record, self.path, self.command)
            optimizer.load_state_dict(self.record["optimizer"])
            exists = self.log_path.is_file()
            check(exists, f"{self.log_path} is missing: remove {self.path} too, to start over")
            lines = self.log_path.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) < max(self.first_step, 1)]
        write(self.log_path, "".join(line + "\n" for line in kept).encode())

    def steps(self, title):
        """Return a progress bar over the steps that are left."""
        steps = range(self.first_step, self.config.steps)
        return tqdm(steps, title, self.config.steps, initial=self.first_step)

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
            advice = f"lower --lr, or look at the batch in {dump}. {self._last_checkpoint()}"
            message = f"step {step}: {error}; that update was not made: {advice}"
            raise TrainingDiverged(message) from None

    def save(self, step, model, optimizer, **more):
        """Write the checkpoint if it is due: after the first step, every save_every steps, after
        the last step, and after a signal, which then ends the process."""
        done, config = step + 1, self.config
        if not (self.signal or done in (1, config.steps) or done % config.save_every == 0):
            return
        finite = all(value.isfinite().all() for value in model.state_dict().values())
        if not finite:
            problem = (
                f"step {step} made weights that are not finite: they are not saved; lower --lr"
            )
            raise TrainingDiverged(f"{problem}. {self._last_checkpoint()}")
        state = optimizer.state_dict() if done < config.steps else {}  # a finished run needs none
        record = dict(kind=self.kind, config=result_config(config), step=done, steps=config.steps)
        weights = dict(model_config=model.config, model=model.state_dict(), optimizer=state)
        save(self.path, record | weights | more)
        if self.signal:
            print(
                f"\ninterrupted; saved in {self.path}; go on with `{self.command}`", file=sys.stderr
            )
            sys.exit(128 + self.signal)

    def _last_checkpoint(self):
        return f"Last good checkpoint: {self.path if self.path.exists() else 'none yet'}"

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind, *_):
        if kind not in (None, SystemExit):
            print(file=sys.stderr)  # ends the line of the progress bar
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number


def _step_of(line):
    try:
        return json.loads(line).get("step", -1)
    except json.JSONDecodeError:  # a line cut off by a kill; its step is run again
        return float("inf")
