"""The pieces of the paper's transformer: RMSNorm, rotary positions, bidirectional attention, SwiGLU.

Shapes: B cells, P tokens, D width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """Gated feed-forward layer W_down (silu(W_gate h) * (W_up h)), without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map ``... × D`` to ``... × D``."""
        return self.down(F.silu(self.gate(h)) * self.up(h))


class RowDropout(nn.Module):
    """Dropout whose draws belong to the places of a minibatch, so that parts of it may be computed apart.

    Draws come from the global random state, for all places of the minibatch; rows read those of their places.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.first, self.n_places = 0, None

    def forward(self, h_BD: Tensor) -> Tensor:
        """Drop numbers of ... × D at random in training, and scale the others up."""
        if not self.training or self.p == 0:
            return h_BD
        keep = torch.rand(self.n_places or len(h_BD), *h_BD.shape[1:], device=h_BD.device) >= self.p
        return h_BD * keep[self.first : self.first + len(h_BD)] / (1 - self.p)


def rotary_angles(
    n_positions: int, head_width: int, device: torch.device, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding, each P × head_width / 2, float32 (Su et al. 2021, arXiv
    2104.09864).
    """
    frequency = base ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angle = torch.arange(n_positions, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BHPd: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (first half, second half) of every head by its position's angle."""
    cos, sin = (a.to(x_BHPd.dtype) for a in angles)
    first, second = x_BHPd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Bidirectional multi-head attention with rotary q and k, no mask, no biases."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h_BPD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Let every token look at every token."""
        q, k, v = self.qkv(h_BPD).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHPd = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return self.out(mixed_BHPd.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block: h + attention(norm h), then h + SwiGLU(norm h)."""

    def __init__(self, width: int, n_heads: int, feedforward_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, n_heads)
        self.feedforward_norm = nn.RMSNorm(width)
        self.feedforward = SwiGLU(width, feedforward_width)

    def forward(self, h_BPD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Map B × P × D to B × P × D."""
        h_BPD = h_BPD + self.attention(self.attention_norm(h_BPD), angles)
        return h_BPD + self.feedforward(self.feedforward_norm(h_BPD))
