"""What only a GPU can show; without one, pytest skips these and says so.

    bash train.sh test -m gpu

Nothing here is compared bit for bit: kernels of a GPU may add in any order.
"""

import pytest
import torch

import common
import eggrpo
import evaluate
import pretrain
import sample
from conftest import difference, one_line, read_log, tiny_policy
from eggrpo import LOGP_DIFF_BOUND
from model import Policy, generate, score
from scenes import WORLDS, encode_scenes, make_scene
from tiny_vq import train as tiny_vq_train

pytestmark = pytest.mark.gpu

RUN = "--steps 4 --prompts 2 --group-size 4 --eval-prompts 6 --eval-every 4"


def call(module, folder, flags, *prompt, preset="smoke"):
    """Call the main() of a command in this process, on CUDA unless the flags name a device."""
    module.main([*prompt, "--preset", preset, "--out", str(folder), *flags.split()])


def rollout_of(policy, world, guidance=1.0, number=16):
    """Sample on the GPU: number prompts, two rollouts of each."""
    scenes = [make_scene(world, "train", 0, i) for i in range(number)]
    prompts, _ = encode_scenes(world, scenes)
    noise = torch.rand(2 * number, policy.C + policy.L, generator=common.generator("gpu"))
    return generate(policy, prompts.cuda(), noise.cuda(), guidance)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Every stage of the smoke preset on the GPU. Returns the output folder."""
    folder = tmp_path_factory.mktemp("gpu")
    for module, flags in ((tiny_vq_train, ""), (pretrain, ""), (eggrpo, RUN), (evaluate, "")):
        call(module, folder, flags)
    return folder


@pytest.mark.parametrize("log", ["tokenizer.jsonl", "base.jsonl", "eggrpo-0/log.jsonl"])
def test_every_stage_runs_on_the_gpu_and_logs_finite_numbers(out, log):
    head, *records = read_log(out / "smoke" / log)
    assert head["device"] == "cuda" and len(records) > 1
    missing = [key for record in records for key, value in record.items() if value is None]
    assert all(key.startswith("reward/") for key in missing), missing  # no prompt asks for it


def test_two_steps_of_the_large_preset(tmp_path):
    for module, flags in (
        (tiny_vq_train, "--images 512 --steps 2 --scored 14"),
        (pretrain, "--items 256 --steps 2"),
        (eggrpo, "--steps 2 --prompts 4 --eval-prompts 8"),
    ):
        call(module, tmp_path, flags, preset="large")
    last = read_log(tmp_path / "large" / "eggrpo-0" / "log.jsonl")[-1]
    assert last["logp_diff_mean"] > 0  # sampler and learner were compared


def test_a_picture_is_drawn_from_a_prompt(out):
    call(sample, out, "", "a red circle")
    assert (out / "smoke" / "samples" / "a-red-circle.png").stat().st_size > 0


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sampler_and_learner_are_one_policy(monkeypatch, dtype, guidance):
    """A policy of the large preset's size and of random weights, by the bound of training."""
    if dtype != common.network_dtype(torch.device("cuda")):
        if dtype == torch.bfloat16:
            pytest.skip("this GPU emulates bfloat16")
        monkeypatch.setattr(common, "network_dtype", lambda device: dtype)
    world = WORLDS["large"]
    config = pretrain.Config(**pretrain.PRESETS["large"])
    torch.manual_seed(0)
    policy = Policy(world, 2048, 16, config.width, config.layers, config.heads).cuda()
    found = difference(policy, rollout_of(policy, world, guidance), guidance)
    print(f"{dtype}, guidance {guidance}: mean difference {found:.1e} nats")
    assert found < LOGP_DIFF_BOUND[dtype] * (guidance + abs(1 - guidance))


@torch.no_grad()
def test_cuda_computes_what_the_cpu_computes(monkeypatch, world):
    """In float32: log-probs of the same tokens, and rewards of the same images."""
    monkeypatch.setattr(common, "network_dtype", lambda device: torch.float32)
    policy = tiny_policy(world).cuda()
    rollout = rollout_of(policy, world)
    on_cpu = type(rollout)(*(x.cpu() for x in rollout))
    logp = score(policy.cpu(), on_cpu.prompt, on_cpu.plan, on_cpu.codes)
    assert (logp - on_cpu.logp).abs().max() < 1e-3
    targets = evaluate.encode_targets(world, [make_scene(world, "train", 0, 0)] * 8)
    images = torch.rand(8, 3, world.image_size, world.image_size)
    rewards, _, _ = evaluate.compute_rewards(images, targets, world)
    targets = type(targets)(*(x.cuda() for x in targets))
    on_cuda, _, _ = evaluate.compute_rewards(images.cuda(), targets, world)
    assert torch.allclose(rewards, on_cuda.cpu(), atol=1e-5)


def test_memory_that_runs_out_names_the_flag_that_helps(out, capsys):
    fraction = 0.3 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        flags = "--name big --prompts 512 --group-size 32 --micro-batch 16384"
        line = one_line(capsys, 2, call, eggrpo, out, flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory: lower --micro-batch of eggrpo" in line
