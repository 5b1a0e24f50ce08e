"""What an activation store holds, as HTML."""

import html

from saebench.store.norms import NormReport
from saebench.store.schema import MASSIVE
from saebench.view import grid, svg
from saebench.view.tokens import alone, number

CARRIERS = 8  # tokens shown


def norms_html(hook: str, report: NormReport) -> str:
    """Norms at a hook: figures, the histogram, and the tokens of the longest rows."""
    median = report.quantiles[0.5]
    figures = {
        "median norm": number(median),
        "99.9% are under": f"{number(report.quantiles[0.999])} ({report.quantiles[0.999] / median:.1f} ×)",
        f"massive (over {MASSIVE:g} × the median, left out)": f"{report.massive:,} of {report.rows:,} rows",
        "variance in massive rows": f"{report.massive_share:.1%}",
        "of the rest's, in the farthest 0.1%": f"{report.top_share:.1%}",
    }
    if report.left_out_norm is not None:
        figures["special tokens (not trained on)"] = f"{report.left_out_norm / median:.1f} ×"
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    edges = report.edges.tolist()
    labels = [
        f"{number(low)} to {number(high)}: {count:,} rows"
        for low, high, count in zip(edges, edges[1:], report.counts.tolist(), strict=False)
    ]
    bars = svg.bars([float(count) ** 0.5 for count in report.counts], labels, "rows by norm, square root of the counts")
    columns = [
        grid.Column("", "token", text=True), grid.Column("", "rows", f"of the {report.longest:,} longest of {report.sampled:,} sampled"),
        grid.Column("", "× median", "the longest of them"), grid.Column("", "positions", "in the context"),
    ]  # fmt: skip
    rows = [
        grid.Row([
            f"<code>{html.escape(alone(carrier.text))}</code>", f"{carrier.rows:,}",
            f"{carrier.norm / median:.1f}", "–".join(map(str, dict.fromkeys(carrier.positions))),
        ])
        for carrier in report.carriers[:CARRIERS]
    ]  # fmt: skip
    warning = (
        f"<p><b>A few more rows dominate the variance</b> and would dominate the loss: <code>saebench train --exclude-outliers {MASSIVE / 2:g}</code> leaves them out.</p>"
        if report.dominated
        else ""
    )
    return f"""<h3>{html.escape(hook)}</h3><dl class="figures">{cells}</dl>{warning}
<div class="columns halves"><div><h3>Rows by norm, {number(edges[0])} to {number(edges[-1])}</h3>{bars}</div>
<div><h3>Tokens of the longest rows</h3>{grid.grid_html(columns, rows, "tokens of the longest rows")}</div></div>"""
