"""Dose-response and scores on an SAE with one planted latent: it fires on a token, and its direction brings that token."""

import contextlib
import dataclasses
import functools
import json
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
from saebench.models import LanguageModel, load_model, logits
from saebench.sae import initialise, new_sae, save_sae
from saebench.steer import Bench, Sampling, arms_of, bench_with, generate, open_bench, scores, steered
from saebench.steer.dose import (
    Dose,
    DoseConfig,
    DoseResponse,
    dose_response,
    held_out,
    repetition,
    top_tokens,
)
from saebench.steer.run import SteerConfig, rank, read_sweep, steer, sweep
from saebench.steer.scores import ScoreConfig, are_complete, read_scores, score, scores_path
from saebench.store import Store, open_store
from saebench.text import encoder_of
from saebench.train.recipes import RECIPES
from saebench.view import charts

LATENTS, PLANTED = 24, 7
ARMS = ("unsteered", "steered", "random", "negative")
DOSES = DoseConfig(
    strengths=("0.5n", "2n", "8n"), prompts=6, prompt_tokens=6, n_samples=4, max_new_tokens=6, held_out=3
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
    assert "token is" in rule.text
    unsteered, *doses = response.doses
    assert (unsteered.arm, unsteered.kl, unsteered.logits, unsteered.concept) == ("unsteered", 0, 0, 0)
    assert [dose.arm for dose in doses] == ["steered", "random"] * 3
    strong, random = doses[4], doses[5]
    assert strong.norm == pytest.approx(8, rel=1e-5)
    assert strong.rule is not None
    assert strong.rule > 0.9
    assert unsteered.rule is not None
    assert strong.concept == pytest.approx(strong.rule - unsteered.rule)
    assert strong.logits > 4 * abs(random.logits)  # of 32 dimensions a random direction has about a fifth
    assert random.rule is not None
    assert random.rule < 0.7
    assert doses[0].kl < doses[2].kl < doses[4].kl
    assert all(0 <= dose.score <= 1 and 0 <= dose.fluency <= 1 for dose in response.doses)
    assert response.best.score == max(dose.score for dose in doses if dose.arm == "steered")
    assert set(response.samples) == {"unsteered", "steered"}


def test_figures_of_a_dose_are_those_of_its_texts(
    response: DoseResponse, bench: Bench, index: FeatureIndex, model: LanguageModel
) -> None:
    """The same texts again, and every figure by hand."""
    dose = response.doses[3]
    prompts = held_out(index.store, 6, 6, 0)
    made = generate(
        model, prompts, arms_of([bench.intervention(PLANTED, dose.strength)]), Sampling(max_new_tokens=6, n_samples=4)
    )
    texts = made.of("steered")
    assert dose.cross_entropy == pytest.approx(-np.concatenate([text.clean_logp for text in texts]).mean(), rel=1e-4)
    top = top_tokens(index)[PLANTED].tolist()
    assert dose.top_tokens == np.mean([any(token in top for token in text.tokens.tolist()) for text in texts])
    assert dose.repetition == pytest.approx(np.mean([repetition(text.tokens) for text in texts]))
    ids = torch.tensor(np.stack(held_out(index.store, 3, CONTEXT, 0))).long()
    with torch.inference_mode():
        clean = logits(model, ids)
        with steered(model, [bench.intervention(PLANTED, dose.strength)]):
            own = logits(model, ids)
    change = own - clean
    assert dose.logits == pytest.approx(float(change[..., top].mean() - change.mean()), rel=1e-3)
    clean, own = clean.log_softmax(-1), own.log_softmax(-1)
    assert dose.kl == pytest.approx(float((clean.exp() * (clean - own)).sum(-1).mean()), rel=1e-3)


def test_the_best_dose_is_that_of_the_highest_harmonic_mean() -> None:
    def dose(strength: float, concept: float, fluency: float, arm: str = "steered") -> Dose:
        return Dose(arm, strength, None, 0.0, 0.0, 0.0, 0.0, 0.0, None, 0.0, concept, fluency)

    doses = [
        dose(0.0, 0.0, 1.0, "unsteered"),
        dose(1.0, 0.2, 1.0),
        dose(2.0, 0.6, 0.6),
        dose(3.0, 1.0, 0.3),
        dose(9.0, 1.0, 1.0, "random"),
    ]
    response = DoseResponse(0, "add", doses, {})
    assert response.best.strength == 2.0
    assert response.best.score == pytest.approx(0.6)
    assert response.to_json()["best"] == 2.0
    assert len(charts.dose_response(response.to_json()).data) == 10


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
    found, says = read_sweep(out, index, PLANTED, "add", "prompt")
    assert says
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
    assert not read_sweep(out, index, PLANTED, "add", "prompt")[1]
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


def test_repetition_by_hand() -> None:
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)
    assert repetition(np.array([1, 1])) == 0


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
    scaled = sweep(settings(latent=(PLANTED,), mode="scale"))
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
