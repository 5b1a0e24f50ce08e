"""Functions in the way of a model's vectors: what a module reads, what it returns, or the stream between two of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saebench.models.load import LanguageModel
from saebench.models.places import Place

Edit = Callable[[Tensor], Tensor | None]
"""The new value `[B, L, D]` of a hook, or None for the old one."""


def attach(model: LanguageModel, place: Place, function: Edit) -> Any:
    """Put a function in the way of the vectors of a place, on the model's device; returns the handle that takes it away again."""
    if place.block is not None:
        return _Between(model, place, place.block, function)
    at = _At(model, place, function)
    if place.inward:
        return place.module.register_forward_pre_hook(at.see_input, with_kwargs=True)
    return place.module.register_forward_hook(at.see_output)


class _At:
    """A function in the way of what a module reads or returns."""

    def __init__(self, model: LanguageModel, place: Place, function: Edit) -> None:
        self._model, self._scale, self._function = model, place.scale, function
        self._plain = isinstance(place.scale, float) and place.scale == 1

    def see_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = self._see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
        new = self._see(kwargs[name])
        return None if new is None else (args, kwargs | {name: new})

    def see_output(self, _: nn.Module, args: Any, output: Any) -> Any:
        new = self._see(first_of(output))
        return None if new is None else with_first(output, new)

    def _see(self, value: Tensor) -> Tensor | None:
        shaped = value
        if value.dim() == 2:  # some families run their MLP on positions in one row
            assert self._model.passing.ids is not None
            shaped = value.view(*self._model.passing.ids.shape, -1)
        shaped = shaped.to(self._model.device)
        new = self._function(shaped if self._plain else (shaped * self._scale).to(value.dtype))
        if new is None:
            return None
        return (new if self._plain else (new / self._scale).to(value.dtype)).view(value.shape).to(value.device)


class _Between:
    """A function in the way of the stream between attention and MLP: what goes into the block, and what attention adds to it.

    No module's input is that stream alone, since it also goes past the MLP. So a change of it is made to what attention adds.
    """

    def __init__(self, model: LanguageModel, place: Place, block: nn.Module, function: Edit) -> None:
        self._ends = Place(block, inward=True), place._replace(block=None)
        self._model, self._function = model, function
        self._before: list[Tensor] = []
        self._handles: list[Any] = []
        self._pass = model.base.register_forward_pre_hook(self._begin)

    def remove(self) -> None:
        self._pass.remove()
        self._take_off()

    def _begin(self, *_: Any) -> None:
        """Put on anew for each pass, behind whatever else changes the two by now."""
        self._take_off()
        self._handles = [
            attach(self._model, at, see) for at, see in zip(self._ends, (self._hold, self._see), strict=True)
        ]

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._before.clear()

    def _hold(self, value: Tensor) -> None:
        self._before[:] = [value]

    def _see(self, added: Tensor) -> Tensor | None:
        old = self._before.pop() + added
        new = self._function(old)
        return None if new is None else added + (new - old)


def first_of(output: Any) -> Tensor:
    """The vectors in what a module returns."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, value: Tensor) -> Any:
    """What a module returns, with other vectors."""
    return value if isinstance(output, Tensor) else type(output)((value, *output[1:]))
