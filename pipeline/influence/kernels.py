"""Triton kernels of operators with their tangents, which read and write each value once; `fused` calls them.

With `s = scale q k^T + mask` and `p = softmax(s)` the tangent of attention `p v` is `p (ds - mean_p(ds)) v + p dv`. Its
kernel goes over blocks of keys once, as fused attention does (Dao et al., arXiv 2205.14135), and keeps beside the sums
over the keys seen so far the mean of `ds` under their weights; what is summed is always relative to it, so that nothing
large cancels.
"""

import triton
import triton.language as tl


@triton.jit
def attention_with_tangent(
    q_at,
    k_at,
    v_at,
    dq_at,
    dk_at,
    dv_at,
    mask_at,
    out_at,
    dout_at,
    pair_step,
    head_step,
    token_step,
    out_pair_step,
    out_head_step,
    out_token_step,
    mask_step,
    tokens,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of queries of one head of one pair: value and tangent.

    Tensors `[pairs, heads, tokens, WIDTH]` by the address of their first value and steps between pairs, heads and
    tokens, the same for the six given and for the two written; the mask `[tokens, tokens]` by its step between rows.
    WIDTH is padded to PADDED; a block is ROWS queries and COLUMNS keys.
    """
    pair, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    base = pair * pair_step + head * head_step
    rows, inner = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    rows_in, inner_in = rows < tokens, inner < WIDTH
    here = base + rows[:, None] * token_step + inner[None, :]
    given = rows_in[:, None] & inner_in[None, :]
    q = tl.load(q_at + here, mask=given, other=0.0)
    dq = tl.load(dq_at + here, mask=given, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, PADDED], tl.float32)
    tangent = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        columns_in = columns < tokens
        there = base + columns[:, None] * token_step + inner[None, :]
        held = columns_in[:, None] & inner_in[None, :]
        k = tl.load(k_at + there, mask=held, other=0.0)
        dk = tl.load(dk_at + there, mask=held, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="tf32") * scale
        ds = tl.dot(dq, tl.trans(k), input_precision="tf32")
        ds = tl.dot(q, tl.trans(dk), ds, input_precision="tf32") * scale
        if MASKED:
            both = rows_in[:, None] & columns_in[None, :]
            bias = tl.load(mask_at + rows[:, None] * mask_step + columns[None, :], mask=both, other=0.0)
            s += bias.to(tl.float32)
        s = tl.where(columns_in[None, :], s, float("-inf"))
        larger = tl.maximum(most, tl.max(s, 1))
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        kept, weights = tl.exp(most - origin), tl.exp(s - origin[:, None])
        added = total * kept + tl.sum(weights, 1)
        moved = (mean * total * kept + tl.sum(weights * ds, 1)) / tl.where(added == 0.0, 1.0, added)
        tangent = (tangent - (moved - mean)[:, None] * value) * kept[:, None]
        value *= kept[:, None]
        v = tl.load(v_at + there, mask=held, other=0.0)
        dv = tl.load(dv_at + there, mask=held, other=0.0)
        bent = weights * (ds - moved[:, None])
        value = tl.dot(weights.to(v.dtype), v, value, input_precision="tf32")
        tangent = tl.dot(bent.to(v.dtype), v, tangent, input_precision="tf32")
        tangent = tl.dot(weights.to(v.dtype), dv, tangent, input_precision="tf32")
        most, total, mean = larger, added, moved
    there = pair * out_pair_step + head * out_head_step + rows[:, None] * out_token_step + inner[None, :]
    tl.store(out_at + there, (value / total[:, None]).to(out_at.dtype.element_ty), mask=given)
    tl.store(dout_at + there, (tangent / total[:, None]).to(out_at.dtype.element_ty), mask=given)


@triton.jit
def norm_with_tangent(
    x_at, dx_at, weight_at, bias_at, dweight_at, dbias_at, out_at, dout_at, width, eps, PADDED: tl.constexpr
):
    """Layer norm of one row of `width` values, padded to PADDED, and its tangent.

    With `n` the normalised values that of `w n + b` is `w dn + n dw + db`, where `dn` is `dx`, without its mean and its
    part along `n`, over the standard deviation.
    """
    row, columns = tl.program_id(0).to(tl.int64) * width, tl.arange(0, PADDED)
    inside = columns < width
    x = tl.load(x_at + row + columns, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dx_at + row + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    normal = x * scale
    dx = tl.where(inside, dx - tl.sum(dx, 0) / width, 0.0)
    dnormal = scale * (dx - normal * (tl.sum(normal * dx, 0) / width))
    weight = tl.load(weight_at + columns, mask=inside, other=0.0)
    dweight = tl.load(dweight_at + columns, mask=inside, other=0.0)
    value = normal * weight + tl.load(bias_at + columns, mask=inside, other=0.0)
    tangent = dnormal * weight + normal * dweight + tl.load(dbias_at + columns, mask=inside, other=0.0)
    tl.store(out_at + row + columns, value, mask=inside)
    tl.store(dout_at + row + columns, tangent, mask=inside)


@triton.jit
def gelu_with_tangent(x_at, dx_at, out_at, dout_at, size, BLOCK: tl.constexpr):
    """`x F(x)` of BLOCK of `size` values, `F` the normal distribution's, and its tangent `dx (F(x) + x f(x))`."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    x = tl.load(x_at + places, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dx_at + places, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(out_at + places, (x * below).to(out_at.dtype.element_ty), mask=inside)
    tl.store(dout_at + places, (dx * (below + x * density)).to(dout_at.dtype.element_ty), mask=inside)
