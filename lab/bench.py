"""Measure speed: against the arithmetic floor, and against transformers and TRL if installed.

    python -m lab.bench            about two minutes

One shape for all: a policy of 4 layers, width 128, 4 heads (on CUDA: 8, 512, 8), 64 sequences of 14
prompt tokens, 15 plan tokens and 64 image tokens of 512 codes. The floor is the number of
operations over the measured rate of a large matrix product; on CUDA the time to read weights and
cache once per token, if that is longer. Times are medians of several calls; on a shared machine
only their ratios are meaningful. A second part prints time and memory against batch, image tokens
and width.
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
from evaluate import markdown_table
from rollout import make_rollout
from scenes import World, make_scene
from words import WORDS, encode_words
from tiny_vq.vqvae import VQVAE

S, C, L, CODES, B = 13, 15, 64, 512, 64
SHAPE = {"cpu": (128, 4, 4), "cuda": (512, 8, 8)}  # width, layers, heads


def seconds(function, device, repeats=7):
    """Return the median wall time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matrix_rate(device, dtype):
    """Measure the operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def copy_rate(device):
    """Measure the bytes per second of a large copy, read and written."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / seconds(lambda: b.copy_(a), device)


def make(device, shape=None):
    """Make a random policy, an environment, scenes and a config. shape: width, layers, heads."""
    torch.manual_seed(0)
    policy = Policy(len(WORDS), CODES, 16, S, C, L, *(shape or SHAPE[device.type])).to(device)
    world = World(image_size=40, patch=5, plan_slots=C)  # 8 x 8 tokens
    tokenizer = VQVAE(world.patch, codebook_size=CODES).to(device).requires_grad_(False)
    scenes = [make_scene(world, "train", 0, i, "knowledge") for i in range(8)]
    env = SimpleNamespace(world=world, tokenizer=tokenizer, device=device)
    return policy, env, scenes, eggrpo.Config(method="eggrpo", prompts=8, plans_per_prompt=8)


def count_weights(policy):
    """Count the parameters that multiply every token: blocks and heads, no embeddings."""
    return sum(p.numel() for n, p in policy.named_parameters() if "blocks" in n or "head" in n)


def floors(policy, device):
    """Return the floors of decoding and of a step, in seconds, and the measured rates of matrix
    products (operations per second) and copies (bytes per second)."""
    rate, copy = matrix_rate(device, common.network_dtype(device)), copy_rate(device)
    new, slots = C + L, policy.slots
    width, layers = policy.config["width"], policy.config["layers"]
    attention = 4 * layers * width * slots / 2  # operations per token, on average
    forward = 2 * count_weights(policy) + attention
    decode = B * (new + S + 1) * forward / rate
    if device.type == "cuda":
        cache = cache_bytes(policy, B, device) / 2  # bytes read per token, on average
        weights = count_weights(policy) * common.network_dtype(device).itemsize
        decode = max(decode, new * (weights + cache) / copy)
    # reference forward, own forward and backward
    step = decode + B * slots * forward * (1 + 3) / rate
    return decode, step, rate, copy


def time_ours(policy, env, scenes, config, device):
    """Return the seconds of decoding, reward, shaping, an update and a whole step."""
    prompt = torch.tensor([encode_words(s.prompt, S) for s in scenes]).to(device)
    uniform = torch.rand(B, C + L).to(device)
    reference = Policy(**policy.config).to(device).requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), 0.0)  # so that the policy stays the same
    rollout = make_rollout(policy, env, scenes, config, 0)
    rollout = rollout._replace(rewards=torch.rand(8, 8, device=device))
    targets = rewards.encode_targets(env.world, [s for s in scenes for _ in range(8)], device)
    batch = eggrpo.make_batch(rollout, config)

    def step():
        new = make_rollout(policy, env, scenes, config, 0)
        new_batch = eggrpo.make_batch(new._replace(rewards=rollout.rewards), config)
        eggrpo.update(policy, reference, optimizer, new_batch, config)

    calls = dict(
        decode=lambda: generate(policy, prompt, uniform),
        reward=lambda: rewards.compute_rewards(rollout.images, targets, env.world),
        shaping=lambda: eggrpo.make_batch(rollout, config),
        update=lambda: eggrpo.update(policy, reference, optimizer, batch, config),
        step=step,
    )
    return {name: seconds(call, device) for name, call in calls.items()}


def time_transformers(policy, device):
    """Return the seconds of transformers' generate for a Llama of the same shape; None if it is not
    installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    model = LlamaForCausalLM(llama_config(policy, LlamaConfig)).to(device).eval()
    model = model.to(common.network_dtype(device))
    prompt = torch.randint(4, 500, (B, S + 1), device=device)
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=C + L,
                   min_new_tokens=C + L, do_sample=True, top_k=0, pad_token_id=0)  # fmt: skip
    return seconds(lambda: model.generate(prompt, **options), device, 5)


def llama_config(policy, config_class):
    """Return the config of a Llama of the policy's shape."""
    width = policy.config["width"]
    return config_class(
        vocab_size=CODES + len(WORDS), hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=policy.config["layers"], num_attention_heads=policy.config["heads"],
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


def word_tokenizer():
    """Make a tokenizer of one word per token. Raises ImportError without transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, CODES + len(WORDS)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>",
                                   padding_side="left")  # fmt: skip


def time_trl(policy, device):
    """Return the seconds of a step of TRL's GRPOTrainer, 8 prompts x 8 rollouts of the same
    lengths; None if it is not installed."""
    try:
        from datasets import Dataset
        from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        tokenizer = word_tokenizer()
    except ImportError:
        return None
    prompts = Dataset.from_list([{"prompt": " ".join(f"w{3 + i}" for i in range(S + 1))}] * 256)
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=B, num_generations=8, max_completion_length=C + L,
            generation_kwargs=dict(min_new_tokens=C + L), max_steps=7, beta=0.01,
            learning_rate=1e-6, gradient_checkpointing=False, use_cpu=device.type == "cpu",
            bf16=common.network_dtype(device) == torch.bfloat16, report_to=[], logging_steps=100,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        reward = lambda completions, **_: [float(len(set(c.split()))) for c in completions]
        LlamaForCausalLM(llama_config(policy, LlamaConfig)).save_pretrained(f"{folder}/llama")
        GRPOTrainer(f"{folder}/llama", reward, args=config, train_dataset=prompts,
                    processing_class=tokenizer, callbacks=[Clock()]).train()  # fmt: skip
    return statistics.median(b - a for a, b in zip(ends[1:], ends[2:]))


def peak_memory(function, device):
    """Return the bytes that a call needs at its peak, beyond those held before; None except on
    CUDA, because a CPU's allocator keeps what it has freed."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def cache_bytes(policy, batch, device):
    """2 (keys, values) x layers x sequences x slots x width numbers, of 4 bytes or of 2 in bf16."""
    size = common.network_dtype(device).itemsize
    return 2 * policy.config["layers"] * batch * policy.slots * policy.config["width"] * size


def print_growth(device):
    """Print the time and memory of a rollout against batch and image tokens, and the time of an
    update against width."""
    megabytes = lambda x: "-" if x is None else f"{x / 2**20:.0f}"
    rows, head = [], ["rollout of", "seconds", "us per token", "cache, MiB", "peak, MiB"]
    for batch, tokens in [(b, 64) for b in (8, 32, 128, 512)] + [(16, t) for t in (64, 256, 1024)]:
        policy = Policy(len(WORDS), CODES, 16, S, C, tokens, *SHAPE[device.type]).to(device)
        prompt = torch.full((8, S), 20, device=device)
        uniform = torch.rand(batch, C + tokens, device=device)
        call = lambda: generate(policy, prompt, uniform)
        memory = peak_memory(call, device)
        elapsed = seconds(call, device, 2)
        cache = cache_bytes(policy, batch, device)
        rows.append([f"{batch} sequences, {tokens} image tokens", f"{elapsed:.3f}",
                     f"{1e6 * elapsed / batch / (C + tokens):.1f}", megabytes(cache),
                     megabytes(memory)])  # fmt: skip
    print(f"\n{markdown_table(head, rows)}")
    rows, head = [], ["update at width", "parameters, M", "seconds", "GFLOP/s"]
    for width in (64, 128, 256, 512):
        policy, env, scenes, config = make(device, (width, *SHAPE[device.type][1:]))
        batch = eggrpo.make_batch(make_rollout(policy, env, scenes, config, 0), config)
        optimizer = torch.optim.AdamW(policy.parameters(), 0.0)
        call = lambda: eggrpo.update(policy, policy, optimizer, batch, config)
        elapsed, weights = seconds(call, device, 2), count_weights(policy)
        rate = 8 * weights * B * policy.slots / elapsed / 1e9
        rows.append([width, f"{weights / 1e6:.2f}", f"{elapsed:.3f}", f"{rate:.0f}"])
    print(f"\n{markdown_table(head, rows)}")


def main():
    device = common.pick_device()
    policy, env, scenes, config = make(device)
    floor_decode, floor_step, rate, copy = floors(policy, device)
    parameters = sum(p.numel() for p in policy.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {B} sequences, {C + L} new tokens; "
        f"matrix product {rate / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.0f} GB/s"
    )
    ours = time_ours(policy, env, scenes, config, device)
    measured = [
        ("decoding, floor", floor_decode, floor_decode),
        ("decoding, ours", ours["decode"], floor_decode),
        ("decoding, transformers generate", time_transformers(policy, device), floor_decode),
        ("a step, floor", floor_step, floor_step),
        ("a step, ours", ours["step"], floor_step),
        ("a step, TRL GRPOTrainer", time_trl(policy, device), floor_step),
    ]
    rows = [
        [name, *(("not installed", "") if x is None else (f"{x:.3f}", f"{x / floor:.1f}"))]
        for name, x, floor in measured
    ]
    print(f"\n{markdown_table(['', 'seconds', 'multiple of the floor'], rows)}")
    parts = [
        f"{name} {ours[name] / ours['step']:.1%}"
        for name in ("decode", "reward", "shaping", "update")
    ]
    print(f"\nparts of our step: {', '.join(parts)}")
    print_growth(device)


if __name__ == "__main__":
    common.run(main)
