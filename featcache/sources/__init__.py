"""Where images come from besides folders: archives (:mod:`.archives`) and parquet files (:mod:`.parquet`)."""
