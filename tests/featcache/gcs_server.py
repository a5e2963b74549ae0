"""Google Cloud Storage for tests, as far as its XML interface is needed: objects with generations in one bucket,
conditional and ranged requests, listing by prefix and delimiter.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class GcsServer(ThreadingHTTPServer):
    """`objects`: name -> (content, generation). `refused`: names whose conditional write came too late."""

    daemon_threads = True

    def __init__(self, bucket: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket = bucket
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generation = 0
        self.refused: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GcsServer

    def log_message(self, *_: object) -> None:
        pass

    def _name(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return unquote(parts.path).removeprefix(f"/{self.server.bucket}").lstrip("/"), parse_qs(parts.query)

    def _reply(self, status: int, body: bytes = b"", generation: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if generation is not None:
            self._describe(generation)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _describe(self, generation: int) -> None:
        self.send_header("ETag", f'"{generation}"')
        self.send_header("x-goog-generation", str(generation))
        self.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")

    def do_PUT(self) -> None:
        name, _ = self._name()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = self.headers.get("x-goog-if-generation-match")
        server = self.server
        with server.lock:
            current = server.objects[name][1] if name in server.objects else 0
            if wanted is not None and int(wanted) != current:
                server.refused.append(name)
                self._reply(412)
                return
            server.generation += 1
            server.objects[name] = (body, server.generation)
            self._reply(200, generation=server.generation)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, query = self._name()
        if not name:
            self._list(query)
            return
        found = self.server.objects.get(name)
        if found is None:
            self._reply(404)
            return
        content, generation = found
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match:
            start, stop = int(match[1]), min(int(match[2]) + 1, len(content))
            where = f"bytes {start}-{stop - 1}/{len(content)}"
            self._reply(206, content[start:stop], generation, Content_Range=where)
        elif self.command == "HEAD":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self._describe(generation)
            self.end_headers()
        else:
            self._reply(200, content, generation)

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        names = sorted(n for n in self.server.objects if n.startswith(prefix))
        folders = sorted(
            {prefix + n[len(prefix) :].split(delimiter)[0] + delimiter for n in names if delimiter in n[len(prefix) :]}
            if delimiter
            else ()
        )
        body = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders)
        text = f"<ListBucketResult><Prefix>{escape(prefix)}</Prefix>{body}</ListBucketResult>"
        self._reply(200, text.encode(), Content_Type="application/xml")


@contextmanager
def serve_gcs(bucket: str) -> Iterator[GcsServer]:
    server = GcsServer(bucket)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
