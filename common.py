"""Shared helpers: errors, command line, device, random streams, files. Nothing here is needed to
understand the method."""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import torch


class UserError(ValueError):
    """An error that the user can correct; run() prints it as one line."""


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def run(main):
    """Run a command's main(). User errors print one line to stderr and exit with status 2; bugs
    keep their traceback."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if closed, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # the terminal may not show every character
    try:
        main()
        return sys.stdout.flush()  # Python does so at its exit, where errors are not handled
    except KeyboardInterrupt:
        message, status = "\ninterrupted: the same command goes on from the last checkpoint", 130
    except (UserError, OSError) as error:
        message, status = f"error: {error}", 2
        if isinstance(error, OSError):  # of standard output, perhaps, to which Python writes again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # nobody reads on, as after `| head`
            sys.exit(141)
    print(message, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def stage(lower="--preset"):
    """Decorate main(): torch is as when imported, whatever a notebook has set; the caller's random
    state is left alone; memory that runs out is one line. lower: what helps then."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    usual = torch.get_default_device().type == "cpu"  # if set again, each call takes longer
    device = contextlib.nullcontext() if usual else torch.device("cpu")
    try:
        with torch.inference_mode(False), torch.enable_grad(), device:
            with torch.random.fork_rng(devices=[]):
                yield
    except (MemoryError, RuntimeError) as error:
        # torch has no class for the host's memory, nor for a process that was killed to free it
        of_host = re.search(r"can't allocate memory|DataLoader worker \(pid", str(error))
        if not of_host and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise UserError(f"out of memory: lower {lower}") from None
    finally:
        torch.set_default_dtype(dtype)


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The flags of every command. The comment beside a field is the help of its flag. A number may
    be annotated with its least and its largest value: Annotated[int, 2, 64]."""

    preset: str = "small"  # sizes and lengths
    device: str = "auto"  # cuda if there is one, else cpu
    out: Path = Path("out")  # folder of all results
    seed: int = 0  # of all random numbers

    @property
    def folder(self):
        """Where results of the preset are."""
        return self.out / self.preset


def parse(config_class, presets, description, argv=None, methods=None):
    """Build a config from defaults, preset, method and flags, each overriding those before it.
    presets: {name: {field: value}}; methods: {name: Method}, whose values are fields of the config,
    chosen by its field `method`."""
    comments = {}
    for base in reversed(config_class.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(base), re.M)
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # argparse itself prints all flags before the message
    parser.error = lambda message: check(False, f"{message} (see --help)")
    limits = {}
    for field in dataclasses.fields(config_class):
        kind, *ends = get_args(field.type) or [field.type]
        if kind in (int, float):
            least = min(field.default, int(kind is int))  # counts start at 1
            limits[field.name] = ends or [least, 2**31 - 1]
        help = f"{comments[field.name]} (default: {field.default})"
        special = {Path: dict(type=user_path), bool: dict(action=argparse.BooleanOptionalAction)}
        options = special.get(kind, dict(type=kind))
        if field.name == "preset":
            options["choices"] = list(presets)
        if field.name == "method" and methods:
            options["choices"] = list(methods)
            help += "".join(f"; {name}: {method.about}" for name, method in methods.items())
        help = help.replace("%", "%%")  # argparse formats it
        # the prompt of sample.py stands before or after the flags
        name = field.name if field.name == "prompt" else flag(field.name)
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **options)
    given = vars(parser.parse_args(argv))
    for name in limits.keys() & given.keys():
        value = given[name]
        least, most = limits[name]
        message = f"{flag(name)} {value}: must be at least {least} and at most {most}"
        check(least <= value <= most, message)  # NaN is neither
    values = dict(presets[given.get("preset", config_class.preset)])
    if methods:
        values |= methods[given.get("method", config_class.method)].values
    return config_class(**values | given)


def flag(name):
    """Return the flag of a field: plan_slots -> --plan-slots."""
    return "--" + name.replace("_", "-")


def user_path(text):
    """Return the path that a user typed, if relative from where train.sh was called."""
    return Path(os.environ.get("CALLED_FROM", ""), os.path.expanduser(text))


def command_for(script, config):
    """Return the command that makes a stage, for messages."""
    out = "" if config.out == BaseConfig.out else f" --out {shlex.quote(str(config.out))}"
    return f"bash train.sh {script} --preset {config.preset}{out}"


OTHER_BUILD = (
    "update the driver, or install a build for older drivers and cards by `pip install "
    "--force-reinstall torch --index-url https://download.pytorch.org/whl/cu126`"
)


def pick_device(name="auto"):
    """Choose the device and print it: CUDA if available, another only if asked for. Raises
    UserError if the device cannot be used, or if there is a GPU that torch would leave idle."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            gpu = subprocess.getoutput("nvidia-smi --list-gpus").partition("\n")[0]
            problem = f"torch {torch.__version__} cannot use {gpu}: {OTHER_BUILD}"
            check(not gpu.startswith("GPU"), f"{problem}; or use --device cpu")
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
    # no TF32, which rounds to 10 bits: rewards, tokenizer and log-probs as the tests check them
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in float32
    # From torch 2.11 cuDNN attention is preferred on Hopper and Blackwell. With a mask it returns
    # NaN gradients for some lengths (pytorch issue 196678); the other kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)


def network_dtype(device):
    """The type of the policy's matrix products and key-value cache: bfloat16 on CUDA from compute
    capability 8 (Ampere), else float32. Older GPUs emulate bfloat16, slower than float32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def generator(*key):
    """Return a CPU generator seeded by a key such as (seed, "rollout", step) and nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def write(path, data):
    """Write bytes whole or not at all: to a name of this process, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_jsonable(value):
    """Round floats to six digits; replace NaN and infinity, which JSON lacks, by None."""
    six = lambda digits: float(f"{float(digits):.6g}")
    return json.loads(json.dumps(value), parse_float=six, parse_constant=lambda name: None)
