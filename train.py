"""The whole pipeline: tokenizer, base policy, EG-GRPO, GRPO, evaluation.

    bash train.sh                          from an empty clone to the table and the pictures
    bash train.sh --method grpo --seed 1   one method; seed of reinforcement learning

A finished stage is skipped, an interrupted one goes on. Each stage can be run by itself, with flags
of its own: bash train.sh pretrain --help.
"""

from dataclasses import dataclass

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


def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv, METHODS)
    common.pick_device(config.device)  # what cannot be used is refused before the first stage
    stages = [
        ("tokenizer", tiny_vq.train.main, []),
        ("base policy", pretrain.main, []),
    ]
    for method in ("eggrpo", "grpo") if config.method == "both" else (config.method,):
        flags = ["--method", method, "--seed", str(config.seed)]
        stages.append((f"reinforcement learning, {method}", eggrpo.main, flags))
    stages.append(("evaluation", evaluate.main, []))
    shared = ["--preset", config.preset, "--device", config.device]
    if config.out != Config.out:
        shared += ["--out", str(config.out)]
    for number, (title, stage, flags) in enumerate(stages, 1):
        print(f"stage {number} of {len(stages)}: {title}", flush=True)
        stage([*shared, *flags])


if __name__ == "__main__":
    common.run(main)
