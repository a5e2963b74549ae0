"""Commands as tired people and careless scripts type them: empty variables, wrong outputs, URLs for folders, narrow
terminals, full and closed outputs. Nothing may be lost, and what is said must be so.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import base_features, build, tokens, tree

import featcache
from featcache import cli
from featcache.builder import prepare as building
from featcache.builder.request import BuildRequest, parse_names, parse_resolution
from featcache.console import run_app
from featcache.encoders import parse_encoders, parse_levels
from featcache.errors import CacheError, UserError
from featcache.paths import PAGES, check_output, on_this_machine, typed
from featcache.settings import is_number
from featcache.share import manage, trash
from featcache.sources.open import open_source

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """`featcache WORDS` in this process: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["featcache", *words])
        code = run_app(cli.app)
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "unforeseen" not in said.err
        return code, said.out, said.err

    return call


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return build(tmp_path / "caches" / "c", base_features())


@pytest.mark.parametrize("features", ["--features=", "--features", ",", " "])
@pytest.mark.parametrize("command", ["rm --yes", "rm --yes --now", "verify", "push place", "pull there", "restore"])
def test_an_empty_list_of_features_is_not_all_of_them(cache: Path, run: Typed, command: str, features: str) -> None:
    """`--features "$F"` with F unset removed the whole cache."""
    before = tree(cache)
    name, *words = command.split()
    option = {"--features": ["--features", ""], "--features=": ["--features="]}.get(features, ["--features", features])
    code, _, err = run(name, str(cache), *words, *option)
    assert code == 2 and "--features" in err
    assert tree(cache) == before
    assert not Path("place").exists() and not Path("there").exists()


def test_an_empty_path_is_not_the_working_folder(cache: Path, run: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache)
    before = tree(cache)
    for words in (["rm", "", "--yes"], ["gc", ""], ["restore", ""], ["rm", "--yes", ""]):
        code, _, err = run(*words)
        assert code == 2 and "is empty" in err
    assert tree(cache) == before


@pytest.mark.parametrize("words", [["catalogue", "{caches}", "--html"], ["inspect", "{cache}", "--out"]])
def test_an_output_replaces_nothing_of_another_kind(cache: Path, run: Typed, tmp_path: Path, words: list[str]) -> None:
    """A page over `zarr.json`, which nothing can restore; over a device, as root."""
    before = tree(cache)
    os.mkfifo(tmp_path / "pipe.html")
    os.mkfifo(tmp_path / "pipe.png")
    ending = "html" if words[0] == "catalogue" else "png"
    given = [word.format(cache=cache, caches=cache.parent) for word in words]
    for target in (cache / "zarr.json", cache, tmp_path / f"pipe.{ending}", Path("/dev/null"), tmp_path / "x.zzz"):
        code, _, err = run(*given, str(target))
        assert code == 2 and str(target) in err, target
    assert tree(cache) == before
    assert stat.S_ISFIFO((tmp_path / f"pipe.{ending}").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_file_in_the_way_may_be_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.HTML"
    page.write_text("old")
    assert check_output(page, PAGES, example="x.html") == page
    assert check_output(tmp_path / "new.htm", PAGES, example="x.html") == tmp_path / "new.htm"


@pytest.mark.parametrize(
    "words",
    [
        *("rm {url} --yes", "restore {url}", "gc {url}", "sign {url} --key k", "repair {url}", "push {url} place"),
        *("pull {cache} {url}", "convert {cache} {url} --to zarr", "convert {url} new --to zarr"),
        *("build --data shapes --encoder tiny --out {url}", "build --into {url} --encoder tiny"),
        "import {cache} --from repa --out {url}",
    ],
)
def test_a_url_is_no_folder(
    cache: Path, run: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """`featcache pull CACHE s3://bucket/c` made a local folder named `s3:`."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words.format(url="s3://bucket/c", cache=cache).split())
    assert code == 2 and "s3://bucket/c is a URL" in err
    assert not (tmp_path / "s3:").exists()


def test_what_is_taken_for_a_url() -> None:
    for path in ("caches/c", "/x/s3/c", "s3", "C:/x", "a/s3:/b"):
        assert on_this_machine(Path(path)) == Path(path)
    for url in ("s3://b/c", "gs://b", "hf://datasets/a/b", "https://h/c", "file:///c"):
        with pytest.raises(UserError, match="is a URL"):
            on_this_machine(Path(url))


def test_numbers_are_ascii_digits() -> None:
    """`'²'.isdigit()` holds, and `int('²')` raises."""
    assert is_number("12") and not any(map(is_number, ("", "²", "١", "-1", "1" * 19)))
    for text in ("tiny@²", "tiny@", "tiny@١"):
        with pytest.raises(UserError, match="is not an encoder or a layer"):
            parse_encoders([text])
    for text in ("0", "²", "-64", "64x64", "9" * 5000):
        with pytest.raises(UserError, match="--resolution") as caught:
            parse_resolution(text)
        assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match="must be a seed"):
        open_source("shapes:²", resolution=64)


def test_lists_that_name_nothing_are_errors() -> None:
    """They meant the default: all levels, no text encoder."""
    for text in ("", ",", " "):
        with pytest.raises(UserError, match="names no level"):
            parse_levels(text)
        with pytest.raises(UserError, match="names no encoder"):
            parse_names([text])
    assert parse_levels(None) == ()


@pytest.mark.parametrize(
    "values", [{"limit": 1 << 70}, {"seed": 1 << 70}, {"batch_size": 1 << 40}, {"workers": True}, {"flip": 1}]
)
def test_every_refused_setting_has_a_remedy(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        BuildRequest(data="shapes", **values)
    assert error.value.remedy


def test_a_shard_size_that_cannot_be_is_no_damage(cache: Path, tmp_path: Path) -> None:
    from featcache.share.convert import convert

    for size in (0, (1 << 20) + 1):
        with pytest.raises(CacheError, match=r"a shard cannot hold \d+ samples") as error:
            convert(cache, tmp_path / "new", to="zarr", shard_size=size)
        assert "--shard-size" in str(error.value.remedy)
    assert not (tmp_path / "new").exists()


def test_numbers_of_threads_and_rates(cache: Path, run: Typed) -> None:
    for words in (
        ["verify", str(cache), "--threads", "0"],
        ["verify", str(cache), "--threads", "-5"],
        ["plan", "--data", "shapes", "--encoder", "tiny", "--batch", "-3"],
        ["plan", "--data", "shapes", "--encoder", "tiny", "--steps-per-s", "-1"],
    ):
        assert run(*words)[0] == 2, words


# What is printed


def test_names_are_shown_as_they_are(run: Typed) -> None:
    """Rich made an emoji of `:x:`."""
    _, _, err = run("info", "a:x:b:smile:")
    assert "a:x:b:smile:" in err


def test_tables_are_whole_in_a_file_and_on_a_narrow_terminal(
    tmp_path: Path, run: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were cut at 80 columns: the ends of paths, the last digits of numbers, all features."""
    place = tmp_path / ("long" * 30) / "caches"
    build(place / "c", base_features())
    for columns in ("80", "20", "1"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = run("ls", str(place))
        (line,) = [line for line in out.splitlines() if str(place / "c") in line]
        assert line.split()[1] == "50" and line.endswith("tiny@5 vae/moments")
        _, out, _ = run("info", str(place / "c"))
        assert any(line.startswith("vae/moments") and "8x4x4" in line and "fp16" in line for line in out.splitlines())


def test_a_name_that_the_encoding_lacks_is_shown_otherwise(tmp_path: Path) -> None:
    """It was a fault of the program, after the work."""
    build(tmp_path / "ünï" / "c", base_features())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [str(Path(sys.executable).with_name("featcache")), "ls", "ünï"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and r"\xfcn\xef/c" in done.stdout


def test_hints_can_be_typed() -> None:
    assert typed("a b") == "'a b'" and typed("-x") == "./-x" and typed("plain/x") == "plain/x"


# Where it is printed


def _output(path: Path, words: list[str], *, stdout: str, stderr: str = "{path}/err") -> tuple[int, str]:
    program = Path(sys.executable).with_name("featcache")
    line = " ".join([str(program), *words, ">", stdout, "2>", stderr.format(path=path)])
    done = subprocess.run(["bash", "-c", line], cwd=path, stdin=subprocess.DEVNULL, check=False)
    error = path / "err"
    return done.returncode, error.read_text() if error.exists() else ""


def test_a_full_disk_under_the_output_is_an_error(cache: Path, tmp_path: Path) -> None:
    """It was exit code 120, with two lines of the interpreter's."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    code, err = _output(tmp_path, ["ls", "caches"], stdout="/dev/full")
    assert code == 2 and "No space left" in err and "Exception ignored" not in err
    code, _ = _output(tmp_path, ["info", "nope"], stdout="/dev/null", stderr="/dev/full")
    assert code == 2


def test_nobody_reads_what_is_said(cache: Path, tmp_path: Path) -> None:
    """141, as of other programs: not 0, which says of a damaged cache that it is sound, and not 1, which says that it
    is damaged."""
    (cache / "label" / "c.0").write_bytes(b"damaged")
    program = Path(sys.executable).with_name("featcache")
    for words in (["verify", "caches/c"], ["ls", "caches"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([program, *words], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert done.returncode == 141 and done.stderr == b"", words


def test_rm_without_standard_input_removes_nothing(cache: Path, tmp_path: Path) -> None:
    line = f"{Path(sys.executable).with_name('featcache')} rm caches/c <&-"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--yes" in done.stderr and "unforeseen" not in done.stderr
    assert (cache / "zarr.json").is_file()


def test_standard_output_is_flushed_before_the_exit_code(monkeypatch: pytest.MonkeyPatch, run: Typed) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "argv", ["featcache", "--help"])
    assert run_app(cli.app) == 2


# The trash and the clock


def test_the_trash_is_emptied_after_the_clock_went_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--older-than 0d` is for all of it, also for what was removed in what is now the future."""
    now = trash._now_s()
    monkeypatch.setattr(trash, "_now_s", lambda: now)
    manage.remove_cache(cache)
    monkeypatch.setattr(trash, "_now_s", lambda: now - 86_400)
    assert not manage.collect_garbage(cache.parent, older_than_s=60)
    assert len(manage.collect_garbage(cache.parent, older_than_s=0)) == 1


def test_restoring_where_nothing_was_says_so(tmp_path: Path, cache: Path) -> None:
    """It said that the folder holds an unfinished build, since its own lock had just been made there."""
    (tmp_path / "notes").mkdir()
    with pytest.raises(CacheError, match="there is no cache at"):
        manage.restore(tmp_path / "notes")
    assert not any((tmp_path / "notes").iterdir())
    with pytest.raises(CacheError) as error:
        manage.restore(cache)
    assert error.value.remedy


# Adding features


BUILD = ("build", "--data", "shapes", "--limit", "4", "--batch-size", "4", "--workers", "1", "--device", "cpu")


def test_what_cannot_be_chosen_when_features_are_added(run: Typed, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    assert run(*BUILD, "--encoder", "tiny@2", "--vae-levels", "G3", "--out", path)[0] == 0
    before = tree(tmp_path / "c")
    into = ("build", "--data", "shapes", "--device", "cpu", "--into", path, "--encoder", "tiny@2,5")
    for option in (["--seed", "7"], ["--shard-size", "2"], ["--flip"], ["--compressor", "zstd"], ["--format", "wds"]):
        code, _, err = run(*into, *option)
        assert code == 2 and option[0] in err and "when features are added" in err
    assert tree(tmp_path / "c") == before
    # What is there already stays, and is said to be otherwise than it was asked for.
    code, out, _ = run(*into, "--seed", "0", "--tokens-codec", "fp16")
    assert code == 0 and "tiny@2 is there already" in out and "codec: int8 there, fp16 here" in out
    assert "tiny@5 is there" not in out
    assert featcache.open(path).manifest.features["tiny@5"].codec == "fp16"
    code, out, _ = run(*into, "--tokens-codec", "int8")
    assert "tiny@2 is there" not in out and "tiny@5 is there already" in out


def test_a_feature_named_twice_is_removed_once(tmp_path: Path, run: Typed) -> None:
    path = build(tmp_path / "c", [*base_features(), tokens("tiny@2")])
    code, out, _ = run("rm", str(path), "--features", "tiny@2,2,tiny@2", "--yes")
    assert code == 0 and "removed tiny@2 of" in out
    assert run("restore", str(path))[0] == 0
    assert "tiny@2" in featcache.open(path).manifest.features


def test_no_cache_is_made_inside_another(cache: Path, run: Typed, tmp_path: Path) -> None:
    """It went to the trash with the one around it."""
    before = tree(cache)
    for words in ("push {c} {c}/sub", "pull {c} {c}/vae/sub", "convert {c} {c}/sub --to wds"):
        code, _, err = run(*words.format(c=cache).split())
        assert code == 2 and "lies inside the cache" in err
    assert tree(cache) == before
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    assert run("push", str(cache), str(tmp_path / "group" / "c"))[0] == 0


def test_a_pattern_of_very_many_archives(tmp_path: Path) -> None:
    """Its names were all made before the first was looked for."""
    from featcache.sources.archives import find_places

    with pytest.raises(UserError, match="there is no archive"):
        find_places(str(tmp_path / "{000..99999999999}{000..99999999999}.tar"))


# What is not the files'


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", ["label/c.0", "tiny@5/SHA256SUMS", "key/zarr.json"])
def test_what_cannot_be_read_at_the_moment_is_not_called_damaged(
    cache: Path, run: Typed, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    """`verify` under a low `ulimit -n` said that shards are damaged, and to repair them."""
    real = os.open

    def refused(path: str | Path, flags: int, *others: int) -> int:
        if str(path).endswith(name):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *others)

    monkeypatch.setattr(os, "open", refused)
    done, out, err = run("verify", str(cache))
    assert done == 2 and "damaged" not in out and os.strerror(code) in err and name in err
    code = errno.EIO  # a disk that fails is a matter of the file
    done, out, _ = run("verify", str(cache))
    assert done == 1 and "damaged" in out


def test_a_limit_on_threads_is_said(monkeypatch: pytest.MonkeyPatch, run: Typed, cache: Path) -> None:
    import threading

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    code, _, err = run("verify", str(cache))
    assert code == 2 and "ulimit -u" in err


def test_a_working_folder_that_is_gone(tmp_path: Path, run: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, _, err = run("ls")
    assert code == 2 and "was removed" in err
    monkeypatch.chdir(tmp_path)


def test_a_home_that_nobody_knows(cache: Path, run: Typed) -> None:
    code, _, err = run("sign", str(cache), "--key", "~nobody-of-that-name/key")
    assert code == 2 and "there is no key ~nobody-of-that-name/key" in err


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An id without a name, as containers have: streaming and archives ended in a fault of the program."""
    from featcache.read.stream import default_cache_directory
    from featcache.sources.archives import index_folder
    from featcache.store.remote import open_location

    def unknown(_: type) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(unknown))
    for name in ("XDG_CACHE_HOME", "FEATCACHE_STREAM_DIR", "FEATCACHE_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for find, variable in ((default_cache_directory, "FEATCACHE_STREAM_DIR"), (index_folder, "FEATCACHE_INDEX")):
        with pytest.raises(UserError, match="no home folder") as error:
            find()
        assert variable in str(error.value.remedy)
        monkeypatch.setenv(variable, str(tmp_path))
        assert find() == tmp_path
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    for url in ("s3://bucket/c", "gs://bucket/c"):
        open_location(url)


def test_small_caches_need_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """256 MiB had to be free for any; the error said that 0.00 GB are needed where 0.11 GB are free."""
    specs = base_features()
    n_bytes = 10 * sum(spec.bytes_per_sample for spec in specs)
    for free, enough in ((2 * n_bytes, True), (2 * n_bytes - 1, False)):
        monkeypatch.setattr(building, "free_bytes", lambda _, free=free: free)
        if enough:
            building.check_disk(tmp_path, specs, samples=10)
        else:
            with pytest.raises(UserError, match=r"needs 1\d\.?\d* KB of free space, but its disk has 1\d\.?\d* KB"):
                building.check_disk(tmp_path, specs, samples=10)
    assert building.room_for(1 << 40) == (1 << 40) + building.RESERVE_BYTES
