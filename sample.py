"""Type a prompt, get a plan and a picture.

    python sample.py "a red circle left of a blue square"
    python sample.py "three green crosses" --number 4 --guidance 2 --policy out/cpu/grpo-0/policy.pt

    -> out/cpu/samples/three-green-crosses.png
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import runtime
from evaluate import gallery, save_image
from model import generate
from pretrain import load_base, load_policy
from scenes import WORLDS, decode_words, encode_words
from tiny_vq.train import load_tokenizer


@dataclass(frozen=True)
class Config:
    preset: str = ""              # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0
    policy: str = ""            # a policy.pt, or "base"; default: <out>/<preset>/eggrpo-0/policy.pt
    number: int = 4               # plans and pictures
    guidance: float = 1.0         # classifier-free guidance weight; 1 is none
    temperature: float = 1.0
    direct: bool = False          # draw without a plan

    def check(self):
        runtime.require(1 <= self.number <= 64, "--number must lie between 1 and 64")
        # colder, and logits leave the range of float32
        runtime.require(0.01 <= self.temperature <= 100, "--temperature must lie in [0.01, 100]")
        runtime.require(math.isfinite(self.guidance), "--guidance must be finite")


def file_name(prompt):
    """Spell a prompt as a file's name, whatever is in it: letters a to z, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "prompt"


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    prompt = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    presets = {name: {} for name in runtime.PRESETS}
    config, _ = runtime.parse("sample.py", Config, presets, __doc__, argv)
    world = WORLDS[config.preset]
    try:
        words = torch.tensor([encode_words(prompt, world.prompt_slots)])
    except ValueError as error:
        raise runtime.UserError(str(error)) from None
    device = runtime.pick_device(config.device)
    tokenizer = load_tokenizer(config.preset, config.out, device)
    if config.policy == "base":
        policy = load_base(config.preset, config.out, device)
    else:
        path = config.policy or f"{config.out}/{config.preset}/eggrpo-0/policy.pt"
        maker = None if config.policy else runtime.maker_of("eggrpo.py", config.preset, config.out)
        policy = load_policy(path, maker, "policy", config.preset, device)

    noise = torch.rand(config.number, policy.C + policy.L,
                       generator=runtime.generator(config.seed, "sample"))
    drawn = generate(policy, words.to(device), noise.to(device), config.direct,
                     guidance=config.guidance, temperature=config.temperature)
    images = tokenizer.decode(drawn.codes)
    plans = [decode_words(p) or "(no plan)" for p in drawn.plan]
    for plan in plans:
        print(plan)
    path = Path(config.out) / config.preset / "samples" / f"{file_name(prompt)}.png"
    save_image(gallery([images], plans), path)
    print(f"picture: {path}")


if __name__ == "__main__":
    runtime.run(main)
