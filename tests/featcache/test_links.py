"""Nothing is written or read through a link inside a cache, and temporary names cannot be foreseen."""

from pathlib import Path

import pytest

from featcache.errors import CacheError
from featcache.store import files


def test_names_of_temporary_files() -> None:
    for name, final in (
        ("c.0.0.part", "c.0.0"),
        ("c.0.0.0123456789abcdef.part", "c.0.0"),
        ("zarr.json.0123456789ABCDEF.part", "zarr.json.0123456789ABCDEF"),
        ("zarr.json", None),
        (".part", None),
        ("c.0.part.x", None),
    ):
        assert files.part_of(name) == final, name


def test_a_temporary_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    group = files.Group()
    for _ in range(3):
        group.write(tmp_path / "c.0", [b"x"])
    names = [p.name for p in tmp_path.iterdir()]
    assert len(names) == 3 and {files.part_of(name) for name in names} == {"c.0"}
    group.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["c.0"]


def test_inside(tmp_path: Path) -> None:
    (tmp_path / "real" / "vae").mkdir(parents=True)
    (tmp_path / "root").symlink_to("real")
    root = tmp_path / "root"
    assert files.inside(root, "vae/moments/c.0") == root / "vae/moments/c.0"
    (tmp_path / "real" / "other").symlink_to("/tmp")
    (tmp_path / "real" / "vae" / "dangling").symlink_to("nowhere")
    for name in ("other", "other/x/y", "vae/dangling"):
        with pytest.raises(CacheError, match="symbolic link"):
            files.inside(root, name)
    for name in ("../x", "vae/../../x", "/etc"):
        with pytest.raises(CacheError, match="no path inside"):
            files.inside(root, name)
