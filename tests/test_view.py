import html
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench.pieces import show_text
from saebench.view.charts import density_histogram, training_curves
from saebench.view.markdown import code, plain
from saebench.view.tokens import CSS, alone, number, text_html, token_html, units

NASTY = [
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "&amp;",
    "**bold**",
    "🙂",
    "שלום",
    "\x00",
    "\\xf0",
    "`",
    "'",
    "</div>",
]


@pytest.mark.parametrize("piece", NASTY)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_every_token_shows_as_text(piece: str, value: float) -> None:
    made = token_html(piece, value, 5.0, peak=True)
    tags = re.findall(r"<[^>]*>", made)
    assert {tag.split()[0].strip("</>") for tag in tags} == {"span"}
    assert "onmouseover=" not in re.sub(r'"[^"]*"', "", "".join(tags))
    shown = html.unescape(re.sub(r"<[^>]*>", "", made))
    assert shown.startswith(piece.replace("\x00", "\u2400"))


def test_white_space_is_visible() -> None:
    assert ">\u21b5\n<" in token_html("\n", 0.0, 1.0)
    assert ">\u2192\t<" in token_html("\t", 0.0, 1.0)
    assert ">\u00b7\u00b7<" in token_html("  ", 1.0, 1.0)
    assert "> a<" in token_html(" a", 0.0, 1.0)
    assert [alone(piece) for piece in ("  ", "\n ", "\t", " a b")] == ["··", "↵·", "→", "·a·b"]


def test_strength_is_told_by_colour_weight_and_number() -> None:
    made = text_html([" a", "b", "c"], [0.0, 2.0, 4.0], 4.0, peak=2)
    assert made.count("sb-on") == 2
    assert "--a:0.500" in made
    assert "--a:1.000" in made
    assert 'data-v="2.00"' in made
    assert made.count("tabindex") == 2
    assert made.count("sb-badge") == 1
    assert "border-bottom" in CSS
    assert "light-dark(" in CSS
    with pytest.raises(ValueError, match="2 tokens and 1 values"):
        text_html(["a", "b"], [1.0], 1.0)


def test_a_character_of_several_tokens_is_one_unit_with_its_largest_value() -> None:
    pieces = show_text([b"a ", b"\xf0\x9f", b"\x98", b"\x80b", b"\xff", b""])
    assert pieces == ["a ", "\U0001f600", "", "b", "\\xff", ""]
    assert [(unit.text, list(unit.places)) for unit in units(pieces)] == [
        ("a ", [0]), ("\U0001f600", [1, 2]), ("b", [3]), ("\\xff", [4, 5]),
    ]  # fmt: skip
    made = text_html(pieces, [0.0, 1.0, 3.0, 0.0, 0.0, 0.0], 4.0, peak=2)
    assert made.count("sb-on") == 1
    assert 'data-v="3.00, the most of 2 tokens"' in made
    assert made.count("sb-badge") == 1
    assert units([]) == []
    assert show_text([]) == []


@given(st.lists(st.binary(max_size=4), max_size=12))
def test_shown_tokens_joined_are_the_text(pieces: list[bytes]) -> None:
    shown = show_text(pieces)
    assert len(shown) == len(pieces)
    assert "".join(shown) == b"".join(pieces).decode("utf-8", "backslashreplace")


@pytest.mark.parametrize(
    "text",
    ["[a](http://b)", "**b** _c_ `d`", "$x$ ~~e~~", ":material/home: :red[f]", "<b>", "# h", "- i", "12. j", "a\nb"],
)
def test_markup_is_escaped_and_reads_the_same(text: str) -> None:
    escaped = plain(text)
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped) == " ".join(text.split())
    assert not re.search(r"(?<!\\)[\[\]*_`$~:<#]|^- |\d\. ", escaped)


@pytest.mark.parametrize("text", ["a", "`", "a``b`", "", "a\nb"])
def test_a_code_span_holds_any_text(text: str) -> None:
    span = code(text)
    fence = re.match("`+", span).group() if text != "`" else "``"  # type: ignore[union-attr]
    assert span.startswith(fence)
    assert span.endswith(fence)
    assert fence not in span[len(fence) : -len(fence)]


def test_numbers_have_three_figures() -> None:
    assert [number(value) for value in (0.01234, 1.0, 12.345, 123.4, 1234.5)] == [
        "0.0123",
        "1.00",
        "12.3",
        "123",
        "1,234",
    ]


def test_a_log_axis_has_ticks_of_its_own_only_where_some_are_among_the_values() -> None:
    logs = {"a": [{"tokens": 1, "fvu": 0.021}, {"tokens": 2, "fvu": 0.04}]}  # neither 0.02 nor 0.05 lies between
    near = training_curves(logs, "fvu", "FVU", {"a": "topk"}).layout.yaxis
    logs["a"][1]["fvu"] = 0.2
    far = training_curves(logs, "fvu", "FVU", {"a": "topk"}).layout.yaxis
    assert (near.type, near.tickvals) == ("log", None)
    assert {0.05, 0.1, 0.2} <= set(far.tickvals)
    assert training_curves({}, "fvu", "FVU", {}).layout.yaxis.type == "log"


def test_bars_of_densities_hold_every_living_latent_once_and_the_dead_are_told() -> None:
    density = np.array([0.0, 0.0, 1e-3, 1.01e-3, 0.02, 1.0])
    figure = density_histogram(density, "topk-k2")
    (bar,) = figure.data
    held = {ends: int(count) for ends, count in zip(bar.customdata, bar.y, strict=True) if count}
    assert held == {"-3_-2.9": 2, "-1.7_-1.6": 1, "0_0.1": 1}  # an edge belongs to the bar above it
    assert figure.layout.title.text == "Densities of topk-k2: 4 living latents, 2 dead"
    assert sum(density_histogram(np.zeros(3), "dead").data[0].y) == 0
