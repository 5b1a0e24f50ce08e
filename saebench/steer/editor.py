"""Interventions on a model: the hooks that do them, row by row of a batch.

Legend: B rows of a batch, b those of a group, L columns of a pass, D what is read, E what is written (at one hook), n edited vectors.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.evaluate.attribution import massive
from saebench.models import Edit, LanguageModel, check_hook, depth, edits, next_logits
from saebench.sae import SAE, latent_encoder
from saebench.sae.architectures import normalized
from saebench.steer.interventions import Intervention, check_widths

_Reader = tuple[SAE, tuple[str, ...]]
"""An SAE and the hooks that it reads."""


@contextlib.contextmanager
def steered(
    model: LanguageModel,
    interventions: Sequence[Intervention],
    *,
    prompt_length: int | None = None,
    tokens: Int[Tensor, "B L"] | None = None,
) -> Iterator[None]:
    """The model under interventions, in every pass within the block that begins at a context's first token.

    Columns from `prompt_length` on are `generated`; by default none is. An intervention that `looks_ahead` needs the `tokens`
    of these passes, to read them in the model as it is before the block. For passes with a KV cache use `generate`. Raises
    ValueError as `Editor` does.
    """
    editor = Editor(model, [interventions])
    editor.prompt_columns = prompt_length
    if tokens is not None:
        editor.look_ahead(tokens)
    with editor.attached():
        yield


class Editor:
    """Interventions on a model, which may differ from row to row of a batch.

    `first_column`, `prompt_columns` and `padding` say where a pass stands in its texts; whoever runs passes sets them, and calls
    `look_ahead` before each. Raises ValueError for an SAE that does not fit the model, a hook that it does not have, an SAE on
    another device, and in a pass of tokens that were not looked at although an intervention `looks_ahead`.
    """

    def __init__(
        self, model: LanguageModel, arms: Sequence[Sequence[Intervention]], arm_of_row: Sequence[int] | None = None
    ) -> None:
        self.model = model
        self.first_column = 0
        """of the pass: how many columns the KV cache holds"""
        self.prompt_columns: int | None = None
        """columns that are prompt, padding included; None where all are"""
        self.padding: Tensor | None = None
        """`[B]` columns of padding before each row's text"""
        self._bos = model.encoder.bos
        self._ahead: list[_Group] = []
        """those with an intervention that looks ahead"""
        self._looked_at: Tensor | None = None
        groups: dict[str, list[_Group]] = {}
        for number, arm in enumerate(arms):
            rows = None if arm_of_row is None else [row for row, its in enumerate(arm_of_row) if its == number]
            mine = [one for one in arm if not one.changes_nothing]
            for one in mine:
                _check(model, one)
            if mine and rows != []:
                group = _Group(mine, rows, model.device)
                for hook in dict.fromkeys(hook for one in mine for hook in one.ends.hooks):
                    groups.setdefault(hook, []).append(group)
                if any(one.looks_ahead for one in mine):
                    self._ahead.append(group)
        functions: dict[str, Edit] = {hook: functools.partial(self._edit, hook, its) for hook, its in groups.items()}
        self._attached = edits(model, functions)

    def look_ahead(self, tokens: Int[Tensor, "B L"], cache: Any = None, *, use_cache: bool = False) -> Any:
        """What interventions that look ahead read in the pass to come, from one of the same columns in the model as it is now.

        To be called outside `attached`. `cache` is what the call for the columns before has returned: keys and values of the
        rows concerned, None where none are or none are kept.
        """
        self._looked_at = tokens
        if not self._ahead:
            return None
        everyone = torch.arange(len(tokens), device=tokens.device)
        rows = [everyone if group.rows is None else group.rows for group in self._ahead]

        def take(hook: str, value: Tensor) -> None:
            for group, part in zip(self._ahead, value.split([len(mine) for mine in rows]), strict=True):
                group.ahead[hook] = part.clone()

        hooks = {
            hook for group in self._ahead for one in group.interventions if one.looks_ahead for hook in one.ends.reads
        }
        rows_b = torch.cat(rows)
        padding = None if self.padding is None else self.padding[rows_b]
        with edits(self.model, {hook: functools.partial(take, hook) for hook in hooks})():
            return next_logits(
                self.model, tokens[rows_b], cache=cache, seen=self.first_column, padding=padding, use_cache=use_cache
            )[1]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the model within the block, and off it after, whatever happens."""
        with self._attached():
            yield

    @torch.no_grad()
    def _edit(self, hook: str, groups: "list[_Group]", value: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
        if any(hook in group.writes for group in groups):
            value = value.clone()
        if any(group in self._ahead for group in groups):
            self._check_looked()
        for group in groups:
            masks = [self._mask(one, group, value.shape[0], value.shape[1]) for one in group.interventions]
            places = torch.stack(masks).any(0).nonzero(as_tuple=True)
            if len(places[0]) == 0:
                continue
            rows = places[0] if group.rows is None else group.rows[places[0]]
            here_nE = value[rows, places[1]].float()
            if hook in group.read:
                group.read[hook] = here_nE
            group.places = places
            if hook in group.writes:
                edited = group.edited(hook, here_nE, [mask[places] for mask in masks])
                value[rows, places[1]] = edited.to(value.dtype)
        return value

    def _check_looked(self) -> None:
        ids = self.model.passing.ids
        assert ids is not None
        if self._looked_at is None or not torch.equal(self._looked_at, ids):
            one = next(one for group in self._ahead for one in group.interventions if one.looks_ahead)
            raise ValueError(
                f"mode is {one.mode} of latent {one.latent}, which writes {min(one.ends.writes, key=depth)} before it has read "
                f"{max(one.ends.reads, key=depth)}, and this pass is of tokens that were not read before it; expected those of "
                "steered(…, tokens=…), or add or orthogonal, and no `where`"
            )

    def _mask(self, one: Intervention, group: "_Group", n_rows: int, n_columns: int) -> Bool[Tensor, "b L"]:
        """Where in the group's rows an intervention acts, as far as that is a question of position."""
        ids = self.model.passing.ids
        assert ids is not None
        rows = torch.arange(n_rows, device=ids.device) if group.rows is None else group.rows
        columns_L = self.first_column + torch.arange(n_columns, device=rows.device)
        padding_b = torch.zeros_like(rows) if self.padding is None else self.padding[rows]
        place_bL = columns_L - padding_b[:, None]
        mask_bL = place_bL >= (0 if one.bos else 1)
        if not one.bos and self._bos is not None:
            mask_bL &= ids[rows] != self._bos
        end = self.first_column + n_columns if self.prompt_columns is None else self.prompt_columns
        if one.positions == "generated":
            return mask_bL & (columns_L >= end)
        if one.positions == "all":
            return mask_bL
        mask_bL &= columns_L < end
        if one.positions != "prompt":
            lengths = set((end - padding_b).tolist())
            if lengths != {len(one.positions)}:
                raise ValueError(
                    f"the mask of positions has {len(one.positions)} values; the prompt has {', '.join(map(str, sorted(lengths)))} tokens, BOS included"
                )
            wanted = torch.tensor(one.positions, device=rows.device)
            mask_bL &= wanted[place_bL.clamp(0, len(wanted) - 1)]
        return mask_bL


class _Group:
    """The interventions on some rows (None: on all)."""

    def __init__(self, interventions: list[Intervention], rows: list[int] | None, device: torch.device) -> None:
        self.interventions = interventions
        self.rows = None if rows is None else torch.tensor(rows, device=device)
        self.read: dict[str, Tensor] = {hook: torch.empty(0) for one in interventions for hook in one.ends.reads}
        """what is read at each hook, since a pass last came to it"""
        self.ahead: dict[str, Tensor] = {}
        """`[b, L, D]` what is read there in the model left alone, by interventions that look ahead"""
        self.places: tuple[Tensor, ...] = ()
        """(row of the group, column) of each edited vector"""
        self.directions = [one.directions() for one in interventions]
        self.writes = {hook for parts in self.directions for hook in parts}
        wanted: dict[_Reader, list[int]] = {}
        for one in interventions:
            latents = wanted.setdefault((one.sae, one.ends.reads), [])
            latents += [one.latent] * one.reads + ([one.where.latent] if one.where else [])
        self._encoders = {
            reader: (latent_encoder(reader[0], ids), {latent: column for column, latent in enumerate(ids)})
            for reader, latents in wanted.items()
            if (ids := sorted(set(latents)))
        }

    def edited(self, hook: str, y_nE: Float[Tensor, "n E"], masks: list[Bool[Tensor, " n"]]) -> Float[Tensor, "n E"]:
        """What is written at a hook, changed; `masks` are those of the interventions."""
        acts: dict[_Reader, Tensor] = {}

        def act_of(one: Intervention, latent: int) -> Float[Tensor, " n"]:
            reader = one.sae, one.ends.reads
            encode, columns = self._encoders[reader]
            if reader not in acts:
                acts[reader] = encode(self._x(one))
            return acts[reader][:, columns[latent]]

        change_nE, last = torch.zeros_like(y_nE), []
        for one, parts, mask_n in zip(self.interventions, self.directions, masks, strict=True):
            if hook not in parts:
                continue
            d_E = parts[hook]
            for read in one.ends.reads if one.looks_ahead else one.read_by(hook):
                mask_n = mask_n & ~massive(self._read(one, read), one.longest_at(read))
            if one.where is not None:
                mask_n = mask_n & (act_of(one, one.where.latent) > one.where.above)
            scale = normalized(self._x(one), one.sae.normalize)[1] if one.sae.normalize != "none" else 1.0
            c_n: Any = one.strength
            if one.reads:
                act_n = act_of(one, one.latent)
                c_n = {"clamp": one.strength - act_n, "scale": (one.strength - 1) * act_n, "ablate": -act_n}[one.mode]
            coefficient_n = torch.as_tensor(c_n, device=y_nE.device) * mask_n
            change = coefficient_n[:, None] * scale * d_E
            if one.mode == "orthogonal":
                last.append((mask_n, torch.nn.functional.normalize(d_E, dim=0), change))
            else:
                change_nE += change
        y_nE = y_nE + change_nE
        for mask_n, unit_E, change in last:
            y_nE = y_nE - (mask_n * (y_nE @ unit_E))[:, None] * unit_E + change
        return y_nE

    def _x(self, one: Intervention) -> Float[Tensor, "n D"]:
        return torch.cat([self._read(one, hook) for hook in one.ends.reads], 1)

    def _read(self, one: Intervention, hook: str) -> Float[Tensor, "n D"]:
        return self.ahead[hook][self.places].float() if one.looks_ahead else self.read[hook]


def _check(model: LanguageModel, one: Intervention) -> None:
    for hook in one.ends.hooks:
        check_hook(model, hook)
    check_widths(model, one.sae, one.ends, "the SAE")
    if one.sae.W_dec.device != model.device:
        raise ValueError(
            f"the SAE is on {one.sae.W_dec.device}, the model on {model.device}; move it there with sae.to(…)"
        )
