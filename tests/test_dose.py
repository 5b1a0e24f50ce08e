"""Dose-response and scores on an SAE with one planted latent: it fires on a token, and its direction brings that token."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDTH

from saebench.cli import main
from saebench.files import read_json, write_json
from saebench.index import FeatureIndex, IndexConfig, build_index
from saebench.labels import syntax
from saebench.models import LanguageModel, capture, load_model, logits
from saebench.sae import SAE, initialise, new_sae, save_sae
from saebench.steer import Bench, Sampling, arms_of, bench_with, generate, open_bench, scores, steered
from saebench.steer.dose import (
    DoseConfig,
    DoseResponse,
    control_of,
    dose_response,
    held_out,
    top_tokens,
)
from saebench.steer.reading import Reading, diversity, figures
from saebench.steer.run import SteerConfig, rank, read_sweep, steer, sweep
from saebench.steer.scores import ScoreConfig, are_complete, read_scores, score, scores_path
from saebench.store import Store, open_store
from saebench.text import encoder_of
from saebench.train.recipes import RECIPES
from saebench.view import charts

LATENTS, PLANTED = 24, 7
ARMS = ("unsteered", "steered", "random", "negative")
DOSES = DoseConfig(
    strengths=("0.5n", "2n", "8n"),
    prompts=6,
    prompt_tokens=6,
    n_samples=4,
    max_new_tokens=6,
    held_out=3,
    held_out_tokens=CONTEXT,
)


@pytest.fixture(scope="module")
def token(store: Store) -> int:
    """The most frequent token."""
    tokens = np.concatenate([shard.column("tokens") for shard in store.of_split("train")])
    return int(np.bincount(tokens[tokens > 0]).argmax())


@pytest.fixture(scope="module")
def folder(store: Store, token: int, tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    shards = store.of_split("train")
    keep = np.concatenate([shard.column("keep") for shard in shards])
    x_RD = torch.cat([shard.rows(HOOK) for shard in shards])[torch.from_numpy(keep)]
    there = torch.from_numpy(np.concatenate([shard.column("tokens") for shard in shards])[keep] == token)
    covariance = torch.cov(x_RD.T) + 1e-3 * torch.eye(WIDTH)
    direction = torch.linalg.solve(covariance, x_RD[there].mean(0) - x_RD[~there].mean(0))
    sae = new_sae("relu", WIDTH, LATENTS)
    initialise(sae, x_RD.mean(0), torch.Generator().manual_seed(2), RECIPES["relu"].gains)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_enc[:, PLANTED] = direction
        sae.b_enc[PLANTED] = sae.b_dec @ direction - (x_RD[there] @ direction).quantile(0.4)
        unembedding = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32").module.lm_head.weight[token]
        sae.W_dec[PLANTED] = unembedding / unembedding.norm()
    path = tmp_path_factory.mktemp("planted") / "saes" / "planted"
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(sae, path, metadata)
    build_index(IndexConfig(sae=path))
    return path


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return open_bench(folder, device="cpu")


@pytest.fixture(scope="module")
def index(bench: Bench) -> FeatureIndex:
    assert bench.index
    return bench.index


@pytest.fixture(scope="module")
def model(bench: Bench) -> LanguageModel:
    return bench.model


@pytest.fixture(scope="module")
def response(bench: Bench, index: FeatureIndex) -> DoseResponse:
    return dose_response(bench.model, bench.intervention(PLANTED, 0), index, DOSES)


def test_a_direction_that_brings_its_token_is_found_to(response: DoseResponse, index: FeatureIndex, token: int) -> None:
    rule = index[PLANTED].rule
    assert rule
    assert rule.text.startswith("token ")
    unsteered, *doses = response.doses
    assert (unsteered.arm, unsteered.kl, unsteered.logits, unsteered.concept) == ("unsteered", 0, 0, 0)
    assert unsteered.fluency == 1
    assert [dose.arm for dose in doses] == ["steered", "random", "other"] * 3
    strong, random, other = doses[6:]
    assert strong.norm == pytest.approx(8, rel=1e-5)
    assert strong.concept > 0.6
    assert strong.rule is not None
    assert strong.rule > 0.9
    assert max(random.concept, other.concept) < 0.5
    assert strong.logits > 4 * abs(random.logits)  # of 32 dimensions a random direction has about a fifth
    assert doses[0].kl < doses[3].kl < doses[6].kl
    assert set(response.samples) == {"unsteered", "steered"}
    for dose in [*response.doses, *response.tested]:
        assert 0 <= dose.score <= 1
        assert set(dose.intervals) == set(dose._fields) - {"arm", "strength", "norm", "intervals"}
        assert all(low <= getattr(dose, name) <= high for name, (low, high) in dose.intervals.items())
    assert strong.diversity < 0.9 * unsteered.diversity


def test_the_best_strength_is_chosen_on_one_half_and_told_by_the_other(
    response: DoseResponse, bench: Bench, index: FeatureIndex
) -> None:
    prompts = held_out(index.store, DOSES.prompts, DOSES.prompt_tokens, DOSES.seed)
    start = bench.intervention(PLANTED, 0)
    assert [dose.arm for dose in response.tested] == ["steered", "random", "other"]
    assert {dose.strength for dose in response.tested} == {response.best.strength}
    # Other prompts that test do not change what is chosen, and other texts are told of.
    swapped = [prompts[place] if place % 2 == 0 else prompts[1] for place in range(len(prompts))]
    again = dose_response(bench.model, start, index, DOSES, prompts=swapped)
    assert again.best.strength == response.best.strength
    assert again.best.cross_entropy != response.best.cross_entropy
    assert response.to_json()["best"] == response.best.strength


def test_concept_does_not_hang_on_a_rule(
    response: DoseResponse, bench: Bench, index: FeatureIndex, tmp_path: Path
) -> None:
    """A latent whose rule sees nothing in what was written (such as "inside comment", of texts that begin anywhere) is measured all the same."""
    path = tmp_path / "blind.h5"
    shutil.copy(index.path, path)
    with h5py.File(path, "r+") as file:
        file["rules/fit_f1"][PLANTED] = np.nan  # type: ignore[index]
    with FeatureIndex(path, index.store) as blind:
        found = dose_response(bench.model, bench.intervention(PLANTED, 0), blind, DOSES)
    assert {dose.rule for dose in found.doses} == {None}
    assert [dose.concept for dose in found.doses] == [dose.concept for dose in response.doses]
    assert found.best.concept > 0


def test_figures_of_a_dose_are_those_of_its_texts(
    response: DoseResponse, bench: Bench, index: FeatureIndex, model: LanguageModel
) -> None:
    """The same texts again, and every figure by hand."""
    unsteered, dose = response.doses[0], response.doses[4]
    assert (dose.arm, dose.norm) == ("steered", pytest.approx(2))
    prompts = held_out(index.store, 6, 6, 0)
    made = generate(
        model, prompts, arms_of([bench.intervention(PLANTED, dose.strength)]), Sampling(max_new_tokens=6, n_samples=4)
    )
    top, firings = top_tokens(index)[PLANTED].tolist(), index.histograms[PLANTED]
    firing: dict[str, list[float]] = {}
    for arm, told in (("unsteered", unsteered), ("steered", dose)):
        texts = made.of(arm)
        assert told.cross_entropy == pytest.approx(np.mean([text.cross_entropy for text in texts]), rel=1e-4)
        assert told.top_tokens == np.mean([any(token in top for token in text.tokens.tolist()) for text in texts])
        assert told.diversity == pytest.approx(np.mean([diversity(text.tokens) for text in texts]))
        acts = [fires(model, bench.sae, np.concatenate([prompts[text.prompt], text.tokens]))[6:] for text in texts]
        special = [np.isin(text.tokens, list(model.encoder.special)) for text in texts]
        acts = [values[~left_out] for values, left_out in zip(acts, special, strict=True)]
        assert told.activation == pytest.approx(
            np.mean([values.mean() if len(values) else 0 for values in acts]), rel=1e-4
        )
        # Above the median: in a bin beyond that of the middle firing, or in the upper part of its own.
        middle = int(np.searchsorted(firings.cumsum(), firings.sum() / 2))
        lower, upper = index.bin_edges[middle], min(index.bin_edges[middle + 1], index.columns["max"][PLANTED])
        median = lower + (upper - lower) * (firings.sum() / 2 - firings[:middle].sum()) / firings[middle]
        firing[arm] = [float((values > median).mean()) if len(values) else 0.0 for values in acts]
        assert told.firing == pytest.approx(np.mean(firing[arm]))
    signs = [
        np.sign(firing["steered"][4 * prompt + one] - firing["unsteered"][4 * prompt + two])
        for prompt, one, two in np.ndindex(6, 4, 4)
    ]
    assert dose.concept == pytest.approx(np.mean(signs))
    assert dose.concept > 0.2
    ids = torch.tensor(np.stack(held_out(index.store, 3, CONTEXT, 0))).long()
    with torch.inference_mode():
        clean = logits(model, ids)
        with steered(model, [bench.intervention(PLANTED, dose.strength)]):
            own = logits(model, ids)
    change = own - clean
    assert dose.logits == pytest.approx(float(change[..., top].mean() - change.mean()), rel=1e-3)
    clean, own = clean.log_softmax(-1), own.log_softmax(-1)
    assert dose.kl == pytest.approx(float((clean.exp() * (clean - own)).sum(-1).mean()), rel=1e-3)


def fires(model: LanguageModel, sae: SAE, tokens: np.ndarray) -> np.ndarray:
    x_LD = capture(model, torch.tensor(tokens)[None], [HOOK])[HOOK][0]
    with torch.no_grad():
        return sae.encode(x_LD)[:, PLANTED].numpy()


def reading(firing: object, cross_entropy: object, diversity: object) -> Reading:
    """Of two prompts, two texts each."""
    columns = [np.broadcast_to(np.array(column, float), (2, 2)) for column in (firing, cross_entropy, diversity)]
    nothing = np.zeros((2, 2))
    return Reading(columns[0], nothing, columns[1], columns[2], nothing, nothing, None)


def told(texts: Reading, unsteered: Reading) -> tuple[float, float, float]:
    found = figures(texts, unsteered, np.arange(2)[None])
    return tuple(float(found[name][0]) for name in ("concept", "fluency", "score"))  # type: ignore[index, return-value]


def test_concept_is_how_often_a_text_fires_more_than_an_unsteered_one_of_its_prompt() -> None:
    unsteered = reading([[0.0, 0.1], [0.5, 0.5]], 2.0, 1.0)
    assert told(reading([[0.2, 0.2], [0.6, 1.0]], 2.0, 1.0), unsteered) == (1, 1, 1)
    # 0.1 beats one of two and ties with the other, 0 ties with one and loses to the other; 0.6 beats both, 0.4 neither.
    assert told(reading([[0.1, 0.0], [0.6, 0.4]], 2.0, 1.0), unsteered)[0] == 0
    assert told(reading([[0.1, 0.1], [0.6, 0.5]], 2.0, 1.0), unsteered)[0] == pytest.approx(0.5)
    assert told(reading(0.0, 2.0, 1.0), unsteered)[0] == 0  # less than without steering is no concept
    # A rare latent and a frequent one, at other scales, ask the same.
    assert told(reading(0.04, 2.0, 1.0), reading(0.0, 2.0, 1.0)) == told(reading(0.9, 2.0, 1.0), reading(0.5, 2.0, 1.0))


def test_fluency_falls_with_surprise_too_high_or_too_low_and_with_repeats() -> None:
    unsteered = reading(0.0, [[2.0, 3.0], [2.0, 3.0]], 0.9)
    assert told(reading(0.0, [[3.0, 3.0], [2.0, 2.0]], 0.9), unsteered)[1] == 1  # the same surprise, by other texts
    assert told(reading(0.0, [[3.0, 4.0], [3.0, 4.0]], 0.9), unsteered)[1] == pytest.approx(np.exp(-1))
    assert told(reading(0.0, [[1.0, 2.0], [1.0, 2.0]], 0.9), unsteered)[1] == pytest.approx(np.exp(-1))
    # Half garbled, half collapsed: ordinary on average, and no ordinary text among them.
    assert told(reading(0.0, [[0.0, 5.0], [0.0, 5.0]], 0.9), unsteered)[1] == pytest.approx(np.exp(-2))
    assert told(reading(0.0, [[2.0, 3.0], [2.0, 3.0]], 0.45), unsteered)[1] == pytest.approx(0.5)
    assert told(reading(0.0, [[2.0, 3.0], [2.0, 3.0]], 1.0), unsteered)[1] == 1
    # `++++++++++` fires the latent at every token, and a weak dose that does so now and then is better.
    plus = reading(1.0, 0.3, diversity(np.full(24, 11)))
    weak = reading([[0.0, 0.1], [0.0, 0.0]], [[2.1, 3.1], [2.1, 3.1]], 0.9)
    assert told(plus, unsteered)[0] == 1
    assert told(plus, unsteered)[2] < 0.01 < told(weak, unsteered)[2]


def test_diversity_by_hand() -> None:
    assert diversity(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(4 / 7 * 4 / 6 * 4 / 5)
    assert diversity(np.array([1, 1, 1, 1])) == pytest.approx(1 / 3 * 1 / 2)
    assert diversity(np.array([1, 2, 1])) == 1
    assert diversity(np.array([], int)) == 1


def test_the_control_latent_fires_about_as_often_in_another_direction(bench: Bench, index: FeatureIndex) -> None:
    density = index.columns["density"]
    rows = torch.nn.functional.normalize(bench.sae.W_dec.detach(), dim=1)
    drawn = {control_of(index, bench.sae, PLANTED, seed) for seed in range(8)}
    assert len(drawn) > 1
    assert control_of(index, bench.sae, PLANTED, 0) == control_of(index, bench.sae, PLANTED, 0)
    for other in drawn:
        assert other is not None
        assert other != PLANTED
        assert density[other] > 0
        assert abs(float(rows[other] @ rows[PLANTED])) < 0.3
    alike = copy.deepcopy(bench.sae)
    with torch.no_grad():
        alike.W_dec[:] = alike.W_dec[PLANTED]
    assert control_of(index, alike, PLANTED, 0) is None
    one = dataclasses.replace(bench.intervention(PLANTED, "1n"), instead=3)
    assert torch.allclose(one.directions()[HOOK] / bench.sae.W_dec[PLANTED].norm(), rows[3], atol=1e-6)
    with pytest.raises(ValueError, match="instead is latent 24; the SAE has 0 to 23"):
        dataclasses.replace(one, instead=24)


def test_the_chart_has_both_controls_and_bars(response: DoseResponse) -> None:
    found = response.to_json()
    figure = charts.dose_response(json.loads(json.dumps(found)), now=1.0)
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        f"latent {PLANTED}", "a random direction", f"latent {response.other}, of the same density",
    ]  # fmt: skip
    assert len(figure.data) == 12  # concept, fluency, score, kl
    for trace in figure.data:
        assert len(trace.x) == 4
        assert min(*trace.error_y.array, *trace.error_y.arrayminus) >= 0
    alone = (
        found
        | {"other": None}
        | {name: [dose for dose in found[name] if dose["arm"] != "other"] for name in ("doses", "tested")}
    )
    assert len(charts.dose_response(alone).data) == 8


def test_output_scores_are_the_gain_of_the_top_tokens_when_clamped(
    bench: Bench, index: FeatureIndex, model: LanguageModel
) -> None:
    config = ScoreConfig(strength=2.0, prompts=4, prompt_tokens=8)
    found = score(model, bench.sae, index, config)
    assert int(found.output.argmax()) == PLANTED
    assert found.input[PLANTED] == index.columns["rule_f1"][PLANTED]
    prompts = torch.tensor(np.stack(held_out(index.store, 4, 8, 0))).long()
    for latent in (PLANTED, 11):
        one = bench.intervention(latent, "2n", "clamp")
        with torch.inference_mode():
            before = logits(model, prompts)[:, -1].softmax(-1)
            with steered(model, [one]):
                after = logits(model, prompts)[:, -1].softmax(-1)
        gain = (after - before)[:, top_tokens(index)[latent]].sum(-1)
        assert found.output[latent] == pytest.approx(float(gain.mean()), abs=1e-5)
        assert found.rising[latent] == float((gain > 0).float().mean())
    again = read_scores(index)
    assert again is not None
    np.testing.assert_array_equal(again.output, found.output)
    assert again.measured.all()


def test_a_screen_chooses_which_latents_are_measured_whole(
    bench: Bench, index: FeatureIndex, model: LanguageModel
) -> None:
    """The others' scores are estimates, and say so; what was measured stays when more is asked for."""
    scores_path(index.path).unlink(missing_ok=True)
    config = ScoreConfig(strength=2.0, prompts=4, prompt_tokens=8, whole=6)
    every = score(model, bench.sae, index, dataclasses.replace(config, whole=LATENTS))
    assert every is not None
    scores_path(index.path).unlink()
    found = score(model, bench.sae, index, config)
    assert found is not None
    assert found.measured.sum() == 6
    assert found.measured[PLANTED]
    np.testing.assert_allclose(found.output[found.measured], every.output[found.measured], atol=1e-6)
    assert np.isfinite(found.output).all()
    assert np.isfinite(found.screen).all()
    others = np.flatnonzero(~found.measured)[:2]
    more = score(model, bench.sae, index, config, among=others)
    assert more is not None
    assert more.measured.sum() == 8
    np.testing.assert_allclose(more.output[others], every.output[others], atol=1e-6)
    # Of another index they are not read, and of other settings they are begun anew.
    alone = score(model, bench.sae, index, dataclasses.replace(config, strength=1.0), among=others)
    assert alone is not None
    assert np.isnan(alone.screen).all()
    assert np.isfinite(alone.output).sum() == 2
    assert alone.measured.sum() == 2


def test_scoring_that_is_stopped_keeps_what_it_has(folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    index, config = bench.index, ScoreConfig(prompts=2, whole=4)
    assert index
    scores_path(index.path).unlink(missing_ok=True)
    want = score(bench.model, bench.sae, index, config)
    assert want is not None
    scores_path(index.path).unlink()
    monkeypatch.setattr(scores, "_HELD", 5 * 2 * bench.model.n_vocab)  # five latents at once
    with monkeypatch.context() as patch:
        patch.setattr(scores, "interruptible", lambda: contextlib.nullcontext(Stops(after=2)))
        assert score(bench.model, bench.sae, index, config) is None
    kept = read_scores(index)
    assert kept is not None
    assert np.isfinite(kept.output).sum() == 10
    got = score(bench.model, bench.sae, index, config)
    assert got is not None
    for name, values in want._asdict().items():
        np.testing.assert_allclose(getattr(got, name), values, atol=1e-6)
    # Stopped between the two, and complete.
    scores_path(index.path).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(scores, "interruptible", lambda: contextlib.nullcontext(Stops(after=LATENTS // 5 + 1)))
        assert score(bench.model, bench.sae, index, config) is None
    kept = read_scores(index)
    assert kept is not None
    assert not kept.measured.any()
    with monkeypatch.context() as patch:
        patch.setattr("saebench.steer.run.score", functools.partial(score, config=config))
        _, ranked, _ = rank(SteerConfig(sae=folder))
        assert ranked.measured.sum() == 4
        patch.setattr(scores, "_Trial", None)  # nothing is left to try
        np.testing.assert_array_equal(rank(SteerConfig(sae=folder))[1].output, ranked.output)


class Stops:
    """An interruption after so many looks."""

    def __init__(self, after: int) -> None:
        self.looks, self.after = 0, after

    @property
    def requested(self) -> bool:
        self.looks += 1
        return self.looks > self.after


def test_scores_of_another_index_are_not_read(bench: Bench, index: FeatureIndex, model: LanguageModel) -> None:
    score(model, bench.sae, index, ScoreConfig(prompts=2))
    with h5py.File(scores_path(index.path), "r+") as file:
        file.attrs["identity"] = json.dumps({**index.identity, "sae": "0"})
    assert read_scores(index) is None


def test_scores_of_another_index_are_not_complete(bench: Bench, index: FeatureIndex, model: LanguageModel) -> None:
    score(model, bench.sae, index, ScoreConfig(prompts=2))
    assert are_complete(index.path)
    with h5py.File(scores_path(index.path), "r+") as file:
        file.attrs["identity"] = json.dumps({**index.identity, "sae": "0"})
    assert not are_complete(index.path)


def test_a_sweep_says_what_it_belongs_to_and_is_refused_elsewhere(
    folder: Path, index: FeatureIndex, tmp_path: Path
) -> None:
    out = tmp_path / "dose.json"
    sweep(
        SteerConfig(
            sae=folder, device="cpu", latent=(PLANTED,), strength=("2n",), max_new_tokens=2, positions="prompt", out=out
        )
    )
    found = read_sweep(out, index, PLANTED, "add", "prompt")
    assert found["of"] == index.belonging
    for wrong, message in (
        ((PLANTED, "add", "all"), "measured with positions 'prompt'; expected 'all'"),
        ((PLANTED, "clamp", "prompt"), "measured with mode 'add'; expected 'clamp'"),
        ((0, "add", "prompt"), f"measured with latent {PLANTED}; expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_sweep(out, index, *wrong)  # type: ignore[arg-type]
    for what in ("sae", "index"):
        write_json(out, found | {"of": found["of"] | {what: "0"}})
        with pytest.raises(ValueError, match=rf"dose.json was made from another {what}: it says 0, .* measure again"):
            read_sweep(out, index, PLANTED, "add", "prompt")
    write_json(out, {name: value for name, value in found.items() if name != "of"})
    with pytest.raises(ValueError, match="does not say of which SAE and index it is: measure again"):
        read_sweep(out, index, PLANTED, "add", "prompt")
    write_json(out, {name: value for name, value in found.items() if name != "version"})
    with pytest.raises(ValueError, match="is a dose-response of version 1, this saebench reads 2: .*; measure again"):
        read_sweep(out, index, PLANTED, "add", "prompt")
    write_json(out, [1])
    with pytest.raises(ValueError, match="is no dose-response: measure again"):
        read_sweep(out, index, PLANTED, "add", "prompt")


def test_held_out_prompts_are_chosen_by_the_seed(store: Store) -> None:
    few, more = held_out(store, 3, 5, 1), held_out(store, 9, 5, 1)
    assert all((a == b).all() for a, b in zip(few, more, strict=False))
    bos = encoder_of(store.tokenizer()).bos
    assert all(prompt[0] == bos and len(prompt) == 5 for prompt in more)
    assert not all((a == b).all() for a, b in zip(few, held_out(store, 3, 5, 2), strict=True))
    with pytest.raises(
        ValueError, match=r"10000 held-out prompts of 5 tokens were asked for; .* has \d+ contexts of 16"
    ):
        held_out(store, 10_000, 5, 0)


def test_syntax_errors_are_a_share_of_the_text() -> None:
    assert syntax.share_in_errors(b"") == 0
    assert syntax.share_in_errors(b"def f(a):\n    return a\n") == 0
    assert 0 < syntax.share_in_errors(b"x = 1\ny = = 2\nz = 3\n") < 0.5
    assert syntax.share_in_errors(b"He said, that is: no $ ? (") > 0.2


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], token: int) -> None:
    out = tmp_path / "texts.json"
    common = ["steer", "--sae", str(folder), "--device", "cpu", "--latent", str(PLANTED)]
    assert (
        main(
            [
                *common,
                "--strength",
                "40n",
                "--prompt",
                "the cat",
                "--n",
                "2",
                "--max-new-tokens",
                "5",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("===")] == [
        f"=== {arm}" for arm in ARMS
    ]
    texts = json.loads(out.read_text())["texts"]
    assert len(texts) == 8
    counts = {arm: sum(text["tokens"].count(token) for text in texts if text["arm"] == arm) for arm in ARMS}
    assert counts["steered"] >= 2 + max(counts[arm] for arm in ARMS if arm != "steered"), counts
    assert main([*common, "--strength", "40n", "--positions", "generated", "--n", "1", "--max-new-tokens", "3"]) == 0
    assert "(differs from token 0 on)" not in capsys.readouterr().out  # it is predicted from the prompt alone
    assert main([*common, "--sweep", "--strength", "1n", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.splitlines()]
    assert [line[0] for line in table[2:6]] == ["unsteered", "steered", "random", "other"]
    assert table[3][1] == "*"
    assert re.search(r"steered .* 0\.\d\d \(0\.\d\d to [01]\.\d\d\)", shown)
    assert "on half of the prompts; on the other half" in shown
    assert main(["steer", "rank", "--sae", str(folder), "--device", "cpu", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    outputs = [float(line.split()[1]) for line in lines[2:]]
    assert outputs == sorted(outputs, reverse=True)


def test_bad_input_says_what_is_wrong(folder: Path, store: Store, tmp_path: Path) -> None:
    def settings(**values: object) -> SteerConfig:
        return SteerConfig(**{"sae": folder, "device": "cpu", "max_new_tokens": 4, **values})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"no latent was named; choose with --latent"):
        steer(settings())
    with pytest.raises(ValueError, match="2 strengths for 1 latents"):
        settings(latent=(1,), strength=("1", "2"))
    with pytest.raises(ValueError, match="latent is 24; the SAE has 0 to 23"):
        steer(settings(latent=(24,)))
    with pytest.raises(ValueError, match="latent is 99; the SAE has 0 to 23"):
        rank(settings(latent=(99,)))
    assert steer(settings(latent=(1,), mode="ablate", n=1)).of("steered")
    with pytest.raises(ValueError, match="strength 'nan' is not known"):
        steer(settings(latent=(1,), strength=("nan",)))
    with pytest.raises(ValueError, match="--sweep is of one latent"):
        sweep(settings(latent=(1, 2)))
    with pytest.raises(ValueError, match="ablate has no strength to vary"):
        sweep(settings(latent=(1,), mode="ablate"))
    with pytest.raises(ValueError, match="strength '0.5n' has a unit; what scale takes is a factor"):
        steer(settings(latent=(1,), mode="scale"))
    bench = open_bench(folder, device="cpu")
    assert bench.index
    with pytest.raises(ValueError, match=r"there is 1 prompt; expected at least 2: one half chooses"):
        dose_response(bench.model, bench.intervention(PLANTED, 1), bench.index, prompts=[np.array([0, 5])])
    bench.index.columns["fires"][3] = 0
    with pytest.raises(ValueError, match=r"latent 3 never fired in .*planted.h5: there is no firing of its own"):
        dose_response(bench.model, bench.intervention(3, 1), bench.index)
    assert len(sweep(settings(latent=(PLANTED,), prompt="the cat", strength=("1n",))).doses) == 4
    scaled = sweep(settings(latent=(PLANTED,), mode="scale", prompt="the cat"))
    assert sorted({dose.strength for dose in scaled.doses if dose.arm == "steered"}) == [0, 2, 4, 8, 16]
    bare = tmp_path / "saes" / "bare"
    metadata = {"model_name": store.manifest["identity"]["model"]["id"], "hook_name": HOOK, "context_size": CONTEXT}
    save_sae(new_sae("relu", WIDTH, 8), bare, metadata)
    with pytest.raises(ValueError, match="the median norm is not known without an index"):
        steer(settings(sae=bare, latent=(1,)))
    with pytest.raises(ValueError, match="has no index; run `saebench index"):
        rank(settings(sae=bare))
    made = steer(settings(sae=bare, latent=(1,), strength=("2",), prompt="the cat", n=1))  # raw needs none
    assert [text.arm for text in made.texts] == ["unsteered", "steered", "random", "negative"]


def test_a_model_that_changed_since_is_refused_with_an_index_and_without(folder: Path, bench: Bench) -> None:
    changed = dataclasses.replace(bench.model, weights_hash="0", folder=folder)
    for index in (bench.index, None):
        other = bench_with(folder, index, "cpu", load=lambda name, **options: changed)
        with pytest.raises(ValueError, match=r"has weights 0, store .* was made with"):
            _ = other.model


def test_the_model_is_asked_for_as_it_was_harvested(folder: Path, bench: Bench, tmp_path: Path) -> None:
    """By the store's name and revision, unless it lies where the SAE says; and on the bench's device, as the SAE is."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> LanguageModel:
        asked.append((name, options))
        return bench.model

    assert bench.index is not None
    store = Path(shutil.copytree(bench.index.store.folder, tmp_path / "store"))
    manifest = read_json(store / "manifest.json")
    manifest["identity"]["model"] |= {"id": "someone/model", "revision": "abc"}
    write_json(store / "manifest.json", manifest)
    hashed = open_store(store).hash
    sae = Path(shutil.copytree(folder, tmp_path / "saes" / folder.name))
    config = read_json(sae / "cfg.json")
    config["metadata"] |= {"model_name": "an-alias-of-it"}
    config["metadata"]["saebench"] = {"store": str(store), "identity": {"store": hashed}}
    write_json(sae / "cfg.json", config)
    _ = bench_with(sae, None, "cpu", load=load).model
    assert asked == [("someone/model", {"revision": "abc", "device": "cpu"})]
    config["metadata"]["model_name"] = str(bench.model.folder)
    write_json(sae / "cfg.json", config)
    _ = bench_with(sae, None, "cpu", load=load).model
    assert asked[1:] == [(str(bench.model.folder), {"revision": "abc", "device": "cpu"})]
    config["metadata"]["saebench"]["identity"]["store"] = "0" * 32  # another store lies there by now
    write_json(sae / "cfg.json", config)
    _ = bench_with(sae, None, "cpu", load=load).model
    assert asked[2:] == [(str(bench.model.folder), {"revision": None, "device": "cpu"})]


def test_sae_and_model_are_on_the_device_of_the_bench(folder: Path, bench: Bench) -> None:
    other = bench_with(folder, bench.index, "cpu", load=lambda name, **options: bench.model)
    object.__setattr__(other, "device", "meta")  # a device that every machine has
    assert other.sae.W_dec.device.type == "meta"
    assert bench.sae.W_dec.device.type == "cpu"
    assert other.key[:3] == bench.key[:3]
    assert other.key != bench.key
