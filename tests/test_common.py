"""Helpers: flags, errors in one line, streams, torch's state; checkpoints and logs of runs."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import eggrpo
import pretrain
import runs
import sample
import train
from common import UserError, parse
from conftest import ROOT, one_line, read_log, run
from runs import load_checkpoint, load_model
from tiny_vq import train as tiny_vq_train

COMMAND = "bash train.sh pretrain --preset deep --out "
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (".", "lab", "tiny_vq")
    for path in (ROOT / folder).glob("*.py")
    if "def main(argv" in path.read_text()
)


@dataclass(frozen=True)
class Config(common.BaseConfig):
    steps: int = 5  # of training
    rate: float = 0.5  # 100 % or less


PRESETS = {"smoke": dict(rate=0.1), "small": {}}


def test_flags_override_methods_override_presets_override_defaults():
    rate = lambda argv: parse(Config, PRESETS, "", argv.split()).rate
    smoke = "--preset smoke"
    assert (rate(""), rate(smoke), rate(f"{smoke} --rate 9")) == (0.5, 0.1, 9.0)
    low = lambda *argv: parse(eggrpo.Config, eggrpo.PRESETS, "", argv, eggrpo.METHODS).low_frac
    top = ("--method", "top-entropy")
    assert (low(), low(*top), low(*top, "--low-frac", "0.7")) == (0.2, 0.8, 0.7)


@pytest.mark.parametrize(
    "module, argv, words",
    [
        (eggrpo, "--beta inf", "--beta inf: must be at least 0 and at most"),
        (eggrpo, "--name x.pt", "--name 'x.pt': letters, digits, '_' and '-' only"),
        (sample, "red --number 65", "--number 65: must be at least 1 and at most 64"),
        (sample, "", "arguments are required: prompt"),
        (sample, "'a rde circle'", "unknown word 'rde' (nearest known: "),
        (train, "--epochs 3", "unrecognized arguments: --epochs 3"),
        (train, "--method ppo", "--method: invalid choice: 'ppo' (choose from 'both', 'grpo'"),
        (train, "--device abacus", "--device abacus: cannot be used"),
        (eggrpo, "--preset big", "--preset: invalid choice: 'big'"),
        (eggrpo, "--colour red", "unrecognized arguments: --colour red"),
        (eggrpo, "--lr much", "--lr: invalid float value"),
        (eggrpo, "--low-frac .6 --high-frac .5", "--low-frac 0.6, --high-frac 0.5: must add up"),
        (eggrpo, "--group-size 1", "--group-size 1: must be at least 2"),
        (eggrpo, "--beta nan", "--beta nan: must be at least 0"),
        (eggrpo, "--seed -1", "--seed -1: must be at least 0"),
        (pretrain, "--steps 99999999999", "--steps 99999999999: must be at least 1 and at most"),
        (pretrain, "--drop-plan 1.1", "--drop-plan 1.1: must be at least 0 and at most 1"),
        (pretrain, "--width 65", "--width 65: must be a multiple of --heads 4"),
        (tiny_vq_train, "--width 20", "--width 20: must be a multiple of 8"),
        (tiny_vq_train, "--codebook-size 1", "--codebook-size 1: must be at least 2"),
    ],
)
def test_a_bad_flag_is_refused_by_its_name_in_one_line(module, argv, words):
    with pytest.raises(UserError) as error:
        module.main(shlex.split(argv))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_flag_is_the_comment_beside_its_field(name, capsys, monkeypatch):
    """A percent sign in a method's text once made `eggrpo --help` a TypeError."""
    monkeypatch.setenv("COLUMNS", "10000")
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])  # formats each help text, as Python 3.14 does when it is added
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.strip() in printed
    config = getattr(module, "Config", common.BaseConfig)
    source = "".join(map(inspect.getsource, config.__mro__[:-1]))
    for field in fields(config) if module.__name__ != "lab.audit" else ():  # which has no flags
        line = next(x for x in source.splitlines() if x.startswith(f"    {field.name}: "))
        comment = line.partition("  # ")[2]
        assert comment and f" {comment} (default: {field.default})" in printed
    for method in getattr(module, "METHODS", {}).values():
        assert method.about in printed


def test_a_relative_path_starts_where_train_sh_was_called(monkeypatch):
    read = lambda *argv: parse(Config, PRESETS, "", argv).out
    monkeypatch.setenv("HOME", "/home/me")
    assert read() == Path("out") and read("--out=x") == Path("x")
    assert read("--out=~/x") == Path("/home/me/x")
    monkeypatch.setenv("CALLED_FROM", "/some where")
    assert read() == Path("out") and read("--out", "x") == Path("/some where/x")
    assert read("--out", "/y") == Path("/y")


def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(capsys, monkeypatch):
    def cuda(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for allocate in (lambda *_: torch.empty(10**15), cuda):
        monkeypatch.setattr(pretrain, "load_tokenizer", allocate)
        line = one_line(capsys, 2, pretrain.main, [])
        assert line == "error: out of memory: lower --batch of pretrain"


@pytest.mark.parametrize(
    "redirection, status, words",
    [
        (">&- 2>&-", 0, ""),
        (">/dev/full", 2, "error:.Errno28.Nospaceleftondevice"),
        ("2>&1 | true", 141, ""),
    ],
)
def test_closed_and_full_streams_end_quietly_or_in_one_line(redirection, status, words, tmp_path):
    script = tmp_path / "script.py"
    bar = "for _ in tqdm.tqdm([0]):\n        time.sleep(0.3)"
    script.write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.modules["torch"] = type(sys)("torch")  # which takes seconds to import
import common, tqdm
def main():
    {bar}
    tqdm.tqdm.write("text")
    print("more")
common.run(main)
""")
    command = f"{sys.executable} {script} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    printed = re.sub(r".*it/s\]|\s", "", done.stderr)
    assert done.returncode == status and re.fullmatch(words, printed), done.stderr


def test_a_command_runs_where_stdout_is_a_notebooks(monkeypatch, capsys):
    stream = SimpleNamespace(write=print, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stream)
    common.run(lambda: None)


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99", ""])
def test_a_device_that_cannot_hold_a_number_is_refused(name):
    with pytest.raises(UserError, match="cannot be used.*try --device cpu"):
        common.pick_device(name)


def test_a_gpu_that_torch_would_leave_idle_stops_the_run(tmp_path, monkeypatch, capsys):
    """A driver that is too old makes is_available() False: days on the CPU, without a word."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: Tesla V100 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert common.pick_device().type == "cpu"  # hidden by CUDA_VISIBLE_DEVICES: see conftest.py
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    words = "cannot use GPU 0: Tesla V100.*pip install.*cu126.*--device cpu"
    assert re.search(words, one_line(capsys, 2, common.pick_device))
    assert common.pick_device("cpu").type == "cpu"
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert common.pick_device().type == "cpu"


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_bf16_is_used_only_where_it_is_not_emulated(monkeypatch, capability, dtype):
    """V100 and T4 emulate bf16, more slowly than they compute in float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.network_dtype(torch.device("cuda")) == dtype
    assert common.network_dtype(torch.device("cpu")) == torch.float32


def make_model():
    model = torch.nn.Linear(2, 2)
    model.config = dict(in_features=2, out_features=2)
    return model, torch.optim.SGD(model.parameters(), 0.1)


def make_run(folder, origin="world", **settings):
    config = Config(preset="deep", out=folder, **settings)
    run = runs.Run("a.pt", "log.jsonl", config, "cpu", origin, "pretrain")
    run.PAUSE = 0  # seconds: save at every step
    return run


def load(folder, origin="world"):
    config = Config(preset="deep", out=folder)
    return load_model(torch.nn.Linear, config.folder / "a.pt", origin, "pretrain", config)


def go_on(run, model, optimizer, steps=range(5)):
    """Train, as far as files are concerned."""
    for step in run.progress("", model, optimizer):
        if step in steps:
            run.log(step, x=step / 3)
            run.save(step, model, optimizer)


@pytest.fixture
def begun(tmp_path):
    """A run that was killed after step 3, while it wrote its log; its checkpoint is of step 2."""
    run = make_run(tmp_path)
    model, optimizer = make_model()
    go_on(run, model, optimizer, range(2))
    run.log(2, x=1.0)
    with open(run.log_path, "a") as file:
        file.write('{"step": 3, "x"')
    return tmp_path, model, optimizer, run.path


def read_steps(folder):
    head, *records = read_log(folder / "deep/log.jsonl")
    assert {"commit", "device", "config", "torch"} <= set(head)
    return [record["step"] for record in records]


def test_a_finished_run_is_read_by_its_loader_and_by_torch(begun):
    folder, model, optimizer, path = begun
    with pytest.raises(runs.Unfinished, match=f"stands at step 2 of 5: go on by `{COMMAND}"):
        load(folder)
    go_on(make_run(folder), model, optimizer)
    assert not make_run(folder).steps
    record = torch.load(path, weights_only=True)
    assert torch.equal(record["model"]["weight"], model.weight) and record["step"] == 5
    back, settings = load(folder)
    assert torch.equal(back.weight, model.weight) and settings == record["config"]
    assert [line["step"] for line in back.log[1:]] == read_steps(folder) == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.pt", "log.jsonl"]
    assert back.weight.requires_grad  # autocast casts others at each use


def test_missing_and_damaged_checkpoints_are_named_with_the_remedy(begun, tmp_path):
    path = begun[-1]
    with pytest.raises(UserError, match=f"b.pt is not there: make it by `{COMMAND}`"):
        load_checkpoint(tmp_path / "b.pt", "world", COMMAND)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"in_features")] ^= 1
    older = b"0" * 64 + whole  # with a checksum in front
    torch.save(dict(model={}), tmp_path / "foreign.pt")
    foreign = (tmp_path / "foreign.pt").read_bytes()
    for content in (b"", whole[:-1], whole[100:], bytes(flipped), older, foreign):
        path.write_bytes(content)
        again = f"remove it and run `{COMMAND}`"
        with pytest.raises(UserError, match=f"a.pt is damaged, or of another version: {again}"):
            load_checkpoint(path, "world", COMMAND)


def test_a_write_that_fails_keeps_what_was_there_before(tmp_path, monkeypatch, capsys):
    """Reading and writing that fail are one line."""
    assert "Is a directory" in one_line(capsys, 2, open, tmp_path)
    path = tmp_path / "a"
    common.write(path, b"1")

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.Path, "write_bytes", full)
    assert "No space left on device" in one_line(capsys, 2, common.write, path, b"2")
    assert path.read_bytes() == b"1" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_run_goes_on_with_its_own_settings_and_files_only(begun):
    folder = begun[0]
    with pytest.raises(UserError, match="a.pt was made with --rate 0.5, not 0.6"):
        make_run(folder, rate=0.6)
    with pytest.raises(UserError, match=f"made from other files .* remove it and run `{COMMAND}"):
        make_run(folder, "another world")
    assert make_run(folder, device="cuda").steps == range(2, 5)  # which changes no result


@pytest.mark.parametrize("damage", [b'[1]\n{"step": null}\n\xff\xfe', None])
def test_a_run_that_goes_on_writes_its_log_again_whatever_is_left_of_it(begun, damage):
    folder, model, optimizer, path = begun
    log = path.with_name("log.jsonl")
    log.write_bytes(damage) if damage else log.unlink()
    run = make_run(folder)
    assert read_steps(folder) == [0, 1]
    run.log(2, **{"reward/x": float("nan")})
    assert read_log(log)[-1] == {"step": 2, "reward/x": None}  # JSON has no NaN
    with pytest.raises(UserError, match="step 3: loss is inf: lower --lr"):
        run.log(3, norm=1.0, loss=float("inf"))


def test_of_two_processes_in_one_folder_the_first_ends(begun):
    folder, model, optimizer, path = begun
    first, second = make_run(folder), make_run(folder)
    words = "another process goes on with .*log.jsonl: this one ends"
    with pytest.raises(UserError, match=words):
        first.log(2)
    with pytest.raises(UserError, match=words):
        first.save(2, model, optimizer)
    go_on(second, model, optimizer)
    assert read_steps(folder) == [0, 1, 2, 3, 4] and torch.load(path)["step"] == 5


def test_a_commit_is_this_repositorys_and_no_other(tmp_path, monkeypatch):
    git = partial(run, "git", "-c", "user.name=a", "-c", "user.email=a", cwd=tmp_path)
    inner = tmp_path / "project"
    inner.mkdir()
    monkeypatch.setattr(runs, "__file__", str(inner / "runs.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "around")
    assert runs.commit() == "unknown"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert runs.commit() == "unknown"
    monkeypatch.delenv("GIT_DIR")
    git("-C", "project", "init")
    git("-C", "project", "commit", "--allow-empty", "-m", "own")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert re.fullmatch("[0-9a-f]{7,}", runs.commit())
