"""Tables as HTML whose headings and rows can be picked: `data-pick` says what, for whatever listens to clicks."""

import html
from collections.abc import Sequence
from typing import NamedTuple

CSS = """
.sb-scroll { overflow: auto; max-height: var(--sb-height, 86vh); overscroll-behavior-x: contain;
  background: linear-gradient(to left, var(--sb-paper) 30%, transparent) right / 40px 100% local no-repeat,
    linear-gradient(to left, color-mix(in srgb, var(--sb-ink) 22%, transparent), transparent) right / 12px 100% scroll no-repeat; }
.sb-scroll:focus-visible { outline: 2px solid var(--sb-line); outline-offset: 2px; }
.sb-grid { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13px; line-height: 1.45; }
.sb-grid th { position: sticky; top: 0; background: var(--sb-paper); text-align: right; font-weight: 500; padding: 0 10px 4px;
  border-bottom: 1px solid var(--sb-rule); white-space: nowrap; color: var(--sb-faint); z-index: 1; }
.sb-grid th:first-child, .sb-grid td:first-child { position: sticky; left: 0; background: var(--sb-paper); } .sb-grid th:first-child { z-index: 2; }
.sb-grid th.text, .sb-grid td.text { text-align: left; }
.sb-grid td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--sb-rule); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.sb-grid td.wide { max-width: 20rem; overflow: hidden; text-overflow: ellipsis; } .sb-grid td.wide > span { white-space: pre; }
.sb-grid th button { all: unset; cursor: pointer; padding: 4px 0; color: inherit; }
.sb-grid th[aria-sort] { color: var(--sb-ink); font-weight: 600; }
.sb-grid tr[data-pick] { cursor: pointer; } .sb-grid tbody tr:hover, .sb-grid tbody tr:hover td:first-child { background: var(--sb-tint); }
.sb-grid tr.chosen, .sb-grid tr.chosen td:first-child { background: var(--sb-tint); } .sb-grid tr.chosen td:first-child { box-shadow: inset 3px 0 var(--sb-line); }
.sb-grid tr[tabindex]:focus-visible { outline: 2px solid var(--sb-line); outline-offset: -2px; } .sb-grid button:focus-visible, .sb-grid a:focus-visible { outline: 2px solid var(--sb-line); outline-offset: 2px; }
.sb-grid a { color: var(--sb-ink); text-underline-offset: 3px; text-decoration-color: var(--sb-rule); }
.sb-side .sb-grid { table-layout: fixed; } .sb-side th:first-child { width: 3.2rem; } .sb-side th:last-child { width: 3.4rem; }
.sb-side td, .sb-side th { padding-left: 6px; padding-right: 6px; } .sb-side td { vertical-align: top; }
.sb-side .sb-grid td.wide { white-space: normal; overflow-wrap: anywhere; }
.sb-side .sb-grid td.wide > span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; white-space: pre-wrap; }
.sb-grid td .sb-text { white-space: normal; }
.sb-spark { width: 72px; height: 18px; display: block; margin-left: auto; fill: var(--sb-bar); }
.sb-tag { display: inline-block; border: 1px solid var(--sb-rule); border-radius: 3px; padding: 0 5px; font-size: 11px; margin-right: 4px;
  color: var(--sb-faint); }
"""


class Column(NamedTuple):
    """A column: what is picked to sort by it (empty: it cannot be sorted), its heading, and what that means."""

    key: str
    heading: str
    help: str = ""
    text: bool = False
    """aligned to the left"""


class Row(NamedTuple):
    """A row: its cells as HTML, and what is picked by clicking it."""

    cells: Sequence[str]
    pick: str = ""
    chosen: bool = False


def grid_html(
    columns: Sequence[Column], rows: Sequence[Row], name: str, *, sort: tuple[str, bool] | None = None, height: str = ""
) -> str:
    """A table; `sort` is the key it is sorted by, and whether descending, `height` the CSS length beyond which it scrolls."""
    head = "".join(_heading(column, sort) for column in columns)
    kinds = ["text wide" if column.text else "" for column in columns]
    body = "".join(_row(row, kinds) for row in rows)
    limit = f' style="--sb-height:{html.escape(height, quote=True)}"' if height else ""
    return (
        f'<div class="sb-scroll"{limit}><table class="sb-grid" aria-label="{html.escape(name, quote=True)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _heading(column: Column, sort: tuple[str, bool] | None) -> str:
    kind = ' class="text"' if column.text else ""
    title = f' title="{html.escape(column.help, quote=True)}"' if column.help else ""
    heading = html.escape(column.heading)
    if not column.key:
        return f"<th{kind}{title}>{heading}</th>"
    sorted_by = sort is not None and sort[0] == column.key
    arrow = (" \u25bc" if sort[1] else " \u25b2") if sorted_by and sort else ""
    state = f' aria-sort="{"descending" if sort[1] else "ascending"}"' if sorted_by and sort else ""
    return f'<th{kind}{title}{state}><button data-pick="sort:{html.escape(column.key)}">{heading}{arrow}</button></th>'


def _row(row: Row, kinds: Sequence[str]) -> str:
    pick = f' data-pick="{html.escape(row.pick, quote=True)}"' if row.pick else ""
    # What no link in the row does, the keyboard does on the row itself.
    if pick and not any(pick in cell for cell in row.cells):
        pick += ' tabindex="0"'
    cells = "".join(
        f'<td class="{kind}">{cell}</td>' if kind else f"<td>{cell}</td>"
        for cell, kind in zip(row.cells, kinds, strict=True)
    )
    return f"<tr{pick}{' class=chosen' if row.chosen else ''}>{cells}</tr>"


def link(text: str, pick: str, address: str) -> str:
    """A link that is picked by a click, and leads to `address` where it is opened in another tab."""
    return f'<a href="{html.escape(address, quote=True)}" data-pick="{html.escape(pick, quote=True)}">{html.escape(text)}</a>'


def tag(text: str) -> str:
    return f'<span class="sb-tag">{html.escape(text)}</span>'


def spark(counts: Sequence[int]) -> str:
    """A histogram as small as a word; the square root of the counts, so that rare strengths show."""
    tallest = max(max(counts, default=0), 1) ** 0.5
    steps = "".join(f"V{18 - 17 * count**0.5 / tallest:.1f}h1" for count in counts)
    return f'<svg class="sb-spark" viewBox="0 0 {max(len(counts), 1)} 18" preserveAspectRatio="none" aria-hidden="true"><path d="M0 18{steps}V18z"/></svg>'
