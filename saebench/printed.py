"""Results as a terminal shows them: text of tables, figures and generations."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from numpy import ndarray

from saebench.bench.results import Figure
from saebench.circuits import Tried
from saebench.demo.circuits import Shown, told
from saebench.evaluate import massive_note, tables
from saebench.index.explanations import Explanation, Halves
from saebench.index.names import Names
from saebench.index.needs import ORDERS, Needs
from saebench.steer import Bench, Generation
from saebench.steer.dose import DoseResponse
from saebench.steer.scores import Scores


def explanations_table(found: dict[int, Explanation]) -> list[list[str]]:
    """A heading, a row of figures for each latent and their medians; – where there are too few windows."""
    names = ("detection", "fuzzing", "other_explanation", "other_windows", "rule", "tokens")
    scores = {latent: [_second(getattr(each, name)) for name in names] for latent, each in found.items()}
    known = ([each for each in column if each is not None] for column in zip(*scores.values(), strict=True))
    medians = [statistics.median(column) if column else None for column in known]
    tallies = [tally for each in found.values() for name in names[:3] for tally in getattr(each, name) or ()]
    unusable, all_of_them = sum(tally.unusable for tally in tallies), sum(tally.asked for tally in tallies)
    rows = [
        [str(latent), *map(_figure, scores[latent]), found[latent].text or "no usable explanation"] for latent in found
    ]
    heading = ["latent", "detection", "fuzzing", "other's text", "other's windows", "rule", "tokens", "explanation"]
    return [heading, *rows, ["median", *map(_figure, medians), f"({unusable} of {all_of_them} answers were unusable)"]]


def _second(halves: Halves | None) -> float | None:
    return None if halves is None else halves[1].score


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def effects_table(found: Tried) -> list[list[str]]:
    """A heading, and a row for each group, latent and logit that an intervention was held to."""
    heading = ["sum of activations, or logit", "before", "predicted", "held", "free"]
    return [heading, *([name, *(f"{value:z.2f}" for value in values)] for name, *values in found.effects)]


def show_ranking(bench: Bench, scores: Scores, latents: Int[ndarray, " f"]) -> str:
    """A row for each latent: its scores, what it writes, its name."""
    assert bench.index
    tops = bench.index.top_logits
    assert tops is not None
    rows = [["latent", "output", "input", "top logits", "name"]]
    names = Names(bench.index)
    for latent in latents:
        tokens = " ".join(map(repr, bench.index.pieces(tops[latent, :5])))
        figures = (
            f"{scores.output[latent]:.3f}{'' if scores.measured[latent] else ' ~'}",
            f"{scores.input[latent]:.3f}",
        )
        name = names[int(latent)]
        rows.append([str(latent), *figures, tokens, name.text if name.explained else "-"])
    note = "\n~ estimated on a few short prompts; `--latent N` measures it whole"
    return format_table(rows, left=(0, 3, 4)) + ("" if scores.measured[latents].all() else note)


def show_needs(bench: Bench, found: dict[int, Needs]) -> str:
    """A row for each latent: its strength by order, the set that says most, and its name."""
    assert bench.index
    names = Names(bench.index, needs=found)
    rows = [["latent", "contextuality", *ORDERS, "transfers", "set", "F1", "name"]]
    for latent, needs in found.items():
        shares = (_figure(value) for value in (needs.contextuality, *(needs.by_order or [None] * 4), needs.share))
        first = f"{needs.sets[0].strength:+.2f} {needs.sets[0].text}" if needs.sets else "–"
        name = names[latent]
        said = name.text if name.explained else "–"
        rows.append([str(latent), *shares, first, _figure(name.f1), f"{'* ' * (name.source == 'interactions')}{said}"])
    named = sum(row[-1].startswith("* ") for row in rows)
    note = f"* {named} of {len(found)} have the rule that their interactions make as name"
    return "\n".join([format_table(rows, left=(0, 7, 9)), note])


def show_texts(prompt: str, made: Generation) -> str:
    """The texts of a generation under a heading for each arm."""
    lines: list[str] = []
    for arm in dict.fromkeys(text.arm for text in made.texts):
        texts = made.of(arm)
        kl = sum(float(text.kl.mean()) for text in texts) / len(texts)
        surprise = sum(text.cross_entropy for text in texts) / len(texts)
        lines.append(f"\n=== {arm}: cross-entropy {surprise:.2f}, KL {kl:.2f} nats per token")
        for text in texts:
            apart = "" if text.diverges is None else f" (differs from token {text.diverges} on)"
            lines += [f"--- {text.sample + 1}{apart}", prompt + text.text]
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in made.seconds.items())
    return "\n".join([*lines, "", f"took {seconds}"])


def show_sweep(found: DoseResponse) -> str:
    """A row for each arm and strength, what is best on the other half of the prompts, and a text of each arm."""
    names = ("firing", "activation", "rule", "top_tokens", "cross_entropy", "diversity", "logits", "kl")
    rows = [["arm", "strength", "of the norm", "concept", "fluency", "score", *names]]
    for dose in found.doses:
        norm = "–" if dose.norm is None else f"{dose.norm:.2f}"
        figures = ("–" if (value := getattr(dose, name)) is None else f"{value:.3f}" for name in names)
        best = dose.arm == "steered" and dose.strength == found.best.strength
        rows.append([dose.arm + " *" * best, f"{dose.strength:.2f}", norm, *dose.told(), *figures])
    lines = [format_table(rows)]
    if found.other is not None:
        lines.append(f"other: the direction of latent {found.other}, which fires about as often")
    lines += [
        "rule: in which share of the texts it holds, labelled as the index labels; (…): 95%, bootstrap over prompts",
        "* best: the harmonic mean of concept and fluency on half of the prompts; on the other half, at this strength:",
    ]
    rows = [["arm", "concept", "fluency", "score"], *([dose.arm, *dose.told()] for dose in found.tested)]
    lines.append(format_table(rows))
    return "\n".join([*lines, *(f"\n=== {arm}\n{text}" for arm, text in found.samples.items())])


def show_evaluation(summary: dict[str, Any], run: Path) -> str:
    """The tables of a run's summary, and where its report is."""
    first, *others = map(format_table, tables(summary))
    note = massive_note(summary["saes"])
    lines = [first, *([note] if note else []), *(f"\n{other}" for other in others), *([""] if others else [])]
    return "\n".join([*lines, f"report: {run / 'report.html'}"])


def show_run(summary: dict[str, Any], run: Path) -> str:
    """Those of a run of all stages, and how long each took."""
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items())
    return f"{show_evaluation(summary, run)}\ntook {seconds}"


def show_figures(figures: Sequence[Figure]) -> str:
    """A row for each SAE and thing measured, a column for each figure and place on its axis, with 95% intervals."""
    columns = list(dict.fromkeys((each.figure, each.at) for each in figures))
    rows: dict[tuple[str, str], dict[Any, Figure]] = {}
    for each in figures:
        rows.setdefault((each.sae, each.of), {})[each.figure, each.at] = each
    heading = ["SAE", "of", *(name if at is None else f"{name} at {at:g}" for name, at in columns), "n"]
    return format_table(
        [
            heading,
            *(
                [
                    sae,
                    of,
                    *(_with_interval(row.get(column)) for column in columns),
                    str(max(each.n for each in row.values())),
                ]
                for (sae, of), row in rows.items()
            ),
        ],
        left=(0, 1),
    )


def _with_interval(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    return f"{figure.value:.3f}" + ("" if figure.low is None else f" ({figure.low:.3f} to {figure.high:.3f})")


def show_cases(shown: Sequence[Shown]) -> str:
    """Of each circuit of the demonstration its strongest paths and what ablations do; then what graphs foretell beside what is measured."""
    rows = [["latents ablated", "logit", "foretold", "held", "free"]]
    lines: list[str] = []
    for case, _, scores, sentences, ablations in shown:
        logit = f"{case.target!r} over {case.against!r}"
        lines += ["", f"=== {case.about}: {logit} after …{case.prompt[-24:]!r}", *sentences[:3]]
        lines += [f"replacement score {scores['replacement']:.3f}, completeness {scores['completeness']:.3f}"]
        lines += [told(case, one) for one in ablations]
        for one in ablations:
            changes = (f"{change:+.2f}" for change in (one.predicted, one.held, one.free))
            rows.append([f"{len(one.latents)} at {one.at!r}", logit, *changes])
    notes = [
        "changes of the logit in nats: foretold by the graph; measured with attention and norms held, and with both free",
        f"pictures: {', '.join(str(one.picture) for one in shown)}",
        f"next: saebench app {shown[0].path.parent.parent}, page Circuits",
    ]
    return "\n".join([*lines, "", format_table(rows, left=(0, 1)), *notes])


def format_table(rows: list[list[str]], left: Sequence[int] = (0,)) -> str:
    """Columns aligned: those of `left` to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
