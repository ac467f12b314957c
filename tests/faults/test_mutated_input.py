"""Thousands of damaged shards: never a crash, exactly one row for each sample, each with a known status.

2,700 shards go through all that an actor does (read, decode, tabulate, commit) but for the network, which is fake;
48 more go through a whole scoring stage with a real one. How many samples there are is counted a second time, by
Python's tarfile and webdataset's way of splitting names.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from pipeline.config import parse_config
from pipeline.data.decode import DecodedShard, Decoder, ImageSpec
from pipeline.data.inventory import inspect_shard
from pipeline.data.reasons import Reason
from pipeline.emit.verify import verify
from pipeline.engine.scorer_spec import ScorerSpec
from pipeline.engine.scoring import score_shards
from pipeline.engine.shard_scorer import ShardScorer
from pipeline.influence import ScoreBatch
from pipeline.run import RunFolder
from pipeline.store.commits import open_scores
from pipeline.store.fingerprint import Fingerprint
from pipeline.types import PairBatch
from tests.engine.prepared_run import prepare_run
from tests.helpers import ByteTokenizer, Member, image_bytes, sample_members, tar_bytes, uid_of, write_shards

SAMPLES = 6
IMAGES = [
    (image_bytes((40, 30), seed=0), "jpg"),
    (image_bytes((30, 40), "L", seed=1), "jpg"),
    (image_bytes((33, 21), "CMYK", seed=2), "jpeg"),
    (image_bytes((24, 24), "RGBA", "PNG", seed=3), "png"),
    (image_bytes((24, 24), "P", "PNG", seed=4), "png"),
    (image_bytes((30, 20), file_format="WEBP", seed=5), "webp"),
]
DECODER = Decoder(ImageSpec((16, 16), (0.0,) * 3, (1.0,) * 3), ByteTokenizer(), 100_000)
STATUSES = {str(reason) for reason in Reason}


def good_members() -> list[list[Member]]:
    return [
        sample_members(
            f"{i:04d}", image, f"caption {i} é", {"uid": uid_of(i), "url": f"http://a{i}.example/"}, extension
        )
        for i, (image, extension) in enumerate(IMAGES)
    ]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Damage bytes in one of the ways that disks, networks and programs do."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 16, 512, 1000))
    match rng.randrange(8):
        case 0:
            for _ in range(rng.choice((1, 1, 4, 64))):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = rng.randbytes(length)
        case 4:
            data[at : at + length] = bytes(length)
        case 5:
            data[at : at + length] = rng.randbytes(length)
        case 6:
            data[at:at] = data[at : at + length]
        case 7:
            data = bytearray(rng.randbytes(rng.choice((0, 1, 100))))
    return bytes(data)


def header_field(rng: random.Random, content: bytes) -> bytes:
    """Change a field of one header and set its checksum right, so that the change is believed."""
    data = bytearray(content)
    with tarfile.open(fileobj=BytesIO(content)) as tar:
        offset = rng.choice(tar.getmembers()).offset
    start, length = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    values = [bytes(length), rng.randbytes(length), b"7" * (length - 1) + b"\0", b"\xff" * length, b"\x80" + b"\1" * 11]
    values += [b"../../x.jpg", b"/etc/x.txt", b"S", b"x", b"L", b"g", b"1", b"5"]
    value = rng.choice(values)[:length]
    data[offset + start : offset + start + len(value)] = value
    data[offset + 148 : offset + 156] = b" " * 8
    data[offset + 148 : offset + 156] = b"%06o\0 " % sum(data[offset : offset + 512])
    return bytes(data)


def damaged_tar(rng: random.Random, suffix: str, number: int) -> bytes:
    """A tar whose bytes are damaged: in a header (every fourth), anywhere, or (every fourth) after compressing."""
    whole = tar_bytes(member for members in good_members() for member in members)
    content = header_field(rng, whole) if number % 4 == 0 else mutate(rng, whole) if number % 4 < 3 else whole
    if suffix == ".tar.gz":
        content = gzip.compress(content, 1, mtime=0)
    elif suffix == ".tar.zst":
        content = zstandard.ZstdCompressor().compress(content)
    return mutate(rng, content) if number % 4 == 3 else content


class FlatScorer:
    """Stands in for the network: a pair's score is the mean of its pixels."""

    def score(self, batch: PairBatch) -> ScoreBatch:
        value = batch.images.float().mean((1, 2, 3))
        terms = value[:, None]
        return ScoreBatch(terms, torch.ones_like(terms, dtype=torch.bool), value, value, terms.half())


def count_samples(path: Path) -> int:
    """Samples of a shard as Python's tarfile and webdataset's split of names see it, as far as it can be read."""
    content = path.read_bytes()
    if path.suffix != ".tar":
        content = _decompressed(content, path.suffix)
    samples, key, endings = 0, None, set[str]()
    try:
        with tarfile.open(fileobj=BytesIO(content), mode="r:") as tar:
            while (member := tar.next()) is not None:
                prefix, ending = base_plus_ext(member.name)
                if prefix is None or not member.isreg() or re.match("__[^/]*__($|/)", member.name):
                    continue
                ending = ending.lower()
                if prefix != key or ending in endings:
                    samples, key, endings = samples + 1, prefix, set()
                endings.add(ending)
    except (tarfile.TarError, ValueError, IndexError, OverflowError):
        pass
    return samples


def _decompressed(content: bytes, suffix: str) -> bytes:
    """All that can be had of a compressed stream, damaged or not: a byte at a time, to lose nothing before an error."""
    out, stream = BytesIO(), None
    begin = partial(zlib.decompressobj, 31) if suffix == ".gz" else zstandard.ZstdDecompressor().decompressobj
    with suppress(zlib.error, zstandard.ZstdError):
        for at in range(len(content)):
            if stream is None or getattr(stream, "eof", False):
                stream = begin()
            out.write(stream.decompress(content[at : at + 1]))
    return out.getvalue()


#: Takes the path of a shard (and `caption`); gives what was decoded and where the tar broke off.
Process = Callable[..., tuple[DecodedShard, str]]


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    """Takes a shard the way that an actor does, up to its committed score file, and checks what must always hold."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # thousands of files that nobody needs
    run = RunFolder(str(tmp_path / "run"))

    def worker(caption: str) -> ShardScorer:
        config = parse_config({"out": run.root, "data": {"shards": "unused.tar", "caption": caption}})
        scorer: Any = FlatScorer()
        return ShardScorer(config, Fingerprint({}), scorer, DECODER, np.array([0]), 1, "0")

    workers = {caption: worker(caption) for caption in ("txt", "json:text")}

    def process(path: Path, caption: str = "txt") -> tuple[DecodedShard, str]:
        work = workers[caption]
        info = inspect_shard(0, str(path))
        loaded = work.load(info)
        statuses = work.commit(info, work.score(info, loaded), {})
        decoded, table = loaded.decoded, pq.read_table(run.score_file(0))

        assert table.num_rows == info.samples == sum(statuses.values()) == count_samples(path)
        assert table["index"].to_pylist() == list(range(info.samples))
        assert set(statuses) <= STATUSES
        assert info.end_error == loaded.end_error
        for row in table.select(["status", "error", "utility"]).to_pylist():
            assert (row["status"] == "ok") == (row["error"] == "") == (row["utility"] is not None)
            assert "\n" not in row["error"]
        assert [(row.key, row.status) for row in decoded.rows] == list(
            zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
        )
        return decoded, loaded.end_error

    return process


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_damaged_tars(tmp_path: Path, process: Process, suffix: str) -> None:
    """1,200 tars damaged anywhere; the compressed ones before and after compressing."""
    rng = random.Random(f"tars{suffix}")
    path = tmp_path / f"shard{suffix}"
    uids = {uid_of(i) for i in range(SAMPLES)}
    ends: Counter[bool] = Counter()
    for number in range(400):
        path.write_bytes(damaged_tar(rng, suffix, number))
        decoded, end_error = process(path)
        ends[end_error == ""] += 1
        # Nothing is lost silently: without an error at the end all samples that were not overwritten are there.
        if end_error == "" and number % 4 == 3 and suffix == ".tar.gz":
            assert uids <= {row.uid for row in decoded.rows}
    assert ends[True] > 20
    assert ends[False] > 20


def test_damaged_members(tmp_path: Path, process: Process) -> None:
    """900 shards whose tar is whole and in which one image, caption or json is damaged: six rows, five good ones."""
    rng = random.Random("members")
    path = tmp_path / "shard.tar"
    reasons: Counter[str] = Counter()
    for number in range(900):
        samples = good_members()
        at, member = rng.randrange(SAMPLES), (0, 0, 1, 2)[number % 4]
        name, content = samples[at][member]
        samples[at][member] = (name, mutate(rng, content))
        path.write_bytes(tar_bytes(each for members in samples for each in members))
        decoded, end_error = process(path)
        assert end_error == ""
        assert [row.key for row in decoded.rows] == [f"{i:04d}" for i in range(SAMPLES)]
        assert all(row.status == "ok" for i, row in enumerate(decoded.rows) if i != at)
        reasons[decoded.rows[at].status] += 1
    expected = {"ok", "truncated-image", "corrupt-image", "bad-utf8", "bad-json", "zero-size", "empty-caption"}
    assert expected <= set(reasons), reasons


def test_members_missing_doubled_and_out_of_order(tmp_path: Path, process: Process) -> None:
    """300 shards with members dropped, repeated and shuffled: a row for each run of members of one name."""
    rng = random.Random("order")
    path = tmp_path / "shard.tar"
    for _ in range(300):
        members = [member for members in good_members() for member in members]
        for _ in range(rng.randrange(1, 5)):
            match rng.randrange(3):
                case 0:
                    members.pop(rng.randrange(len(members)))
                case 1:
                    members.insert(rng.randrange(len(members)), rng.choice(members))
                case 2:
                    members.insert(rng.randrange(len(members)), members.pop(rng.randrange(len(members))))
        path.write_bytes(tar_bytes(members))
        decoded, _ = process(path)
        runs: list[tuple[str, set[str]]] = []
        for name, _ in members:
            key, _, ending = name.partition(".")
            if not runs or runs[-1][0] != key or ending in runs[-1][1]:
                runs.append((key, set()))
            runs[-1][1].add(ending)
        assert [row.key for row in decoded.rows] == [key for key, _ in runs]
        firsts = {key: place for place, (key, _) in reversed(list(enumerate(runs)))}
        for place, row in enumerate(decoded.rows):
            assert (row.status == "duplicate-key") == (firsts[row.key] != place)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
uid_like = st.fixed_dictionaries(
    {"uid": st.text("0123456789abcdefABCDEF\n ", min_size=30, max_size=33), "url": any_json}
)
surrogates = st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE00F)).map(
    lambda text: {"url": text, "text": text}
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    caption=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    meta=st.binary(max_size=40) | (any_json | uid_like | surrogates).map(lambda value: json.dumps(value).encode()),
    image=st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: IMAGES[3][0][:60] + tail),
    name=st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=120),
    as_json=st.booleans(),
)
def test_any_content(
    tmp_path_factory: pytest.TempPathFactory,
    process: Process,
    caption: bytes,
    meta: bytes,
    image: bytes,
    name: str,
    as_json: bool,
) -> None:
    """Arbitrary captions, json, image bytes and names: the good sample beside it is never harmed."""
    path = tmp_path_factory.getbasetemp() / "any.tar"
    name = name.encode("utf-8", "replace").decode()
    odd = [(f"{name}.{ending}", content) for ending, content in (("jpg", image), ("txt", caption), ("json", meta))]
    good = sample_members("good", IMAGES[0][0], "fine", {"uid": uid_of(1), "text": "fine"})
    path.write_bytes(tar_bytes(odd + good))
    decoded, end_error = process(path)
    assert end_error == ""
    assert (decoded.rows[-1].uid, decoded.rows[-1].status) == (uid_of(1), "ok")
    if as_json:
        assert process(path, caption="json:text")[0].rows[-1].status == "ok"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_scoring_stage_over_damaged_shards_loses_and_invents_no_row(tmp_path: Path) -> None:
    """48 shards, 16 of each kind of compression, between two good ones that the proxy knows."""
    rng = random.Random("stage")
    urls = write_shards(tmp_path / "in", shards=2, samples=12)
    for number in range(48):
        suffix = (".tar", ".tar.gz", ".tar.zst")[number % 3]
        path = tmp_path / "in" / f"damaged-{number:02d}{suffix}"
        path.write_bytes(damaged_tar(rng, suffix, number // 3))
        urls.append(str(path))
    config, infos, fingerprint = prepare_run(str(tmp_path / "run"), urls)
    run = RunFolder(config.out)
    outcome = score_shards(ScorerSpec(config, fingerprint), infos, run, fingerprint, config.engine)
    assert (outcome.done, outcome.failed) == (50, [])
    counted = {Path(url).name: samples for url in urls if (samples := count_samples(Path(url)))}
    rows = open_scores(run).to_table(columns=["shard", "status"]).to_pylist()
    assert Counter(row["shard"] for row in rows) == counted
    assert Counter(row["status"] for row in rows) == outcome.statuses
    assert {"ok", "truncated-sample", "corrupt-image"} <= set(outcome.statuses) <= STATUSES
    assert verify(run) == []
