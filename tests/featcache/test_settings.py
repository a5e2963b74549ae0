"""Settings: declared once, checked alike from Python, YAML and the command line."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given as examples
from hypothesis import strategies as st
from pydantic import Field
from typer.testing import CliRunner

from featcache.builder.request import BuildRequest
from featcache.errors import UserError
from featcache.settings import (
    Count,
    Counts,
    FilePath,
    Given,
    Names,
    NotNegative,
    Option,
    Positive,
    Share,
    choices_of,
    from_mapping,
    from_typed,
    options_of,
    settings,
    takes,
    to_mapping,
)
from trainer.analyze.config import AnalyzeConfig
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs.config import RunConfig


@settings
class Example:
    count: Annotated[Count, Option("How many.")] = 4
    rate: Annotated[Positive, Option("How fast.")] = 0.5
    share: Share = 0.1
    decay: NotNegative = 0.0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    kind: Annotated[Literal["zarr", "wds"], Option("Which.", flag="--format")] = "zarr"
    folder: Annotated[FilePath | None, Option("Where.")] = None
    names: Annotated[Names, Option("Names.", typed=list[str], parse=lambda texts: ",".join(texts).split(","))] = ()
    flip: Annotated[bool, Option("Mirrored copies too.")] = False
    compile: Annotated[bool | None, Option("Compile. [default: on a GPU]")] = None
    betas: tuple[float, float] = (0.9, 0.999)


def run(*words: str) -> tuple[int, dict]:
    app = typer.Typer()
    seen: dict[str, object] = {}

    @app.command()
    @takes(Example)
    def command(given: Given, profile: Annotated[bool, typer.Option("--profile")] = False) -> None:
        seen.update(given, profile=profile)

    result = CliRunner().invoke(app, list(words))
    return result.exit_code, seen


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 0}, "count is 0, but it must be at least 1"),
        ({"count": True}, "count = True"),
        ({"count": "5"}, "count = '5'"),
        ({"count": 1.5}, "count = 1.5"),
        ({"rate": 0.0}, "rate is 0.0, but it must be more than 0"),
        ({"rate": math.inf}, "rate is inf, but it must be a finite number"),
        ({"rate": math.nan}, "rate is nan, but it must be a finite number"),
        ({"decay": math.inf}, "decay is inf, but it must be a finite number"),
        ({"beta": 1.0}, "beta is 1.0, but it must be less than 1"),
        ({"share": 1.5}, r"[0, 1]"),
        ({"share": -0.5}, "not be negative"),
        ({"kind": "wsd"}, "Did you mean 'wds'?"),
        ({"names": {"a": 1}}, "names = {'a': 1} is not valid: it must be a list"),
        ({"betas": 0.9}, "betas = 0.9 is not valid: it must be a list"),
        ({"names": ["a", 1]}, "names"),
        ({"flip": 1}, "flip = 1"),
        ({"cuont": 3}, "Did you mean count?"),
    ],
)
def test_what_does_not_fit_is_said(values: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        from_mapping(Example, values)
    assert words in str(caught.value)


def test_a_fault_of_a_check_is_raised_as_it_is() -> None:
    @settings
    class Faulty:
        count: Count = 1

        def __post_init__(self) -> None:
            raise ValueError("a programmer's mistake")

    for make in (Faulty, lambda: from_mapping(Faulty, {}, where="align.repa"), lambda: from_typed(Faulty, {})):
        with pytest.raises(ValueError, match="a programmer's mistake"):
            make()


def test_the_place_is_named() -> None:
    with pytest.raises(UserError, match=r"align\.repa\.count is 0"):
        from_mapping(Example, {"count": 0}, where="align.repa")
    with pytest.raises(UserError, match=r"Did you mean align\.repa\.count\?"):
        from_mapping(Example, {"cuont": 0}, where="align.repa")


def test_lists_and_strings_where_yaml_has_nothing_else() -> None:
    made = from_mapping(Example, {"names": ["a", "b"], "folder": "x/y", "rate": 1})
    assert (made.names, made.folder, made.rate) == (("a", "b"), Path("x/y"), 1.0)


@examples(st.integers(1, 99), st.floats(1e-6, 1e6), st.lists(st.text(max_size=3), unique=True), st.booleans())
def test_back_from_plain_values(count: int, rate: float, names: list[str], flip: bool) -> None:
    made = Example(count=count, rate=rate, names=tuple(names), flip=flip, folder=Path("x"))
    plain = {key: value for key, value in to_mapping(made).items() if key != "betas"}
    assert from_mapping(Example, plain) == made


def test_only_what_was_typed_is_given() -> None:
    assert run() == (0, {"profile": False})
    words = [
        "--count",
        "7",
        "--format",
        "wds",
        "--names",
        "a,b",
        "--names",
        "c",
        "--flip",
        "--no-compile",
        "--folder",
        "x",
        "--profile",
    ]
    given = {"count": 7, "kind": "wds", "names": ["a", "b", "c"], "flip": True, "compile": False, "folder": Path("x")}
    assert run(*words) == (0, {**given, "profile": True})
    assert run("--no-such")[0] == 2


def test_help_shows_defaults_once() -> None:
    app = typer.Typer()

    @app.command()
    @takes(Example, but=["rate"])
    def command(given: Given) -> None:
        """Does it."""

    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert "Does it." in shown and "[default: 4]" in shown and "--rate" not in shown
    assert shown.count("[default: on a GPU]") == 1 and "[default: None]" not in shown


@settings
class Several:
    """One field for each kind of tuple that settings have."""

    names: Names = ()
    sizes: Counts | None = None
    times: Annotated[tuple[float, ...], Field(strict=False)] = (0.5,)
    pair: tuple[float, float] = (0.9, 0.999)


@pytest.mark.parametrize(
    ("field", "value"), [("names", "dinov2-b@11"), ("names", "dinov2-b@9,11"), ("sizes", 4), ("times", 0.3)]
)
def test_a_single_value_is_a_list_of_one(field: str, value: Any) -> None:
    assert getattr(Several(**{field: value}), field) == (value,)
    assert getattr(from_mapping(Several, {field: value}), field) == (value,)
    assert getattr(from_mapping(Several, {field: [value]}), field) == (value,)


def test_a_single_wrong_value_says_what_it_must_be() -> None:
    with pytest.raises(UserError, match="it must be a number"):
        Several(times="late")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        Several(sizes=0)  # type: ignore[arg-type]
    assert Several(sizes=None).sizes is None


Width = Annotated[float, Field(ge=0.005, le=0.28)]


@settings
class Narrow:
    """Fields that the usual examples do not fit."""

    width: Width = 0.1
    widths: Annotated[tuple[Width, ...], Field(strict=False)] = ()
    pairs: Annotated[int, Field(ge=2)] = 2
    start: Annotated[int, Field(ge=0)] = 0


@pytest.mark.parametrize(
    ("values", "proposed"),
    [
        ({"width": 0.001}, "width=0.005"),
        ({"width": "wide"}, "width=0.1"),
        ({"widths": [0.001]}, "widths=0.005"),
        ({"widths": ["wide"]}, "widths=0.1"),
        ({"pairs": "two"}, "pairs=2"),
        ({"pairs": 1}, "pairs=2"),
        ({"start": -1}, "start=1"),
    ],
)
def test_what_is_proposed_is_accepted(values: dict, proposed: str) -> None:
    with pytest.raises(UserError) as caught:
        Narrow(**values)
    remedy = caught.value.remedy or ""
    assert remedy.removesuffix(".").endswith(proposed), remedy
    name, _, number = proposed.partition("=")
    from_mapping(Narrow, {name: float(number) if "." in number else int(number)})


def _commands() -> list[tuple[str, Any]]:
    from featcache.cli import app as featcache_app
    from trainer.cli import app as trainer_app

    groups: dict[str, Any] = {
        "featcache": typer.main.get_command(featcache_app),
        "trainer": typer.main.get_command(trainer_app),
    }
    return [(f"{name} {command}", found) for name, group in groups.items() for command, found in group.commands.items()]


@pytest.mark.parametrize(("name", "command"), _commands())
def test_the_help_shows_the_default_of_every_option(name: str, command: Any) -> None:
    for option in command.params:
        if option.required or option.name == "help":
            continue
        shown = option.show_default and option.default is not None and option.default is not False
        assert shown or "[default: " in option.help, f"{name} {option.opts}: {option.help}"


@pytest.mark.parametrize("cls", [BuildRequest, RunConfig, SampleSettings, SampleRequest, EvalRequest, AnalyzeConfig])
def test_the_help_offers_what_is_accepted(cls: type) -> None:
    for name, option in options_of(cls).items():
        for choice in choices_of(cls, name):
            assert re.search(rf"\b{re.escape(str(choice))}\b", option.help), (name, choice)


@pytest.mark.parametrize(
    "option", ["--moments-codec", "--levels-codec", "--tokens-codec", "--cls-codec", "--text-codec"]
)
@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "fp8", "int4"])
def test_codecs_are_taken_if_they_are_offered(option: str, codec: str) -> None:
    name = option[2:].replace("-", "_")
    offered = re.search(rf"\b{codec}\b", options_of(BuildRequest)[name].help)
    if offered:
        assert getattr(from_typed(BuildRequest, {name: codec}, data="shapes"), name) == codec
    else:
        with pytest.raises(UserError, match=f"{option} = '{codec}' is not known"):
            from_typed(BuildRequest, {name: codec}, data="shapes")
