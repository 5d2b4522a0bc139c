"""Codes become a policy: a decoder-only transformer over one sequence of words and image codes.

    | prompt words, padded to S | <plan> | plan words, <end>, padded to C | <image> | L codes |

Every token stands at a fixed slot, so shapes never change; padding is masked out of attention.
Words and codes are two modalities with a head each, so at any slot only one of them is possible.
Three things must never drift apart in reinforcement learning, and each is written once here:

    policy_logits   what the policy is: guidance, temperature, float32
    generate        sample from it, slot by slot, with a key-value cache
    Policy.forward  score it, all slots at once; also the tests' oracle for generate

There is no dropout and no train/eval mode: the network that samples is the network that learns.

Dimension letters: B sequences, S prompt slots, C plan slots, L image tokens, T = C + L sampled
slots, N = S + C + L + 1 inputs, V vocabulary of a modality, D width, H heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# the first three are placed, never sampled: word logits start at END
from scenes import END, IMAGE, PAD, PLAN


# words that a word's embedding carries: itself and the seven before, about one phrase of a plan
SMEAR = 8


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, mask, cache=None, start=0):
        """x: (B, n, D), the tokens at slots start to start + n. cache: keys and values (2, B, H, N,
        D/H), filled in place."""
        b, n, d = x.shape
        # (B, H, n, D/H) each
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, start:start + n], cache[1, :, :, start:start + n] = k, v
            k, v = cache[:, :, :, :start + n]
        x = x + self.proj(
            F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Policy(nn.Module):
    """words, codes: vocabulary sizes. prompt_slots, plan_slots, image_tokens: S, C, L."""

    def __init__(self, words, codes, prompt_slots, plan_slots, image_tokens, width=128, layers=4,
                 heads=4):
        super().__init__()
        self.config = dict(words=words,
                           codes=codes,
                           prompt_slots=prompt_slots,
                           plan_slots=plan_slots,
                           image_tokens=image_tokens,
                           width=width,
                           layers=layers,
                           heads=heads)
        self.S, self.C, self.L = prompt_slots, plan_slots, image_tokens
        self.slots = prompt_slots + plan_slots + image_tokens + 1  # the last code is never an input
        self.word_embedding = nn.Embedding(words, width)
        # (D, SMEAR)
        self.smear = nn.Parameter(
            F.one_hot(torch.tensor(SMEAR - 1), SMEAR).float().repeat(width, 1))
        self.code_embedding = nn.Embedding(codes, width)
        self.place_embedding = nn.Embedding(prompt_slots + plan_slots + 2, width)
        side = int(image_tokens ** 0.5)
        self.row_embedding, self.column_embedding = nn.Embedding(side,
                                                                 width), nn.Embedding(side, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.word_head = nn.Linear(width, words - END, bias=False)
        self.code_head = nn.Linear(width, codes, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:                                                 # GPT-2's initialisation
                nn.init.normal_(p,
                                std=0.02 / (2 * layers) ** 0.5 if name.endswith(
                                    ("proj.weight", "down.weight")) else 0.02)

    def embed_words(self, words):
        """Embed words (B, n) -> (B, n, D), each with a learned share of the seven before it.

        A phrase such as "red circle at row 1 column 3" then meets in its last word, where the image
        tokens of that cell can find it in one step of attention. Without this depthwise convolution
        a small transformer has to learn to gather the phrase first: after the same pretraining it
        drew the right things at the right places in the wrong pairing.
        """
        embedded = self.word_embedding(words) * (words != PAD)[..., None]
        return (F.pad(embedded, (0, 0, SMEAR - 1, 0)).unfold(1, SMEAR, 1) * self.smear).sum(-1)

    def places(self):
        """Embed the slots, (N, D): words by their number, codes by row and column of the token
        grid."""
        image = (self.row_embedding.weight[:, None] + self.column_embedding.weight).flatten(0, 1)
        return torch.cat([self.place_embedding.weight, image[:-1]])

    def words(self, prompt, plan):
        """Join prompt (B, S), plan (B, C) and the two markers to the word part of the sequence, (B,
        S + C + 2)."""
        marker = prompt.new_ones(len(prompt), 1)
        return torch.cat([prompt, PLAN * marker, plan, IMAGE * marker], 1)

    def forward(self, prompt, plan, codes):
        """Score every slot at once. Returns raw logits of the plan words (B, C, words - END) and of
        the codes (B, L, codes)."""
        words = self.words(prompt, plan)
        # (B, N, D)
        x = torch.cat(
            [self.embed_words(words), self.code_embedding(codes[:, :-1])], 1) + self.places()
        n = self.slots
        keep = F.pad(words != PAD, (0, self.L - 1), value=True)                             # (B, N)
        order = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        # A padded slot sees itself, or a row of the softmax would be empty and NaN; no other slot
        # sees it.
        # (B, N, N)
        mask = (order & keep[:, None]) | torch.eye(n, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask[:, None])
        x = self.norm(x)
        return self.word_head(x[:, self.S:self.S + self.C]), self.code_head(x[:,
                                                                              self.S + self.C + 1:])


def policy_logits(raw, guidance=1.0, temperature=1.0):
    """Turn the network's output into the logits that are sampled from and scored: the one
    definition of the policy.

    raw: (B, ..., V), or (2B, ..., V) with guidance other than 1: first with the prompt, then with
    an empty one. Classifier-free guidance: empty + guidance * (prompted - empty). Returns float32.
    """
    raw = raw.float()
    if guidance != 1.0:
        prompted, empty = raw.chunk(2)
        raw = empty + guidance * (prompted - empty)
    return raw / temperature


def with_empty_prompts(prompt, guidance):
    """Append the empty prompts that guidance needs: (B, S) -> (B, S), or (2B, S) where guidance is
    not 1."""
    return prompt if guidance == 1.0 else torch.cat([prompt, torch.full_like(prompt, PAD)])


def score(policy, prompt, plan, codes, guidance=1.0, temperature=1.0):
    """Return the policy's logits for given tokens: words (B, C, V) and codes (B, L, V), float32,
    with gradient."""
    prompts = with_empty_prompts(prompt, guidance)
    repeat = len(prompts) // len(prompt)
    word_raw, code_raw = policy(prompts, plan.repeat(repeat, 1), codes.repeat(repeat, 1))
    return policy_logits(word_raw, guidance,
                         temperature), policy_logits(code_raw, guidance, temperature)


def token_logp(word_logits, code_logits, plan, codes):
    """Log-probability of each sampled token, nats. (B, C, V), (B, L, V), (B, C), (B, L) -> (B, T);
    padding gives 0."""
    valid = plan != PAD
    words = (plan - END).clamp(min=0)
    word_logp = word_logits.log_softmax(-1).gather(-1, words[..., None])[..., 0] * valid
    code_logp = code_logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    return torch.cat([word_logp, code_logp], 1)


class Draw(NamedTuple):
    plan: Tensor       # (B, C) word ids; the stop token is the last that is not PAD
    codes: Tensor      # (B, L)
    logp: Tensor       # (B, T) of the sampled tokens, nats; 0 at padding
    valid: Tensor      # (B, T) bool: plan words up to and including the stop token, and every code


def choose(logits, uniform):
    """Sample by inverting the cumulative distribution. logits (B, V), uniform (B,) in [0, 1) ->
    tokens (B,), logp (B,).

    One number a token makes the noise small, the same on every device, and shareable between
    policies.
    """
    logp = logits.log_softmax(-1)
    cumulative = logp.exp().cumsum(-1)
    token = (cumulative
             < uniform[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


@torch.no_grad()
def generate(policy, prompt, uniforms, direct=False, plan=None, guidance=1.0, temperature=1.0):
    """Sample plans and pictures. prompt: (B, S); uniforms: (B, T) noise in [0, 1). Returns a Draw.

    direct: leave the plan out (the paper's base setting). plan (B, C): draw pictures for these
    plans.
    """
    b, s, c = len(prompt), policy.S, policy.C
    prompts = with_empty_prompts(prompt, guidance)
    repeat = len(prompts) // b
    if direct:
        plan = torch.full((b, c), PAD, device=prompt.device)
    given, plan = plan, torch.full((b, c), PAD, device=prompt.device)
    codes = torch.zeros(b, policy.L, dtype=torch.long, device=prompt.device)
    logp = torch.zeros(b, c + policy.L, device=prompt.device)

    heads, width = policy.blocks[0].heads, policy.config["width"]
    dtype = torch.get_autocast_dtype(prompt.device.type) if torch.is_autocast_enabled(
        prompt.device.type) else torch.float32
    cache = torch.zeros(len(policy.blocks),
                        2,
                        len(prompts),
                        heads,
                        policy.slots,
                        width // heads,
                        dtype=dtype,
                        device=prompt.device)
    # 0, or -inf at padding
    bias = torch.zeros(len(prompts), 1, 1, policy.slots, dtype=dtype, device=prompt.device)

    places = policy.places()

    def step(x, start, mask):
        x = x + places[start:start + x.shape[1]]
        for block, memory in zip(policy.blocks, cache):
            x = block(x, mask, memory, start)
        return policy.norm(x[:, -1])

    words = policy.words(prompts, plan.repeat(repeat, 1))             # (B, S + C + 2), plan to come
    embed = lambda slot: policy.embed_words(words[:, max(0, slot + 1 - SMEAR):slot + 1])[:, -1:]
    head = words[:, :s + 1]
    bias[..., :s + 1].masked_fill_((head == PAD)[:, None, None], float("-inf"))
    order = torch.ones(s + 1, s + 1, dtype=torch.bool, device=prompt.device).tril()
    mask = (order &
            (head != PAD)[:, None, None]) | torch.eye(s + 1, dtype=torch.bool, device=prompt.device)
    x = step(policy.embed_words(head), 0, mask)                            # the prompt, all at once

    running = torch.ones(b, dtype=torch.bool, device=prompt.device)
    for j in range(c):
        slot = s + 1 + j
        if given is None:
            token, lp = choose(policy_logits(policy.word_head(x), guidance, temperature),
                               uniforms[:, j])
            plan[:, j] = torch.where(running, token + END, PAD)
            logp[:, j] = lp * running
        else:
            plan[:, j] = given[:, j]
        running = running & (plan[:, j] != END) & (plan[:, j] != PAD)
        words[:, slot] = plan[:, j].repeat(repeat)
        bias[:, 0, 0, slot].masked_fill_(words[:, slot] == PAD, float("-inf"))
        x = step(embed(slot), slot, bias[..., :slot + 1])
    x = step(embed(s + c + 1), s + c + 1, bias[..., :s + c + 2])
    for j in range(policy.L):
        codes[:, j], logp[:,
                          c + j] = choose(policy_logits(policy.code_head(x), guidance, temperature),
                                          uniforms[:, c + j])
        if j + 1 < policy.L:
            start = s + c + 2 + j
            x = step(policy.code_embedding(codes[:, j:j + 1].repeat(repeat, 1)), start,
                     bias[..., :start + 1])
    valid = torch.cat([plan != PAD, torch.ones_like(codes, dtype=torch.bool)], 1)
    return Draw(plan, codes, logp, valid)
