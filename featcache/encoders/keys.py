"""Other people's names for a vision transformer's tensors => timm's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featcache.errors import UserError

State = dict[str, Tensor]


def from_timm(state: State) -> State:
    """timm's own names, and those that timm's loader converts itself (DINOv2, DINOv3, PE and CLIP releases)."""
    return state


def from_mocov3(state: State) -> State:
    """A MoCo-v3 training checkpoint: the base encoder without its projection head.

    In the released ViT-L file, blocks 13 and 14 carry their own number in some names (`blocks.13.norm13`): undone.
    """
    prefix = "module.base_encoder."
    if not any(key.startswith(prefix) for key in state):
        return state
    found: State = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(("head", "fc.")):
            continue
        for block, wrong in ((13, 1), (14, 2)):
            name = name.replace(f"blocks.{block}.norm{block}", f"blocks.{block}.norm{wrong}")
            name = name.replace(f"blocks.{block}.mlp.fc{block}", f"blocks.{block}.mlp.fc{wrong}")
        found[name] = value
    return found


_IJEPA = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.intermediate\.dense\.|\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.output\.dense\.|\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)


def from_ijepa(state: State) -> State:
    """The original release (`module.` before every name) or the hub's, which transformers named."""
    if any(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    found: State = {}
    for key, value in state.items():
        name = key.removeprefix("ijepa.").removeprefix("model.")
        for pattern, replacement in _IJEPA:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(("pooler.", "classifier.")) and "mask_token" not in name:
            found[name] = value
    for name in [key for key in found if ".attn.query." in key]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("query", "qkv")] = torch.cat(parts)
    return found


FORMATS: Mapping[str, Callable[[State], State]] = {"timm": from_timm, "mocov3": from_mocov3, "ijepa": from_ijepa}


def to_timm(state: State, key_format: str) -> State:
    """`state` under timm's names. Raises `UserError` if tensors of the declared format are missing."""
    try:
        return FORMATS[key_format](state)
    except KeyError as error:
        raise UserError(f"the weights lack the tensor {error.args[0]!r}", remedy="Bring the file again.") from error
