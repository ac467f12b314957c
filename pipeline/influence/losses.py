"""Contrastive losses: of a whole batch, and of one pair against a reference batch.

A score must not depend on which neighbours shared a micro-batch, so the loss of a pair `z` is defined against the
seeded reference batch `R`. A member of `R` that is the pair itself is taken out of `R` for that pair.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline.literals import Family, PairLoss
from pipeline.types import Features

#: Numbers held at once while pairs are taken out of R.
_BLOCK = 2**22


def similar_captions(left: Tensor, right: Tensor, ignore: bool) -> Tensor:
    """Bool `[n, k]`: captions are equal and equal captions are not negatives (`ignore`)."""
    if not ignore:
        return torch.zeros(len(left), len(right), dtype=torch.bool, device=left.device)
    return left[:, None] == right[None, :]


def batch_loss(features: Features, excluded: Tensor, family: Family) -> Tensor:
    """Mean contrastive loss of a batch, a scalar: open_clip's `ClipLoss` or `SigLipLoss`.

    Args:
        features: of `n` pairs.
        excluded: bool `[n, n]`, entries that are not each other's negatives; the diagonal is ignored.
        family: the loss.
    """
    n = len(features.image)
    own = torch.eye(n, dtype=torch.bool, device=features.image.device)
    excluded = excluded & ~own
    logits = features.scale * features.image @ features.text.T + features.bias
    positive = logits.diagonal()
    if family == "siglip":
        negatives = softplus(logits, threshold=50).masked_fill(excluded | own, 0)
        return (softplus(-positive, threshold=50).sum() + negatives.sum()) / n
    logits = logits.masked_fill(excluded, -torch.inf)
    return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - positive).mean()


def margin_loss(features: Features, excluded: Tensor) -> Tensor:
    """Minus the mean margin of a batch, a scalar: how much more similar pairs are to themselves than to all.

    `-(1/n) sum_i (s_ii - (mean_j s_ij + mean_j s_ji) / 2)` of cosines `s`. It is what the contrastive loss becomes at a
    high temperature, `log n + scale * margin_loss + O(scale^2)`, and so does not say how confident the model is.

    Args:
        features: of `n` pairs; scale and bias do not count.
        excluded: bool `[n, n]`, entries that are not each other's negatives; the diagonal is ignored.
    """
    own = torch.eye(len(excluded), dtype=torch.bool, device=excluded.device)
    counts = (~excluded | own).to(features.image.dtype)
    cosines = features.image @ features.text.T
    others = ((cosines * counts).sum(dim) / counts.sum(dim) for dim in (0, 1))
    return (sum(others) / 2 - cosines.diagonal()).mean()


class Neighbours:
    """Which members of R are which pair's negatives.

    Attributes:
        itself: bool `[b, r]`, member `j` of R is pair `i`.
        excluded: bool `[b, r]`, member `j` of R is not a negative of pair `i`.
        within: bool `[r, r]`, members of R that are not each other's negatives.
    """

    def __init__(
        self, ids: Tensor, captions: Tensor, reference_ids: Tensor, reference_captions: Tensor, ignore: bool
    ) -> None:
        self.itself = ids[:, None] == reference_ids[None, :]
        self.excluded = self.itself | similar_captions(captions, reference_captions, ignore)
        own = torch.eye(len(reference_ids), dtype=torch.bool, device=ids.device)
        self.within = similar_captions(reference_captions, reference_captions, ignore) & ~own
        self.members = self.itself.any(1).nonzero().squeeze(1)


def pair_losses(pairs: Features, reference: Features, near: Neighbours, family: Family, form: PairLoss) -> Tensor:
    """Loss of each pair against R, `[b]`.

    `row`: half the image-to-text plus half the text-to-image loss of `z` among `R + {z}`. `marginal`:
    `(|R| + 1) L(R + {z}) - |R| L(R)`, which adds what `z` does to the others as a negative.

    Args:
        pairs: features of `b` pairs; their scale and bias are used.
        reference: features of R.
        near: which members of R count.
        family: CLIP's softmax or SigLIP's sigmoid loss.
        form: `row` or `marginal`.
    """
    positive = pairs.scale * (pairs.image * pairs.text).sum(1) + pairs.bias
    to_text = pairs.scale * pairs.image @ reference.text.T + pairs.bias
    to_image = pairs.scale * pairs.text @ reference.image.T + pairs.bias
    if family == "siglip":
        negatives = (softplus(to_text, threshold=50) + softplus(to_image, threshold=50)).masked_fill(near.excluded, 0)
        return softplus(-positive, threshold=50) + negatives.sum(1) * (1.0 if form == "marginal" else 0.5)
    row = _log_total(positive, to_text, near) / 2 + _log_total(positive, to_image, near) / 2 - positive
    if form == "row":
        return row
    logits = pairs.scale * reference.image @ reference.text.T + pairs.bias
    of_images = _log_others(logits, near)
    of_texts = _log_others(logits.T, near)
    # As a text, z joins the denominators of R's images (log(1 + exp(s_iz) / S_i)), as an image those of its texts.
    burden = _joined(to_image - of_images, near) + _joined(to_text - of_texts, near)
    return row + burden / 2


def _log_total(positive: Tensor, logits: Tensor, near: Neighbours) -> Tensor:
    joint = torch.cat([positive[:, None], logits.masked_fill(near.excluded, -torch.inf)], 1)
    return joint.logsumexp(1)


def _joined(gap: Tensor, near: Neighbours) -> Tensor:
    # The gap is set to 0 before the softplus too: masked infinities would turn second derivatives into NaN.
    safe = gap.masked_fill(near.excluded, 0)
    return softplus(safe, threshold=50).masked_fill(near.excluded, 0).sum(1)


def _log_others(logits: Tensor, near: Neighbours) -> Tensor:
    """`log S_i` of every row of R `[b, r]` or `[1, r]`; without the pair itself where it is a member of R."""
    logits = logits.masked_fill(near.within, -torch.inf)
    totals = logits.logsumexp(1)[None, :]
    if not len(near.members):
        return totals
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    block = max(1, _BLOCK // logits.numel())
    without = torch.cat(
        [
            # The row of the pair itself is not used; it keeps its own entry so that no row is empty.
            logits[None].masked_fill(itself[:, None, :] & ~diagonal, -torch.inf).logsumexp(2)
            for itself in torch.split(near.itself[near.members], block)
        ]
    )
    for_each: Tensor = totals.expand(len(near.itself), -1).index_copy(0, near.members, without)
    return for_each


def similarities(pairs: Features) -> Tensor:
    """Cosine of image and text, `[b]`."""
    return (pairs.image * pairs.text).sum(1)


def error_norms(pairs: Features, reference: Features, near: Neighbours, family: Family) -> Tensor:
    """EL2N for a contrastive loss, `[b]`: length of (prediction - label) over `R + {z}`, mean of both directions."""
    positive = pairs.scale * (pairs.image * pairs.text).sum(1) + pairs.bias
    lengths: list[Tensor] = []
    for left, right in ((pairs.image, reference.text), (pairs.text, reference.image)):
        logits = (pairs.scale * left @ right.T + pairs.bias).masked_fill(near.excluded, -torch.inf)
        joint = torch.cat([positive[:, None], logits], 1)
        predicted = joint.softmax(1) if family == "clip" else joint.sigmoid()
        lengths.append(torch.cat([predicted[:, :1] - 1, predicted[:, 1:]], 1).norm(dim=1))
    return torch.stack(lengths).mean(0)
