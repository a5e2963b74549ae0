"""What a GPU machine without a network lacks: wheels for its Python, and photographs, in one folder beside the code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from featcache.console import size_text
from featcache.errors import UserError

# What the project needs beyond torch, torchvision, timm, transformers, scipy, pytest and the like, which such machines
# have; with the needs of these, since pip is told to take none by itself. Versions are those installed here.
PACKAGES = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "zarr", "donfig", "numcodecs",
    "google-crc32c", "blake3", "obstore", "webdataset", "braceexpand", "diffusers", "torch-fidelity", "simplejpeg",
)  # fmt: skip
# Versions of our own choice: the latest of it has a need of its own that is a package more.
PINNED = ("importlib-metadata==8.7.0",)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux_2_5_x86_64", "manylinux1_x86_64")  # fmt: skip
LIMIT_BYTES = 60 * 1000**2


def wheels(folder: Path, *, python: str = "3.12") -> list[Path]:
    """Downloads wheels for x86-64 Linux into `folder`, replacing what is there.

    Raises:
        UserError: pip found no such wheel, or no network.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation",
        "cp",
    ]
    words += ["--disable-pip-version-check", "--python-version", python, "--dest", str(folder)]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    done = subprocess.run([*words, *wanted, *PINNED], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"pip download failed:\n{done.stderr.strip()[-1500:]}", remedy="Name a --pack folder with a network."
        )
    return sorted(folder.glob("*.whl"))


def own_wheel(root: Path, folder: Path) -> Path:
    """A wheel of the project's name, version and commands without its code, which is imported from where it lies: caches
    record the version that pip knows."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    scripts = [f"{name} = {place}" for name, place in project["scripts"].items()]
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: gpu_pack\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "\n".join(["[console_scripts]", *scripts, ""]),
    }
    place = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{stem}.dist-info/{name}", text)
        archive.writestr(
            f"{stem}.dist-info/RECORD", "".join(f"{stem}.dist-info/{name},,\n" for name in [*files, "RECORD"])
        )
    return place


def code_bytes(root: Path) -> int:
    """Of all files that git keeps."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return sum((root / name).lstat().st_size for name in listed.split("\0") if name)


def copied(photographs: Path, folder: Path) -> int:
    """Bytes of the JPEGs in class folders that were copied into `folder`, replacing what is there."""
    if folder.resolve() != photographs.resolve():
        shutil.rmtree(folder, ignore_errors=True)
        for path in sorted(photographs.glob("*/*")):
            if path.is_file() and not path.is_symlink() and path.suffix.lower() in (".jpg", ".jpeg"):
                target = folder / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(code: int, found: Sequence[Path], images: int) -> str:
    """Sizes, and what is typed on the other machine.

    Raises:
        UserError: it is more than is carried.
    """
    of_wheels = sum(path.stat().st_size for path in found)
    total = code + of_wheels + images
    lines = [f"{size_text(path.stat().st_size):>10}  {path.name}" for path in found]
    lines += [
        f"{size_text(of_wheels)} of wheels, {size_text(images)} of photographs, {size_text(code)} of code: {size_text(total)}"
    ]
    if total > LIMIT_BYTES:
        raise UserError(
            "\n".join(lines), remedy=f"It is to stay below {size_text(LIMIT_BYTES)}: pass fewer --photographs."
        )
    return "\n".join(lines)


def pack(folder: Path, root: Path, photographs: Path | None) -> str:
    """Fills `folder` with `wheels/` and `photographs/`; what it holds, in words.

    Raises:
        UserError: see `wheels` and `report`.
    """
    found = [*wheels(folder / "wheels"), own_wheel(root, folder / "wheels")]
    images = copied(photographs, folder / "photographs") if photographs is not None else 0
    return report(code_bytes(root), found, images)
