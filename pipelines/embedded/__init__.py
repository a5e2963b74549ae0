"""Trains the embedded encoders and the judge: ``python -m pipelines.embedded --out DIR`` (see `docs/embedded.md`)."""
