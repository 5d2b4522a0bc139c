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


@dataclass(frozen=True)
class Config(common.BaseConfig):
    method: str = "both"  # EG-GRPO and GRPO, or one method of eggrpo.py

    def validate(self):
        super().validate()
        known = ["both", *eggrpo.METHODS]
        message = f"--method {self.method}: must be one of {', '.join(known)}"
        common.check(self.method in known, message)


# Where the times were measured, or extrapolated from shorter runs (docs/gpu.md).
MACHINES = {"small": "two CPU cores", "large": "an H200"}


def stages(config):
    """Return the stages as tuples: title, main(), its flags, {preset: time}."""
    of_method = dict(small="4 minutes", large="5 minutes")
    reinforce = []
    for method in ("eggrpo", "grpo") if config.method == "both" else (config.method,):
        title = f"reinforcement learning, {method}"
        flags = ["--method", method, "--seed", str(config.seed)]
        reinforce.append((title, eggrpo.main, flags, of_method))
    return [
        ("tokenizer", tiny_vq.train.main, [], dict(small="a minute", large="15 seconds")),
        ("base policy", pretrain.main, [], dict(small="4 minutes", large="4 minutes")),
        *reinforce,
        ("evaluation", evaluate.main, [], dict(small="a minute", large="half a minute")),
    ]


def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv)
    common.pick_device(config.device)  # what cannot be used is refused before the first stage
    shared = ["--preset", config.preset, "--device", config.device, "--out", config.out]
    todo = stages(config)
    for number, (title, stage, flags, times) in enumerate(todo, 1):
        duration = "seconds"
        if config.preset in times:
            duration = f"about {times[config.preset]} on {MACHINES[config.preset]}"
        print(f"stage {number} of {len(todo)}: {title} ({duration})", flush=True)
        stage([*shared, *flags])


if __name__ == "__main__":
    common.run(main)
