"""What the weights alone say of each latent: geometry of its rows, and its direct effect on the logits.

Legend: F latents, D d_in, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.models import Unembedding, depth, parse_hook
from saebench.runlog import progress
from saebench.sae import SAE
from saebench.sae.sparse import rows_of_a_block, rowwise_topk
from saebench.store.pair import TUNED

NEIGHBOURS = 20
LOGIT_TOKENS = 20
LOGIT_BINS = 40
_VALUES = 2**22  # effects held at once, with as many of their bins


@torch.no_grad()
def geometry(sae: SAE) -> dict[str, np.ndarray]:
    """`norm [F]`; `ids`, `cosines` `[F, 20]` of the nearest other decoder rows, -1 where F is smaller; of what writes what it reads
    `encoder_cosine [F]`, and where several hooks are written `lengths [F, H]`, the norms of a row's part at each."""
    norm_F = sae.W_dec.norm(dim=1)
    rows_FD = torch.nn.functional.normalize(sae.W_dec, dim=1)
    size = min(NEIGHBOURS, sae.d_sae - 1)
    ids_FN = np.full((sae.d_sae, NEIGHBOURS), -1, np.int32)
    cosines_FN = np.zeros((sae.d_sae, NEIGHBOURS), np.float32)
    with progress(sae.d_sae, "decoder neighbours", "latent", delay=1.0) as bar:
        for first, block_BD in _blocks(rows_FD, rows_of_a_block(sae.d_sae, rows_FD.device)):
            cosines_BF = block_BD @ rows_FD.T
            here = torch.arange(len(block_BD), device=block_BD.device)
            cosines_BF[here, here + first] = -torch.inf
            cosines_BN, ids_BN = rowwise_topk(cosines_BF, size)
            best = cosines_BN.sort(dim=1, descending=True)
            ids_FN[first : first + len(block_BD), :size] = ids_BN.gather(1, best.indices).cpu().numpy()
            cosines_FN[first : first + len(block_BD), :size] = best.values.cpu().numpy()
            bar.update(len(block_BD))
    found = {"norm": norm_F.cpu().numpy(), "ids": ids_FN, "cosines": cosines_FN}
    if sae.tied:
        cosine_F = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1)
        found["encoder_cosine"] = cosine_F.cpu().numpy()
    if len(sae.parts) > 1:
        found["lengths"] = sae.lengths_FH.cpu().numpy()
    return found


def to_stream(sae: SAE, writes: Sequence[str], before: str | None = None) -> Float[Tensor, "F D"] | None:
    """What a unit of each latent's activation adds to the residual stream, of all that is written; or `before` a hook.

    What MLP and attention write adds up; what is written to the stream itself has been told at the deepest hook. None where
    nothing of it goes into the stream: what attention's last map or an MLP reads does not. Of two models, it is the stream of the first.
    """
    parts = [
        (depth(hook), parse_hook(hook)[1], part)
        for hook, part in zip(writes, sae.W_dec.split(sae.parts, dim=1), strict=True)
        if not hook.startswith(TUNED) and (before is None or depth(hook) < depth(before))
    ]
    stream = max((at for at, kind, _ in parts if kind.startswith("resid")), default=(-1, 0))
    counted = [part for at, kind, part in parts if at >= stream and kind.startswith(("resid", "attn_out", "mlp_out"))]
    return sum(counted[1:], counted[0]) if counted else None


@torch.no_grad()
def logit_effects(
    W_dec_FD: Float[Tensor, "F D"],
    unembedding: Unembedding,
    known: Callable[[int], np.ndarray] = lambda n: np.ones(n, bool),
) -> dict[str, np.ndarray]:
    """The change of each token's logit by a unit of activation, on the direct path to the output.

    (d_f - mean(d_f)) γ W_U with γ the final norm's weight; the mean is that of a LayerNorm, not of an RMSNorm. The
    norm also divides by the scale of the residual stream, which differs between positions and is left out: so the order
    of tokens is exact, and magnitudes hold where that scale is 1. Biases and a soft cap of the logits are left out too.
    (nostalgebraist 2020, "interpreting GPT: the logit lens".)

    `known` tells which of n ids are tokens: an unembedding may be padded beyond them. Magnitudes include the model's own scale of
    its logits. Returns `top_ids`, `top`, `bottom_ids`, `bottom` `[F, 20]`, `std [F]`, and a histogram `[F, 40]` of all V effects in
    equal bins between `low` and `high [F]`; over the tokens alone.
    """
    columns: dict[str, np.ndarray] = {}
    ids = torch.from_numpy(np.flatnonzero(known(unembedding.W_U.shape[1]))).to(W_dec_FD.device)
    size = min(LOGIT_TOKENS, len(ids))
    if len(ids) < unembedding.W_U.shape[1]:
        unembedding = unembedding._replace(W_U=unembedding.W_U[:, ids])
    bar = progress(len(W_dec_FD), "logit effects", "latent", delay=1.0)
    for first, block_BD in _blocks(W_dec_FD, max(1, _VALUES // len(ids))):
        effects_BV = unembedding.effects(block_BD)
        top, bottom = effects_BV.topk(size, dim=1), effects_BV.topk(size, dim=1, largest=False)
        low_B, high_B = bottom.values[:, :1], top.values[:, :1]
        width_B = (high_B - low_B).clamp(min=1e-30)
        bins_BV = ((effects_BV - low_B) * (LOGIT_BINS / width_B)).long().clamp_(0, LOGIT_BINS - 1)
        bins_BV += torch.arange(len(block_BD), device=block_BD.device)[:, None] * LOGIT_BINS
        found = {
            "top_ids": ids[top.indices].int(),
            "top": top.values,
            "bottom_ids": ids[bottom.indices].int(),
            "bottom": bottom.values,
            "std": effects_BV.std(1),
            "low": low_B[:, 0],
            "high": high_B[:, 0],
            "histogram": torch.bincount(bins_BV.flatten(), minlength=len(block_BD) * LOGIT_BINS)
            .view(-1, LOGIT_BINS)
            .int(),
        }
        for name, value in found.items():
            values = value.cpu().numpy()
            if (
                name not in columns
            ):  # whole from the start: small arrays kept from each block would lie between its large
                columns[name] = np.empty(
                    (len(W_dec_FD), *values.shape[1:]), values.dtype
                )  # ones, and hold their memory
            columns[name][first : first + len(values)] = values
        bar.update(len(block_BD))
    bar.close()
    return columns


def _blocks(rows_FD: Tensor, step: int) -> list[tuple[int, Tensor]]:
    """(first row, rows) of blocks of so many rows."""
    return [(first, rows_FD[first : first + step]) for first in range(0, len(rows_FD), step)]
