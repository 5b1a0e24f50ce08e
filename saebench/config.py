"""Dataclass -> JSON, and dataclass <- command line.

Every stage has one frozen dataclass beside its code; its fields, with the docstring under each,
are the options of the stage's command and the record of the run.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(text: str) -> int:
    """A whole number, written plainly or as in `64k`, `1M`, `2.5M`, `1B`, `1e6`.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kmb]?)", text.strip().lower().replace("_", ""))
    value = float(match[1]) * _SUFFIXES[match[2]] if match else -1.0
    if not 0 <= value < 2**63 or value != int(value):
        raise ValueError(f"{text!r} is not a count; expected a whole number such as 200000, 200k or 1.5M")
    return int(value)


def parse_multiple(text: str) -> float:
    """A number, or `none` for infinity. Raises ValueError for anything else."""
    return math.inf if text.strip().lower() == "none" else float(text)


# A type with the function that reads it from the command line.
Count = Annotated[int, parse_count]
Multiple = Annotated[float, parse_multiple]


def add_arguments(parser: argparse.ArgumentParser, config: type, *positional: str) -> None:
    """One option per field of `config`; a field without a default is required, and some may be `positional`."""
    helps, hints = _field_docs(config), typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint, default = hints[field.name], _default(field)
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        note = "" if default in (dataclasses.MISSING, None, ()) else f" (default: {_shown(default)})"
        options["help"] = (helps.get(field.name, "") + note).replace("%", "%%")
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            parse, metavar, choices = _parser_of(hint)
            options |= {
                "type": parse,
                "required": default is dataclasses.MISSING,
                "metavar": metavar,
                "choices": choices,
            }
        if field.name in positional:
            parser.add_argument(field.name, type=options["type"], metavar=field.name.upper(), help=helps[field.name])
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), **options)


def from_arguments(config: type[T], arguments: argparse.Namespace) -> T:
    """The config that the parsed command line describes; its own checks raise ValueError."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, config))}
    return config(**{name: value for name, value in vars(arguments).items() if name in names})


def to_json(config: Any) -> dict[str, Any]:
    """The fields as JSON values: tuples become lists, paths become strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` for every entry that is not the same in both."""
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, so that a difference is named to the leaf."""
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return leaves


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


_METAVARS = {int: "N", float: "X"}


def _parser_of(hint: Any) -> tuple[Any, str | None, list[Any] | None]:
    """(function from a string, metavar, choices) for a field's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return functools.partial(_argument, args[1]), _METAVARS.get(args[0], "TEXT"), None
    if origin in (typing.Union, types.UnionType):
        return _parser_of(next(arg for arg in args if arg is not type(None)))
    if origin is typing.Literal:
        return str, None, list(args)
    if origin is tuple:
        parse, metavar, choices = _parser_of(args[0])
        return (
            functools.partial(_argument, functools.partial(_parse_list, parse, choices)),
            f"{metavar or '|'.join(map(str, choices or []))},…",
            None,
        )
    return hint, _METAVARS.get(hint, "TEXT"), None


def _parse_list(parse: Any, choices: list[Any] | None, text: str) -> tuple[Any, ...]:
    values = tuple(parse(part.strip()) for part in text.split(",") if part.strip())
    for value in values:
        if choices and value not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(map(str, choices))}")
    return values


def _argument(parse: Any, text: str) -> Any:
    """argparse shows the message of an ArgumentTypeError, but hides a ValueError's."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@functools.cache
def _field_docs(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[typing.cast(ast.Name, statement.target).id] = " ".join(str(after.value.value).split())
    return docs
