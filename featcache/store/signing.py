"""Which cache is it, and who vouches for it: the digest that names a cache, and a signature over it.

The signature is an OpenSSH one (`ssh-keygen -Y sign`), so that keys in agents and on hardware tokens work and nothing
here handles a private key. It lies beside the root document:

    featcache cache sha256:<digest>
    -----BEGIN SSH SIGNATURE-----
    ...

and signs the first line, line feed included, in the namespace `featcache`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from featcache.errors import CacheError, UserError
from featcache.keys import printable
from featcache.store import files
from featcache.store.layout import SIGNATURE
from featcache.store.manifest import Manifest
from featcache.store.places import Location, Missing
from featcache.store.root import cache_digest, read_root

MAX_SIGNATURE_BYTES = 64 << 10
_NAMESPACE = "featcache"
_MAX_SIGNERS_BYTES = 1 << 20
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})\Z")
_STATEMENT = re.compile(rb"featcache cache sha256:([0-9a-f]{64})\n")
# A bare public key: its type, then what all of them begin with in base64.
_PUBLIC_KEY = re.compile(r"(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+\s+AAAA")
# What a line of allowed signers would take for something else in a name: patterns, lists, quotes, comments.
_NOT_IN_A_NAME = re.compile(r"[^\w.@+=-]")
# A person may have to find a token and touch it; a machine answers at once or not at all.
_PERSON_S, _MACHINE_S = 300, 30


def parse_digest(text: str) -> str:
    """The digest in `[sha256:]<64 hexadecimal digits>`; raises `UserError` for anything else.

    A prefix does not do: whoever makes two caches whose digests begin alike could show one and send the other.
    """
    match = _DIGEST.match(text.strip().lower())
    if match is None:
        raise UserError(
            f"{text!r:.100} is not the digest of a cache: that has 64 hexadecimal digits",
            remedy="featcache info CACHE prints it",
        )
    return match[1]


def require_digest(manifest: Manifest, expect: str | None, where: str) -> None:
    """Raises `CacheError` unless the cache is the expected one."""
    if expect is None:
        return
    wanted, found = parse_digest(expect), cache_digest(manifest)
    if found != wanted:
        raise CacheError(
            f"{where} is not the cache that was expected: its digest is {found}, not {wanted}",
            remedy="ask whoever gave you the digest: features may have been added since, or it is another cache",
        )


def sign(path: Path, key: Path) -> str:
    """Sign the cache in a directory with an SSH key (private, or public with the private one in an agent).

    Returns the digest that is signed now. Raises `UserError` if the key cannot be used; it never waits for a passphrase
    where there is no terminal.
    """
    digest = cache_digest(read_root(path))
    if not key.is_file():
        raise UserError(f"there is no key {key}", remedy="ssh-keygen -t ed25519 makes one")
    statement = _statement(digest)
    person = sys.stdin.isatty()
    done = _ssh_keygen(["-Y", "sign", "-n", _NAMESPACE, "-f", str(key)], statement, person=person)
    if done.returncode != 0 or b"BEGIN SSH SIGNATURE" not in done.stdout:
        hint = "" if person else " (there is no terminal to ask for a passphrase: use an agent, ssh-add)"
        raise UserError(
            f"{key} could not sign: {_said(done)}{hint}", remedy=f"ssh-keygen -y -f {key} says whether the key is sound"
        )
    files.atomic_write(files.inside(path, SIGNATURE), [statement + done.stdout])
    return digest


def read_signature(place: Location) -> bytes | None:
    """The signature file of the cache at a place, None if there is none."""
    try:
        return place.read_whole(SIGNATURE, MAX_SIGNATURE_BYTES)[0]
    except Missing:
        return None


def require_signature(manifest: Manifest, signature: bytes | None, signers: Path, where: str) -> str:
    """Who signed the cache. `signers`: a public key, or an allowed-signers file as ssh-keygen(1) describes it.

    Raises `CacheError` that says whether the signature is missing, of another state of the cache, by another key, or
    wrong; `UserError` if the file of signers cannot be used.
    """
    allowed = _allowed_signers(signers)
    if signature is None:
        raise CacheError(
            f"{where} is not signed", remedy="ask whoever shares it to run: featcache sign CACHE --key KEY"
        )
    statement = _STATEMENT.match(signature)
    if statement is None:
        raise CacheError(f"{where}/{SIGNATURE} is damaged: it is not a signature of a cache")
    digest = cache_digest(manifest)
    if statement[1].decode() != digest:
        raise CacheError(
            f"the signature of {where} is of another state of it (features were added or removed, or it was replaced): "
            f"signed was {statement[1].decode()}, it is {digest}",
            remedy="ask whoever signed it to look at it and run again: featcache sign CACHE --key KEY",
        )
    with tempfile.TemporaryDirectory(prefix="featcache-signature-") as folder:
        sig, lines = Path(folder) / "signature", Path(folder) / "allowed_signers"
        sig.write_bytes(signature[statement.end() :])
        lines.write_text(allowed)
        found = _ssh_keygen(["-Y", "find-principals", "-s", str(sig), "-f", str(lines)], b"")
        names = found.stdout.decode(errors="replace").splitlines() if found.returncode == 0 else []
        if not names:
            raise CacheError(
                f"{where} is signed, but not by a key in {signers} ({_said(found)})",
                remedy="use the public key of whoever signed it, if you trust them, or do not use this cache",
            )
        # A line of allowed signers may name several, separated by commas.
        name = names[0].split(",")[0]
        words = ["-Y", "verify", "-n", _NAMESPACE, "-f", str(lines), "-I", name, "-s", str(sig)]
        done = _ssh_keygen(words, _statement(digest))
    if done.returncode != 0:
        raise CacheError(
            f"the signature of {where} is wrong ({_said(done)})",
            remedy="do not use this cache before whoever shares it has signed it again",
        )
    return name


def _statement(digest: str) -> bytes:
    return f"featcache cache sha256:{digest}\n".encode()


def _allowed_signers(path: Path) -> str:
    """The lines of an allowed-signers file; a public key becomes such a line."""
    text = files.read_bounded(path, _MAX_SIGNERS_BYTES).decode(errors="replace")
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not lines or "PRIVATE KEY" in text:
        raise UserError(
            f"{path} holds no public key",
            remedy="give the .pub file, or lines as man ssh-keygen, ALLOWED SIGNERS, says",
        )
    name = _NOT_IN_A_NAME.sub("_", printable(path.stem))
    keys = [f'{name} namespaces="{_NAMESPACE}" {line}' if _PUBLIC_KEY.match(line) else line for line in lines]
    return "".join(line + "\n" for line in keys)


def _ssh_keygen(words: list[str], message: bytes, *, person: bool = False) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UserError("signatures need OpenSSH's ssh-keygen", remedy="install it (Debian: openssh-client)")
    # Without a person: no terminal to ask on, no window either.
    environment = os.environ if person else {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}
    try:
        return subprocess.run(
            [program, *words],
            input=message,
            capture_output=True,
            env=environment,
            timeout=_PERSON_S if person else _MACHINE_S,
            start_new_session=not person,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError("ssh-keygen did not answer in time", remedy="check the agent: ssh-add -l") from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line that ssh-keygen wrote."""
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else f"ssh-keygen ended with {done.returncode}"
