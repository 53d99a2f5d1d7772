"""A decoder of stickjax in PyTorch. `stickjax convert RUN OUT --remote-code` copies this file into the folder OUT.

    model = transformers.AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)

This file needs torch and transformers, not jax or stickjax. The entry `model` of config.json is the config of the
decoder: the fields of `stickjax.ModelConfig`, such as `rope_theta`. In this file, `c` is this config. The sizes have
letters: B is the number of sequences, T the number of tokens in this call, and S the number of tokens in this call and
in the cache together. N is the number of query heads, K the number of key/value heads, G = N / K, and H the width of a
head. D is the width of the residual stream, F the hidden width of a feed-forward network, E the number of experts, k
the number of experts that each token uses, and V the size of the vocabulary. Normalisations, rotary positions, routers,
weighted sums over experts, and stick-breaking attention are computed in float32.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_stickjax import StickjaxConfig

# The name of the output's keys and values: `cache` in newer versions of transformers, `past_key_values` in older ones.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
TILE = 2**18  # (query, key) pairs per head whose weights are in memory at a time; a block has at least 64 keys
NOTHING = -1e30  # the logit of a key that a query does not see: its weight is 0
ACTIVATIONS = {
    "swiglu": functional.silu, "geglu": nn.GELU("tanh"), "reglu": functional.relu, "gelu": functional.gelu,
    "gelu_tanh": nn.GELU("tanh"), "relu": functional.relu, "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
}  # fmt: skip
GATED = ("swiglu", "geglu", "reglu")


class Context(NamedTuple):
    """What all layers share in one call of the model.

    `token_mask` [B,S]: False for padding. `positions` [B,T]: the rotary positions of the tokens of this call, counted
    from the first token that is not padding. `cache`: the keys and values of earlier tokens, or None.
    """

    token_mask: torch.Tensor
    positions: torch.Tensor
    cache: DynamicCache | None


def matrices(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(shape))


class Norm(nn.Module):
    """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * weight. With `bias`, a LayerNorm."""

    def __init__(self, *shape: int, eps: float, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x):
        y = x.float()
        if self.bias is not None:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def rotary(x, positions, c):
    """Rotate the channels i and i + H/2 of x [B,T,heads,H] by the angle position * theta^(-2i/H).

    theta is `rope_theta`. `rope_scaling` reduces all frequencies (linear), or only the low frequencies (llama3).
    """
    half, s = x.shape[-1] // 2, c.rope_scaling
    frequency = c.rope_theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    if s.kind == "linear":
        frequency = frequency / s.factor
    if s.kind == "llama3":
        turns = s.original_T * frequency / (2 * math.pi)
        kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / s.factor)
    angle = positions[..., None, None].float() * frequency
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.float().split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def visible(c, token_mask, T: int, rows: slice, keys: slice):
    """Return a mask [B,1,rows,keys]: True where a query of the slice `rows` sees a key of the slice `keys`.

    The T queries belong to the last T of the S tokens. A query sees the keys to its left, at most `window` tokens away
    (None: at any distance). It sees its own key in softmax attention and with `attend_current`.
    """
    S, device = token_mask.shape[1], token_mask.device
    distance = torch.arange(S - T, S, device=device)[rows, None] - torch.arange(S, device=device)[keys]
    seen = distance >= (0 if c.attention == "softmax" or c.attend_current else 1)
    if c.window is not None:
        seen &= distance <= c.window
    return (seen & token_mask[:, None, keys])[:, None]


def softmax_attention(c, q, k, v, token_mask):
    """Compute causal softmax attention of q [B,N,T,H] to k and v [B,K,S,H]. Return [B,N,T,H]."""
    N, T, S = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(N // x.shape[1], 1) for x in (k, v))
    mask = visible(c, token_mask, T, slice(0, T), slice(0, S))
    mask = mask | torch.eye(S, dtype=torch.bool, device=q.device)[S - T :]  # without it, padding would give 0 / 0
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c.attention_scale)


def stick_breaking(c, q, k, v, token_mask):
    """Compute stick-breaking attention of q [B,N,T,H] to k and v [B,K,S,H]. Return (out [B,N,T,H], rest [B,N,T]).

    A query walks from the nearest key to the left, and breaks the share beta = sigmoid(scale * q.k) off the rest of its
    stick at every key. So the weight of a key is beta times the product of 1 - beta over all nearer keys. `rest` is
    what remains after all keys. The loop goes over blocks of keys from right to left, and keeps only the logarithm of
    the rest. So the memory grows linearly with the number of tokens.
    """
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    q = c.attention_scale * q.float().reshape(B, K, N // K, T, H)
    out, log_rest = torch.zeros_like(q), torch.zeros_like(q[..., 0])
    block = max(64, TILE // T)
    for stop in range(S, 0, -block):
        keys = slice(max(0, stop - block), stop)
        rows = slice(max(0, keys.start - (S - T)), T)  # the queries before them see none of these keys
        z = torch.einsum("BKGTH,BKSH->BKGTS", q[..., rows, :], k[:, :, keys].float())
        z = z.masked_fill(~visible(c, token_mask, T, rows, keys)[:, None], NOTHING)
        decay = functional.softplus(z)  # -log(1 - beta)
        nearer = functional.pad(decay.flip(-1).cumsum(-1), (1, -1)).flip(-1)  # the sum over the nearer keys
        weights = torch.exp(functional.logsigmoid(z) - nearer + log_rest[..., rows, None])
        out[..., rows, :] += torch.einsum("BKGTS,BKSH->BKGTH", weights, v[:, :, keys].float())
        log_rest[..., rows] -= decay.sum(-1)
    return out.reshape(B, N, T, H).to(v.dtype), log_rest.exp().reshape(B, N, T)


def attention(c, layer: int, q, k, v, context: Context, head_bias=None):
    """Return the outputs of the heads [B,T,N,H] for the queries q [B,T,N,H] and the new keys and values [B,T,K,H].

    `layer` is the index of the layer in the cache. Stick-breaking attention can add rest * r to an output, where rest
    is what remains of the stick. `remainder` chooses r: the token's own value (value), or `head_bias` [N,H] (bias).
    """
    own = v
    if c.attention == "softmax" and c.rope_theta is not None:
        q, k = (rotary(x, context.positions, c) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if context.cache is not None:
        k, v = context.cache.update(k, v, layer)
    if c.attention == "softmax":
        return softmax_attention(c, q, k, v, context.token_mask).transpose(1, 2)
    out, rest = (x.transpose(1, 2) for x in stick_breaking(c, q, k, v, context.token_mask))
    if c.remainder == "none":
        return out
    own = own.repeat_interleave(c.N // c.K, 2) if c.remainder == "value" else head_bias
    return (out.float() + rest[..., None] * own.float()).to(out.dtype)


class Attention(nn.Module):
    """Attention with N query heads and K key/value heads.

    `query_key_value_bias` adds biases. `query_key_norm` normalises queries and keys: each head (head), or all heads
    together (all). `head_norm` normalises the output of each head.
    """

    def __init__(self, c, layer: int):
        super().__init__()
        self.c, self.layer, bias = c, layer, c.query_key_value_bias
        self.q_proj = nn.Linear(c.D, c.N * c.H, bias=bias)
        self.k_proj = nn.Linear(c.D, c.K * c.H, bias=bias)
        self.v_proj = nn.Linear(c.D, c.K * c.H, bias=bias)
        self.o_proj = nn.Linear(c.N * c.H, c.D, bias=False)
        if c.query_key_norm != "none":
            N, K = (c.N, c.K) if c.query_key_norm == "all" else (1, 1)
            self.q_norm, self.k_norm = (Norm(heads * c.H, eps=c.norm_eps) for heads in (N, K))
        self.head_bias = nn.Parameter(torch.zeros(c.N, c.H)) if c.remainder == "bias" else None
        self.head_norm = Norm(c.N, c.H, eps=c.norm_eps, bias=True) if c.head_norm else None

    def forward(self, x, context: Context):
        c = self.c
        q, k, v = (project(x).unflatten(-1, (-1, c.H)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if c.query_key_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if c.query_key_norm == "all":
            q, k = (norm(y.flatten(2)).view_as(y) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        out = attention(c, self.layer, q, k, v, context, self.head_bias)
        out = out if self.head_norm is None else self.head_norm(out)
        return self.o_proj(out.flatten(2))


class Router(nn.Module):
    """Choose k experts for every token of x [B,T,D], and compute their gates.

    Return three arrays for the R = B * T tokens: the rows of x, each repeated k times [R*k,D]; the expert of every
    repeated row [R*k]; and the gates [R,k].

    `network` says how the logits are computed: by a matrix (linear), by two layers (mlp), or as exp(log_scale) times
    the cosine similarity with a vector of each expert (gmm). `order` says whether the gates are the softmax of the k
    largest logits (topk_softmax), or the k largest values of the softmax of all logits (softmax_topk). With
    `bias_rate`, the choice depends on `selection_bias` too.
    """

    def __init__(self, c, mixture, k: int):
        super().__init__()
        self.network, self.order, self.k = mixture.network, mixture.order, k
        width = c.D if self.network == "linear" else mixture.hidden
        self.hidden = None if self.network == "linear" else nn.Linear(c.D, width, bias=self.network == "mlp")
        self.log_scale = nn.Parameter(torch.zeros(1)) if self.network == "gmm" else None
        self.weight = matrices(mixture.E, width)
        self.selection_bias = nn.Parameter(torch.zeros(mixture.E)) if mixture.bias_rate else None

    def forward(self, x):
        tokens = x.flatten(0, 1)
        x, weight = tokens.float(), self.weight.float()
        if self.hidden is not None:
            bias = self.hidden.bias
            x = functional.linear(x, self.hidden.weight.float(), None if bias is None else bias.float())
        if self.network == "mlp":
            x = functional.gelu(x)
        if self.network == "gmm":
            x = functional.normalize(x, dim=-1) * self.log_scale.float().exp()
            weight = functional.normalize(weight, dim=-1)
        logits = x @ weight.T
        scores = logits if self.order == "topk_softmax" else logits.softmax(-1)
        wanted = scores if self.selection_bias is None else scores + self.selection_bias.float()
        experts = wanted.topk(self.k).indices
        gates = scores.gather(-1, experts)
        gates = gates.softmax(-1) if self.order == "topk_softmax" else gates
        return tokens.repeat_interleave(self.k, 0), experts.flatten(), gates


def expert_linear(x, weight, experts):
    """Multiply each row of x [R,in] by the matrix of its expert. `weight` [E,out,in], `experts` [R] -> [R,out].

    The rows are sorted by expert, so that there is one matrix product for every expert that has rows.
    """
    order = experts.argsort(stable=True)
    groups = x[order].split(experts.bincount(minlength=len(weight)).tolist())
    y = torch.cat([rows @ weight[e].T for e, rows in enumerate(groups) if len(rows)])
    return torch.empty_like(y).index_copy(0, order, y)


def mixed(y, gates):
    """Sum the outputs y [R*k,D] of the k experts of every token, multiplied by their gates [R,k]. Return [R,D]."""
    return (y.float().unflatten(0, gates.shape) * gates[..., None]).sum(1).to(y.dtype)


class MixtureOfHeads(nn.Module):
    """Attention in which each query head belongs to an expert (the field `attention_experts`).

    Every expert has K query heads, one for each key/value head. The router chooses N / K experts for a token, so that a
    token has N query heads. All experts share the keys and values. With
    key_value="input", the keys and the values are x itself. With "biased", their projections have biases.
    """

    def __init__(self, c, layer: int):
        super().__init__()
        self.c, self.layer, E = c, layer, c.attention_experts.E
        self.router = Router(c, c.attention_experts, c.N // c.K)
        self.query, self.output = matrices(E, c.K * c.H, c.D), matrices(E, c.D, c.K * c.H)
        if c.key_value != "input":
            self.k_proj = nn.Linear(c.D, c.K * c.H, bias=c.key_value == "biased")
            self.v_proj = nn.Linear(c.D, c.K * c.H, bias=c.key_value == "biased")
        self.output_bias = nn.Parameter(torch.zeros(c.D)) if c.attention_experts.bias else None

    def forward(self, x, context: Context):
        c, (B, T, _) = self.c, x.shape
        rows, experts, gates = self.router(x)
        q = expert_linear(rows, self.query, experts).view(B, T, -1, c.K, c.H)
        q = q.transpose(2, 3).reshape(B, T, c.N, c.H)  # ordered by key head
        if c.key_value == "input":
            key = value = x[:, :, None]
        else:
            key, value = (project(x).unflatten(-1, (c.K, c.H)) for project in (self.k_proj, self.v_proj))
        out = attention(c, self.layer, q, key, value, context)
        out = out.reshape(B, T, c.K, -1, c.H).transpose(2, 3).reshape(-1, c.K * c.H)
        y = mixed(expert_linear(out, self.output, experts), gates).view_as(x)
        return y if self.output_bias is None else y + self.output_bias


def activate(name: str, hidden):
    """Apply an activation. A gated one returns f(first half of `hidden`) * second half. For swiglu, f is silu."""
    if name not in GATED:
        return ACTIVATIONS[name](hidden)
    gate, up = hidden.chunk(2, -1)
    return ACTIVATIONS[name](gate) * up


class FeedForward(nn.Module):
    """A dense feed-forward network with `width` hidden units: output(act(input(x)))."""

    def __init__(self, c, width: int):
        super().__init__()
        self.activation = c.activation
        self.input_linear = nn.Linear(c.D, width * (2 if c.activation in GATED else 1), bias=False)
        self.output_linear = nn.Linear(width, c.D, bias=False)

    def forward(self, x):
        return self.output_linear(activate(self.activation, self.input_linear(x)))


class Experts(nn.Module):
    """A mixture of `experts.E` feed-forward networks. A token uses k of them, and also the network `shared`, if any."""

    def __init__(self, c):
        super().__init__()
        self.activation, x, gates = c.activation, c.experts, 2 if c.activation in GATED else 1
        self.router = Router(c, x, x.k)
        self.input, self.output = matrices(x.E, gates * c.F, c.D), matrices(x.E, c.D, c.F)
        self.shared = FeedForward(c, x.shared) if x.shared else None
        self.output_bias = nn.Parameter(torch.zeros(c.D)) if x.bias else None

    def forward(self, x):
        rows, experts, gates = self.router(x)
        hidden = activate(self.activation, expert_linear(rows, self.input, experts))
        y = mixed(expert_linear(hidden, self.output, experts), gates).view_as(x)
        y = y if self.shared is None else y + self.shared(x)
        return y if self.output_bias is None else y + self.output_bias


class Layer(nn.Module):
    """x becomes x + m_res * attention(norm(x)), and then x + m_res * feed_forward(norm(x))."""

    def __init__(self, c, layer: int):
        super().__init__()
        self.m_res = c.m_res
        self.input_layernorm = Norm(c.D, eps=c.norm_eps, bias=c.norm == "layer")
        self.self_attn = (MixtureOfHeads if c.attention_experts.E else Attention)(c, layer)
        self.post_attention_layernorm = Norm(c.D, eps=c.norm_eps, bias=c.norm == "layer")
        self.mlp = Experts(c) if c.experts.E else FeedForward(c, c.F)

    def forward(self, x, context: Context):
        x = x + self.m_res * self.self_attn(self.input_layernorm(x), context)
        return x + self.m_res * self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The embedding, the L layers and the last normalisation: token ids [B,T] -> [B,T,D]."""

    def __init__(self, c):
        super().__init__()
        self.m_emb = c.m_emb
        self.embed_tokens = nn.Embedding(c.V, c.D)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.L))
        self.norm = Norm(c.D, eps=c.final_norm_eps, bias=c.norm == "layer")

    def forward(self, input_ids, context: Context):
        x = self.m_emb * self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)


class StickjaxForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. With `tied`, the output matrix is the embedding; otherwise it is `lm_head`."""

    config_class = StickjaxConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]

    def __init__(self, config: StickjaxConfig):
        super().__init__(config)
        self.c = c = config.fields
        self.model = Decoder(c)
        self.lm_head = None if c.tied else nn.Linear(c.D, c.V, bias=False)
        self.post_init()

    def forward(
        self, input_ids, attention_mask=None, cache=None, past_key_values=None, labels=None, use_cache=None,
        logits_to_keep=0, return_dict=True,
    ):  # fmt: skip
        """Compute the logits of the next token, [B,T,V] in float32, and with `labels` [B,T] the cross-entropy.

        `attention_mask` [B,S] is 0 for padding. `cache`, or `past_key_values`, has the keys and values of earlier
        tokens. With `use_cache`, the output has a cache. `logits_to_keep`: the number of last tokens whose logits
        are returned; 0: all.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        B, T = input_ids.shape
        S = T + (0 if cache is None else cache.get_seq_length())
        if attention_mask is None:
            attention_mask = torch.ones(B, S, device=input_ids.device)
        if attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask has the shape {list(attention_mask.shape)}; it must be {[B, S]}")
        token_mask = attention_mask > 0
        positions = (token_mask.cumsum(1) - 1).clamp(0)[:, S - T :]
        x = self.model(input_ids, Context(token_mask, positions, cache))[:, -logits_to_keep:]
        output_matrix = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = functional.linear(x, output_matrix).float() / self.c.logits_scaling
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output if return_dict else output.to_tuple()
