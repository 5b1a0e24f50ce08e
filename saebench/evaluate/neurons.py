"""The model's own neurons as a dictionary of what an MLP writes: what a trained one must beat, without any training.

N rows, D d_model, F neurons.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.evaluate.measure import Batch, Places, validation_batches
from saebench.metrics import Sums, ratio, total, total_variance
from saebench.models import LanguageModel, capture, check_hook, hook_name, parse_hook
from saebench.models.devices import through, weights_in
from saebench.models.places import place_of
from saebench.sae import Ends
from saebench.store import Store

_POSITIONS = 16_384  # held-out positions at most: the FVU of neurons varies little
_CLOSE = (
    1e-2  # of Σ‖y‖², by which what the neurons write together may differ from the hook: half-precision models round
)


@torch.inference_mode()
def neuron_fvus(
    store: Store, model: LanguageModel, ends: Ends, l0s: Sequence[float], bounds: Mapping[str, float]
) -> list[float] | None:
    """For each of `l0s`, FVU of what the so many neurons of largest |a_j|‖w_j‖ write in each row, with the MLP's bias.

    a_j goes into the MLP's last map and w_j is that map's row for it, so that all neurons together are exact. None where something else
    is written than the output of one MLP, or the MLP has no such map, or something follows it (a mixture of experts, a norm behind).
    """
    if len(ends.writes) != 1 or parse_hook(ends.writes[0])[1] != "mlp_out":
        return None
    written, neurons = ends.writes[0], hook_name(parse_hook(ends.writes[0])[0], "mlp_post")
    try:
        check_hook(model, neurons)
    except ValueError:
        return None
    last = place_of(model, neurons).module
    scale = place_of(model, written).scale
    norms_F: Tensor | None = None
    ks = sorted({max(1, round(l0)) for l0 in l0s})
    error = dict.fromkeys(ks, 0.0)
    whole, squared, sums = 0.0, 0.0, Sums()
    for batch in validation_batches(store, _POSITIONS, 16):
        batch = Batch(*(column.to(model.device) for column in batch))
        hooks = list(dict.fromkeys((*ends.hooks, neurons)))
        values = capture(model, batch.tokens, hooks)
        usual_BL = Places.of(batch, {hook: values[hook] for hook in ends.hooks}, bounds).usual_BL
        a_NF, y_ND = values[neurons][usual_BL], values[written][usual_BL].float()
        if norms_F is None:
            norms_F = _norms(last, a_NF)
        if norms_F is None:
            return None
        order_NK = (a_NF.float().abs() * norms_F).topk(min(max(ks), a_NF.shape[1]), dim=1).indices
        for k in ks:
            kept_NF = torch.zeros_like(a_NF).scatter_(1, order_NK[:, :k], a_NF.gather(1, order_NK[:, :k]))
            error[k] += float((through(last, kept_NF).float() * scale - y_ND).double().pow(2).sum())
        whole += float((through(last, a_NF).float() * scale - y_ND).double().pow(2).sum())
        squared += float(y_ND.double().pow(2).sum())
        docs_N = batch.doc_id[usual_BL]
        sums.add(docs_N, {"rows": torch.ones_like(docs_N), "squared_norm": y_ND.double().pow(2).sum(1), "vector": y_ND})
    if whole > _CLOSE * squared:
        return None
    variance = float(total_variance(total(sums.table())))
    return [float(ratio(error[max(1, round(l0))], variance)) for l0 in l0s]


def _norms(last: torch.nn.Module, a_NF: Float[Tensor, "N F"]) -> Float[Tensor, " F"] | None:
    """‖w_j‖ of every neuron, whichever way round the map keeps them; None where its weight is no matrix of them."""
    with weights_in(last):
        weight = getattr(last, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or a_NF.shape[1] not in weight.shape:
            return None
        return weight.to(a_NF.device).float().norm(dim=0 if isinstance(last, torch.nn.Linear) else 1)
