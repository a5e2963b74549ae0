"""A single call to the disk that fails, or the last one that a process makes: within the process of a test."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch


class Killed(BaseException):
    """Ends everything at once, as SIGKILL does: nothing catches it, and no later call reaches the disk."""


class Operations:
    """Counts the calls that reach the disk below ``folder`` and lets one of them fail."""

    def __init__(
        self, patch: pytest.MonkeyPatch, folder: Path, fail_at: int | None, error: BaseException | None
    ) -> None:
        self.count, self._fail_at, self._error, self._folder = 0, fail_at, error, str(folder)
        self._dead = isinstance(error, Killed)
        self.names: list[str] = []
        for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "scandir", "listdir", "fsync", "write"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        patch.setattr(io, "open", self._counted("io.open", io.open))
        patch.setattr(vars(pathlib)["io"], "open", io.open)
        patch.setattr(safetensors.torch, "save_file", self._counted("save_file", safetensors.torch.save_file))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            if (
                name in ("fsync", "write")
                or "dir_fd" in kw
                or any(self._folder in os.fspath(a) for a in args if isinstance(a, str | Path))
            ):
                self.count += 1
                self.names.append(name)
                beyond = -1 if self._fail_at is None else self.count - 1 - self._fail_at
                if self._error is not None and (beyond == 0 or (self._dead and beyond > 0)):
                    raise self._error
            return real(*args, **kw)

        return call
