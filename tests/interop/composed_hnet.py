"""H-Net in PyTorch under the names of github.com/goombalab/hnet, from reference facts and the paper (arXiv 2507.07955) alone: the
authors' own code wants CUDA. Everything runs token by token and chunk by chunk, in float32. With some seeds
float32 is 4e-4 away from float64 here; tiny.json has one where it is 3e-5."""

import re

import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Mamba2(nn.Module):
    """[z | x, B, C | dt], one group, heads of 64; the gate before the norm."""

    def __init__(self, width: int, ssm: dict):
        super().__init__()
        self.inner, self.state = ssm["expand"] * width, ssm["d_state"]
        self.heads, channels = self.inner // 64, self.inner + 2 * self.state
        self.in_proj = nn.Linear(width, self.inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, ssm["d_conv"], groups=channels, padding=ssm["d_conv"] - 1)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(self.heads)) for _ in range(3))
        self.norm, self.out_proj = Norm(self.inner), nn.Linear(self.inner, width, bias=False)

    def forward(self, x):
        T = len(x)
        z, xBC, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.state, self.heads], -1)
        x, B, C = F.silu(self.conv1d(xBC.T)[:, :T].T).split([self.inner, self.state, self.state], -1)
        x, dt = x.unflatten(-1, (self.heads, 64)), F.softplus(dt + self.dt_bias)
        memory, rows = torch.zeros(self.heads, 64, self.state), []
        for t in range(T):
            decay = torch.exp(-self.A_log.exp() * dt[t])[:, None, None]
            memory = decay * memory + (dt[t][:, None] * x[t])[..., None] * B[t]
            rows.append(memory @ C[t] + self.D[:, None] * x[t])
        return self.out_proj(self.norm(torch.stack(rows).flatten(1) * F.silu(z)))


class Attention(nn.Module):
    """Causal, within a window of ``window`` tokens before a token; the first channels of a head turn."""

    def __init__(self, width: int, heads: int, turning: int, window: int):
        super().__init__()
        self.heads, self.turning, self.window = heads, turning, window
        self.Wqkv, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def turned(self, x):
        half = self.turning // 2
        angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b, rest = x.split([half, half, x.shape[-1] - self.turning], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.Wqkv(x).chunk(3, -1))
        back = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden = (back < 0) | ((back > self.window) if self.window >= 0 else torch.zeros_like(back, dtype=torch.bool))
        scores = torch.einsum("ihk,jhk->hij", self.turned(q), self.turned(k)) * q.shape[-1] ** -0.5
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.out_proj(torch.einsum("hij,jhk->ihk", p, v).flatten(1))


class SwiGLU(nn.Module):
    """[up | gate], the width a multiple of 128."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        hidden = -(-hidden // 128) * 128
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        up, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, kind: str, c, stage: int):
        super().__init__()
        width = c.d_model[stage]
        self.norm1 = Norm(width)
        names = ("num_heads", "rotary_emb_dim", "window_size")
        mamba = kind in "mM"
        self.mixer = Mamba2(width, c.ssm_cfg) if mamba else Attention(width, *(c.attn_cfg[n][stage] for n in names))
        if kind.isupper():
            self.norm2, self.mlp = Norm(width), SwiGLU(width, c.d_intermediate[stage])

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x)) if hasattr(self, "mlp") else x


class Stack(nn.Module):
    def __init__(self, letters: str, c, stage: int):
        super().__init__()
        kinds = [kind for kind, count in re.findall(r"([mMtT])(\d+)", letters) for _ in range(int(count))]
        self.layers, self.rmsnorm = nn.ModuleList(Block(kind, c, stage) for kind in kinds), Norm(c.d_model[stage])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.rmsnorm(x)


class Router(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj_layer, self.k_proj_layer = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x):
        cosine = F.cosine_similarity(self.q_proj_layer(x[:-1]), self.k_proj_layer(x[1:]), dim=-1)
        return torch.cat([torch.ones(1), ((1 - cosine) / 2).clamp(0, 1)])


class Network(nn.Module):
    """Encoder, chunks, what runs over them, back to tokens, decoder; innermost, one stack."""

    def __init__(self, layout: list, c, stage: int):
        super().__init__()
        width = c.d_model[stage]
        if stage and width > c.d_model[stage - 1]:
            self.pad_dimension = nn.Parameter(torch.zeros(width - c.d_model[stage - 1]))
        if len(layout) == 1:
            self.main_network = Stack(layout[0], c, stage)
            return
        self.encoder, self.decoder = (Stack(letters, c, stage) for letters in (layout[0], layout[2]))
        self.routing_module, self.residual_proj = Router(width), nn.Linear(width, width)
        self.main_network = Network(layout[1], c, stage + 1)

    def forward(self, x):
        T, D = x.shape
        if hasattr(self, "pad_dimension"):
            x = torch.cat([x, self.pad_dimension.expand(T, -1)], -1)
        if not hasattr(self, "encoder"):
            return self.main_network(x)[:, :D]
        x = self.encoder(x)
        p = self.routing_module(x)
        begins = p > 0.5
        z, means, mean = self.main_network(x[begins]), [], torch.zeros(x.shape[-1])
        for weight, row in zip(p[begins].clamp(1e-4, 1 - 1e-4), z, strict=True):
            mean = weight * row + (1 - weight) * mean
            means.append(mean)
        # Multiplied by 1, the confidence in what was chosen: it has a gradient alone.
        return self.decoder(torch.stack(means)[begins.cumsum(0) - 1] + self.residual_proj(x))[:, :D]
