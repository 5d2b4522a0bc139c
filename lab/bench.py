"""How fast, against what the machine could do and against what one would otherwise pick.

    python -m lab.bench            two minutes; theirs too where transformers or TRL are installed

One shape for all: a policy of 4 layers, width 128, 4 heads (on CUDA: 8, 512, 8), 64 sequences of 14
prompt tokens, 15 plan tokens and 64 image tokens of 512 codes. The floor is arithmetic (operations
over the measured rate of a large matrix product) or, on CUDA, bytes if that is more (weights and
cache, read once a token). Medians of several runs; on a shared machine only the ratios mean much.
Then how time and memory grow with batch, image tokens and width.
"""

import statistics
import tempfile
import time
from types import SimpleNamespace

import torch

import common
import eggrpo
import rewards
from model import Policy, generate
from rollout import make_rollout
from scenes import World, make_scene
from words import WORDS, encode_words
from tiny_vq.vqvae import VQVAE

S, C, L, CODES, B = 13, 15, 64, 512, 64
SHAPE = {"cpu": (128, 4, 4), "cuda": (512, 8, 8)}  # width, layers, heads


def seconds(function, device, repeats=7):
    """Median wall time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matrix_rate(device, dtype):
    """Measured operations a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def copy_rate(device):
    """Measured bytes a second of a large copy, read and written."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / seconds(lambda: b.copy_(a), device)


def make(device, shape=None):
    """A random policy, a tokenizer, scenes and a config of the bench's shape."""
    torch.manual_seed(0)
    policy = Policy(len(WORDS), CODES, 16, S, C, L, *(shape or SHAPE[device.type])).to(device)
    world = World(image_size=40, patch=5, plan_slots=C)  # 8 x 8 tokens
    tokenizer = VQVAE(world.patch, codebook_size=CODES).to(device).requires_grad_(False)
    scenes = [make_scene(world, "train", 0, i, "knowledge") for i in range(8)]
    env = SimpleNamespace(world=world, tokenizer=tokenizer, device=device)
    return policy, env, scenes, eggrpo.Config(method="eggrpo", prompts=8, plans_per_prompt=8)


def body(policy):
    """Parameters that multiply every token: blocks and heads, no embeddings."""
    return sum(p.numel() for n, p in policy.named_parameters() if "blocks" in n or "head" in n)


def floors(policy, device):
    """Least seconds of decoding and of a step, with the count that gives them."""
    rate, copy = matrix_rate(device, common.network_dtype(device)), copy_rate(device)
    new, slots = C + L, policy.slots
    width, layers = policy.config["width"], policy.config["layers"]
    attention = 4 * layers * width * slots / 2  # operations a token, on average
    forward = 2 * body(policy) + attention
    decode = B * (new + S + 1) * forward / rate
    if device.type == "cuda":
        cache = cache_bytes(policy, B, device) / 2  # bytes read a token, on average
        weights = body(policy) * common.network_dtype(device).itemsize
        decode = max(decode, new * (weights + cache) / copy)
    # reference forward, own forward and backward
    step = decode + B * slots * forward * (1 + 3) / rate
    return decode, step, rate, copy


def ours(policy, env, scenes, config, device):
    """Seconds of decoding, reward, shaping and a whole step."""
    prompt = torch.tensor([encode_words(s.prompt, S) for s in scenes]).to(device)
    noise = torch.rand(B, C + L).to(device)

    def decode():
        return generate(policy, prompt, noise)

    reference = Policy(**policy.config).to(device).requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), 0.0)  # the same batch again and again
    rollout = make_rollout(policy, env, scenes, config, 0)
    rollout = rollout._replace(rewards=torch.rand(8, 8, device=device))
    want = rewards.encode_targets(env.world, [s for s in scenes for _ in range(8)], device)

    def step():
        rolled = make_rollout(policy, env, scenes, config, 0)
        batch = eggrpo.make_batch(rolled._replace(rewards=rollout.rewards), config)
        eggrpo.update(policy, reference, optimizer, batch, config, 0)

    batch = eggrpo.make_batch(rollout, config)
    update = lambda: eggrpo.update(policy, reference, optimizer, batch, config, 0)
    return dict(
        decode=seconds(decode, device),
        reward=seconds(lambda: rewards.compute_rewards(rollout.images, want, env.world), device),
        shaping=seconds(lambda: eggrpo.make_batch(rollout, config), device),
        update=seconds(update, device),
        step=seconds(step, device),
    )


def theirs_decode(policy, device):
    """Seconds of transformers' generate for a Llama of the same shape; None without
    transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    model = LlamaForCausalLM(llama(policy, LlamaConfig)).to(device).eval()
    model = model.to(common.network_dtype(device))
    prompt = torch.randint(4, 500, (B, S + 1), device=device)
    how = dict(max_new_tokens=C + L, min_new_tokens=C + L, do_sample=True, top_k=0, pad_token_id=0)
    return seconds(
        lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **how), device, 5
    )


def llama(policy, config_class):
    width = policy.config["width"]
    return config_class(
        vocab_size=CODES + len(WORDS),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=policy.config["layers"],
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
        num_attention_heads=policy.config["heads"],
        tie_word_embeddings=False,
    )


def theirs_step(policy, device):
    """Seconds of a step of TRL's GRPOTrainer, 8 prompts x 8, same lengths; None without TRL."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
            PreTrainedTokenizerFast,
            TrainerCallback,
        )
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    words = {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        **{f"w{i}": i for i in range(3, CODES + len(WORDS))},
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    prompts = Dataset.from_list([{"prompt": " ".join(f"w{3 + i}" for i in range(S + 1))}] * 256)
    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=B,
            num_generations=8,
            max_completion_length=C + L,
            max_steps=7,
            beta=0.01,
            report_to=[],
            logging_steps=100,
            save_strategy="no",
            use_cpu=device.type == "cpu",
            bf16=common.network_dtype(device) == torch.bfloat16,
            disable_tqdm=True,
            generation_kwargs=dict(min_new_tokens=C + L),
            learning_rate=1e-6,
            gradient_checkpointing=False,
        )
        reward = lambda completions, **_: [float(len(set(c.split()))) for c in completions]
        LlamaForCausalLM(llama(policy, LlamaConfig)).save_pretrained(f"{folder}/llama")
        GRPOTrainer(
            f"{folder}/llama",
            reward,
            args=config,
            train_dataset=prompts,
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()
    return statistics.median(b - a for a, b in zip(marks[1:], marks[2:]))


def peak(function, device):
    """Bytes that a call needs at its peak, beyond what was held before; None but on CUDA: a CPU's
    allocator keeps what it once had.

    Counts what the allocator reserves: of a graph's memory, which no tensor of the process holds,
    nothing is "allocated" after the capture. The call has to be the first of its shape.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    function()
    return torch.cuda.max_memory_reserved() - before


def growth(device):
    """Print how a rollout grows with batch and image tokens, and an update with width."""
    megabytes = lambda x: "-" if x is None else f"{x / 2**20:.0f}"
    print("\n| rollout of | seconds | us a token | cache, MiB | peak, MiB |\n|---|---|---|---|---|")
    for batch, tokens in [(b, 64) for b in (8, 32, 128, 512)] + [(16, t) for t in (64, 256, 1024)]:
        policy = Policy(len(WORDS), CODES, 16, S, C, tokens, *SHAPE[device.type]).to(device)
        prompt = torch.full((8, S), 20, device=device)
        noise = torch.rand(batch, C + tokens, device=device)
        call = lambda: generate(policy, prompt, noise)
        memory = peak(call, device)  # first, so that on CUDA it sees the capture
        time = seconds(call, device, 2)
        policy.graphs.clear()
        print(
            f"| {batch} sequences, {tokens} image tokens | {time:.3f} "
            f"| {1e6 * time / batch / (C + tokens):.1f} "
            f"| {megabytes(cache_bytes(policy, batch, device))} | {megabytes(memory)} |"
        )
    print("\n| update at width | parameters, M | seconds | GFLOP/s |\n|---|---|---|---|")
    for width in (64, 128, 256, 512):
        policy, env, scenes, config = make(device, (width, *SHAPE[device.type][1:]))
        rollout = make_rollout(policy, env, scenes, config, 0)
        batch = eggrpo.make_batch(rollout, config)
        optimizer = torch.optim.AdamW(policy.parameters(), 0.0)
        call = lambda: eggrpo.update(policy, policy, optimizer, batch, config, 0)
        time = seconds(call, device, 2)
        print(
            f"| {width} | {body(policy) / 1e6:.2f} | {time:.3f} "
            f"| {8 * body(policy) * B * policy.slots / time / 1e9:.0f} |"
        )


def cache_bytes(policy, batch, device):
    """2 (keys, values) x layers x sequences x slots x width numbers, of 4 bytes or of 2 in bf16."""
    size = common.network_dtype(device).itemsize
    return 2 * policy.config["layers"] * batch * policy.slots * policy.config["width"] * size


def main():
    device = common.pick_device()
    policy, env, scenes, config = make(device)
    floor_decode, floor_step, rate, copy = floors(policy, device)
    print(
        f"{sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, {B} sequences, "
        f"{C + L} new tokens; matrix product {rate / 1e9:.0f} GFLOP/s, copy "
        f"{copy / 1e9:.0f} GB/s"
    )
    t = ours(policy, env, scenes, config, device)
    rows = [
        ("decoding, floor", floor_decode, floor_decode),
        ("decoding, ours", t["decode"], floor_decode),
        ("decoding, transformers generate", theirs_decode(policy, device), floor_decode),
        ("a step, floor", floor_step, floor_step),
        ("a step, ours", t["step"], floor_step),
        ("a step, TRL GRPOTrainer", theirs_step(policy, device), floor_step),
    ]
    print("\n| | seconds | of the floor |\n|---|---|---|")
    for name, value, floor in rows:
        print(
            f"| {name} | not installed | |"
            if value is None
            else f"| {name} | {value:.3f} | {value / floor:.1f} |"
        )
    print(
        f"\nof our step: decoding {t['decode'] / t['step']:.0%}, "
        f"reward {t['reward'] / t['step']:.1%}, shaping {t['shaping'] / t['step']:.1%}, "
        f"update {t['update'] / t['step']:.0%}"
    )
    policy.graphs.clear()
    growth(device)


if __name__ == "__main__":
    main()
