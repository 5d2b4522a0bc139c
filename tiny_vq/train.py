"""Train the tokenizer and measure its ceiling.

    python -m tiny_vq.train          -> out/small/tokenizer.pt

The images are crowded scenes with every colour-shape pair. The ceiling is the mean reward of true
evaluation scenes, encoded and decoded (rewards.py). Run (runs.py) keeps checkpoint and log.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from rewards import compute_rewards, encode_targets, paint_coverage
from runs import Run, load_model
from scenes import WORLDS, make_scene, random_scene, render
from tiny_vq.vqvae import VQVAE


@dataclass(frozen=True)
class Config(common.BaseConfig):
    images: int = 12000  # rendered once, seen several times
    steps: int = 500  # batches
    batch: int = 64  # images
    lr: float = 2e-3  # after a warm-up of 50 steps, linearly to 0
    width: int = 96  # channels
    blocks: int = 2  # residual blocks of the decoder
    codebook_size: Annotated[int, 2, 2**15] = 2048  # V; pretrain.py keeps codes as int16
    dim: int = 16  # width of a code's vector
    paint_weight: float = 8.0  # how much more a painted pixel's error weighs than the background's
    commitment: float = 0.25  # weight of the commitment loss
    scored: int = 420  # true scenes that the ceiling is the mean of

    def __post_init__(self):
        common.check(self.width % 8 == 0, f"--width {self.width}: must be a multiple of 8")


PRESETS = {
    "smoke": dict(scored=60, images=300, steps=30, width=32, batch=32, codebook_size=128),
    "small": dict(),
    "large": dict(steps=600),
}


def load_tokenizer(config, device):
    """Read the finished tokenizer of a preset."""
    path = config.folder / "tokenizer.pt"
    origin = WORLDS[config.preset].origin()
    tokenizer, _ = load_model(VQVAE, path, origin, "tiny_vq.train", config)
    return tokenizer.to(device)


def stack_images(images):
    """Stack uint8 arrays (h, w, 3) to one uint8 tensor (B, 3, h, w)."""
    stacked = torch.from_numpy(numpy.stack(images))  # (B, h, w, 3)
    return stacked.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def fit_residuals(model, batches):
    """For each code, add to the decoder's output the mean error that it leaves on its patches. A
    star differs by one pixel from the sky around it: it has a code of its own, but too little of
    the error for 500 steps to teach the decoder. batches: of images (B, 3, h, w) in [0, 1]."""
    sums = torch.zeros_like(model.residuals)  # (V, channels)
    counts = torch.zeros_like(sums[:, :1])
    for images in batches:
        restored, _, codes, _ = model(images)
        missed = F.pixel_unshuffle(images - restored, model.patch)  # (B, channels, side, side)
        missed = missed.permute(0, 2, 3, 1).flatten(0, 2)  # (B * side * side, channels)
        sums.index_add_(0, codes, missed)
        counts.index_add_(0, codes, torch.ones_like(missed[:, :1]))
    model.residuals += sums / counts.clamp(min=1)


@torch.no_grad()
def ceiling(model, world, device, number):
    """Score true evaluation scenes after encoding and decoding. Returns what is logged."""
    scenes = [make_scene(world, "eval", 0, i) for i in range(number)]
    images = stack_images([render(world, scene) for scene in scenes])
    images = images.to(device) / 255
    codes = torch.cat([model.encode(batch) for batch in images.split(64)])
    restored = torch.cat([model.decode(batch) for batch in codes.split(64)])
    targets = encode_targets(world, scenes, device)
    reward, _, exact = compute_rewards(restored, targets, world)
    return dict(
        ceiling=reward.mean().item(),
        ceiling_exact=exact.mean().item(),
        codes_in_use=len(codes.unique()),
    )


def update(model, optimizer, images, config, step, generator):
    """Make one step on images (B, 3, h, w) in [0, 1]. Returns terms to log."""
    restored, features, codes, commitment = model(images)  # features: (n, dim), codes: (n,)
    paint = paint_coverage(images).sum(1, keepdim=True)
    painted = (paint > 0).float()
    edges = F.max_pool2d(painted, 3, stride=1, padding=1)  # are paint too
    weight = 1 + config.paint_weight * edges
    squared = (restored - images) ** 2
    error = (weight * squared).mean() / weight.mean()
    # 20 brings an error of squared [0, 1] pixels to the commitment's size
    (20 * error + config.commitment * commitment).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.quantizer.update(features, codes)
    if step % 20 == 0 and step < 0.7 * config.steps:  # after that the codebook settles
        model.quantizer.restart(features, codes, generator)
    error, commitment = torch.stack([error, commitment]).tolist()
    return dict(error=error, commitment=commitment)


@common.stage("--batch of tiny_vq.train")
def main(argv=None):
    config = common.parse(Config, PRESETS, __doc__, argv)
    world = WORLDS[config.preset]
    device = common.pick_device(config.device)
    names = "tokenizer.pt", "tokenizer.jsonl"
    run = Run(*names, config, device, world.origin(), "tiny_vq.train")
    if not run.steps:
        return
    images = []
    for i in tqdm(range(config.images), "render", leave=False):
        scene = random_scene(world, config.seed, i)
        images.append(render(world, scene))
    images = stack_images(images)
    torch.manual_seed(config.seed)
    model = VQVAE(world.patch, config.width, config.blocks, config.codebook_size, config.dim)
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    for step in run.progress("tokenizer", model, optimizer):
        generator = common.generator(config.seed, "tokenizer", step)
        rows = torch.randint(len(images), (config.batch,), generator=generator)
        batch = images[rows].to(device) / 255
        rate = config.lr * min((step + 1) / 50, 1 - step / config.steps)
        optimizer.param_groups[0]["lr"] = rate
        terms = update(model, optimizer, batch, config, step, generator)
        run.log(step, **terms)
        if step + 1 == config.steps:
            parts = images.split(256)
            fit_residuals(model, (part.to(device) / 255 for part in parts))
            results = ceiling(model, world, device, config.scored)
            run.log(config.steps, **results)
        run.save(step, model, optimizer)
    print(f"tokenizer: ceiling {results['ceiling']:.3f}; see {run.path}")


if __name__ == "__main__":
    common.run(main)
