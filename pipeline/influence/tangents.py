"""Tangents of the operators that towers are made of, at the price of their arithmetic: three products for one.

torch's own forward derivatives of linear layers, layer norm and attention copy operands and go over memory many times;
here a linear layer's tangent is two products, the second added to the first (`dense`), and layer norm's and softmax's,
whose Jacobians are symmetric, are one call of their fused backward kernels. On a GPU attention, layer norm and gelu are
one kernel each with their tangents (`fused`). Everything else keeps torch's derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.influence import fused
from pipeline.influence.arithmetic import arithmetic
from pipeline.influence.dense import linear, linear_added, traced
from pipeline.influence.forward_mode import carrying, parted
from pipeline.influence.lowering import Rules, lowered_to

#: torch's kernels for attention without a tangent.
_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class TangentRules(Rules):
    """Within this context these rules replace torch's own first forward derivatives, and dense products go to `dense`.

    Not for derivatives of second order: the backward kernels used here have no right derivative of their own.

    Args:
        stacked: tangents are stacked by `vmap`, which does not know the products that add to a buffer in place.
    """

    def __init__(self, stacked: bool = False) -> None:
        super().__init__(
            {
                functional.linear: self._product,
                functional.layer_norm: self._layer_norm_rule,
                functional.gelu: self._gelu_rule,
                functional.scaled_dot_product_attention: self._attention_rule,
                functional.multi_head_attention_forward: self._multi_head_rule,
            }
        )
        self._stacked = stacked

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._linear(_Dual.of(input), _Dual.of(weight), _Dual.perhaps(bias)).tensor()

    def _layer_norm_rule(
        self, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Any:
        """The tangent of the normalised values through their symmetric Jacobian, then weight and bias."""
        x = _Dual.of(input)
        if lowered_to(input) is not None:
            x = x.map(Tensor.float)  # as autocast does
        if weight is None or bias is None or weight.dtype != x.value.dtype or x.tangent is None:
            return NotImplemented
        (w, dw), (b, db) = _Dual.of(weight), _Dual.of(bias)
        if dw is not None and db is not None and not self._stacked:
            moving, parameters = [x.value, x.tangent], [w, b, dw, db]
            if fused.takes_norm(moving, parameters):
                return _Dual(*fused.norm_with_tangent(moving, parameters, eps)).tensor()
        value, mean, scale = torch.native_layer_norm(x.value, shape, w, b, eps)
        backward = torch.ops.aten.native_layer_norm_backward
        bent = backward(x.tangent, x.value, shape, mean, scale, None, None, [True, False, False])[0]
        if dw is None:
            tangent = bent * w if db is None else torch.addcmul(db, bent, w)
        elif self._stacked:
            normal = torch.native_layer_norm(x.value, shape, None, None, eps)[0]
            tangent = bent * w + normal * dw
            tangent = tangent if db is None else tangent + db
        else:
            # Of the normalised values weight and bias move as if they were the norm's own.
            tangent = torch.native_layer_norm(x.value, shape, dw, db, eps)[0].addcmul_(bent, w)
        return _Dual(value, tangent).tensor()

    def _gelu_rule(self, input: Tensor, approximate: str = "none") -> Any:
        """By the kernel where there is one, else torch's."""
        value, tangent = _Dual.of(input)
        if tangent is None or approximate != "none" or self._stacked or not fused.takes_gelu([value, tangent]):
            return NotImplemented
        return _Dual(*fused.gelu_with_tangent([value, tangent])).tensor()

    def _attention_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        q, k, v = (_Dual.of(tensor) for tensor in (query, key, value))
        if dropout_p or is_causal or enable_gqa or not _additive(attn_mask):
            return NotImplemented
        lower = lowered_to(query)
        if lower is not None:
            q, k, v = (dual.map(lambda t: t.to(lower)) for dual in (q, k, v))
        return self._attention(q, k, v, attn_mask, scale).tensor()

    def _multi_head_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`nn.MultiheadAttention` to itself, in evaluation; tensors `[tokens, pairs, width]`."""
        unusual = (bias_k, bias_v, key_padding_mask, options.get("q_proj_weight"), options.get("static_k"))
        flags = (add_zero_attn, training, need_weights, options.get("is_causal"), query is not key, key is not value)
        if any(item is not None for item in unusual) or any(flags) or query.dim() != 3:
            return NotImplemented
        if in_proj_weight is None or not _additive(attn_mask) or (attn_mask is not None and attn_mask.dim() != 2):
            return NotImplemented
        x = _Dual.of(query).map(lambda t: t.transpose(0, 1))
        weight, bias = _Dual.of(in_proj_weight), _Dual.perhaps(in_proj_bias)
        packed = self._linear(x, weight, bias)
        pairs, tokens, width = x.value.shape
        heads = packed.map(lambda t: t.view(pairs, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4))
        q, k, v = (heads.map(lambda t, part=part: t[part]) for part in range(3))  # type: ignore[misc]
        joined = self._attention(q, k, v, attn_mask, None).map(
            lambda t: t.transpose(1, 2).reshape(pairs, tokens, width)
        )
        out = self._linear(joined, _Dual.of(out_proj_weight), _Dual.perhaps(out_proj_bias))
        return out.map(lambda t: t.transpose(0, 1)).tensor(), None

    def _linear(self, x: _Dual, weight: _Dual, bias: _Dual | None) -> _Dual:
        """`x W^T + b`, and `dx W^T + x dW^T + db`."""
        lower = lowered_to(x.value)
        if lower is not None:
            cast = lower != x.value.dtype and not self._stacked
            if cast and x.tangent is not None and weight.tangent is not None:
                return _lowered_linear(x, x.tangent, weight, weight.tangent, bias, lower)
            x, weight = x.map(lambda t: t.to(lower)), weight.map(lambda t: t.to(lower))
            bias = bias and bias.map(lambda t: t.to(lower))
        product = functional.linear if self._stacked else linear
        moved = bias.tangent if bias else None
        value = product(x.value, weight.value, bias.value if bias else None)
        if x.tangent is None:
            if weight.tangent is not None:
                return _Dual(value, product(x.value, weight.tangent, moved))
            return _Dual(value, None if moved is None else moved.expand_as(value))
        tangent = product(x.tangent, weight.value, moved)
        if weight.tangent is not None and self._stacked:
            tangent = tangent + functional.linear(x.value, weight.tangent)
        elif weight.tangent is not None:
            tangent = linear_added(tangent, x.value, weight.tangent)
        return _Dual(value, tangent)

    def _attention(self, query: _Dual, key: _Dual, value: _Dual, mask: Tensor | None, scale: float | None) -> _Dual:
        """`softmax(scale q k^T + mask) v` of tensors `[..., tokens, d]`; the softmax's Jacobian is symmetric.

        Of bfloat16 tensors all products are bfloat16 but the first, whose error the exponential would enlarge.
        """
        moved = [dual.tangent for dual in (query, key, value) if dual.tangent is not None]
        if not moved:
            return _Dual(_plain_attention(query.value, key.value, value.value, mask, scale), None)
        scale = query.value.shape[-1] ** -0.5 if scale is None else scale
        tensors = [query.value, key.value, value.value, *moved]
        if len(moved) == 3 and not self._stacked and fused.takes_attention(tensors, mask):
            return _Dual(*fused.attention_with_tangent(tensors, mask, scale))
        lead, targets = query.value.shape[:-2], query.value.shape[-2]
        q, k, v = (dual.map(lambda t: t.reshape(-1, *t.shape[-2:])) for dual in (query, key, value))
        kt = k.map(lambda t: t.transpose(1, 2))
        if mask is not None and mask.dim() > 2:
            mask = mask.expand(*lead, *mask.shape[-2:]).reshape(-1, *mask.shape[-2:])
        weights = _attention_weights(q.value, kt.value, mask, scale)
        bent = self._product_tangent(q, kt, scale)
        if bent is not None:
            bent = torch._softmax_backward_data(bent, weights, -1, weights.dtype)
        found = _Dual(torch.bmm(weights, v.value), self._product_tangent(_Dual(weights, bent), v))
        return found.map(lambda t: t.view(*lead, targets, -1))

    def _product_tangent(self, left: _Dual, right: _Dual, scale: float = 1.0) -> Tensor | None:
        """`scale (da b + a db)` of batches of matrices."""
        total: Tensor | None = None
        for a, b in ((left.tangent, right.value), (left.value, right.tangent)):
            if a is None or b is None:
                continue
            if total is None or self._stacked:
                product = torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)
                total = product if total is None else total + product
            else:
                total.baddbmm_(a, b, alpha=scale)
        return total


class _Dual(NamedTuple):
    """A tensor and its tangent, which is None where it is zero."""

    value: Tensor
    tangent: Tensor | None

    @staticmethod
    def of(tensor: Tensor) -> _Dual:
        return _Dual(*parted(tensor))

    @staticmethod
    def perhaps(tensor: Tensor | None) -> _Dual | None:
        return None if tensor is None else _Dual.of(tensor)

    def tensor(self) -> Tensor:
        return self.value if self.tangent is None else carrying(self.value, self.tangent)

    def map(self, function: Callable[[Tensor], Tensor]) -> _Dual:
        """A linear function of the tensor."""
        return _Dual(function(self.value), None if self.tangent is None else function(self.tangent))


def _lowered_linear(
    x: _Dual, moved: Tensor, weight: _Dual, turned: Tensor, bias: _Dual | None, dtype: torch.dtype
) -> _Dual:
    """`x W^T + b` and its tangent in a shorter dtype: `[dx x] [W dW]^T + db` is one product of twice the depth."""
    rows, both = _beside(moved, x.value, dtype), _beside(weight.value, turned, dtype)
    bias = bias and bias.map(lambda t: t.to(dtype))
    width = x.value.shape[-1]
    value = functional.linear(rows[:, width:], both[:, :width], bias.value if bias else None)
    tangent = functional.linear(rows, both, bias.tangent if bias else None)
    return _Dual(value, tangent).map(lambda t: t.view(*x.value.shape[:-1], -1))


def _attention_weights(query: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale q k + mask)` of `[n, targets, d]` and `[n, d, sources]`, in float32 or wider until it is done."""
    if query.itemsize >= 4:
        start = query.new_zeros(()) if mask is None else mask
        return torch.baddbmm(start, query, keys, beta=0 if mask is None else 1, alpha=scale).softmax(-1)
    # In tf32 the product of bfloat16 values is exact, and it is fast.
    with torch.autocast(query.device.type, enabled=False), arithmetic("tf32"):
        wide = _attention_weights(query.float(), keys.float(), None if mask is None else mask.float(), scale)
    return wide.to(query.dtype)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's attention, without a tangent: on a GPU by any of its kernels."""
    with sdpa_kernel(list(_KERNELS)) if q.is_cuda else nullcontext():
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _beside(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of two tensors `[..., n]` side by side, `[rows, 2 n]`, in one pass over each."""
    left, right = (part.reshape(-1, part.shape[-1]) for part in (left, right))
    if traced():  # a compiler writes each to its place by itself
        return torch.cat([left.to(dtype), right.to(dtype)], 1)
    width = left.shape[1]
    both = left.new_empty(len(left), 2 * width, dtype=dtype)
    both[:, :width] = left
    both[:, width:] = right
    return both


def _additive(mask: Tensor | None) -> bool:
    return mask is None or (mask.is_floating_point() and parted(mask)[1] is None)
