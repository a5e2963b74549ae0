"""The training run: loop, objective, state, data."""
