"""What one can try on a latent: lines of one's own, and what its ablation changes."""

import streamlit as st
from opened import model_of, weights_of
from shell import clickable, fragment, said
from why import place_asked, why, why_link, with_answer

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
from saebench.browse.why import Question
from saebench.evaluate.attribution import ablation_effects
from saebench.index.page import activations_svg, effects_html
from saebench.index.reader import Latent
from saebench.index.search import activations_on
from saebench.view.tokens import number, text_html


@fragment
def own_text(sae: Trained, table: LatentTable, latent: Latent) -> None:
    with st.form("own text", border=False):
        text = st.text_area("Lines, each by itself", key="try", bind="query-params", height=100)
        st.form_submit_button("See where it fires")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return
    with said():
        shared = model_of(sae)
        peaks, parts = [], []
        with shared.lock:
            found = [activations_on(shared.model, weights_of(sae), table.index, line, latent.latent) for line in lines]
        for line, (tokens, values) in enumerate(found):
            peak = int(values.argmax())
            peaks.append(float(values[peak]))
            fires = bool(values[peak] > 0)
            shown = text_html(
                table.index.running(tokens), values.tolist(), latent.figures["max"], peak=peak if fires else None
            )
            asks = f"<small>{why_link(latent.latent, line, peak)}</small>" if fires else ""
            parts.append(((line, peak), f'<div class="example">{shown}{asks}</div>'))
        fired = [peak for peak in peaks if peak > 0]
        at = f"; their peaks are marked: {', '.join(map(number, fired))}" if fired else ""
        histogram = activations_svg(latent, table.index.bin_edges, fired)
        parts.append(((), f"{histogram}<small>{len(fired)} of {len(lines)} lines{at}</small>"))
        place = place_asked(latent.latent, 2)
        place = place if place is not None and place[0] < len(found) and place[1] < len(found[place[0]][0]) else None

        def answer() -> None:
            assert place is not None
            line, token = place
            why(sae, Question(tuple(found[line][0][: token + 1].tolist()), latent=latent.latent))

        with_answer(parts, place, "own", answer)


@fragment
def ablation(sae: Trained, table: LatentTable, latent: Latent) -> None:
    st.caption("What the model loses on the strongest example when the latent is set to 0 there, all else kept.")
    if not st.button("Measure"):
        return
    with said():
        shared = model_of(sae)
        context = table.index.context_of(latent.top[0].row)
        with shared.lock:
            logits, loss = ablation_effects(
                shared.model, weights_of(sae), sae.ends, context.tokens, latent.latent, longest=table.index.longest
            )
        clickable(effects_html(table.index, context, logits.numpy(), loss.numpy()), "ablation")
