"""Attention, RMSNorm and dropout for bf16 on CPUs, put into transformers' models while they train there.

torch's flash attention and dropout and transformers' RMSNorm are slow in bf16 on a CPU: `python benchmarks/run.py
--only cpu_kernels` measures them beside the ones here. On a GPU, or compiled, none of this is used.

Shape suffixes: B rows, H heads, G heads of keys and values, T tokens, K head size, X = B · H, C width.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

LONGEST = 1023
"""Tokens up to which attention is written out; beyond, it is hardly faster and its T × T probabilities cost memory."""


def keep_mask(like: Tensor, dropout: float) -> Tensor:
    """Booleans of the shape of `like`, each False with probability `dropout`, to 1 part in 65,536.

    Four to a random number of 64 bits: torch's own bernoulli_ draws one number for each, and takes 8 times as long.
    """
    numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    return numbers.view(torch.int16)[: like.numel()].view(like.shape) >= round(dropout * 2**16) - 2**15


def kept(x: Tensor, keep: Tensor) -> Tensor:
    """x with 0 where it is not kept; as whole numbers, since a product of bf16 and booleans takes 7 times as long."""
    return (x.view(torch.int16) * keep).view(x.dtype) if x.dtype.itemsize == 2 else x * keep


class _Attention(torch.autograd.Function):
    """dropout(softmax(q kᵀ · scaling + bias)) v, https://arxiv.org/abs/1706.03762, keeping only the probabilities."""

    @staticmethod
    def forward(ctx, query_XTK, key_XTK, value_XTK, bias, scaling, dropout):
        scores_XTT = torch.baddbmm(bias, query_XTK, key_XTK.mT, alpha=scaling)
        probabilities_XTT = torch.softmax(scores_XTT, -1, out=scores_XTT)
        keep_XTT = keep_mask(probabilities_XTT, dropout) if dropout else None
        ctx.save_for_backward(query_XTK, key_XTK, value_XTK, probabilities_XTT, keep_XTT)
        ctx.scaling, ctx.rescale = scaling, 1 / (1 - dropout)
        if keep_XTT is None:
            return probabilities_XTT @ value_XTK
        return (kept(probabilities_XTT, keep_XTT) @ value_XTK).mul_(ctx.rescale)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_XTK):
        query_XTK, key_XTK, value_XTK, probabilities_XTT, keep_XTT = ctx.saved_tensors
        used_XTT = probabilities_XTT
        if keep_XTT is not None:
            d_out_XTK, used_XTT = d_out_XTK * ctx.rescale, kept(probabilities_XTT, keep_XTT)
        d_value_XTK = used_XTT.mT @ d_out_XTK
        d_scores_XTT = d_out_XTK @ value_XTK.mT
        if keep_XTT is not None:
            d_scores_XTT = kept(d_scores_XTT, keep_XTT)
        torch._softmax_backward_data(
            d_scores_XTT, probabilities_XTT, -1, probabilities_XTT.dtype, grad_input=d_scores_XTT
        )
        d_query_XTK = (d_scores_XTT @ key_XTK).mul_(ctx.scaling)
        d_key_XTK = (d_scores_XTT.mT @ query_XTK).mul_(ctx.scaling)
        return d_query_XTK, d_key_XTK, d_value_XTK, None, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout):
        keep = keep_mask(x, dropout)
        ctx.save_for_backward(keep)
        ctx.rescale = 1 / (1 - dropout)
        return kept(x, keep).mul_(ctx.rescale)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        (keep,) = ctx.saved_tensors
        return kept(d_y, keep).mul_(ctx.rescale), None


class _FastDropout(nn.Dropout):
    """Takes the place of a model's own."""

    def forward(self, x: Tensor) -> Tensor:
        return _Dropout.apply(x, self.p) if self.training and 0 < self.p < 1 else super().forward(x)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, H, T, K) and keys and values (B, G, T, K) to ((B, T, H, K), None)."""
    B, H, T, K = query.shape
    causal = module.is_causal if is_causal is None else is_causal
    short = T == key.shape[2] <= LONGEST and query.dtype == torch.bfloat16 and not query.is_meta
    if not short or dropout >= 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if (groups := H // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bias = _bias(attention_mask, causal, B, H, T, query)
    scaling = K**-0.5 if scaling is None else scaling
    out_XTK = _Attention.apply(*(x.reshape(B * H, T, K) for x in (query, key, value)), bias, scaling, dropout)
    return out_XTK.view(B, H, T, K).transpose(1, 2), None


def _bias(mask: Tensor | None, causal: bool, B: int, H: int, T: int, like: Tensor) -> Tensor:
    """What is added to the scores: 0 where a token may look, -inf where not; broadcastable to (B · H, T, T)."""
    if mask is None:
        bias = like.new_zeros(T, T) if not causal else like.new_full((T, T), -torch.inf).triu(1)
        return bias
    if mask.dtype == torch.bool:
        # Finite: a row that may look nowhere (padding) must not become NaN.
        mask = like.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(like.dtype).min)
    return mask.to(like.dtype).expand(B, H, T, T).reshape(B * H, T, T)


class _RMSNorm(torch.autograd.Function):
    """x / √(mean(x²) + eps), https://arxiv.org/abs/1910.07467; the root in float32 or more, products in x's dtype."""

    @staticmethod
    def forward(ctx, x, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_() / x.shape[-1]
        rstd = mean_square.add_(eps).rsqrt_()
        y = (x * rstd).to(x.dtype)
        ctx.save_for_backward(y, rstd.to(x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        y, rstd = ctx.saved_tensors
        projection = (d_y * y).sum(-1, keepdim=True).div_(-y.shape[-1])
        return torch.addcmul(d_y, y, projection).mul_(rstd), None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    y = _RMSNorm.apply(x, eps)
    return y if weight is None else y * weight


class _FastNorm(nn.Module):
    """Takes the place of a model's own RMSNorm, with its parameter under the same name."""

    def __init__(self, weight: nn.Parameter | None, eps: float):
        super().__init__()
        self.register_parameter("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def _fast_norm(module: nn.Module) -> _FastNorm | None:
    """The fast twin of an RMSNorm, or None where the module computes something else, found out by trying."""
    eps = next((getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    weight = dict(module.named_parameters()).get("weight")
    if not type(module).__name__.endswith("RMSNorm") or eps is None or (weight is not None and weight.is_meta):
        return None
    twin = _FastNorm(weight, eps)
    x = torch.linspace(-2, 3, len(weight) if weight is not None else 64).repeat(3, 1)
    with torch.no_grad():
        same = torch.allclose(module(x).float(), twin(x).float(), rtol=1e-3, atol=1e-5)
    return twin if same else None


def install(model: PreTrainedModel) -> list[str]:
    """Puts the fast parts into the model, in place; weights and their names stay. Returns what was replaced."""
    replaced = []
    norms = {name: twin for name, module in model.named_modules() if (twin := _fast_norm(module)) is not None}
    # Written as eight operations, each of which keeps its input for the backward pass.
    gelus = {name: nn.GELU("tanh") for name, module in model.named_modules() if isinstance(module, NewGELUActivation)}
    dropouts = {name: _FastDropout(m.p) for name, m in model.named_modules() if type(m) is nn.Dropout and m.p}
    for name, twin in (norms | gelus | dropouts).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, twin.train(model.training))
    if norms:
        replaced.append(f"{len(norms)} RMSNorm")
    if gelus:
        replaced.append(f"{len(gelus)} GELU")
    if dropouts:
        replaced.append(f"{len(dropouts)} dropout")
    if model._supports_sdpa and model.config._attn_implementation == "sdpa":
        AttentionInterface.register("cpu_bf16", attention)
        AttentionMaskInterface.register("cpu_bf16", sdpa_mask)
        model.set_attn_implementation("cpu_bf16")
        replaced.append("attention")
    return replaced
