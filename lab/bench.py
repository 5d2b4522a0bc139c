"""Measure speed, and compare it with transformers and TRL if they are installed.

    bash train.sh lab.bench            about two minutes

Decoding and a training step of the preset's model, with random weights, against transformers'
generate and TRL's GRPOTrainer for a Llama of the same width, layers, heads, sequences and lengths.
The floors are what the preset's FLOPs, its memory traffic and its kernels would take, each alone,
at this machine's measured rates (lab.cost); memory traffic is that of a GPU's kernels, of which a
CPU's caches save a part. The overhead of EG-GRPO is that of its masks and its shaping, all that it
adds to GRPO: their time, and the memory that they allocate in all. Times are medians of several
calls; on a shared machine only their ratios are meaningful.
"""

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import pretrain
import tiny_vq.train
from eggrpo import train_step
from evaluate import Env, draw_noise, markdown_table, sample_images
from lab import cost
from lab.batch import step_config, token_advantages, training_batch
from lab.work import decoding, learning, load_preset
from scenes import WORDS, WORLDS, encode_scenes
from tiny_vq.vqvae import VQVAE


@dataclass(frozen=True)
class Config(common.BaseConfig):
    repeats: int = 7  # calls that a median is of


def median_time(function, device, repeats):
    """Return the median wall time of a call in seconds."""
    return cost.clock(function, device, repeats, statistics.median)


def make(config, device):
    """Make a random policy and the environment of a preset."""
    world = WORLDS[config.preset]
    torch.manual_seed(config.seed)
    of_tokenizer = tiny_vq.train.Config(**tiny_vq.train.PRESETS[config.preset])
    tokenizer = VQVAE(
        world.patch,
        of_tokenizer.width,
        of_tokenizer.blocks,
        of_tokenizer.codebook_size,
        of_tokenizer.dim,
    )
    of_policy = pretrain.Config(**pretrain.PRESETS[config.preset])
    policy = pretrain.make_policy(of_policy, world, tokenizer.quantizer.codebook)
    tokenizer = tokenizer.to(device).requires_grad_(False)
    return policy.to(device), Env(tokenizer, world, device, {})


def storages(values):
    """Return {address of its memory: tensor} of the tensors in nested values."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x for x in tensors}


class Allocations(TorchDispatchMode):
    """Add up the bytes of all memory that operations allocate for their results."""

    def __init__(self):
        super().__init__()
        self.results = []  # kept, so that no memory is given out twice
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = storages([self.results, args, kwargs])  # views and changes in place have an old one
        for address, x in storages(result).items():
            if address not in old:
                self.results.append(x)
                self.bytes += x.untyped_storage().nbytes()
        return result


def measure_ours(policy, env, settings, repeats):
    """Return the seconds of decoding, of shaping and of a whole step, and shaping's bytes."""
    batch = training_batch(env, policy, settings, 0)
    # an untrained policy's rewards are equal, and cost nothing to shape
    batch = batch._replace(advantage=torch.randn_like(batch.advantage))
    prompts, _ = encode_scenes(env.world, batch.scenes)
    noise = draw_noise(policy, len(batch.advantage), "bench")
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), 0.0)  # so that the policy stays the same
    calls = dict(
        decoding=lambda: sample_images(env, policy, prompts, noise),
        shaping=lambda: token_advantages(batch, settings),
        step=lambda: train_step(policy, reference, optimizer, env, settings, 0),
    )
    times = {name: median_time(call, env.device, repeats) for name, call in calls.items()}
    with Allocations() as allocations:
        calls["shaping"]()
    return times, allocations.bytes


def floors(config, settings, device):
    """Return what FLOPs, memory traffic and kernels of decoding and of a step would take alone, in
    seconds: {name: three numbers}."""
    preset = load_preset(config.preset)
    machine = cost.measure_machine(preset, device)
    sequences = settings.prompts * settings.group_size
    decode = decoding(preset.shape, settings.prompts, sequences)
    update = learning(preset.shape, sequences, settings.micro_batch, reference=True)
    works = {"decoding": decode, "a step of EG-GRPO": decode + update}
    return {name: cost.floors(work, machine) for name, work in works.items()}


# --- others ---------------------------------------------------------------------------------------


def make_llama(policy):
    """Make a Llama of the policy's shape. Raises ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = policy.config["width"]
    config = LlamaConfig(
        vocab_size=policy.config["codebook_size"] + len(WORDS),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=policy.config["layers"],
        num_attention_heads=policy.config["heads"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def time_transformers(policy, settings, device, repeats):
    """Return the seconds of transformers' generate; None if it is not installed."""
    try:
        model = make_llama(policy).to(device, common.network_dtype(device)).eval()
    except ImportError:
        return None
    sequences = settings.prompts * settings.group_size
    prompt = torch.randint(4, 60, (sequences, policy.S + 1), device=device)
    options = dict(
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=policy.C + policy.L,
        min_new_tokens=policy.C + policy.L,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )
    return median_time(lambda: model.generate(prompt, **options), device, repeats)


def word_tokenizer(size):
    """Make a tokenizer of one word per token. Raises ImportError without transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, size))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def time_trl(policy, settings, device, repeats):
    """Return the seconds of a step of TRL's GRPOTrainer; None if it is not installed."""
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        llama = make_llama(policy)
    except ImportError:
        return None
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    prompt = " ".join(f"w{3 + i}" for i in range(policy.S + 1))
    reward = lambda completions, **_: [float(len(set(text.split()))) for text in completions]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=settings.prompts * settings.group_size,
            num_generations=settings.group_size,
            max_completion_length=policy.C + policy.L,
            generation_kwargs=dict(min_new_tokens=policy.C + policy.L),
            max_steps=repeats + 2,
            beta=settings.beta,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            use_cpu=device.type == "cpu",
            bf16=common.network_dtype(device) == torch.bfloat16,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        llama.save_pretrained(f"{folder}/llama")
        trainer = GRPOTrainer(
            f"{folder}/llama",
            reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt}] * 256),
            processing_class=word_tokenizer(llama.config.vocab_size),
            callbacks=[Clock()],
        )
        trainer.train()
    return statistics.median(after - before for before, after in zip(ends[1:], ends[2:]))


def main(argv=None):
    config = common.parse(Config, {name: {} for name in WORLDS}, __doc__, argv)
    device = common.pick_device(config.device)
    policy, env = make(config, device)
    settings = step_config(config.preset, "eggrpo", config.seed)
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    sequences = settings.prompts * settings.group_size
    print(f"{millions:.2f} M parameters, {sequences} sequences, {policy.C + policy.L} new tokens")

    ours, shaping_bytes = measure_ours(policy, env, settings, config.repeats)
    limits = floors(config, settings, device)
    measured = {
        "decoding": ours["decoding"],
        "decoding, transformers": time_transformers(policy, settings, device, config.repeats),
        "a step of EG-GRPO": ours["step"],
        "a step of GRPO, TRL": time_trl(policy, settings, device, config.repeats),
    }
    rows = []
    for name, value in measured.items():
        took = "not installed" if value is None else f"{value:.3f}"
        rows.append([name, took, *(f"{limit:.3f}" for limit in limits.get(name, ()))])
    head = ["", "seconds", "floor: FLOPs", "memory", "kernels"]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    print(f"\n{markdown_table(head, rows)}\n")
    overhead = f"{1000 * ours['shaping']:.2f} ms of {1000 * ours['step']:.0f} ms per step"
    share = ours["shaping"] / ours["step"]
    print(f"EG-GRPO adds to GRPO: {overhead}, {share:.2%}; {shaping_bytes / 2**20:.2f} MiB")


if __name__ == "__main__":
    common.run(main)
