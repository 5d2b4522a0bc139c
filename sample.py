"""Type a prompt, get plans and images.

    python sample.py "a red circle left of a blue square"
    python sample.py "three green crosses" --guidance 2 --policy out/small/grpo-0/policy.pt

-> out/small/samples/three-green-crosses.png
"""

import re
from dataclasses import dataclass
from typing import Annotated

import torch

import common
from evaluate import draw_noise, gallery, load_base, load_env, load_run, sample_images, save_figure
from scenes import WORLDS, decode_words, encode_words


@dataclass(frozen=True)
class Config(common.BaseConfig):
    prompt: str = ""  # for instance "three green crosses"
    policy: str = ""  # a policy.pt, or "base"; none: <out>/<preset>/eggrpo-0/policy.pt
    number: Annotated[int, 1, 64] = 4  # plans and images
    guidance: float = -1.0  # classifier-free guidance weight; below 0: as the policy was trained
    plan: bool = True  # write a plan first


def file_name(prompt, seed):
    """Turn a prompt into a file name of letters a to z, digits and dashes."""
    name = re.sub("[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "prompt"
    return f"{name}-{seed}.png" if seed else f"{name}.png"


@common.stage("--number of sample")
def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv)
    world = WORLDS[config.preset]
    prompts = torch.tensor([encode_words(config.prompt, world.prompt_slots)])
    device = common.pick_device(config.device)
    env = load_env(config, device)
    policy = load_base(config, env)
    options = {}
    if config.policy != "base":
        path = config.folder / "eggrpo-0/policy.pt"
        if config.policy:
            path = common.user_path(config.policy)
        policy, options = load_run(path, config, env, policy)
    if config.guidance >= 0:
        options["guidance"] = config.guidance
    rollout, images = sample_images(
        env,
        policy,
        prompts,
        draw_noise(policy, config.number, config.seed, "sample"),
        no_plan=not config.plan,
        **options,
    )
    plans = [decode_words(plan) or "(no plan)" for plan in rollout.plan]
    print("\n".join(plans))
    path = config.folder / "samples" / file_name(config.prompt, config.seed)
    save_figure(gallery([images], plans), path)
    print(f"image: {path}")


if __name__ == "__main__":
    common.run(main)
