"""What is wrong with a place is said by its cause, soon, in one line with a remedy; a hostile server is bounded."""

from __future__ import annotations

import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from store_helpers import build
from web_server import FileServer, serve

import featcache
from featcache.errors import UserError
from featcache.share.transfer import list_remote, pull, push
from featcache.share.verify import verify
from featcache.store import objects, remote_errors
from featcache.store.remote import open_destination, open_location

CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SKIP_SIGNATURE", "AWS_EC2_METADATA_DISABLED")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_errors, "FIRST_PAUSE_S", 0.001)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("web") / "cache")


@pytest.fixture
def web(source: Path) -> Iterator[FileServer]:
    with serve(source.parent) as server:
        yield server


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of the loopback at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def refused(call: Callable[[], object], match: str) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert len(caught.value.what.splitlines()) == 1 and len(caught.value.what) < 500
    assert "Debug source" not in str(caught.value)
    return caught.value


def short_timeouts(monkeypatch: pytest.MonkeyPatch, milliseconds: int = 300) -> None:
    options = objects._client_options
    monkeypatch.setattr(objects, "_client_options", lambda url: options(url) | {"timeout": f"{milliseconds}ms"})


# Causes


def test_nothing_listens(closed_port: int) -> None:
    error = refused(lambda: pull(f"http://127.0.0.1:{closed_port}/cache", "x"), f"127.0.0.1:{closed_port} refuses")
    assert "when the connection is better" in (error.remedy or "")


def test_a_name_that_is_not_known() -> None:
    refused(lambda: pull("http://no-such-host.invalid/cache", "x"), r"name of the server is not known.*invalid")


def test_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    short_timeouts(monkeypatch, 80)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused(lambda: pull(f"http://127.0.0.1:{silent.getsockname()[1]}/cache", "x"), "no answer from the server")


def answer(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


@pytest.mark.parametrize(
    ("status", "match", "requests"),
    [(401, "wants credentials", 1), (403, "access is forbidden", 1), (410, "status 410", 1), (500, "status 500", 8)],
)
def test_refusals(web: FileServer, status: int, match: str, requests: int) -> None:
    """What no retry mends is not tried again."""
    web.odd["cache/zarr.json"] = answer(status, b"<html>" + b"a page " * 1000)
    refused(lambda: pull(f"{web.url}/cache", "x"), match)
    assert web.answers["cache/zarr.json"] == requests


def test_not_there(web: FileServer) -> None:
    refused(lambda: pull(f"{web.url}/nowhere", "x"), "there is no cache at")


def test_tls(source: Path, web: FileServer, tmp_path: Path) -> None:
    refused(lambda: pull(web.url.replace("http", "https") + "/cache", "x"), "does not speak TLS")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem -out c.pem -days 2 -subj /CN=localhost"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    with serve(source.parent) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        port = secure.server_address[1]
        refused(lambda: pull(f"https://localhost:{port}/cache", "x"), "certificate that cannot be trusted")


@pytest.mark.parametrize("endpoint", ["closed", "silent", "disabled"])
def test_no_credentials_for_s3_are_said_at_once(
    endpoint: str, closed_port: int, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether the metadata service of a cloud refuses, does not answer, or is not to be asked."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(objects, "_METADATA_TIMEOUT_S", 0.2)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    with socket.socket() as full:
        if endpoint == "silent":
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            # Connections that nobody accepts fill the queue; later ones hang.
            waiting = [socket.socket() for _ in range(4)]
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
        if endpoint == "disabled":
            monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://not-asked.invalid")
        start = time.monotonic()
        for call in (lambda: push(source, "s3://bucket/cache"), lambda: list_remote("s3://bucket/cache")):
            error = refused(call, "no credentials for s3://bucket/cache")
            assert "AWS_ACCESS_KEY_ID" in (error.remedy or "") and "AWS_SKIP_SIGNATURE" in (error.remedy or "")
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, r"profile \(absent\) could not be found"),
        ({"config": "[profile absent]\nsource_profile = x\nrole_arn = arn:aws:iam::1:role/x\n"}, "source_profile"),
        ({"config": "no [[[ config"}, "Unable to parse config file"),
    ],
)
def test_credentials_files_that_are_wrong(
    files: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "absent")
    (tmp_path / ".aws").mkdir()
    for name, text in files.items():
        (tmp_path / ".aws" / name).write_text(text)
    error = refused(lambda: list_remote("s3://bucket/cache"), match)
    assert error.remedy and "AWS_PROFILE" in error.remedy


def test_credentials_files_at_another_place(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert list_remote(f"s3://{s3_bucket}/caches") == []


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "localhost:9000", "http://", "s3://x", "https:/x"])
def test_an_endpoint_that_is_no_url(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=r"\$AWS_ENDPOINT_URL is .*, no URL of a service"):
        list_remote("s3://bucket/cache")


@pytest.mark.parametrize(("status", "found"), [(404, "nothing"), (405, "does not list"), (501, "does not list")])
def test_web_servers_that_list_nothing(web: FileServer, monkeypatch, status: int, found: str) -> None:
    def refuse(handler: BaseHTTPRequestHandler) -> None:
        handler.send_error(status)

    monkeypatch.setattr("web_server._Handler.do_PROPFIND", refuse, raising=False)
    if found == "nothing":
        assert list_remote(f"{web.url}/absent") == []
    else:
        assert "a cache itself" in (refused(lambda: list_remote(f"{web.url}/absent"), found).remedy or "")


def test_a_token_in_the_query_goes_with_every_request(web: FileServer, tmp_path: Path) -> None:
    pull(f"{web.url}/cache?token=hidden", tmp_path / "copy")
    assert web.asked and all(path.endswith("?token=hidden") for path in web.asked)
    assert verify(tmp_path / "copy").ok
    error = refused(lambda: pull(f"{web.url}/absent?token=hidden", tmp_path / "other"), "there is no cache")
    assert "hidden" not in str(error)


def test_no_credentials_for_gs(closed_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{closed_port}")
    error = refused(lambda: list_remote("gs://bucket/caches"), "no credentials for gs://bucket/caches")
    assert "gcloud auth application-default login" in (error.remedy or "")


def test_no_such_bucket(s3_bucket: str, source: Path) -> None:
    for call in (
        lambda: push(source, "s3://there-is-none-of-this-name/cache"),
        lambda: pull("s3://there-is-none-of-this-name/cache", "x"),
    ):
        error = refused(call, "there is no bucket 'there-is-none-of-this-name'")
        assert "AWS_ENDPOINT_URL" in (error.remedy or "")


def test_urls_are_shown_without_their_secrets(closed_port: int) -> None:
    error = refused(lambda: pull(f"http://me:hidden@127.0.0.1:{closed_port}/cache", "x"), "refuses")
    assert "hidden" not in str(error)


def test_a_bucket_is_named_without_secrets(s3_bucket: str) -> None:
    error = refused(lambda: pull("s3://me:hidden@absent-bucket/cache", "x"), "no bucket 'absent-bucket'")
    assert "hidden" not in str(error)


# Servers that mean harm


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A root document that never ends, of whatever length the header says."""
    handler.send_response(200)
    handler.send_header("ETag", '"x"')
    handler.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")
    handler.send_header("Content-Length", str(1 << 50))
    handler.end_headers()
    for _ in range(1 << 12):
        handler.wfile.write(bytes(1 << 16))


def headers(content_range: str) -> dict[str, str]:
    return {
        "Content_Range": content_range,
        "ETag": '"x"',
        "Last_Modified": "Thu, 01 Jan 1970 00:00:00 GMT",
    }


@pytest.mark.parametrize(
    ("send", "match"),
    [
        (endless, "longer than the 67108864 bytes"),
        (answer(200, b"{", Content_Length="1"), "not valid JSON"),
        (answer(200, b"[" * 100_000), "not valid JSON|nested"),
        (answer(200, b"{}", Content_Length="100"), "failed 8 times"),
        (answer(302, Location="file:///etc/hostname"), "status 302"),
        (answer(302, Location="/cache/zarr.json"), "from address to address"),
        (answer(302, Location="http://127.0.0.1:1/x"), "failed 8 times"),
        (answer(204), "not valid JSON"),
        (answer(200, b"\x1b]0;owned\x07{"), "not valid JSON"),
    ],
)
def test_root_documents_that_are_none(web: FileServer, send, match: str, monkeypatch) -> None:
    short_timeouts(monkeypatch)
    web.odd["cache/zarr.json"] = send
    refused(lambda: pull(f"{web.url}/cache", "x"), match)


NAME = "cache/tiny@5/c.1.0.0"
SIZE = 16 * 16 * 32 + 16 * 16 + 4


@pytest.mark.parametrize(
    "send",
    [
        answer(206, bytes(SIZE), **headers(f"bytes 0-{SIZE - 1}/{SIZE}")),  # other bytes
        answer(206, bytes(SIZE), **headers(f"bytes 5-{SIZE + 4}/{2 * SIZE}")),  # from elsewhere in the file
        answer(206, bytes(10), **headers(f"bytes 0-{SIZE - 1}/{SIZE}")),  # less than it says
        answer(206, bytes(1 << 24), **headers(f"bytes 0-{SIZE - 1}/{SIZE}")),  # more than it says
        answer(206, bytes(SIZE), **headers("bytes */*")),
        answer(206, bytes(SIZE), **headers(f"bytes 0-{SIZE - 1}/{1 << 62}")),
        answer(200, bytes(SIZE), ETag='"x"', Last_Modified="Thu, 01 Jan 1970 00:00:00 GMT"),  # ranges not known
        answer(416, b""),
    ],
)
def test_answers_that_are_not_what_was_asked(web: FileServer, tmp_path: Path, send, monkeypatch) -> None:
    """In a pull and in a stream: an error, and nothing of it is kept under a final name or read as a value."""
    short_timeouts(monkeypatch)
    web.odd[NAME] = send
    refused(lambda: pull(f"{web.url}/cache", tmp_path / "copy", threads=1), r"tiny@5/c\.1\.0\.0")
    assert not (tmp_path / "copy/tiny@5/c.1.0.0").exists()
    kept = [p for p in tmp_path.rglob("*.fetched") if p.name == "tiny@5+c.1.0.0.fetched"]
    assert all(p.stat().st_size <= SIZE for p in kept)
    cache = featcache.open(f"{web.url}/cache", cache_dir=tmp_path / "blocks")
    with cache.reader(["tiny@5"]) as reader:
        out = reader.allocate(1)
        reader.read([3], out)
        refused(lambda: reader.read([20], out), r"tiny@5/c\.1\.0\.0")


def test_a_server_that_drips_ends(web: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps no connection open beyond the time that a request may take."""
    short_timeouts(monkeypatch)
    stop = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(206)
        for name, value in headers(f"bytes 0-{SIZE - 1}/{SIZE}").items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(SIZE))
        handler.end_headers()
        while not stop.wait(0.05):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return

    web.odd[NAME] = drip
    start = time.monotonic()
    try:
        refused(lambda: pull(f"{web.url}/cache", tmp_path / "copy", threads=1), "failed 8 times")
    finally:
        stop.set()
    assert time.monotonic() - start < 10


def test_lengths_that_a_server_claims_for_compressed_shards(tmp_path: Path) -> None:
    """They are believed as far as they are possible."""
    from large_cache import without_blocks

    path = build(tmp_path / "from" / "cache", compressor="zstd")
    without_blocks(path)
    with serve(path.parent) as web:
        claim = answer(200, b"", Content_Length=str(1 << 40), Last_Modified="Thu, 01 Jan 1970 00:00:00 GMT")
        web.odd[NAME] = claim
        refused(lambda: pull(f"{web.url}/cache", tmp_path / "copy", threads=1), "cannot have 1099511627776 bytes")


@pytest.mark.slow
def test_the_largest_root_document_takes_bounded_memory(web: FileServer) -> None:
    """64 MB of empty lists: refused, within 6 GB and a minute."""
    body = b"[" + b"[]," * ((64 << 20) // 3 - 2) + b"[]]"
    web.odd["cache/zarr.json"] = answer(200, body, ETag='"x"', Last_Modified="Thu, 01 Jan 1970 00:00:00 GMT")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "from featcache.share.transfer import pull\nfrom featcache.errors import CacheError\n"
        f"try: pull('{web.url}/cache', 'x')\nexcept CacheError as error: print(error.what)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "is not a featcache cache" in done.stdout, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6 << 20


def test_destinations(web: FileServer) -> None:
    refused(lambda: open_destination(f"{web.url}/x"), "can only be read")
    assert open_location(f"{web.url}/cache").read_whole("zarr.json", 1 << 20)[1] == '"x"'
