"""Train the base policy to imitate a noisy corpus of prompt, plan and image.

    python pretrain.py         -> out/small/base.pt, the base policy

Some sequences have no plan, so that the policy can draw without one (the paper's base setting);
some have neither prompt nor plan, so that guidance has something to compare with.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated

import numpy
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from model import Policy, score
from runs import Run
from scenes import PAD, WORLDS, corpus_item, encode_scenes, render
from tiny_vq.train import load_tokenizer, stack_images

CHUNK = 100  # items of the corpus that are drawn and encoded at a time
FEW = 5000  # items that are soon drawn by one process


@dataclass(frozen=True)
class Config(common.BaseConfig):
    items: int = 30000  # scenes in the corpus
    steps: int = 1200  # batches
    batch: int = 32  # sequences
    lr: float = 3e-3  # after the warm-up, by a cosine to a tenth
    warm_up: int = 50  # steps
    width: int = 128  # of the policy
    layers: int = 4  # of the policy
    heads: int = 4  # of each layer's attention
    drop_both: Annotated[float, 0, 1] = 0.10  # fraction of sequences without prompt and plan
    drop_plan: Annotated[float, 0, 1] = 0.15  # fraction of sequences with a prompt, but no plan

    def __post_init__(self):
        multiple = f"--width {self.width}: must be a multiple of --heads {self.heads}"
        common.check(self.width % self.heads == 0, multiple)


PRESETS = {
    "smoke": dict(items=300, steps=20, batch=32, width=64, layers=2),
    "small": dict(),
    "large": dict(
        items=200000,
        steps=6000,
        batch=128,
        lr=6e-4,
        warm_up=400,
        width=512,
        layers=8,
        heads=8,
    ),
}


def corpus_chunk(world, seed, items):
    """Draw items of the corpus. Returns prompts (n, S), plans (n, C), images (n, h, w, 3), all
    arrays: tensors would be sent through shared memory, of which containers have little."""
    scenes = [corpus_item(world, seed, i) for i in items]
    prompts, plans = encode_scenes(world, scenes)
    images = numpy.stack([render(world, scene) for scene in scenes])
    prompts = prompts.short()
    plans = plans.short()
    return prompts.numpy(), plans.numpy(), images


def make_corpus(config, world, tokenizer, device):
    """Draw and encode the corpus. Returns prompts (n, S), plans (n, C), codes (n, L), int16."""
    loader = DataLoader(
        range(config.items),
        batch_size=CHUNK,
        collate_fn=partial(corpus_chunk, world, config.seed),
        num_workers=torch.get_num_threads() if config.items > FEW else 0,
    )
    encoded = []
    for prompts, plans, images in tqdm(loader, "corpus", leave=False):
        images = stack_images(images).to(device) / 255
        codes = tokenizer.encode(images).short().cpu()
        words = torch.from_numpy(prompts), torch.from_numpy(plans)
        encoded.append((*words, codes))
    return [torch.cat(column) for column in zip(*encoded)]


@lru_cache(maxsize=1)
def shuffled(items, seed, epoch):
    """Return the order of an epoch, (items,)."""
    return torch.randperm(items, generator=common.generator(seed, "deck", epoch))


def training_batch(corpus, config, step, device):
    """Return prompts (B, S), plans (B, C), codes (B, L), some prompts and plans dropped."""
    epoch_size = max(config.items // config.batch, 1) * config.batch
    epoch, offset = divmod(step * config.batch, epoch_size)
    order = shuffled(config.items, config.seed, epoch)
    rows = order[offset : offset + config.batch]
    prompt, plan, codes = (column[rows].long().to(device) for column in corpus)
    generator = common.generator(config.seed, "drop", step)
    drop = torch.rand(len(rows), 1, generator=generator).to(device)
    prompt = prompt.masked_fill(drop < config.drop_both, PAD)
    plan = plan.masked_fill(drop < config.drop_both + config.drop_plan, PAD)
    return prompt, plan, codes


def update(policy, optimizer, prompt, plan, codes):
    """Make one step of maximum likelihood. Returns what is logged; nll are nats per token."""
    logp = score(policy, prompt, plan, codes)  # (B, T)
    words = (plan != PAD).sum()
    plan_nll = -logp[:, : policy.C].sum() / words.clamp(min=1)
    image_nll = -logp[:, policy.C :].sum() / codes.numel()
    # each modality's mean: plans are short and would have little weight in a common mean
    (plan_nll + image_nll).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    terms = torch.stack([plan_nll.detach(), image_nll.detach(), norm])
    optimizer.step()
    optimizer.zero_grad()
    plan_nll, image_nll, norm = terms.tolist()
    return dict(plan_nll=plan_nll, image_nll=image_nll, grad_norm=norm)


@common.stage("--batch of pretrain")
def main(argv=None):
    config = common.parse(Config, PRESETS, __doc__, argv)
    world = WORLDS[config.preset]
    device = common.pick_device(config.device)
    tokenizer = load_tokenizer(config, device)
    names = "base.pt", "base.jsonl"
    run = Run(*names, config, device, tokenizer.origin, "pretrain")
    if not run.steps:
        return
    corpus = make_corpus(config, world, tokenizer, device)
    torch.manual_seed(config.seed)
    codebook = tokenizer.quantizer.codebook.cpu()  # (V, code_dim)
    policy = Policy(world, *codebook.shape, config.width, config.layers, config.heads)
    policy.set_codebook(codebook)
    policy = policy.to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    bar = run.progress("base policy", policy, optimizer)
    for step in bar:
        cosine = math.cos(math.pi * step / config.steps)
        warm_up = min(1, (step + 1) / config.warm_up)
        rate = config.lr * warm_up * (0.55 + 0.45 * cosine)
        optimizer.param_groups[0]["lr"] = rate
        batch = training_batch(corpus, config, step, device)
        terms = update(policy, optimizer, *batch)
        bar.set_postfix({name: f"{value:.2f}" for name, value in terms.items()})
        run.log(step, **terms)
        run.save(step, policy, optimizer)
    print(f"base policy: {config.steps} steps; see {run.path}")


if __name__ == "__main__":
    common.run(main)
