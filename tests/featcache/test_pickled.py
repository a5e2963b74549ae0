"""Pickles read as data: what numpy and ReDi write comes out right, and nothing that a pickle names is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.read import maps
from featcache.read.maps import load_map
from featcache.read.pickled import MAX_OPCODES, Made, Named, array, read_pickle

C, ALL = 6, 5


# What it is for


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["<f2", "<f4", "<f8", ">f4", ">f8"]),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from("CF"),
    st.integers(2, 5),
    st.integers(0, 2**32 - 1),
)
def test_arrays_of_every_protocol(kind: str, shape: list[int], order: Any, protocol: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=shape).astype(kind)
    written = pickle.dumps({"a": np.array(values, order=order)}, protocol=protocol)
    found = array(read_pickle(written)["a"], "a")
    assert found.dtype == np.float64 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, values.astype(np.float64))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(plain, st.integers(3, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol=protocol)) == value


def redi_file(path: Path, monkeypatch: pytest.MonkeyPatch, *, save: Callable[[Any, Path], None]) -> dict[str, Any]:
    """What ReDi's calc_pca.py saves, by a class of sklearn's name; float32 as there."""
    module = types.ModuleType("sklearn.decomposition._pca")
    PCA = type("PCA", (), {"__module__": module.__name__})
    module.PCA = PCA  # type: ignore[attr-defined]
    for name in ("sklearn", "sklearn.decomposition"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rng = np.random.default_rng(0)
    model: Any = PCA()
    facts = {
        "components_": np.asfortranarray(np.linalg.qr(rng.normal(size=(C, C)))[0][:ALL].astype(np.float32)),
        "mean_": rng.normal(size=C).astype(np.float32),
        "explained_variance_": np.sort(rng.uniform(1, 9, ALL))[::-1].astype(np.float32),
    }
    vars(model).update(
        {"n_components": ALL, "whiten": False, "random_state": None, "_sklearn_version": "1.6.0", **facts}
    )
    mean, std = rng.normal(size=C).astype(np.float32), rng.uniform(0.5, 2, C).astype(np.float32)
    save({"pca_model": model, "mean": mean, "std": std}, path)
    return {**facts, "mean": mean, "std": std}


def save_bare(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=5))


@pytest.mark.parametrize("save", [torch.save, save_bare])
def test_redis_file_is_folded_into_one_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Any, Path], None]
) -> None:
    file = tmp_path / "dino_pca_model.pth"
    facts = redi_file(file, monkeypatch, save=save)
    monkeypatch.undo()
    assert "sklearn.decomposition._pca" not in sys.modules
    found = load_map(file, 3)
    assert "sklearn.decomposition._pca" not in sys.modules
    y = np.random.default_rng(1).normal(size=(20, C))
    exact = {name: values.astype(np.float64) for name, values in facts.items()}
    z = ((y - exact["mean"]) / exact["std"] - exact["mean_"]) @ exact["components_"][:3].T
    np.testing.assert_allclose(y @ found.map.matrix + found.map.offset, z, rtol=1e-12, atol=1e-12)
    assert found.variance is not None
    np.testing.assert_allclose(found.variance, exact["explained_variance_"][:3])
    assert found.total == pytest.approx(exact["explained_variance_"].sum())
    assert found.how["file"] == "dino_pca_model.pth"
    with pytest.raises(UserError, match="has 5 components, not 6"):
        load_map(file, 6)


# What it must not do


class Runs:
    """Pickles as a call of anything."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self) -> Any:
        return self.call


def chain(depth: int) -> Runs:
    value = Runs(os.system, "touch run")
    for _ in range(depth):
        value = Runs(getattr, value, "name")
    return value


CALLS = {
    "os.system": Runs(os.system, "touch run"),
    "eval": Runs(eval, "open('run', 'w')"),
    "exec": Runs(exec, "open('run', 'w')"),
    "open": Runs(open, "run", "w"),
    "import": Runs(__import__, "antigravity"),
    "chain": chain(40),
    "in a list": [Runs(os.system, "touch run")] * 3,
    "in an array": np.array([Runs(os.system, "touch run")], dtype=object),
    "in a state": OrderedDict(a=Runs(os.system, "touch run")),
    "slots": Fraction(1, 3),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_called_or_imported(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(CALLS[name], protocol=protocol)
    read_pickle(pickle.dumps([1.0], protocol=protocol))  # what the reader itself loads late
    before = set(sys.modules)
    try:
        found = read_pickle(data)
    except UserError:
        found = None
    assert set(sys.modules) == before
    assert isinstance(found, Made | list | None)
    with pytest.raises(UserError):
        array(found, "it")
    for wrapped in (CALLS[name], {"pca_model": CALLS[name], "mean": CALLS[name], "std": CALLS[name]}):
        for save in (torch.save, save_bare):
            save(wrapped, tmp_path / "x.pth")
            with pytest.raises(UserError, match="holds no map"):
                load_map(tmp_path / "x.pth", 3)
    assert not (tmp_path / "run").exists()
    assert "antigravity" not in sys.modules


def test_what_a_call_says_is_kept_as_data() -> None:
    found = read_pickle(pickle.dumps(Runs(os.system, "touch run"), protocol=4))
    assert found.what == Named("posix" if os.name == "posix" else "nt", "system") and found.arguments == ("touch run",)


def op(name: str, argument: bytes = b"") -> bytes:
    return getattr(pickle, name) + argument


def text(value: str) -> bytes:
    return op("SHORT_BINUNICODE", bytes([len(value)]) + value.encode())


GLOBAL = op("GLOBAL", b"os\nsystem\n")
HOSTILE = {
    "empty": b"",
    "no stop": op("PROTO", b"\x02") + op("NONE"),
    "nothing to stop with": op("STOP"),
    "INST": op("MARK") + text("touch run") + op("INST", b"os\nsystem\n") + op("STOP"),
    "OBJ": op("MARK") + GLOBAL + text("touch run") + op("OBJ") + op("STOP"),
    "NEWOBJ_EX": GLOBAL + op("EMPTY_TUPLE") + op("EMPTY_DICT") + op("NEWOBJ_EX") + op("STOP"),
    "persistent id": op("PERSID", b"name\n") + op("STOP"),
    "binary persistent id": text("name") + op("BINPERSID") + op("STOP"),
    "extension": op("EXT1", b"\x01") + op("STOP"),
    "buffer": op("NEXT_BUFFER") + op("STOP"),
    "call of what was called": GLOBAL
    + text("x")
    + op("TUPLE1")
    + op("REDUCE")
    + op("EMPTY_TUPLE")
    + op("REDUCE")
    + op("STOP"),
    "call with a list": GLOBAL + op("EMPTY_LIST") + op("REDUCE") + op("STOP"),
    "call of text": text("x") + op("EMPTY_TUPLE") + op("REDUCE") + op("STOP"),
    "name of numbers": op("BININT1", b"\x01") * 2 + op("STACK_GLOBAL") + op("STOP"),
    "state of a class": GLOBAL + op("EMPTY_DICT") + op("BUILD") + op("STOP"),
    "state of a list": op("EMPTY_LIST") + op("EMPTY_DICT") + op("BUILD") + op("STOP"),
    "state twice": GLOBAL + op("EMPTY_TUPLE") + op("REDUCE") + (op("EMPTY_DICT") + op("BUILD")) * 2 + op("STOP"),
    "append to a class": GLOBAL + op("NONE") + op("APPEND") + op("STOP"),
    "item of a class": GLOBAL + text("a") + op("NONE") + op("SETITEM") + op("STOP"),
    "odd items": op("EMPTY_DICT") + op("MARK") + text("a") + op("SETITEMS") + op("STOP"),
    "below a mark": op("NONE") + op("MARK") + op("POP") + op("STOP"),
    "no mark": op("NONE") + op("TUPLE") + op("STOP"),
    "no memo": op("BINGET", b"\x07") + op("STOP"),
    "a key that must be hashed": b"".join(
        [op("EMPTY_DICT"), op("EMPTY_TUPLE"), op("TUPLE1") * 60_000, op("NONE"), op("SETITEM"), op("STOP")]
    ),
    "too long a text": op("BINUNICODE", struct.pack("<I", 1 << 31)) + b"x" + op("STOP"),
    "too long bytes": op("BINBYTES8", struct.pack("<Q", 1 << 62)) + b"x" + op("STOP"),
    "too many opcodes": op("NONE") + op("DUP") * MAX_OPCODES + op("STOP"),
    "long number": op("LONG", b"9" * 100_000 + b"L\n") + op("STOP"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_data_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a pickle that can be read"):
        read_pickle(HOSTILE[name])
    assert not (tmp_path / "run").exists()


def test_depth_and_large_numbers_cost_nothing() -> None:
    deep = read_pickle(op("EMPTY_TUPLE") + op("TUPLE1") * 60_000 + op("STOP"))
    assert isinstance(deep, tuple)
    itself = read_pickle(op("EMPTY_LIST") + op("MEMOIZE") + op("BINGET", b"\x00") + op("APPEND") + op("STOP"))
    assert itself[0] is itself
    # An index of 2^31 in the memo: Python's own unpickler takes 32 GiB for that.
    assert read_pickle(op("NONE") + op("LONG_BINPUT", struct.pack("<I", 1 << 31)) + op("STOP")) is None
    shared = op("EMPTY_LIST") + b"".join(
        op("MEMOIZE") + op("BINGET", bytes([i])) * 2 + op("TUPLE2") for i in range(100)
    )
    with pytest.raises(UserError):
        array(read_pickle(shared + op("STOP")), "2^100 references")


def made(shape: Any, kind: Any = "f8", data: Any = b"", order: Any = False, state: Any = (3, "<")) -> Made:
    dtype = Made(Named("numpy", "dtype"), (kind, False, True), state)
    return Made(Named("numpy.core.multiarray", "_reconstruct"), (), (1, shape, dtype, order, data))


@pytest.mark.parametrize(
    "value",
    [
        None,
        3.0,
        [1.0],
        Named("numpy", "ndarray"),
        Made(Named("numpy", "zeros"), (1 << 40,)),
        Made(Named("numpy.core.multiarray", "_reconstruct"), ()),
        Made(Named("numpy.core.multiarray", "_reconstruct"), (), {"a": 1}),
        Made(Named("numpy.core.numeric", "_frombuffer"), (1, 2)),
        made((1 << 40,)),
        made((1 << 20, 1 << 20)),
        made((-1, -1), data=b"\0" * 8),
        made((True,), data=b"\0" * 8),
        made((2.0,), data=b"\0" * 16),
        made([2], data=b"\0" * 16),
        made((1,) * 40, data=b"\0" * 8),
        made((2,), data=b"\0" * 15),
        made((2,), kind="O8", data=b"\0" * 16),
        made((2,), kind="V8", data=b"\0" * 16),
        made((2,), kind="M8", data=b"\0" * 16),
        made((2,), kind=["f8"], data=b"\0" * 16),
        made((2,), data=b"\0" * 16, state=None),
        made((2,), data=b"\0" * 16, state={}),
        made((2,), data=b"\0" * 16, state=(3, "|")),
        made((2,), data=[0.0, 0.0]),
        made((2,), data="\0" * 16),
        made((2,), data=Made(Named("_codecs", "encode"), ("\0" * 16, "zlib"))),
        made((2,), data=Made(Named("_codecs", "encode"), ("é" * 8 + "ā" * 8, "latin1"))),
        made((2,), data=Made(Named("_codecs", "encode"), ())),
        made((2,), data=Made(Named("_codecs", "decode"), ("\0" * 16, "latin1"))),
    ],
)
def test_only_floats_with_all_their_bytes_are_an_array(value: Any) -> None:
    assert array(made((2,), data=b"\0" * 16), "zeros").shape == (2,)
    with pytest.raises(UserError, match="what it is is not an array of floats"):
        array(value, "what it is")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_any_bytes_give_data_or_a_user_error(noise: bytes, place: int, byte: int) -> None:
    sound = bytearray(pickle.dumps({"a": np.ones(3), "b": [1, (2, "x")]}, protocol=4))
    sound[place % len(sound)] = byte
    for data in (noise, bytes(sound)):
        try:
            found = read_pickle(data)
            array(found["a"] if isinstance(found, dict) and "a" in found else found, "a")
        except UserError:
            pass


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name.replace("_", "/", 1) + ".pkl", data)
    return stream.getvalue()


def test_files_that_hold_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAX_FILE_BYTES", 1 << 16)
    bomb = archive(x_data=op("NONE") * (1 << 20))
    assert len(bomb) < 1 << 14
    empty = pickle.dumps({"pca_model": 1, "mean": 2, "std": 3})
    for name, data, said in (
        ("bomb.pth", bomb, "more than"),
        ("large.pth", b"x" * (1 << 17), "65"),
        ("two.pth", archive(x_data=empty, y_data=empty), "without a pickle"),
        ("none.pth", archive(x_other=empty), "without a pickle"),
        ("torn.pth", bomb[: len(bomb) // 2], "holds no map"),
        ("other.pth", archive(x_data=empty), "pca_model, mean and std"),
        ("x.safetensors", b"\xff" * 100, "cannot be read"),
        ("y.safetensors", b"", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=said):
            load_map(tmp_path / name, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"std": np.zeros(C, np.float32)},
        {"std": np.full(C, -1.0)},
        {"mean": np.full(C, np.nan)},
        {"mean": np.ones(C + 1)},
        {"mean": np.ones(C, np.int64)},
        {"std": torch.ones(C)},
        {"pca_model": {"components_": np.ones((2, C))}},
    ],
)
def test_statistics_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    file = tmp_path / "x.pth"
    redi_file(file, monkeypatch, save=lambda value, path: torch.save({**value, **changes}, path))
    with pytest.raises(UserError, match="holds no map"):
        load_map(file, 3)
