"""Shared helpers: errors, command line, device, random streams, writing files.

User errors, refused writes and exhausted memory print one line to stderr and exit with status 2;
SIGINT and SIGTERM exit with status 130 and 143.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import shlex
import signal
import sys
import typing
from pathlib import Path

import torch

LARGEST = 2**31 - 1  # number that a flag may have


class UserError(ValueError):
    """An error that the user can correct; run() prints it as one line and exits with status 2."""


class TrainingDiverged(UserError):
    """A value of a training step is not finite or out of bounds; its update was not made."""


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def run(main):
    """Run a command's main() and turn user errors and signals into one line and an exit status."""
    status = 2
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        return main()
    except KeyboardInterrupt as interrupt:
        print(file=sys.stderr)  # ends the line of ^C or of the progress bar
        message = "interrupted; the same command goes on from what is saved"
        status = (*interrupt.args, 130)[0]
    except UserError as error:
        message = f"error: {error}"
    except (OSError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if memory or "can't allocate memory" in str(error):
            message = "error: out of memory: lower --micro-batch, where it is missing --batch; "
            message += "in eggrpo.py then --prompts or --plans-per-prompt"
        elif isinstance(error, OSError) and error.strerror:
            message = f"error: {error.filename or 'output'}: {error.strerror}"
        else:
            raise  # a bug keeps its traceback
    print("".join(c if c.isprintable() else " " for c in message), file=sys.stderr)
    sys.exit(status)


def _interrupt(number, frame):
    raise KeyboardInterrupt(128 + number)


# --- command line ---------------------------------------------------------------------------------


def _flag(name):
    return "--" + name.replace("_", "-")


def check_at_least(minimum, config, *names, maximum=LARGEST):
    """Raise UserError unless each of these fields of a config lies in [minimum, maximum]."""
    for name in names:
        value, bounds = getattr(config, name), f"at least {minimum} and at most {maximum}"
        check(minimum <= value <= maximum, f"{_flag(name)} {value}: must be {bounds}")  # or NaN


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The flags of every command. Integers start at 1 and other numbers at 0, unless RANGES says
    otherwise: {field: (minimum, maximum)}."""

    preset: str = ""  # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0

    RANGES = {}

    def check(self):
        """Raise UserError if a number is out of its range."""
        for field in dataclasses.fields(self):
            if type(field.default) in (int, float):
                least = 1 if type(field.default) is int and field.name != "seed" else 0
                minimum, maximum = self.RANGES.get(field.name, (least, LARGEST))
                check_at_least(minimum, self, field.name, maximum=maximum)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse itself would print 40 flags before the message
        raise UserError(f"{message} (see --help)")


def parse(script, config_class, presets, description, argv=None, methods=None):
    """Build a config from defaults, preset, method and flags, each overriding those before it.

    config_class: frozen dataclass with a field `preset` and a check() that raises UserError;
    methods: {name: Method} if it has a field `method`. Returns the config and the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    for name, method in (methods or {}).items():
        description += f"\n  --method {name:16} {method.about}"
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=style, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)  # fmt: skip
    choices = dict(preset=list(presets), method=list(methods or ()))
    for field in dataclasses.fields(config_class):
        kind, allowed = type(field.default), choices.get(field.name) or typing.get_args(field.type)
        options = dict(type=kind, choices=allowed or None, metavar=kind.__name__)
        options = dict(action=argparse.BooleanOptionalAction) if kind is bool else options
        values = [f"{p} {v[field.name]}" for p, v in presets.items() if field.name in v]
        values += [f"one of {', '.join(allowed)}"] if allowed else []
        options["help"] = ", ".join([f"default {field.default!r}", *values])
        parser.add_argument(_flag(field.name), **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        check(value != "", f"{_flag(name)} '': must be given a value")
    given.setdefault("preset", default_preset(given.get("device", "auto")))
    method = methods[given.get("method", config_class.method)].values if methods else {}
    config = config_class(**{**presets[given["preset"]], **method, **given})
    config.check()
    return config, shlex.join(["python", *script.split(), *map(str, argv)])


def default_preset(device="auto"):
    """gpu on CUDA, cpu on any other device."""
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return "gpu" if cuda else "cpu"


def command_for(script, preset, out):
    """Return the command that makes a stage, for messages."""
    folder = "" if out == "out" else f" --out {shlex.quote(out)}"
    return f"python {script} --preset {preset}{folder}"


# --- device and random streams --------------------------------------------------------------------


def pick_device(name="auto"):
    """Choose the device, CUDA if available, and print the reason. MPS is used only if asked for."""
    reason = "as asked"
    if name == "auto":
        cuda = torch.cuda.is_available()
        name, reason = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", "no CUDA")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some device types cannot hold values
        if device.type == "cuda":
            set_up_cuda(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device cpu") from None
    threads, dtype = torch.get_num_threads(), str(network_dtype(device)).removeprefix("torch.")
    print(f"device: {device} ({reason}), {dtype}, torch {torch.__version__}, {threads} threads")
    return device


def set_up_cuda(device):
    """Choose the current device and the arithmetic of CUDA, for the whole process."""
    # Streams and allocations use the current device.
    if device.index is not None:
        torch.cuda.set_device(device)
    # TF32 rounds factors to 10 bits, and is the default of convolutions. Rewards, tokenizer and
    # log-probs are to be those that the tests check on a CPU; the large products are bf16 anyway.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # From torch 2.11 cuDNN attention is preferred on Hopper and Blackwell. With a mask it returns
    # NaN gradients for some lengths (pytorch issue 196678); the other kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)


def network_dtype(device):
    """The type of the policy's matrix products and key-value cache: bfloat16 on CUDA from compute
    capability 8 (Ampere), else float32. Older GPUs emulate bfloat16, more slowly than they compute
    in float32, though torch.cuda.is_bf16_supported() is True there."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def generator(*key):
    """Return a CPU generator seeded by a key such as (seed, "rollout", step) and nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def check_finite(terms):
    """Raise TrainingDiverged unless all terms are finite. terms: {name: float}."""
    wrong = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingDiverged(", ".join(wrong))


def write(path, data, append=False):
    """Write bytes to a temporary name and rename it, or append. Raises UserError if that fails."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path if append else temporary, "ab" if append else "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not reach the disk before its log
        if not append:
            os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        message = f"cannot write {path}: {error.strerror}; correct that and run the same command"
        raise UserError(f"{message} again: what was saved is kept") from None


def to_jsonable(value):
    """Round floats to six digits; replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {k: to_jsonable(v) for k, v in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
