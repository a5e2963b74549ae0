"""What measurements say of their machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from featcache.machine import cpu_name, describe_machine, usable_cores


def test_the_machine_is_this_one() -> None:
    found = describe_machine("numpy", "torch", "no-such-package")
    assert found["packages"] == {"numpy": version("numpy"), "torch": version("torch"), "no-such-package": None}
    assert found["threads"] == torch.get_num_threads()
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert found["python"] == platform.python_version() and found["kernel"] in found["system"]
    assert 1 <= found["cores"] == usable_cores() <= (os.cpu_count() or 1)


def test_the_processor_has_the_kernel_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "processor\t: 0\nmodel name\t: Some CPU: 3 GHz\n\nprocessor\t: 1\nmodel name\t: Other\n"
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: listing)
    assert cpu_name() == "Some CPU: 3 GHz"
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert cpu_name() == (platform.processor() or platform.machine())
