"""A builder process: `python store_builder.py PATH COUNT SHARD_SIZE [FEATURE...]`.

Writes the synthetic features of `store_helpers`: the base features, or into an existing cache those named.
"""

import sys

from store_helpers import add, base_features, build, tokens

from featcache.store import writer

SKIPPED = (3, 40)

if __name__ == "__main__":
    # Commit every shard or two, so that a kill finds a build half-way.
    writer.GROUP_S = 0.01
    path, count, shard_size, *names = sys.argv[1:]
    if names:
        add(path, [tokens(name) for name in names], SKIPPED)
    else:
        build(path, base_features(), count=int(count), shard_size=int(shard_size), skipped=SKIPPED)
