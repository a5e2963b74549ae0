"""A web server for tests: files with byte ranges, and on request connections cut in the middle of an
answer.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """Serves `root`. `cut(name, n)` makes the next `n` answers for that file break off half-way."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.cuts: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.cut_every = 0
        self.served = 0
        self.sent_bytes = 0
        self.broken = False
        self.prefix = ""
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
        name = unquote(self.path).removeprefix(self.server.prefix).lstrip("/")
        path = self.server.root / name
        if ".." in name or not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match:
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"x"')
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
        self.wfile.write(data)
        with self.server.lock:
            self.server.sent_bytes += len(data)


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
