"""What baselines cost the model: each spliced in as dictionaries are, on the same tokens, at the L0 of each of them.

A pass of its own behind that of the dictionaries, since it takes their L0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from saebench.evaluate.baselines import Baseline, Untrained, joined
from saebench.evaluate.compare import FIGURES
from saebench.evaluate.measure import Batch, ByHook, Measurement, Subject, Written
from saebench.metrics import fidelity_metrics, total
from saebench.sae import Ends
from saebench.store import Store

SPLICED = tuple(name for name in FIGURES if name != "fvu")
"""the figures of the spliced model"""


class _Control(Subject):
    """A baseline in the place of a dictionary."""

    def __init__(self, ends: Ends, write: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """`write` makes of the rows of all hooks what is written at one hook after the other, `[N, E]`."""
        super().__init__(Path(), (), ends)
        self._write = write

    def reconstruct(self, rows: ByHook, *, count: bool = True) -> Written:
        hooks = self.ends.writes
        parts = self._write(rows).split([rows[hook].shape[1] for hook in hooks], dim=1)
        nothing = torch.zeros_like(parts[0][:, 0])
        return Written(dict(zip(hooks, parts, strict=True)), nothing, dict.fromkeys(hooks, nothing))


@torch.inference_mode()
def spliced_baselines(
    store: Store,
    measured: Measurement,
    baseline: Baseline,
    each: Sequence[tuple[int, int, float]],
    batches: Iterable[Batch],
) -> list[dict[str, dict[str, float]]]:
    """For each dictionary (latents, seed, L0) the figures of its baselines, by their names: means over the hooks written.

    `baseline` is the one fitted, which is spliced in at the nearest whole rank; the untrained one has that many latents active.
    `measured` is the pass of the dictionaries.
    """
    ends, controls = measured.ends, dict[tuple[int, ...], _Control]()
    wanted = [(d_sae, seed, max(1, min(round(l0), d_sae))) for d_sae, seed, l0 in each]
    for k in sorted({k for *_, k in wanted}):
        controls[(k,)] = _Control(ends, lambda rows, k=k: baseline.reconstruct(joined(rows, ends.reads), k))
    for d_sae, seed in dict.fromkeys((d_sae, seed) for d_sae, seed, _ in wanted):
        ks = [k for *same, k in wanted if same == [d_sae, seed]]
        made = Untrained(store, ends, d_sae, ks, seed, str(measured.model.device))
        for k in made.ks:
            controls[(d_sae, seed, k)] = _Control(ends, lambda rows, made=made, k=k: made.reconstruct(rows, k))
    again = Measurement(measured.model, ends, measured.means, None, list(controls.values()), measured.bounds)
    for batch in batches:
        again.add(batch)
    found = {which: _figures(again, control) for which, control in controls.items()}
    return [{baseline.name.removesuffix("_fvu"): found[one[2:]], "untrained": found[one]} for one in wanted]


def _figures(measured: Measurement, control: Subject) -> dict[str, float]:
    """Of the spliced model, means over hooks."""
    every = [
        fidelity_metrics(total({**measured.shared[hook].table(), **sums.table()}))
        for hook, sums in control.sums.items()
    ]
    return {name: sum(float(metrics[name]) for metrics in every) / len(every) for name in SPLICED}
