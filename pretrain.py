"""Train the base policy to imitate a noisy corpus of prompt, plan and image.

    python pretrain.py --preset cpu               -> out/cpu/base.pt, the base policy

Some sequences have no plan, so that the policy can draw without one (the paper's base setting);
some have neither prompt nor plan, so that guidance has something to compare with.
"""

import math
import multiprocessing
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy
import torch
from tqdm import tqdm

import common
from checkpoint import Run
from model import Policy, forward_logits, token_logp
from scenes import WORLDS, corpus_item, encode_scenes, render
from words import PAD, WORDS
from tiny_vq import load_tokenizer, stack_images

CHUNK = 500  # items of the corpus that are drawn and encoded at a time
MAX_PROCESSES = 16  # that draw the corpus; more would still import torch when it is done


@dataclass(frozen=True)
class Config(common.BaseConfig):
    items: int = 30000  # scenes in the corpus
    steps: int = 1200
    batch: int = 32
    micro_batch: int = 64  # sequences per forward pass: changes memory, not results
    lr: float = 3e-3  # after the warm-up, by a cosine to a tenth
    warm_up: int = 50  # steps
    width: int = 128
    layers: int = 4
    heads: int = 4
    drop_both: float = 0.10  # fraction of sequences without prompt and plan
    drop_plan: float = 0.15  # fraction of sequences without plan, but with a prompt
    save_every: int = 200  # steps

    RANGES = dict(drop_both=(0, 1), drop_plan=(0, 1))

    def check(self):
        super().check()
        multiple = f"--width {self.width} must be a multiple of --heads {self.heads}"
        common.check(self.width % self.heads == 0, multiple)


PRESETS = {
    "smoke": dict(items=300, steps=20, batch=32, width=64, layers=2),
    "cpu": dict(),
    "gpu": dict(items=200000, steps=12000, batch=128, lr=6e-4, warm_up=400, width=512, layers=8,
                heads=8, save_every=2000),
}  # fmt: skip


# --- the corpus -----------------------------------------------------------------------------------


def corpus_chunk(world, seed, indices):
    """Draw some items of the corpus. Returns prompts (n, S), plans (n, C), images (n, h, w, 3), all
    arrays, which are cheap to send from one process to another."""
    scenes = [corpus_item(world, seed, i) for i in indices]
    words = (x.to(torch.int16).numpy() for x in encode_scenes(world, scenes))
    return *words, numpy.stack([render(world, s) for s in scenes])


def make_corpus(config, world, tokenizer, device):
    """Draw and encode the corpus. Returns prompts (n, S), plans (n, C), codes (n, L), int16.

    A large one is drawn by one process per core, at most MAX_PROCESSES.
    """
    starts = range(0, config.items, CHUNK)
    chunks = [range(start, min(start + CHUNK, config.items)) for start in starts]
    draw, encoded = partial(corpus_chunk, world, config.seed), []
    with ExitStack() as stack:
        drawn = map(draw, chunks)
        if len(chunks) > 10:
            # only the main process handles Ctrl-C: the others inherit that it is ignored
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            # spawned, not forked: threads of torch are running
            processes = min(os.cpu_count() or 1, MAX_PROCESSES)
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            signal.signal(signal.SIGINT, handler)
            drawn = pool.imap(draw, chunks)
        for *words, images in tqdm(drawn, "corpus", len(chunks), leave=False):
            codes = tokenizer.encode(stack_images(images).to(device) / 255).cpu().to(torch.int16)
            encoded.append((*map(torch.from_numpy, words), codes))
    return [torch.cat(column) for column in zip(*encoded)]


@lru_cache(maxsize=1)
def shuffled(items, seed, epoch):
    """Return the order of an epoch, (items,)."""
    return torch.randperm(items, generator=common.generator(seed, "deck", epoch))


def training_batch(corpus, config, step, device):
    """Return prompts (B, S), plans (B, C), codes (B, L), some prompts and plans dropped."""
    epoch_size = max(config.items // config.batch, 1) * config.batch
    epoch, offset = divmod(step * config.batch, epoch_size)
    rows = shuffled(config.items, config.seed, epoch)[offset : offset + config.batch]
    prompt, plan, codes = (column[rows].long().to(device) for column in corpus)
    generator = common.generator(config.seed, "drop", step)
    drop = torch.rand(len(rows), 1, generator=generator).to(device)
    prompt = prompt.masked_fill(drop < config.drop_both, PAD)
    return prompt, plan.masked_fill(drop < config.drop_both + config.drop_plan, PAD), codes


# --- training -------------------------------------------------------------------------------------


def make_policy(config, world, codebook):
    """Make an untrained policy for a world and a tokenizer's codebook (V, code_dim)."""
    policy = Policy(len(WORDS), *codebook.shape, world.prompt_slots, world.plan_slots,
                    world.image_tokens, config.width, config.layers, config.heads)  # fmt: skip
    policy.set_codebook(codebook)
    return policy


def update(policy, optimizer, prompt, plan, codes, micro_batch):
    """Make one step of maximum likelihood. Returns plan_nll and image_nll, nats per token, and
    grad_norm. Raises TrainingDiverged, the weights unchanged."""
    plan_tokens, parts = (plan != PAD).sum().clamp(min=1), []  # of all micro-batches
    for tokens in zip(*(x.split(micro_batch) for x in (prompt, plan, codes))):
        logp = token_logp(*forward_logits(policy, *tokens), *tokens[1:])  # (micro_batch, T)
        plan_nll = -logp[:, : policy.C].sum() / plan_tokens
        image_nll = -logp[:, policy.C :].sum() / codes.numel()
        # each modality's mean: plans are short and would have little weight in a common mean
        (plan_nll + image_nll).backward()
        parts.append(torch.stack([plan_nll.detach(), image_nll.detach()]))
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    values = torch.cat([torch.stack(parts).sum(0), norm[None]]).tolist()
    terms = dict(zip(("plan_nll", "image_nll", "grad_norm"), values))
    common.check_finite(terms)
    optimizer.step()
    optimizer.zero_grad()
    return terms


def main(argv=None):
    config, command = common.parse("pretrain.py", Config, PRESETS, __doc__, argv)
    folder = f"{config.out}/{config.preset}"
    run = Run("base", f"{folder}/base.pt", f"{folder}/base.jsonl", config, command)
    if run.finished:
        return print(f"base policy: finished earlier, {run.path}")
    device, started = common.pick_device(config.device), time.time()
    tokenizer = load_tokenizer(config.preset, config.out, device)
    corpus = make_corpus(config, WORLDS[config.preset], tokenizer, device)
    torch.manual_seed(config.seed)
    codebook = tokenizer.quantizer.codebook.cpu()
    policy = make_policy(config, WORLDS[config.preset], codebook).to(device)
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"policy: {size:.2f} M parameters, {policy.slots} slots")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.05, fused=device.type == "cuda")  # fmt: skip
    run.start(device, policy, optimizer)

    with run.progress("base policy") as bar:
        for step in bar:
            cosine = math.cos(math.pi * step / config.steps)
            warm_up = min(1, (step + 1) / config.warm_up)
            optimizer.param_groups[0]["lr"] = config.lr * warm_up * (0.55 + 0.45 * cosine)
            batch = training_batch(corpus, config, step, device)
            with run.guard(step, dict(zip(("prompt", "plan", "codes"), batch))):
                terms = update(policy, optimizer, *batch, config.micro_batch)
            if step % 20 == 0 or step + 1 == config.steps:
                run.log(step=step, **terms)
                bar.set_postfix({k: f"{v:.2f}" for k, v in terms.items()})
            run.save(step, policy, optimizer)
    nll = f"plan {terms['plan_nll']:.2f}, image {terms['image_nll']:.2f} nats per token"
    print(f"base policy: {nll}, {time.time() - started:.0f} s")


if __name__ == "__main__":
    common.run(main)
