"""A summary's figures as tables: a heading, and rows of strings."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from saebench.evaluate.compare import FIGURES
from saebench.store.schema import MASSIVE

# name in summary.json -> (heading, format)
COLUMNS = {
    "name": ("SAE", ""),
    "l0": ("L0", ".1f"),
    "fvu": ("FVU", ".4f"),
    "fvu_all": ("all rows", ".4f"),
    "delta_ce": ("ΔCE (nats)", ".4f"),
    "loss_recovered_zero": ("rec. (zero)", ".4f"),
    "loss_recovered_mean": ("rec. (mean)", ".4f"),
    "kl": ("KL (nats)", ".4f"),
    "gamma": ("γ", ".3f"),
    "dead_fraction": ("dead", ".1%"),
    "dense_fraction": ("dense", ".1%"),
    "duplicate_fraction": ("twins", ".1%"),
    "pca_fvu": ("FVU of PCA", ".4f"),
    "linear_fvu": ("FVU of linear map", ".4f"),
    "untrained_fvu": ("FVU untrained", ".4f"),
    "neurons_fvu": ("FVU of neurons", ".4f"),
    "beyond": ("beyond these", ".4f"),
    "pca_delta_ce": ("ΔCE of PCA", ".4f"),
    "linear_delta_ce": ("ΔCE of linear map", ".4f"),
    "untrained_delta_ce": ("ΔCE untrained", ".4f"),
    "beyond_delta_ce": ("ΔCE beyond these", ".4f"),
}

# of sets
SET_COLUMNS = {
    "name": ("Set", ""),
    "members": ("members", "d"),
    "l0": ("L0 of all", ".1f"),
    "ce_clean": ("CE clean", ".4f"),
    "ce_spliced": ("CE replaced", ".4f"),
    "delta_ce": ("ΔCE (nats)", ".4f"),
    "loss_recovered_zero": ("rec. (zero)", ".4f"),
    "loss_recovered_mean": ("rec. (mean)", ".4f"),
    "kl": ("KL (nats)", ".4f"),
    "fvu": ("FVU", ".4f"),
    "error_share": ("share of error", ".4f"),
    "dead_fraction": ("dead", ".1%"),
}

REFITTED = ("fvu", "delta_ce", "loss_recovered_zero", "kl")
"""figures of those that are refitted"""

AT_EQUAL_L0 = ("fvu", "delta_ce")
"""figures of lines that are shown where there is no room for all of them"""

_ONLY_WHERE = {
    "fvu_all": "massive_rows", "duplicate_fraction": "duplicate_fraction", "pca_fvu": "pca_fvu", "linear_fvu": "linear_fvu",
    "neurons_fvu": "neurons_fvu", **{name: name for name in COLUMNS if name.endswith("_delta_ce")},
}  # fmt: skip
"""columns that are worth their room only where an SAE has another figure above 0"""


def tables(summary: dict[str, Any], at_equal_l0: Collection[str] = AT_EQUAL_L0) -> list[list[list[str]]]:
    """All tables of a summary, headings and rows each: dictionaries, the same refitted, sets, seeds, lines `at_equal_l0` of some of FIGURES."""
    least = summary.get("least_differences", {})
    return [
        *([table(summary["saes"], least)] if summary["saes"] else []),
        *([refitted_table(refitted)] if (refitted := [sae for sae in summary["saes"] if "refitted" in sae]) else []),
        *([set_table(summary["sets"])] if "sets" in summary else []),
        *([seed_table(summary["over_seeds"])] if summary.get("over_seeds") else []),
        *equal_l0_tables(summary["equal_l0"], at_equal_l0),
        *summary.get("more", ()),
    ]


def table(saes: list[dict[str, Any]], least: Mapping[str, float] = MappingProxyType({})) -> list[list[str]]:
    """Headings and formatted rows, a list of strings each; `least` (`least_differences`) makes a last row."""
    every = [{**sae, **sae["baselines"], "beyond": _beyond(sae), **_spliced(sae)} for sae in saes]
    columns = {
        name: shown
        for name, shown in COLUMNS.items()
        if name not in _ONLY_WHERE or any(values.get(_ONLY_WHERE[name]) for values in every)
    }
    rows = _formatted(columns, every)
    for row, sae in zip(rows[1:], saes, strict=True):
        for place, name in enumerate(columns):
            row[place] = ("≈ " if name in sae.get("undecided", ()) else "") + row[place]
    if least:
        cells = [f"±{least[name]:{style}}" if name in least else "" for name, (_, style) in columns.items()]
        rows.append(["least difference", *cells[1:]])
    return rows


def refitted_table(saes: list[dict[str, Any]]) -> list[list[str]]:
    """Of dictionaries that were refitted, headings and rows: their figures so, and the change from those of `table`."""
    rows = [["Refitted", "L0", *(cell for name in REFITTED for cell in (COLUMNS[name][0], "change"))]]
    for sae in saes:
        cells = []
        for name in REFITTED:
            figure, (change, half) = sae["refitted"][name], sae["refitted"]["change"][name]
            within = "" if half is None else f" ±{half:.4f}"
            cells += ["—", "—"] if figure is None or change is None else [f"{figure:.4f}", f"{change:+.4f}{within}"]
        rows.append([sae["name"], f"{sae['refitted']['l0']:.1f}", *cells])
    return rows


def _beyond(sae: dict[str, Any]) -> float | None:
    """How much lower the FVU is than that of the best baseline."""
    known = [value for value in sae["baselines"].values() if value is not None]
    return min(known) - sae["fvu"] if known and sae["fvu"] is not None else None


def _spliced(sae: dict[str, Any]) -> dict[str, float]:
    """ΔCE of the baselines that were spliced in, and how much lower the dictionary's is than the best of them."""
    found = {name: figures["delta_ce"] for name, figures in sae.get("spliced_baselines", {}).items()}
    beyond = {"beyond_delta_ce": min(found.values()) - sae["delta_ce"]} if found and sae["delta_ce"] is not None else {}
    return {f"{name}_delta_ce": value for name, value in found.items()} | beyond


def set_table(sets: list[dict[str, Any]]) -> list[list[str]]:
    """The same of sets."""
    return _formatted(SET_COLUMNS, [{**entry, "members": len(entry["members"])} for entry in sets])


def _formatted(columns: dict[str, tuple[str, str]], rows: list[dict[str, Any]]) -> list[list[str]]:
    # An evaluation of an earlier version lacks what came later.
    cells = [
        ["—" if values.get(name) is None else format(values[name], style) for name, (_, style) in columns.items()]
        for values in rows
    ]
    return [[heading for heading, _ in columns.values()], *cells]


def massive_note(saes: list[dict[str, Any]]) -> str:
    """What was left out of the figures as massive, in a sentence a hook; empty where nothing was."""
    shares = {sae["hook"]: sae for sae in saes if sae.get("massive_rows")}
    return " ".join(
        f"Left out at {hook}: {sae['massive_rows']:,} massive rows, longer than {MASSIVE:g} times the median norm, which hold "
        f"{sae['massive_share']:.1%} of the variance; FVU with them is under 'all rows'."
        for hook, sae in shares.items()
    )


def equal_l0_tables(comparisons: list[dict[str, Any]], figures: Collection[str] = AT_EQUAL_L0) -> list[list[list[str]]]:
    """For each group and figure headings and rows, a line a row; the headings say of which group they are, where there are several."""
    several = {name for name in ("hook", "d_sae", "store") if len({each.get(name) for each in comparisons}) > 1}
    return [
        _equal_l0_table(comparison, figure, several) for comparison in comparisons for figure in figures if figure in comparison["figures"]
    ]  # fmt: skip


def _equal_l0_table(comparison: dict[str, Any], figure: str, several: Collection[str]) -> list[list[str]]:
    lines = comparison["figures"][figure]
    said = {"hook": comparison["hook"], "d_sae": f"{comparison['d_sae']:,} latents", "store": comparison.get("store")}
    heading = [
        ", ".join([f"{FIGURES[figure]} at equal L0", *(f"{said[name]}" for name in said if name in several)]),
        *(f"L0 {l0:.1f}" for l0 in comparison["l0s"]),
        "mean",
        "behind the best",
    ]
    beyond = any("excess" in entry for entry in lines.values())
    rows = [heading + ["beyond baselines"] * beyond]
    for name, entry in lines.items():
        cells = [
            f"{value:.4f}" + ("" if half is None else f" ±{half:.4f}")
            for value, half in zip(entry["values"], entry["halves"], strict=True)
        ]
        rows.append(
            [name, *cells, f"{entry['mean']:.4f}", _behind(entry)]
            + [f"{entry['excess']:.4f}" if "excess" in entry else "—"] * beyond
        )
    return rows


def _behind(entry: dict[str, Any]) -> str:
    if "behind" not in entry:
        return "—"
    if entry["behind"] == 0:
        return "best"
    half = entry["behind_half"]
    unclear = "≈ " if half is not None and entry["behind"] <= half else ""
    return f"{unclear}{entry['behind']:.4f}" + ("" if half is None else f" ±{half:.4f}")


def seed_table(entries: list[dict[str, Any]]) -> list[list[str]]:
    """Of the entries of `over_seeds` headings and rows."""
    rows = [["mean ± deviation over seeds", "seeds", "L0", *FIGURES.values()]]
    for entry in entries:
        cells = [_spread(entry[figure], 1 if figure == "l0" else 4) for figure in ("l0", *FIGURES)]
        rows.append([entry["name"], str(entry["seeds"]), *cells])
    return rows


def _spread(figure: list[float | None], digits: int) -> str:
    mean, spread = figure
    return "—" if mean is None or spread is None else f"{mean:.{digits}f} ± {spread:.{digits}f}"
