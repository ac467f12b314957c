"""Why a sample cannot be scored: the values of the `status` column."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The status of a sample: `ok`, or the first thing that is wrong with it."""

    OK = "ok"
    """Nothing is wrong."""
    DUPLICATE_KEY = "duplicate-key"
    """A sample of this key came earlier in the same shard; the first one is used."""
    TRUNCATED_SAMPLE = "truncated-sample"
    """The tar broke off, or went on unreadably, within this sample or right after it."""
    TOO_LARGE = "too-large"
    """An image is over 512 MiB, or a caption or json over 4 MiB, and was not read."""
    NO_IMAGE = "no-image"
    """There is no `jpg`, `png`, `jpeg` or `webp` member."""
    ZERO_SIZE = "zero-size"
    """The image has no bytes, or no pixels are left of one side after resizing."""
    BAD_JSON = "bad-json"
    """The `json` member is not a JSON object."""
    NO_CAPTION = "no-caption"
    """There is no `txt` member, or no string under the configured key of the json."""
    BAD_UTF8 = "bad-utf8"
    """The caption is not valid UTF-8."""
    EMPTY_CAPTION = "empty-caption"
    """Nothing but white space is in the caption, so nothing is left after tokenizing."""
    TOO_MANY_PIXELS = "too-many-pixels"
    """The image has more than `data.max_pixels` pixels, or would have when resized (found before decoding)."""
    TRUNCATED_IMAGE = "truncated-image"
    """The image data end too early."""
    CORRUPT_IMAGE = "corrupt-image"
    """The image cannot be decoded."""
    NOT_FINITE = "not-finite"
    """The pair's score is not a finite number."""
