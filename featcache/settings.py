"""Settings declared once: a field of a frozen dataclass is its type, its default, its check and its option.

    @settings
    class BuildRequest:
        batch_size: Annotated[Count, Option("Images an encoder sees at once.")] = 16

    @app.command()
    @takes(BuildRequest)
    def build(given: Given) -> None:
        request = from_typed(BuildRequest, given)

Values are checked alike wherever they come from (Python, YAML, the command line), and strictly: True is not a number,
nor is "5". A list will do for a tuple and a string for a path, since YAML has neither; where any number of values may
stand, a single one is a list of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, dataclass_transform, overload

import pydantic
import typer
from pydantic import Field

from featcache.errors import UserError
from featcache.paths import on_this_machine

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
S = TypeVar("S", bound="DataclassInstance")

Given = dict[str, Any]
"""What was typed of a command's options: name of the field -> value. Options that were not typed are absent."""


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def number(value: object) -> object:
    """`1e-4`, which YAML 1.1 takes for text, as the number it looks like; anything else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _whole(value: object) -> object:
    """`4e5`, which is how people write it, as the whole number it is."""
    value = number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Beyond these no arithmetic downstream holds: steps times the batch size counts samples in 64 bits.
Count = Annotated[int, Field(ge=1, le=2**31 - 1), pydantic.BeforeValidator(_whole)]
Index = Annotated[int, Field(ge=0, le=2**63 - 1), pydantic.BeforeValidator(_whole)]
Share = Annotated[float, Field(ge=0, le=1), pydantic.BeforeValidator(number)]
Finite = Annotated[float, Field(allow_inf_nan=False), pydantic.BeforeValidator(number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), pydantic.BeforeValidator(number)]
Limit = Annotated[float, Field(gt=0), pydantic.BeforeValidator(number)]  # infinite: none
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), pydantic.BeforeValidator(number)]


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise ValueError("it names something twice")
    return values


Distinct = pydantic.AfterValidator(_distinct)
FilePath = Annotated[Path, Field(strict=False), pydantic.AfterValidator(on_this_machine)]
Names = Annotated[tuple[str, ...], Field(strict=False), Distinct]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]


@dataclasses.dataclass(frozen=True)
class Option:
    """How a field appears on a command line. Without one, a field is no option (`--set` may reach it still).

    help: one sentence; the default is added to it unless the sentence tells one. flag: if it is not `--` and the
    field's name. typed, parse: what is typed, where that is not the field's own type, and the function that turns it
    into the field's value.
    """

    help: str
    flag: str | None = None
    typed: object = None
    parse: Callable[[Any], object] | None = None


@overload
def settings(cls: type[T], /) -> type[T]: ...


@overload
def settings(*, where: str) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T] | None = None, /, *, where: str = "") -> type[T] | Callable[[type[T]], type[T]]:
    """A frozen, keyword-only dataclass whose fields are validated; what is wrong is a `UserError`.

    where: goes before the fields' names in errors (`ahpa`: "ahpa.head = ...").
    """
    if cls is None:
        return functools.partial(_settings, where=f"{where}.")
    return _settings(cls, where="")


def _settings(cls: type[T], *, where: str) -> type[T]:
    config = pydantic.ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self: object, **values: object) -> None:
        try:
            validate(self, **{name: _listed(type(self), name, value) for name, value in values.items()})
        except pydantic.ValidationError as error:
            raise _explain(error, type(self), lambda name: where + name) from error

    made.__init__ = __init__  # type: ignore[method-assign]  # what pydantic made, wrapped
    return typing.cast("type[T]", made)


def _listed(cls: type, field: str, value: object) -> object:
    """A single value as a tuple of one where the field takes any number of them: `--set repa.features=dinov2-b@11`."""
    if not isinstance(value, str | int | float | Path) or field not in _hints(cls):
        return value
    bare = _bare(_hint(cls, field))
    return (value,) if typing.get_origin(bare) is tuple and typing.get_args(bare)[1:] == (...,) else value


def from_mapping(cls: type[T], values: Mapping[str, object], *, where: str = "") -> T:
    """An instance of a class of settings from plain values; `where` goes before the fields' names in errors.

    Raises `UserError` for an unknown key (with the nearest valid one), or a value that does not fit.
    """
    # Also for classes that are known by a protocol alone, which does not say that they are dataclasses.
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"Did you mean {prefix}{near[0]}?" if near else f"Valid keys: {', '.join(sorted(fields))}"
            raise UserError(f"unknown key {prefix}{key!s:.80}", remedy=remedy)
    try:
        return cls(**values)
    except UserError as error:
        cause = error.__cause__
        if prefix and isinstance(cause, pydantic.ValidationError):
            raise _explain(cause, cls, lambda name: prefix + name) from cause
        raise


def given_of(cls: type[DataclassInstance], options: Mapping[str, Any]) -> Given:
    """Options by their names (`vae_levels` for `--vae-levels`), as if their values had been typed; None is not given.

    A list will do where several are typed, or where they are typed with commas.

    Raises `UserError` for a name that is no option's.
    """
    names = {flag_of(cls, name).removeprefix("--").replace("-", "_"): name for name in options_of(cls)}
    given = {}
    for name, value in options.items():
        if name not in names:
            raise UserError(
                f"there is no option {name!r:.80}", remedy=f"{suggest(name, names)}Options: {', '.join(sorted(names))}"
            )
        option = options_of(cls)[names[name]]
        if isinstance(value, Path) and _bare(_hint(cls, names[name])) is str:
            value = str(value)
        if value is not None:
            given[names[name]] = option.parse(_as_typed(option, value)) if option.parse else value
    return given


def _as_typed(option: Option, value: Any) -> Any:
    several = isinstance(value, list | tuple)
    if option.typed == list[str]:
        return [str(entry) for entry in value] if several else [str(value)]
    if option.typed is str:
        return ",".join(map(str, value)) if several else str(value)
    return value


def from_typed(cls: type[S], given: Given, **others: object) -> S:
    """Settings from what was typed (and `others`, which were not); errors name the options.

    Raises `UserError` for a value that does not fit.
    """
    try:
        return cls(**given, **others)
    except UserError as error:
        if isinstance(error.__cause__, pydantic.ValidationError):
            flags = {name: flag_of(cls, name) for name in options_of(cls)}
            raise _explain(error.__cause__, cls, lambda name: flags.get(name, name)) from error.__cause__
        raise


def to_mapping(instance: DataclassInstance) -> dict[str, Any]:
    """Plain values of settings, such as YAML holds and `from_mapping` reads back: lists, mappings, strings, numbers."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def suggest(value: object, choices: Collection[str]) -> str:
    """`"Did you mean 'x'? "` for a near miss, else an empty string."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def _explain(error: pydantic.ValidationError, cls: type, shown: Callable[[str], str]) -> UserError:
    """The first problem in our words: which field (as it is `shown`), what it is, what it must be."""
    problem = error.errors(include_url=False)[0]
    context = problem.get("ctx", {})
    if not problem["loc"]:  # no field, so a fault in what a class checks itself
        raise context["error"]
    field = str(problem["loc"][0])
    name, value = shown(field), problem["input"]
    choices = [str(choice) for choice in _choices(_hint(cls, field))] if field in _hints(cls) else []
    sign = " " if name.startswith("-") else "="
    match problem["type"]:
        case "unexpected_keyword_argument":
            raise TypeError(f"{cls.__name__} has no field {field}") from error
        case "missing":
            return UserError(f"{name} is missing", remedy=f"Give {name}.")
        case "literal_error":
            remedy = f"{suggest(value, choices)}Use one of: {', '.join(choices)}."
            return UserError(f"{name} = {value!r:.200} is not known", remedy=remedy)
        case "greater_than_equal":
            low = context["ge"]
            what = "must not be negative" if low == 0 else f"must be at least {low:g}"
            fits = _accepted(cls, field, max(low, 1), low)
            return UserError(
                f"{name} is {value!r:.200}, but it {what}", remedy=f"Type for example {name}{sign}{fits:g}."
            )
        case "less_than_equal":
            high = context["le"]
            what = "must lie in [0, 1]" if high == 1 else f"can be {high:,} at most"
            return UserError(f"{name} is {value!r:.200}, but it {what}", remedy=f"Type at most {name}{sign}{high}.")
        case "greater_than" | "less_than" | "finite_number" as kind:
            must = {
                "greater_than": f"more than {context.get('gt')}",
                "less_than": f"less than {context.get('lt')}",
                "finite_number": "a finite number",
            }
            return UserError(
                f"{name} is {value!r:.200}, but it must be {must[kind]}", remedy=f"Give {name} such a number."
            )
    expected = _EXPECTED.get(problem["type"]) or str(context.get("error") or problem["msg"])
    example = _EXAMPLES.get(problem["type"], "").format(f"{name}{sign}")
    if (examples := _NUMBERS.get(problem["type"])) is not None:
        example = f"Write for example {name}{sign}{_accepted(cls, field, *examples):g}."
    return UserError(f"{name} = {value!r:.200} is not valid: {expected}", remedy=example or None)


def _accepted(cls: type, field: str, *examples: float) -> float:
    """The first example that a field takes, alone or as a list of one; the last if none is known to fit."""
    hint: Any = _hint(cls, field)
    adapter = pydantic.TypeAdapter[Any](hint)
    for example in examples:
        for value in (example, [example]):
            with contextlib.suppress(pydantic.ValidationError):
                adapter.validate_python(value)
                return example
    return examples[-1]


_EXPECTED = {
    "int_type": "it must be an integer",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text",
    "tuple_type": "it must be a list",
    "dict_type": "it must be a group of keys",
    "too_short": "it must name at least one",
}
_NUMBERS = {"int_type": (1, 2), "float_type": (0.5, 0.1, 0.01)}
_EXAMPLES = {
    "bool_type": "Write {0}true or {0}false.",
    "string_type": "Write for example {0}text, in quotes if it looks like a number.",
    "tuple_type": "Write it as a list: {0}[...].",
    "dict_type": "Write the keys in it with a dot, as in --set ahpa.weight=0.5, or below it in a recipe.",
    "too_short": "Name one, or leave it out.",
}


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls, include_extras=True)


def _hint(cls: type, name: str) -> object:
    return _hints(cls)[name]


def _bare(hint: object) -> object:
    """A type without `Annotated` and without `None`."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _bare(parts[0]) if len(parts) == 1 else hint
    return hint


def _choices(hint: object) -> tuple[object, ...]:
    bare = _bare(hint)
    if typing.get_origin(bare) is tuple:
        bare = _bare(typing.get_args(bare)[0])
    return typing.get_args(bare) if typing.get_origin(bare) is Literal else ()


def choices_of(cls: type, name: str) -> tuple[object, ...]:
    """What a field of few values may be; empty for any other."""
    return _choices(_hint(cls, name))


def options_of(cls: type[DataclassInstance]) -> dict[str, Option]:
    """Field -> option of a class of settings, in the order of declaration."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = _hint(cls, field.name)
        metadata = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        for entry in metadata:
            if isinstance(entry, Option):
                found[field.name] = entry
    return found


def takes(
    *classes: type[DataclassInstance], but: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of classes of settings (all `but` some); its parameter `given` receives them.

    The command's own further parameters stay as they are, after those of the settings.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        fields = {name: (cls, option) for cls in classes for name, option in options_of(cls).items() if name not in but}
        own = inspect.signature(function, eval_str=True).parameters
        arguments = [p for n, p in own.items() if n != "given" and p.default is inspect.Parameter.empty]
        others = [p for n, p in own.items() if n != "given" and p.default is not inspect.Parameter.empty]
        derived = [_parameter(cls, name, option) for name, (cls, option) in fields.items()]

        @functools.wraps(function)
        def command(**values: object) -> None:
            typed = {name: values.pop(name) for name in fields}
            given = {
                name: option.parse(typed[name]) if option.parse else typed[name]
                for name, (_, option) in fields.items()
                if typed[name] is not None and typed[name] != []
            }
            function(given=given, **values)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*arguments, *derived, *others)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # where typer looks
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__
        return command

    return decorate


def _parameter(cls: type[DataclassInstance], name: str, option: Option) -> inspect.Parameter:
    """The parameter from which typer makes the option: None, and so absent from `given`, unless it is typed."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    bare = _bare(_hint(cls, name))
    typed = option.typed or (str if _choices(bare) else bare)
    flag = _flag(name, option)
    if bare is bool and "/" not in flag and field.default is not False:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    # Square brackets would be markup, and vanish.
    help_ = (option.help + _shown_default(field, option.help)).replace("[", r"\[")
    shown = "<str>" if typed == list[str] else None  # `<list[str]>` says no more, and takes the room of the text beside
    annotation = Annotated[typed | None, typer.Option(flag, help=help_, show_default=False, metavar=shown)]  # type: ignore[valid-type]  # a type made here
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def flag_of(cls: type[DataclassInstance], name: str) -> str:
    """`--batch-size` of the field `batch_size`."""
    return _flag(name, options_of(cls)[name]).partition("/")[0]


def _flag(name: str, option: Option) -> str:
    return option.flag or "--" + name.replace("_", "-")


def _shown_default(field: dataclasses.Field[Any], text: str) -> str:
    """What the help says of the default beside its own text, which tells what None and an empty list mean."""
    default = field.default
    if "[default" in text or default is None or default == () or default is dataclasses.MISSING:
        return ""
    return f" [default: {'off' if default is False else default}]"


def is_number(text: str) -> bool:
    """Whether `text` is a whole number in ASCII digits, of a length that a layer or a seed may have."""
    return text.isascii() and text.isdigit() and len(text) <= 18
