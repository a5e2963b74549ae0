"""MMDiT's weights under the names of REPA's text-to-image code, and what of that code has no place here or there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from featcache.errors import UserError
from trainer.models.config import TEXT_BACKBONE, ModelConfig, TextShape
from trainer.runs.text import is_text

THEIRS, OURS = "joint_blocks.", "blocks."
# What the class of that code can be built with and its training script never asks for.
_FOREIGN = {
    r"y_embedder\.": "a pooled text vector beside the text's rows",
    r"register": "register tokens",
    r"joint_blocks\.[0-9]+\.\w+\.attn\.ln_[qk]\.": "norms of queries and keys (with another epsilon than --qk-norm's here)",
    r"joint_blocks\.[0-9]+\.\w+\.mlp\.w[0-9]": "gated MLPs",
}
# What that code has fixed: CLIP ViT-L/14's rows, heads of 32 (as many as blocks), and positions of 16 x 16 tokens.
_CLIP = TextShape(name="text/clip-l", tokens=77, width=768)
_HEAD, _GRID = 32, 16
# What tells the shape, with the number of axes.
_NEEDED = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "t_embedder.mlp.0.weight": 2,
    "context_embedder.weight": 2,
    "joint_blocks.0.x_block.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
_MOST = 1 << 16  # tokens of a text, and numbers of each
_PLAIN_NAME = re.compile(r"text/[\w-]{1,80}", re.ASCII)  # of a text, as a file says it


def is_joint(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of joint blocks, of text and image."""
    return any(key.startswith(THEIRS) for key in state)


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {OURS + key.removeprefix(THEIRS) if key.startswith(THEIRS) else key: v for key, v in state.items()}


def their_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `our_names`."""
    return {THEIRS + key.removeprefix(OURS) if key.startswith(OURS) else key: v for key, v in state.items()}


def joint_config(
    state: Mapping[str, Tensor],
    options: Mapping[str, Any],
    path: Path,
    *,
    texts: Sequence[TextShape] = (),
    heads: int | None = None,
) -> ModelConfig:
    """The configuration of a state dict under REPA's names.

    Args:
        options: what the file says of its training; files of ours name the text (`text`, `text_tokens`).
        texts: that it may be conditioned on; without any, the one that the file names, else CLIP's, if the width is its.
        heads: of attention, where it is not REPA's rule of one for each block.

    Raises:
        UserError: keys missing, layers that this project's MMDiT has not, or a text that cannot be told.
    """
    for pattern, what in _FOREIGN.items():
        found = next((key for key in state if re.match(pattern, key)), None)
        if found is not None:
            raise UserError(
                f"{path} holds an MMDiT with {what} ({found:.100}), which the published ones have not and this project's has no "
                "place for."
            )
    for key, axes in _NEEDED.items():
        if key not in state:
            raise UserError(f"{path} is not an MMDiT state dict: it has no {key}.")
        if state[key].ndim != axes:
            raise UserError(f"{path} is not an MMDiT state dict: {key} has the shape {list(state[key].shape)}.")
    D, C, p, _ = state["x_embedder.proj.weight"].shape
    found_numbers = {re.match(r"joint_blocks\.([0-9]{1,4})\.", key) for key in state if key.startswith(THEIRS)}
    numbers = {int(number[1]) if number else -1 for number in found_numbers}
    depth = len(numbers)
    if numbers != set(range(depth)):
        raise UserError(f"{path} has {depth} joint blocks, but they are not numbered from 0 to {depth - 1}.")
    out = state["final_layer.linear.weight"].shape[0]
    if out == 2 * p * p * C:
        raise UserError(
            f"{path} predicts twice as many channels as its latent has (learn_sigma), and MMDiT predicts a velocity alone."
        )
    if heads is None and _HEAD * depth != D:
        raise UserError(
            f"{path} has depth {depth} and width {D}, not {_HEAD} * depth, so its number of heads cannot be told.",
            remedy="Only named models can be imported by command; from Python: "
            "trainer.runs.weights_io.import_official(path, heads=NUMBER).",
        )
    hidden = state["joint_blocks.0.x_block.mlp.fc1.weight"].shape[0]
    return ModelConfig(
        family="sit",
        depth=depth,
        width=D,
        heads=heads or depth,
        patch_size=p,
        latent_channels=C,
        latent_size=round(state["pos_embed"].shape[1] ** 0.5) * p,
        num_classes=1,
        mlp_ratio=hidden / D,
        text=_text(state["context_embedder.weight"].shape[1], options, path, texts),
    )


def _text(width: int, options: Mapping[str, Any], path: Path, texts: Sequence[TextShape]) -> TextShape:
    """Which text rows of this width they are."""
    named = _named(options)
    fitting = [text for text in texts if text.width == width]
    if texts:
        chosen = [text for text in fitting if text.name == (named or _CLIP).name] or fitting
        if len(chosen) == 1:
            return chosen[0]
        held = ", ".join(f"{text.name} ({text.width})" for text in texts)
        raise UserError(
            f"{path} takes text that is {width} wide, and which of the cache's that is cannot be told: {held:.300}.",
            remedy="Bring a cache with the one text feature that it was trained on.",
        )
    for text in (named, _CLIP):
        if text is not None and text.width == width:
            return text
    raise UserError(
        f"{path} takes text that is {width} wide ({_CLIP.name} is {_CLIP.width}), and does not say of which encoder.",
        remedy="Type --cache with a cache whose texts it was trained on.",
    )


def _named(options: Mapping[str, Any]) -> TextShape | None:
    name, tokens, width = (options.get(key) for key in ("text", "text_tokens", "text_width"))
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= _MOST for n in (tokens, width))
    if not (isinstance(name, str) and _PLAIN_NAME.fullmatch(name) and is_text(name) and numbers):
        return None
    assert isinstance(tokens, int) and isinstance(width, int)
    return TextShape(name=name, tokens=tokens, width=width)


def why_not_there(config: ModelConfig) -> str | None:
    """What keeps REPA's code from loading the weights of an MMDiT, or from running them; None if it can."""
    assert config.text is not None, "it is an MMDiT"
    if config.text.width != _CLIP.width:
        return f"takes text {_CLIP.width} wide alone, and {config.text.name} is {config.text.width} wide"
    if config.grid != _GRID:
        return f"has positions for {_GRID} x {_GRID} tokens alone, and these latents have {config.grid} x {config.grid}"
    if config.qk_norm:
        return "trains without norms of queries and keys, and what it could build has another epsilon than --qk-norm"
    if (config.width, config.heads) != (_HEAD * config.depth, config.depth):
        return f"has blocks of width {_HEAD} * depth with as many heads as blocks"
    return None


def said_of(config: ModelConfig) -> dict[str, str | int]:
    """What a file says of the text, for `joint_config`."""
    assert config.text is not None, f"it is an {TEXT_BACKBONE}"
    return {"text": config.text.name, "text_tokens": config.text.tokens, "text_width": config.text.width}
