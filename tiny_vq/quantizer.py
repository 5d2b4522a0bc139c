"""Vector quantization: nearest neighbour in a codebook that is trained by moving averages (van den
Oord et al., 2017, appendix A.1)."""

import torch
import torch.nn.functional as F
from torch import nn


class Quantizer(nn.Module):
    """Replace each vector by the nearest of V codebook entries.

    Entry i is the mean of the vectors assigned to it, with decay m, counts n_i and sums s_i:
        n_i <- m n_i + (1 - m) |assigned|
        s_i <- m s_i + (1 - m) sum(assigned)
        entry_i = s_i / n_i
    An entry to which almost nothing is assigned is dead, see `restart`.
    """

    def __init__(self, codebook_size, dim, decay=0.98):
        super().__init__()
        self.decay = decay
        entries = torch.randn(codebook_size, dim)
        self.register_buffer("codebook", entries)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", entries.clone())

    def nearest(self, z):
        """(n, dim) -> (n,) index of the nearest entry."""
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and the first term is the same for every entry
        return (self.codebook.square().sum(1) - 2 * z @ self.codebook.t()).argmin(1)

    def forward(self, z):
        """Quantize z: (n, dim). Returns straight-through vectors (n, dim), whose value is the
        entry's and whose gradient passes to z unchanged, codes (n,) and the commitment loss."""
        codes = self.nearest(z)
        entries = self.codebook[codes]
        commitment = F.mse_loss(z, entries)
        return z + (entries - z).detach(), codes, commitment

    @torch.no_grad()
    def update(self, z, codes):
        """Move the entries toward the vectors assigned to them. z: (n, dim), codes: (n,)."""
        ones = torch.ones_like(z[:, 0])
        self.counts.mul_(self.decay).index_add_(0, codes, (1 - self.decay) * ones)
        self.sums.mul_(self.decay).index_add_(0, codes, (1 - self.decay) * z)
        counts = self.counts.clamp(min=1e-5)
        self.codebook.copy_(self.sums / counts[:, None])

    @torch.no_grad()
    def restart(self, z, codes, generator, min_count=0.3):
        """Move dead entries, those with a count below `min_count` vectors per batch, onto vectors
        of z (n, dim), drawn with probability proportional to the squared distance from the entry of
        their codes (n,), as k-means++ does: frequent vectors, such as the background's, have one
        already."""
        dead = (self.counts < min_count).nonzero()[:, 0]
        if len(dead) == 0:
            return
        error = (z - self.codebook[codes]).square().sum(1).cpu() + 1e-12
        chosen = torch.multinomial(error, len(dead), True, generator=generator).to(z.device)
        self.codebook[dead] = z[chosen]
        self.sums[dead] = z[chosen]
        self.counts[dead] = 1.0
