"""Interactions drawn as brackets over the text."""

import re
from typing import Any

from saebench.view.brackets import NOTHING, brackets_html, in_words, rebuilt, sets_html


def one(kind: str, units: list[int], strength: float, agreed: bool | None = True) -> dict[str, Any]:
    return {"kind": kind, "units": units, "strength": strength, "agreed": agreed, "order": len(units), "size": 0.5}


def found(*sets: dict[str, Any], pieces: tuple[str, ...] = ("BOS", "a", " b", "c", "d", "e")) -> dict[str, Any]:
    """Units at 1, 2 and 4; 0 and 3 stay; 5 is explained."""
    units = [{"positions": [place], "text": pieces[place]} for place in (1, 2, 4)]
    return {"scalar": "latent <3>", "pieces": list(pieces), "units": units, "sets": list(sets), "other": "neutral"}


def areas(drawn: str, kind: str) -> list[tuple[str, str]]:
    """(classes, grid area) of what is of a class."""
    return re.findall(rf'class="({kind}[^"]*)" style="grid-area:([\d/]+)', drawn)


def test_ands_lie_above_the_text_and_ors_below_over_their_members() -> None:
    drawn = brackets_html(
        found(one("and", [0], 4.0), one("and", [0, 2], -1.0, False), one("or", [1, 2], 2.0), one("and", [1], 1.0)), 4
    )
    # Columns: BOS, a, ·b, c, d, e. Above the text in row 3: two ANDs of one beside each other, then that of two.
    assert areas(drawn, "text") == [
        ("text ", "3/1"), ("text unit", "3/2"), ("text unit", "3/3"), ("text ", "3/4"), ("text unit", "3/5"), ("text last", "3/6"),
    ]  # fmt: skip
    assert areas(drawn, "sb-set ") == [
        ("sb-set and", "2/2/3/3"), ("sb-set and", "2/3/3/4"), ("sb-set and down apart", "1/2/2/6"), ("sb-set or", "4/3/5/6"),
    ]  # fmt: skip
    assert areas(drawn, "sb-member ") == [
        ("sb-member and", "2/2"), ("sb-member and", "2/3"), ("sb-member and down apart", "1/2"), ("sb-member and down apart", "1/5"),
        ("sb-member or", "4/3"), ("sb-member or", "4/5"),
    ]  # fmt: skip
    assert re.findall(r"--w:([\d.]+)px", drawn) == ["8.0", "3.5", "3.5", "3.5", "5.0", "5.0"]  # from 2 to 8 by strength
    assert 'title="·b OR d: +2.00"' in drawn
    assert areas(drawn, "band") == [("band", "1/2/5/3"), ("band", "1/3/5/4"), ("band", "1/5/5/6")]
    for said in ("all of them together (AND)", "any one of them (OR)", "lowers", "the other way (neutral)"):
        assert said in drawn


def test_only_the_largest_are_drawn_and_only_what_is_there_is_explained() -> None:
    some = found(one("and", [0], 4.0), one("or", [1, 2], 2.0, False))
    drawn = brackets_html(some, 1)
    assert areas(drawn, "sb-set ") == [("sb-set and", "1/2/2/3")]
    assert "(OR)" not in drawn
    assert "neutral" not in drawn
    assert "lowers" not in drawn
    assert "1 sets" in drawn
    assert sets_html(some, 1).count("<tr>") == 2
    assert areas(brackets_html(found(), 5), "sb-set") == []


def test_what_stays_is_cut_and_whole_on_hover_and_no_text_is_markup() -> None:
    long = "x" * 40
    some = found(one("and", [0, 1], 1.0, None), pieces=(long, "<b>", "", long, " \U0001f600\u0634", "\n"))
    drawn = brackets_html(some, 1)
    assert f">…{'x' * 15}<" in drawn
    assert f">{'x' * 8}…{'x' * 7}<" in drawn
    assert f'title="stays: {long}"' in drawn
    assert "<b>" not in drawn
    assert "&lt;b&gt;" in drawn
    assert f">{NOTHING}<" in drawn  # the rest of a character
    assert ">·\U0001f600\u0634<" in drawn
    assert ">↵<" in drawn
    assert "latent &lt;3&gt;" in drawn
    assert in_words(some["sets"][0], some) == f"<b> AND {NOTHING}"
    assert "&lt;b&gt; AND" in sets_html(some, 1)


def test_thirty_tokens_and_twenty_sets_take_a_column_or_a_lane_each_at_most() -> None:
    pieces = ("BOS", *(f" t{place}" for place in range(1, 31)))
    some = found(pieces=pieces)
    some["units"] = [{"positions": [place], "text": pieces[place]} for place in range(2, 26, 2)]
    some["sets"] = [one(("and", "or")[i % 2], [i % 11, 11], 1.0 + i, i % 3 > 0) for i in range(20)]
    drawn = brackets_html(some, 20)
    assert len(areas(drawn, "text")) == 26  # 12 units, 13 texts between and about them, and what is explained
    rows = {int(area.split("/")[0]) for _, area in areas(drawn, "sb-set ")}
    assert rows == set(range(1, 22)) - {11}  # all reach the last unit: ten above the text and ten below


def test_the_curve_marks_the_number_that_is_shown() -> None:
    line, mark = rebuilt([0.0, 0.5, 0.75], 7).data
    assert (list(line.x), list(line.y)) == ([0, 1, 2], [0.0, 0.5, 0.75])
    assert (list(mark.x), list(mark.y)) == ([2], [0.75])
    assert rebuilt([0.0, -0.5], 1).layout.yaxis.range[0] == -0.5
