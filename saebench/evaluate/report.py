"""`summary.json` and `report.html` of a run, from what training and evaluation left on disk."""

import html
import math
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io
from plotly.graph_objects import Figure

from saebench.evaluate.evaluate import EVALUATION
from saebench.evaluate.sets import SETS, set_of
from saebench.files import read_json, write_json, write_text
from saebench.models import model_path
from saebench.runlog import read_metrics
from saebench.sae import Ends, ends_of, read_config
from saebench.store import open_store
from saebench.store.schema import MASSIVE
from saebench.store.source import model_name, recorded_store
from saebench.view import charts

SUMMARY = "summary.json"
REPORT = "report.html"

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

_ONLY_WHERE = {
    "fvu_all": "massive_rows", "duplicate_fraction": "duplicate_fraction", "pca_fvu": "pca_fvu", "linear_fvu": "linear_fvu",
}  # fmt: skip
"""columns that are worth their room only where an SAE has another figure above 0"""

# name in an SAE's `baselines` -> label
BASELINES = {"pca_fvu": "PCA of rank L0", "linear_fvu": "best linear map", "untrained_fvu": "untrained SAE"}


def summarise(folders: list[Path]) -> list[dict[str, Any]]:
    """The entry in `summary.json` of each dictionary that has figures of its own. Paths are relative to the working directory where they can be."""
    entries = []
    for folder in folders:
        config = read_config(folder)
        if set_of(folder, config)[1]:  # a part of a sum
            continue
        evaluation, ends = read_json(folder / EVALUATION), ends_of(folder, config)
        own = config["metadata"].get("saebench", {})
        training = {
            "tokens_trained": own.get("tokens_trained"),
            "seconds": own.get("seconds"),
            "lambda": own.get("lambda"),
        }
        architecture, kind = architecture_of(config)
        entries.append({
            "name": folder.name, "path": relative(folder), "architecture": architecture, "kind": kind,
            "hook": _shown(ends), "reads": list(ends.reads), "writes": list(ends.writes), "d_in": config["d_in"], "d_sae": config["d_sae"],
            **evaluation["metrics"], **training, "baselines": evaluation["baselines"],
            "intervals": evaluation["intervals"], "small_denominators": evaluation["small_denominators"],
            "store": None if (store := recorded_store(folder)) is None else str(store),
        })  # fmt: skip
    return entries


def summarise_sets(run: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """The entry in `summary.json` of each set that dictionaries belong to."""
    entries = []
    for name in sorted({set_of(folder, read_config(folder))[0] for folder in folders} - {""}):
        evaluation = read_json(run / SETS / name / EVALUATION)
        members = [folder for folder in folders if set_of(folder, read_config(folder))[0] == name]
        entries.append({
            "name": name, "members": [folder.name for folder in members], "joint": set_of(members[0], read_config(members[0]))[1],
            "writes": list(evaluation["hooks"]), **evaluation["metrics"], "hooks": evaluation["hooks"],
            "intervals": evaluation["intervals"], "small_denominators": evaluation["small_denominators"],
        })  # fmt: skip
    return entries


def architecture_of(config: dict[str, Any]) -> tuple[str, str]:
    """(architecture, kind) of a `cfg.json`, whose transcoders are ReLU ones unless they say otherwise."""
    name, kind = config["architecture"], "SAE"
    for suffix in ("skip_transcoder", "transcoder", "crosscoder"):
        if name.endswith(suffix):
            name, kind = name.removesuffix(suffix).rstrip("_") or "relu", suffix.replace("_", " ")
            break
    trained_as = config["metadata"].get("training_architecture") or name  # BatchTopK is saved as JumpReLU
    return {"standard": "relu", "matryoshka_batchtopk": "matryoshka"}.get(trained_as, trained_as), kind


def _shown(ends: Ends) -> str:
    """The hooks, in words."""
    return " → ".join("+".join(hooks) for hooks in dict.fromkeys(ends))


def relative(path: Path | str) -> str:
    """A path from the working directory, or as it is when it lies elsewhere."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def write_report(
    run: Path, folders: list[Path], store: Path | None = None, seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """Write the run's summary and report; returns the summary."""
    saes, sets = summarise(folders), summarise_sets(run, folders)
    used = sorted({str(store or recorded_store(folder)) for folder in folders})
    opened = open_store(used[0])
    model = model_name(opened.folder, opened.manifest["identity"]["model"]["id"])
    earlier = read_json(run / SUMMARY).get("seconds", {}) if (run / SUMMARY).exists() else {}
    summary = {
        "model": relative(model_path(model)) if Path(model_path(model)).exists() else model,
        "store": relative(used[0]),
        "seconds": seconds if seconds is not None else earlier,
        "saes": saes,
        "equal_l0": compare_at_equal_l0(saes),
        **({"sets": sets} if sets else {}),
    }
    write_json(run / SUMMARY, summary)
    write_text(run / REPORT, _page(summary, folders))
    return summary


def compare_at_equal_l0(saes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FVU of each architecture, kind and baseline at L0s that all of them reach, `{"hook", "d_sae", "l0", "fvu": {name: …}}` each.

    Only what writes the same hooks, and has the same width, is compared. Linear in log L0 between the SAEs of an architecture; nothing is
    extrapolated, so an architecture with one SAE is left out. Empty where fewer than two architectures overlap.
    """
    comparisons = []
    for hook, d_sae in dict.fromkeys(("+".join(sae["writes"]), sae["d_sae"]) for sae in saes):
        here = sorted(
            (s for s in saes if ("+".join(s["writes"]), s["d_sae"]) == (hook, d_sae)), key=lambda sae: sae["l0"]
        )
        curves = {
            name: [sae for sae in here if _line(sae) == name] for name in dict.fromkeys(_line(sae) for sae in here)
        }
        curves = {name: points for name, points in curves.items() if len({p["l0"] for p in points}) > 1}
        low = max((points[0]["l0"] for points in curves.values()), default=math.inf)
        high = min((points[-1]["l0"] for points in curves.values()), default=0.0)
        if len(curves) < 2 or low >= high:
            continue
        lines = {name: ([p["l0"] for p in points], [p["fvu"] for p in points]) for name, points in curves.items()}
        for name, label in BASELINES.items():
            for kind in dict.fromkeys(sae["kind"] for sae in here if name in sae["baselines"]):
                points = [p for p in here if p["kind"] == kind and name in p["baselines"]]
                fvus = [p["baselines"][name] for p in points]
                lines[label.replace("SAE", kind)] = ([p["l0"] for p in points], fvus)
        for l0 in (low, math.sqrt(low * high), high):
            fvu = {name: float(np.interp(math.log(l0), np.log(xs), ys)) for name, (xs, ys) in lines.items()}
            comparisons.append({"hook": hook, "d_sae": d_sae, "l0": l0, "fvu": fvu})
    return comparisons


def _line(sae: dict[str, Any]) -> str:
    """What a line of a comparison is of."""
    return sae["architecture"] if sae["kind"] == "SAE" else f"{sae['architecture']} {sae['kind']}"


def equal_l0_table(comparisons: list[dict[str, Any]]) -> list[list[str]]:
    """Headings and formatted rows, an architecture or baseline a row."""
    names = list(dict.fromkeys(name for comparison in comparisons for name in comparison["fvu"]))
    headings = ["FVU at equal L0", *(f"L0 {comparison['l0']:.1f}" for comparison in comparisons)]
    cells = [[f"{c['fvu'][name]:.4f}" if name in c["fvu"] else "—" for c in comparisons] for name in names]
    return [headings, *([name, *row] for name, row in zip(names, cells, strict=True))]


def table(saes: list[dict[str, Any]]) -> list[list[str]]:
    """Headings and formatted rows, a list of strings each."""
    every = [{**sae, **sae["baselines"]} for sae in saes]
    columns = {
        name: shown
        for name, shown in COLUMNS.items()
        if name not in _ONLY_WHERE or any(values.get(_ONLY_WHERE[name]) for values in every)
    }
    return _formatted(columns, every)


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


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } p.note { color: #555; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem; margin: 1rem 0; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(520px, 100%), 1fr)); gap: 1rem; }
.charts > div { min-width: 0; }
"""


_SETS_NOTE = """ In a set all of its layers' MLPs are replaced at once, each by what reads the stream that the others have changed; ablations are of
the same MLPs. Share of error: Σ‖y − ŷ‖² ÷ Σ‖y‖² of what is written, on vectors of the model as it is."""


def _page(summary: dict[str, Any], folders: list[Path]) -> str:
    saes, sets = summary["saes"], summary.get("sets", [])
    architectures = {folder.name: architecture_of(read_config(folder))[0] for folder in folders}
    logs = {
        folder.name: read_metrics(folder / "metrics.jsonl") for folder in folders if (folder / "metrics.jsonl").exists()
    }
    measured = [
        charts.pareto(saes, "loss_recovered_zero", "Loss recovered (zero ablation)"),
        charts.pareto(saes, "loss_recovered_mean", "Loss recovered (mean ablation)"),
        charts.pareto(saes, "fvu", "FVU", baselines=BASELINES),
        charts.pareto(saes, "delta_ce", "ΔCE in nats"),
    ]
    trained = [
        charts.training_curves(logs, "fvu", "FVU", architectures),
        charts.training_curves(logs, "l0", "L0", architectures),
        charts.training_curves(logs, "lambda", "λ", architectures),
        charts.training_curves(logs, "alive", "Living latents", architectures, log_scale=False),
    ]
    equal = _html_table(equal_l0_table(summary["equal_l0"])) if summary["equal_l0"] else ""
    first = (saes or sets)[0]
    losses = (
        f"Cross-entropy of the model on these tokens: clean {first['ce_clean']:.4f}, zero-ablated {first['ce_zero']:.4f}, "
        f"mean-ablated {first['ce_mean']:.4f} nats ({html.escape(first.get('hook', first['name']))})."
    )
    flagged = [html.escape(sae["name"]) for sae in (*saes, *sets) if sae["small_denominators"]]
    warning = (
        f"<p><b>Loss recovered is over a denominator under 0.05 nats for {', '.join(flagged)}: read ΔCE instead.</b></p>"
        if flagged
        else ""
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>saebench report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>Sparse autoencoders of {html.escape(summary["model"])}</h1>
<p>{len(folders)} SAEs on {html.escape(summary["store"])}, measured on {first["n_tokens_eval"]:,} held-out tokens. {losses} {html.escape(massive_note(saes))}</p>{warning}
{_html_table(table(saes)) if saes else ""}{_html_table(set_table(sets)) if sets else ""}
<p class="note">FVU: share of variance not explained. ΔCE: what splicing the SAE in costs the model. Rec.: share of an ablation's cost
(zero or mean) that the SAE recovers. γ under 1 means shrinkage. Dead: no firing in {first["dead_window"]:,} rows; dense: fires on over 1% of tokens. Twins, where there are any: decoder rows with a cosine above 0.99 with another's.
Bars: 95%, bootstrap over documents. An untrained SAE has random tied weights, the best single scale, and the same L0.{_SETS_NOTE if sets else ""}</p>
{equal}
<div class="charts">{"".join(_figure(figure, number == 0) for number, figure in enumerate(measured))}</div>
<h2>Training</h2>
<div class="charts">{"".join(_figure(figure, False) for figure in trained)}</div>
</body></html>
"""


def _html_table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table>{line(rows[0], "th")}{body}</table></div>'


def _figure(figure: Figure, with_plotly: bool) -> str:
    page = plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=with_plotly, config={"displaylogo": False, "responsive": True}
    )
    return f"<div>{page}</div>"
