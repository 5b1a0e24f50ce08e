"""A scalar of a model under many maskings of a text: what maskings have in common is computed once.

A unit is one token or several in a row, and is present or masked. A masked token is given the mean embedding of a corpus (`mean`), is another,
neutral token (`neutral`), or is left out of attention, positions kept (`unattended`). Positions behind the one that is looked at are not run.
B maskings at once, n units, P = 2^n, L positions, D d_model, V vocabulary.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.interactions.mobius import Vector
from saebench.interactions.scalars import LOGITS, Scalar
from saebench.models import LanguageModel, capturer, check_hook, head
from saebench.models.attach import first_of
from saebench.models.checks import probe_tokens

Way = Literal["unattended", "neutral", "mean"]
_BYTES = (
    2**25
)  # of a layer's keys and values, of the maskings run together: larger pieces of memory are had anew each time, and slowly
_MOST = 256  # maskings run together
_CLOSE = 1e-2  # of the largest entry: the rounding of half-precision types


class Mask(NamedTuple):
    """How tokens are masked."""

    way: Way
    vector: Float[Tensor, " D"] | None = None
    """of `mean`: what the embedding gives in place of theirs"""
    token: int | None = None
    """of `neutral`: what they are instead"""


def mask_of(model: LanguageModel, way: Way, counts: Int[np.ndarray, " V"] | None = None) -> Mask:
    """A way to mask. `counts` says how often each token is in a corpus (default: the mean is of the vocabulary's embeddings).

    Raises ValueError for a model with which it does not do what it says, and `neutral` without such a token.
    """
    if way == "neutral":
        return Mask(way, token=_neutral(model))
    mask = Mask(way, vector=_mean_embedding(model, counts)) if way == "mean" else Mask(way)
    name = f"masking by {way}"
    if name not in model.checked:
        model.checked[name] = _fault(model, mask)
    if (fault := model.checked[name]) is not None:
        raise ValueError(fault)
    return mask


class Masked:
    """A text of which some units may be masked, and a scalar at its last position."""

    def __init__(
        self, model: LanguageModel, ids: Int[Tensor, " L"], units: Sequence[Sequence[int]], scalar: Scalar, mask: Mask
    ) -> None:
        """`units` are positions in order; the text is computed up to the first of them. Raises ValueError for hooks the model does not have."""
        self.model, self.ids, self.units, self.scalar, self.mask = (
            model,
            ids,
            [list(unit) for unit in units],
            scalar,
            mask,
        )
        hooks = [hook for hook in scalar.hooks if hook != LOGITS]
        for hook in hooks:
            check_hook(model, hook)
        self._capture = capturer(model, hooks) if hooks else None
        self._starts = [unit[0] for unit in self.units] + [len(ids)]
        self._cache: Any = None
        if resumes_maskings(model) and self._starts[0] > 0:
            cache = _new_cache()
            self._run(cache, 0, self._starts[0], torch.ones(1, len(units), dtype=torch.bool))
            if (
                cache.get_seq_length() == self._starts[0]
            ):  # nothing is kept of a pass that ends before the first attention
                self._cache = _branching(cache)

    def values(self, present_Bn: Bool[np.ndarray, "B n"]) -> Float[np.ndarray, " B"]:
        """The scalar where these units are present and the others masked, each from the first of all units on."""
        found = []
        for rows in torch.from_numpy(present_Bn).split(self._together()):
            cache, start = None, 0
            if self._cache is not None:
                cache, start = _repeated(self._cache, len(rows)), self._starts[0]
            found.append(self._scalar(self._run(cache, start, len(self.ids), rows)))
        return np.concatenate(found)

    def every(self, step: Callable[[int], Any] = lambda done: None) -> Vector:
        """The scalar at all 2^n maskings, by number: bit i of it says whether unit i is present. `step` hears how many are done, and may raise.

        A tree: what lies between one unit and the next is run once for the maskings that are alike so far, 2^j of them behind unit j.
        A model that cannot go on from keys and values runs each masking whole.
        """
        n = len(self.units)
        found = np.empty(2**n)
        if self._cache is None:
            numbers = np.arange(2**n)
            for some in np.split(numbers, range(self._together(), 2**n, self._together())):
                found[some] = self.values((some[:, None] >> np.arange(n) & 1).astype(bool))
                step(len(some))
            return found
        for present_Bn, at in self._leaves(self._cache, torch.zeros(1, 0, dtype=torch.bool)):
            found[(present_Bn.numpy() << np.arange(n)).sum(1)] = self._scalar(at)
            step(len(present_Bn))
        return found

    def _leaves(self, cache: Any, present_Bj: Bool[Tensor, "B j"]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(maskings, what is found there) of all that begin with those of some rows; `cache` has what lies before the next unit."""
        rows, unit = present_Bj.shape
        masked, kept = (torch.cat([present_Bj, torch.full((rows, 1), here)], 1) for here in (False, True))
        if 2 * rows <= self._together():
            parts = [(_repeated(cache, 2), torch.stack([masked, kept], 1).flatten(0, 1))]
        else:
            parts = [(_repeated(cache, 1), masked), (_repeated(cache, 1), kept)]
        for own, present in parts:
            at = self._run(own, self._starts[unit], self._starts[unit + 1], present)
            if unit + 1 == len(self.units):
                yield present, at
            else:
                yield from self._leaves(own, present)

    def _together(self) -> int:
        """How many maskings are run at once."""
        if self._cache is None:
            return _MOST
        one = max(sum(part.nbytes for part in layer.shared) for layer in self._cache.layers if layer.get_seq_length())
        return int(np.clip(_BYTES * self._starts[0] / (one * len(self.ids)), 1, _MOST))

    @torch.inference_mode()
    def _run(self, cache: Any, start: int, stop: int, present_Bj: Bool[Tensor, "B j"]) -> dict[str, Tensor]:
        """What the scalar is made of at the last of these positions, after which `cache` has them too."""
        hidden_BL = torch.zeros(len(present_Bj), stop, dtype=torch.bool)
        for present_B, unit in zip(present_Bj.T, self.units, strict=False):
            hidden_BL[:, [place for place in unit if place < stop]] = ~present_B[:, None]
        ids_BL = self.ids[start:stop].expand(len(hidden_BL), -1)
        with _masked(self.model, self.mask, ids_BL, hidden_BL.to(ids_BL.device), cache) as (ids_BL, options):
            return self._at(ids_BL, options, stop == len(self.ids))

    def _at(self, ids_BL: Int[Tensor, "B L"], options: dict[str, Any], last: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self._capture is not None:
            self._capture(ids_BL, lambda hook, value: found.update({hook: value[:, -1].clone()}), **options)
        else:
            states_BD = first_of(self.model.base(ids_BL, **options))[:, -1]
            if last:
                found[LOGITS] = head(self.model, states_BD)
        return found

    def _scalar(self, at: dict[str, Tensor]) -> Float[np.ndarray, " B"]:
        with torch.no_grad():
            return self.scalar.of(at).double().cpu().numpy()


@contextlib.contextmanager
def _masked(
    model: LanguageModel, mask: Mask, ids_BL: Int[Tensor, "B l"], hidden_BL: Bool[Tensor, "B L"], cache: Any
) -> Iterator[tuple[Int[Tensor, "B l"], dict[str, Any]]]:
    """(ids, options) with which a pass of the last l of L positions has the hidden ones masked, in the block."""
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    start, stop = hidden_BL.shape[1] - ids_BL.shape[1], hidden_BL.shape[1]
    own_BL = hidden_BL[:, start:]
    if mask.way == "unattended":
        places = torch.arange(start, stop, device=ids_BL.device).expand_as(ids_BL)
        yield ids_BL, options | {"attention_mask": (~hidden_BL).long(), "position_ids": places}
    elif mask.way == "neutral":
        assert mask.token is not None
        yield torch.where(own_BL, mask.token, ids_BL), options
    else:
        vector = mask.vector
        assert vector is not None
        handle = model.module.get_input_embeddings().register_forward_hook(
            lambda module, args, output: torch.where(own_BL[..., None], vector.to(output), output)
        )
        try:
            yield ids_BL, options
        finally:
            handle.remove()


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()  # of whole texts, whatever the windows: what is masked is the model's own affair


@functools.cache
def _branch() -> type:
    from transformers.cache_utils import DynamicLayer

    class Branch(DynamicLayer):
        """A layer's keys and values: one row of those that all texts begin with, and of each text those behind them."""

        def __init__(self, shared: Any) -> None:
            super().__init__()
            self.lazy_initialization(shared.keys, shared.values)
            self.shared = shared.keys, shared.values
            self.keys, self.values = (part[..., :0, :] for part in self.shared)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            own = super().update(key_states, value_states, *args, **kwargs)
            keys, values = (
                torch.cat([first.expand(len(part), -1, -1, -1), part], -2)
                for first, part in zip(self.shared, own, strict=True)
            )
            return keys, values

        def get_seq_length(self) -> int:
            assert self.keys is not None
            return self.shared[0].shape[-2] + self.keys.shape[-2]

    return Branch


def _branching(cache: Any) -> Any:
    """A cache that goes on from the one text of another, into many."""
    other = copy.copy(cache)
    other.layers = [_branch()(layer) if layer.get_seq_length() else layer for layer in cache.layers]
    return other


def _repeated(cache: Any, times: int) -> Any:
    """A cache of its own with every text so many times in a row. Keys and values are never written in place, and so may be shared."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    if times > 1:
        other.batch_repeat_interleave(times)
    return other


def resumes_maskings(model: LanguageModel) -> bool:
    """Whether passes that go on from keys and values, some of them hidden, give what whole passes give. Tried once, on a few tokens."""
    name = "maskings in steps"
    if name not in model.checked:
        model.checked[name] = None if _steps_agree(model) else f"model {model.id!r} does not go on from keys and values"
    return model.checked[name] is None


@torch.inference_mode()
def _steps_agree(model: LanguageModel) -> bool:
    if "past_key_values" not in inspect.signature(model.base.forward).parameters:
        return False
    ids_BL = probe_tokens(model)[:1]
    hidden_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    hidden_BL[:, [2, 5]] = True
    mask = Mask("unattended") if _attends(model) else Mask("neutral", token=int(ids_BL[0, 0]))
    with _masked(model, mask, ids_BL, hidden_BL, None) as (ids, options):
        whole = first_of(model.base(ids, **options))[:, -1]
    cache, states = _new_cache(), whole
    try:
        for start, stop in ((0, 2), (2, 3), (3, 8)):
            cache = _branching(cache) if start == 2 else _repeated(cache, 1)
            with _masked(model, mask, ids_BL[:, start:stop], hidden_BL[:, :stop], cache) as (ids, options):
                states = first_of(model.base(ids, **options))[:, -1]
    except Exception:  # whatever a family makes of a cache that is not its own
        return False
    return _same(states, whole)


def _attends(model: LanguageModel) -> bool:
    """Whether a model can be told what to attend to, and where each token is."""
    taken = inspect.signature(model.base.forward).parameters
    return "attention_mask" in taken and "position_ids" in taken and not getattr(model.module.config, "alibi", False)


@torch.inference_mode()
def _fault(model: LanguageModel, mask: Mask) -> str | None:
    """What is wrong with a way to mask, or None: what a hidden token is must make no difference to those behind it."""
    about = f"tokens of model {model.id!r} ({type(model.module).__name__}) cannot be masked by {mask.way!r}"
    if mask.way == "unattended" and not _attends(model):
        return f"{about}: it is not told which tokens to attend to and where they are; use 'mean' or 'neutral'"
    ids_BL = probe_tokens(model)
    other_BL, hidden_BL = ids_BL.clone(), torch.zeros_like(ids_BL, dtype=torch.bool)
    other_BL[:, 3], hidden_BL[:, 3] = ids_BL[:, 0], True
    found = []
    for some in (ids_BL, other_BL):
        with _masked(model, mask, some, hidden_BL, None) as (ids, options):
            found.append(first_of(model.base(ids, **options))[:, 4:].clone())
    if not _same(*found):
        return f"{about}: those behind a masked token still differ with what it is; use 'neutral'"
    return None


def _same(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).float().abs().max() <= _CLOSE * right.float().abs().max())


@torch.inference_mode()
def _mean_embedding(model: LanguageModel, counts: Int[np.ndarray, " V"] | None) -> Float[Tensor, " D"]:
    known = model.pieces.known(model.n_vocab) if counts is None else counts[: model.n_vocab]
    weights, embed = torch.from_numpy(known.astype(np.float64)), model.module.get_input_embeddings()
    total = torch.zeros(model.d_model, dtype=torch.float64)
    for ids in weights.nonzero()[:, 0].split(8192):
        total += weights[ids] @ embed(ids.to(model.device)[None])[0].cpu().double()
    return (total / weights.sum()).float().to(model.device)


def _neutral(model: LanguageModel) -> int:
    """The tokenizer's token for what is masked, unknown or padding, or else the one that ends texts."""
    for name in ("mask", "unk", "pad", "eos"):
        if (token := getattr(model.tokenizer, f"{name}_token_id", None)) is not None and token < model.n_vocab:
            return int(token)
    raise ValueError(
        f"model {model.id!r} has no tokenizer with a neutral token (mask, unk, pad or eos); mask by 'mean' or 'unattended'"
    )
