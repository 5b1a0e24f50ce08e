import html
import re

import pytest

from saebench.view.tokens import CSS, number, text_html, token_html

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
    with pytest.raises(ValueError, match="shorter"):
        text_html(["a", "b"], [1.0], 1.0)


def test_numbers_have_three_figures() -> None:
    assert [number(value) for value in (0.01234, 1.0, 12.345, 123.4, 1234.5)] == [
        "0.0123",
        "1.00",
        "12.3",
        "123",
        "1,234",
    ]
