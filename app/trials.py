"""What one can try on a latent: lines of one's own, and what its ablation changes."""

import streamlit as st
from opened import model_of, weights_of
from shell import clickable, fragment, said

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
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
        peaks, body = [], []
        with shared.lock:
            found = [activations_on(shared.model, weights_of(sae), table.index, line, latent.latent) for line in lines]
        for tokens, values in found:
            peak = int(values.argmax())
            peaks.append(float(values[peak]))
            pieces = table.index.running(tokens)
            body.append(
                f'<div class="example">{text_html(pieces, values.tolist(), latent.figures["max"], peak=peak if values[peak] > 0 else None)}</div>'
            )
        fired = [peak for peak in peaks if peak > 0]
        at = f"; their peaks are marked: {', '.join(map(number, fired))}" if fired else ""
        histogram = activations_svg(latent, table.index.bin_edges, fired)
        clickable(
            f"{''.join(body)}{histogram}<small>{len(fired)} of {len(lines)} lines{at}</small>",
            "own",
        )


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
