"""The policy: a decoder-only transformer over one sequence of words and image codes.

    | prompt words, padded to S | <plan> | plan words, <end>, padded to C | <image> | L codes |

Every token has a fixed slot, so shapes never change; padding is masked out of attention. Words and
codes are two modalities with a head each. Sampler and learner must be one policy: policy_logits is
the one definition of what is sampled and scored; generate samples slot by slot with a key-value
cache, Policy.forward computes all slots at once, and the tests compare them. There is no dropout.

Dimension letters: P prompts, G sequences of each, B = P * G sequences, S prompt slots, C plan
slots, L image tokens, T = C + L sampled slots, N = S + C + L + 1 inputs, V vocabulary of a
modality, D width, H heads.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import common
from words import END, IMAGE, PAD, PLAN  # all but END are placed, never sampled

KERNEL_SIZE = 8  # of the convolution over words: about one phrase of a plan


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, mask, cache=None):
        """Process n slots at once. x: (B, n, D), mask: (B, 1, n, n) bool, True where a slot may
        attend. With a cache (2, P * G * H, N, D/H), x is of prompts, (P, n, D), and the keys and
        values of each are written to the cache of its G sequences."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, D/H) each
        if cache is not None:
            copies = cache.view(2, b, -1, self.heads, *cache.shape[2:])  # (2, P, G, H, N, D/H)
            copies[:, :, :, :, :n] = torch.stack([k, v])[:, :, None]
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        x = x + self.proj(attended.reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def step(self, x, bias, cache, slot):
        """Process one slot. x: (B, D); bias: (B * H, 1, N), -inf at padding; cache: (2, B * H, N,
        D/H). scaled_dot_product_attention would be slower with a single query."""
        b, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, 3, self.heads, -1)  # (B, 3, H, D/H)
        cache.view(2, b, self.heads, *cache.shape[2:])[:, :, :, slot] = qkv[:, 1:].transpose(0, 1)
        q, (k, v) = qkv[:, 0].reshape(b * self.heads, 1, -1), cache[:, :, : slot + 1]
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(bias[..., : slot + 1], q, k.transpose(1, 2), alpha=scale)
        x = x + self.proj(torch.bmm(scores.softmax(-1), v).view(b, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Policy(nn.Module):
    """A GPT-2 style transformer with two embeddings and two heads, for words and for image codes.

    word_vocab_size: number of words, of which those from END on are sampled; codebook_size: V of
    codes; code_dim: width of the tokenizer's codebook vectors; prompt_slots, plan_slots,
    image_tokens: S, C, L; width: D; heads: H.
    """

    def __init__(self, word_vocab_size, codebook_size, code_dim, prompt_slots, plan_slots,
                 image_tokens, width=128, layers=4, heads=4):  # fmt: skip
        super().__init__()
        self.config = dict(
            word_vocab_size=word_vocab_size, codebook_size=codebook_size, code_dim=code_dim,
            prompt_slots=prompt_slots, plan_slots=plan_slots, image_tokens=image_tokens,
            width=width, layers=layers, heads=heads,
        )  # fmt: skip
        self.S, self.C, self.L = prompt_slots, plan_slots, image_tokens
        self.slots = prompt_slots + plan_slots + image_tokens + 1  # the last code is never an input
        self.word_embedding = nn.Embedding(word_vocab_size, width)
        self.token_conv = nn.Parameter(torch.empty(width, KERNEL_SIZE))  # depthwise
        self.code_embedding = nn.Embedding(codebook_size, width)
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))  # see set_codebook
        self.code_aligner = nn.Linear(code_dim, width, bias=False)
        self.code_query = nn.Linear(width, code_dim, bias=False)
        self.word_position_embedding = nn.Embedding(prompt_slots + plan_slots + 2, width)
        side = int(image_tokens**0.5)
        self.row_embedding = nn.Embedding(side, width)
        self.column_embedding = nn.Embedding(side, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.word_head = nn.Linear(width, word_vocab_size - END, bias=False)
        self.code_head = nn.Linear(width, codebook_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:  # GPT-2's initialisation
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)

    def embed_words(self, words):
        """Embed words, (B, n) -> (B, n, D), followed by a depthwise causal convolution.

        The last word of a phrase such as "red circle at row 1 column 3" then carries the whole
        phrase, and image tokens can attend to it in one layer. Without the convolution, after the
        same pretraining, the right attributes were drawn in the wrong pairing.
        """
        embedded = self.word_embedding(words) * (words != PAD)[..., None]
        windows = F.pad(embedded, (0, 0, KERNEL_SIZE - 1, 0)).unfold(1, KERNEL_SIZE, 1)
        return (windows * self.token_conv).sum(-1)

    @torch.no_grad()
    def set_codebook(self, codebook):
        """Copy the tokenizer's codebook (V, code_dim), standardised per dimension.

        Codes of similar patches then have similar embeddings and logits, as in Janus. Without it,
        rare pairs were learned a third as fast.
        """
        self.codebook.copy_((codebook - codebook.mean(0)) / codebook.std(0))

    def embed_codes(self, codes):
        """Embed codes, (...) -> (..., D): own vectors plus projected codebook vectors."""
        return self.code_embedding(codes) + self.code_aligner(self.codebook[codes])

    # Both heads are float32 in any case: bf16 would round logits before the softmax, which was four
    # fifths of the difference between sampler and learner.

    def word_logits(self, x):
        """Logits of words from END on, (..., D) -> (..., V), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.word_head(x.float())

    def code_logits(self, x):
        """Logits of codes, (..., D) -> (..., V), float32: own weights plus queries of the codebook."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.code_head(x) + self.code_query(x) @ self.codebook.t()

    def position_embeddings(self):
        """Embed the slots, (N, D): words by index, codes by row and column of the token grid."""
        image = (self.row_embedding.weight[:, None] + self.column_embedding.weight).flatten(0, 1)
        return torch.cat([self.word_position_embedding.weight, image[:-1]])

    def concat_words(self, prompt, plan):
        """Concatenate prompt (B, S), <plan>, plan (B, C) and <image> to (B, S + C + 2)."""
        marker = prompt.new_ones(len(prompt), 1)
        return torch.cat([prompt, PLAN * marker, plan, IMAGE * marker], 1)

    def forward(self, prompt, plan, codes):
        """Compute all slots of prompts (B, S), plans (B, C) and codes (B, L) at once. Returns raw
        logits of plan words from END on (B, C, V) and of codes (B, L, V)."""
        words = self.concat_words(prompt, plan)
        x = torch.cat([self.embed_words(words), self.embed_codes(codes[:, :-1])], 1)
        x = x + self.position_embeddings()  # (B, N, D)
        mask = causal_mask(F.pad(words != PAD, (0, self.L - 1), value=True))  # (B, N, N)
        for block in self.blocks:
            x = block(x, mask[:, None])
        x = self.norm(x)
        plan, image = x[:, self.S : self.S + self.C], x[:, self.S + self.C + 1 :]
        return self.word_logits(plan), self.code_logits(image)


def causal_mask(keep):
    """Causal attention mask, (B, n, n) bool. keep: (B, n) bool, False at padding, to which only
    the padded slot itself attends: an empty row of the softmax would be NaN."""
    n = keep.shape[1]
    order = torch.ones(n, n, dtype=torch.bool, device=keep.device).tril()
    return (order & keep[:, None]) | torch.eye(n, dtype=torch.bool, device=keep.device)


def precision(device):
    """Autocast to common.network_dtype: bf16 inside the network where it is native, or nothing."""
    enabled = common.network_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def policy_logits(raw, empty=None, guidance=1.0, temperature=1.0):
    """Compute the logits that are sampled from and scored: the one definition of the policy.

    raw: (..., V), float32. Classifier-free guidance, of image codes only: empty + guidance * (raw -
    empty), where `empty` are the raw logits without prompt and plan. Guidance 1 needs none.
    """
    if guidance != 1.0:
        raw = empty + guidance * (raw - empty)
    return raw / temperature


def forward_logits(policy, prompt, plan, codes, guidance=1.0, temperature=1.0):
    """Return the policy's logits of given words (B, C, V) and codes (B, L, V), float32."""
    empty = None
    with precision(prompt.device):
        words, image = policy(prompt, plan, codes)
        if guidance != 1.0:
            nothing = torch.full_like(prompt, PAD), torch.full_like(plan, PAD)
            empty = policy(*nothing, codes)[1]
    words = policy_logits(words, temperature=temperature)
    return words, policy_logits(image, empty, guidance, temperature)


def token_logp(word_logits, code_logits, plan, codes):
    """Log-probability of each token, (B, T) in nats, 0 at padding. Logits (B, C, V), (B, L, V)."""
    valid = plan != PAD
    words = (plan - END).clamp(min=0)
    word_logp = word_logits.log_softmax(-1).gather(-1, words[..., None])[..., 0] * valid
    code_logp = code_logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    return torch.cat([word_logp, code_logp], 1)


class Sample(NamedTuple):
    plan: Tensor  # (B, C) word ids; END is the last that is not PAD, unless the plan is truncated
    codes: Tensor  # (B, L)
    logp: Tensor  # (B, T) of the sampled tokens, nats; 0 at padding
    entropy: Tensor  # (B, T) of the distributions sampled from, fraction of log V; 0 at padding
    valid: Tensor  # (B, T) bool: plan words up to and including END, and every code


def normalized_entropy(logp):
    """Entropy as a fraction of its maximum: H = -sum_v p(v) log p(v) / log V. logp: (..., V) log
    probabilities, which may be -inf. Returns (...) in [0, 1]."""
    return -(logp.exp() * logp.clamp(min=-1e4)).sum(-1) / math.log(logp.shape[-1])  # 0 log 0 = 0


def sample_token(logits, uniform):
    """Sample by inverting the cumulative distribution. logits (B, V), uniform (B,) in [0, 1) ->
    tokens (B,), logp (B,) in nats, entropy (B,) of the distribution as a fraction of log V.

    One number per token makes the noise small, the same on every device, and shareable between
    policies.
    """
    logp = logits.log_softmax(-1)
    cumulative = logp.exp().cumsum(-1)
    # the last millionth is left out, or rounding could land beyond the last possible token
    threshold = uniform[:, None] * cumulative[:, -1:] * (1 - 1e-6)
    token = torch.searchsorted(cumulative, threshold, right=True)  # (B, 1)
    return token[:, 0], logp.gather(-1, token)[:, 0], normalized_entropy(logp)


class Decoder:
    """State of a batch that is being sampled: words, padding, keys and values.

    prompts: (P, S), each continued batch / P times. `hidden` (B, D) is the output at the last slot
    that was fed. The cache has 2 * layers * B * N * D elements; guidance needs a second one.
    """

    def __init__(self, policy, prompts, batch):
        self.policy, heads, device = policy, policy.blocks[0].heads, prompts.device
        self.slot, self.positions = policy.S + 1, policy.position_embeddings()
        dtype = common.network_dtype(device)
        size = (2, batch * heads, policy.slots, policy.config["width"] // heads)
        self.cache = [torch.empty(size, dtype=dtype, device=device) for _ in policy.blocks]
        self.bias = torch.zeros(batch, heads, policy.slots, device=device)
        repeat = lambda x: x.repeat_interleave(batch // len(prompts), 0)
        words = policy.concat_words(prompts, prompts.new_full((len(prompts), policy.C), PAD))
        self.words = repeat(words)
        start = words[:, : self.slot]  # the prompt and <plan>
        padding = repeat(start == PAD)[:, None]
        self.bias[..., : self.slot].masked_fill_(padding, float("-inf"))
        x, mask = policy.embed_words(start) + self.positions[: self.slot], causal_mask(start != PAD)
        for block, layer_cache in zip(policy.blocks, self.cache):
            x = block(x, mask[:, None], layer_cache)
        self.hidden = repeat(policy.norm(x[:, -1]))

    def _feed(self, x):
        x = x + self.positions[self.slot]
        for block, layer_cache in zip(self.policy.blocks, self.cache):
            x = block.step(x, self.bias.flatten(0, 1)[:, None], layer_cache, self.slot)
        self.hidden, self.slot = self.policy.norm(x), self.slot + 1

    def feed_word(self, word):
        """word: (B,); later slots do not attend to PAD."""
        self.words[:, self.slot] = word
        self.bias[..., self.slot].masked_fill_((word == PAD)[:, None], float("-inf"))
        window = self.words[:, max(0, self.slot + 1 - KERNEL_SIZE) : self.slot + 1]
        self._feed(self.policy.embed_words(window)[:, -1])

    def feed_code(self, code):
        self._feed(self.policy.embed_codes(code))


@torch.no_grad()
def generate(policy, prompt, uniform, no_plan=False, guidance=1.0, temperature=1.0):
    """Sample plans and codes, slot by slot, without a host synchronisation. prompt: (P, S);
    uniform: (B, T) noise in [0, 1), B a multiple of P: each prompt is continued B / P times in a
    row. Returns a Sample of B sequences.

    no_plan: leave the plan empty (the paper's base setting).
    """
    (b, _), c = uniform.shape, policy.C
    plan, codes = prompt.new_full((b, c), PAD), prompt.new_zeros(b, policy.L)
    logp, entropy = torch.zeros_like(uniform), torch.zeros_like(uniform)
    running = torch.ones_like(plan[:, 0], dtype=torch.bool)  # plans without END so far
    with precision(prompt.device):
        decoder = Decoder(policy, prompt, b)
        for j in range(c):
            if not no_plan:
                logits = policy_logits(policy.word_logits(decoder.hidden), temperature=temperature)
                word, word_logp, word_entropy = sample_token(logits, uniform[:, j])
                plan[:, j] = torch.where(running, word + END, PAD)
                logp[:, j], entropy[:, j] = word_logp * running, word_entropy * running
                running = running & (plan[:, j] != END)
            decoder.feed_word(plan[:, j])
        decoders = [decoder]
        if guidance != 1.0:  # a second one that has seen neither prompt nor plan
            decoders.append(Decoder(policy, torch.full_like(prompt, PAD), b))
            for _ in range(c):
                decoders[1].feed_word(torch.full_like(plan[:, 0], PAD))
        for each in decoders:
            each.feed_word(torch.full_like(plan[:, 0], IMAGE))
        for j in range(c, c + policy.L):
            raw = [policy.code_logits(each.hidden) for each in decoders]
            logits = policy_logits(raw[0], raw[-1], guidance, temperature)
            code, logp[:, j], entropy[:, j] = sample_token(logits, uniform[:, j])
            codes[:, j - c] = code
            if j + 1 < c + policy.L:
                for each in decoders:
                    each.feed_code(code)
    valid = torch.cat([plan != PAD, torch.ones_like(codes, dtype=torch.bool)], 1)
    return Sample(plan, codes, logp, entropy, valid)


def load_policy(path, kind, preset, command=None, device="cpu"):
    """Read a finished policy; arguments and result as for checkpoint.load_model."""
    return checkpoint.load_model(Policy, path, kind, preset, command, device)


def load_base(preset, out="out", device="cpu"):
    """Read the base policy of a preset. Returns the frozen model."""
    command = common.command_for("pretrain.py", preset, out)
    return load_policy(f"{out}/{preset}/base.pt", "base", preset, command, device)[0]
