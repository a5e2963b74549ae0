"""docs/training.md: the Slurm script as it is written, with stand-ins for the two programs of Slurm that it calls."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainer.runs.checkpoint import list_checkpoints

PAGE = Path(__file__).resolve().parents[2] / "docs/training.md"

SCONTROL = """#!/bin/bash
case "$1" in
  show) echo 127.0.0.1; echo 127.0.0.1 ;;
  requeue) echo "$2" >> requeued ;;
esac
"""
# One task a node, as the script asks; both nodes are this machine. Signals reach every task, as srun forwards them.
SRUN = """#!/bin/bash
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for node in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
failed=0
for task in "${tasks[@]}"; do
  wait "$task" || failed=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task" || failed=$?; done
done
exit "$failed"
"""


def start(folder: Path, *words: str, restarts: int) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = PAGE.read_text("utf-8").split("```bash\n")[1].split("```")[0]
    assert script.startswith("#!/bin/bash\n#SBATCH")
    # A fixed port suits a node of one's own; here something else may listen on it.
    (folder / "trainer.sbatch").write_text(script.replace(":29500", f":{port}"))
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return subprocess.Popen(
        ["bash", "trainer.sbatch", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_slurm_script_goes_on_in_the_next_job(shapes_cache: Path, tmp_path: Path) -> None:
    """Two nodes of one rank; the first job meets its time limit in the middle, the second ends the run."""
    words = [*("xl", "--model", "SiT-Ti/2", "--device", "cpu", "--cache", str(shapes_cache), "--batch-size", "4")]
    words += ["--steps", "60", "--set", "log_every=1", "--set", "sample_every=0"]
    job = start(tmp_path, *words, restarts=0)
    log = tmp_path / "runs/xl/log.jsonl"
    deadline = time.monotonic() + 240
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)  # to the shell of the job alone, as B:TERM asks
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert (tmp_path / "requeued").read_text() == "4711\n"
    ((step, _),) = list_checkpoints(tmp_path / "runs/xl")
    assert 3 <= step < 60

    job = start(tmp_path, *words, restarts=1)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    assert (tmp_path / "requeued").read_text() == "4711\n", "a run that is done is not begun again"
    assert list_checkpoints(tmp_path / "runs/xl")[-1][0] == 60

    job = start(tmp_path, "whole", *words[1:], restarts=0)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    cut, whole = (
        load_file(list_checkpoints(tmp_path / "runs" / name)[-1][1] / "model.safetensors") for name in ("xl", "whole")
    )
    assert all((cut[name] == whole[name]).all() for name in whole)


@pytest.mark.slow
def test_the_slurm_script_tells_of_a_failure(shapes_cache: Path, tmp_path: Path) -> None:
    job = start(tmp_path, "xl", "--model", "SiT-Ti/3", "--cache", str(shapes_cache), restarts=0)
    said, _ = job.communicate(timeout=240)
    assert job.returncode != 0 and "error:" in said
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_the_command_for_several_gpus_trains_on_two_ranks(shapes_cache: Path, tmp_path: Path) -> None:
    """As it is written, but for the number of ranks and sizes that suit a CPU."""
    written = PAGE.read_text("utf-8").split("```sh torchrun\n")[1].split("```")[0]
    changes = {"--nproc-per-node 8": "--nproc-per-node 2", "SiT-XL/2": "SiT-Ti/2", "caches/imagenet": str(shapes_cache)}
    for word, other in changes.items():
        assert word in written
        written = written.replace(word, other)
    done = subprocess.run(
        [*written.split(), "--steps", "2", "--batch-size", "4", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "batch: 4 = 2 ranks" in done.stdout
    assert list_checkpoints(tmp_path / "runs/xl")[-1][0] == 2
