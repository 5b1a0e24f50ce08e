"""Latents as HTML without scripts: a page to share, and the parts that the app shows too."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saebench.index.examples import Shown
from saebench.index.names import SOURCES, Name
from saebench.index.needs import ORDERS, Needs
from saebench.index.notes import Note
from saebench.index.reader import Context, FeatureIndex, Interval, Latent, Ranked
from saebench.index.ruled import Rule
from saebench.view import svg, tokens
from saebench.view.tokens import alone, number, text_html, visible

FIGURES = {
    "density": "density",
    "fires": "firings",
    "max": "maximum",
    "mean": "mean of firings",
    "decoder_norm": "decoder norm",
    "encoder_cosine": "encoder · decoder",
    "name_f1": "F1 of its name",
    "name_detection": "detection of its name",
    "rule_f1": "F1 of the rule",
    "tokens_f1": "F1 of the token list",
    "output": "output score",
    "estimate": "output score, estimated",
    "massive": "firings on massive rows, left out",
}
"""Labels of a latent's figures, in the order in which every page has them."""


class Evidence(NamedTuple):
    """A latent with its name, its note and its examples: the strongest, and those of its intervals of strength."""

    latent: Latent
    name: Name
    note: Note
    top: list[Shown]
    intervals: list[list[Shown]]


def latents_page(name: str, index: FeatureIndex, found: Iterable[Evidence]) -> str:
    """A self-contained page of latents of the SAE called `name`."""
    sections, contents = [], []
    for evidence in found:
        latent = evidence.latent
        contents.append(f'<li><a href="#latent-{latent.latent}">{latent.latent}</a> {name_html(evidence.name)}</li>')
        sections.append(_section(evidence, index))
    identity = index.store.manifest["identity"]
    about = (
        f"{html.escape(identity['model']['id'])}, {html.escape(str(index.ends))}, {index.d_sae:,} latents, over {index.n_rows:,} tokens "
        f"of {html.escape(str(identity['text']['dataset']))}. Activations are in the model's own units; logit effects are those "
        "of a unit of activation on the direct path, at the final norm's scale of 1."
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: latents</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}{PARTS_CSS}{tokens.CSS}{svg.CSS}</style></head>
<body class="sb-page"><main><h1>{html.escape(name)}</h1><p>{about}</p><nav aria-label="latents"><ol class="contents">{"".join(contents)}</ol></nav>
{"".join(sections)}</main></body></html>
"""


def figures_html(latent: Latent, scores: Mapping[str, float] | None = None) -> str:
    """The header row: every figure with its label, those of `scores` too, then the flags."""
    figures = latent.figures | dict(scores or {})
    cells = [
        f"<div><dt>{label}</dt><dd>{figure(name, figures[name])}</dd></div>"
        for name, label in FIGURES.items()
        if name in figures and not np.isnan(figures[name]) and (figures[name] or name != "massive")
    ]
    cells += [f'<div><dt>flag</dt><dd class="flag">{flag.replace("_", " ")}</dd></div>' for flag in latent.flags]
    return f'<dl class="figures">{"".join(cells)}</dl>'


def name_html(name: Name) -> str:
    """A latent's name in a line: what you call it stands out, and what is unexplained stands back."""
    text = visible(name.text)
    about = f"{text}\n{SOURCES[name.source]}{f'; {name.scored}' if name.scored else ''}"  # a table cuts it
    kind = {"yours": ' class="sb-yours"', "": ' class="sb-unexplained"'}.get(name.source, "")
    return f'<span{kind} title="{html.escape(about)}">{html.escape(text) or "no name"}</span>'


def named_html(name: Name) -> str:
    """The name with how it was come by, and its score on held-out documents."""
    scored = f"{name.scored} on held-out documents" if name.scored else "too few held-out firings to score it"
    return f'<p class="rule"><b>{name_html(name)}</b><br><small>{SOURCES[name.source]}, {scored}</small></p>'


def candidates_html(latent: Latent, name: Name, needs: Needs | None = None) -> str:
    """The rule, the list of tokens and the rule made of interactions, each with all of its held-out scores; or why there is no rule.

    The one that is the name is not said again.
    """
    if latent.rule is None:
        return f'<p class="rule">No rule: {html.escape(latent.no_rule)}.</p>'
    several = None if needs is None else needs.rule
    candidates = {
        "rule": ("Rule", latent.rule),
        "tokens": ("Tokens", latent.tokens_rule),
        "interactions": ("Interactions", several),
    }
    return "".join(
        _candidate_html(what, rule, name.source == source)
        for source, (what, rule) in candidates.items()
        if rule is not None
    )


def needs_html(needs: Needs | None) -> str:
    """In a line how a latent's strength is shared among sets of tokens, and which sets several examples have; nothing where it was not looked at."""
    if needs is None or not needs.by_order:
        return ""
    shares = ", ".join(f"{what} {share:.0%}" for what, share in zip(ORDERS, needs.by_order, strict=True))
    sets = "; ".join(f"{html.escape(visible(one.text))} ({one.strength:+.0%} at {one.examples})" for one in needs.sets)
    again = f" Again and again (share of the activation, at how many of them): {sets}." if sets else ""
    return f'<p class="rule">Contextuality {needs.contextuality:.2f} <small>strength by order at {needs.examples} examples: {shares}.{again}</small></p>'


def _candidate_html(what: str, rule: Rule, is_name: bool) -> str:
    scores = {
        "F1": rule.f1, "precision": rule.precision, "recall": rule.recall, "detection": rule.detection, "null": rule.null,
        "hard negatives": rule.hard_negative,
    }  # fmt: skip
    shown = (
        ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if not np.isnan(value)) or "too few firings"
    )
    return (
        f'<details class="rule"><summary>{what}: {"the name" if is_name else html.escape(visible(rule.text))}</summary>'
        f"<small>on {rule.score_rows:,} held-out tokens: {shown}</small></details>"
    )


def activations_svg(latent: Latent, edges: np.ndarray, marked: Sequence[float] = ()) -> str:
    """The histogram of firings over quarter octaves of strength, with some activations marked on it."""
    filled = np.flatnonzero(latent.histogram)
    if not len(filled):
        return ""
    places = range(int(filled[0]), int(filled[-1]) + 1)
    labels = [
        f"{number(float(edges[place]))} to {number(float(edges[place + 1]))}: {latent.histogram[place]:,} firings"
        for place in places
    ]
    marks = {
        int(np.clip(np.searchsorted(edges, value, "right") - 1 - filled[0], 0, len(places) - 1)): number(value)
        for value in marked
    }
    heights = [float(latent.histogram[place]) for place in places]
    ends = number(float(edges[places[0]])), "log scale", number(float(edges[places[-1] + 1]))
    return svg.bars(heights, labels, "firings by strength", marks=marks, axis=ends)


def short_hook(hook: str) -> str:
    """`12.mlp_out`."""
    return hook.removeprefix("blocks.").replace("hook_", "")


def hooks_html(index: FeatureIndex, latent: Latent) -> str:
    """What is read and written, where that is not one hook, and how long the latent's decoder row is at each that is written."""
    read, written = (" + ".join(hooks) for hooks in index.ends)
    if read == written and not len(latent.lengths):
        return ""
    told = f"reads and writes {read}" if read == written else f"reads {read}, writes {written}"
    shown = ""
    if len(latent.lengths):
        lengths = latent.lengths.tolist()
        labels = [f"{hook}: {number(length)}" for hook, length in zip(index.ends.writes, lengths, strict=True)]
        axis = [short_hook(hook) for hook in index.ends.writes]
        axis = axis if len(axis) < 4 else [axis[0], axis[-1]]
        shown = f"<h3>Norm at each hook</h3>{svg.bars(lengths, labels, 'norm at each hook', axis=axis)}"
    return f'{shown}<p class="rule"><small>{html.escape(told)}</small></p>'


def logits_svg(latent: Latent) -> str:
    """The histogram of the latent's direct effects on all tokens' logits."""
    counts, low, high = latent.logit_histogram
    if not len(counts):
        return ""
    edges = np.linspace(low, high, len(counts) + 1)
    labels = [
        f"{number(lower)} to {number(upper)}: {count:,} tokens"
        for lower, upper, count in zip(edges.tolist(), edges[1:].tolist(), counts, strict=False)
    ]
    heights = [float(np.log1p(count)) for count in counts]
    return svg.bars(
        heights, labels, "tokens by effect on their logit, log scale", down=(edges[1:] <= 0).tolist(),
        axis=(number(float(low)), "counts on a log scale", number(float(high))),
    )  # fmt: skip


def ranked_html(index: FeatureIndex, ranked: Ranked, size: int = 10) -> str:
    """Tokens, each with its figure."""
    pieces = index.pieces(ranked.ids[:size])
    style = number if np.issubdtype(ranked.values.dtype, np.floating) else "{:,}".format
    rows = (
        f"<tr><td><code>{html.escape(alone(piece))}</code></td><td>{style(value)}</td></tr>"
        for piece, value in zip(pieces, ranked.values.tolist(), strict=False)
    )
    return f'<table class="ranked">{"".join(rows)}</table>'


def examples_html(
    index: FeatureIndex, shown: Sequence[Shown], maximum: float, more: Callable[[Shown], str] = lambda one: ""
) -> str:
    """Examples under each other, with the document that each comes from and whatever HTML `more` adds to that."""
    parts = []
    for one in shown:
        context, values = one
        document = html.escape(index.documents.get(context.doc_id, str(context.doc_id)))
        parts.append(
            f'<figure class="example">{text_html(context.pieces, values.tolist(), maximum, peak=context.peak)}'
            f"<figcaption>{document}{more(one)}</figcaption></figure>"
        )
    return "".join(parts)


def effects_html(index: FeatureIndex, context: Context, logits: np.ndarray, loss: np.ndarray) -> str:
    """What an ablation does on a context: tokens by how much worse they are predicted, and the logits after the peak.

    `logits` `[n, V]` and `loss` `[n]` are those of `ablation_effects`.
    """
    worse = np.concatenate([[0.0], np.nan_to_num(loss[:-1])])
    most = max(float(np.abs(worse).max()), 1e-9)
    spans = []
    for unit in tokens.units(context.pieces):
        value = float(worse[unit.strongest(np.abs(worse).tolist())])
        strength = abs(value) if abs(value) > 1e-3 else 0.0
        title = unit.named(f"loss {value:+.3f} nats")
        spans.append(tokens.token_html(unit.text, strength, most, title=title, kind="sb-down" if value < 0 else ""))
    effects = logits[context.peak]
    order = np.argsort(effects)
    order = order[index.known(len(effects))[order]]  # padding of the vocabulary is no token
    lists = "".join(
        f"<div><h3>{name}</h3>{ranked_html(index, Ranked(ids, effects[ids]))}</div>"
        for name, ids in (("Logits that fall", order[:10]), ("Logits that rise", order[::-1][:10]))
    )
    total = (
        f"<p><small>loss {float(np.nansum(loss)):+.3f} nats over the context; a solid line: predicted worse without it, "
        "a dashed one: better</small></p>"
    )
    return f'<div class="sb-text sb-change">{"".join(spans)}</div>{total}<div class="columns">{lists}</div>'


def interval_title(interval: Interval, fires: float) -> str:
    """`0.5 to 1.2 · 31% of firings`."""
    return f"{number(interval.lower)} to {number(interval.upper)} · {interval.fires / max(fires, 1):.1%} of firings"


def _section(evidence: Evidence, index: FeatureIndex) -> str:
    latent, maximum = evidence.latent, evidence.latent.figures["max"]
    groups = "".join(
        f"<details><summary>{interval_title(interval, latent.figures['fires'])}</summary>{examples_html(index, group, maximum)}</details>"
        for interval, group in zip(reversed(latent.intervals), reversed(evidence.intervals), strict=True)
    )
    logits = (
        f"<div><h3>Logits up</h3>{ranked_html(index, latent.top_logits)}</div>"
        f"<div><h3>Logits down</h3>{ranked_html(index, latent.bottom_logits)}</div>"
        if len(latent.top_logits.ids)
        else ""
    )
    note = f"<p>{html.escape(evidence.note.text)}</p>" if evidence.note.text else ""
    return f"""<section id="latent-{latent.latent}"><h2>Latent {latent.latent}</h2>{named_html(evidence.name)}{note}{candidates_html(latent, evidence.name)}{figures_html(latent)}
<div class="columns"><div><h3>Firings by strength</h3>{activations_svg(latent, index.bin_edges)}
<h3>Effects on logits</h3>{logits_svg(latent)}{hooks_html(index, latent)}</div>
<div><h3>Fires on</h3>{ranked_html(index, latent.tokens)}</div>{logits}</div>
<h3>Strongest firings, one of a context</h3>{examples_html(index, evidence.top, maximum)}
<h3>Firings by interval of strength</h3>{groups}</section>"""


def figure(name: str, value: float) -> str:
    """A figure of a latent as every page writes it."""
    if name == "density":
        return f"{value:.3%}"
    if name.endswith(("_f1", "_detection", "contextuality")):
        return f"{value:.2f}"
    return f"{value:,.0f}" if name in ("fires", "massive") else number(value)


PARTS_CSS = """
h3 { font-size: .85rem; font-weight: 600; margin: 1rem 0 .3rem; color: var(--sb-faint); } a { color: inherit; }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--sb-line); outline-offset: 2px; }
.rule { margin: .25rem 0; white-space: pre-wrap; } .sb-yours { font-weight: 600; } .sb-unexplained { color: var(--sb-faint); font-style: italic; } small, figcaption { color: var(--sb-faint); font-size: .8rem; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; margin: .75rem 0; }
.figures dt { font-size: .75rem; color: var(--sb-faint); } .figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: 2fr 1fr 1fr 1fr; gap: 0 2rem; }
.columns.halves { grid-template-columns: 2fr 3fr; }
@container (max-width: 760px) { .columns { grid-template-columns: 1fr 1fr; } .columns.halves { grid-template-columns: 1fr; } }
@container (max-width: 420px) { .columns { grid-template-columns: 1fr; } }
.ranked { border-collapse: collapse; width: 100%; font-size: .85rem; } .ranked td { padding: .05rem 0; }
.ranked td:last-child { text-align: right; font-variant-numeric: tabular-nums; } code { white-space: pre; }
.example { margin: 0; padding: .4rem 0; border-top: 1px solid var(--sb-rule); } figcaption { margin-top: .15rem; }
summary { cursor: pointer; padding: .3rem 0; font-size: .9rem; }
"""
"""The look of the parts, for every page that shows them."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; background: var(--sb-paper); color: var(--sb-ink); }
main { container-type: inline-size; max-width: 1100px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
section { border-top: 1px solid var(--sb-rule); padding-top: 1.5rem; margin-top: 2rem; }
.contents { columns: 2 20rem; padding-left: 0; list-style: none; font-size: .85rem; }
.contents a { display: inline-block; min-width: 3.5rem; font-variant-numeric: tabular-nums; }
"""
