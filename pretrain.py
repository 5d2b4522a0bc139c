"""Train the base policy to imitate a noisy corpus of prompt, plan and image.

    python pretrain.py         -> out/small/base.pt, the base policy

Some sequences have no plan, so that the policy can draw without one (the paper's base setting);
some have neither prompt nor plan, so that guidance has something to compare with.
"""

import math
import os
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from model import Policy, score
from scenes import PAD, WORLDS, corpus_item, encode_scenes, render
from tiny_vq import load_tokenizer, stack_images

CHUNK = 500  # items of the corpus that are drawn and encoded at a time
PROCESSES = min(os.cpu_count() or 1, 16)  # that draw the corpus


@dataclass(frozen=True)
class Config(common.BaseConfig):
    items: int = 30000  # scenes in the corpus
    steps: int = 1200
    batch: int = 32
    micro_batch: int = 64  # sequences per forward pass, at most: changes memory, not results
    lr: float = 3e-3  # after the warm-up, by a cosine to a tenth
    warm_up: int = 50  # steps
    width: int = 128
    layers: int = 4
    heads: int = 4
    drop_both: float = 0.10  # fraction of sequences without prompt and plan
    drop_plan: float = 0.15  # fraction of sequences without plan, but with a prompt
    save_every: float = 2  # minutes

    def validate(self):
        super().validate()
        self.check_range("drop_both", 0, 1)
        self.check_range("drop_plan", 0, 1)
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
        save_every=5,
    ),
}


# --- the corpus -----------------------------------------------------------------------------------


def corpus_chunk(world, seed, items):
    """Draw a range of items of the corpus. Returns prompts (n, S), plans (n, C), images (n, h, w,
    3), all arrays: tensors would be sent through shared memory, of which containers have little."""
    scenes = [corpus_item(world, seed, i) for i in items]
    prompts, plans = encode_scenes(world, scenes)
    images = numpy.stack([render(world, scene) for scene in scenes])
    return prompts.to(torch.int16).numpy(), plans.to(torch.int16).numpy(), images


def make_corpus(config, world, tokenizer, device):
    """Draw and encode the corpus. Returns prompts (n, S), plans (n, C), codes (n, L), int16."""
    chunks = []
    for start in range(0, config.items, CHUNK):
        chunks.append(range(start, min(start + CHUNK, config.items)))
    loader = DataLoader(
        chunks,
        batch_size=None,
        collate_fn=partial(corpus_chunk, world, config.seed),
        num_workers=PROCESSES if len(chunks) > 10 else 0,  # a small corpus is soon drawn here
        generator=torch.Generator(),  # or it would move the caller's random state
    )
    encoded = []
    for prompts, plans, images in tqdm(loader, "corpus", leave=False):
        codes = tokenizer.encode(stack_images(images).to(device) / 255)
        codes = codes.cpu().to(torch.int16)
        encoded.append((torch.from_numpy(prompts), torch.from_numpy(plans), codes))
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


# --- training -------------------------------------------------------------------------------------


def update(policy, optimizer, prompt, plan, codes, micro_batch):
    """Make one step of maximum likelihood. Returns plan_nll and image_nll, nats per token, and
    grad_norm."""
    plan_tokens = (plan != PAD).sum().clamp(min=1)  # of all micro-batches
    plan_nlls = []
    image_nlls = []
    for rows in torch.arange(len(plan), device=plan.device).split(micro_batch):
        logp = score(policy, prompt[rows], plan[rows], codes[rows])  # (micro_batch, T)
        plan_nll = -logp[:, : policy.C].sum() / plan_tokens
        image_nll = -logp[:, policy.C :].sum() / codes.numel()
        # each modality's mean: plans are short and would have little weight in a common mean
        (plan_nll + image_nll).backward()
        plan_nlls.append(plan_nll.detach())
        image_nlls.append(image_nll.detach())
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    terms = dict(
        plan_nll=torch.stack(plan_nlls).sum(),
        image_nll=torch.stack(image_nlls).sum(),
        grad_norm=norm,
    )
    values = torch.stack([*terms.values()]).tolist()  # one transfer
    terms = dict(zip(terms, values))
    optimizer.step()
    optimizer.zero_grad()
    return terms


@common.explain_memory("pretrain", "--micro-batch")
def main(argv=None):
    config = common.parse(Config, PRESETS, __doc__, argv)
    folder = Path(config.out) / config.preset
    world = WORLDS[config.preset]
    device = common.pick_device(config.device)
    tokenizer, made_from = load_tokenizer(config, device)
    command = common.command_for("pretrain", config)
    run = common.Run("base", folder / "base.pt", folder / "base.jsonl", config, command, made_from)
    if run.finished:
        print(f"base policy: finished earlier, {run.path}")
        return
    started = time.time()
    corpus = make_corpus(config, world, tokenizer, device)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.manual_seed(config.seed)
        codebook = tokenizer.quantizer.codebook.cpu()  # (V, code_dim)
        policy = Policy(
            world,
            *codebook.shape,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
        )
    policy.set_codebook(codebook)
    policy = policy.to(device)
    parameters = sum(p.numel() for p in policy.parameters())
    print(f"policy: {parameters / 1e6:.2f} M parameters, {policy.slots} slots")
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.lr,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=device.type == "cuda",
    )
    run.start(device, policy, optimizer)
    bar = run.progress("base policy")
    for step in bar:
        cosine = math.cos(math.pi * step / config.steps)
        warm_up = min(1, (step + 1) / config.warm_up)
        optimizer.param_groups[0]["lr"] = config.lr * warm_up * (0.55 + 0.45 * cosine)
        batch = training_batch(corpus, config, step, device)
        terms = update(policy, optimizer, *batch, config.micro_batch)
        run.check_finite(step, terms)
        if step % 20 == 0 or step + 1 == config.steps:
            run.log(step=step, **terms)
            bar.set_postfix({name: f"{value:.2f}" for name, value in terms.items()})
        if step + 1 == config.steps:
            run.log(step=config.steps, seconds=time.time() - started)
        run.save(step, policy, optimizer)
    nll = f"plan {terms['plan_nll']:.2f}, image {terms['image_nll']:.2f} nats per token"
    print(f"base policy: {nll}, {time.time() - started:.0f} s")


if __name__ == "__main__":
    common.run(main)
