"""The life of a cache in one process, or a worker that joins one: `python nfs_life.py life|lead|join|hold PATH`."""

import subprocess
import sys
import time
from pathlib import Path

from store_helpers import add, base_features, build, dataset, tokens, tree, values, write_all

from featcache.share.manage import collect_garbage, remove_features
from featcache.share.transfer import pull
from featcache.share.verify import repair_metadata, verify
from featcache.store import CacheWriter, locks, writer
from featcache.store.writers import create_writer, join_writer, open_writer, repair_writer


def write(worker: CacheWriter, shards: range) -> None:
    for shard in shards:
        for spec in base_features():
            arrays = {a[len(spec.name) :]: values(a, d, s, worker.slots(shard)) for a, (d, s) in spec.arrays.items()}
            worker.write_shard(spec.name, shard, arrays)
    worker.commit()


def begin(path: Path) -> CacheWriter:
    worker = create_writer(path, dataset(), shard_size=16)
    worker.begin(base_features())
    return worker


def nothing_left(path: Path) -> None:
    left = [name for name in tree(path) if ".nfs" in name or ".featcache" in name or name.endswith(".part")]
    assert not left and not (path / ".featcache").exists(), left


def life(path: Path) -> None:
    first = begin(path)
    write(first, range(2))
    first.close()
    with begin(path) as second:
        assert second.pending() == [2, 3]
        write(second, range(2, 4))
        second.finish()
    nothing_left(path)
    add(path, [tokens("new@1")])
    nothing_left(path)
    remove_features(path, ["new@1"], now=True)
    nothing_left(path)
    (path / "tiny@5" / "c.1.0.0").write_bytes(b"damaged")
    with repair_writer(path, {"tiny@5": [1]}) as repairing:
        write_all(repairing, [tokens()])
        repairing.finish()
    repair_metadata(path)
    nothing_left(path)
    pull(str(path), path.with_name("pulled"))
    nothing_left(path.with_name("pulled"))
    dead = open_writer(path)
    dead.begin([tokens("dead@1")])
    dead.close()
    collect_garbage(path)
    nothing_left(path)
    build(path.with_name("tars"), format="wds")
    nothing_left(path.with_name("tars"))
    assert tree(path) == tree(path.with_name("pulled")) and verify(path).ok and verify(path.with_name("tars")).ok


def lead(path: Path) -> None:
    """Begins, lets another process write most shards, and finishes while its own view is old."""
    writer.STALE_POLL_S = 0.05
    with begin(path) as worker:
        write(worker, range(1))
        assert shards_seen(worker) == {0}
        done = subprocess.run([sys.executable, __file__, "join", str(path)], check=False)
        assert done.returncode == 0
        print("seen at once:", sorted(shards_seen(worker)))
        worker.refresh()
        worker.finish()
    nothing_left(path)


def shards_seen(worker: CacheWriter) -> set[int]:
    return set.intersection(*(worker._journaled_shards(spec) for spec in base_features()))


def join(path: Path) -> None:
    with join_writer(path, base_features()) as worker:
        write(worker, range(1, 4))


def hold(path: Path) -> None:
    """Holds a lock until it is killed."""
    held = locks.try_lock(path)
    print("held" if held else "refused", flush=True)
    if held:
        time.sleep(600)


if __name__ == "__main__":
    {"life": life, "lead": lead, "join": join, "hold": hold}[sys.argv[1]](Path(sys.argv[2]))
