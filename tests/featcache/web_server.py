"""A web server for tests: files with byte ranges, and on request connections cut in the middle of an
answer, flipped bits, a slow line, and answers that no honest server gives.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """Serves `root`.

    cuts: the next so many answers for a file break off half-way. flips: offset of a byte of a file that is sent with a
    flipped bit, the next so many times. bytes_per_s: how fast bodies are sent. odd: what answers for a file instead.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.cuts: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.cut_every = 0
        self.flips: dict[str, tuple[int, int]] = {}
        self.bytes_per_s: float | None = None
        self.odd: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.served = 0
        self.sent_bytes = 0
        self.broken = False
        self.prefix = ""
        self.etag = '"x"'
        self.asked: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def shall_cut(self, name: str) -> bool:
        with self.lock:
            self.served += 1
            self.answers[name] += 1
            if self.cuts[name] > 0:
                self.cuts[name] -= 1
                return True
            return bool(self.cut_every) and self.answers[name] % self.cut_every == 0

    def flipped(self, name: str, start: int, data: bytes) -> bytes:
        offset, times = self.flips.get(name, (0, 0))
        if not times or not start <= offset < start + len(data):
            return data
        self.flips[name] = (offset, times - 1)
        changed = bytearray(data)
        changed[offset - start] ^= 4
        return bytes(changed)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        if self.server.broken:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.server.asked.append(self.path)
        name = unquote(self.path.partition("?")[0]).removeprefix(self.server.prefix).lstrip("/")
        if name in self.server.odd:
            self.server.answers[name] += 1
            self.server.odd[name](self)
            return
        path = self.server.root / name
        if ".." in name or not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start = 0
        if match:
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            if start >= len(data):
                self.server.answers[name] += 1
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.server.etag)
        self.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not send_body:
            return
        if self.server.shall_cut(name):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._send(self.server.flipped(name, start, data))

    def _send(self, data: bytes) -> None:
        step = 1 << 16 if self.server.bytes_per_s else len(data)
        for start in range(0, len(data), max(1, step)):
            piece = data[start : start + step]
            try:
                self.wfile.write(piece)
            except OSError:  # the client has had enough
                self.close_connection = True
                return
            with self.server.lock:
                self.server.sent_bytes += len(piece)
            if self.server.bytes_per_s:
                time.sleep(len(piece) / self.server.bytes_per_s)


@contextmanager
def serve(root: Path) -> Iterator[FileServer]:
    server = FileServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
