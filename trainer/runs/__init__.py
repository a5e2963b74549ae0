"""Run folders and what is in them: configuration, checkpoints, log, locks; and the recipes that runs start from."""
