"""Device, seeds, checkpoints, log, flags: what every command needs. Read last or never."""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import torch

try:
    import fcntl
except ImportError:                                     # Windows: no lock there
    fcntl = None

MAGIC = b"eggrpo checkpoint 2\n"
RECORD = {"kind", "settings", "step", "steps", "model_config", "model", "optimizer"}
PRESETS = ("smoke", "cpu", "gpu")


class UserError(ValueError):
    """Something the user can mend: commands print it as one line and exit with status 2."""


def run(main):
    """Run a command's main. What the user can mend, files that the system refuses, memory that runs
    out and interruptions end as one line on stderr, with exit status 2, or 128 + signal."""
    status = 2
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        return main()
    except UserError as error:
        message = f"error: {error}"
    except (OSError, MemoryError, RuntimeError) as error:
        message = _explain(error)
        if not message:
            raise
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)                                        # below ^C or a progress bar
        message = "interrupted; the same command goes on from what is saved"
        status = (*stop.args, 130)[0]
    print("".join(c if c.isprintable() else " " for c in message), file=sys.stderr)
    sys.exit(status)


def _interrupt(number, frame):
    raise KeyboardInterrupt(128 + number)


def _explain(error):
    """Put an error of the system into one line; None for one that is a bug of ours."""
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.filename or 'output'}: {error.strerror}"
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
            "can't allocate memory" in str(error)):
        return ("error: out of memory: lower --micro-batch first (results stay the same), then "
                "--prompts or --group; in the other commands --batch")


def require(truth, message):
    """Raise UserError with this message unless something is so."""
    if not truth:
        raise UserError(message)


def require_at_least(least, config, *names):
    """Raise UserError unless each of these fields of a config is at least so much."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")


# --- flags and device -----------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(script, config_class, presets, description, argv=None, methods=None):
    """Turn the command line into a config: defaults, then the preset's, the method's, the flags.

    script: how the command is called; config_class: a frozen dataclass with a field preset and a
    check() that raises UserError; methods: {name: Method}, where there is a field method. Returns
    the config, checked, and the command line that gives it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if methods:
        description += "\nmethods:\n" + "".join(
            f"  {name:16} {method.about}\n" for name, method in methods.items())
    parser = _Parser(description=description,
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        shown = {p: presets[p][field.name] for p in presets if field.name in presets[p]}
        help = f"default {field.default!r}" + "".join(f", {p} {v}" for p, v in shown.items())
        kind = type(field.default)
        how = dict(action="store_true") if kind is bool else dict(type=kind, metavar=kind.__name__)
        parser.add_argument("--" + field.name.replace("_", "-"), default=None, help=help, **how)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    for name, value in given.items():
        right = value != "" if isinstance(value, str) else abs(value) < 2 ** 31     # NaN is not
        require(right, f"--{name.replace('_', '-')} {value!r}: must be neither empty nor NaN, and "
                "below 2 ** 31")
    preset = given.get("preset") or default_preset()
    require(preset in presets, f"no preset {preset!r}: choose one of {', '.join(presets)}")
    of_method = {}
    if methods:
        method = given.get("method", config_class.method)
        require(method in methods, f"no method {method!r}: choose one of {', '.join(methods)}")
        of_method = methods[method].values
    config = config_class(**{**presets[preset], **of_method, **given, "preset": preset})
    config.check()
    return config, shlex.join(["python", *script.split(), *map(str, argv)])


def default_preset():
    return "gpu" if torch.cuda.is_available() else "cpu"


def pick_device(name="auto"):
    """Choose the device and print why."""
    why = "as asked"
    if name == "auto":
        name, why = "cpu", "no CUDA, no MPS"
        if torch.cuda.is_available():
            name, why = "cuda", torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            name, why = "mps", "no CUDA"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()                           # some hold no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}): try "
                        "--device cpu") from None
    print(f"device: {device} ({why}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    return device


def generator(*key):
    """Return a CPU generator for a key such as (seed, "rollout", step): no stream depends on what
    ran before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# --- files ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """Say in one line what the system refuses: a full disk, a folder that is none."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; mend that and run the same "
                        "command again: what was saved is kept") from None


def write(path, data):
    """Write bytes to a temporary name, then rename: a file is whole or is not there."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def lock(path):
    """Claim a checkpoint for this process: two runs at once would mix. Returns what holds the
    claim as long as it lives; the system frees it however the process ends."""
    hidden = Path(path).with_name(f".{Path(path).name}.lock")
    with writing(path):
        hidden.parent.mkdir(parents=True, exist_ok=True)
        file = open(hidden, "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another run is at it; let it end, or choose another --out"
                        ) from None
    return file


def save(path, record):
    """Write a checkpoint: a header, the SHA-256 of what follows, and tensors and plain values by
    torch.save."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    data = buffer.getvalue()
    write(path, _header(data) + data)


def _header(data):
    return MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n"


def save_stage(path, kind, config, step, model, optimizer, **more):
    """Write a stage's checkpoint; a finished one (step == config.steps) needs no optimizer."""
    ended = step == config.steps
    whole = all(value.isfinite().all() for value in model.state_dict().values())
    require(whole, f"step {step - 1} made weights that are not finite: they are not saved; lower "
            f"--lr. {_last_good(path)}")
    save(path, dict(kind=kind, settings=settings(config), step=step, steps=config.steps,
                    model_config=model.config, model=model.state_dict(),
                    optimizer={} if ended else optimizer.state_dict(), **more))


def load(path, maker, keys=RECORD):
    """Read a checkpoint. maker: the command that makes it, named where it is missing or unusable;
    None for a file that the user named, which nobody is told to remove. Raises UserError."""
    path, remedy = Path(path), _remedy(maker)
    require(path.exists(), f"{path} is not there: "
            + (f"make it with `{maker}`" if maker else remedy))
    require(path.is_file(), f"{path} is not a file: {remedy}")
    content = path.read_bytes()
    require(content.startswith(MAGIC), f"{path} is not a checkpoint of this version: {remedy}")
    data = content[len(_header(b"")):]
    require(content == _header(data) + data, f"{path} is truncated or damaged: {remedy}")
    try:
        record = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        record = None
    require(isinstance(record, dict) and record.keys() >= keys,
            f"{path} does not hold what this version writes: {remedy}")
    return record


def _remedy(maker):
    return f"remove it and run `{maker}`" if maker else "name another file"


def restore(model, record, path, maker):
    """Give a model the weights of a checkpoint. Raises UserError where they do not fit it."""
    try:
        model.load_state_dict(record["model"])
    except (RuntimeError, TypeError):
        raise UserError(f"{path} holds weights of another version: {_remedy(maker)}") from None


def resume(path, config, maker):
    """Read the checkpoint that a command left at `path` to go on from it; None where there is none.

    Raises UserError where it was made with other settings, so that no run is mixed or overwritten.
    """
    if not Path(path).exists():
        return None
    record = load(path, maker)
    now, old = settings(config), record["settings"]
    changed = [f"{k} {old.get(k)!r}, now {v!r}" for k, v in now.items() if old.get(k) != v]
    require(not changed, f"{path} was made with {'; '.join(changed)}: use the old settings, "
            "another --out, or remove it")
    return record


def load_finished(path, maker, kind, preset):
    """Read the checkpoint of a stage that later stages build on. Raises UserError where it is not
    one, or not finished."""
    record = load(path, maker)
    was = record["settings"]["preset"], record["kind"]
    require(was == (preset, kind), f"{path} is a {was[0]} {was[1]}, not a {preset} {kind}: "
            f"{_remedy(maker)}")
    require(record["step"] >= record["steps"], f"{path} is unfinished (step {record['step']} of "
            f"{record['steps']}): " + (f"go on with `{maker}`" if maker else _remedy(maker)))
    return record


def maker_of(script, preset, out):
    """Spell the command that makes a stage, for messages."""
    where = f" --out {shlex.quote(out)}" if out != "out" else ""
    return f"python {script} --preset {preset}{where}"


def settings(config):
    """The part of a config that decides results: everything but where it runs, in what portions,
    and where it writes."""
    free = ("device", "micro_batch", "out")
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in free}


class Log:
    """JSON lines, one a step; the first says what ran where. On resuming, records of steps not kept
    are dropped."""

    def __init__(self, path, config, device, first_step=0):
        self.path = Path(path)
        lines = []
        if first_step:
            require(self.path.is_file(), f"{path} is not there, and its checkpoint is: remove that "
                    "too, to start over")
            lines = self.path.read_text().splitlines()
            lines = [line for line in lines if _step_of(line) < first_step]
        else:
            lines.append(json.dumps(dict(
                commit=_commit(), device=str(device), settings=settings(config),
                torch=torch.__version__, numpy=numpy.__version__,
                python=platform.python_version())))
        write(self.path, "".join(line + "\n" for line in lines).encode())

    def __call__(self, **record):
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())          # a checkpoint is never newer than the log


def _commit():
    if not shutil.which("git"):
        return "unknown"
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def write_lines(path, rows):
    """Write a file of JSON lines."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def plain(value):
    """Round floats to six digits and turn those that JSON does not know, NaN and inf, into None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _step_of(line):
    try:
        return json.loads(line).get("step", -1)
    except json.JSONDecodeError:                      # a line torn by a kill: its step is run again
        return float("inf")


def require_finite(step, terms, path, batch):
    """Refuse a batch of which a term is not finite. terms: {name: float}; else as for refuse."""
    wrong = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    if wrong:
        refuse(step, ", ".join(wrong), path, batch)


def refuse(step, why, path, batch):
    """Stop before an update that would do harm: write its batch, {name: tensor}, to bad-batch.pt
    beside the run's checkpoint, `path`, and raise UserError."""
    dump = Path(path).with_name("bad-batch.pt")
    save(dump, dict(kind="bad batch", step=step, why=why, batch=batch))
    raise UserError(f"step {step}: {why}; no update was made: lower --lr, or look at the batch in "
                    f"{dump}. {_last_good(path)}")


def _last_good(path):
    return f"Last good checkpoint: {path if Path(path).exists() else 'none yet'}"


class Interruptible:
    """Within it, Ctrl-C and SIGTERM are noted, and the loop ends after the step in hand; a second
    one ends at once."""

    def __enter__(self):
        self.signal = 0
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, *_):
        if kind not in (None, SystemExit):
            print(file=sys.stderr)                    # the message stands below the progress bar
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def _note(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def leave(self, path, command):
        """Exit, once what was done is saved."""
        print(f"\ninterrupted; saved in {path}; go on with `{command}`", file=sys.stderr)
        sys.exit(128 + self.signal)
