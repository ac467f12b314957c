"""How well a two-tower model does on labelled or captioned pairs that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decode import Decoder
from pipeline.data.reader import read_shard
from pipeline.data.shards import expand
from pipeline.errors import InputError
from pipeline.types import Features, PairBatch

#: With more distinct captions than this share of the pairs, a set is a retrieval set and not a classification set.
MOST_CLASSES_PER_PAIR = 0.2


@dataclass(frozen=True)
class HeldOut:
    """Pairs to measure on.

    Attributes:
        batch: the pairs.
        labels: int64 `[n]`, the class of each pair; None for a retrieval set.
    """

    batch: PairBatch
    labels: Tensor | None

    @property
    def metric(self) -> str:
        """Name of what `measure` returns."""
        return "retrieval recall@1" if self.labels is None else "zero-shot accuracy"


def load_held_out(shards: str | list[str], decoder: Decoder, caption: str = "txt", threads: int = 1) -> HeldOut:
    """Read the shards; classes are `json["label"]` where every pair has one, else equal captions.

    Raises `InputError` when no pair can be read.
    """
    batches, labels = [], []
    for url in expand(shards):
        samples = list(read_shard(url, caption=caption))
        decoded = decoder.decode_shard(samples, threads=threads)
        batches.append(decoded.batch)
        labels += [(samples[row].meta or {}).get("label") for row in decoded.ok]
    batch = PairBatch.cat(batches)
    if not len(batch):
        raise InputError(f"evaluate.shards: expected readable pairs, found none in {shards}")
    if all(label is not None for label in labels):
        _, classes = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)
        return HeldOut(batch, torch.from_numpy(classes.astype(np.int64)))
    distinct, classes_of_captions = torch.unique(batch.captions, return_inverse=True)
    if len(distinct) <= MOST_CLASSES_PER_PAIR * len(batch):
        return HeldOut(batch, classes_of_captions)
    return HeldOut(batch, None)


@torch.inference_mode()
def measure(model: torch.nn.Module, held_out: HeldOut, batch_size: int = 256) -> float:
    """Zero-shot accuracy (share of images nearest to their own class), or mean recall@1 of both retrieval directions.

    A class is embedded as the mean of the embeddings of its captions, the prompt ensemble of Radford et al. (2021).
    """
    model.eval()
    parts: list[Features] = []
    for start in range(0, len(held_out.batch), batch_size):
        batch = held_out.batch[start : start + batch_size]
        parts.append(model(batch.images, batch.tokens))
    image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
    if held_out.labels is None:
        similarity = image @ text.T
        own = torch.arange(len(similarity), device=similarity.device)
        hits = (similarity.argmax(1) == own).double().mean() + (similarity.argmax(0) == own).double().mean()
        return float(hits / 2)
    labels = held_out.labels.to(image.device)
    classes = torch.zeros(int(labels.max()) + 1, text.shape[1], dtype=text.dtype, device=text.device)
    classes = torch.nn.functional.normalize(classes.index_add(0, labels, text), dim=-1)
    return float(((image @ classes.T).argmax(1) == labels).double().mean())
