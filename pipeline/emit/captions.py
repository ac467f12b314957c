"""The caption that a pair was scored with, as the `txt` member from which trainers read it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pipeline.data.reader import caption_in, json_key
from pipeline.emit.members import Sample
from pipeline.emit.tar import Buffer
from pipeline.errors import InputError


def caption_part(caption: str) -> dict[str, str]:
    """Where captions are, as a part of a hand-over's fingerprint: none for the usual `txt`."""
    return {} if caption == "txt" else {"caption": caption}


def emitted_caption(mark: dict[str, Any]) -> str:
    """Where the captions of a hand-over are, `txt` or `json:KEY`, by its mark."""
    return str(mark.get("parts", {}).get("caption", "txt"))


def caption_text(content: Buffer | None, caption: str, name: str) -> bytes:
    """The caption at `json:KEY` as the content of a `txt` member.

    Args:
        content: of the sample's json; None where it has none.
        caption: `json:KEY`.
        name: of the sample, for the error.

    Raises `InputError` where there is no such caption: the shard has changed since the pair was scored.
    """
    key = json_key(caption)
    assert key is not None
    try:
        value = caption_in(json.loads(bytes(content or b"")), key)
        return value.encode()
    except (ValueError, TypeError, RecursionError):
        raise InputError(
            f"{name}: expected a caption at json key {key!r}; the shard has changed since it was scored"
        ) from None


def with_caption(sample: Sample, caption: str, url: str) -> Sample:
    """A sample of the shard at `url` with the caption that it was scored with as its `txt` member.

    That takes the place of a `txt` that the sample may have, else it comes last. With `caption: txt` the sample is
    given back as it is.
    """
    if caption == "txt":
        return sample
    contents = {ending.lower(): content for ending, content in sample.members}
    text = caption_text(contents.get(".json"), caption, f"{url}: sample {sample.index}")
    if ".txt" not in contents:
        return replace(sample, members=[*sample.members, (".txt", text)])
    members = [(ending, text if ending.lower() == ".txt" else content) for ending, content in sample.members]
    return replace(sample, members=members)
