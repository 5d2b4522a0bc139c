"""The model of costs, against counted operations, and what it prints."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny_vq.train
from conftest import ROOT, tiny_policy
from lab import cost, work
from model import generate, score
from scenes import WORLDS
from tiny_vq.vqvae import VQVAE


def counted(function):
    """Count FLOPs. The counter misses the CPU's fused attention, so that is computed in parts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def tokens(policy, sequences):
    number = lambda n: torch.ones(sequences, n, dtype=torch.long)
    return number(policy.S), number(policy.C), number(policy.L)


@pytest.mark.parametrize("preset", ["small", "large"])
def test_flops_of_the_policy_are_those_that_are_counted(preset):
    policy = tiny_policy(WORLDS[preset])
    shape = work.policy_shape(policy)
    prompts, noise = tokens(policy, 2)[0], torch.rand(6, policy.C + policy.L)
    forward = counted(lambda: score(policy, *tokens(policy, 3)))
    both = counted(lambda: score(policy, *tokens(policy, 3)).sum().backward())
    sampling = counted(lambda: generate(policy, prompts, noise))
    assert forward == pytest.approx(3 * work.score_flops(shape), rel=0.05)
    assert both == pytest.approx(3 * 3 * work.score_flops(shape), rel=0.05)
    assert sampling == pytest.approx(work.decode_flops(shape, 2, 6), rel=0.05)


def test_flops_of_the_tokenizer_are_those_that_are_counted(world):
    config = tiny_vq.train.Config(width=32, batch=4, codebook_size=64)
    model = VQVAE(world.patch, config.width, config.blocks, config.codebook_size, config.dim)
    images = torch.rand(4, 3, world.image_size, world.image_size)

    def train():
        error, commitment, *_ = tiny_vq.train.loss_terms(model, images, 1.0)
        (error + commitment).backward()

    estimate = work.tokenizer_training(world, config).float32
    assert counted(train) == pytest.approx(estimate, rel=0.05)


def test_large_fits_8_gib_and_writes_checkpoints_in_less_than_a_hundredth_of_its_time():
    preset = work.load_preset("large")
    assert max(work.memory(preset).values()) + cost.CONTEXT < 8 * cost.GIB
    for machine in cost.GPUS.values():
        times = {k: cost.seconds(w, machine) for k, w in work.stages(preset, 8).items()}
        assert cost.writing_share(preset, times) < 0.01


def test_the_page_about_gpus_has_the_estimates_of_the_presets():
    page = (ROOT / "docs" / "gpu.md").read_text()
    for name in ("small", "large"):
        preset = work.load_preset(name)
        for gpu, machine in cost.GPUS.items():
            row = cost.minutes_row(preset, gpu, machine)
            assert " | ".join([name, *row]) in page


def test_cost_is_printed_for_every_gpu_and_beside_what_was_measured(out, capsys):
    cost.main(["--preset", "smoke", "--out", str(out[0])])
    printed = capsys.readouterr().out
    for name in (*cost.GPUS, "this machine", "reinforcement learning", "evaluation in training"):
        assert f"| {name} |" in printed
    for stage in cost.LOGS:
        assert f"\n{stage}: estimated" in printed
