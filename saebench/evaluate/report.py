"""`summary.json` and `report.html` of a run, from what training and evaluation left on disk."""

import html
from pathlib import Path
from typing import Any

import plotly.io
from plotly.graph_objects import Figure

from saebench.evaluate.evaluate import EVALUATION
from saebench.files import read_json, write_json, write_text
from saebench.models import model_path
from saebench.runlog import read_metrics
from saebench.sae import read_config
from saebench.store import open_store
from saebench.view import charts

SUMMARY = "summary.json"
REPORT = "report.html"

# name in summary.json -> (heading, format)
COLUMNS = {
    "name": ("SAE", ""),
    "l0": ("L0", ".1f"),
    "fvu": ("FVU", ".4f"),
    "delta_ce": ("ΔCE (nats)", ".4f"),
    "loss_recovered_zero": ("recovered (zero)", ".4f"),
    "loss_recovered_mean": ("recovered (mean)", ".4f"),
    "kl": ("KL (nats)", ".4f"),
    "gamma": ("γ", ".3f"),
    "dead_fraction": ("dead", ".1%"),
    "dense_fraction": ("dense >1%", ".1%"),
    "pca_fvu": ("FVU of PCA", ".4f"),
    "untrained_fvu": ("FVU untrained", ".4f"),
}


def summarise(folders: list[Path]) -> list[dict[str, Any]]:
    """The entry of each SAE in `summary.json`. Paths are relative to the working directory where they can be."""
    entries = []
    for folder in folders:
        config, evaluation = read_config(folder), read_json(folder / EVALUATION)
        own = config["metadata"].get("saebench", {})
        training = {
            "tokens_trained": own.get("tokens_trained"),
            "seconds": own.get("seconds"),
            "lambda": own.get("lambda"),
        }
        architecture = {"standard": "relu"}.get(config["architecture"], config["architecture"])
        entries.append({
            "name": folder.name, "path": relative(folder), "architecture": architecture,
            "hook": config["metadata"]["hook_name"], "d_in": config["d_in"], "d_sae": config["d_sae"],
            **evaluation["metrics"], **training, "baselines": evaluation["baselines"],
            "intervals": evaluation["intervals"], "small_denominators": evaluation["small_denominators"],
            "store": own.get("store"),
        })  # fmt: skip
    return entries


def relative(path: Path | str) -> str:
    """A path from the working directory, or as it is when it lies elsewhere."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def write_report(
    run: Path, folders: list[Path], store: Path | None = None, seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """Write the run's summary and report; returns the summary."""
    saes = summarise(folders)
    used = sorted({str(store or sae["store"]) for sae in saes})
    model = open_store(used[0]).manifest["identity"]["model"]["id"]
    earlier = read_json(run / SUMMARY).get("seconds", {}) if (run / SUMMARY).exists() else {}
    summary = {
        "model": relative(model_path(model)) if Path(model_path(model)).exists() else model,
        "store": relative(used[0]),
        "seconds": seconds if seconds is not None else earlier,
        "saes": saes,
    }
    write_json(run / SUMMARY, summary)
    write_text(run / REPORT, _page(summary, folders))
    return summary


def table(saes: list[dict[str, Any]]) -> list[list[str]]:
    """Headings and formatted rows, a list of strings each."""
    rows = [[heading for heading, _ in COLUMNS.values()]]
    for sae in saes:
        values = {**sae, **sae["baselines"]}
        rows.append(
            ["—" if values[name] is None else format(values[name], style) for name, (_, style) in COLUMNS.items()]
        )
    return rows


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } p.note { color: #555; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .92rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


def _page(summary: dict[str, Any], folders: list[Path]) -> str:
    saes = summary["saes"]
    architectures = {sae["name"]: sae["architecture"] for sae in saes}
    logs = {
        folder.name: read_metrics(folder / "metrics.jsonl") for folder in folders if (folder / "metrics.jsonl").exists()
    }
    references = {"pca_fvu": "PCA of rank L0", "untrained_fvu": "untrained SAE"}
    parts = [
        charts.pareto(saes, "fvu", "FVU", baselines=references),
        charts.pareto(saes, "loss_recovered_zero", "Loss recovered (zero ablation)"),
        charts.pareto(saes, "loss_recovered_mean", "Loss recovered (mean ablation)"),
        charts.pareto(saes, "delta_ce", "ΔCE in nats"),
        charts.training_curves(logs, "fvu", "FVU", architectures),
        charts.training_curves(logs, "l0", "L0", architectures),
        charts.training_curves(logs, "alive", "Living latents", architectures),
    ]
    headings, *rows = table(saes)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    first = saes[0]
    losses = (
        f"Cross-entropy of the model on these tokens: clean {first['ce_clean']:.4f}, zero-ablated {first['ce_zero']:.4f}, "
        f"mean-ablated {first['ce_mean']:.4f} nats ({html.escape(first['hook'])})."
    )
    flagged = [sae["name"] for sae in saes if sae["small_denominators"]]
    warning = (
        f"<p><b>Loss recovered is over a denominator under 0.05 nats for {', '.join(flagged)}: read ΔCE instead.</b></p>"
        if flagged
        else ""
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>saebench report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>Sparse autoencoders of {html.escape(summary["model"])}</h1>
<p>{len(saes)} SAEs on {html.escape(summary["store"])}, measured on {first["n_tokens_eval"]:,} held-out tokens. {losses}</p>{warning}
<div class="scroll"><table><tr>{head}</tr>{cells}</table></div>
<p class="note">FVU: share of variance not explained. ΔCE: what splicing the SAE in costs the model. Recovered: ΔCE as a share of what ablation costs.
γ under 1 means shrinkage. Dead: no firing in {first["dead_window"]:,} rows. Bars and intervals: 95%, bootstrap over documents.
An untrained SAE has random tied weights and the same L0.</p>
{"".join(_figure(figure, number == 0) for number, figure in enumerate(parts))}
</body></html>
"""


def _figure(figure: Figure, first: bool) -> str:
    return plotly.io.to_html(figure, full_html=False, include_plotlyjs=first, config={"displaylogo": False})
