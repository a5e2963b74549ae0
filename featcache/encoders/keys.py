"""Other people's names for tensors: a vision transformer's => timm's, a VAE's => diffusers'."""

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


_COMPVIS_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_COMPVIS = (
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.attn\.(\d+)\.", r".\1_blocks.\2.attentions.\3."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_COMPVIS_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def from_compvis(state: State) -> State:
    """A KL autoencoder of latent-diffusion's code (VA-VAE, REPA-E's) under the names of diffusers' `AutoencoderKL`.

    Attention's 1 x 1 convolutions become the matrices that they are; the decoder's stages are counted from the other end;
    what a training checkpoint holds beside the autoencoder (losses, the foundation model) is dropped. Any other state is
    returned as it is.
    """
    stages = {int(at[1]) for key in state if (at := re.match(r"decoder\.up\.(\d{1,4})\.", key))}
    if not stages:
        return state
    found: State = {}
    for key, value in state.items():
        if not key.startswith(_COMPVIS_PARTS):
            continue
        name = re.sub(r"^decoder\.up\.(\d{1,4})\.", lambda m: f"decoder.up.{max(stages) - int(m[1])}.", key)
        for pattern, replacement in _COMPVIS:
            name = re.sub(pattern, replacement, name)
        before, attention, layer = name.partition(".attentions.")
        if attention:
            number, _, part = layer.partition(".")
            layer, _, kind = part.rpartition(".")
            name = f"{before}.attentions.{number}.{_COMPVIS_ATTENTION.get(layer, layer)}.{kind}"
            value = value.flatten(1) if value.ndim == 4 else value
        found[name] = value
    return found
