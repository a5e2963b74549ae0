"""Checkpoints of the public repositories, read into and written from this project's models.

What differs from ours, by convention:

- `repa`: nothing in the backbone (t = 1 is noise, velocity e - z, C channels out); carries `projectors.*`.
- `sra`: as `repa` for SiT, as `dit` for DiT; carries `ap_head.*`.
- `sit`: time runs the other way (t = 1 is data, velocity z - e); 2C channels out, of which the upper C are unused.
- `lightningdit`: time as in `sit`, C channels out; carries the tables of the rotary positions, which are ours too.
- `dit`: nothing (DDPM steps 0..999, noise and variance values).
- `reg`: as `repa`, with a class token of its own: the layers of that stream have other names.
- `redi`: time as in `sit`, C + K channels in and out, of which the last K are a feature's components: a merged stream;
  carries `projector.*` where REPA's loss was added.

Time and sign are converted in the weights themselves, so an imported model is like any other. Also carried
by all is `pos_embed`, which training averages into the EMA, where it drifts by rounding: it is kept and
loaded, see `trainer.models.load_weights`.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featcache.errors import UserError
from featcache.feature_names import layer_feature
from featcache.store import files
from featcache.store.manifest import UNKNOWN
from trainer.models import empty_model
from trainer.models.blocks import rotary_positions, time_frequencies, token_positions
from trainer.models.config import BACKBONES, TEXT_BACKBONE, FeedForward, ModelConfig, Norm, StreamShape, sizes_of
from trainer.models.transformer import check_fit
from trainer.runs import locks
from trainer.runs.checkpoint import REAL_DTYPES

Convention = Literal["repa", "sra", "sit", "dit", "lightningdit", "reg", "redi"]
# Whose code loads which backbones (`ModelConfig.backbone`); LightningDiT's has a switch for each of its layers.
FITS: Mapping[Convention, tuple[str | None, ...]] = {
    "repa": ("SiT",),
    "sra": ("SiT", "DiT"),
    "sit": ("SiT",),
    "dit": ("DiT",),
    "lightningdit": ("LightningDiT", "SiT", None),
    "reg": ("SiT",),
    "redi": ("SiT",),
}
CONVENTIONS: tuple[Convention, ...] = tuple(FITS)
# Those whose time runs the other way (t = 1 is data, velocity z - e).
_REVERSED: tuple[Convention, ...] = ("sit", "lightningdit", "redi")

# REG's names for the layers of its class token, and ours.
_CLASS_TOKEN_LAYERS = {
    "cls_projectors2": "stream_embedders.0.proj",
    "wg_norm": "stream_embedders.0.norm",
    "final_layer.linear_cls": "final_layer.stream_linears.0",
}
_STREAM_IN = "stream_embedders.0.proj.weight"
# The class tokens that REG's width stands for; its released code takes DINOv2 alone.
_CLASS_TOKENS = {384: "dinov2-s@11.cls", 768: "dinov2-b@11.cls", 1024: "dinov2-l@23.cls", 1536: "dinov2-g@39.cls"}
# ReDi's code: in_channels = 4 + pca_rank, 8 by default, components of dinov2_vitb14_reg.
_REDI_LATENT, _REDI_COMPONENTS, _REDI_ENCODER = 4, 8, "dinov2-b-reg@11"
# Names of features that are taken from a file.
_PLAIN_NAME = re.compile(r"[\w.-]{1,80}@[0-9]{1,3}\.[\w-]{1,80}", re.ASCII)

# What an official repository stores beside the backbone: heads of the alignment, dropped at inference.
_HEAD_PREFIXES = ("projectors.", "ap_head.", "projector.")
# What tells a backbone's shape, with the number of axes.
_NEEDED = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "t_embedder.mlp.0.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
}
_MLP_LAYER: Mapping[FeedForward, str] = {"gelu": "blocks.0.mlp.fc1.weight", "swiglu": "blocks.0.mlp.w12.weight"}
_ROTARY_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
# Upper bound for the drift of an averaged position table; more is another table, e.g. another resolution's.
_POSITION_DRIFT = 0.05
# Rotary tables are never averaged; this is bfloat16's rounding.
_ROTARY_ROUNDING = 0.005


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An official checkpoint in this project's terms.

    config: the backbone; name: such as `SiT-XL/2`, None for sizes that have no name.
    convention: where it came from; weights: `ema`, `model` or `bare` (the file was one state dict).
    path: the interpolant it was trained with (SiT), `linear` or `cosine`.
    normalization: of its latents: `channel` for LightningDiT's, unless the file says otherwise, else `scalar`.
    dropout: share of samples that were trained without the streams of `config` (ReDi's, if the file says so).
    state: weights under our keys, float32, with `pos_embed`: for `trainer.models.load_weights`.
    heads: what else was in the state dict (projectors), under its own keys.
    step: optimiser steps taken, if the file says so.
    """

    config: ModelConfig
    name: str | None
    convention: Convention
    weights: Literal["ema", "model", "bare"]
    path: str
    normalization: Literal["scalar", "channel"]
    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    step: int | None
    dropout: float = 0.0


def import_official(
    path: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    convention: Convention | None = None,
    heads: int | None = None,
) -> Imported:
    """Read an official SiT, DiT, REPA, SRA, LightningDiT, REG or ReDi checkpoint (`.pt`) or state dict (`.pt`,
    `.safetensors`).

    Nothing in the file is executed: it is unpickled with `weights_only=True`, the one class allowed
    beside tensors being `argparse.Namespace`.

    Args:
        weights: which of the two state dicts of a training checkpoint; a bare state dict has no choice.
        convention: whose checkpoint it is; by default told from its keys, its arguments or its file name.
        heads: number of attention heads, for a width that no named model has.

    Raises:
        UserError: an unreadable or refused file, the wanted weights missing, keys missing or unexpected, a
            convention or a shape that cannot be told.
    """
    path = Path(path)
    content = _read(path)
    raw, chosen = _choose(content, weights, path)
    options = _options(content) if chosen != "bare" else {}
    raw = {_modern_key(key, raw, options): value.float() for key, value in raw.items()}
    extra = {key: value for key, value in raw.items() if key.startswith(_HEAD_PREFIXES)}
    state = _rename({key: value for key, value in raw.items() if key not in extra}, _CLASS_TOKEN_LAYERS)

    rotary = {key: state.pop(key) for key in _ROTARY_TABLES if key in state}
    config, doubled = _infer_config(state, rotary, path, heads)
    _check_rotary(rotary, config, path)
    typed = convention is not None
    if convention is None:
        plain = config.backbone == "SiT" and "use_rmsnorm" not in options  # which only LightningDiT's code says
        if config.own_streams:
            convention = "reg"
        elif plain and not doubled and _is_redi(config, extra, options):
            convention = "redi"
        else:
            convention = _infer_convention(extra, options, path, doubled) if plain else "lightningdit"
    if config.backbone not in (*FITS[convention], "SiT") or bool(config.own_streams) != (convention == "reg"):
        raise UserError(
            f"{path} holds {_kind(config)}, which {convention!r} checkpoints do not.",
            remedy="Leave --convention out." if typed else None,
        )
    if doubled and convention not in ("sit", "lightningdit", "dit", "sra"):
        raise UserError(
            f"{path} predicts twice as many channels as its latent has; {convention!r} checkpoints do not.",
            remedy="Type --convention sit or --convention dit.",
        )
    if convention in ("reg", "redi"):
        config = _with_stream(config, options, path)
    if convention in _REVERSED:
        state = reverse_time(_keep_channels(state, config) if doubled else state)
    elif convention == "dit" or (convention == "sra" and doubled):
        config = replace(config, family="dit", learn_sigma=doubled)
    interpolant = _trained_path(options, path)
    _check_keys(state, config, path)
    step = content.get("steps", content.get("train_steps")) if chosen != "bare" else None
    return Imported(
        config=config,
        name=config.name,
        convention=convention,
        weights=chosen,
        path=interpolant,
        normalization="channel" if convention == "lightningdit" and options.get("latent_norm", True) else "scalar",
        state={key: value.contiguous() for key, value in state.items()},
        heads=extra,
        step=step if isinstance(step, int) else None,
        dropout=_dropout(options, path) if convention == "redi" else 0.0,
    )


def export_official(
    path: str | Path,
    config: ModelConfig,
    *,
    ema: Mapping[str, Tensor],
    model: Mapping[str, Tensor] | None = None,
    convention: Convention | None = None,
    heads: Mapping[str, Tensor] | None = None,
    step: int | None = None,
    interpolant: str = "linear",
    normalization: str = "scalar",
    dropout: float = 0.0,
) -> Path:
    """Write weights as a checkpoint that the public code loads: a dict with `ema`, `model` and `args` (`config` for
    LightningDiT).

    Only tensors, strings and numbers are pickled, so `torch.load` takes it in its safe mode too.

    Args:
        ema, model: state dicts under our keys; `pos_embed` is added where it is missing, and `model` is
            `ema` where only that is kept.
        convention: whose code is to load it; by default `repa` for SiT, `dit` for DiT, else `lightningdit`; `reg` or
            `redi` where the one stream is what those diffuse.
        heads: `projectors.*` (repa, reg) or `ap_head.*` (sra). Those repositories load strictly, so zeros of
            the default shapes (768 channels, as for DINOv2-B, or the class token's) are written where none are
            given; sampling does not use them.
        normalization: of the run's latents; only LightningDiT's files have a place for it.
        dropout: share of samples trained without the stream; only ReDi's files have a place for it.

    Raises:
        UserError: a convention that does not fit the model, or weights that do not fit `config`.
    """
    path = Path(path)
    fitting = _fitting(config)
    if not fitting:
        raise UserError(
            f"{_kind(config)} weights cannot be written for any public code: REG's has a place for one class token beside a "
            f"SiT's latents, ReDi's for one feature's components merged into {_REDI_LATENT} channels of latents.",
            remedy="Draw from the run here: trainer sample, trainer eval.",
        )
    convention = convention or ("dit" if config.family == "dit" else fitting[0])
    if convention not in fitting:
        raise UserError(
            f"{_kind(config)} weights cannot be written as {convention!r}.", remedy=f"Use one of: {', '.join(fitting)}."
        )
    extra = dict(heads) if heads else _placeholder_heads(convention, config)

    rotary = (
        dict(zip(_ROTARY_TABLES, rotary_positions(config.width // config.heads, config.grid))) if config.rope else {}
    )

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {"pos_embed": token_positions(config)}
        full |= {key: value.detach().cpu().float() for key, value in state.items()}
        _check_keys(full, config, path)
        if convention in _REVERSED:
            full = reverse_time(full)
        if convention == "sit":
            full = _double_channels(full, config)
        return _rename(full, {ours: theirs for theirs, ours in _CLASS_TOKEN_LAYERS.items()}) | rotary | extra

    content: dict[str, Any] = {"ema": convert(ema)}
    content["model"] = convert(model) if model is not None else content["ema"]
    theirs = {"linear": "Linear", "cosine": "GVP"}.get(interpolant, interpolant)
    if convention == "lightningdit":
        content["config"] = _yaml_of(config, path_type=theirs, latent_norm=normalization == "channel")
    else:
        content["args"] = {"model": config.name, "num_classes": config.num_classes, "qk_norm": config.qk_norm}
        if config.family == "sit":
            content["args"]["path_type"] = theirs if convention in _REVERSED else interpolant
        for stream in config.streams:
            content["args"]["feature"] = stream.name
        if convention == "redi":
            content["args"] |= {"pca_rank": config.streams[0].channels, "dino_drop_prob": dropout}
    if step is not None:
        content["steps"] = step
    try:
        with locks.alone(path), files.atomic_file(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's, in the place of what the disk said
        if isinstance(error.__context__, OSError):
            raise files.explain(error.__context__, path) from error
        raise
    return path


def reverse_time(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network with t replaced by 1 - t and its output negated. Its own inverse.

    With frequencies w, `cos((1 - t) w) = cos w cos tw + sin w sin tw` and `sin((1 - t) w) = sin w cos tw
    - cos w sin tw`: a fixed reflection of each (cosine, sine) pair, which the first layer of the time MLP
    absorbs. It is computed in float64 with the float32 frequencies that the model uses, so the rounding of
    the weights is the only difference.
    """
    out = dict(state)
    w = time_frequencies().double()
    cosine, sine = state["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)  # [D, len(w)] each
    reflected = [cosine * w.cos() + sine * w.sin(), cosine * w.sin() - sine * w.cos()]
    out["t_embedder.mlp.0.weight"] = torch.cat(reflected, dim=1).to(state["t_embedder.mlp.0.weight"].dtype)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        out[key] = -state[key]
    return out


_OTHER_FILE = (
    "Name the .pt or .safetensors file that the public code wrote; of a run of ours: trainer export RUN weights.pt"
)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.", remedy=_OTHER_FILE)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, AttributeError, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error!s:.300}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that the optimiser's state, twice the size of the weights, is never read.
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=True if zipfile.is_zipfile(path) else None
            )
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of type {found[1]}" if found else "something that is not a tensor"
        raise UserError(
            f"{path} was refused: it pickles {what}, and loading that could run code from the file.",
            remedy="Only tensors, numbers and an argparse.Namespace are read. If you trust the file, "
            "save its state dict alone with the code that made it.",
        ) from error
    except Exception as error:  # the unpickler raises whatever a damaged stream leads it to
        raise UserError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {' '.join(str(error).split()):.300}",
            remedy=_OTHER_FILE,
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint or state dict.", remedy=_OTHER_FILE)
    return content


def _choose(
    content: dict[str, Any], weights: str, path: Path
) -> tuple[dict[str, Tensor], Literal["ema", "model", "bare"]]:
    """The state dict asked for, without wrappers' prefixes."""
    chosen: Literal["ema", "model", "bare"]
    if "x_embedder.proj.weight" in content:
        state, chosen = content, "bare"
    elif weights in content:
        state, chosen = content[weights], "ema" if weights == "ema" else "model"
    else:
        available = [key for key in ("ema", "model") if key in content]
        raise UserError(
            f"{path} has no {weights!r} weights; its entries are {', '.join(map(str, list(content)[:8]))}.",
            remedy=f"Ask for {available[0]!r} instead." if available else None,
        )
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: {weights!r} is not a state dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {key!r:.100} is not a tensor with a name.")
        if value.layout != torch.strided or value.dtype not in REAL_DTYPES or not value.numel():
            raise UserError(f"{path}: {key!r:.100} does not hold real numbers.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {key!r:.100} says that it is {list(value.shape)}, more than the file holds.")
    # torch.compile and DistributedDataParallel name their inner module.
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", key): value for key, value in state.items()}, chosen


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a training checkpoint says of its training, by name: `args`, or the sections of LightningDiT's `config`."""
    args = content.get("args")
    given = [vars(args) if isinstance(args, argparse.Namespace) else args]
    config = content.get("config")
    if isinstance(config, Mapping):
        given += [config.get(section) for section in ("data", "model", "transport")]
    return {
        key: value
        for section in given
        if isinstance(section, Mapping)
        for key, value in section.items()
        if isinstance(value, str | int | float)
    }


def _yaml_of(config: ModelConfig, *, path_type: str, latent_norm: bool) -> dict[str, Any]:
    """The sections of LightningDiT's configuration that build its model and sample from it."""
    return {
        "data": {"num_classes": config.num_classes, "latent_norm": latent_norm},
        "model": {
            "model_type": config.name,
            "use_qknorm": config.qk_norm,
            "use_swiglu": config.mlp == "swiglu",
            "use_rope": config.rope,
            "use_rmsnorm": config.norm == "rms",
            "wo_shift": False,
            "in_chans": config.latent_channels,
        },
        "transport": {"path_type": path_type, "prediction": "velocity"},
    }


def _modern_key(key: str, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> str:
    """REPA's early checkpoints split the blocks in two lists, the second counted from zero again."""
    if not key.startswith("decoder_blocks."):
        return key
    first = sum(other.startswith("blocks.") and other.endswith("attn.qkv.weight") for other in state)
    found = re.fullmatch(r"decoder_blocks\.([0-9]{1,4})\.(.+)", key)
    return key if found is None else f"blocks.{int(found[1]) + first}.{found[2]}"


def _infer_config(
    state: Mapping[str, Tensor], rotary: Mapping[str, Tensor], path: Path, heads: int | None
) -> tuple[ModelConfig, bool]:
    """Shapes and names tell everything but the heads. Gives a flow's configuration and whether the channels out are
    doubled."""
    mlp: FeedForward = "swiglu" if _MLP_LAYER["swiglu"] in state else "gelu"
    norm: Norm = "rms" if "blocks.0.norm1.weight" in state else "layer"
    for key, axes in {**_NEEDED, _MLP_LAYER[mlp]: 2}.items():
        if key not in state:
            raise UserError(
                f"{path} is not a SiT or DiT state dict: it has no {key}. Its first keys are "
                f"{', '.join(list(state)[:4]):.300}."
            )
        if state[key].ndim != axes:
            raise UserError(f"{path} is not a SiT or DiT state dict: {key} has the shape {list(state[key].shape)}.")
    D, C, p, _ = state["x_embedder.proj.weight"].shape
    class_token = state.get(_STREAM_IN)
    if class_token is not None and class_token.ndim != state["t_embedder.mlp.0.weight"].ndim:
        raise UserError(
            f"{path} is not a REG state dict: cls_projectors2.weight has the shape {list(class_token.shape)}."
        )
    own = (
        (StreamShape(name="", channels=class_token.shape[-1], side=1, merged=False),) if class_token is not None else ()
    )
    tokens = state["pos_embed"].shape[1] - len(own)
    numbers = {_block_number(key, path) for key in state if key.startswith("blocks.")}
    depth = len(numbers)
    if numbers != set(range(depth)):
        raise UserError(f"{path} has {depth} blocks, but they are not numbered from 0 to {depth - 1}.")
    out = state["final_layer.linear.weight"].shape[0]
    if state["t_embedder.mlp.0.weight"].shape != (D, 2 * len(time_frequencies())) or out != len(
        state["final_layer.linear.bias"]
    ):
        raise UserError(f"{path} is not a SiT or DiT state dict: its first or last layer has an unknown shape.")
    named = {
        (size_depth, width): size_heads
        for backbone in BACKBONES
        if backbone != TEXT_BACKBONE  # whose heads differ at the same width
        for size_depth, width, size_heads in sizes_of(backbone).values()
    }
    head_norm = state.get("blocks.0.attn.q_norm.weight")
    per_head = [table.shape[-1] for table in (head_norm, *rotary.values()) if table is not None and table.ndim]
    if heads is None:
        heads = max(1, D // per_head[0]) if per_head else named.get((depth, D))
    if heads is None:
        raise UserError(
            f"{path} has depth {depth} and width {D}, which is no named model, so its number of heads cannot be told.",
            remedy="Only named models can be imported by command; from Python: "
            "trainer.runs.weights_io.import_official(path, heads=NUMBER).",
        )
    doubled = out == 2 * p * p * C
    config = ModelConfig(
        family="sit",
        depth=depth,
        width=D,
        heads=heads,
        patch_size=p,
        latent_channels=C,
        latent_size=round(tokens**0.5) * p,
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        qk_norm=head_norm is not None,
        norm=norm,
        mlp=mlp,
        rope=bool(rotary),
        streams=own,
    )
    hidden = state[_MLP_LAYER[mlp]].shape[0] // (2 if mlp == "swiglu" else 1)
    if hidden != config.mlp_width:  # not the usual ratio of 4
        config = replace(config, mlp_ratio=(math.ceil(1.5 * hidden) if mlp == "swiglu" else hidden) / D)
    return config, doubled


def _check_rotary(rotary: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """They are computed and never trained, so a file's must be ours."""
    if not config.rope:
        return
    for key, own in zip(_ROTARY_TABLES, rotary_positions(config.width // config.heads, config.grid)):
        found = rotary.get(key)
        if found is None or found.shape != own.shape or not (found - own).abs().max().item() <= _ROTARY_ROUNDING:
            raise UserError(
                f"{path}: {key} is not the table of rotary positions of a {config.grid} x {config.grid} grid with "
                f"{config.heads} heads."
            )


def _block_number(key: str, path: Path) -> int:
    found = re.match(r"blocks\.([0-9]{1,4})\.", key)
    if found is None:
        raise UserError(f"{path} has an unexpected key {key!r:.100}.")
    return int(found[1])


def _infer_convention(extra: Mapping[str, Tensor], options: Mapping[str, Any], path: Path, doubled: bool) -> Convention:
    if any(key.startswith("ap_head.") for key in extra):
        return "sra"
    if extra or not doubled:
        return "repa"
    # Doubled channels: the official SiT or DiT, whose keys are the same.
    for text in (str(options.get("model", "")).lower(), path.stem.lower()):
        if text.startswith("sit"):
            return "sit"
        if text.startswith("dit"):
            return "dit"
    raise UserError(
        f"{path} may be an official SiT or an official DiT: their state dicts have the same keys and shapes.",
        remedy="Say which one: --convention sit or --convention dit.",
    )


def _trained_path(options: Mapping[str, Any], path: Path) -> str:
    names = {"linear": "linear", "gvp": "cosine", "cosine": "cosine"}
    given, predicted = str(options.get("path_type") or "linear"), str(options.get("prediction") or "v")
    if given.lower() not in names or predicted not in ("v", "velocity"):
        raise UserError(
            f"{path} was trained with path {given!r:.80} and prediction {predicted!r:.80}; only velocity models on "
            "the linear and the cosine (GVP) path can be imported."
        )
    return names[given.lower()]


def _kind(config: ModelConfig) -> str:
    """What to call a backbone in an error."""
    kind = config.backbone or f"a mixture of norm {config.norm}, mlp {config.mlp}, rope {config.rope}"
    beside = [stream.name or "a class token" for stream in config.streams]
    return kind + (f" (with {', '.join(beside)} beside the latents)" if beside else "")


def _fitting(config: ModelConfig) -> list[Convention]:
    """Whose code has a place for all that the weights of a backbone are."""
    if not config.streams:
        named = [c for c in CONVENTIONS if c not in ("reg", "redi") and config.backbone in FITS[c]]
        return [c for c in named if config.family == "sit" or c in ("dit", "sra")]
    (first, *others) = config.streams
    if others or config.backbone != "SiT":
        return []
    if first.merged:
        return ["redi"] if config.latent_channels == _REDI_LATENT else []
    return ["reg"] if first.tokens == 1 else []


def _is_redi(config: ModelConfig, extra: Mapping[str, Tensor], options: Mapping[str, Any]) -> bool:
    """Whether the channels are those of latents and components, by what the file says of its training, or by ReDi's
    published number, which no VAE has; with no heads but its own."""
    if not all(key.startswith("projector.") for key in extra):
        return False
    components = options.get("pca_rank", _REDI_COMPONENTS)
    return isinstance(components, int) and config.latent_channels == _REDI_LATENT + components


def _with_stream(config: ModelConfig, options: Mapping[str, Any], path: Path) -> ModelConfig:
    """With REG's class token named, or ReDi's components told from the latents' channels.

    Files of ours name the feature; of others, the width tells the class token, and the components are DINOv2-B's.
    """
    named = str(options.get("feature", ""))
    given = layer_feature(named) if _PLAIN_NAME.fullmatch(named) else None
    if config.own_streams:
        (stream,) = config.own_streams
        name = str(given) if given and given.is_class_token else _CLASS_TOKENS.get(stream.channels, f"{UNKNOWN}@0.cls")
        return replace(config, streams=(replace(stream, name=name),))
    components = config.latent_channels - _REDI_LATENT
    if components < 1:
        raise UserError(
            f"{path} has {config.latent_channels} channels in, and 'redi' checkpoints more than {_REDI_LATENT}: those of "
            "the latents and the components.",
            remedy="Leave --convention out.",
        )
    derived = given is not None and not given.is_tokens and not given.is_class_token
    stream = StreamShape(
        name=str(given) if derived else f"{_REDI_ENCODER}.pca{components}",
        channels=components,
        side=max(1, config.latent_size // 2),  # patches of 16 pixels, with a VAE's cells of 8; the weights do not say
        merged=True,
    )
    return replace(config, latent_channels=_REDI_LATENT, streams=(stream,))


def _dropout(options: Mapping[str, Any], path: Path) -> float:
    """Share of the steps that ReDi's code trained without components."""
    said = options.get("dino_drop_prob", 0.0)
    if not isinstance(said, int | float) or not 0 <= said <= 1:
        raise UserError(f"{path} says that its dino_drop_prob is no share between 0 and 1.", remedy=_OTHER_FILE)
    return float(said)


def _rename(state: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, Tensor]:
    """With other names for the layers among the keys of `layers`."""
    return {
        f"{layers[layer]}.{kind}" if layer in layers else key: value
        for key, value in state.items()
        for layer, _, kind in [key.rpartition(".")]
    }


def _keep_channels(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Drop the upper half of the channels out; channel is the fastest axis of the final layer's rows."""
    out, C = dict(state), config.latent_channels
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rest = state[key].shape[1:]
        out[key] = state[key].reshape(-1, 2 * C, *rest)[:, :C].reshape(-1, *rest)
    return out


def _double_channels(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Add an upper half of zeros to the channels out."""
    out, C = dict(state), config.latent_channels
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rest = state[key].shape[1:]
        lower = state[key].reshape(-1, C, *rest)
        out[key] = torch.cat([lower, torch.zeros_like(lower)], dim=1).reshape(-1, *rest)
    return out


def _placeholder_heads(convention: str, config: ModelConfig) -> dict[str, Tensor]:
    hidden, width = 2048, config.width
    channels = config.own_streams[0].channels if config.own_streams else 768
    projector = {
        "projectors.0.0": (hidden, width),
        "projectors.0.2": (hidden, hidden),
        "projectors.0.4": (channels, hidden),
    }
    shapes = {
        "repa": projector,
        "reg": projector,
        "sra": {"ap_head.linear1": (2 * width, width), "ap_head.linear2": (width, 2 * width)},
    }
    heads: dict[str, Tensor] = {}
    for name, shape in shapes.get(convention, {}).items():
        heads[f"{name}.weight"], heads[f"{name}.bias"] = torch.zeros(shape), torch.zeros(shape[0])
    return heads


def _check_keys(state: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Key by key against the model, without allocating its weights."""
    check_fit(empty_model(config), state, source=str(path))
    drift = (state["pos_embed"].double() - token_positions(config)).abs().max().item()
    if not drift < _POSITION_DRIFT:
        raise UserError(
            f"{path}: its position table is not the sin-cos table of a {config.grid} x {config.grid} grid "
            f"(largest difference {drift:.3g})."
        )
