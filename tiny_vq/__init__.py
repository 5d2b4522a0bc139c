"""The image tokenizer: a VQ-VAE, its training, and the loader of a trained one."""

import numpy
import torch

import common
from scenes import WORLDS
from tiny_vq.vqvae import VQVAE


def stack_images(images):
    """Stack uint8 arrays (h, w, 3) to one uint8 tensor (B, 3, h, w)."""
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous()


def load_tokenizer(config, device):
    """Read the finished tokenizer of a preset. Returns the frozen model, and {file: digest} of what
    later stages are made from: the world and the tokenizer."""
    path = f"{config.out}/{config.preset}/tokenizer.pt"
    command = common.command_for("tiny_vq.train", config)
    record = common.load_finished(path, "tokenizer", config.preset, command)
    made_from = WORLDS[config.preset].made_from()
    common.check_made_from(path, record, made_from, command)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        tokenizer = VQVAE(**record["model_config"])
    tokenizer.load_state_dict(record["model"])
    made_from["tokenizer.pt"] = common.digest(record["model"])
    return tokenizer.to(device).requires_grad_(False), made_from
