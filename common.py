"""Shared helpers: command line, device, random streams, checkpoints and the log of a run.

Nothing here is needed to understand the method. User errors print one line to stderr and exit with
status 2; bugs keep their traceback.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm


class UserError(ValueError):
    """An error that the user can correct; run() prints it as one line."""


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def explain_memory(command, flags="--batch"):
    """Turn memory that runs out into a UserError that names the command and which of its flags to
    lower. Decorates main()."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"{command} ran out of memory: lower {flags} (see bash train.sh {command} --help)"
        raise UserError(message) from None


def is_out_of_memory(error):
    """Return whether memory ran out: of Python, of a GPU, or of the host, for which torch has no
    class."""
    host = "can't allocate memory" in str(error)
    return host or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def run(main):
    """Run a command's main(), and print what the user can correct as one line."""
    sys.stdout.reconfigure(errors="replace")  # the terminal may not show every character
    try:
        return main()
    except KeyboardInterrupt:
        message, status = "interrupted: the same command goes on from the last checkpoint", 130
    except UserError as error:
        message, status = f"error: {error}", 2
    except (MemoryError, RuntimeError) as error:
        killed = "DataLoader worker (pid" in str(error)  # it has no class either
        if not killed and not is_out_of_memory(error):
            raise
        message, status = "error: out of memory", 2
        if killed:
            message = "error: a child process was killed, perhaps for lack of memory"
    print("\n" * (status == 130) + message, file=sys.stderr)
    sys.exit(status)


# --- command line ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The flags of every command."""

    preset: str = "small"  # smoke, small or large
    device: str = "auto"  # cuda if there is one, else cpu
    out: str = "out"  # folder of all results
    seed: int = 0

    def validate(self):
        """Raise UserError if a number is out of its range: counts start at 1, others at 0."""
        for field in dataclasses.fields(self):
            if field.type in (int, float) and getattr(self, field.name) != field.default:
                least = 1 if field.type is int and field.name != "seed" else 0
                self.check_range(field.name, least)

    def check_range(self, name, least, most=2**31 - 1):
        """Raise UserError unless a field lies in [least, most]; NaN does not."""
        value = getattr(self, name)
        message = f"{flag(name)} {value}: must be at least {least} and at most {most}"
        check(least <= value <= most, message)


def flag(name):
    """Return the flag of a field: plan_slots -> --plan-slots."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse itself prints all flags before the message
        raise UserError(f"{message} (see --help)")


def parse(config_class, presets, description, argv=None, methods=None):
    """Build a config from defaults, preset, method and flags, each overriding those before it.

    config_class: subclass of BaseConfig; presets: {name: {field: value}}; methods: {name: Method},
    whose values are fields of the config, chosen by its field `method`.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=style, allow_abbrev=False)
    choices = {"preset": list(presets), "method": list(methods) if methods else None}
    for field in dataclasses.fields(config_class):
        options = dict(type=field.type, choices=choices.get(field.name))
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        name = flag(field.name)
        if field.name == "prompt":  # of sample.py: before or after the flags
            name = field.name
            options["nargs"] = "?"
        help = f"default {field.default!r}"
        if field.name == "method" and methods:
            help = "; ".join(f"{key}: {method.about}" for key, method in methods.items())
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **options)
    given = vars(parser.parse_args(argv))
    values = dict(presets[given.get("preset", config_class.preset)])
    if methods:
        values |= methods[given.get("method", config_class.method)].values
    config = config_class(**values | given)
    config.validate()
    return config


def command_for(script, config):
    """Return the command that makes a stage, for messages."""
    out = "" if config.out == "out" else f" --out {shlex.quote(config.out)}"
    return f"bash train.sh {script} --preset {config.preset}{out}"


# --- device and random streams --------------------------------------------------------------------


OTHER_BUILD = (
    "update the driver, or install a build for older drivers and cards by `pip install "
    "--force-reinstall torch --index-url https://download.pytorch.org/whl/cu126`"
)


def check_no_idle_gpu():
    """Raise UserError if there is an NVIDIA GPU that this torch, without CUDA, would leave idle."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    command = ["nvidia-smi", "--list-gpus"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    gpu = listed.partition("\n")[0]
    problem = f"torch {torch.__version__}, built {built}, cannot use {gpu}"
    check(not listed.startswith("GPU"), f"{problem}: {OTHER_BUILD}; or use --device cpu")


def pick_device(name="auto"):
    """Choose the device and print it: CUDA if available, another only if asked for. Raises
    UserError if the device cannot be used, or if there is a GPU that torch would leave idle."""
    if name == "auto":
        name = "cuda"
        if not torch.cuda.is_available():
            check_no_idle_gpu()
            name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some device types cannot hold values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        if "no kernel image" in reason:  # the card is older than this build supports
            reason = f"{reason}: {OTHER_BUILD}"
        raise UserError(f"--device {name}: cannot be used ({reason}); try --device cpu") from None
    if device.type == "cuda":
        set_up_cuda(device)
    dtype = str(network_dtype(device)).removeprefix("torch.")
    print(f"device: {device}, {dtype}, torch {torch.__version__}")
    return device


def set_up_cuda(device):
    """Choose the current device and the arithmetic of CUDA, for the whole process."""
    if device.index is not None:
        torch.cuda.set_device(device)  # allocations without an index go there
    # TF32 rounds factors to 10 bits, and is the default of convolutions. Rewards, tokenizer and
    # log-probs are to be those that the tests check on a CPU; the large products are bf16 anyway.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in float32
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


# --- files ----------------------------------------------------------------------------------------


def write(path, data):
    """Write bytes whole or not at all: to a name of this process, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        message = f"cannot write {path}: {error.strerror}; what was saved before is kept"
        raise UserError(message) from None


def to_jsonable(value):
    """Round floats to six digits; replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: to_jsonable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_jsonable(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def save_checkpoint(path, record):
    """Write tensors and plain values, after the SHA-256 of what follows."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    data = buffer.getvalue()
    write(path, hashlib.sha256(data).hexdigest().encode() + data)


def load_checkpoint(path, command):
    """Read a checkpoint. command: what makes it. Raises UserError if it is missing or damaged."""
    path = Path(path)
    check(path.is_file(), f"{path} is not there: make it by `{command}`")
    content = path.read_bytes()
    digest, data = content[:64], content[64:]
    whole = digest == hashlib.sha256(data).hexdigest().encode()
    check(whole, f"{path} is damaged, or of another version: remove it and run `{command}`")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_finished(path, kind, preset, command):
    """Read the checkpoint of a finished stage. Raises UserError if it is another one, or not
    finished."""
    record = load_checkpoint(path, command)
    found = record["kind"], record["config"]["preset"]
    check(found == (kind, preset), f"{path} is a {found[1]} {found[0]}, not a {preset} {kind}")
    done, steps = record["step"], record["config"]["steps"]
    check(done == steps, f"{path} stands at step {done} of {steps}: go on by `{command}`")
    return record


def digest(weights):
    """Return a short digest of a state_dict, which tells one trained model from another."""
    sha = hashlib.sha256()
    for name, value in weights.items():
        sha.update(name.encode())
        sha.update(value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


class Run:
    """Checkpoint and log of one run of a training stage, which an earlier process may have begun.

    kind: tokenizer, base or policy; path, log_path: of checkpoint and log; made_from: {file:
    digest} of what the run is made from; command: how to go on, for messages. Raises UserError if
    the run was begun with other settings or files.
    """

    # fields of a config that do not change results
    FREE = ("device", "out", "name", "micro_batch", "save_every", "eval_every", "eval_prompts")

    def __init__(self, kind, path, log_path, config, command, made_from):
        self.kind = kind
        self.path = Path(path)
        self.log_path = Path(log_path)
        self.command = command
        self.made_from = made_from
        self.steps = config.steps
        self.save_every = config.save_every
        settings = dataclasses.asdict(config)
        self.config = {name: value for name, value in settings.items() if name not in self.FREE}
        self.record = load_checkpoint(path, command) if self.path.exists() else None
        self.first_step = 0
        if self.record:
            self.first_step = self.record["step"]
            check_made_from(self.path, self.record, made_from, command)
            for name, value in self.config.items():
                old = self.record["config"].get(name)
                problem = f"{self.path} was made with {flag(name)} {old}, not {value}"
                check(old == value, f"{problem}: use that, another --out, or remove it")
        self.finished = self.first_step == self.steps
        self.saved = time.monotonic()

    def start(self, device, model, optimizer):
        """Begin the log, or load the weights and optimizer of the earlier process and drop the log
        of steps that will be run again."""
        if self.record:
            model.load_state_dict(self.record["model"])
            optimizer.load_state_dict(self.record["optimizer"])
            lines = read_log(self.log_path, self.first_step)
        else:
            versions = dict(torch=torch.__version__, python=platform.python_version())
            head = dict(commit=commit(), device=str(device), **versions, config=self.config)
            lines = [json.dumps(head)]
        write(self.log_path, "".join(line + "\n" for line in lines).encode())

    def progress(self, title):
        """Return a progress bar over the steps that are left."""
        steps = range(self.first_step, self.steps)
        return tqdm(steps, title, total=self.steps, initial=self.first_step)

    def log(self, **values):
        """Append a line to the log."""
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(to_jsonable(values)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log_path}: {error.strerror}") from None

    def check_finite(self, step, terms):
        """Raise UserError unless all terms of a step, {name: float}, are finite."""
        for name, value in terms.items():
            check(math.isfinite(value), f"step {step}: {name} is {value}: {self.advice()}")

    def save(self, step, model, optimizer, **more):
        """Write the checkpoint after the last step, and before it every save_every minutes."""
        done = step + 1
        if done < self.steps and time.monotonic() - self.saved < 60 * self.save_every:
            return
        weights = model.state_dict()
        finite = all(value.isfinite().all() for value in weights.values())
        check(finite, f"step {step} made weights that are not finite: {self.advice()}")
        record = dict(
            kind=self.kind,
            config=self.config,
            made_from=self.made_from,
            step=done,
            model_config=model.config,
            model=weights,
            optimizer=optimizer.state_dict() if done < self.steps else {},
        )
        save_checkpoint(self.path, record | more)
        self.saved = time.monotonic()

    def advice(self):
        """Say how to go on after a run has diverged."""
        last = self.path if self.path.exists() else "none"
        return f"lower --lr, and use another --name or --out; last checkpoint: {last}"


def check_made_from(path, record, made_from, command):
    """Raise UserError if a checkpoint was made from other files than those at hand.

    made_from: {file: digest} of those at hand.
    """
    for file, found in made_from.items():
        problem = f"{path} was made from another {file}"
        check(record["made_from"].get(file) == found, f"{problem}: remove it and run `{command}`")


def read_log(path, steps):
    """Return the lines of a log up to a step. Raises UserError if a line is not JSON."""
    check(path.is_file(), f"{path} is missing: remove the checkpoint too, to start over")
    lines = path.read_text(encoding="utf-8").split("\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line).get("step", -1)
        except ValueError:
            cut_off = number >= len(lines) - 1  # by a kill, while it was written
            check(cut_off, f"{path}, line {number}: not JSON; remove that line")
            break
        if step >= steps:
            break
        kept.append(line)
    return kept


def commit():
    """Return the commit of this code, or "unknown" outside of a repository."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"
