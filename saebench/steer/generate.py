"""Steered generation: arms that differ in their interventions alone, from the same prompts and the same noise.

Legend: A arms, P prompts, S samples of each prompt in each arm, R = A·P·S rows of the batch in that order, T generated tokens, V vocabulary.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from saebench.models import LanguageModel, check_padding, next_logits, repeated
from saebench.pieces import show_text
from saebench.steer.editor import Editor
from saebench.steer.interventions import Intervention

Arms = Mapping[str, Sequence[Intervention]]
Prompts = str | Sequence[str] | Sequence[Int[np.ndarray, " _"]]
UNSTEERED = "unsteered"
_LOGITS = 2**26  # logits held at once when texts are measured


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 64
    """tokens to generate; a text ends before that at the model's end-of-text token"""
    n_samples: int = 1
    """texts of each prompt in each arm"""
    seed: int = 0
    """of the noise, which depends on seed, prompt, sample and step, and not on the arm or the rest of the batch"""
    temperature: float = 1.0
    """0 takes the most likely token"""
    top_p: float = 1.0
    """draw from the fewest tokens whose probabilities reach this sum"""
    repetition_penalty: float = 1.0
    """divides positive logits of tokens already in the text, and multiplies negative ones (Keskar et al. 2019, section 4.1)"""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("n_samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 (the most likely token) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number above 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0, 1 for none")


class Text(NamedTuple):
    """A generated text."""

    arm: str
    prompt: int
    sample: int
    tokens: np.ndarray
    """`[T]` ids, without the prompt's"""
    pieces: list[str]
    """each token's own text"""
    text: str
    diverges: int | None
    """the first place where it is not the unsteered text of the same prompt and sample"""
    logp: np.ndarray
    """`[T]` log-probability of each token in the arm's own model, nats; empty where not measured"""
    clean_logp: np.ndarray
    """`[T]` the same in the model without interventions"""
    kl: np.ndarray
    """`[T]` KL(clean ‖ steered) of the next-token distributions before each token, nats"""

    @property
    def cross_entropy(self) -> float:
        """Mean surprise of the model without interventions, nats per token; NaN where not measured."""
        return float(-self.clean_logp.mean()) if len(self.clean_logp) else float("nan")


class Generation(NamedTuple):
    """What `generate` returns."""

    prompts: list[list[str]]
    """the tokens of each prompt, BOS included"""
    texts: list[Text]
    """by arm, prompt and sample"""
    seconds: dict[str, float]
    """`first_token`, `generate`, `measure`"""

    def of(self, arm: str) -> list[Text]:
        """The texts of one arm."""
        return [text for text in self.texts if text.arm == arm]


def arms_of(
    interventions: Sequence[Intervention], *, controls: bool = True, seed: int = 0
) -> dict[str, tuple[Intervention, ...]]:
    """`unsteered` and `steered`; with `controls` also `random` (directions of the same norm) and `negative` (strengths)."""
    arms = {UNSTEERED: (), "steered": tuple(interventions)}
    if controls:
        arms["random"] = tuple(dataclasses.replace(one, random=seed) for one in interventions)
        arms["negative"] = tuple(one.negative() for one in interventions)
    return arms


def generate(
    model: LanguageModel,
    prompts: Prompts,
    arms: Arms | Sequence[Intervention],
    sampling: Sampling = Sampling(),
    *,
    measure: Literal["kl", "clean", "none"] = "kl",
    truncate: bool = False,
    on_step: Callable[[Int[np.ndarray, "A P S"]], bool] = lambda tokens: True,
    lock: Any = None,
) -> Generation:
    """Continue prompts under each arm's interventions (`arms_of`), and without any.

    A prompt is a text, or token ids that begin with BOS. All arms see the same noise, so that texts part only where the
    distributions do. With `measure` `clean` one pass over the finished texts gives each token's log-probability in the model as
    it is, with `kl` another one that under the arm, and KL. `on_step` is given each step's tokens, as `stream` yields them, and
    ends the texts there by returning False. The interventions are on the model only during a forward pass, under `lock` where one is given. Raises ValueError
    when there is no prompt and for one that does not fit into the context with `max_new_tokens`, unless `truncate` allows
    cutting its beginning (after BOS), and as `Editor` does.
    """
    if not isinstance(arms, Mapping):
        arms = arms_of(arms, controls=False)
    if UNSTEERED not in arms:
        arms = {UNSTEERED: (), **arms}
    batch = _Batch(model, prompts, arms, sampling, truncate, lock)
    start = time.perf_counter()
    steps, seconds = [], {}
    for tokens_R in batch.steps():
        steps.append(tokens_R)
        seconds.setdefault("first_token", time.perf_counter() - start)
        if not on_step(batch.by_arm(tokens_R)):
            break
    generated_RT = np.stack(steps, 1)
    seconds["generate"] = time.perf_counter() - start
    start = time.perf_counter()
    measured = None if measure == "none" else batch.measure(generated_RT, kl=measure == "kl")
    seconds["measure"] = time.perf_counter() - start
    return Generation(batch.pieces, list(batch.texts(generated_RT, measured)), seconds)


def stream(
    model: LanguageModel,
    prompts: Prompts,
    arms: Arms,
    sampling: Sampling = Sampling(),
    *,
    truncate: bool = False,
    lock: Any = None,
) -> Iterator[Int[np.ndarray, "A P S"]]:
    """The tokens of `generate` as they come, step by step; −1 after the end of a text. Raises ValueError as `generate` does.

    Between steps the model is as it was: whoever stops asking leaves nothing behind.
    """
    batch = _Batch(model, prompts, arms, sampling, truncate, lock)
    return (batch.by_arm(tokens_R) for tokens_R in batch.steps())


class _Batch:
    """The rows of one generation."""

    def __init__(
        self, model: LanguageModel, prompts: Prompts, arms: Arms, sampling: Sampling, truncate: bool, lock: Any
    ) -> None:
        self.model, self.arms, self.sampling = model, arms, sampling
        self.lock = lock or contextlib.nullcontext()
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not len(prompts):
            raise ValueError("there is no prompt; expected at least one")
        self.prompts = [
            model.encoder.opened(model.encoder.encode([prompt])[0]) if isinstance(prompt, str) else prompt.tolist()
            for prompt in prompts
        ]
        room = model.max_context - sampling.max_new_tokens
        for number, ids in enumerate(self.prompts):
            model.check_tokens(ids)
            if len(ids) > room:
                if not truncate or room < 2:
                    raise ValueError(
                        f"a prompt has {len(ids)} tokens; with {sampling.max_new_tokens} new ones at most {room} fit into the model's context of {model.max_context}: shorten one, or allow truncation"
                    )
                self.prompts[number] = [ids[0], *ids[-(room - 1) :]]
        self.pieces = [show_text([model.pieces[token] for token in ids]) for ids in self.prompts]
        self.columns = max(map(len, self.prompts))
        self.end = torch.tensor(sorted(model.end_tokens), device=model.device)
        self.editor = Editor(model, list(arms.values()), self._arm_of_row(1))

    def _arm_of_row(self, n_samples: int) -> list[int]:
        return [arm for arm in range(len(self.arms)) for _ in range(len(self.prompts) * n_samples)]

    def _start(self, n_samples: int) -> tuple[Tensor, Tensor | None]:
        """(prompts `[R, columns]` padded at the left, padding `[R]`, None where there is none)."""
        padded = [[ids[0]] * (self.columns - len(ids)) + ids for ids in self.prompts]
        missing = [self.columns - len(ids) for ids in self.prompts]
        rows = {"a": len(self.arms), "s": n_samples}
        ids = repeat(torch.tensor(padded, device=self.model.device), "p l -> (a p s) l", **rows)
        padding = repeat(torch.tensor(missing, device=self.model.device), "p -> (a p s)", **rows)
        if not bool(padding.any()):
            return ids, None
        check_padding(self.model)
        return ids, padding

    def by_arm(self, tokens_R: Int[np.ndarray, " R"]) -> Int[np.ndarray, "A P S"]:
        return rearrange(tokens_R, "(a p s) -> a p s", a=len(self.arms), s=self.sampling.n_samples)

    def _pass(
        self,
        editor: Editor,
        ids: Tensor,
        padding: Tensor | None,
        caches: tuple[Any, Any] = (None, None),
        *,
        column: int = 0,
        keep: int = 1,
        use_cache: bool = True,
    ) -> tuple[Tensor, tuple[Any, Any]]:
        """`next_logits` under interventions, `column` the first of `ids`; caches of the model under them, and left alone where they look ahead."""
        editor.first_column, editor.prompt_columns, editor.padding = column, self.columns, padding
        with self.lock:
            ahead = editor.look_ahead(ids, caches[1], use_cache=use_cache)
            with editor.attached():
                logits, cache = next_logits(
                    self.model, ids, cache=caches[0], seen=column, padding=padding, keep=keep, use_cache=use_cache
                )
        return logits, (cache, ahead)

    def steps(self) -> Iterator[Int[np.ndarray, " R"]]:
        """The next token of every row, −1 where the text has ended, until all have or there are enough."""
        settings, n = self.sampling, self.sampling.n_samples
        ids, padding = self._start(1)
        logits, caches = self._pass(self.editor, ids, padding)
        if n > 1:
            logits, caches = logits.repeat_interleave(n, 0), (repeated(caches[0], n), repeated(caches[1], n))
        unknown = torch.from_numpy(~self.model.pieces.known(logits.shape[-1])).to(ids.device)
        ids, padding = self._start(n)
        editor = self.editor if n == 1 else Editor(self.model, list(self.arms.values()), self._arm_of_row(n))
        seen = _Seen(ids, padding, logits.shape[-1]) if settings.repetition_penalty != 1 else None
        noise = [
            np.random.Generator(np.random.Philox(key=[settings.seed % 2**63, prompt * 2**32 + sample]))
            for prompt in range(len(self.prompts))
            for sample in range(n)
        ]
        ended, tokens = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), ids[:, -1]
        for step in range(settings.max_new_tokens):
            if step:
                ids = torch.cat([ids, tokens[:, None]], 1)
                column = 0 if caches[0] is None else self.columns + step - 1
                logits, caches = self._pass(editor, ids[:, column:], padding, caches, column=column)
            tokens = self._draw(logits[:, -1].float().clone(), noise, seen, unknown)
            yield torch.where(ended, -1, tokens).cpu().numpy()
            if len(self.end):
                ended |= torch.isin(tokens, self.end)
                if bool(ended.all()):
                    return

    def _draw(
        self, logits_RV: Float[Tensor, "R V"], noise: list[np.random.Generator], seen: "_Seen | None", unknown: Tensor
    ) -> Int[Tensor, " R"]:
        """The next tokens, by the Gumbel trick: argmax of logits / temperature + noise is a draw from their softmax."""
        settings = self.sampling
        logits_RV[:, unknown] = -torch.inf  # rows of the embedding that are no token of the tokenizer
        if seen is not None:
            logits_RV = seen.penalised(logits_RV, settings.repetition_penalty)
        if settings.temperature > 0:
            logits_RV = logits_RV / settings.temperature
            if settings.top_p < 1:
                logits_RV = _nucleus(logits_RV, settings.top_p)
            gumbel = np.stack([generator.gumbel(size=logits_RV.shape[1]).astype(np.float32) for generator in noise])
            gumbel_nV = torch.from_numpy(gumbel).to(logits_RV.device)
            logits_RV = logits_RV + repeat(gumbel_nV, "n v -> (a n) v", a=len(self.arms))
        tokens = logits_RV.argmax(1)
        if seen is not None:
            seen.add(tokens)
        return tokens

    def measure(self, generated_RT: Int[np.ndarray, "R T"], kl: bool) -> Float[np.ndarray, "3 R T"]:
        """(log-probability under the arm, without interventions, KL(clean ‖ steered)), NaN after the end of a text.

        One teacher-forced pass over the texts with and one without interventions; rows of an arm without any need one.
        Without `kl` only the second row is filled.
        """
        ids, padding = self._start(self.sampling.n_samples)
        generated = torch.from_numpy(generated_RT).to(ids.device)
        full = torch.cat([ids, generated.clamp(min=0)], 1)[:, :-1]
        arm_of_row = np.array(self._arm_of_row(self.sampling.n_samples))
        found = np.full((3, *generated_RT.shape), np.nan, np.float32)
        size = max(1, _LOGITS // (generated_RT.shape[1] * self.model.n_vocab))
        for arm, interventions in enumerate(self.arms.values()):
            for rows in torch.from_numpy(np.flatnonzero(arm_of_row == arm)).split(size):
                of_rows = None if padding is None else padding[rows]
                target = generated[rows].clamp(min=0)[..., None]
                clean = own = self._log_softmax(full[rows], of_rows, [], generated_RT.shape[1])
                found[1, rows.numpy()] = clean.gather(-1, target)[..., 0].cpu().numpy()
                if not kl:
                    continue
                if any(not one.changes_nothing for one in interventions):
                    own = self._log_softmax(full[rows], of_rows, interventions, generated_RT.shape[1])
                found[0, rows.numpy()] = own.gather(-1, target)[..., 0].cpu().numpy()
                found[2, rows.numpy()] = (clean.exp() * (clean - own)).sum(-1).cpu().numpy()
        found[:, generated_RT < 0] = np.nan
        return found

    def _log_softmax(
        self, ids: Tensor, padding: Tensor | None, interventions: Sequence[Intervention], keep: int
    ) -> Tensor:
        editor = Editor(self.model, [interventions])
        logits, _ = self._pass(editor, ids, padding, keep=keep, use_cache=False)
        return logits.float().log_softmax(-1)

    def texts(
        self, generated_RT: Int[np.ndarray, "R T"], measured: Float[np.ndarray, "3 R T"] | None
    ) -> Iterator[Text]:
        """The rows as texts."""
        shape = (len(self.arms), len(self.prompts), self.sampling.n_samples)
        clean = list(self.arms).index(UNSTEERED)
        pieces, special = self.model.pieces, self.model.encoder.special
        for row, (arm, prompt, sample) in enumerate(np.ndindex(shape)):
            tokens = generated_RT[row]
            apart = np.flatnonzero(tokens != generated_RT[np.ravel_multi_index((clean, prompt, sample), shape)])
            length = int((tokens >= 0).sum())
            tokens = tokens[:length]
            yield Text(
                list(self.arms)[arm], prompt, sample, tokens,
                show_text([pieces[token] for token in tokens.tolist()]),
                pieces.text([token for token in tokens.tolist() if token not in special]),
                int(apart[0]) if len(apart) else None,
                *(np.zeros((3, 0), np.float32) if measured is None else measured[:, row, :length]),
            )  # fmt: skip


class _Seen:
    """Which tokens each row's text holds."""

    def __init__(self, ids: Int[Tensor, "R C"], padding: Tensor | None, n_vocab: int) -> None:
        self.there = torch.zeros(len(ids), n_vocab, dtype=torch.bool, device=ids.device)
        for row, start in enumerate([0] * len(ids) if padding is None else padding.tolist()):
            self.there[row, ids[row, start:]] = True

    def add(self, tokens: Int[Tensor, " R"]) -> None:
        self.there[torch.arange(len(tokens), device=tokens.device), tokens] = True

    def penalised(self, logits_RV: Float[Tensor, "R V"], penalty: float) -> Float[Tensor, "R V"]:
        changed = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
        return torch.where(self.there, changed, logits_RV)


def _nucleus(logits_RV: Float[Tensor, "R V"], top_p: float) -> Float[Tensor, "R V"]:
    """−∞ but for the fewest tokens whose probabilities reach `top_p` (Holtzman et al. 2020, section 3.1)."""
    ordered, order = logits_RV.softmax(-1).sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p
    return logits_RV.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
