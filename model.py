"""The policy: a GPT-2 style decoder-only transformer over one sequence of words and image codes.

    | prompt words, padded to S | <plan> | plan words, <end>, padded to C | <image> | L codes |

Every token has a fixed slot, so shapes never change; padding is masked out of attention. Words and
codes are two modalities with an embedding and a head each. Sampler and learner must be one policy:
generate samples slot by slot with a key-value cache, Policy.forward computes all slots at once,
both take codes by policy_logits, which guidance is part of, and tests compare them. No dropout.

Dimension letters: P prompts, G sequences of each, B = P * G sequences, S prompt slots, C plan
slots, L image tokens, T = C + L sampled slots, N = S + C + L + 1 inputs, V vocabulary of a
modality, D width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from objective import normalized_entropy
from scenes import END, IMAGE, PAD, PLAN, WORDS  # PAD, PLAN, IMAGE are placed, not sampled

KERNEL_SIZE = 8  # of the convolution over words: about one phrase of a plan


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, mask, cache=None, slot=0):
        """Process n slots at once. x: (B, n, D); mask: (B, 1, n or 1, slots so far), bool, True
        where a slot may attend, or what is added to the scores; cache: (2, B, heads, N, D/heads),
        keys and values: those of the n slots from `slot` on are written, those before are read."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x))  # (B, n, 3 D)
        qkv = qkv.view(b, n, 3, self.heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q = qkv[0]  # (B, heads, n, D/heads)
        kv = qkv[1:]  # (2, B, heads, n, D/heads)
        if cache is not None:
            cache[:, :, :, slot : slot + n] = kv
            kv = cache[:, :, :, : slot + n]
        attended = F.scaled_dot_product_attention(q, *kv, mask)
        attended = attended.transpose(1, 2)  # (B, n, heads, D/heads)
        x = x + self.proj(attended.reshape(b, n, d))
        hidden = self.up(self.norm2(x))
        return x + self.down(F.gelu(hidden))


class Policy(nn.Module):
    def __init__(
        self,
        world,  # gives S, C and L
        codebook_size,  # V of codes
        code_dim,  # width of the tokenizer's codebook vectors, see set_codebook
        width=128,  # D
        layers=4,
        heads=4,
    ):
        super().__init__()
        self.config = dict(  # to make it again
            codebook_size=codebook_size,
            code_dim=code_dim,
            width=width,
            layers=layers,
            heads=heads,
        )
        self.S = world.prompt_slots
        self.C = world.plan_slots
        self.L = world.image_tokens
        self.slots = self.S + self.C + self.L + 1  # the last code is never an input
        self.word_embedding = nn.Embedding(len(WORDS), width)
        self.token_conv = nn.Parameter(torch.empty(width, KERNEL_SIZE))  # depthwise
        self.code_embedding = nn.Embedding(codebook_size, width)
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))  # see set_codebook
        self.code_aligner = nn.Linear(code_dim, width, bias=False)
        self.code_query = nn.Linear(width, code_dim, bias=False)
        self.word_position_embedding = nn.Embedding(self.S + self.C + 2, width)
        self.row_embedding = nn.Embedding(world.side, width)
        self.column_embedding = nn.Embedding(world.side, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.word_head = nn.Linear(width, len(WORDS) - END, bias=False)
        self.code_head = nn.Linear(width, codebook_size, bias=False)
        for name, parameter in self.named_parameters():  # GPT-2's initialisation
            if parameter.dim() > 1:
                last = name.endswith(("proj.weight", "down.weight"))
                std = 0.02 / (2 * layers) ** 0.5 if last else 0.02
                nn.init.normal_(parameter, std=std)

    def embed_words(self, words):
        """Embed words, (B, n) -> (B, n, D), followed by a depthwise causal convolution: the last
        word of a phrase such as "red circle at row 1 column 3" then carries the whole phrase, and
        image tokens can attend to it in one layer. Without it pairings were wrong."""
        is_word = words != PAD
        embedded = self.word_embedding(words) * is_word[..., None]
        padded = F.pad(embedded, (0, 0, KERNEL_SIZE - 1, 0))
        windows = padded.unfold(1, KERNEL_SIZE, 1)  # (B, n, D, KERNEL_SIZE)
        return (windows * self.token_conv).sum(-1)

    @torch.no_grad()
    def set_codebook(self, codebook):
        """Copy the tokenizer's codebook (V, code_dim), standardised per dimension. Codes of similar
        patches then have similar embeddings and logits; without it, rare pairs were learned a third
        as fast. Janus uses the codebook in the embedding too, but not in the head."""
        centred = codebook - codebook.mean(0)
        self.codebook.copy_(centred / codebook.std(0))

    def embed_codes(self, codes):
        """Embed codes, (...) -> (..., D): own vectors plus projected codebook vectors."""
        return self.code_embedding(codes) + self.code_aligner(self.codebook[codes])

    def word_logits(self, x):
        """Logits of words from END on, (..., D) -> (..., V). Both heads are float32 in any case:
        bf16 would round logits before the softmax, which was four fifths of the difference between
        sampler and learner."""
        with torch.autocast(x.device.type, enabled=False):
            return self.word_head(x.float())

    def code_logits(self, x):
        """Logits of codes, (..., D) -> (..., V), float32: own weights plus codebook queries."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            query = self.code_query(x)  # (..., code_dim)
            return self.code_head(x) + query @ self.codebook.t()

    def position_embeddings(self):
        """Embed the slots, (N, D): words by index, codes by row and column of the token grid."""
        rows = self.row_embedding.weight[:, None]
        columns = self.column_embedding.weight
        image = (rows + columns).flatten(0, 1)  # (L, D)
        return torch.cat([self.word_position_embedding.weight, image[:-1]])

    def concat_words(self, prompt, plan):
        """Concatenate prompt (B, S), <plan>, plan (B, C) and <image> to (B, S + C + 2)."""
        marker = prompt.new_ones(len(prompt), 1)
        return torch.cat([prompt, PLAN * marker, plan, IMAGE * marker], 1)

    def forward(self, prompt, plan, codes):
        """Compute all slots of prompts (B, S), plans (B, C) and codes (B, L) at once. Returns raw
        logits of plan words from END on (B, C, V) and of codes (B, L, V)."""
        words = self.concat_words(prompt, plan)
        embedded_words = self.embed_words(words)
        embedded_codes = self.embed_codes(codes[:, :-1])
        x = torch.cat([embedded_words, embedded_codes], 1)
        x = x + self.position_embeddings()  # (B, N, D)
        keep = F.pad(words != PAD, (0, self.L - 1), value=True)  # (B, N)
        mask = causal_mask(keep)  # (B, 1, N, N)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        # The output at a slot predicts the next token: words from <plan> on, codes from <image> on.
        plan_hidden = x[:, self.S : self.S + self.C]
        image_hidden = x[:, self.S + self.C + 1 :]
        return self.word_logits(plan_hidden), self.code_logits(image_hidden)


def causal_mask(keep):
    """Causal attention mask, (B, 1, n, n) bool. keep: (B, n) bool, False at padding, to which only
    the padded slot itself attends: an empty row of the softmax would be NaN."""
    n = keep.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=keep.device)
    order = torch.ones_like(itself).tril()
    allowed = order & keep[:, None]
    return (allowed | itself)[:, None]


def precision(device):
    """Autocast to common.network_dtype: bf16 inside the network where it is native, or nothing."""
    enabled = common.network_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def policy_logits(raw, guidance=1.0):
    """Compute the logits of codes, for sampling and scoring alike; those of words are never guided.
    raw: (B, ..., V), float32, or (2B, ..., V) with classifier-free guidance: without prompt and
    plan in the second half, `empty`. Returns empty + guidance * (raw - empty), (B, ..., V)."""
    if guidance == 1.0:
        return raw
    raw, empty = raw.chunk(2)
    return empty + guidance * (raw - empty)


def forward_logits(policy, prompt, plan, codes, guidance=1.0):
    """Return the policy's logits of given words (B, C, V) and codes (B, L, V), float32."""
    batch = len(prompt)
    if guidance != 1.0:  # as many rows without prompt and plan
        prompt = F.pad(prompt, (0, 0, 0, batch), value=PAD)
        plan = F.pad(plan, (0, 0, 0, batch), value=PAD)
        codes = codes.repeat(2, 1)
    with precision(prompt.device):
        words, image = policy(prompt, plan, codes)
    return words[:batch], policy_logits(image, guidance)


def score(policy, prompt, plan, codes, guidance=1.0):
    """Log-probability of each token of plans (B, C) and codes (B, L): (B, T) in nats, 0 at padding,
    from one pass over all slots."""
    words, image = forward_logits(policy, prompt, plan, codes, guidance)
    word = (plan - END).clamp(min=0)  # the word head begins at END
    word_logp = words.log_softmax(-1).gather(-1, word[..., None])  # (B, C, 1)
    code_logp = image.log_softmax(-1).gather(-1, codes[..., None])  # (B, L, 1)
    word_logp = word_logp[..., 0] * (plan != PAD)
    return torch.cat([word_logp, code_logp[..., 0]], 1)


class Rollout(NamedTuple):
    """A batch of sampled sequences, from sampling to the loss."""

    prompt: Tensor  # (B, S) word ids, each prompt G times in a row
    plan: Tensor  # (B, C) word ids; END is the last that is not PAD, unless the plan is truncated
    codes: Tensor  # (B, L)
    logp: Tensor  # (B, T) of the tokens when they were sampled, nats; 0 at padding
    entropy: Tensor  # (B, T) of the distributions sampled from, fraction of log V; 0 at padding
    valid: Tensor  # (B, T) bool: plan words up to and including END, and every code

    def rows(self, index):
        return Rollout(*(x[index] for x in self))


def sample_token(logits, noise):
    """Sample by inverting the cumulative distribution. logits (B, V), noise (B,) in [0, 1) ->
    tokens (B,), logp (B,) in nats, entropy (B,) of the distribution as a fraction of log V. One
    number per token makes the noise small, the same on every device, and shareable by policies."""
    logp = logits.log_softmax(-1)
    cumulative = logp.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # the last millionth is left out, or rounding could land beyond the last possible token
    threshold = noise[:, None] * total * (1 - 1e-6)
    token = torch.searchsorted(cumulative, threshold, right=True)  # (B, 1)
    token = token.clamp(max=logits.shape[-1] - 1)  # of NaN logits, if a run has diverged
    token_logp = logp.gather(-1, token)
    return token[:, 0], token_logp[:, 0], normalized_entropy(logp)


class Decoder:
    """State of B sequences that are being sampled: words, padding, keys and values, and `hidden`
    (B, D), the output at the last slot that was fed. With guidance a sequence has two rows."""

    def __init__(self, policy, words, repeats=1):
        """Feed the first n slots at once. words: (P, n), each row shared by `repeats` sequences."""
        prompts, n = words.shape
        self.policy = policy
        self.positions = policy.position_embeddings()
        x = policy.embed_words(words) + self.positions[:n]
        mask = causal_mask(words != PAD)
        dtype = common.network_dtype(x.device)
        width = x.shape[2]
        self.cache = []
        for block in policy.blocks:
            size = (2, prompts, block.heads, policy.slots, width // block.heads)
            cache = x.new_empty(size, dtype=dtype)
            x = block(x, mask, cache)
            self.cache.append(cache.repeat_interleave(repeats, 1))
        hidden = policy.norm(x[:, -1])
        self.hidden = hidden.repeat_interleave(repeats, 0)
        self.words = words.repeat_interleave(repeats, 0)
        self.slot = n
        # Added to the scores, -inf at padding; in the network's type: else each layer converts it.
        self.bias = x.new_zeros(len(self.words), policy.slots, dtype=dtype)
        self.bias[:, :n].masked_fill_(self.words == PAD, -math.inf)

    def feed(self, x):
        """Feed the embedding of the next slot, (B, D)."""
        x = x + self.positions[self.slot]
        x = x[:, None]  # (B, 1, D)
        mask = self.bias[:, None, None, : self.slot + 1]
        for block, cache in zip(self.policy.blocks, self.cache):
            x = block(x, mask, cache, self.slot)
        self.hidden = self.policy.norm(x[:, 0])
        self.slot += 1

    def feed_word(self, word):
        """word: (B,); no slot attends to PAD."""
        self.bias[:, self.slot].masked_fill_(word == PAD, -math.inf)
        self.words = torch.cat([self.words, word[:, None]], 1)
        recent = self.words[:, -KERNEL_SIZE:]  # what the convolution sees
        embedded = self.policy.embed_words(recent)
        self.feed(embedded[:, -1])

    def feed_code(self, code):
        """code: (B,), of all rows or of each half."""
        repeats = len(self.words) // len(code)
        self.feed(self.policy.embed_codes(code.repeat(repeats)))


@torch.no_grad()
def generate(policy, prompt, noise, guidance=1.0, no_plan=False):
    """Sample plans and codes slot by slot, without waiting for the device. prompt: (P, S); noise:
    (B, T) in [0, 1), B a multiple of P: each prompt is continued B / P times in a row. no_plan:
    leave the plan empty (the paper's base setting). Returns a Rollout."""
    repeats = len(noise) // len(prompt)
    pad = prompt.new_full((len(noise),), PAD)  # (B,)
    none = torch.zeros_like(noise[:, 0])
    slots = []  # of each sampled slot: token, logp and entropy, (B,) each
    no_plans = prompt.new_full((len(prompt), policy.C), PAD)
    words = policy.concat_words(prompt, no_plans)
    with precision(prompt.device):
        if no_plan:
            slots = [(pad, none, none)] * policy.C
            decoder = Decoder(policy, words, repeats)
        else:
            decoder = Decoder(policy, words[:, : policy.S + 1], repeats)  # the prompt and <plan>
            is_running = pad == PAD  # plans without END so far: all of them
            for j in range(policy.C):
                logits = policy.word_logits(decoder.hidden)
                word, logp, entropy = sample_token(logits, noise[:, j])
                word = torch.where(is_running, word + END, PAD)
                slots.append((word, logp, entropy))
                is_running = is_running & (word != END)
                decoder.feed_word(word)
            decoder.feed_word(torch.full_like(pad, IMAGE))
        if guidance != 1.0:  # start again with twice the rows
            words = decoder.words  # (B, S + C + 2)
            is_marker = (words == PLAN) | (words == IMAGE)
            nothing = torch.where(is_marker, words, PAD)
            decoder = Decoder(policy, torch.cat([words, nothing]))
        for j in range(policy.C, policy.C + policy.L):
            logits = policy_logits(policy.code_logits(decoder.hidden), guidance)
            code, logp, entropy = sample_token(logits, noise[:, j])
            slots.append((code, logp, entropy))
            if decoder.slot < policy.slots:
                decoder.feed_code(code)
    tokens, logp, entropy = (torch.stack(column, 1) for column in zip(*slots))  # (B, T) each
    plan, codes = tokens.split([policy.C, policy.L], 1)
    valid = F.pad(plan != PAD, (0, policy.L), value=True)
    prompt = prompt.repeat_interleave(repeats, 0)  # (B, S)
    return Rollout(prompt, plan, codes, logp * valid, entropy * valid, valid)
