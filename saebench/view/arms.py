"""Generated texts of one arm as HTML."""

import html
from collections.abc import Sequence
from typing import Any

from saebench.view.tokens import number, token_html, units

CSS = """
.sb-head { min-height: 4.4rem; } .sb-head h3 { margin: .25rem 0 0; } .sb-of-arm { border-top: 1px solid var(--sb-rule); padding: .35rem 0 .5rem; }
"""
FULL = 2.0
"""nats of KL at which a token's colour is full"""


def arm_html(arm: str, about: str, texts: Sequence[Sequence[str]], measured: Sequence[Any] = ()) -> str:
    """Texts under each other, by their tokens. `measured` are their `Text`s, once there are: KL as colour, divergence as a mark."""
    parts = []
    for sample, pieces in enumerate(texts):
        text = measured[sample] if sample < len(measured) else None
        spans = []
        kls = [0.0] * len(pieces) if text is None else [*text.kl.tolist(), *[0.0] * len(pieces)][: len(pieces)]
        for unit in units(pieces):
            kl = kls[unit.strongest(kls)]
            apart = text is not None and text.diverges in unit.places and arm != "unsteered"
            title = unit.named(f"KL {kl:.3f} nats" if kl > 0 else "")
            spans.append(
                token_html(unit.text, kl if kl > 0.005 else 0.0, FULL, title=title, kind="sb-apart" if apart else "")
            )
        number_ = f"<small>{sample + 1}</small>" if len(texts) > 1 else ""
        parts.append(
            f'<div class="sb-of-arm">{number_}<div class="sb-text sb-change sb-arm">{"".join(spans)}</div></div>'
        )
    figures = ""
    if measured and all(len(text.kl) for text in measured):
        kl = sum(float(text.kl.mean()) for text in measured) / len(measured)
        loss = sum(text.cross_entropy for text in measured) / len(measured)
        figures = f"<small>cross-entropy {number(loss)} nats per token"
        figures += f", KL {number(kl)}</small>" if arm != "unsteered" else "</small>"
    return f'<div class="sb-head"><h3>{html.escape(arm)}</h3><small>{html.escape(about)}</small></div>{"".join(parts)}{figures}'
