import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from saebench.config import Count, add_arguments, differences, from_arguments, parse_count, to_json


@dataclass(frozen=True, kw_only=True)
class Example:
    """A config with every kind of field."""

    path: Path
    """where"""
    n: Count = 1000
    """how many, 100% of them"""
    layers: tuple[int, ...] = ()
    """which"""
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    """of what kind"""
    lr: float | None = None
    """rate"""
    mode: Literal["x", "y"] = "x"
    """how"""
    force: bool = False
    """again"""


def parse(*argv: str) -> Example:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Example)
    return from_arguments(Example, parser.parse_args(argv))


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("64k", 64_000), ("1M", 10**6), ("2.5m", 2_500_000), ("1B", 10**9), ("1e6", 10**6), ("1_000", 1000)],
)
def test_counts_may_be_abbreviated(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "-3", "1.5", "2.0001k", "ten", "1MM", "nan"])
def test_what_is_not_a_count_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count; expected a whole number such as"):
        parse_count(text)


def test_command_line_fills_every_kind_of_field() -> None:
    got = parse(
        "--path", "p", "--n", "2k", "--layers", "1, 2", "--kinds", "a,b", "--lr", "0.1", "--mode", "y", "--force"
    )
    assert got == Example(path=Path("p"), n=2000, layers=(1, 2), kinds=("a", "b"), lr=0.1, mode="y", force=True)
    assert parse("--path", "p") == Example(path=Path("p"))


def test_bad_values_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--path", "p", "--n", "many"], "'many' is not a count"),
        (["--path", "p", "--kinds", "a,c"], "'c' is not one of a, b"),
        (["--path", "p", "--layers", "one"], "invalid literal for int() with base 10: 'one'"),
        ([], "the following arguments are required: --path"),
    ):
        with pytest.raises(SystemExit):
            parse(*argv)
        assert message in capsys.readouterr().err


def test_help_shows_the_docstring_and_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "how many, 100% of them (default: 1000)" in capsys.readouterr().out


def test_json_holds_lists_and_strings() -> None:
    values = to_json(Example(path=Path("p"), layers=(3,), lr=0.5))
    assert values == {
        "path": "p", "n": 1000, "layers": [3], "kinds": ["a"], "lr": 0.5, "mode": "x", "force": False,
    }  # fmt: skip


def test_differences_name_old_and_new() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: None -> 4"]
