"""Reading a cache: batches of stored bytes, from a disk or over the wire."""
