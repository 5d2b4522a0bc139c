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


def flag(default, text, low=0, high=2**31 - 1):
    """Make a field; low and high are the range of a number."""
    return dataclasses.field(default=default, metadata=dict(help=text, low=low, high=high))


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = flag("", "Janus in transformers format: folder or hub id")
    reward: str = flag("", "CLIP-format model: folder or hub id; or FILE.py:FUNCTION")
    prompts: str = flag("", "text file, one prompt per line")
    out: str = flag("out/janus", "output folder")
    full: bool = flag(False, "train all weights that sample, in float32, instead of LoRA")
    steps: int = flag(1600, "updates", low=1)
    prompts_per_step: int = flag(2, "P; the paper has 16", low=1)
    group_size: int = flag(8, "G, rollouts per prompt", low=2)
    micro_batch: int = flag(4, "sequences per backward pass; does not change the update", low=1)
    plan_tokens: int = flag(64, "C, plan tokens at most", low=1)
    guidance: float = flag(5.0, "of the image tokens, sampled and scored alike; 1: none")
    lr: float = flag(0.0, "learning rate; 0: 1e-5 with LoRA, 1e-6 with --full", high=1)
    beta: float = flag(0.01, "weight of the KL term")
    low_frac: float = flag(0.2, "fraction of tokens without reward gradient", high=1)
    high_frac: float = flag(0.5, "fraction of tokens with a bonus", high=1)
    kappa: float = flag(1.0, "bonus as a fraction of what exclusion takes away; in (0, 1]")
    lora_rank: int = flag(16, "rank of the adapter", low=1)
    max_gap: float = flag(0.0, "mean |logp difference| refused, nats; 0: 1e-3, on CUDA 0.1")
    save_every: int = flag(20, "steps between checkpoints and image grids", low=1)
    seed: int = flag(0, "of noise, prompt order and adapter")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")

    @property
    def learning_rate(self):
        return self.lr or (1e-6 if self.full else 1e-5)


NOT_RESULTS = {"out", "steps", "micro_batch", "max_gap", "save_every", "device"}  # may change


def to_flag(name):
    return "--" + name.replace("_", "-")


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
        about = field.metadata["help"]
        if field.type is bool:
            parser.add_argument(to_flag(field.name), action="store_true", help=about)
            continue
        is_required = field.default == ""
        shown = "required" if is_required else f"default {field.default}"
        parser.add_argument(
            to_flag(field.name),
            type=field.type,
            default=field.default,
            required=is_required,
            metavar=field.type.__name__.upper(),
            help=f"{about} ({shown})",
        )
    values = vars(parser.parse_args(argv))
    config = Config(**values)
    for field in dataclasses.fields(Config):
        if field.type in (int, float):
            value = values[field.name]
            low = field.metadata["low"]
            high = field.metadata["high"]
            message = f"{to_flag(field.name)} {value}: must be from {low} to {high}"
            check(low <= value <= high, message)  # NaN is not
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
        first = step * config.prompts_per_step
        picked = []
        for n in range(first, first + config.prompts_per_step):
            epoch, place = divmod(n, len(prompts))
            rng = generator(config.seed, "order", epoch)
            order = torch.randperm(len(prompts), generator=rng)
            picked.append(prompts[order[place]])
        return picked

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
        message = f"{flag} {path}: model type {found!r}, not {model_type!r}{hint}"
        check(found == model_type, message)
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
    reference = None
    if config.full and config.beta:
        dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
        reference = copy.deepcopy(model).to(dtype)
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
        sys.path.append(str(Path(path).resolve().parent))  # for what the file imports
        try:
            function = runpy.run_path(path).get(name)
        except (OSError, SyntaxError, ImportError) as error:
            raise UserError(f"--reward {config.reward}: {error}") from None
        check(callable(function), f"--reward {config.reward}: no function {name!r} in {path}")
        return function
    model, tokenizer = load_pretrained(
        "--reward", config.reward, transformers.CLIPModel, "clip", torch.float32
    )
    model.to(config.device)
    size = model.config.vision_config.image_size
    words = model.config.text_config.max_position_embeddings
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=config.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=config.device).view(3, 1, 1)

    def clip_similarity(images, prompts):
        pixels = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels = (pixels.clamp(0, 1) - mean) / std
        tokens = tokenizer(
            prompts,
            padding=True,
            truncation=True,
            return_tensors="pt",
            max_length=words,
        ).to(config.device)
        out = model(pixel_values=pixels, **tokens)
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
    path = Path(config.out) / "log.jsonl"
    device = config.device
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
        kept = path.read_text().splitlines()
        lines = [line for line in kept if step_of(line) < first]
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
    rows = b // columns
    grid = images.view(rows, columns, 3, h, w)
    grid = grid.permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, 3)
    grid = grid.reshape(rows * h, columns * w, 3)
    pixels = (grid * 255).round().byte()
    pixels = numpy.ascontiguousarray(pixels.cpu().numpy())
    Image.fromarray(pixels).save(path)
