"""MS-COCO's annotations of captions (`captions_train2014.json`): which file each caption is of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from featcache.errors import UserError, first_line
from featcache.sources.opening import Unreadable, read_file

MAX_FILE_BYTES = 1 << 30  # train2014's has 66 MB
_FORM = '{"images": [{"id": 9, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 9, "caption": "a dog"}]}'


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """files: of each image, in the order of the file. captions: (annotation's id, image, caption), by rising id whatever the
    order of the file; image counts in `files`, and is -1 where no image has the annotation's `image_id`; captions are
    stripped, and none is blank. unknown: the first such `image_id`, None where there is none.
    """

    files: tuple[str, ...]
    captions: tuple[tuple[int, int, str], ...]
    unknown: int | None = None

    def of_images(self) -> list[list[str]]:
        """The captions of each image, in order."""
        found: list[list[str]] = [[] for _ in self.files]
        for _, image, caption in self.captions:
            if image >= 0:
                found[image].append(caption)
        return found


class _Image(tuple[Any, Any]):
    """(id, file name) of one image."""


class _Annotation(tuple[Any, Any, Any]):
    """(id, image's id, caption) of one annotation."""


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """What is kept of an object while the file is parsed: of millions of them, three values each."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    if "image_id" in found:
        return _Annotation((found.get("id"), found["image_id"], found.get("caption")))
    return _Image((found.get("id"), found["file_name"])) if "file_name" in found else found


def read_annotations(path: Path, *, option: str = "--captions") -> Annotations:
    """What an annotation file says; every part of it that is used is checked, the rest passed over.

    option: that named the file, for messages.

    Raises `UserError` if there is no such file, it is no JSON in UTF-8, or of another form; for two images of one id or one
    file name.
    """
    where = f"{option} {path}"
    try:
        data = read_file(path, MAX_FILE_BYTES)
    except Unreadable as error:
        raise UserError(
            f"{where}: {error}", remedy="Pass COCO's annotations, such as captions_train2014.json."
        ) from error
    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is no JSON in UTF-8: {first_line(error)}", remedy="Bring the file again; it may be cut off."
        ) from error
    if not isinstance(document, dict) or not {"images", "annotations"} <= document.keys():
        has = ", ".join(map(repr, document)) if isinstance(document, dict) else "no object"
        _refuse(where, f"has no images and annotations at its top (it has {has[:200] or 'nothing'})")
    files, numbers = _images(where, document["images"])
    return _annotations(where, document["annotations"], files, numbers)


def _refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where} {what}", remedy=f"Annotations of captions have the form of COCO's: {_FORM}")


def _images(where: str, listed: Any) -> tuple[tuple[str, ...], dict[int, int]]:
    """File names, and which of them each image's id is of."""
    if not isinstance(listed, list):
        _refuse(where, "holds no list under images")
    numbers: dict[int, int] = {}
    files: dict[str, int] = {}
    for i, image in enumerate(listed):
        if not (isinstance(image, _Image) and type(image[0]) is int and isinstance(image[1], str) and image[1]):
            _refuse(where, f"holds no id (a whole number) and file_name (a text) in its image {i + 1}")
        number, file = image
        if number in numbers:
            _refuse(where, f"holds two images of the id {number}")
        if file in files:
            _refuse(where, f"holds two images of the file_name {file!r:.200}")
        numbers[number] = files[file] = i
    return tuple(files), numbers


def _annotations(where: str, listed: Any, files: tuple[str, ...], numbers: dict[int, int]) -> Annotations:
    if not isinstance(listed, list):
        _refuse(where, "holds no list under annotations")
    captions, unknown = [], None
    for i, item in enumerate(listed):
        if not (
            isinstance(item, _Annotation) and type(item[0]) is int and type(item[1]) is int and isinstance(item[2], str)
        ):
            other = isinstance(item, _Annotation) and item[2] is None
            _refuse(
                where,
                f"holds no id, image_id (whole numbers) and caption (a text) in its annotation {i + 1}"
                + (", as annotations of objects or keypoints hold none" if other else ""),
            )
        number, image, caption = item
        try:
            caption.encode()
        except UnicodeEncodeError:
            _refuse(where, f"holds half of a surrogate pair in the caption of annotation {number}")
        if image not in numbers and unknown is None:
            unknown = image
        if caption := caption.strip():
            captions.append((number, numbers.get(image, -1), caption))
    captions.sort(key=lambda entry: entry[0])
    return Annotations(files=files, captions=tuple(captions), unknown=unknown)
