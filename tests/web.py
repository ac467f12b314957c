"""A web server on loopback for a folder of shards, with and without what web servers may leave out."""

from __future__ import annotations

import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebServer:
    """Serves `folder` at `url`: answers ranges unless told not to, and breaks off after `cut` bytes of a whole file.

    A `mute` one says how large files are and never sends any.

    Attributes:
        asked: method and range of each request so far.
    """

    def __init__(self, folder: Path | str, *, ranges: bool = True, cut: int | None = None, mute: bool = False) -> None:
        self.asked: list[tuple[str, str]] = []
        handler = partial(_Handler, directory=str(folder), ranges=ranges, cut=cut, mute=mute, asked=self.asked)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(
        self, *args: Any, ranges: bool, cut: int | None, mute: bool, asked: list[tuple[str, str]], **options: Any
    ) -> None:
        self.ranges, self.cut, self.mute, self.asked = ranges, cut, mute, asked
        super().__init__(*args, **options)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.asked.append(("HEAD", ""))
        super().do_HEAD()

    def do_GET(self) -> None:
        self.asked.append(("GET", self.headers.get("Range", "")))
        if self.mute:
            threading.Event().wait()
        path = self.translate_path(self.path)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (self.ranges and match and os.path.isfile(path)):
            super().do_GET()
            return
        content = Path(path).read_bytes()
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.cut is None:
            super().copyfile(source, outputfile)
        else:
            outputfile.write(source.read(self.cut))
            self.close_connection = True
