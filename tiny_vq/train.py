"""Train the tokenizer and measure its ceiling.

    python -m tiny_vq.train --preset cpu          -> out/cpu/tokenizer.pt

It sees pictures only, of crowded scenes with every colour-shape pair. The ceiling is the mean
reward of true evaluation scenes after encoding and decoding: no policy that draws with these codes
can do better.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import rewards
import runtime
from scenes import WORLDS, make_scene, random_scene, render
from tiny_vq.quantizer import perplexity
from tiny_vq.vqvae import VQVAE


@dataclass(frozen=True)
class Config:
    preset: str = ""              # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0
    pictures: int = 12000         # rendered once, seen several times
    steps: int = 500
    batch: int = 64
    lr: float = 2e-3              # after a warm-up of 50 steps, linearly to 0
    width: int = 96               # channels
    blocks: int = 2               # residual blocks of the decoder
    codes: int = 1024
    dim: int = 16                 # width of a code's vector
    ink_weight: float = 8.0       # how much more a painted pixel's error counts than the ground's
    commitment: float = 0.25
    scored: int = 420             # true scenes that the ceiling is the mean of
    save_every: int = 200

    def check(self):
        runtime.require_at_least(1, self, "pictures", "steps", "batch", "codes", "dim", "scored",
                                 "save_every")
        runtime.require_at_least(0, self, "seed", "lr", "blocks", "ink_weight", "commitment")
        runtime.require(self.codes <= 2 ** 15, f"--codes {self.codes}: at most {2 ** 15}, which is "
                        "what the corpus can hold")
        runtime.require(self.width > 0 and self.width % 8 == 0,
                        f"--width {self.width} must be a multiple of 8")


PRESETS = {
    "smoke": dict(scored=60, pictures=300, steps=30, width=32, batch=32, codes=128),
    "cpu": dict(),
    "gpu": dict(pictures=40000, steps=6000, batch=256, width=128, codes=1024),
}


def as_images(pictures):
    """Stack uint8 pictures (h, w, 3) to one uint8 tensor (B, 3, h, w)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def loss_terms(model, images, ink_weight):
    """Weighted squared error and commitment. images: (B, 3, h, w) in [0, 1]."""
    restored, features, codes, commitment = model(images)
    painted = (rewards.ink(images).sum(1, keepdim=True) > 0).float()
    weight = 1 + ink_weight * F.max_pool2d(painted, 3, stride=1, padding=1)   # edges count as paint
    error = ((restored - images) ** 2 * weight).mean() / weight.mean()
    return error, commitment, features.detach(), codes


@torch.no_grad()
def ceiling(model, world, device, number, seed=0):
    """Score true evaluation scenes after encoding and decoding. Returns reward, exact, codes in
    use, perplexity."""
    scenes = [make_scene(world, "eval", seed, i) for i in range(number)]
    images = as_images([render(world, s) for s in scenes]).to(device) / 255
    codes = torch.cat([model.encode(batch) for batch in images.split(64)])
    restored = torch.cat([model.decode(batch) for batch in codes.split(64)])
    reward, parts, exact = rewards.score(restored, rewards.make_want(world, scenes, device), world)
    rewards.require_sound(reward, parts)
    return dict(ceiling=reward.mean().item(),
                ceiling_exact=exact.mean().item(),
                codes_in_use=len(codes.unique()),
                perplexity=perplexity(codes, model.codes))


def load_tokenizer(preset, out="out", device="cpu"):
    """Read the finished tokenizer of a preset. Returns the model, frozen."""
    maker = runtime.maker_of("-m tiny_vq.train", preset, out)
    path = f"{out}/{preset}/tokenizer.pt"
    record = runtime.load_finished(path, maker, "tokenizer", preset)
    model = VQVAE(**record["model_config"])
    runtime.restore(model, record, path, maker)
    return model.to(device).requires_grad_(False)


def main(argv=None):
    config, maker = runtime.parse("-m tiny_vq.train", Config, PRESETS, __doc__, argv)
    path = f"{config.out}/{config.preset}/tokenizer.pt"
    claim = runtime.lock(path)                                      # until main returns
    record = runtime.resume(path, config, maker)
    if record and record["step"] == config.steps:
        return print(
            f"tokenizer: finished earlier, {path} (ceiling {record['results']['ceiling']:.3f})")
    device, world, started = runtime.pick_device(config.device), WORLDS[config.preset], time.time()

    pictures = as_images([render(world, random_scene(world, config.seed, i))
                          for i in tqdm(range(config.pictures), "render", leave=False)])
    torch.manual_seed(config.seed)
    model = VQVAE(world.patch, config.width, config.blocks, config.codes, config.dim)
    if record:
        runtime.restore(model, record, path, maker)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(),
                                  lr=config.lr,
                                  betas=(0.9, 0.99),
                                  weight_decay=0.01)
    if record:
        optimizer.load_state_dict(record["optimizer"])
    first = record["step"] if record else 0
    log = runtime.Log(f"{config.out}/{config.preset}/tokenizer.jsonl", config, device, first)

    with runtime.Interruptible() as stop:
        bar = tqdm(range(first, config.steps), "tokenizer", initial=first, total=config.steps)
        for step in bar:
            draw = runtime.generator(config.seed, "tokenizer", step)
            chosen = torch.randint(len(pictures), (config.batch,), generator=draw)
            images = pictures[chosen].to(device) / 255
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min((step + 1) / 50, 1 - step / config.steps)
            error, commitment, features, codes = loss_terms(model, images, config.ink_weight)
            # 20 brings an error of squared [0, 1] pixels to the commitment's size
            (20 * error + config.commitment * commitment).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            values = torch.stack([error, commitment, norm]).tolist()
            terms = dict(zip(("error", "commitment", "grad_norm"), values))
            runtime.require_finite(step, terms, path, dict(images=images))
            optimizer.step()
            optimizer.zero_grad()
            model.quantizer.update(features, codes)
            restarted = 0
            if step % 20 == 0 and step < 0.7 * config.steps:      # then let the codebook settle
                restarted = model.quantizer.restart(features, codes, draw)
            ended = step + 1 == config.steps
            if step % 20 == 0 or ended:
                log(step=step, **terms, codes_in_use=len(codes.unique()),
                    perplexity=perplexity(codes, config.codes), restarted=restarted)
            results = {}
            if ended:
                results = ceiling(model, world, device, config.scored)
                log(step=config.steps, **results, seconds=time.time() - started)
            if ended or stop.signal or (step + 1) % config.save_every == 0:
                runtime.save_stage(path, "tokenizer", config, step + 1, model, optimizer,
                                   results=results)
                if stop.signal:
                    stop.leave(path, maker)
    print(
        f"tokenizer: ceiling {results['ceiling']:.3f} (exact {results['ceiling_exact']:.3f}), "
        f"{results['codes_in_use']} of {config.codes} codes in use, "
        f"perplexity {results['perplexity']:.0f}, "
        f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    runtime.run(main)
