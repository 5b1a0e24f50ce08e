"""Plotly figures of SAEs: one colour and marker per architecture, the same on every page."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Colour-blind safe (Okabe and Ito 2008); the marker says the same without colour.
STYLE = {
    "relu": ("#0072B2", "circle"),
    "topk": ("#D55E00", "diamond"),
    "gated": ("#009E73", "square"),
    "jumprelu": ("#CC79A7", "cross"),
    "batchtopk": ("#E69F00", "triangle-up"),
    "matryoshka": ("#56B4E9", "star"),
}
CONTROL = "#8a8a8a"
_FALLBACK = ("#444444", "x")
_TICKS = [mantissa * 10.0**exponent for exponent in range(-6, 7) for mantissa in (1, 2, 5)]


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A log axis with ticks at 1, 2 and 5; with plotly's own where values lie so near that none of these may be among them."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) < 5 * min(positive):
        return {"type": "log"}
    return {"type": "log", "tickvals": _TICKS, "ticktext": [f"{tick:,g}" for tick in _TICKS]}


def _layout(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(
        title=title, template="plotly_white", height=440, margin={"l": 70, "r": 20, "t": 60, "b": 55},
        legend={"orientation": "h", "y": -0.2}, hoverlabel={"align": "left"},
    )  # fmt: skip
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return figure


def pareto(
    saes: Sequence[Mapping[str, Any]], metric: str, label: str, *, baselines: Mapping[str, str] | None = None
) -> go.Figure:
    """L0 (log scale) against a metric, a line per architecture, 95% intervals as bars.

    `saes` are entries of `summary.json`; `baselines` maps names in their `baselines` to labels.
    """
    figure = go.Figure()
    several = len({_kind(sae)[1:] for sae in saes}) > 1
    for kind in dict.fromkeys(map(_kind, saes)):
        points = sorted((s for s in saes if _kind(s) == kind and s[metric] is not None), key=lambda s: s["l0"])
        architecture = kind[0]
        colour, symbol = STYLE.get(architecture, _FALLBACK)
        values = [s[metric] for s in points]
        ends = [
            [v if end is None else end for end in s["intervals"][metric]] for s, v in zip(points, values, strict=True)
        ]
        low, high = zip(*ends, strict=True) if ends else ((), ())
        figure.add_scatter(
            x=[s["l0"] for s in points], y=values, mode="lines+markers",
            name=f"{architecture}, {kind[1]}, {kind[2]:,}" if several else architecture,
            marker={"color": colour, "symbol": symbol, "size": 11}, line={"color": colour},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.5,
                "array": [h - v for h, v in zip(high, values, strict=True)],
                "arrayminus": [v - lo for lo, v in zip(low, values, strict=True)],
            },
            text=[_hover(s) for s in points], customdata=[s["name"] for s in points], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    for (name, description), dash in zip((baselines or {}).items(), ("dot", "dash", "dashdot"), strict=False):
        points = sorted((s for s in saes if s["baselines"].get(name) is not None), key=lambda s: s["l0"])
        if not points:
            continue
        figure.add_scatter(
            x=[s["l0"] for s in points], y=[s["baselines"][name] for s in points], mode="lines+markers", name=description,
            line={"color": CONTROL, "dash": dash}, marker={"color": CONTROL, "symbol": "line-ew-open"},
        )  # fmt: skip
    figure.update_xaxes(_log_axis([s["l0"] for s in saes]))
    return _layout(figure, f"{label} against L0", "L0: mean active latents per token", label)


def _kind(sae: Mapping[str, Any]) -> tuple[str, str, int]:
    skip = ", skip" if sae.get("kind") == "skip transcoder" else ""
    return sae["architecture"], sae["hook"] + skip, sae["d_sae"]


def _hover(sae: Mapping[str, Any]) -> str:
    rows = {
        "L0": sae["l0"], "FVU": sae["fvu"], "ΔCE": sae["delta_ce"], "loss recovered (zero)": sae["loss_recovered_zero"],
        "loss recovered (mean)": sae["loss_recovered_mean"], "dead": sae["dead_fraction"],
        "λ": sae["lambda"], "rows trained on": sae["tokens_trained"],
    }  # fmt: skip
    figures = "<br>".join(
        f"{name} {'—' if value is None else format(value, ',.4g' if value < 1e4 else ',.0f')}"
        for name, value in rows.items()
    )
    return f"<b>{sae['name']}</b><br>{sae['hook']}, {sae['d_sae']:,} latents<br>{figures}"


def training_curves(
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    label: str,
    architectures: Mapping[str, str],
    *,
    log_scale: bool = True,
) -> go.Figure:
    """A logged quantity over the rows trained on, a line per SAE."""
    figure = go.Figure()
    dashes: dict[str, int] = {}
    for name, lines in logs.items():
        points = [line for line in lines if line.get(metric) is not None]
        if not points:
            continue  # TopK has no λ
        colour, _ = STYLE.get(architectures[name], _FALLBACK)
        nth = dashes[colour] = dashes.get(colour, -1) + 1
        figure.add_scatter(
            x=[line["tokens"] for line in points], y=[line[metric] for line in points], name=name, mode="lines",
            line={"color": colour, "dash": ("solid", "dash", "dot", "dashdot")[nth % 4]},
        )  # fmt: skip
    values = [line[metric] for lines in logs.values() for line in lines if line.get(metric) is not None]
    figure.update_yaxes(_log_axis(values) if log_scale else {"rangemode": "tozero"})
    return _layout(figure, f"{label} during training", "rows trained on", label)


def dose_response(response: Mapping[str, Any], *, now: float | None = None) -> go.Figure:
    """What a latent's direction does at each strength, beside both controls, 95% intervals as bars: `DoseResponse.to_json`.

    `now` is a strength to mark, in the unit of the axis.
    """
    panels = {"concept": "concept", "fluency": "fluency", "score": "harmonic mean", "kl": "KL, nats per token"}
    arms = {
        "steered": (f"latent {response['latent']}", STYLE["topk"], "solid"),
        "random": ("a random direction", (CONTROL, "square"), "dot"),
        "other": (f"latent {response['other']}, of the same density", STYLE["relu"], "dash"),
    }
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    known = all(dose["norm"] is not None for dose in response["doses"])
    for arm, (label, (colour, symbol), dash) in arms.items():
        doses = [dose for dose in response["doses"] if dose["arm"] in ("unsteered", arm)]
        if arm not in {dose["arm"] for dose in doses}:
            continue  # no latent was far enough from this one
        x = [dose["norm"] if known else dose["strength"] for dose in doses]
        for row, name in enumerate(panels, 1):
            values = [dose[name] for dose in doses]
            ends = [dose["intervals"][name] for dose in doses]
            figure.add_scatter(
                x=x, y=values, name=label, legendgroup=arm, showlegend=row == 1, mode="lines+markers",
                line={"color": colour, "dash": dash}, marker={"color": colour, "symbol": symbol},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1, "width": 3,
                    "array": [high - value for (_, high), value in zip(ends, values, strict=True)],
                    "arrayminus": [value - low for (low, _), value in zip(ends, values, strict=True)],
                },
                row=row, col=1,
            )  # fmt: skip
    best = response["tested"][0]
    figure.add_vline(
        x=best["norm"] if known else best["strength"], line={"color": CONTROL, "dash": "dash"}, annotation_text="best"
    )
    if now is not None:
        figure.add_vline(
            x=now, line={"color": STYLE["relu"][0], "dash": "dot"}, annotation_text="now", annotation_position="bottom right"
        )  # fmt: skip
    figure = _layout(figure, f"Latent {response['latent']}, {response['mode']}", "", "")
    for row, label in enumerate(panels.values(), 1):
        figure.update_yaxes(title=label, rangemode="tozero", row=row, col=1)
    unit = "strength, of the median norm" if known else "strength, raw"
    figure.update_xaxes(title=unit, row=len(panels), col=1)
    return figure.update_layout(height=820, legend={"orientation": "h", "y": -0.09})


def densities(left: np.ndarray, right: np.ndarray, cosines: np.ndarray, names: tuple[str, str]) -> go.Figure:
    """Density of latents of one SAE against that of their nearest in another, by cosine of the decoder rows."""
    order = np.argsort(cosines)
    figure = go.Figure(
        go.Scattergl(
            x=left[order], y=right[order], mode="markers", customdata=order,
            marker={"color": cosines[order], "colorscale": "Oranges", "cmin": 0, "cmax": 1, "size": 6,
                    "line": {"width": 0.5, "color": CONTROL}, "colorbar": {"title": "cosine"}},
            hovertemplate="latent %{customdata}<br>density %{x:.3%} and %{y:.3%}<br>cosine %{marker.color:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure = _layout(
        figure, "Latents and their nearest", f"density in {names[0]}", f"density of the nearest in {names[1]}"
    )
    axis = {"type": "log", "tickformat": ".0e", "dtick": 1}
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    return figure


BIN = 0.1
"""width of a bar of `density_histogram`, in powers of ten"""


def latent_map(
    places: np.ndarray, values: np.ndarray, shown: np.ndarray, names: Sequence[str], label: str, *, log: bool = False
) -> go.Figure:
    """Latents at their `[F, 2]` places, those that are `shown [F]`, coloured by `values [F]`, unknown ones grey; `customdata` is the latent."""
    with np.errstate(divide="ignore"):
        values = np.log10(values) if log else values
    figure = go.Figure()
    for known in (False, True):
        latents = np.flatnonzero(shown & (np.isfinite(values) == known))
        bar = {
            "color": values[latents],
            "colorscale": "Viridis",
            "colorbar": {"title": f"log10 {label}" if log else label},
        }
        figure.add_scattergl(
            x=places[latents, 0], y=places[latents, 1], mode="markers", customdata=latents.tolist(), showlegend=False,
            marker={"size": 5, **(bar if known else {"color": CONTROL})},
            text=[f"latent {latent}<br>{html.escape(names[latent][:80])}" for latent in latents.tolist()], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(scaleanchor="x")
    return (
        _layout(figure, "", "", "")
        .update_layout(height=680, dragmode="pan")
        .update_xaxes(visible=False)
        .update_yaxes(visible=False)
    )


def density_histogram(density: np.ndarray, name: str) -> go.Figure:
    """How many of `[F]` latents fire on which share of the tokens, in bars of `BIN` powers of ten; those that never fire stand in the title.

    A bar's `customdata` is the powers of ten it goes from and to, as `-3.1_-3`.
    """
    living = density[density > 0].astype(np.float64)
    low = math.floor(np.log10(living.min()) / BIN) if len(living) else -1
    high = math.floor(np.log10(living.max()) / BIN) if len(living) else -1
    powers = np.round(
        np.arange(low - 1, high + 2) * BIN, 1
    )  # a bar more on either side, whatever rounding does to a logarithm
    counts = np.histogram(living, 10 ** np.append(powers, powers[-1] + BIN).round(1))[0]
    ends = np.round(np.stack([powers, powers + BIN], 1), 1)
    figure = go.Figure(
        go.Bar(
            x=powers + BIN / 2, y=counts, width=BIN * 0.92, marker={"color": "#d97706"}, customdata=[f"{a:g}_{b:g}" for a, b in ends],
            text=[f"on {10**a:.3g} to {10**b:.3g} of the tokens" for a, b in ends], textposition="none",
            hovertemplate="%{y:,} latents<br>fire %{text}<extra></extra>",
        )
    )  # fmt: skip
    dead = len(density) - len(living)
    title = f"Densities of {name}: {len(living):,} living latents, {dead:,} dead"
    return _layout(figure, title, "log10 of density, the share of tokens on which a latent fires", "latents")


def relative_norms(relative: np.ndarray, edge: float, middle: float) -> go.Figure:
    """How many of `[F]` latents have which relative decoder norm; lines at what counts as exclusive (`edge` from 0 and 1) and shared (`middle` from 1/2)."""
    counts, ends = np.histogram(relative, bins=50, range=(0, 1))
    figure = go.Figure(
        go.Bar(
            x=(ends[:-1] + ends[1:]) / 2, y=counts, width=0.0185, marker={"color": STYLE["batchtopk"][0]},
            hovertemplate="%{y:,} latents<br>r about %{x:.2f}<extra></extra>",
        )
    )  # fmt: skip
    for place in (edge, 0.5 - middle, 0.5 + middle, 1 - edge):
        figure.add_vline(x=place, line={"color": CONTROL, "dash": "dot"})
    figure = _layout(
        figure, "Where latents are written", "r: 0 in the base model alone, 1 in the tuned one alone", "latents"
    )
    return figure.update_yaxes({"type": "log", "dtick": 1, "tickformat": ",d"}).update_xaxes(range=[-0.01, 1.01])


def latent_scaling(
    error: np.ndarray, reconstruction: np.ndarray, groups: Mapping[str, np.ndarray], bounds: tuple[float, float]
) -> go.Figure:
    """ν_error against ν_reconstruction of `[F]` latents, those of each group in a colour, and the corner below `bounds`; `customdata` is the latent.

    What lies beyond -0.5 and 1.5 stands at the rim.
    """
    figure = go.Figure()
    for (name, latents), (colour, symbol) in zip(groups.items(), STYLE.values(), strict=False):
        latents = latents[np.isfinite(error[latents]) & np.isfinite(reconstruction[latents])]
        figure.add_scattergl(
            x=error[latents].clip(-0.5, 1.5), y=reconstruction[latents].clip(-0.5, 1.5), mode="markers", name=name,
            customdata=latents.tolist(), marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.7},
            text=[f"{x:.2f} and {y:.2f}" for x, y in zip(error[latents], reconstruction[latents], strict=True)],
            hovertemplate="latent %{customdata}<br>ν of error and reconstruction %{text}<extra></extra>",
        )  # fmt: skip
    corner = {"x0": -0.55, "y0": -0.55, "x1": bounds[0], "y1": bounds[1]}
    figure.add_shape(type="rect", **corner, line={"color": CONTROL, "dash": "dot"})
    return _layout(
        figure, "Latent scaling", "ν_error: in what the other latents leave", "ν_reconstruction: in what they write"
    )


Measured = tuple[float | None, float, float | None, float | None]
"""(where on the axis, value, lower and upper end of its 95% interval), None for what there is not."""


def measured(lines: Mapping[str, Sequence[Measured]], title: str, x: str, y: str) -> go.Figure:
    """Figures with their intervals: over an axis (log scale) a line for each name, without one a row for each."""
    figure = go.Figure()
    over = any(at is not None for points in lines.values() for at, *_ in points)
    looks = [(colour, symbol, dash) for dash in ("solid", "dash", "dot") for colour, symbol in STYLE.values()]
    for place, (name, points) in enumerate(lines.items()):
        colour, symbol, dash = looks[place % len(looks)]
        values = [value for _, value, _, _ in points]
        ends = {
            "type": "data", "symmetric": False, "thickness": 1.5,
            "array": [0.0 if high is None else high - value for _, value, _, high in points],
            "arrayminus": [0.0 if low is None else value - low for _, value, low, _ in points],
        }  # fmt: skip
        marker, bars = {"color": colour, "symbol": symbol, "size": 9}, "error_y" if over else "error_x"
        at = [point[0] for point in points] if over else [html.escape(name)] * len(points)
        figure.add_scatter(
            x=at if over else values, y=values if over else at, mode="lines+markers" if over else "markers",
            name=html.escape(name), marker=marker, line={"color": colour, "dash": dash}, showlegend=over, **{bars: ends},
        )  # fmt: skip
    if not over:
        figure = _layout(figure, title, y, "").update_yaxes(autorange="reversed", type="category")
        return figure.update_layout(height=100 + 34 * len(lines), margin={"l": 180, "t": 20})
    figure.update_xaxes(_log_axis([at for points in lines.values() for at, *_ in points if at]))
    return _layout(figure, title, x, y)
