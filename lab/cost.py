"""Estimate memory, tokens, FLOPs and time of a preset by stage, on several GPUs and this machine.

    python -m lab.cost --preset large      seconds; no file is needed

The model: a stage computes (FLOPs over the sustained rate), moves memory (bytes over bandwidth) and
launches kernels, at the host's time for each. On a GPU the host runs ahead of the device, so the
longer of the two counts; on a CPU they add up. Rates of this machine are measured, those of the
GPUs are a share of their data sheets'. The constants below were fitted to an H200 (docs/gpu.md).

If the preset has been run here, measured times stand beside the estimates.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch

import common
import eggrpo
import evaluate
import pretrain
import tiny_vq.train
from evaluate import draw_noise, markdown_table
from model import Policy, generate
from scenes import END, WORDS, WORLDS, World, encode_scenes, make_scene, random_scene, render

GIB = 2**30
EFFICIENCY = 0.5  # of a data sheet's FLOP/s: what matrix products of a few hundred columns reach
BANDWIDTH = 0.8  # of a data sheet's bytes/s: what a copy reaches
MOVES = 14  # times that a byte kept for the backward pass is read or written in an update
CACHE_READS = 3  # times that attention with one query reads the cache
HOST = 18e-6  # seconds of the host per kernel, in eager PyTorch: two hosts needed 16 and 22
SCENE = 0.6e-3  # seconds of the host to draw a scene
DISK = 200e6  # bytes per second that checkpoints are written at
CONTEXT = 0.5 * GIB  # what CUDA itself takes


class Machine(NamedTuple):
    network: float  # FLOP/s of the network's matrix products, sustained
    float32: float  # the same in float32
    bandwidth: float  # bytes/s
    bf16: bool  # whether the network computes in bfloat16
    memory: float  # bytes
    host: float = HOST
    scene: float = SCENE
    processes: int = 8  # that draw the corpus
    overlap: bool = True  # whether host and device work at the same time


def gpu(network, float32, bandwidth, memory, bf16=True):
    """Make a Machine from a data sheet: TFLOP/s, TFLOP/s, TB/s, GiB."""
    return Machine(
        network=EFFICIENCY * network * 1e12,
        float32=EFFICIENCY * float32 * 1e12,
        bandwidth=BANDWIDTH * bandwidth * 1e12,
        bf16=bf16,
        memory=memory * GIB,
    )


GPUS = {  # dense matrix products; bf16 with sums in float32, where the card has it
    "H100": gpu(989, 67, 3.35, 80),
    "RTX 4090": gpu(165, 83, 1.01, 24),
    "RTX 3060": gpu(25.6, 12.7, 0.36, 12),
    "T4": gpu(8.1, 8.1, 0.32, 16, bf16=False),
}


class Work(NamedTuple):
    """What a stage does, in all."""

    flops: float = 0  # of the network
    float32: float = 0  # FLOPs of tokenizer and rewards
    bytes: float = 0  # moved, if the network computes in bf16
    kernels: float = 0
    scenes: float = 0  # drawn by the host, one after another

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other)))

    def times(self, number):
        return Work(*(number * value for value in self))


# --- the policy -----------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Sizes of a policy and its world, by the letters of model.py."""

    S: int
    C: int
    L: int
    V: int
    D: int
    layers: int
    dim: int
    parameters: int

    @property
    def slots(self):
        return self.S + self.C + self.L + 1


def policy_shape(policy):
    """Return the Shape of a Policy."""
    config = policy.config
    return Shape(
        S=policy.S,
        C=policy.C,
        L=policy.L,
        V=config["codebook_size"],
        D=config["width"],
        layers=config["layers"],
        dim=config["code_dim"],
        parameters=sum(p.numel() for p in policy.parameters()),
    )


def slot_flops(s, keys):
    """FLOPs of all blocks for one slot that attends to a number of keys."""
    return s.layers * (24 * s.D**2 + 4 * keys * s.D)


def head_flops(s):
    """FLOPs of both heads, and of the projection of codebook vectors, for one sequence."""
    words = s.C * 2 * s.D * (len(WORDS) - END)
    codes = s.L * 2 * (s.D * s.V + s.D * s.dim + s.dim * s.V)
    return words + codes + (s.L - 1) * 2 * s.dim * s.D


def score_flops(s):
    """FLOPs of one pass over all slots of a sequence; a gradient costs twice as much again."""
    return s.slots * slot_flops(s, s.slots) + head_flops(s)


def decode_flops(s, prompts, sequences):
    """FLOPs of sampling: prompt and <plan> once for each prompt, then slot by slot."""
    first = s.S + 1
    fed = sum(slot_flops(s, slot + 1) for slot in range(first, s.slots))
    prefill = prompts * first * slot_flops(s, first)
    return prefill + sequences * (fed + head_flops(s))


def kept_bytes(s, bf16=True):
    """Bytes of a sequence that are kept for the backward pass: blocks, and copies of logits."""
    blocks = (36 if bf16 else 64) * s.D * s.layers * s.slots
    return blocks + 4 * 4 * s.V * s.L


def decoding(s, prompts, sequences):
    """Work of sampling a batch."""
    fed = s.C + s.L
    cache = sum(2 * s.layers * s.D * 2 * slot for slot in range(s.S + 1, s.slots))
    return Work(
        flops=decode_flops(s, prompts, sequences),
        bytes=fed * 2 * s.parameters + CACHE_READS * sequences * cache,
        kernels=fed * (14 * s.layers + 40),
    )


def learning(s, sequences, micro_batch, reference):
    """Work of one update; with a reference policy, as in reinforcement learning."""
    parts = -(-sequences // micro_batch)
    kernels = parts * (66 * s.layers + 70)
    passes = 3
    if reference:
        kernels += parts * (25 * s.layers + 40) + 500  # and advantages, rewards, the log
        passes = 4
    return Work(
        flops=passes * sequences * score_flops(s),
        bytes=MOVES * sequences * kept_bytes(s) + 28 * s.parameters,  # AdamW's passes over weights
        kernels=kernels,
    )


# --- the tokenizer --------------------------------------------------------------------------------


def tokenizer_flops(world, config):
    """FLOPs of one image: encoder, nearest code, decoder."""
    channels = 3 * world.patch**2
    w, dim = config.width, config.dim
    encoder = 2 * (channels * 4 * w + 4 * w * w + w * dim)
    nearest = 2 * dim * config.codebook_size
    decoder = 2 * (9 * dim * w + config.blocks * 2 * 9 * w * w + w * channels)
    return [world.image_tokens * n for n in (encoder, nearest, decoder)]


def tokenizer_training(world, config):
    """Work of one step. Nothing flows back into images, nor through the nearest code."""
    encoder, nearest, decoder = tokenizer_flops(world, config)
    first = world.image_tokens * 2 * 3 * world.patch**2 * 4 * config.width
    flops = config.batch * (3 * (encoder + decoder) + nearest - first)
    distances = config.batch * world.image_tokens * config.codebook_size * 4
    return Work(float32=flops, bytes=4 * distances, kernels=200)


# --- stages ---------------------------------------------------------------------------------------


class Preset(NamedTuple):
    world: World
    tokenizer: tiny_vq.train.Config
    base: pretrain.Config
    rl: eggrpo.Config
    evaluation: evaluate.Config
    shape: Shape


def load_preset(name):
    """Collect the settings of a preset."""
    settings = []
    for module in (tiny_vq.train, pretrain, eggrpo, evaluate):
        settings.append(module.Config(preset=name, **module.PRESETS[name]))
    tokenizer, base = settings[:2]
    with torch.device("meta"):
        codebook = torch.empty(tokenizer.codebook_size, tokenizer.dim)
        policy = pretrain.make_policy(base, WORLDS[name], codebook)
    return Preset(WORLDS[name], *settings, policy_shape(policy))


def drawing(preset, images, batch):
    """Work of drawing and scoring held-out images, one for each prompt."""
    _, _, decoder = tokenizer_flops(preset.world, preset.tokenizer)
    batches = [min(batch, images - start) for start in range(0, images, batch)]
    work = Work(float32=images * decoder, kernels=200 * len(batches))
    for n in batches:
        work += decoding(preset.shape, n, n)
    return work


def stages(preset, processes):
    """Return {stage: Work} of bash train.sh: reinforcement learning by one method, evaluation of
    the policies of two. processes: that draw the corpus."""
    s, world = preset.shape, preset.world
    tokenizer, base, rl = preset.tokenizer, preset.base, preset.rl
    encoder, nearest, decoder = tokenizer_flops(world, tokenizer)
    distances = world.image_tokens * tokenizer.codebook_size * 4

    encoding = Work(float32=encoder + nearest, bytes=4 * distances).times(base.items)
    encoding += Work(scenes=base.items / processes)
    pretraining = learning(s, base.batch, base.micro_batch, reference=False)
    B = rl.prompts * rl.group_size
    rollouts = decoding(s, rl.prompts, B) + Work(float32=B * decoder)
    updates = learning(s, B, rl.micro_batch, reference=True)
    looks = rl.steps // rl.eval_every + 1
    drawn = preset.evaluation.prompts
    return {
        "tokenizer": tokenizer_training(world, tokenizer).times(tokenizer.steps)
        + Work(scenes=tokenizer.images),
        "base policy": encoding + pretraining.times(base.steps),
        "rollouts": rollouts.times(rl.steps),
        "updates": updates.times(rl.steps),
        "evaluation in training": drawing(preset, 2 * rl.eval_prompts, 128).times(looks),
        "evaluation": drawing(preset, drawn + drawn // 2, preset.evaluation.batch).times(4),
    }


def floors(work, machine):
    """Return the seconds of computing, of moving memory and of launching kernels, each alone."""
    compute = work.flops / machine.network + work.float32 / machine.float32
    moved = work.bytes if machine.bf16 else 2 * work.bytes
    return compute, moved / machine.bandwidth, work.kernels * machine.host


def seconds(work, machine):
    """Estimate the time of a stage."""
    compute, move, launch = floors(work, machine)
    device = compute + move
    both = max(device, launch) if machine.overlap else device + launch
    return both + work.scenes * machine.scene


def memory(preset, bf16=True):
    """Estimate the peak of each stage, {stage: bytes}, without CUDA's own."""
    s, base, rl = preset.shape, preset.base, preset.rl
    codebook = preset.tokenizer.codebook_size
    distances = preset.world.image_tokens * codebook * 4
    encoding = 3 * pretrain.CHUNK * distances
    trained = 16 * s.parameters  # weights, gradients, two moments
    kept = kept_bytes(s, bf16)
    cache = 2 * s.layers * s.D * s.slots * (2 if bf16 else 4)
    learning = trained + min(base.batch, base.micro_batch) * kept
    B = rl.prompts * rl.group_size
    improving = trained + 4 * s.parameters + max(min(B, rl.micro_batch) * kept, B * cache)
    return {
        "tokenizer": max(3 * preset.tokenizer.batch, 2 * 256) * distances,  # 256: fit_residuals
        "base policy": max(learning, encoding),
        "reinforcement learning": improving,
        "evaluation": 8 * s.parameters + preset.evaluation.batch * cache,
    }


def writing_share(preset, times):
    """Share of the two long stages' time in which checkpoints are written, the larger.

    times: {stage: seconds}. A checkpoint has 12 bytes a parameter, the last one 4.
    """
    shares = []
    rl = times["rollouts"] + times["updates"] + times["evaluation in training"]
    for config, took in ((preset.base, times["base policy"]), (preset.rl, rl)):
        number = took // (60 * config.save_every)
        shares.append((number * 12 + 4) * preset.shape.parameters / DISK / took)
    return max(shares)


# --- this machine ---------------------------------------------------------------------------------


def clock(function, device, calls=5):
    """Return the least wall time of a call, after one that is not counted."""
    times = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measure_scene(world):
    """Measure the seconds that the host needs to draw a scene."""
    number = 50
    draw = lambda: [render(world, random_scene(world, 0, i)) for i in range(number)]
    return clock(draw, torch.device("cpu"), calls=2) / number


def measure_host(device):
    """Measure the host's seconds per kernel: sampling by a policy so small that nothing else
    counts."""
    world = WORLDS["small"]
    sizes = world.prompt_slots, world.plan_slots, world.image_tokens
    policy = Policy(len(WORDS), 16, 4, *sizes, width=8, layers=4, heads=1).to(device)
    prompts, _ = encode_scenes(world, [make_scene(world, "train", 0, 0)])
    noise = draw_noise(policy, 1, "cost").to(device)
    took = clock(lambda: generate(policy, prompts.to(device), noise), device)
    return took / decoding(policy_shape(policy), 1, 1).kernels


def measure_machine(preset, device):
    """Measure the rates of this machine at sizes of the preset. Returns a Machine."""
    dtype = common.network_dtype(device)
    rows = 16 * preset.shape.slots
    width = preset.shape.D

    def rate(dtype):
        x = torch.rand(rows, width, device=device, dtype=dtype)
        weight = torch.rand(4 * width, width, device=device, dtype=dtype)
        return 8 * rows * width**2 / clock(lambda: x @ weight.t(), device)

    block = torch.rand(2**24, device=device)
    bandwidth = 2 * block.numel() * 4 / clock(lambda: block.clone(), device)
    is_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if is_gpu else float("inf")
    return Machine(
        network=rate(dtype),
        float32=rate(torch.float32),
        bandwidth=bandwidth,
        bf16=dtype == torch.bfloat16,
        memory=total,
        host=measure_host(device),
        scene=measure_scene(preset.world),
        processes=pretrain.PROCESSES,
        overlap=is_gpu,
    )


LOGS = {
    "tokenizer": "tokenizer.jsonl",
    "base policy": "base.jsonl",
    "rollouts and updates": "eggrpo-0/log.jsonl",
}


def measured_seconds(config, steps):
    """Read what the stages took here from their logs. steps: {stage: the preset's number}, to
    which a finished run of fewer steps is extrapolated. Of tokenizer and base policy, what a
    process after an interruption took counts alone. Returns {stage: seconds}."""
    found = {}
    for stage, name in LOGS.items():
        path = Path(config.out) / config.preset / name
        if path.exists():
            head, *records = map(json.loads, common.read_log(path, float("inf")))
            took = sum(record.get("seconds", 0) for record in records)
            number = head["config"]["steps"]
            if took and records[-1]["step"] >= number - 1:
                found[stage] = took * steps[stage] / number
    return found


def show(value):
    """Format with two significant digits, or without decimals."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def minutes_row(preset, name, machine):
    """Make a row of the table: minutes of each stage, and of all with reinforcement learning by two
    methods; whether it fits; the share of writing."""
    works = stages(preset, machine.processes)
    times = {stage: seconds(work, machine) for stage, work in works.items()}
    second_method = times["rollouts"] + times["updates"] + times["evaluation in training"]
    peak = max(memory(preset, machine.bf16).values()) + CONTEXT
    minutes = [show(took / 60) for took in (*times.values(), sum(times.values()) + second_method)]
    fits = "yes" if peak < machine.memory else "no"
    return [name, *minutes, fits, f"{writing_share(preset, times):.1%}"]


def main(argv=None):
    config = common.parse(common.BaseConfig, {name: {} for name in WORLDS}, __doc__, argv)
    device = common.pick_device(config.device)
    preset = load_preset(config.preset)
    s, rl = preset.shape, preset.rl
    here = measure_machine(preset, device)
    works = stages(preset, here.processes)
    print(f"{s.parameters / 1e6:.1f} M parameters, {s.slots} slots, {s.C + s.L} sampled tokens")
    B = rl.prompts * rl.group_size
    tokens = {
        "tokenizer": preset.tokenizer.steps * preset.tokenizer.batch * s.L,
        "base policy": preset.base.steps * preset.base.batch * s.slots,
        "rollouts": rl.steps * B * (s.C + s.L),
        "updates": rl.steps * B * s.slots,
    }
    rows = []
    for stage, work in works.items():
        flops = f"{work.flops + work.float32:.1e}"
        count = f"{tokens[stage]:.1e}" if stage in tokens else ""
        rows.append([stage, count, flops, f"{work.bytes:.1e}", f"{work.kernels:.1e}"])
    head = ["", "tokens", "FLOPs", "bytes moved (bf16)", "kernels"]
    print(f"\n{markdown_table(head, rows)}\n")

    rows = []
    low, full = memory(preset), memory(preset, bf16=False)
    for stage in low:
        rows.append([stage, *(f"{(m[stage] + CONTEXT) / GIB:.1f}" for m in (low, full))])
    print(f"{markdown_table(['peak GiB of a GPU', 'bf16', 'float32'], rows)}\n")

    head = ["minutes", *works, "bash train.sh (two methods)", "fits", "writing"]
    rows = [minutes_row(preset, "this machine", here)]
    rows += [minutes_row(preset, name, machine) for name, machine in GPUS.items()]
    print(markdown_table(head, rows))
    print(
        f"\nthis machine: {here.network / 1e9:.0f} GFLOP/s in the network, {here.float32 / 1e9:.0f}"
        f" in float32, {here.bandwidth / 1e9:.0f} GB/s, {1e6 * here.host:.1f} us per kernel, "
        f"{1e3 * here.scene:.2f} ms per scene"
    )
    works["rollouts and updates"] = works["rollouts"] + works["updates"]
    numbers = preset.tokenizer.steps, preset.base.steps, preset.rl.steps
    found = measured_seconds(config, dict(zip(LOGS, numbers)))
    for stage, took in found.items():
        estimate = seconds(works[stage], here)
        print(f"{stage}: estimated {estimate:.0f} s, measured {took:.0f} s, {estimate / took:.2f}")
    if not found:
        folder = Path(config.out) / config.preset
        print(f"no log in {folder}: after bash train.sh its times stand here too")


if __name__ == "__main__":
    common.run(main)
