"""open_clip's random crop, on decoded pixels, reproducible for every pair and step."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Before torchvision:
from pipeline.models import compat  # noqa: F401  isort: skip
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from pipeline.replay.schedule import CROPS, generator

#: Share of the area and aspect ratio of a crop, as in open_clip's training transform.
SCALE = (0.9, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10


def crop_boxes(seed: int, run: int, step: int, batch: int, size: tuple[int, int]) -> NDArray[np.int64]:
    """Top, left, height and width of the crop of each pair of a step's batch, int64 `[batch, 4]`.

    As in torchvision's `RandomResizedCrop`, the first of ten drawn crops that fits into the image. Where none does, the
    whole image; torchvision's takes that too where the image's own ratio is in `RATIO`, and else a central crop of the
    nearest ratio that is. Drawn for the whole batch, so that a pair's crop does not depend on how workers share it out.
    """
    height, width = size
    draws = generator(seed, run, CROPS, step).random((4, TRIES, batch))
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * draws[0])
    ratio = np.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * draws[1])
    tall, wide = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    found, pairs = fits.any(0), np.arange(batch)
    first = fits.argmax(0)
    tall = np.where(found, tall[first, pairs], height)
    wide = np.where(found, wide[first, pairs], width)
    top = np.floor(draws[2, first, pairs] * (height - tall + 1))
    left = np.floor(draws[3, first, pairs] * (width - wide + 1))
    return np.stack([top, left, tall, wide], 1).astype(np.int64)


def cropped(images: Tensor, boxes: NDArray[np.int64], threads: int = 1) -> Tensor:
    """Crops resized back to the images' size: uint8 `[n, 3, h, w]` to the same, on the CPU."""
    size = list(images.shape[-2:])

    def crop(image: Tensor, box: NDArray[np.int64]) -> Tensor:
        resized: Tensor = resized_crop(
            image, *box.tolist(), size, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return resized

    with ThreadPoolExecutor(threads) as pool:
        crops = list((pool.map if threads > 1 else map)(crop, images, boxes))
    return torch.stack(crops) if crops else images
