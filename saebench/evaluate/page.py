"""`report.html`: a summary as one page that opens without a network."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.io
from plotly.graph_objects import Figure

from saebench.evaluate.compare import BASELINES, FIGURES, LEAST_DOCUMENTS
from saebench.evaluate.tables import massive_note, tables
from saebench.view import charts

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


_COMPARED = """≈: cannot be told from the next better one that writes the same hooks of the same store (of lines: from the best). Differences are paired: of two figures on
the same bootstrap samples of the same documents, with the spread of reseeding added where several seeds were trained. Least difference: what can be told from none at 95% (median over pairs; of dead, dense and twins by seeds alone).
At equal L0: monotone interpolation on log L0 where all lines reach, nothing extrapolated; mean: over that range of log L0, the area under a line by its length.
Beyond baselines: of FVU always, of the others where baselines were spliced in (<code>saebench eval --splice-baselines</code>)."""


_SETS_NOTE = """ In a set all of its layers' MLPs are replaced at once, each by what reads the stream that the others have changed; ablations are of
the same MLPs. Share of error: Σ‖y − ŷ‖² ÷ Σ‖y‖² of what is written, on vectors of the model as it is."""


_REFITTED_NOTE = """ Refitted: the same latents fire, with the coefficients (at least 0) that reconstruct each row best, in place of the encoder's; what
reads or steers by activations has the encoder's. Change: from the figures of the first table, paired over documents, ± half of the 95% interval."""


def page(
    summary: dict[str, Any], logs: Mapping[str, Sequence[Mapping[str, Any]]], architectures: Mapping[str, str]
) -> str:
    """The report of a summary; `logs` are the training logs of its dictionaries, by name."""
    saes, sets = summary["saes"], summary.get("sets", [])
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
    main, *others = map(_html_table, tables(summary, FIGURES))
    first = (saes or sets)[0]
    losses = (
        f"Cross-entropy of the model on these tokens: clean {first['ce_clean']:.4f}, zero-ablated {first['ce_zero']:.4f}, "
        f"mean-ablated {first['ce_mean']:.4f} nats ({html.escape(first.get('hook', first['name']))})."
    )
    evaluated_on = sorted({entry["store"] for entry in saes if entry.get("store")})
    stores = ", ".join(evaluated_on) if len(evaluated_on) > 1 else summary["store"]
    flagged = [html.escape(sae["name"]) for sae in (*saes, *sets) if sae["small_denominators"]]
    warning = (
        f"<p><b>Loss recovered is over a denominator under 0.05 nats for {', '.join(flagged)}: read ΔCE instead.</b></p>"
        if flagged
        else ""
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>saebench report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>Sparse autoencoders of {html.escape(summary["model"])}</h1>
<p>{len(saes) + sum(len(entry["members"]) for entry in sets if entry["joint"])} SAEs on {html.escape(stores)}, measured on {_span(saes or sets, "n_tokens_eval")} held-out tokens. {losses} {html.escape(massive_note(saes))}</p>{warning}
{main}
<p class="note">FVU: share of variance not explained. ΔCE: what splicing the SAE in costs the model. Rec.: share of an ablation's cost
(zero or mean) that the SAE recovers. γ under 1 means shrinkage. Dead: no firing in {_span(saes or sets, "dead_window")} rows; dense: fires on over 1% of tokens. Twins, where there are any: decoder rows with a cosine above 0.99 with another's.
Bars: 95%, bootstrap over {_span(saes or sets, "n_documents_eval")} documents; none of fewer than {LEAST_DOCUMENTS}. An untrained SAE has random tied weights, the best single scale, and the same L0; beyond these: how much lower the FVU is than the best of the baselines'.{_REFITTED_NOTE if any("refitted" in sae for sae in saes) else ""}{_SETS_NOTE if sets else ""}</p>
{"".join(others)}<p class="note">{_COMPARED}</p>
<div class="charts">{"".join(_figure(figure, number == 0) for number, figure in enumerate(measured))}</div>
<h2>Training</h2>
<div class="charts">{"".join(_figure(figure, False) for figure in trained)}</div>
</body></html>
"""


def _span(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """A count that entries have, or the least and the most of it."""
    known = [
        entry[name] for entry in entries if name in entry
    ]  # an evaluation of an earlier version lacks what came later
    return " to ".join(f"{n:,}" for n in sorted({pick(known) for pick in (min, max)})) if known else "the"


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
