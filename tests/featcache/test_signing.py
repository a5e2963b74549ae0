"""Which cache is it: the digest asked for by name, and signatures made and checked by OpenSSH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from store_helpers import add, build, tokens, tree
from web_server import serve

import featcache
from featcache.errors import CacheError, UserError
from featcache.share.transfer import pull, push
from featcache.store.layout import SIGNATURE
from featcache.store.remote import open_location
from featcache.store.root import cache_digest, read_root
from featcache.store.signing import parse_digest, read_signature, require_signature, sign

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not here")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys `alice` and `bob` without a passphrase, `locked` with one."""
    folder = tmp_path_factory.mktemp("keys")
    for name, passphrase in (("alice", ""), ("bob", ""), ("locked", "a passphrase")):
        command = [
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            passphrase,
            "-C",
            f"{name}@host",
            "-f",
            str(folder / name),
        ]
        subprocess.run(command, check=True)
    return folder


@dataclass(frozen=True)
class Said:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Commands as typed, in this process."""
    from featcache.cli import app
    from featcache.console import run_app

    def call(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", list(words))
        capsys.readouterr()
        try:
            code = run_app(app)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return build(tmp_path / "from" / "cache")


def test_digest_is_printed_and_asked_for(cache: Path, tmp_path: Path, run) -> None:
    shown = run("featcache", "info", str(cache))
    (digest,) = re.findall(r"digest ([0-9a-f]{64})\n", shown.stdout)
    assert digest == cache_digest(read_root(cache))
    wrong = "0" * 64
    with serve(cache.parent) as web:
        url = f"{web.url}/cache"
        for call in (
            lambda: pull(url, tmp_path / "copy", expect=wrong),
            lambda: featcache.open(url, cache_dir=tmp_path / "blocks", expect=wrong),
            lambda: featcache.open(cache, expect=wrong),
        ):
            with pytest.raises(CacheError, match="is not the cache that was expected: its digest is"):
                call()
        # The root document alone was looked at.
        assert set(web.answers) == {"cache/zarr.json"}
        assert not (tmp_path / "copy").exists()
        pull(url, tmp_path / "copy", expect=f"sha256:{digest.upper()}")
        assert len(featcache.open(url, cache_dir=tmp_path / "blocks", expect=digest)) == 50
        refused = run("featcache", "verify", url, "--expect", wrong)
        assert (refused.returncode, "not the cache that was expected" in refused.stderr) == (2, True)
        assert run("featcache", "verify", url, "--expect", digest).returncode == 0
    assert tree(tmp_path / "copy") == tree(cache)
    for text in (digest[:32], "", "x" * 64, digest + "0"):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            parse_digest(text)


def test_sign_push_pull_verify(cache: Path, keys: Path, tmp_path: Path, run) -> None:
    done = run("featcache", "sign", str(cache), "--key", str(keys / "alice"))
    assert done.returncode == 0, done.stderr
    alice, bob = str(keys / "alice.pub"), str(keys / "bob.pub")
    with serve(cache.parent) as web:
        url = f"{web.url}/cache"
        done = run("featcache", "pull", url, str(tmp_path / "copy"), "--signed-by", alice)
        assert done.returncode == 0, done.stderr
        assert tree(tmp_path / "copy") == tree(cache)
        for where in (url, str(tmp_path / "copy")):
            done = run("featcache", "verify", where, "--signed-by", alice)
            assert done.returncode == 0 and "signed by alice" in done.stdout, done.stderr
            refused = run("featcache", "verify", where, "--signed-by", bob)
            assert refused.returncode == 2 and "signed, but not by a key in" in refused.stderr
        refused = run("featcache", "pull", url, str(tmp_path / "other"), "--signed-by", bob)
        assert refused.returncode == 2 and not (tmp_path / "other").exists()


@pytest.mark.parametrize("local", [False, True], ids=["url", "folder"])
def test_what_is_verified_is_what_was_signed(
    cache: Path, keys: Path, tmp_path: Path, run, monkeypatch, local: bool
) -> None:
    """A place that shows the signed cache first and another one, sound in itself, afterwards."""
    sign(cache, keys / "alice")
    other = build(cache.parent / "other", count=20)
    (other / SIGNATURE).write_bytes((cache / SIGNATURE).read_bytes())
    shown = []

    def first_the_signed_one(path: Path) -> bytes:
        shown.append(path)
        return ((cache if len(shown) == 1 else other) / "zarr.json").read_bytes()

    alice = str(keys / "alice.pub")
    with serve(cache.parent) as web:
        if local:
            where = str(other)
            monkeypatch.setattr("featcache.read.root.required_root", lambda place: read_root(cache))
        else:
            where = f"{web.url}/other"

            def send(handler) -> None:
                data = first_the_signed_one(other)
                handler.send_response(200)
                for name, value in (("ETag", '"x"'), ("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")):
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            web.odd["other/zarr.json"] = send
        for option, value in (("--signed-by", alice), ("--expect", cache_digest(read_root(cache)))):
            shown.clear()
            refused = run("featcache", "verify", where, option, value)
            assert refused.returncode == 2 and "it was exchanged" in refused.stderr
            assert "sound" not in refused.stdout


@pytest.mark.parametrize("name", ["my key", "#key", "!key", "*", "-key", "a,b", "sch\u00fcssel", "\udce9"])
def test_the_file_of_a_public_key_may_have_any_name(cache: Path, keys: Path, tmp_path: Path, name: str) -> None:
    sign(cache, keys / "alice")
    public = tmp_path / f"{name}.pub"
    public.write_bytes((keys / "alice.pub").read_bytes())
    assert check(cache, public)
    public.write_bytes((keys / "bob.pub").read_bytes())
    with pytest.raises(CacheError, match="signed, but not by a key in"):
        check(cache, public)
    public.write_text(f"ssh-admins@team {(keys / 'alice.pub').read_text()}")
    assert check(cache, public) == "ssh-admins@team"


def test_signature_goes_with_a_push_while_it_is_of_that_state(cache: Path, keys: Path, s3_bucket: str) -> None:

    sign(cache, keys / "alice")
    url = f"s3://{s3_bucket}/cache"
    push(cache, url, features=["tiny@5"])
    assert read_signature(open_location(url)) is None
    push(cache, url)
    assert read_signature(open_location(url)) == read_signature(open_location(cache))


def check(path: Path, signers: Path) -> str:
    return require_signature(read_root(path), read_signature(open_location(path)), signers, str(path))


def test_every_reason_is_said(cache: Path, keys: Path, tmp_path: Path) -> None:
    alice = keys / "alice.pub"
    with pytest.raises(CacheError, match="is not signed"):
        check(cache, alice)
    sign(cache, keys / "alice")
    assert check(cache, alice) == "alice"
    lines = tmp_path / "allowed_signers"
    lines.write_text(f'# who may\ncarol@host,alice@host namespaces="featcache" {alice.read_text()}')
    assert check(cache, lines) in ("carol@host", "alice@host")
    lines.write_text(f'alice@host namespaces="git" {alice.read_text()}')
    with pytest.raises(CacheError, match=r"not by a key in|is wrong"):
        check(cache, lines)
    with pytest.raises(CacheError, match="signed, but not by a key in"):
        check(cache, keys / "bob.pub")
    with pytest.raises(UserError, match="holds no public key"):
        check(cache, keys / "alice")
    text = (cache / SIGNATURE).read_bytes()
    # The statement of this cache over a signature of another one.
    other = build(tmp_path / "other", count=20)
    sign(other, keys / "alice")
    foreign = (other / SIGNATURE).read_bytes()
    (cache / SIGNATURE).write_bytes(text.split(b"\n", 1)[0] + b"\n" + foreign.split(b"\n", 1)[1])
    with pytest.raises(CacheError, match="is wrong"):
        check(cache, alice)
    (cache / SIGNATURE).write_bytes(foreign)
    with pytest.raises(CacheError, match="of another state of it"):
        check(cache, alice)
    (cache / SIGNATURE).write_bytes(b"nonsense")
    with pytest.raises(CacheError, match="is damaged"):
        check(cache, alice)
    (cache / SIGNATURE).write_bytes(text)
    add(cache, [tokens("new@1")])
    with pytest.raises(CacheError, match=r"features were added or removed(.|\n)*featcache sign"):
        check(cache, alice)
    sign(cache, keys / "alice")
    assert check(cache, alice) == "alice"


def test_a_locked_key_is_refused_at_once_without_a_terminal(cache: Path, keys: Path, cli) -> None:
    start = time.monotonic()
    done = cli("featcache", "sign", str(cache), "--key", str(keys / "locked"), timeout=30)
    assert done.returncode == 2 and "use an agent" in done.stderr
    assert time.monotonic() - start < 10
    assert not (cache / SIGNATURE).exists()
    missing = cli("featcache", "sign", str(cache), "--key", str(keys / "nobody"))
    assert missing.returncode == 2 and "there is no key" in missing.stderr


def test_a_key_in_an_agent_signs(cache: Path, keys: Path, tmp_path: Path, monkeypatch) -> None:
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.05)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", str(keys / "alice")], check=True, env=os.environ)
        public = tmp_path / "only.pub"
        shutil.copy(keys / "alice.pub", public)
        sign(cache, public)
        assert check(cache, keys / "alice.pub") == "alice"
    finally:
        agent.terminate()
        agent.wait()


def test_a_link_in_place_of_the_signature_is_not_followed(cache: Path, keys: Path, tmp_path: Path) -> None:
    (cache / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="symbolic link"):
        sign(cache, keys / "alice")
    with pytest.raises(CacheError, match="symbolic link"):
        read_signature(open_location(cache))
    assert not (tmp_path / "elsewhere").exists()
