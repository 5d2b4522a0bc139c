"""Estimate memory, tokens, FLOPs and time of a preset by stage, on several GPUs and this machine.

    python -m lab.cost --preset large      seconds; no file is needed

The model: a stage (lab.work) computes (FLOPs over the sustained rate), moves memory (bytes over
bandwidth) and launches kernels, at the host's time for each. On a GPU the host runs ahead of the
device, so the longer of the two counts; on a CPU they add up. Rates of this machine are measured,
those of the GPUs are a share of their data sheets'. The constants below were fitted to an H200
(docs/gpu.md).

If the preset has been run here, measured times stand beside the estimates.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch

import common
import pretrain
from evaluate import draw_noise, markdown_table
from lab.work import decoding, load_preset, memory, policy_shape, stages
from model import Policy, generate
from scenes import WORDS, WORLDS, encode_scenes, make_scene, random_scene, render

GIB = 2**30
EFFICIENCY = 0.5  # of a data sheet's FLOP/s: what matrix products of a few hundred columns reach
BANDWIDTH = 0.8  # of a data sheet's bytes/s: what a copy reaches
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


# --- estimates ------------------------------------------------------------------------------------


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


def clock(function, device, calls=5, average=min):
    """Return the wall time of a call in seconds, the least of several or another average of them,
    after one that is not counted."""
    times = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return average(times[1:])


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
