"""The image tokenizer: a VQ-VAE, its training, and the loader of a trained one."""

import numpy
import torch

import checkpoint
import common
from tiny_vq.vqvae import VQVAE


def stack_images(images):
    """Stack uint8 arrays (h, w, 3) to one uint8 tensor (B, 3, h, w)."""
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous()


def load_tokenizer(preset, out="out", device="cpu"):
    """Read the finished tokenizer of a preset. Returns the frozen model."""
    command = common.command_for("-m tiny_vq.train", preset, out)
    path = f"{out}/{preset}/tokenizer.pt"
    return checkpoint.load_model(VQVAE, path, "tokenizer", preset, command, device)[0]
