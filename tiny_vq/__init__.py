"""The image tokenizer: a VQ-VAE, its training, and the loader of a trained one."""

import numpy
import torch

import common
from runs import load_model
from scenes import WORLDS
from tiny_vq.vqvae import VQVAE


def stack_images(images):
    """Stack uint8 arrays (h, w, 3) to one uint8 tensor (B, 3, h, w)."""
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous()


def load_tokenizer(config, device):
    """Read the finished tokenizer of a preset."""
    path = config.out / config.preset / "tokenizer.pt"
    command = common.command_for("tiny_vq.train", config)
    tokenizer, _ = load_model(VQVAE, path, WORLDS[config.preset].origin(), command)
    return tokenizer.to(device)
