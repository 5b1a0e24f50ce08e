"""A pass in which attention's patterns and the norms' denominators are those of another: what is left is linear in the stream.

Attention keeps its queries and keys, through the interface by which transformers calls it, so that a family's own code makes the
pattern; a norm keeps the number by which it multiplies each row, found from what it makes of rows and not from its code.
B contexts in the batch, L positions, H heads, D width of what is normalised.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench.models import LanguageModel

_ATTENTION = "saebench_frozen"
_CLOSE = 1e-5  # of the largest number, that a norm may differ from gain × row × one number + bias
_now: ContextVar["Frozen"] = ContextVar("frozen")


class _Norm(NamedTuple):
    """What a norm makes of a row, but for the row's own scale."""

    gain: Float[Tensor, " D"]
    bias: Float[Tensor, " D"]
    centred: bool
    """whether it takes off the row's mean first"""

    def rows(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Those that the scale multiplies."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


class Frozen:
    """What one pass of a model had for patterns and denominators, and passes that are held to it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._norms: dict[nn.Module, _Norm] = {}
        self._kept: list[tuple[Tensor, ...]] = []  # in the order of the pass
        self._place: int | None = None  # in it, where it is followed

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """In it, one pass is run that is the model's own, and kept.

        Raises ValueError in the pass for a norm that is none that is known, and after it where a layer's attention was not called by
        the interface, as that of recurrent layers and of old families is not.
        """
        self._kept, self._place = [], None
        with self._in_the_way():
            yield
        if (called := sum(len(kept) == 2 for kept in self._kept)) != self.model.n_layers:
            raise ValueError(
                f"model {self.model.id!r} ({type(self.model.module).__name__}) has {self.model.n_layers} layers, and {called} of them have "
                "attention that transformers' interface calls; expected all, since patterns are held fixed there. Use another family"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In it, one pass of the same contexts is run, of any number of them in the batch, with what was kept."""
        self._place = 0
        with self._in_the_way():
            yield

    @contextlib.contextmanager
    def _in_the_way(self) -> Iterator[None]:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        module = self.model.module
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        norms = [part for part in self.model.base.modules() if _is_norm(part)]
        before, token = module.config._attn_implementation, _now.set(self)
        try:
            module.set_attn_implementation(_ATTENTION)
            for norm in norms:
                vars(norm)["forward"] = partial(self._norm, norm, norm.forward)
            yield
        finally:
            for norm in norms:
                vars(norm).pop("forward", None)
            module.set_attn_implementation(before)
            _now.reset(token)

    def keep(self, made: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What is kept of this place of the pass; made where it is recorded."""
        if self._place is None:
            self._kept.append(tuple(value.detach() for value in made()))
            return self._kept[-1]
        self._place += 1
        return self._kept[self._place - 1]

    def _norm(self, norm: nn.Module, own: Callable[..., Tensor], x: Tensor, *others: Any, **named: Any) -> Tensor:
        name = f"{type(norm).__name__} of model {self.model.id!r}"
        if others or named or not isinstance(x, Tensor):
            raise ValueError(f"{name} is called with more than rows; expected a norm of rows alone. Use another family")
        if norm not in self._norms:
            self._norms[norm] = _asked(own, x)
        known = self._norms[norm]
        rows = known.rows(x)

        def scale() -> tuple[Tensor]:
            y = own(x)
            found = ((y - known.bias) * rows).sum(-1, keepdim=True) / rows.square().sum(-1, keepdim=True).clamp(1e-30)
            if not (apart := (rows * found + known.bias - y).abs().max()) <= _CLOSE * y.abs().max():
                raise ValueError(
                    f"{name} is not its gain times the row times one number, plus a bias: {float(apart):.2g} apart, of "
                    f"{float(y.abs().max()):.2g}. Its denominator cannot be held fixed; use another family"
                )
            return (found,)

        return rows * self.keep(scale)[0] + known.bias


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> Any:
    """A family's own attention, of the queries and keys that are kept: `[B, H, L, …]`."""
    frozen = _now.get()
    own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise ValueError(
            f"{type(module).__name__} of model {frozen.model.id!r} has no attention of plain products (eager_attention_forward), whose "
            "pattern could be held fixed; use another family"
        )
    kept = [one.expand(len(value), -1, -1, -1) for one in frozen.keep(lambda: (query, key))]
    return own(module, *kept, value, attention_mask, **settings)


def _is_norm(part: nn.Module) -> bool:
    return "norm" in type(part).__name__.lower() and not list(part.children())


@torch.no_grad()
def _asked(norm: Callable[[Tensor], Tensor], like: Float[Tensor, "*B D"]) -> _Norm:
    """Gain and bias of a norm, by what it makes of rows of ±1 and large, to which an ε is nothing."""
    signs = torch.ones_like(like[..., :1, :])
    signs[..., 1::2] = -1
    up, down, moved = (norm(1e4 * row).flatten(0, -2)[0] for row in (signs, -signs, signs + 3))
    signs = signs.flatten(0, -2)[0]
    return _Norm((up - down) / 2 * signs, (up + down) / 2, bool((moved - up).abs().max() < 1e-3 * up.abs().max()))
