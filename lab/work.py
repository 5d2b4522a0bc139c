"""Count what the stages of a preset do: FLOPs, bytes moved, kernels launched, scenes drawn; and the
memory that they need. lab.cost turns it into time.

Kernels and bytes are those of eager PyTorch. Their constants were fitted to the profiler's counts
and to the times of single updates on one H200, torch 2.11, for `small` and an earlier `large`.
"""

from typing import NamedTuple

import torch

import eggrpo
import evaluate
import pretrain
import tiny_vq.train
from scenes import END, WORDS, WORLDS, World

MOVES = 14  # times that a byte kept for the backward pass is read or written in an update
CACHE_READS = 3  # times that attention with one query reads the cache
EVALUATION_BATCH = 128  # prompts, in training: the default of evaluate.evaluate


class Work(NamedTuple):
    """What a stage does, in all."""

    flops: float = 0  # of the network
    float32: float = 0  # FLOPs of tokenizer and rewards
    bytes: float = 0  # moved, if the network computes in bf16
    kernels: float = 0
    scenes: float = 0  # drawn by the host, one after another

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other)))

    def times(self, number):
        return Work(*(number * value for value in self))


# --- the policy -----------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Sizes of a policy and its world, by the letters of model.py."""

    S: int
    C: int
    L: int
    V: int
    D: int
    layers: int
    dim: int
    parameters: int

    @property
    def slots(self):
        return self.S + self.C + self.L + 1


def policy_shape(policy):
    """Return the Shape of a Policy."""
    config = policy.config
    return Shape(
        S=policy.S,
        C=policy.C,
        L=policy.L,
        V=config["codebook_size"],
        D=config["width"],
        layers=config["layers"],
        dim=config["code_dim"],
        parameters=sum(p.numel() for p in policy.parameters()),
    )


def slot_flops(s, keys):
    """Count the FLOPs of all blocks for one slot that attends to a number of keys."""
    return s.layers * (24 * s.D**2 + 4 * keys * s.D)


def head_flops(s):
    """Count the FLOPs of both heads and of projecting codebook vectors, for one sequence."""
    words = s.C * 2 * s.D * (len(WORDS) - END)
    codes = s.L * 2 * (s.D * s.V + s.D * s.dim + s.dim * s.V)
    return words + codes + (s.L - 1) * 2 * s.dim * s.D


def score_flops(s):
    """Count the FLOPs of one pass over a sequence; a gradient costs twice as much again."""
    return s.slots * slot_flops(s, s.slots) + head_flops(s)


def decode_flops(s, prompts, sequences):
    """Count the FLOPs of sampling: prompt and <plan> once for each prompt, then slot by slot."""
    first = s.S + 1
    fed = sum(slot_flops(s, slot + 1) for slot in range(first, s.slots))
    prefill = prompts * first * slot_flops(s, first)
    return prefill + sequences * (fed + head_flops(s))


def kept_bytes(s, bf16=True):
    """Count the bytes that a sequence keeps for the backward pass: blocks, copies of logits."""
    blocks = (36 if bf16 else 64) * s.D * s.layers * s.slots
    return blocks + 4 * 4 * s.V * s.L


def decoding(s, prompts, sequences):
    """Count sampling a batch."""
    fed = s.C + s.L
    cache = sum(2 * s.layers * s.D * 2 * slot for slot in range(s.S + 1, s.slots))
    return Work(
        flops=decode_flops(s, prompts, sequences),
        bytes=fed * 2 * s.parameters + CACHE_READS * sequences * cache,
        kernels=fed * (14 * s.layers + 40),
    )


def learning(s, sequences, micro_batch, reference):
    """Count one update; with a reference policy, as in reinforcement learning."""
    parts = -(-sequences // micro_batch)
    kernels = parts * (66 * s.layers + 70)
    passes = 3
    if reference:
        kernels += parts * (25 * s.layers + 40) + 500  # and advantages, rewards, the log
        passes = 4
    return Work(
        flops=passes * sequences * score_flops(s),
        bytes=MOVES * sequences * kept_bytes(s) + 28 * s.parameters,  # AdamW's passes over weights
        kernels=kernels,
    )


# --- the tokenizer --------------------------------------------------------------------------------


def tokenizer_flops(world, config):
    """Count the FLOPs of one image: encoder, nearest code, decoder."""
    channels = 3 * world.patch**2
    w, dim = config.width, config.dim
    encoder = 2 * (channels * 4 * w + 4 * w * w + w * dim)
    nearest = 2 * dim * config.codebook_size
    decoder = 2 * (9 * dim * w + config.blocks * 2 * 9 * w * w + w * channels)
    return [world.image_tokens * n for n in (encoder, nearest, decoder)]


def distance_bytes(world, config):
    """Count the bytes of the distances of one image's tokens from all codes."""
    return world.image_tokens * config.codebook_size * 4


def tokenizer_training(world, config):
    """Count one step. Nothing flows back into images, nor through the nearest code."""
    encoder, nearest, decoder = tokenizer_flops(world, config)
    first = world.image_tokens * 2 * 3 * world.patch**2 * 4 * config.width
    return Work(
        float32=config.batch * (3 * (encoder + decoder) + nearest - first),
        bytes=4 * config.batch * distance_bytes(world, config),
        kernels=200,
    )


# --- stages ---------------------------------------------------------------------------------------


class Preset(NamedTuple):
    world: World
    tokenizer: tiny_vq.train.Config
    base: pretrain.Config
    rl: eggrpo.Config
    evaluation: evaluate.Config
    shape: Shape


def load_preset(name):
    """Collect the settings of a preset."""
    settings = []
    for module in (tiny_vq.train, pretrain, eggrpo, evaluate):
        settings.append(module.Config(preset=name, **module.PRESETS[name]))
    tokenizer, base = settings[:2]
    with torch.device("meta"):
        codebook = torch.empty(tokenizer.codebook_size, tokenizer.dim)
        policy = pretrain.make_policy(base, WORLDS[name], codebook)
    return Preset(WORLDS[name], *settings, policy_shape(policy))


def drawing(preset, images, batch):
    """Count drawing and scoring held-out images, one for each prompt."""
    _, _, decoder = tokenizer_flops(preset.world, preset.tokenizer)
    batches = [min(batch, images - start) for start in range(0, images, batch)]
    work = Work(float32=images * decoder, kernels=200 * len(batches))
    for n in batches:
        work += decoding(preset.shape, n, n)
    return work


def stages(preset, processes):
    """Return {stage: Work} of bash train.sh: reinforcement learning by one method, evaluation of
    the policies of two. processes: that draw the corpus."""
    s, world = preset.shape, preset.world
    tokenizer, base, rl = preset.tokenizer, preset.base, preset.rl
    encoder, nearest, decoder = tokenizer_flops(world, tokenizer)
    of_image = Work(float32=encoder + nearest, bytes=4 * distance_bytes(world, tokenizer))
    encoding = of_image.times(base.items) + Work(scenes=base.items / processes)
    pretraining = learning(s, base.batch, base.micro_batch, reference=False)
    B = rl.prompts * rl.group_size
    rollouts = decoding(s, rl.prompts, B) + Work(float32=B * decoder)
    updates = learning(s, B, rl.micro_batch, reference=True)
    looks = rl.steps // rl.eval_every + 1
    drawn = preset.evaluation.prompts
    return {
        "tokenizer": tokenizer_training(world, tokenizer).times(tokenizer.steps)
        + Work(scenes=tokenizer.images),
        "base policy": encoding + pretraining.times(base.steps),
        "rollouts": rollouts.times(rl.steps),
        "updates": updates.times(rl.steps),
        "evaluation in training": drawing(preset, 2 * rl.eval_prompts, EVALUATION_BATCH).times(
            looks
        ),
        "evaluation": drawing(preset, drawn + drawn // 2, preset.evaluation.batch).times(4),
    }


def memory(preset, bf16=True):
    """Estimate the peak of each stage, {stage: bytes}, without CUDA's own."""
    s, base, rl = preset.shape, preset.base, preset.rl
    distances = distance_bytes(preset.world, preset.tokenizer)
    encoding = 3 * pretrain.CHUNK * distances
    trained = 16 * s.parameters  # weights, gradients, two moments
    kept = kept_bytes(s, bf16)
    cache = 2 * s.layers * s.D * s.slots * (2 if bf16 else 4)
    learning = trained + min(base.batch, base.micro_batch) * kept
    B = rl.prompts * rl.group_size
    improving = trained + 4 * s.parameters + max(min(B, rl.micro_batch) * kept, B * cache)
    return {
        "tokenizer": max(3 * preset.tokenizer.batch, 2 * 256) * distances,  # 256: fit_residuals
        "base policy": max(learning, encoding),
        "reinforcement learning": improving,
        "evaluation": 8 * s.parameters + preset.evaluation.batch * cache,
    }
