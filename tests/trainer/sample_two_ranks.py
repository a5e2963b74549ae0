"""Run by a test under torchrun: draws samples of a run into a folder, in blocks of eight."""

import sys
from pathlib import Path

from trainer import distributed, sampling


class _Quiet:
    def begin(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


if __name__ == "__main__":
    sampling.BLOCK = 8
    ask = sampling.SampleRequest(num=21, sampler="sde", steps=3, device="cpu", batch_size=8, out=Path(sys.argv[2]))
    sampling.sample_run(Path(sys.argv[1]), ask, _Quiet())
    distributed.leave()
