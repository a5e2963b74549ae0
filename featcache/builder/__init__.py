"""Building a cache: one pass over the images, resumable by shard, divided among workers."""
