"""The influence of pairs held in Python: the library's short-cut past shards and runs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pipeline.config import MAX_PIXELS
from pipeline.data.decode import Decoder
from pipeline.data.reader import Sample
from pipeline.data.reasons import Reason
from pipeline.errors import ConfigError, InputError
from pipeline.influence import Batches, Scorer, Settings, prepare_run, utility_of
from pipeline.models.clip import PairModel
from pipeline.types import Checkpoint, PairBatch

#: Pillow's modes that a PNG can hold; others (CMYK) become RGB.
_PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})


def encode_pairs(
    model: PairModel,
    images: Sequence[Image.Image | bytes],
    captions: Sequence[str],
    uids: Sequence[str] | None = None,
) -> PairBatch:
    """Turn pairs held in Python into a model's input, by the transform that shards go through.

    Args:
        model: of `build_model`.
        images: Pillow images, or encoded ones (JPEG, PNG, WebP). Pillow images in CMYK and the like become RGB first.
        captions: one per image.
        uids: 32 hex digits per pair; None takes a digest of image and caption. A pair whose uid is in the reference
            batch is not counted against itself.

    Raises `InputError` for the first pair that cannot be used.

    >>> from PIL import Image
    >>> from pipeline import build_model
    >>> model = build_model("digits-vit")
    >>> pairs = encode_pairs(model, [Image.new("RGB", (40, 30), "red")], ["a red rectangle"])
    >>> pairs.images.shape, pairs.images.dtype, pairs.tokens.shape
    (torch.Size([1, 3, 16, 16]), torch.uint8, torch.Size([1, 12]))
    """
    for name, given in (("captions", captions), ("uids", uids)):
        if given is not None and len(given) != len(images):
            raise InputError(f"expected as many {name} as images, {len(images)}, found {len(given)}")
    samples = (
        _sample(index, image, caption, uids[index] if uids is not None else None)
        for index, (image, caption) in enumerate(zip(images, captions, strict=True))
    )
    decoded = Decoder(model.image_spec, model.tokenize, MAX_PIXELS).decode_shard(samples)
    for row in decoded.rows:
        if row.status != "ok":
            raise InputError(f"pair {row.index}: {row.status}: {row.error}")
    return decoded.batch


def _sample(index: int, image: Image.Image | bytes, caption: str, uid: str | None) -> Sample:
    data = image if isinstance(image, bytes) else _encoded(image, index)
    return Sample(
        index=index,
        key=str(index),
        uid=uid if uid is not None else hashlib.blake2b(data + caption.encode(), digest_size=16).hexdigest(),
        image=data,
        image_type="png",
        caption=caption,
        meta=None,
        status="ok",
        error="",
    )


def _encoded(image: Image.Image, index: int) -> bytes:
    buffer = io.BytesIO()
    try:
        (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=0)
    except (OSError, ValueError) as error:  # a lazily opened file is read only here
        raise InputError(f"pair {index}: {Reason.CORRUPT_IMAGE}: {error}") from None
    return buffer.getvalue()


@dataclass(frozen=True)
class PairScores:
    """Scores of `b` pairs at `m` checkpoints, on the CPU.

    Attributes:
        utility: `[b]`, higher means keep.
        score: `[b]`, in the estimator's published sign.
        terms: `[b, m]`, one per checkpoint, by run and step; they add up to `score`.
        loss: `[b]`, nats, against the reference batch.
        similarity: `[b]`, cosine of image and text.
    """

    utility: Tensor
    score: Tensor
    terms: Tensor
    loss: Tensor
    similarity: Tensor


def score_pairs(
    model: PairModel,
    checkpoints: Sequence[Checkpoint],
    pairs: PairBatch,
    batches: Batches,
    settings: Settings | None = None,
    *,
    dataset_size: int | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
    compiled: bool = False,
) -> PairScores:
    """Influence of pairs held in memory: the directions of all checkpoints, then passes over the pairs.

    Args:
        model: of `build_model`; its own weights are not used. It is moved to `device` and left there.
        checkpoints: of one or several runs, in any order.
        pairs: of `encode_pairs`.
        batches: R, B and V.
        settings: the estimator and how it is computed; None is Diff-In.
        dataset_size: `N` of Eq. 9, the pairs the runs were trained on; None takes `len(pairs)`.
        device: where to compute.
        batch_size: pairs per pass.
        compiled: whether passes are compiled; worth its seconds for many pairs.

    Raises `ConfigError` without checkpoints, `InputError` for what the model or the checkpoints cannot give.

    >>> from PIL import Image
    >>> from pipeline import Batches, Settings, build_model, checkpoint_of
    >>> model = build_model("digits-vit", seed=1)
    >>> colours = ["red", "green", "blue", "orange", "purple", "white", "black", "grey"]
    >>> pairs = encode_pairs(model, [Image.new("RGB", (16, 16), c) for c in colours], [f"all {c}" for c in colours])
    >>> checkpoints = [checkpoint_of(model, step=1, lr=1e-3)]
    >>> batches = Batches(reference=pairs[:4], gradient=pairs[:4], target=pairs[4:])
    >>> found = score_pairs(model, checkpoints, pairs, batches, Settings(estimator="tracin"))
    >>> found.utility.shape, found.terms.shape, bool((found.terms.sum(1) == found.score).all())
    (torch.Size([8]), torch.Size([8, 1]), True)
    """
    settings = settings or Settings()
    if not checkpoints:
        raise ConfigError("expected at least one checkpoint", key="checkpoints")
    runs = sorted({checkpoint.run for checkpoint in checkpoints})
    planned = []
    model = model.to(device)
    for run in runs:
        of_run = sorted((each for each in checkpoints if each.run == run), key=lambda each: each.step)
        plans = prepare_run(
            model, of_run, batches, settings, dataset_size=dataset_size or len(pairs), num_runs=len(runs)
        )
        planned += list(zip(of_run, plans, strict=True))
    found = Scorer(model, planned, batches.reference, settings, device, batch_size, compiled=compiled).score(pairs)
    score = found.terms.sum(1)
    return PairScores(utility_of(settings.estimator, score), score, found.terms, found.loss, found.similarity)
