"""Teach the policy to imitate a web-like corpus: prompt, plan, picture.

    python pretrain.py --preset cpu               -> out/cpu/base.pt, the base policy

The corpus lies in a stated share of its captions and plans (scenes.corpus_item), so the base policy
has seen how pictures look and what words mean, and errs. A share of the sequences drops the plan,
so that the policy can draw directly (the paper's base setting); a share drops the prompt, so that
guidance has an empty prompt to compare with.
"""

import math
import multiprocessing
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from tqdm import tqdm

import runtime
from model import Policy, score, token_logp
from scenes import PAD, WORDS, WORLDS, corpus_item, encode_words, render
from tiny_vq.train import as_images, load_tokenizer

PIECE = 500                       # items of the corpus that are drawn and encoded at a time


@dataclass(frozen=True)
class Config:
    preset: str = ""              # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0
    items: int = 30000            # scenes in the corpus
    steps: int = 1200
    batch: int = 32
    lr: float = 3e-3              # after a warm-up of 50 steps, by a cosine to a tenth
    width: int = 128
    layers: int = 4
    heads: int = 4
    drop_plan: float = 0.15       # share of sequences without plan
    drop_prompt: float = 0.10     # share of sequences without prompt
    save_every: int = 200

    def check(self):
        runtime.require_at_least(1, self, "items", "steps", "batch", "layers", "heads",
                                 "save_every")
        runtime.require_at_least(0, self, "seed", "lr")
        runtime.require(self.width > 0 and self.width % self.heads == 0,
                        f"--width {self.width} must be a multiple of --heads {self.heads}")
        runtime.require(0 <= self.drop_plan < 1 and 0 <= self.drop_prompt < 1,
                        "--drop-plan and --drop-prompt must lie in [0, 1)")


PRESETS = {
    "smoke": dict(items=300, steps=20, batch=32, width=64, layers=2),
    "cpu": dict(),
    "gpu": dict(items=200000, steps=12000, batch=128, lr=6e-4, width=512, layers=8, heads=8,
                save_every=2000),
}


def word_tensors(world, scenes):
    """Encode the words of scenes: prompts (B, S), plans (B, C), long."""
    prompts = torch.tensor([encode_words(s.prompt, world.prompt_slots) for s in scenes])
    plans = torch.tensor([encode_words(s.plan, world.plan_slots, end=True) for s in scenes])
    return prompts, plans


def corpus_part(world, seed, indices):
    """Draw some items of the corpus. Returns prompts (n, S), plans (n, C), pictures (n, h, w, 3),
    as arrays: what passes cheaply from one process to another."""
    scenes = [corpus_item(world, seed, i) for i in indices]
    words = (x.to(torch.int16).numpy() for x in word_tensors(world, scenes))
    return *words, numpy.stack([render(world, s) for s in scenes])


def make_corpus(config, world, tokenizer, device):
    """Draw and encode the corpus. Returns prompts (n, S), plans (n, C), codes (n, L) as small
    integers.

    A large one is drawn by a process for each core, so that the device need not wait for it.
    """
    starts = range(0, config.items, PIECE)
    pieces = [range(start, min(start + PIECE, config.items)) for start in starts]
    draw, parts = partial(corpus_part, world, config.seed), []
    with ExitStack() as stack:
        drawn = map(draw, pieces)
        if len(pieces) > 10:
            # Ctrl-C is the main process's affair: the others inherit that it is ignored
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            # spawned, not forked: threads of torch are running
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool())
            signal.signal(signal.SIGINT, handler)
            drawn = pool.imap(draw, pieces)
        for *words, pictures in tqdm(drawn, "corpus", len(pieces), leave=False):
            codes = tokenizer.encode(as_images(pictures).to(device) / 255).cpu().to(torch.int16)
            parts.append((*map(torch.from_numpy, words), codes))
    return [torch.cat(column) for column in zip(*parts)]


def make_policy(config, world, codebook):
    """Make an untrained policy for a world and a tokenizer's codebook (V, code_dim)."""
    policy = Policy(len(WORDS), *codebook.shape, world.prompt_slots, world.plan_slots,
                    world.image_tokens, config.width, config.layers, config.heads)
    policy.set_codebook(codebook)
    return policy


def load_policy(path, maker, kind, preset, device="cpu"):
    """Read a finished policy. Returns the model, frozen."""
    record = runtime.load_finished(path, maker, kind, preset)
    policy = Policy(**record["model_config"])
    runtime.restore(policy, record, path, maker)
    return policy.to(device).requires_grad_(False)


def load_base(preset, out="out", device="cpu"):
    maker = runtime.maker_of("pretrain.py", preset, out)
    return load_policy(f"{out}/{preset}/base.pt", maker, "base", preset, device)


def main(argv=None):
    config, maker = runtime.parse("pretrain.py", Config, PRESETS, __doc__, argv)
    path = f"{config.out}/{config.preset}/base.pt"
    claim = runtime.lock(path)                                      # until main returns
    record = runtime.resume(path, config, maker)
    if record and record["step"] == config.steps:
        return print(f"base policy: finished earlier, {path}")
    device, world, started = runtime.pick_device(config.device), WORLDS[config.preset], time.time()
    tokenizer = load_tokenizer(config.preset, config.out, device)
    corpus = make_corpus(config, world, tokenizer, device)

    torch.manual_seed(config.seed)
    policy = make_policy(config, world, tokenizer.quantizer.codebook.cpu())
    print(
        f"policy: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, "
        f"{policy.slots} slots"
    )
    if record:
        runtime.restore(policy, record, path, maker)
    policy.to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.05, fused=device.type == "cuda")
    if record:
        optimizer.load_state_dict(record["optimizer"])
    first = record["step"] if record else 0
    log = runtime.Log(f"{config.out}/{config.preset}/base.jsonl", config, device, first)

    with runtime.Interruptible() as stop:
        bar = tqdm(range(first, config.steps), "base policy", initial=first, total=config.steps)
        for step in bar:
            # a stretch of a shuffled deck, reshuffled each time round
            whole = max(config.items // config.batch, 1) * config.batch
            turn, place = divmod(step * config.batch, whole)
            shuffle = runtime.generator(config.seed, "deck", turn)
            chosen = torch.randperm(config.items, generator=shuffle)[place:place + config.batch]
            prompt, plan, codes = (column[chosen].long().to(device) for column in corpus)
            chance = runtime.generator(config.seed, "drop", step)
            drop = torch.rand(2, len(chosen), 1, generator=chance).to(device)
            prompt = prompt.masked_fill(drop[0] < config.drop_prompt, PAD)
            plan = plan.masked_fill(drop[1] < config.drop_plan, PAD)

            warm, done = min(1, (step + 1) / 50), step / config.steps
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * done))
            word_logits, code_logits = score(policy, prompt, plan, codes)
            logp = token_logp(word_logits, code_logits, plan, codes)
            words = -logp[:, :policy.C].sum() / (plan != PAD).sum().clamp(min=1)
            image = -logp[:, policy.C:].mean()
            (words + image).backward()    # each modality's mean: plans are short and must not drown
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            values = torch.stack([words, image, norm]).tolist()
            terms = dict(zip(("plan_nll", "image_nll", "grad_norm"), values))
            runtime.require_finite(step, terms, path, dict(prompt=prompt, plan=plan, codes=codes))
            optimizer.step()
            optimizer.zero_grad()
            ended = step + 1 == config.steps
            if step % 20 == 0 or ended:
                log(step=step, **terms)
                bar.set_postfix(plan=f"{words.item():.2f}", image=f"{image.item():.2f}")
            if ended or stop.signal or (step + 1) % config.save_every == 0:
                runtime.save_stage(path, "base", config, step + 1, policy, optimizer)
                if stop.signal:
                    stop.leave(path, maker)
    print(
        f"base policy: plan {words.item():.2f}, image {image.item():.2f} nats a token, "
        f"{time.time() - started:.0f} s"
    )


if __name__ == "__main__":
    runtime.run(main)
