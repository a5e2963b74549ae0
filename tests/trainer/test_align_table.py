"""The table of methods, their options and how they find their features."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from align_cases import CASES, FEATURES, INFO, make
from hypothesis import given
from hypothesis import strategies as st

import trainer.align
from featcache.errors import CacheError, UserError
from trainer.align import (
    METHODS,
    build,
    config_class,
    method_names,
    required_features,
    resolve,
    split_methods,
)
from trainer.align.base import BackboneInfo, FeatureInfo
from trainer.align.heads import tap_depth

TOKENS = FeatureInfo(shape=(256, 768))


def test_importing_the_table_imports_no_torch():
    code = "import sys, trainer.align as a; a.split_methods('ahpa+sra'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_all_methods_are_in_the_table():
    folder = Path(trainer.align.__file__).parent
    own = {p.stem for p in folder.glob("*.py") if re.search(r"^class \w+Config:", p.read_text(), re.MULTILINE)}
    assert own == {file for file, _, _ in METHODS.values()} and method_names() == tuple(METHODS)


@pytest.mark.parametrize("name", method_names())
def test_option_classes_are_frozen_keyword_only_and_typed(name):
    cls: Any = config_class(name)
    assert dataclasses.is_dataclass(config_class(name)) and cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    hints = typing.get_type_hints(cls)
    assert {field.name for field in dataclasses.fields(cls)} <= set(hints)
    assert cls() == cls()


@pytest.mark.parametrize(
    "text, message",
    [
        ("reap", "Did you mean 'repa'"),
        ("ahpa+ahpa", "twice"),
        ("none+repa", "Leave out none"),
        ("", "Methods:"),
    ],
)
def test_bad_method_names(text, message):
    with pytest.raises(UserError, match=message):
        split_methods(text)


def test_several_methods_are_joined_by_plus():
    assert split_methods("ahpa+sra") == ("ahpa", "sra")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("repa", {"head": "cnv"}, "Did you mean 'conv'.*mlp, conv"),
        ("repa", {"loss": "l2"}, "cosine, nt-xent"),
        ("repa", {"weight": -1.0}, "weight"),
        ("repa", {"weight": float("nan")}, "weight"),
        ("repa", {"weight": True}, "weight"),
        ("repa", {"weight": "0.5"}, "weight"),
        ("repa", {"temperature": 0.0}, "temperature"),
        ("repa", {"spatial_gamma": 2.0}, r"\[0, 1\]"),
        ("repa", {"features": ["dinov2-b"]}, "dinov2-b@11"),
        ("repa", {"features": 11}, "text"),
        ("repa", {"features": ("a@1", "a@1")}, "twice"),
        ("repa", {"depth": 0}, "at least 1"),
        ("repa", {"depth": 4.5}, "integer"),
        ("sara", {"patch_weight": 0, "structure_weight": 0, "adversarial_weight": 0}, "nothing is aligned"),
        ("sara", {"structure_reduction": "max"}, "mean, sum"),
        ("sara", {"discriminator_norm": "layer"}, "group, batch"),
        ("sara", {"discriminator_weights": "imagnet"}, "auto, random"),
        ("sara", {"adversary_every": 0}, "adversary_every"),
        ("dya", {"encoder": "dinov2-b@9"}, "texture_layer"),
        ("dya", {"texture_layer": 9, "semantic_layer": 9}, "two different"),
        ("dya", {"dropout": 1.5}, r"\[0, 1\]"),
        ("dya", {"modulation": "texure"}, "Did you mean 'texture'"),
        ("ahpa", {"groups": ()}, "at least one"),
        ("ahpa", {"groups": ("G5",)}, "G1, G2, G3, G4"),
        ("ahpa", {"groups": ("G3", "G3")}, "twice"),
        ("ahpa", {"split": (8,)}, r"split=\[2, 6\]"),
        ("ahpa", {"split": (0, 8)}, "at least 1"),
        ("ahpa", {"router": "mpl"}, "Did you mean 'mlp'"),
        ("ahpa", {"time_embedding": "sin"}, "linear, sinusoidal, fourier"),
        ("ahpa", {"head": "conv4"}, "conv1, conv2, conv3, conv5, linear, mlp3, mlp5"),
        ("ahpa", {"loss": "l2"}, "cosine, l1, smooth-l1"),
        ("ahpa", {"time_width": 5}, "even"),
        ("ahpa", {"depths": (3, 3)}, "twice"),
        ("ahpa", {"depths": "three"}, "integer"),
        ("ahpa", {"depths": {"first": 3}}, "list"),
        ("sra", {"interval": 1.5}, r"\[0, 1\]"),
        ("sra", {"interval_kind": "random"}, "uniform, fixed"),
        ("sra", {"loss": "l1"}, "smooth-l1, cosine"),
        ("sra", {"beta": 0}, "beta"),
        ("sra", {"head": "yes"}, "head=true"),
        ("sra2", {"head": "mlp3"}, "mlp, conv, linear"),
    ],
)
def test_bad_options_name_the_remedy(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        config_class(name)(**options)
    assert str(caught.value).startswith(name)


def test_lists_from_yaml_become_tuples():
    repa: Any = config_class("repa")(features=["tiny@5"])
    ahpa: Any = config_class("ahpa")(groups=["G4", "G3"], split=[2, 6], depths=[1])
    assert repa.features == ("tiny@5",) and ahpa.groups == ("G3", "G4")
    assert hash(config_class("ahpa")(split=[2, 6])) == hash(config_class("ahpa")(split=(2, 6)))


def test_the_only_encoder_is_taken_and_its_deepest_layer():
    cache = {"vae/G3": FEATURES["vae/G3"], "dinov2-b@9": TOKENS, "dinov2-b@11": TOKENS, "vae/moments": TOKENS}
    repa, sara, dya = config_class("repa")(), config_class("sara")(), config_class("dya")()
    assert resolve("repa", repa, cache) == ("dinov2-b@11",)
    assert resolve("sara", sara, cache) == ("dinov2-b@11",)
    assert resolve("dya", dya, cache) == ("dinov2-b@9", "dinov2-b@11")


@pytest.mark.parametrize("method", ["repa", "sara", "dya"])
def test_of_several_encoders_the_error_names_an_option_that_works(method):
    cache = dict.fromkeys(("dinov2-b@9", "dinov2-b@11", "tiny@4", "tiny@5"), TOKENS)
    with pytest.raises(UserError, match="several encoders") as error:
        resolve(method, config_class(method)(), cache)
    assert error.value.remedy is not None
    ((option, text),) = re.findall(rf"--set '{method}\.(\w+)=(.*)'", error.value.remedy)
    value = yaml.safe_load(text.replace("LAYER", "11"))
    assert set(resolve(method, config_class(method)(**{option: value}), cache)) <= {"dinov2-b@9", "dinov2-b@11"}


def test_required_features_before_a_cache_is_known():
    assert required_features("ahpa", config_class("ahpa")(groups=("G1", "G4"))) == ("vae/G1", "vae/G4")
    assert required_features("repa", config_class("repa")()) == ("<encoder>@<last>",)
    assert required_features("repa", config_class("repa")(features=("clip-l@23",))) == ("clip-l@23",)
    assert required_features("dya", config_class("dya")(texture_layer=0)) == (
        "<encoder>@0",
        "<encoder>@<last>",
    )
    explicit = config_class("dya")(encoder="dinov2-b", texture_layer=7, semantic_layer=11)
    assert required_features("dya", explicit) == ("dinov2-b@7", "dinov2-b@11")
    for name in ("none", "sra", "sra2"):
        assert required_features(name, config_class(name)()) == ()


@pytest.mark.parametrize(
    "name, options, cache, message",
    [
        ("repa", {}, {"vae/G3": FEATURES["vae/G3"]}, "holds none"),
        ("repa", {"features": ("dinov2-b@11",)}, {"dinov2-b@10": TOKENS}, "dinov2-b@11.*does not hold"),
        ("ahpa", {}, {"vae/G3": FEATURES["vae/G3"]}, "vae/G4"),
        ("dya", {}, {"dinov2-b@11": TOKENS}, "two layers"),
        ("dya", {"encoder": "clip-l"}, {"dinov2-b@11": TOKENS, "dinov2-b@9": TOKENS}, "two layers of clip-l"),
        ("dya", {"texture_layer": 7}, {"dinov2-b@11": TOKENS, "dinov2-b@9": TOKENS}, "dinov2-b@7"),
    ],
)
def test_missing_features_are_cache_errors(name, options, cache, message):
    with pytest.raises(CacheError, match=message):
        resolve(name, config_class(name)(**options), cache)


def test_several_encoders_must_be_chosen_from():
    cache = {"dinov2-b@11": TOKENS, "clip-l@23": TOKENS}
    with pytest.raises(UserError, match="clip-l, dinov2-b"):
        resolve("repa", config_class("repa")(), cache)
    assert resolve("repa", config_class("repa")(features=("clip-l@23",)), cache) == ("clip-l@23",)


def test_wrong_kinds_of_features_are_refused():
    with pytest.raises(UserError, match="shape"):
        resolve("repa", config_class("repa")(), {"tiny@5": FeatureInfo(shape=(4, 16, 8))})
    with pytest.raises(UserError, match="not a square"):
        build([("repa", config_class("repa")())], INFO, {"tiny@5": FeatureInfo(shape=(17, 8))})
    mixed = {"tiny@3": FeatureInfo(shape=(16, 8)), "tiny@5": FeatureInfo(shape=(16, 12))}
    with pytest.raises(UserError, match="equal width"):
        build([("dya", config_class("dya")())], INFO, mixed)


@given(st.sets(st.integers(0, 40), min_size=2), st.data())
def test_dya_layers_are_nearest_to_the_papers_ratio_and_stay_so_in_smaller_caches(layers, data):
    config = config_class("dya")()
    cache = {f"enc@{layer}": TOKENS for layer in layers}
    texture, semantic = (int(name.split("@")[1]) for name in resolve("dya", config, cache))
    assert semantic == max(layers)
    assert abs(texture - 9 / 11 * semantic) == min(abs(x - 9 / 11 * semantic) for x in layers - {semantic})
    kept = data.draw(st.sets(st.sampled_from(sorted(layers)))) | {texture, semantic}
    assert resolve("dya", config, {name: cache[name] for name in cache if int(name.split("@")[1]) in kept}) == (
        f"enc@{texture}",
        f"enc@{semantic}",
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("repa", {"S": (4,), "B": (4,), "L": (8,), "XL": (8,), "Ti": (2,)}),
        ("sara", {"S": (4,), "B": (4,), "L": (8,), "XL": (8,), "Ti": (2,)}),
        ("dya", {"S": (6,), "B": (6,), "L": (8,), "XL": (8,), "Ti": (3,)}),
        ("ahpa", {"S": (3,), "B": (3,), "L": (6,), "XL": (7,), "Ti": (2,)}),
        ("sra", {"S": (3,), "B": (3,), "L": (6,), "XL": (8,), "Ti": (2,)}),
        ("sra2", {"S": (4,), "B": (4,), "L": (8,), "XL": (8,), "Ti": (2,)}),
    ],
)
def test_default_blocks_per_scale(name, expected):
    blocks = {"S": 12, "B": 12, "L": 24, "XL": 28, "Ti": 6}
    options = {"adversarial_weight": 0.0} if name == "sara" else {}
    for scale, taps in expected.items():
        info = dataclasses.replace(INFO, name=f"SiT-{scale}/2", depth=blocks[scale])
        assert build([(name, config_class(name)(**options))], info, FEATURES).taps == taps


@pytest.mark.parametrize(
    "model, depth, teacher",
    [("SiT-B/2", 12, 8), ("SiT-S/2", 12, 8), ("SiT-L/2", 24, 16), ("SiT-XL/2", 28, 20), ("DiT-XL/2", 28, 16)],
)
def test_default_blocks_of_the_teacher(model, depth, teacher):
    info = dataclasses.replace(INFO, name=model, depth=depth)
    assert build([("sra", config_class("sra")())], info, FEATURES).teacher_depth == teacher


def test_blocks_the_model_lacks_are_refused():
    with pytest.raises(UserError, match=r"block 7 was asked for.*6 blocks"):
        make("repa", {"depth": 7})
    with pytest.raises(UserError, match="before student"):
        make("sra", {"student_depth": 4, "teacher_depth": 2})
    with pytest.raises(UserError, match="depth from 1 to 3"):
        small = BackboneInfo(name="SiT-B/2", depth=3, width=8, patch_size=2, latent_channels=4, latent_size=8)
        tap_depth("repa", None, {"B": 4}, small)


def test_a_union_of_methods():
    both = build([("ahpa", config_class("ahpa")()), ("sra", config_class("sra")())], INFO, FEATURES)
    assert both.reads == ("vae/G3", "vae/G4") and both.taps == (2,) and both.needs_teacher
    assert {key.split(".")[1] for key in both.state_dict()} == {"ahpa", "sra"}
    three = build([(n, config_class(n)()) for n in ("repa", "dya", "sra2")], INFO, FEATURES)
    assert three.reads == ("tiny@5", "tiny@3") and three.taps == (2, 3) and not three.needs_teacher


def test_every_case_uses_every_method_but_none():
    with_loss = {name for name, (_, _, module) in METHODS.items() if module is not None}
    assert {name for name, _ in CASES.values()} == with_loss - {"none"}


@pytest.mark.parametrize("name", [name for name in method_names() if name != "none"])
def test_documented_options_and_defaults_are_those_of_the_code(name):
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    heading = {"sra2": "## SRA 2"}.get(name, f"## {name}")
    section = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE))
    assert documented == {f.name: repr(f.default) for f in dataclasses.fields(config_class(name))}
