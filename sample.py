"""Type a prompt, get plans and images.

    python sample.py "a red circle left of a blue square"
    python sample.py "three green crosses" --number 4 --guidance 2 --policy out/cpu/grpo-0/policy.pt

-> out/cpu/samples/three-green-crosses.png
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from evaluate import gallery, save_image
from model import load_base, load_policy
from rollout import draw_uniform, load_env, sample_images
from scenes import WORLDS
from words import decode_words, encode_words


@dataclass(frozen=True)
class Config(common.BaseConfig):
    policy: str = ""  # a policy.pt, or "base"; default: <out>/<preset>/eggrpo-0/policy.pt
    number: int = 4  # plans and images
    guidance: float = -1.0  # classifier-free guidance weight; -1: as the policy was trained
    temperature: float = 1.0
    plan: bool = True  # write a plan first

    RANGES = dict(
        number=(1, 64), guidance=(-1, common.LARGEST),
        temperature=(0.01, 100),  # from nearly greedy to nearly uniform
    )  # fmt: skip


def file_name(prompt):
    """Turn any prompt into a file name of letters a to z, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "prompt"


def load_named(config, device):
    """Load the policy that --policy names. Returns it and the guidance that it was trained with."""
    if config.policy == "base":
        return load_base(config.preset, config.out, device), 1.0
    path = config.policy or f"{config.out}/{config.preset}/eggrpo-0/policy.pt"
    made_by = common.command_for("eggrpo.py", config.preset, config.out)
    command = None if config.policy else made_by
    policy, trained = load_policy(path, "policy", config.preset, command, device)
    return policy, trained["guidance"]


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    prompt = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    presets = {name: {} for name in WORLDS}
    config, _ = common.parse("sample.py", Config, presets, __doc__, argv)
    try:
        words = torch.tensor([encode_words(prompt, WORLDS[config.preset].prompt_slots)])
    except ValueError as error:
        raise common.UserError(str(error)) from None
    device = common.pick_device(config.device)
    env = load_env(config.preset, config.out, device)
    policy, guidance = load_named(config, device)
    options = dict(no_plan=not config.plan, temperature=config.temperature)
    options["guidance"] = guidance if config.guidance < 0 else config.guidance
    uniform = draw_uniform(policy, config.number, 1, config.seed, "sample")
    sample, images = sample_images(env, policy, words, uniform, **options)
    plans = [decode_words(p) or "(no plan)" for p in sample.plan]
    print("\n".join(plans))
    path = Path(config.out) / config.preset / "samples" / f"{file_name(prompt)}.png"
    save_image(gallery([images], plans), path)
    print(f"image: {path}")


if __name__ == "__main__":
    common.run(main)
