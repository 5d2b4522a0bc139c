"""Measure the time of decoding and of a training step, and what bounds it from below.

    bash train.sh lab.bench            half a minute

The model is the preset's with random weights. Times are medians; on a shared machine only their
ratios are meaningful. A floor is what one resource alone would take, at a rate measured here: FLOPs
as torch counts them, at that of a large matrix product; bytes of weights and cached keys and values
whenever they are needed, at the bandwidth of a large copy. On a CPU the second does not hold for
what fits into the caches; on a GPU launching operations often takes longer than both. EG-GRPO adds
the time of its masks and its shaping to GRPO.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import common
import pretrain
import tiny_vq.train
from eggrpo import train_step
from evaluate import Env, draw_noise, markdown_table, sample_images
from lab.measure import step_config, token_advantages, training_batch
from model import Policy
from scenes import WORLDS, encode_scenes
from tiny_vq.vqvae import VQVAE


@dataclass(frozen=True)
class Config(common.BaseConfig):
    seconds: float = 2.0  # that each measurement takes, at least


def make(config, device):
    """Make a random policy and the environment of a preset."""
    world = WORLDS[config.preset]
    torch.manual_seed(config.seed)
    of = tiny_vq.train.Config(**tiny_vq.train.PRESETS[config.preset])
    tokenizer = VQVAE(world.patch, of.width, of.blocks, of.codebook_size, of.dim)
    codebook = tokenizer.quantizer.codebook
    of = pretrain.Config(**pretrain.PRESETS[config.preset])
    policy = Policy(world, *codebook.shape, of.width, of.layers, of.heads)
    policy.set_codebook(codebook)
    tokenizer = tokenizer.to(device).requires_grad_(False)
    return policy.to(device), Env(tokenizer, world, device)


def make_calls(policy, env, settings):
    """Return what is measured: {name: function}."""
    batch = training_batch(env, policy, settings, 0)
    # an untrained policy's rewards are equal, and cost nothing to shape
    batch = batch._replace(advantage=torch.randn_like(batch.advantage))
    prompts, _ = encode_scenes(env.world, batch.scenes)
    noise = draw_noise(policy, len(batch.advantage), "bench")
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), 0.0)  # so that the policy stays the same
    return {
        "decoding": lambda: sample_images(env, policy, prompts, noise),
        "step": lambda: train_step(policy, reference, optimizer, env, settings, 0),
        "shaping": lambda: token_advantages(batch, settings),
    }


def median_time(call, seconds):
    """Return the median time of a call in seconds."""
    timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def count_flops(call):
    """Count the FLOPs of a call, with attention in parts: the counter misses its fused kernels."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def memory_traffic(policy, settings, size):
    """Return the bytes of weights and cache that decoding and a step need. size: of a number."""
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    sequences = settings.prompts * settings.group_size
    first = policy.S + 1
    slots = range(first, first + policy.C + policy.L)  # each attends to all before it
    layers = policy.config["layers"]
    width = policy.config["width"]
    cache = 2 * layers * width * sequences * sum(slots)
    weights = len(slots) * parameters
    decoding = size * (weights + cache)
    micro_batches = math.ceil(sequences / settings.micro_batch)
    passes = 4 * micro_batches  # policy and reference; backward twice, for inputs and weights
    network = size * passes * parameters
    adamw = 7 * 4 * parameters  # weights, gradients and two moments; all but gradients written
    return {"decoding": decoding, "step": decoding + network + adamw}


def measure_rates(device, seconds):
    """Measure FLOP/s in the network's type, and bytes/s."""
    n = 8192 if device.type == "cuda" else 2048
    matrix = torch.rand(n, n, device=device).to(common.network_dtype(device))
    source = torch.rand(2**26, device=device)  # 256 MiB, more than caches hold
    target = torch.empty_like(source)
    product = median_time(lambda: matrix @ matrix, seconds)
    copying = median_time(lambda: target.copy_(source), seconds)
    rate = 2 * n**3 / product
    bandwidth = 2 * source.nbytes / copying
    return rate, bandwidth


@common.stage()
def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv)
    device = common.pick_device(config.device)
    policy, env = make(config, device)
    settings = step_config(config.preset, "eggrpo", config.seed)
    calls = make_calls(policy, env, settings)
    times = {}
    for name, call in calls.items():
        times[name] = median_time(call, config.seconds)
    rate, bandwidth = measure_rates(device, config.seconds)
    size = common.network_dtype(device).itemsize
    rows = []
    for name, moved in memory_traffic(policy, settings, size).items():
        flops = count_flops(calls[name])
        seconds = times[name], flops / rate, moved / bandwidth
        rows.append([name, *(f"{value:.3f}" for value in seconds)])
    print(f"\n{markdown_table(['seconds', 'measured', 'floor: FLOPs', 'memory'], rows)}\n")
    print(f"{rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    shaping = 1000 * times["shaping"]
    step = 1000 * times["step"]
    print(f"EG-GRPO adds to GRPO: {shaping:.2f} ms of {step:.0f} ms per step, {shaping / step:.2%}")


if __name__ == "__main__":
    common.run(main)
