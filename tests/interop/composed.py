"""References of families without a class in transformers, put together from its parts under the names of the hub.

H-Net is ``composed_hnet``'s. Every other is a Llama with other feed-forward layers, and where its paper or its published code says so other scales and norms:
DeepSeekMoE 16B (arXiv 2401.06066), MiniCPM-MoE (arXiv 2404.06395) and Grok-1 (github.com/xai-org/grok-1, Apache 2.0).
They compute a token at a time in the feed-forward layers and know no cache.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from composed_hnet import Network
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama


class Config(SimpleNamespace):
    """A config.json as the hub has it."""

    def __init__(self, **hub):
        super().__init__(**hub)
        self.hub = hub

    @classmethod
    def from_pretrained(cls, directory: str):
        return cls(**json.loads(Path(directory, "config.json").read_text()))


class Composed(nn.Module):
    """Loads and saves like a model of transformers."""

    def save_pretrained(self, directory: str) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state().items()}, f"{directory}/model.safetensors"
        )
        Path(directory, "config.json").write_text(json.dumps({**self.config.hub, "dtype": "float32"}))

    @classmethod
    def from_pretrained(cls, directory: str, output_loading_info: bool = True, **options):
        model = cls(Config.from_pretrained(directory))
        state, stored = model.state(), load_file(f"{directory}/model.safetensors")
        for name in set(state) & set(stored):
            state[name].copy_(stored[name])
        return model, {"missing_keys": set(state) - set(stored), "unexpected_keys": set(stored) - set(state)}

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters under the names of the hub."""
        return {name: parameter.data for name, parameter in self.named_parameters()}


def experts_sum(x, weights, indices, experts):
    """Every token's experts one by one."""
    rows = []
    for token, ws, chosen in zip(x, weights, indices, strict=True):
        rows.append(sum(w * experts[int(e)](token) for w, e in zip(ws, chosen, strict=True)))
    return torch.stack(rows)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, names=("gate_proj", "up_proj", "down_proj")):
        super().__init__()
        self.names = names
        for name, sizes in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
            self.add_module(name, nn.Linear(*sizes, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class DeepseekExperts(nn.Module):
    """Softmax over all, the best few as they are or, where the hub's code is told to, adding up to one, and the shared ones as
    one (§3.2, eq. 9 to 11)."""

    def __init__(self, c):
        super().__init__()
        self.per_token, self.renormalise = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(MLP(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x):
        weights, indices = torch.topk(self.gate(x[0]).softmax(-1), self.per_token)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts_sum(x[0], weights, indices, self.experts)[None] + self.shared_experts(x)


class MiniCPMExperts(nn.Module):
    """As Mixtral's."""

    def __init__(self, c):
        super().__init__()
        self.per_token = c.num_experts_per_tok
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        names = ("w1", "w3", "w2")
        self.experts = nn.ModuleList(MLP(c.hidden_size, c.intermediate_size, names) for _ in range(c.num_experts))

    def forward(self, x):
        weights, indices = torch.topk(self.gate(x[0]).softmax(-1), self.per_token)
        return experts_sum(x[0], weights / weights.sum(-1, keepdim=True), indices, self.experts)[None]


class GrokExperts(nn.Module):
    """``MoELayer`` over ``DenseBlock`` of model.py: a gate of GELU's tanh form, weights not normalised again."""

    def __init__(self, c):
        super().__init__()
        m = c.model
        D, E = m["emb_size"], m["num_experts"]
        hidden = int(m["widening_factor"] * D) * 2 // 3
        hidden += -hidden % 8
        self.per_token = m["num_selected_experts"]
        self.router = nn.Parameter(torch.zeros(D, E))
        self.linear, self.linear_v = (nn.Parameter(torch.zeros(E, D, hidden)) for _ in range(2))
        self.linear_1 = nn.Parameter(torch.zeros(E, hidden, D))

    def forward(self, x):
        weights, indices = torch.topk((x[0] @ self.router).softmax(-1), self.per_token)

        def expert(e):
            def run(token):
                gate = nn.functional.gelu(token @ self.linear[e], approximate="tanh")
                return (gate * (token @ self.linear_v[e])) @ self.linear_1[e]

            return run

        return experts_sum(x[0], weights, indices, [expert(e) for e in range(len(self.linear))])[None]


class Layer(nn.Module):
    """Pre-norm branches, each scaled; Grok's norms after them as well."""

    def __init__(self, c: LlamaConfig, index: int, mlp: nn.Module, scale: float = 1.0, sandwich: bool = False):
        super().__init__()
        norm = llama.LlamaRMSNorm
        self.self_attn, self.mlp, self.scale = llama.LlamaAttention(c, index), mlp, scale
        self.input_layernorm = norm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = norm(c.hidden_size, eps=c.rms_norm_eps)
        self.after = nn.ModuleList(norm(c.hidden_size, eps=c.rms_norm_eps) for _ in range(2 if sandwich else 0))

    def forward(self, x, mask, turning):
        a = self.self_attn(self.input_layernorm(x), attention_mask=mask, position_embeddings=turning)[0]
        x = x + self.scale * (self.after[0](a) if self.after else a)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + self.scale * (self.after[1](y) if self.after else y)


class Decoder(Composed):
    """Embedding, layers, norm, head."""

    def __init__(self, config: Config, c: LlamaConfig, layers, tied: bool, scales: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        self.config, self.scales, self.tied = config, scales, tied
        c._attn_implementation = "eager"
        self.turning = llama.LlamaRotaryEmbedding(c)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = llama.LlamaRMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        if not tied:
            self.lm_head = nn.Linear(c.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, use_cache: bool = False):
        T = tokens.shape[1]
        x = self.model.embed_tokens(tokens) * self.scales[0]
        turning = self.turning(x, torch.arange(T)[None])
        mask = torch.full((T, T), torch.finfo(x.dtype).min).triu(1)[None, None]
        for layer in self.model.layers:
            x = layer(x, mask, turning)
        head = self.model.embed_tokens if self.tied else self.lm_head
        return SimpleNamespace(logits=self.model.norm(x) @ head.weight.T * self.scales[1])


class DeepseekForCausalLM(Decoder):
    def __init__(self, config: Config):
        c = LlamaConfig(**{name: value for name, value in config.hub.items() if name in LLAMA})
        layers = []
        for n in range(config.num_hidden_layers):
            dense = n < config.first_k_dense_replace
            mlp = MLP(config.hidden_size, config.intermediate_size) if dense else DeepseekExperts(config)
            layers.append(Layer(c, n, mlp))
        super().__init__(config, c, layers, tied=config.tie_word_embeddings)


class MiniCPMForCausalLM(Decoder):
    """Embeddings, branches and the input of the head are scaled (§3 of the paper: Tensor Program)."""

    def __init__(self, config: Config):
        c = LlamaConfig(**{name: value for name, value in config.hub.items() if name in LLAMA})
        scale = config.scale_depth / math.sqrt(config.num_hidden_layers)
        width, hidden = config.hidden_size, config.intermediate_size
        layers = [
            Layer(c, n, MiniCPMExperts(config) if config.num_experts else MLP(width, hidden), scale)
            for n in range(config.num_hidden_layers)
        ]
        scales = config.scale_emb, config.dim_model_base / config.hidden_size
        super().__init__(config, c, layers, tied=True, scales=scales)


class Grok1(Decoder):
    """``LanguageModel`` of model.py; matrices are stored [in, out]."""

    def __init__(self, config: Config):
        m = config.model
        c = LlamaConfig(
            hidden_size=m["emb_size"],
            num_attention_heads=m["num_q_heads"],
            num_key_value_heads=m["num_kv_heads"],
            head_dim=m["key_size"],
            rms_norm_eps=1e-5,
        )
        layers = [Layer(c, n, GrokExperts(config), sandwich=True) for n in range(m["num_layers"])]
        for layer in layers:
            layer.self_attn = GrokAttention(m)
        scales = config.embedding_multiplier_scale, config.output_multiplier_scale
        super().__init__(config, c, layers, tied=True, scales=scales)

    def state(self):
        state = {
            "language_model/in_out_embed/embeddings": self.model.embed_tokens.weight,
            "language_model/rms_norm/scale": self.model.norm.weight,
        }
        for n, layer in enumerate(self.model.layers):
            prefix = f"transformer/decoder_layer_{n}/"
            norms = layer.input_layernorm, layer.after[0], layer.post_attention_layernorm, layer.after[1]
            for i, norm in enumerate(norms):
                state[f"{prefix}rms_norm{f'_{i}' if i else ''}/scale"] = norm.weight
            for name, parameter in layer.self_attn.named_parameters():
                state[f"{prefix}multi_head_attention/{name}/w"] = parameter
            state[f"{prefix}router/w"] = layer.mlp.router
            for name in ("linear", "linear_v", "linear_1"):
                state[f"{prefix}moe/{name}/w"] = getattr(layer.mlp, name)
        return {name: parameter.data for name, parameter in state.items()}


class HNetForCausalLM(Composed):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model[0])
        self.backbone = Network(config.arch_layout, config, 0)
        self.lm_head = nn.Linear(config.d_model[0], config.vocab_size, bias=False)

    def forward(self, tokens, use_cache: bool = False):
        return SimpleNamespace(logits=self.lm_head(self.backbone(self.embeddings(tokens[0])))[None])


class GrokAttention(nn.Module):
    """``MultiHeadAttention`` of model.py: scores are multiplied, then held within ±30 by a tanh."""

    def __init__(self, m):
        super().__init__()
        self.m = m
        D, K = m["emb_size"], m["key_size"]
        self.query = nn.Parameter(torch.zeros(D, m["num_q_heads"] * K))
        self.key, self.value = (nn.Parameter(torch.zeros(D, m["num_kv_heads"] * K)) for _ in range(2))
        self.linear = nn.Parameter(torch.zeros(m["num_q_heads"] * K, D))

    def forward(self, x, attention_mask, position_embeddings):
        heads = self.m["num_q_heads"], self.m["num_kv_heads"], self.m["num_kv_heads"]
        projected = zip((self.query, self.key, self.value), heads, strict=True)
        q, k, v = ((x @ w).unflatten(-1, (count, -1)).transpose(1, 2) for w, count in projected)
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = (y.repeat_interleave(heads[0] // heads[1], dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) * self.m["attn_output_multiplier"]
        p = (30 * torch.tanh(scores / 30) + attention_mask).softmax(-1)
        return ((p @ v).transpose(1, 2).flatten(2) @ self.linear,)


# Keys that mean the same in LlamaConfig.
LLAMA = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling",
    "attention_bias",
)  # fmt: skip
