"""torch's attention as linear layers and one product with a softmax, so that its projections run in int8.

``nn.MultiheadAttention`` keeps three projections in one parameter and, in eval mode, calls a fused kernel that nothing
downstream knows (its "fast path"); ``nn.TransformerEncoderLayer`` fuses still more.
Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

F = nn.functional

# torch.nn's containers of attention: their forward is entered, where other modules of torch.nn are leaves.
ENTERED = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class Attention(nn.Module):
    """``nn.MultiheadAttention`` in eval mode with a linear layer for each projection."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first = source.num_heads, source.batch_first
        self.embed_dim, self.head_dim = source.embed_dim, source.head_dim
        width = source.embed_dim
        joint: Any = source.in_proj_weight
        if joint is not None:
            weights = joint.detach().split(width)
        else:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        biases: Any = (None,) * 3
        joint_bias: Any = source.in_proj_bias
        if joint_bias is not None:
            biases = joint_bias.detach().split(width)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = source.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: (L, N, E), or (N, L, E) with ``batch_first``."""
        del is_causal  # says only that the mask is a causal one
        made, weights = attend(
            self.q_proj(query),
            self.k_proj(key),
            self.v_proj(value),
            self.num_heads,
            batch_first=self.batch_first,
            mask=_mask(attn_mask, key_padding_mask, self.num_heads),
            need_weights=need_weights,
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return self.out_proj(made), weights


def open_attention(model: nn.Module) -> None:
    """Replace every ``nn.MultiheadAttention`` that ``Attention`` can stand for, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _plain(child):
                setattr(module, name, Attention(child).eval())  # type: ignore[arg-type]


def _plain(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and not (vars(module)["_forward_hooks"] or vars(module)["_forward_pre_hooks"])
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    batch_first: bool = False,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k' / sqrt(d) + mask) v for each head.

    Args:
        q: (L, N, E), or (N, L, E) with ``batch_first``; k and v likewise with S in place of L.
        k: see q.
        v: see q.
        heads: number of heads, which E is divided among.
        batch_first: the order of the first two axes.
        mask: added to the scores, broadcast to (N, heads, L, S).
        need_weights: return the softmax too.

    Returns:
        What q has the shape of, and (N, heads, L, S) or None.
    """
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    back = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    width = q.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (heads, x.shape[-1] // heads)).permute(*order) for x in (q, k, v))
    weights = None
    if need_weights:
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(width))
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        made = weights @ v
    else:
        made = F.scaled_dot_product_attention(q, k, v, mask)
    return made.permute(*back).flatten(2), weights


def _mask(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """What is added to the scores, broadcast to (N, heads, L, S)."""
    total = None
    if attn_mask is not None:
        total = _added(attn_mask)
        if total.ndim == 3:  # (N * heads, L, S)
            total = total.unflatten(0, (-1, heads))
    if padding is not None:
        hidden = _added(padding).unsqueeze(1).unsqueeze(2)
        total = hidden if total is None else total + hidden
    return total


def _added(mask: Tensor) -> Tensor:
    """A mask that says what not to look at, as a summand."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, float("-inf"), 0.0)


def opened_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` from plain linear layers; what it lacks raises.

    Raises:
        NotImplementedError: keys or values are given beside those that are projected.
    """
    names = list(F.multi_head_attention_forward.__code__.co_varnames)
    given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    beside = ("bias_k", "bias_v", "static_k", "static_v")
    if any(given.get(n) is not None for n in beside) or given.get("add_zero_attn"):
        raise NotImplementedError("attention with keys of its own")
    width = given["embed_dim_to_check"]
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{n}_proj_weight"] for n in "qkv"]
    else:
        weights = given["in_proj_weight"].split(width)
    bias = given.get("in_proj_bias")
    biases = (None,) * 3 if bias is None else bias.split(width)
    sources = (given["query"], given["key"], given["value"])
    q, k, v = map(F.linear, sources, weights, biases)
    made, found = attend(
        q,
        k,
        v,
        given["num_heads"],
        mask=_mask(given.get("attn_mask"), given.get("key_padding_mask"), given["num_heads"]),
        need_weights=given.get("need_weights", True),
    )
    if found is not None and given.get("average_attn_weights", True):
        found = found.mean(1)
    return F.linear(made, given["out_proj_weight"], given["out_proj_bias"]), found
