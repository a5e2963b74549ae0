"""How often a run logs, saves and draws grids, where nobody typed it: long runs as ever, short ones often enough."""

from __future__ import annotations

LOG_STEPS, SAVE_STEPS, GRID_STEPS = 100, 10_000, 10_000  # the widest intervals
LOG_POINTS, CHECKPOINTS, GRIDS = 50, 5, 4  # that a shorter run has at least
LEAST_SAVED = 100  # a checkpoint of a large model takes as long as many of its steps
# A grid is 80 images of 32 forward passes each, at a third of what training on an image costs; decoding comes on top.
IMAGE_COST = 32 / 3
GRID_IMAGES = 80 * IMAGE_COST
GRIDS_SHARE = 0.1


def log_interval(steps: int) -> int:
    """Steps between lines of the log: 100, or so few that there are 50 lines."""
    return min(LOG_STEPS, max(1, steps // LOG_POINTS))


def save_interval(steps: int) -> int:
    """Steps between checkpoints: 10,000, or a fifth of the run, but no fewer than 100."""
    return min(SAVE_STEPS, max(LEAST_SAVED, steps // CHECKPOINTS))


def grid_interval(steps: int, batch_size: int) -> int:
    """Steps between grids of samples: 10,000, or a quarter of the run; 0, none, where they would cost too much.

    A grid costs about as much as training on 850 images. In a run shorter than 40,000 steps all of them together may
    add a tenth to the training; where four do not fit into that, so many are drawn as fit.
    """
    if steps >= GRIDS * GRID_STEPS:
        return GRID_STEPS
    affordable = int(min(GRIDS, GRIDS_SHARE * steps * batch_size / GRID_IMAGES))
    return -(-steps // affordable) if affordable else 0
