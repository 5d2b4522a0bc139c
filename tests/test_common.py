"""Shared helpers: flags, errors in one line, streams, checkpoints, the log."""

import json
import os
import re
from dataclasses import dataclass

import pytest
import torch

import common
import eggrpo
import pretrain
from common import UserError, generator, load_checkpoint, load_finished, parse, save_checkpoint
from conftest import one_line
from tiny_vq import train as tiny_vq_train

COMMAND = "bash train.sh pretrain"


@dataclass(frozen=True)
class Config(common.BaseConfig):
    steps: int = 5
    rate: float = 0.5
    save_every: float = 0  # minutes: at every step


PRESETS = {"smoke": dict(rate=0.1), "small": {}}


# --- flags ----------------------------------------------------------------------------------------


def test_flags_override_methods_override_presets_override_defaults():
    rate = lambda *argv: parse(Config, PRESETS, "", argv).rate
    assert (rate(), rate("--preset", "smoke"), rate("--preset", "smoke", "--rate", "9")) == (
        0.5,
        0.1,
        9.0,
    )
    low = lambda *argv: parse(eggrpo.Config, eggrpo.PRESETS, "", argv, eggrpo.METHODS).low_frac
    top = ("--method", "top-entropy")
    assert (low(), low(*top), low(*top, "--low-frac", "0.7")) == (0.2, 0.8, 0.7)


@pytest.mark.parametrize(
    "module, argv, words",
    [
        (eggrpo, "--preset big", "--preset: invalid choice: 'big'"),
        (eggrpo, "--method ppo", "--method: invalid choice: 'ppo'"),
        (eggrpo, "--colour red", "unrecognized arguments: --colour red"),
        (eggrpo, "--lr much", "--lr: invalid float value"),
        (eggrpo, "--name a/b", "--name 'a/b': letters, digits"),
        (eggrpo, "--low-frac .6 --high-frac .5", "--low-frac 0.6, --high-frac 0.5: must add up"),
        (eggrpo, "--group-size 1", "--group-size 1: must be at least 2"),
        (eggrpo, "--beta nan", "--beta nan: must be at least 0"),
        (eggrpo, "--kappa -.5", "--kappa -0.5: must be at least 0"),
        (eggrpo, "--seed -1", "--seed -1: must be at least 0"),
        (pretrain, "--lr inf", "--lr inf: must be at least 0 and at most"),
        (pretrain, "--steps 99999999999", "--steps 99999999999: must be at least 1 and at most"),
        (pretrain, "--save-every -1", "--save-every -1.0: must be at least 0"),
        (pretrain, "--drop-plan 1.1", "--drop-plan 1.1: must be at least 0 and at most 1"),
        (pretrain, "--width 65", "--width 65: must be a multiple of --heads 4"),
        (tiny_vq_train, "--width 20", "--width 20: must be a multiple of 8"),
        (tiny_vq_train, "--codebook-size 1", "--codebook-size 1: must be at least 2"),
    ],
)
def test_a_bad_flag_is_refused_by_its_name_in_one_line(module, argv, words):
    methods = eggrpo.METHODS if module is eggrpo else None
    with pytest.raises(UserError) as error:
        parse(module.Config, module.PRESETS, "", argv.split(), methods)
    assert words in str(error.value) and "\n" not in str(error.value)


# --- errors, device and streams -------------------------------------------------------------------


def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(capsys, monkeypatch):
    def cuda(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for allocate in (lambda *_: torch.empty(10**15), cuda):
        monkeypatch.setattr(pretrain, "load_tokenizer", allocate)
        words = "pretrain ran out of memory: lower --micro-batch (see bash train.sh pretrain --help"
        assert words in one_line(capsys, 2, pretrain.main, [])
        assert one_line(capsys, 2, allocate) == "error: out of memory"  # in any other command


def test_a_bug_keeps_its_traceback():
    def bug():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        common.run(bug)


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


def test_streams_depend_on_their_key_alone():
    draw = lambda *key: torch.rand(4, generator=generator(*key))
    assert torch.equal(draw(0, "rollout", 3), draw(0, "rollout", 3))
    for other in ((0, "rollout", 4), (1, "rollout", 3), (0, "deck", 3)):
        assert not torch.equal(draw(0, "rollout", 3), draw(*other))


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "a.pt"
    save_checkpoint(path, dict(kind="base", x=torch.arange(1000)))
    back = load_checkpoint(path, COMMAND)
    assert torch.equal(back["x"], torch.arange(1000)) and back["kind"] == "base"
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]  # no temporary file is left


def test_missing_and_damaged_checkpoints_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match=f"a.pt is not there: make it by `{COMMAND}`"):
        load_checkpoint(path, COMMAND)
    save_checkpoint(path, dict(x=torch.arange(1000)))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:-1], whole[100:], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"a.pt is damaged.*remove it and run `{COMMAND}`"):
            load_checkpoint(path, COMMAND)


def test_a_write_that_fails_is_one_line_and_keeps_what_was_saved_before(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, dict(step=1))

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write .*a.pt: No space left on device"):
        save_checkpoint(path, dict(step=2))
    assert load_checkpoint(path, COMMAND) == dict(step=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    with pytest.raises(UserError, match="cannot write"):  # the folder is a file
        common.write(path / "b", b"")


def make_run(folder, made_from=None, **settings):
    config = Config(**settings)
    path, log_path = folder / "a.pt", folder / "log.jsonl"
    return common.Run("base", path, log_path, config, COMMAND, made_from or {})


@pytest.fixture
def begun(tmp_path):
    """A run that was killed after step 3, while it wrote its log; its checkpoint is of step 2."""
    model = torch.nn.Linear(2, 2)
    model.config = {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = make_run(tmp_path, {"b.pt": "1234"})
    run.start("cpu", model, optimizer)
    for step in range(4):
        run.log(step=step, x=step / 3)
        if step < 2:
            run.save(step, model, optimizer)
    with open(run.log_path, "a") as file:
        file.write('{"step": 4, "x"')
    return tmp_path, model, optimizer


def test_unfinished_and_wrong_stages_are_refused(begun):
    path = begun[0] / "a.pt"
    with pytest.raises(UserError, match=f"stands at step 2 of 5: go on by `{COMMAND}`"):
        load_finished(path, "base", "small", COMMAND)
    for kind, preset in (("policy", "small"), ("base", "large")):
        with pytest.raises(UserError, match=f"a.pt is a small base, not a {preset} {kind}"):
            load_finished(path, kind, preset, COMMAND)


def test_a_run_goes_on_with_its_own_settings_and_files_only(begun):
    folder = begun[0]
    with pytest.raises(UserError, match="a.pt was made with --rate 0.5, not 0.6"):
        make_run(folder, {"b.pt": "1234"}, rate=0.6)
    with pytest.raises(UserError, match=f"made from another b.pt: remove it and run `{COMMAND}`"):
        make_run(folder, {"b.pt": "5678"})
    free = dict(save_every=1, device="cpu", out="elsewhere")  # these change no result
    assert make_run(folder, {"b.pt": "1234"}, **free).first_step == 2


def test_a_continued_log_drops_a_cut_off_line_and_the_steps_to_come(begun):
    folder, model, optimizer = begun
    run = make_run(folder, {"b.pt": "1234"})
    run.start("cpu", model, optimizer)
    run.log(step=2, x=float("nan"))
    head, *records = map(json.loads, run.log_path.read_text().splitlines())
    assert {"commit", "device", "config", "torch"} <= set(head)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[1]["x"] == 0.333333 and records[2]["x"] is None  # JSON has no NaN


def test_a_damaged_line_of_a_log_is_named_by_its_number(begun):
    folder, model, optimizer = begun
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(UserError, match="log.jsonl, line 2: not JSON"):
        make_run(folder, {"b.pt": "1234"}).start("cpu", model, optimizer)
    path.unlink()
    with pytest.raises(UserError, match="log.jsonl is missing: remove the checkpoint too"):
        make_run(folder, {"b.pt": "1234"}).start("cpu", model, optimizer)


def test_weights_that_are_not_finite_are_never_saved(begun):
    folder, model, optimizer = begun
    model.weight.data[0, 0] = float("inf")
    run = make_run(folder, {"b.pt": "1234"})
    with pytest.raises(UserError, match="step 3 made weights that are not finite: lower --lr"):
        run.save(3, model, optimizer)
    assert load_checkpoint(run.path, COMMAND)["step"] == 2
