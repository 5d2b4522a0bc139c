"""A small convolutional VQ-VAE: images to codes and back.

    (B, 3, h, w) in [0, 1]  -- encode -->  codes (B, L)  -- decode -->  (B, 3, h, w) in [0, 1]

Patches are folded into channels (pixel-unshuffle), so all convolutions run on the token grid. Those
of the encoder are 1x1: it sees one patch at a time, equal patches get equal codes, and the plain
sky is one code. Those of the decoder are 3x3, so that it can draw across patch borders.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .quantizer import Quantizer


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


class VQVAE(nn.Module):
    """patch: pixels per side of a token; width: channels of the convolutions; blocks: residual
    blocks of the decoder; dim: width of a codebook vector."""

    def __init__(self, patch, width, blocks, codebook_size, dim):
        super().__init__()
        self.config = dict(
            patch=patch, width=width, blocks=blocks, codebook_size=codebook_size, dim=dim
        )
        channels = 3 * patch * patch
        self.patch = patch
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
            nn.GELU(),
            nn.Conv2d(width, dim, 1),
        )
        self.quantizer = Quantizer(codebook_size, dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            *(Block(width) for _ in range(blocks)),
            nn.Conv2d(width, channels, 1),
        )
        # What the decoder misses of each code's patches on average: train.py fits it at the end.
        self.register_buffer("residuals", torch.zeros(codebook_size, channels))

    def features(self, images):
        """(B, 3, h, w) -> (B, side, side, dim), before quantization."""
        return self.encoder(F.pixel_unshuffle(images - 0.5, self.patch)).permute(0, 2, 3, 1)

    def pixels(self, features, codes):
        """features (B, side, side, dim), codes (B * side * side,) -> (B, 3, h, w), not yet clamped
        to [0, 1]."""
        patches = self.decoder(features.permute(0, 3, 1, 2))  # (B, channels, side, side)
        residuals = self.residuals[codes].view(*features.shape[:3], -1)
        return F.pixel_shuffle(patches + residuals.permute(0, 3, 1, 2), self.patch) + 0.5

    def forward(self, images):
        """Encode, quantize and decode images, for training. Returns reconstruction (B, 3, h, w),
        features (n, dim), codes (n,) and the commitment loss."""
        z = self.features(images)
        flat = z.reshape(-1, z.shape[-1])
        quantized, codes, commitment = self.quantizer(flat)
        return self.pixels(quantized.view_as(z), codes), flat, codes, commitment

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, h, w) in [0, 1] -> codes (B, L), in raster order."""
        z = self.features(images)
        return self.quantizer.nearest(z.reshape(-1, z.shape[-1])).view(len(images), -1)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, L) -> (B, 3, h, w) in [0, 1]."""
        side = int(codes.shape[1] ** 0.5)
        features = self.quantizer.codebook[codes].view(len(codes), side, side, -1)
        return self.pixels(features, codes.flatten()).clamp(0, 1)
