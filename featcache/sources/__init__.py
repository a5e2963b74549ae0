"""Where images come from: folders, archives, parquet files, the embedded set; and their captions."""
