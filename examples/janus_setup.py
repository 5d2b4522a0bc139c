"""Input and output of janus.py: flags, model, reward, prompts, checkpoint, log, images.

No part of the method is here. User errors raise UserError: one line on stderr, exit status 2.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import platform
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import peft
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import SafetensorError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

LORA_TARGETS = r".*\blanguage_model\..*\.(q|k|v|o|gate|up|down)_proj"  # not the vision tower


class UserError(Exception):
    """An error that the user can correct."""


def check(condition, message):
    if not condition:
        raise UserError(message)


def run(main):
    """Run main. User errors, system errors and memory that runs out print one line to stderr and
    exit with status 2; Ctrl-C exits with status 130."""
    status = 2
    try:
        return main()
    except (UserError, OSError) as error:
        message = f"error: {error}"
    except torch.OutOfMemoryError:
        message = (
            "error: out of memory: lower --micro-batch, then --group-size or --prompts-per-step"
        )
    except KeyboardInterrupt:
        message, status = "interrupted: the same command resumes from the checkpoint", 130
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)


# --- flags ----------------------------------------------------------------------------------------


def flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = flag("", "Janus in transformers format: folder or hub id")
    reward: str = flag("", "CLIP-format model: folder or hub id; or FILE.py:FUNCTION")
    prompts: str = flag("", "text file, one prompt per line")
    out: str = flag("out/janus", "output folder")
    full: bool = flag(False, "train all weights that sample, in float32, instead of LoRA")
    steps: int = flag(1600, "updates")
    prompts_per_step: int = flag(2, "P; the paper has 16")
    group_size: int = flag(8, "G, rollouts per prompt")
    micro_batch: int = flag(4, "sequences per backward pass; does not change the update")
    plan_tokens: int = flag(64, "C, plan tokens at most")
    guidance: float = flag(5.0, "of the image tokens, sampled and scored alike; 1: none")
    lr: float = flag(0.0, "learning rate; 0: 1e-5 with LoRA, 1e-6 with --full")
    beta: float = flag(0.01, "weight of the KL term")
    low_frac: float = flag(0.2, "fraction of tokens without reward gradient")
    high_frac: float = flag(0.5, "fraction of tokens with a bonus")
    kappa: float = flag(1.0, "bonus as a fraction of what exclusion takes away; in (0, 1]")
    lora_rank: int = flag(16, "rank of the adapter")
    max_gap: float = flag(0.0, "mean |logp difference| refused, nats; 0: 1e-3, on CUDA 0.1")
    save_every: int = flag(20, "steps between checkpoints and image grids")
    seed: int = flag(0, "of noise, prompt order and adapter")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")

    @property
    def learning_rate(self):
        return self.lr or (1e-6 if self.full else 1e-5)


NOT_RESULTS = {"out", "steps", "micro_batch", "max_gap", "save_every", "device"}  # may change


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_flags(argv, description):
    """Return the Config of a command line. Raises UserError."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        how = (
            dict(action="store_true")
            if field.type is bool
            else dict(
                type=field.type,
                default=field.default,
                required=field.default == "",
                metavar=field.type.__name__.upper(),
            )
        )
        shown = "required" if field.default == "" else f"default {field.default}"
        parser.add_argument(
            "--" + field.name.replace("_", "-"), help=f"{field.metadata['help']} ({shown})", **how
        )
    config = Config(**vars(parser.parse_args(argv)))
    for name, least in (
        ("group_size", 2),
        ("steps", 1),
        ("prompts_per_step", 1),
        ("micro_batch", 1),
        ("plan_tokens", 1),
        ("lora_rank", 1),
        ("save_every", 1),
        ("lr", 0),
        ("beta", 0),
        ("low_frac", 0),
        ("high_frac", 0),
        ("guidance", 0),
        ("kappa", 0),
        ("max_gap", 0),
    ):
        check(
            getattr(config, name) >= least,
            f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}",
        )
    check(config.low_frac + config.high_frac <= 1, "--low-frac + --high-frac must be at most 1")
    check(
        config.device == "cpu" or config.device.startswith("cuda") and torch.cuda.is_available(),
        f"--device {config.device}: neither cpu nor a CUDA device of this machine",
    )
    return config


def read_prompts(config):
    """Return a function: step -> P prompts. Each epoch has its own order, given by the seed."""
    try:
        text = Path(config.prompts).read_text(encoding="utf-8-sig")  # with or without a mark
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {config.prompts}: not UTF-8 ({error})") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    check(prompts, f"--prompts {config.prompts}: no prompt in it; one per line")

    def of_step(step):
        numbers = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
        return [
            prompts[
                torch.randperm(
                    len(prompts), generator=generator(config.seed, "order", n // len(prompts))
                )[n % len(prompts)]
            ]
            for n in numbers
        ]

    return of_step


def generator(*key):
    """Return a CPU generator for a key such as (seed, "noise", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# --- model and reward -----------------------------------------------------------------------------


class Policy(NamedTuple):
    model: transformers.JanusForConditionalGeneration
    tokenizer: transformers.PreTrainedTokenizerBase
    boi: int  # id of <begin_of_image>
    reference: object = None  # frozen copy; None: the model with its adapter off


def load_pretrained(flag, path, cls, model_type, dtype):
    """Load a model and its tokenizer. Raises UserError if it is another kind or incomplete."""
    try:
        found = transformers.PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        hint = ": use deepseek-community/Janus-Pro-1B" if found == "multi_modality" else ""
        check(found == model_type, f"{flag} {path}: model type {found!r}, not {model_type!r}{hint}")
        model, info = cls.from_pretrained(path, dtype=dtype, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{flag} {path}: {error}") from None
    missing = sorted(name for name in info["missing_keys"])
    check(not missing, f"{flag} {path}: {len(missing)} weights are missing, {missing[:1]}")
    return model.requires_grad_(False).eval(), tokenizer


def load_policy(config):
    """Load Janus: weights in float32 on a CPU or with --full, else bfloat16 with a float32 adapter
    on the language model. Checkpointing is on for training passes."""
    bf16 = config.device != "cpu" and not config.full
    model, tokenizer = load_pretrained(
        "--model",
        config.model,
        transformers.JanusForConditionalGeneration,
        "janus",
        torch.bfloat16 if bf16 else torch.float32,
    )
    boi = tokenizer.convert_tokens_to_ids("<begin_of_image>")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, boi)
    check(
        None not in ids and boi != tokenizer.unk_token_id,
        f"--model {config.model}: its tokenizer lacks BOS, EOS, pad or <begin_of_image>",
    )
    text = "Describe this"  # some releases of transformers lose this tokenizer's spaces
    check(
        tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text,
        f"--model {config.model}: its tokenizer does not restore {text!r}; install the pinned "
        "transformers",
    )
    model.model.vqmodel.float()
    model.to(config.device)
    reference = (
        copy.deepcopy(model).to(torch.bfloat16 if config.device != "cpu" else torch.float32)
        if config.full and config.beta
        else None
    )
    if config.full:
        inner = model.model
        for part in (
            inner.language_model,
            model.lm_head,
            inner.generation_head,
            inner.generation_embeddings,
            inner.generation_aligner,
        ):
            part.requires_grad_(True)
    else:
        add_adapter(model, config)
    model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return Policy(model, tokenizer, boi, reference)


def add_adapter(model, config):
    """Add LoRA weights in float32 to the language model; all others are frozen."""
    torch.manual_seed(config.seed)
    model.add_adapter(
        peft.LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=LORA_TARGETS
        )
    )
    for weight in trained_weights(model).values():
        weight.data = weight.data.float()


def trained_weights(model):
    """Return {name: parameter} of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_reward(config):
    """Return a function: images (B, 3, h, w) in [0, 1], B prompts -> (B,)."""
    path, _, name = config.reward.rpartition(":")
    if path.endswith(".py"):
        try:
            function = runpy.run_path(path).get(name)
        except (OSError, SyntaxError) as error:
            raise UserError(f"--reward {config.reward}: {error}") from None
        check(callable(function), f"--reward {config.reward}: no function {name!r} in {path}")
        return function
    model, tokenizer = load_pretrained(
        "--reward", config.reward, transformers.CLIPModel, "clip", torch.float32
    )
    model.to(config.device)
    size, words = model.config.vision_config.image_size, model.config.text_config
    mean, std = (
        torch.tensor(x, device=config.device).view(1, 3, 1, 1)
        for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )

    def clip_similarity(images, prompts):
        pixels = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = tokenizer(
            prompts,
            padding=True,
            truncation=True,
            return_tensors="pt",
            max_length=words.max_position_embeddings,
        ).to(config.device)
        out = model(pixel_values=(pixels - mean) / std, **tokens)
        return F.cosine_similarity(out.image_embeds, out.text_embeds)

    return clip_similarity


@torch.no_grad()
def call_reward(reward, images, prompts):
    """Return rewards (B,), float32. Raises UserError if they are no numbers, the shape is wrong or
    one is not finite."""
    value = reward(images, prompts)
    try:
        rewards = torch.as_tensor(value, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"the reward returned a {type(value).__name__}, not one number per image"
        raise UserError(f"{message}: {error}") from None
    check(
        rewards.shape == (len(prompts),),
        f"the reward returned shape {tuple(rewards.shape)}, "
        f"not {(len(prompts),)}: one number per image",
    )
    check(rewards.isfinite().all(), "the reward returned NaN or infinity")
    return rewards


# --- files ----------------------------------------------------------------------------------------


def settings(config):
    """Return the fields that decide results."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_RESULTS}


def save_checkpoint(policy, optimizer, config, step):
    """Write the trained weights and the optimizer to a temporary name, then rename it."""
    path = Path(config.out) / "policy.pt"
    torch.save(
        dict(
            step=step,
            settings=settings(config),
            weights=trained_weights(policy.model),
            optimizer=optimizer.state_dict(),
        ),
        f"{path}.tmp",
    )
    os.replace(f"{path}.tmp", path)


def restore(policy, optimizer, config):
    """Load policy.pt if it is there. Returns the number of steps done. Raises UserError if it was
    made with other settings."""
    path = Path(config.out) / "policy.pt"
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        changed = [k for k, v in settings(config).items() if saved["settings"][k] != v]
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError):
        raise UserError(f"{path} is not a checkpoint of this command: remove it") from None
    check(
        not changed,
        f"{path} was made with another --{', --'.join(changed)}: choose another --out or remove it",
    )
    for name, weight in trained_weights(policy.model).items():
        weight.data.copy_(saved["weights"][name])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def check_out(config):
    """Raise UserError if --out holds the log of a run with other settings."""
    path = Path(config.out) / "log.jsonl"
    if not path.exists():
        return
    try:
        of_log = json.loads(path.read_text().split("\n")[0])["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a log of this command: choose another --out") from None
    changed = [name for name, value in settings(config).items() if of_log.get(name) != value]
    check(not changed, f"{path} is of another --{', --'.join(changed)}: choose another --out")


def start_log(config, first):
    """Begin log.jsonl with config, versions, device and seed, or drop steps that run again."""
    path, device = Path(config.out) / "log.jsonl", config.device
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dict(
        config=dataclasses.asdict(config),
        seed=config.seed,
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            peft=peft.__version__,
            transformers=transformers.__version__,
        ),
        device=device if device == "cpu" else torch.cuda.get_device_name(),
    )
    lines = [json.dumps(header)]
    if first and path.exists():
        lines = [line for line in path.read_text().splitlines() if step_of(line) < first]
    path.write_text("".join(line + "\n" for line in lines))


def step_of(line):
    try:
        return json.loads(line).get("step", -1)
    except json.JSONDecodeError:  # torn by a kill: its step runs again
        return sys.maxsize


def write_log(config, **record):
    with open(Path(config.out) / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def save_images(path, images, columns):
    """Write images (B, 3, h, w) in [0, 1] as one PNG, a prompt per row."""
    b, _, h, w = images.shape
    grid = images.view(b // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(b // columns * h, columns * w, 3) * 255).round().byte().cpu().numpy()
    Image.fromarray(numpy.ascontiguousarray(pixels)).save(path)
