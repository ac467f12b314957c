"""How many pairs each group may keep, so that the groups together keep exactly the number asked for."""

from __future__ import annotations

from decimal import Decimal

import numpy as np

from pipeline.arrays import Float64, Int64

Counts = Int64


def count_of(fraction: float, total: int) -> int:
    """`fraction` of `total` as a whole number, halves up; 0.3 means three tenths, not its nearest binary fraction."""
    return int(Decimal(repr(fraction)) * total + Decimal("0.5"))


def share_out(total: int, weights: Float64, sizes: Counts) -> Counts:
    """Share `total` out over groups in proportion to `weights` [g], at most `sizes` [g] each (largest remainder).

    What a group cannot take goes to the others in the same proportion. The result adds up to
    `min(total, sizes.sum())` exactly; equal remainders go to the lower group number. Groups of weight 0 get
    something only when all others are full.
    """
    quotas = np.zeros(len(sizes), dtype=np.int64)
    left = int(min(total, sizes.sum()))
    weights = np.where(sizes > 0, np.maximum(weights, 0.0), 0.0)
    while left > 0:
        room = sizes - quotas
        open_weights = np.where(room > 0, weights, 0.0)
        if not open_weights.any():
            open_weights = room.astype(np.float64)
        exact = left * (open_weights / open_weights.sum())
        full = (exact >= room) & (open_weights > 0)
        if full.any():
            quotas[full] += room[full]
            left -= int(room[full].sum())
            continue
        whole = np.floor(exact).astype(np.int64)
        order = np.lexsort((np.arange(len(sizes)), -(exact - whole)))
        order = order[open_weights[order] > 0]
        whole[order[: left - int(whole.sum())]] += 1
        quotas += whole
        return quotas
    return quotas
