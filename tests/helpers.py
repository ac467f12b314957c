"""Makers of tiny images, tars and shards, a tokenizer for tests, and a proxy that injects faults into HTTP."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import zstandard
from PIL import Image

#: Name and content of a tar member.
Member = tuple[str, bytes]

WORDS = ("red", "green", "blue", "old", "small", "wooden", "quiet", "round")
THINGS = ("boat", "house", "dog", "tree", "clock", "river", "chair", "bridge")


def image_bytes(
    size: tuple[int, int] = (32, 32), mode: str = "RGB", file_format: str = "JPEG", seed: int = 0, **save: Any
) -> bytes:
    """An encoded image `size` (width, height) of smooth seeded noise in a Pillow mode."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 4), dtype=np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        wide = np.asarray(image.convert("L"), dtype=np.uint16) * 257
        image = Image.fromarray(wide)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **save)
    return buffer.getvalue()


def uid_of(number: int, name: str = "test") -> str:
    """A uid of 32 hex digits."""
    return hashlib.blake2b(f"{name}/{number}".encode(), digest_size=16).hexdigest()


def sample_members(
    key: str, image: bytes | None, caption: str | bytes | None, meta: Any = None, extension: str = "jpg"
) -> list[Member]:
    """The members of one sample; what is None is left out. `meta` is dumped as JSON unless it is bytes."""
    members: list[Member] = []
    if image is not None:
        members.append((f"{key}.{extension}", image))
    if caption is not None:
        members.append((f"{key}.txt", caption.encode() if isinstance(caption, str) else caption))
    if meta is not None:
        members.append((f"{key}.json", meta if isinstance(meta, bytes) else json.dumps(meta).encode()))
    return members


def tar_bytes(members: Iterable[Member]) -> bytes:
    """An uncompressed tar with fixed times and owners: equal members give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path | str, members: Iterable[Member]) -> str:
    """Write a tar, compressed as its name says (`.tar`, `.tar.gz`, `.tgz`, `.tar.zst`), and return its path."""
    content = tar_bytes(members)
    name = str(path)
    if name.endswith((".gz", ".tgz")):
        content = gzip.compress(content, mtime=0)
    elif name.endswith(".zst"):
        content = zstandard.ZstdCompressor().compress(content)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return name


def caption_of(number: int) -> str:
    """A caption that repeats only after 64 numbers."""
    return f"a {WORDS[number % 8]} {THINGS[number // 8 % 8]}"


def write_shards(
    folder: Path | str, shards: int = 2, samples: int = 8, size: int = 32, seed: int = 0, suffix: str = ".tar"
) -> list[str]:
    """Write `shards` good WebDataset shards `00000.tar ...` of `samples` JPEG pairs each and return their paths.

    Keys count on over the shards; each json holds a uid (`uid_of(number, str(seed))`) and a url.
    """
    paths = []
    for shard in range(shards):
        members: list[Member] = []
        for number in range(shard * samples, (shard + 1) * samples):
            meta = {"uid": uid_of(number, str(seed)), "url": f"https://site{number % 3}.example/{number}.jpg"}
            image = image_bytes((size + number % 5, size + number % 3), seed=seed * 100_003 + number)
            members += sample_members(f"{number:08d}", image, caption_of(number), meta)
        paths.append(write_tar(Path(folder) / f"{shard:05d}{suffix}", members))
    return paths


def write_json_shards(folder: Path | str, shards: int = 2, samples: int = 8, txt: str | None = None) -> list[str]:
    """Write shards whose captions are at `json:caption`, with a `txt` member of other text only where it is given."""
    return [
        write_tar(
            Path(folder) / f"{shard:05d}.tar",
            [
                member
                for number in range(shard * samples, (shard + 1) * samples)
                for member in sample_members(
                    f"{number:08d}", image_bytes(seed=number), txt, {"caption": caption_of(number)}
                )
            ],
        )
        for shard in range(shards)
    ]


class ByteTokenizer:
    """A tokenizer without a vocabulary file: start, the text's bytes shifted by 3, end, zeros; cut to the context."""

    def __init__(self, context_length: int = 16) -> None:
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in enumerate(texts):
            ids = [1, *(byte + 3 for byte in text.encode()[: self.context_length - 2]), 2]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens


#: What the proxy does to a request: pass it on, answer 503, cut the body in the middle, or wait first.
Fault = str


class FaultProxy:
    """An HTTP proxy on loopback before `endpoint` that does to each request what `fault(method, path, number)` says.

    `fault` returns "ok", "503", "cut" (half of the body, then a closed connection), "short" (half of the body,
    declared as if it were all) or "slow" (half a second late). `number` counts all requests from 0.
    """

    def __init__(self, endpoint: str, fault: Callable[[str, str, int], Fault] | None = None) -> None:
        self.target = urlsplit(endpoint)
        self.fault = fault or (lambda method, path, number: "ok")
        self.requests = 0
        self.faults = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _pass_on(self) -> None:
                with proxy._lock:
                    number = proxy.requests
                    proxy.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault(self.command, self.path, number)
                if fault != "ok":
                    with proxy._lock:
                        proxy.faults += 1
                if fault == "slow":
                    time.sleep(0.5)
                if fault == "503":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(proxy.target.hostname or "", proxy.target.port, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                length = len(content) if self.command != "HEAD" else int(answer.headers.get("Content-Length") or 0)
                sent = content[: len(content) // 2] if fault in ("cut", "short") else content
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header(
                    "Content-Length", str(len(sent) if fault == "short" and self.command != "HEAD" else length)
                )
                self.end_headers()
                self.wfile.write(sent)
                if fault == "cut":
                    self.wfile.flush()
                    self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

        return Handler
