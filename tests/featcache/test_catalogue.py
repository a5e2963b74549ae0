"""The page about a place's caches: what it says, and that nothing in a manifest can become part of the page."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from store_helpers import add, base_features, build, moments, tokens, tree
from web_server import serve

from featcache.errors import CacheError
from featcache.share import catalogue
from featcache.share import verification as verified
from featcache.share.transfer import list_remote, pull, push
from featcache.share.verify import verify
from featcache.store import FeatureSpec, files
from featcache.store.manifest import Skipped
from featcache.store.root import cache_digest, read_root, root_bytes

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}</style></title>\u202egnp\x1b[31m"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


class Page(HTMLParser):
    """What a browser makes of a page: its elements with attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile(path: Path) -> Path:
    """A cache whose manifest is valid and says whatever it can say."""
    spec = FeatureSpec(
        name="enc@1", shape=(16, 32), codec="int8", provenance={"weights": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}
    )
    build(path, [*base_features(), spec])
    manifest = read_root(path)
    dataset = replace(
        manifest.dataset,
        name=HOSTILE,
        source=f"https://ann:secret@host/{HOSTILE}",
        class_names=(HOSTILE,) * 3,
        preprocessing={"note": {"x": HOSTILE}, "crop": HOSTILE},
        vae={"name": HOSTILE, "latent_channels": 4, "downsampling": 8, "scaling_factor": 1, "shift_factor": 0},
    )
    odd = replace(
        manifest, dataset=dataset, versions={HOSTILE: HOSTILE}, skipped=(Skipped(slot=0, key=HOSTILE, reason=HOSTILE),)
    )
    (path / "zarr.json").write_bytes(root_bytes(odd))
    return path


def test_nothing_in_a_manifest_becomes_part_of_the_page(tmp_path: Path) -> None:
    plain = build(tmp_path / "caches" / "plain")
    harmless = Page(catalogue.render(catalogue.gather(str(plain)), "caches"))
    path = hostile(tmp_path / "caches" / HOSTILE.replace("/", "_"))
    shutil.rmtree(plain)
    entry = verified.of_report(verify(path), ["tiny@5"])
    assert entry is not None
    (path / ".featcache").mkdir(exist_ok=True)
    (path / verified.NAME).write_bytes(verified.dump([replace(entry, by=HOSTILE[:200], features=(HOSTILE[:100],))]))
    html = catalogue.render(catalogue.gather(str(tmp_path / "caches")), HOSTILE)
    page = Page(html)
    allowed = {tag for tag, _ in harmless.elements}
    assert {tag for tag, _ in page.elements} <= allowed | {"b", "i", "small"}
    for tag in ("script", "style", "title", "meta"):
        assert len(page.all(tag)) == len(harmless.all(tag)), tag
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "secret" not in html


def test_the_policy_allows_just_the_pages_own_script_and_style(tmp_path: Path) -> None:
    import base64
    import hashlib
    import re

    html = catalogue.render(catalogue.gather(str(build(tmp_path / "cache"))), "x")
    policy = next(
        m["content"] for m in Page(html).all("meta") if "content" in m and "default-src" in (m["content"] or "")
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert not re.search(r"(?:https?:)?//[\w.]+/", html.replace(str(tmp_path), ""))


def record(cache: Path) -> None:
    """Notes what a verification of a cache finds."""
    found = verified.of_report(verify(cache), None)
    assert found is not None
    verified.record(cache, found)


def test_what_it_says(tmp_path: Path) -> None:
    folder = tmp_path / "caches"
    whole = build(folder / "whole", [*base_features(), tokens("dino@9", provenance={"weights": "random", "seed": 1})])
    record(whole)
    os.utime(whole / "zarr.json", (1_700_000_000, 1_700_000_000))
    damaged = build(folder / "damaged", [tokens()])
    (damaged / "tiny@5" / "c.1.0.0").unlink()
    record(damaged)
    changed = build(folder / "changed", [tokens()])
    record(changed)
    add(changed, [moments()])
    build(folder / "never")
    (folder / "junk").mkdir()
    (folder / "junk" / "zarr.json").write_text("{}")
    rows = {row.name: row for row in catalogue.gather(str(folder))}
    assert list(rows) == sorted(rows)
    assert rows["whole"].encoders == ["VAE unknown", "dino (random weights)", "tiny"]
    assert catalogue.time_text(rows["whole"].changed) == "2023-11-14 22:13 UTC"
    assert rows["whole"].digest == cache_digest(read_root(whole))
    assert [rows[n].current for n in ("whole", "changed", "never")] == [True, False, False]
    assert "no attribute" in (rows["junk"].problem or "")
    page = Page(catalogue.render(rows.values(), str(folder)))
    badges = [a for a in page.all("span") if (a.get("class") or "").startswith("badge")]
    assert sorted(str(a["class"]).split()[1] for a in badges) == ["bad", "good", "none", "old"]
    for text in ("dino@9", "16x32", "int8", rows["whole"].digest, f"featcache pull {whole} caches/whole"):
        assert text in page.text
    bodies = {a["data-name"]: a for a in page.all("tbody")}
    assert bodies["whole"]["data-changed"] == "1700000000"
    assert int(bodies["whole"]["data-bytes"] or 0) == rows["whole"].n_bytes > 0


def test_the_pull_command_is_quoted(tmp_path: Path) -> None:
    (row,) = catalogue.gather(str(build(tmp_path / "a b;rm -rf ~")))
    assert row.pull == f"featcache pull '{tmp_path}/a b;rm -rf ~' 'caches/a b;rm -rf ~'"


def test_many_features_are_cut_off(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(catalogue, "_MAX_FEATURES", 3)
    page = catalogue.render(catalogue.gather(str(build(tmp_path / "cache", [*base_features(), tokens("x@1")]))), "x")
    assert "and 2 more" in page


def test_of_a_bucket(tmp_path: Path, s3_bucket: str, cli) -> None:
    url = f"s3://{s3_bucket}/team"
    source = build(tmp_path / "cache")
    push(str(source), f"{url}/good")
    (tmp_path / "bad").mkdir()
    import boto3

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object(
        Bucket=s3_bucket, Key="team/bad/zarr.json", Body=b"[/red]not json"
    )
    assert [(found.manifest is None, found.problem is None) for found in list_remote(url)] == [
        (True, False),
        (False, True),
    ]
    done = cli("featcache", "verify", f"{url}/good", "--record")
    assert done.returncode == 0, done.stderr
    done = cli("featcache", "catalogue", url, "--html", "page.html")
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "page.html").read_text())
    assert f"featcache pull {url}/good caches/good" in page.text
    assert "not valid JSON" in page.text
    assert [str(a["class"]) for a in page.all("span") if "badge" in str(a.get("class"))] == ["badge good"]
    done = cli("featcache", "ls", url)
    assert done.returncode == 0, done.stderr
    assert "not valid JSON" in done.stdout
    done = cli("featcache", "catalogue", url)
    assert "sound: every byte" in done.stdout


ODD_NAMES = ["sp ace", "a?b", "a#b", "a%2Fb", "a%b", "\u00e9", "x'y", "...", "-x", "a+b", "  ", "a@b", "a:b"]


def test_whatever_a_cache_in_a_bucket_is_called_it_is_listed_and_can_be_pulled(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    source = build(tmp_path / "cache")
    client = boto3.client("s3")
    for name in ODD_NAMES:
        for file, data in tree(source).items():
            if file == "zarr.json" or name == "a?b":
                client.put_object(Bucket=s3_bucket, Key=f"team/{name}/{file}", Body=data)
    rows = catalogue.gather(f"s3://{s3_bucket}/team")
    assert len(rows) == len(ODD_NAMES) and all(row.problem is None and row.changed for row in rows)
    for row in rows:
        _, _, where, folder = shlex.split(row.pull)
        assert [entry.url for entry in list_remote(where)] == [where] and folder == f"caches/{row.name}"
    pull(next(row.where for row in rows if "%3F" in row.where), tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)
    client.put_object(Bucket=s3_bucket, Key="team//zarr.json", Body=b"")
    with pytest.raises(CacheError, match="cannot be part of a path") as caught:
        catalogue.gather(f"s3://{s3_bucket}/team")
    assert "renamed" in str(caught.value)


def test_a_half_pushed_cache_is_no_list_of_caches(tmp_path: Path, s3_bucket: str, cli) -> None:
    """Until its root document arrives, a push shows only documents of arrays and groups, in folders of their own."""
    import boto3

    source, client = build(tmp_path / "cache"), boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name, data in tree(source).items():
        if name != "zarr.json":
            client.put_object(Bucket=s3_bucket, Key=f"caches/c/{name}", Body=data)
    assert list_remote(f"s3://{s3_bucket}/caches/c") == []
    client.put_object(Bucket=s3_bucket, Key="caches/bad/zarr.json", Body=b'{"attributes": {"featcache": 1}}')
    for url in (f"s3://{s3_bucket}/caches", f"s3://{s3_bucket}/caches/bad"):
        (found,) = list_remote(url)
        assert found.url.endswith("/bad")
        assert "damaged" in (found.problem or "")
    done = cli("featcache", "ls", f"s3://{s3_bucket}/caches/c")
    assert done.returncode == 2
    assert "no caches at" in done.stderr


def test_of_a_web_server(tmp_path: Path) -> None:
    build(tmp_path / "site" / "cache")
    with serve(tmp_path / "site") as server:
        (row,) = catalogue.gather(f"{server.url}/cache")
    assert row.name == "cache"
    assert row.checked is None
    assert row.manifest is not None


def test_as_typed(tmp_path: Path, cli) -> None:
    build(tmp_path / "caches" / "one")
    done = cli("featcache", "catalogue")
    assert done.returncode == 0, done.stderr
    assert "featcache pull" in done.stdout
    assert cli("featcache", "catalogue", "caches", "--html", "page.html").returncode == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "empty").mkdir()
    assert cli("featcache", "catalogue", "empty").returncode == 2
