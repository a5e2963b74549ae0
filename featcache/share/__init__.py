"""What teams do with caches: push, pull, verify, repair, list, convert, import, remove."""
