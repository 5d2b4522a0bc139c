"""Checkpoints, seeds, flags, log: what is finished is never lost, and what is wrong is said in one
line."""

import json
from dataclasses import dataclass

import pytest
import torch

import checkpoint
import common
from checkpoint import Run, load, load_model, save
from common import UserError, generator, parse


@dataclass(frozen=True)
class Config:
    preset: str = ""
    device: str = "auto"
    out: str = "out"
    seed: int = 0
    steps: int = 2
    rate: float = 0.5
    save_every: int = 5
    eval_every: int = 5
    eval_prompts: int = 5
    name: str = ""

    def check(self):
        if self.rate > 1:
            raise UserError("--rate must be at most 1")


PRESETS = {"smoke": dict(rate=0.1), "cpu": {}, "gpu": {}}


def record(**change):
    return (
        dict(
            kind="base",
            config=checkpoint.result_config(Config(preset="cpu")),
            step=2,
            steps=2,
            model_config={},
            model={},
            optimizer={},
            x=torch.arange(1000),
        )
        | change
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save(tmp_path / "deep" / "a.pt", record())
    back = load(tmp_path / "deep" / "a.pt", "make it")
    assert torch.equal(back["x"], torch.arange(1000)) and back["kind"] == "base"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.pt"]  # no temporary file is left


def test_damaged_foreign_and_missing_checkpoints_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "a.pt"
    save(path, record())
    whole = path.read_bytes()
    for i in range(200):
        place = torch.randint(len(whole), (), generator=generator("damage", i)).item()
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for damaged in (whole[:place], flipped):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"a\.pt.*remove it and run `make it`"):
                load(path, "make it")
    for place in range(len(checkpoint.MAGIC) + 65):  # the header, byte by byte
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"a\.pt.*remove it and run `make it`"):
            load(path, "make it")
    torch.save({"x": 1}, path)
    foreign = path.read_bytes()
    older = whole.replace(b"checkpoint 3", b"checkpoint 2", 1)
    for content in (foreign, older, b"", b"\n", whole[100:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt.*not a checkpoint of this version"):
            load(path, "make it")
    with pytest.raises(UserError, match="not there: make it with `make it`"):
        load(tmp_path / "none.pt", "make it")


def test_a_whole_file_of_the_wrong_content_is_refused(tmp_path):
    """The checksum fits: someone or some other version wrote it so."""
    path = tmp_path / "a.pt"
    lacking = [{k: v for k, v in record().items() if k != key} for key in checkpoint.KEYS]
    for content in ([1, 2], 7, {}, None, torch.ones(3), *lacking):
        save(path, content)
        with pytest.raises(UserError, match="not hold what this version writes: remove it and run"):
            load(path, "make it")
    for data in (b"", b"garbage", bytes(1000), b"PK\3\4 and more"):
        path.write_bytes(checkpoint._header(data) + data)
        with pytest.raises(UserError, match="not hold what this version writes: remove it and run"):
            load(path, "make it")


def test_a_folder_in_place_of_a_checkpoint_and_weights_of_another_shape_are_refused(tmp_path):
    (tmp_path / "a.pt").mkdir()
    for read in (lambda p: load(p, "make it"), lambda p: begin(p, Config())):
        with pytest.raises(UserError, match="is not a file: remove it and run `make it`"):
            read(tmp_path / "a.pt")
    for weights in ({}, {"weight": torch.ones(3, 3), "bias": torch.ones(2)}, [1]):
        with pytest.raises(UserError, match="weights of another version: remove it and run"):
            record = dict(model=weights)
            checkpoint.load_weights(torch.nn.Linear(2, 2), record, "a.pt", "make it")


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    """Tests may run as root, who may read all: the refusal is put in."""
    save(tmp_path / "a.pt", record())

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.Path, "read_bytes", refuse)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: load(tmp_path / "a.pt", "make it"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'a.pt'}: Permission denied\n"


def test_unfinished_and_wrong_stages_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    save(path, record(step=1))
    with pytest.raises(UserError, match="unfinished .step 1 of 2."):
        load_model(None, path, "base", "cpu", "make it")
    save(path, record())
    for kind, preset in (("policy", "cpu"), ("base", "gpu")):
        with pytest.raises(UserError, match=f"is a cpu base, not a {preset} {kind}"):
            load_model(None, path, kind, preset, "make it")


def begin(path, config):
    run = Run("base", path, path.with_name("log.jsonl"), config, "make it")
    run.lock.close()
    return run


def test_resuming_with_another_config_is_refused_unless_results_stay_the_same(tmp_path):
    path, free = tmp_path / "a.pt", dict(device="cuda", out="elsewhere", name="b", save_every=1)
    assert begin(path, Config(preset="cpu")).record is None
    save(path, record())
    free |= dict(eval_every=1, eval_prompts=1)
    assert begin(path, Config(preset="cpu", **free)).first_step == 2
    for change, words in (
        (dict(rate=0.6), "rate 0.5, now 0.6"),
        (dict(preset="smoke"), "preset 'cpu', now 'smoke'"),
    ):
        with pytest.raises(UserError, match=f"made with {words}"):
            begin(path, Config(**dict(preset="cpu") | change))


def test_nobody_is_told_to_remove_a_file_of_their_own(tmp_path):
    path = tmp_path / "mine.pt"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="not a checkpoint of this version: name another file$"):
        load(path)
    for change in (dict(step=1), dict(kind="policy")):
        save(path, record(**change))
        with pytest.raises(UserError, match=": name another file$"):
            load_model(None, path, "base", "cpu")


def test_streams_depend_on_their_key_alone():
    draw = lambda *key: torch.rand(4, generator=generator(*key))
    assert torch.equal(draw(0, "rollout", 3), draw(0, "rollout", 3))
    others = [draw(0, "rollout", 4), draw(1, "rollout", 3), draw(0, "deck", 3)]
    assert not any(torch.equal(draw(0, "rollout", 3), o) for o in others)


def test_flags_override_presets_override_defaults():
    assert parse("x.py", Config, PRESETS, "", ["--preset", "smoke"])[0].rate == 0.1
    assert parse("x.py", Config, PRESETS, "", ["--preset", "smoke", "--rate", "0.7"])[0].rate == 0.7
    assert parse("x.py", Config, PRESETS, "", ["--preset", "cpu"])[0].rate == 0.5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--preset", "big"], "argument --preset: invalid choice: 'big'"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
        (["--rate", "much"], "argument --rate: invalid float value"),
        (["--rate", "2"], "--rate must be at most 1"),
    ],
)
def test_bad_flags_are_one_line(argv, words):
    with pytest.raises(UserError) as error:
        parse("x.py", Config, PRESETS, "", argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_device_decides_the_preset():
    assert parse("x.py", Config, PRESETS, "", ["--device", "cpu"])[0].preset == "cpu"
    assert parse("x.py", Config, PRESETS, "", ["--device", "mps"])[0].preset == "cpu"
    assert parse("x.py", Config, PRESETS, "", ["--device", "cuda"])[0].preset == "gpu"


def test_a_resumed_log_drops_torn_lines_and_steps_to_come(tmp_path):
    path, model = tmp_path / "log.jsonl", torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = begin(tmp_path / "a.pt", Config(preset="cpu"))
    run.start("cpu", model, optimizer)
    for step in range(5):
        run.log(step=step, x=step / 3)
    with open(path, "a") as file:
        file.write('{"step": 5, "x"')
    weights = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    save(tmp_path / "a.pt", record(step=3, **weights))
    run = begin(tmp_path / "a.pt", Config(preset="cpu"))
    run.start("cpu", model, optimizer)
    run.log(step=3, x=1.0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r.get("step", "head") for r in records] == ["head", 0, 1, 2, 3]
    assert {"commit", "device", "config", "torch"} <= set(records[0])


@pytest.mark.parametrize(
    "capability, dtype", [((7, 0), "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16")]
)
def test_bf16_is_used_only_where_it_is_not_emulated(monkeypatch, capability, dtype):
    """V100 and T4 emulate bf16, more slowly than they compute in float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.network_dtype(torch.device("cuda")) == getattr(torch, dtype)
    assert common.network_dtype(torch.device("cpu")) == torch.float32


def test_a_numbered_gpu_becomes_the_current_device_and_tf32_and_cudnn_attention_are_off(
    monkeypatch,
):
    """Streams and allocations use the current device, whatever the device of the tensors."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        common.set_up_cuda(torch.device("cuda:1"))
        common.set_up_cuda(torch.device("cuda"))
        assert chosen == [torch.device("cuda:1")]
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.enable_cudnn_sdp(attention)
