"""The whole pipeline: tokenizer, base policy, EG-GRPO and GRPO, evaluation.

    bash train.sh                          from an empty clone to the table and the pictures
    bash train.sh --method grpo --seed 1   one method; seed of reinforcement learning

A finished stage is skipped, an interrupted one goes on. One by itself: bash train.sh pretrain.
"""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import common
import eggrpo
import evaluate
import pretrain
import tiny_vq.train
from scenes import WORLDS

METHODS = {"both": eggrpo.Method("eggrpo and grpo")}
METHODS |= {name: method._replace(values={}) for name, method in eggrpo.METHODS.items()}


@dataclass(frozen=True)
class Config(common.BaseConfig):
    method: str = "both"  # of reinforcement learning, whose seed --seed is


def side_by_side(runs, config):
    """Make runs of eggrpo.py, {name: flags}, at the same time, each in a process with its share of
    the threads, which wait for each other less (train.sh). Shows a bar for each, and what it
    prints. Raises UserError if one fails, after the others' end."""
    share = torch.get_num_threads() // len(runs)
    environment = os.environ | {"OMP_NUM_THREADS": str(share), "TQDM_DISABLE": "1"}
    steps = eggrpo.Config(**eggrpo.PRESETS[config.preset]).steps
    processes = {}
    bars = {}
    with contextlib.ExitStack() as stack:
        for name, flags in runs.items():
            command = [sys.executable, "-u", eggrpo.__file__, *flags]
            options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            process = subprocess.Popen(command, **options)
            stack.enter_context(process)
            stack.callback(process.terminate)  # after Ctrl-C
            os.set_blocking(process.stdout.fileno(), False)
            processes[name] = process
            bars[name] = stack.enter_context(tqdm(desc=name, total=steps))
        running = True
        while running:
            time.sleep(0.5)
            running = any(process.poll() is None for process in processes.values())
            for name, process in processes.items():
                printed = process.stdout.read()  # None or empty if there is nothing new
                if printed:
                    tqdm.write(printed.decode(errors="replace"), end="")
                log = config.folder / name / "log.jsonl"
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                done = max(lines - 2, 0)  # the first two are from before training
                bars[name].update(done - bars[name].n)
    for name, process in processes.items():
        common.check(process.returncode == 0, f"{name} ended with status {process.returncode}")


def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv, METHODS)
    device = common.pick_device(config.device)  # what cannot be used is refused here
    shared = ["--preset", config.preset, "--device", config.device]
    if config.out != Config.out:
        shared += ["--out", str(config.out)]
    methods = ("eggrpo", "grpo") if config.method == "both" else (config.method,)
    runs = {}
    for method in methods:
        own = ["--method", method, "--seed", str(config.seed)]
        runs[f"{method}-{config.seed}"] = [*shared, *own]

    print("stage 1 of 4: tokenizer", flush=True)
    tiny_vq.train.main(shared)
    print("stage 2 of 4: base policy", flush=True)
    pretrain.main(shared)
    print(f"stage 3 of 4: reinforcement learning, {' and '.join(methods)}", flush=True)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if 1 < len(runs) <= threads:
        side_by_side(runs, config)
    else:
        for flags in runs.values():
            eggrpo.main(flags)
    print("stage 4 of 4: evaluation", flush=True)
    evaluate.main(shared)


if __name__ == "__main__":
    common.run(main)
