import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import processes
import pytest
import torch
from conftest import CONTEXT, HOOK, LATENTS, WIDTH, an_sae, sentences
from scipy.stats import chisquare

from saebench.evaluate import EvalConfig, evaluate, write_report
from saebench.evaluate.attribution import logit_of
from saebench.files import write_json
from saebench.harvest import HarvestConfig, harvest
from saebench.index import FeatureIndex, IndexConfig, build_index, open_feature_index, plan, publish
from saebench.index.build import _static
from saebench.index.compare import KINDS, compare
from saebench.index.decoder import geometry
from saebench.index.derive import companions, flags, intervals, token_counts
from saebench.index.evidence import (
    N_BINS,
    PASSAGE,
    RANDOM,
    TOP,
    Evidence,
    Sample,
    Unit,
    bin_edges,
    bins_of,
    hashed,
    passages,
    position_edges,
    rows_of,
    rows_of_top,
    sample,
    summarise,
    values_of_top,
)
from saebench.index.examples import show
from saebench.index.names import Names
from saebench.index.page import candidates_html
from saebench.index.plan import plan_of
from saebench.index.search import differences, features_for_text, token_of
from saebench.index.texts import AROUND, ExampleTexts
from saebench.models import capture, edits, load_model, logits, spliced_logits, unembedding
from saebench.sae import SAE, Ends, GatedSAE, encode_sparse, initialise, new_sae, save_sae
from saebench.sae.sparse import BLOCK_VALUES
from saebench.steer import open_bench
from saebench.store import Store, open_store
from saebench.text import TextConfig
from saebench.train import TrainConfig, train
from saebench.train.recipes import RECIPES


@pytest.fixture(scope="module")
def saved(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ReLU SAE on disk."""
    folder = tmp_path_factory.mktemp("run") / "saes" / "relu"
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(an_sae("relu", store), folder, metadata)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "UNIT_ROWS", 40 * CONTEXT)  # many units, some of them short
        yield


@pytest.fixture(scope="module")
def index(saved: Path, small_units: None) -> Iterator[FeatureIndex]:
    build_index(IndexConfig(sae=saved, sample=3_000))
    with open_feature_index(saved.parent.parent / "index" / "relu.h5") as opened:
        yield opened


class Everything:
    """All firings on the kept training rows, by dense arithmetic."""

    def __init__(self, sae: SAE, store: Store, split: str = "train") -> None:
        shards = store.of_split(split)
        first = np.cumsum([0, *(shard.n_rows for shard in store.shards)])
        starts = [first[store.shards.index(shard)] for shard in shards]
        self.rows = np.concatenate([start + np.arange(s.n_rows) for start, s in zip(starts, shards, strict=True)])
        self.keep = np.concatenate([shard.column("keep") for shard in shards])
        self.tokens = np.concatenate([shard.column("tokens") for shard in shards])
        self.positions = np.concatenate([shard.column("position") for shard in shards])
        with torch.no_grad():
            acts = sae.encode(torch.cat([shard.rows(HOOK) for shard in shards])).numpy()
        self.acts = acts * self.keep[:, None]
        self.place = {int(row): place for place, row in enumerate(self.rows)}
        docs = np.concatenate([shard.column("doc_id") for shard in shards])
        self.passages = []
        for place, position in enumerate(self.positions.tolist()):
            before = [place]  # back to the first token of its text that the context holds
            while (
                len(before) < min(PASSAGE, position + 1)
                and self.keep[before[-1] - 1]
                and docs[before[-1] - 1] == docs[place]
            ):
                before.append(before[-1] - 1)
            self.passages.append(tuple(self.tokens[before]))

    def value(self, row: int, latent: int) -> float:
        return float(self.acts[self.place[row], latent])


@pytest.fixture(scope="module")
def everything(store: Store) -> Everything:
    return Everything(an_sae("relu", store), store)


# ---------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
def test_a_sparse_code_is_what_the_sae_encodes(architecture: str, store: Store) -> None:
    sae = an_sae(architecture, store)
    x_RD = store.of_split("train")[0].rows(HOOK, 0, 300)
    code, values = encode_sparse(sae, x_RD)
    dense = torch.zeros(300, LATENTS)
    dense[code.rows.long(), code.latents.long()] = values
    expected = sae.encode(x_RD).detach()
    # Where two latents tie for the last place to the last bits, rounding decides: their values are the same all the same.
    torch.testing.assert_close(dense.sort(1).values, expected.sort(1).values, rtol=1e-4, atol=1e-4)
    tied = ((dense > 0) != (expected > 0)).any(1)
    assert tied.sum() <= (3 if architecture == "topk" else 0)
    assert (expected > 0).any()
    torch.testing.assert_close(dense[~tied], expected[~tied], rtol=1e-4, atol=1e-4)


def test_a_sparse_code_obeys_input_normalisation(store: Store) -> None:
    sae = new_sae("relu", WIDTH, LATENTS, normalize="layer_norm")
    initialise(sae, torch.zeros(WIDTH), torch.Generator().manual_seed(0), RECIPES["relu"].gains)
    x_RD = store.of_split("train")[0].rows(HOOK, 0, 50)
    code, values = encode_sparse(sae, x_RD)
    torch.testing.assert_close(
        values, sae.encode(x_RD).detach()[code.rows.long(), code.latents.long()], rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------- against everything at once


def test_sums_are_those_of_all_rows(index: FeatureIndex, everything: Everything) -> None:
    acts, n_rows = everything.acts.astype(np.float64), everything.keep.sum()
    fires = (acts > 0).sum(0)
    assert index.complete
    assert index.share_done == 1.0
    assert index.n_rows == n_rows
    assert np.array_equal(index.columns["fires"], fires)
    assert 0 < fires[0] < n_rows
    assert fires[-1] == 0
    np.testing.assert_allclose(index.columns["density"], fires / n_rows)
    np.testing.assert_allclose(index.columns["mean"], acts.sum(0) / np.maximum(fires, 1), rtol=1e-5)
    some = np.where(acts > 0, acts, np.nan)[:, fires > 1]
    np.testing.assert_allclose(index.columns["std"][fires > 1], np.nanstd(some, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(index.columns["max"], acts.max(0), rtol=1e-5)


def test_top_examples_are_the_strongest_of_each_context(index: FeatureIndex, everything: Everything) -> None:
    """One of each passage that is repeated."""
    by_context = everything.acts.reshape(-1, CONTEXT, LATENTS)
    best, where = by_context.max(1), by_context.argmax(1)
    for latent in range(LATENTS):
        order = np.argsort(-best[:, latent], kind="stable")
        seen = [everything.passages[context * CONTEXT + where[context, latent]] for context in order]
        order = order[np.sort(np.unique([hash(passage) for passage in seen], return_index=True)[1])][:TOP]
        order = order[best[order, latent] > 0]
        found = index[latent].top
        np.testing.assert_allclose([value for _, value in found], best[order, latent], rtol=1e-4)
        rows = everything.rows.reshape(-1, CONTEXT)[order, where[order, latent]]
        if len(np.unique(best[order, latent].round(3))) == len(order):  # else rounding may change the order
            assert [row for row, _ in found] == rows.tolist()
        assert len({row // CONTEXT for row, _ in found}) == len(found)


def test_histogram_and_intervals_count_every_firing_once(index: FeatureIndex, everything: Everything) -> None:
    for latent in range(LATENTS):
        shown, acts = index[latent], everything.acts[:, latent]
        fires = int((acts > 0).sum())
        assert shown.histogram.sum() == fires == sum(interval.fires for interval in shown.intervals)
        assert len(shown.intervals) <= 10
        for before, after in zip(shown.intervals, shown.intervals[1:], strict=False):
            assert before.upper <= after.lower
        for interval in shown.intervals:
            inside = (acts > interval.lower * (1 + 1e-5)) & (acts < interval.upper * (1 - 1e-5))
            near = (acts > interval.lower * (1 - 1e-5)) & (acts < interval.upper * (1 + 1e-5))
            assert inside.sum() <= interval.fires <= near.sum()
            different = {everything.passages[place] for place in np.flatnonzero(near)}
            assert min(5, len({everything.passages[place] for place in np.flatnonzero(inside)})) <= len(
                interval.examples
            )
            assert len(interval.examples) <= min(5, len(different))
            assert len({everything.passages[everything.place[row]] for row, _ in interval.examples}) == len(
                interval.examples
            )
            for row, value in interval.examples:
                assert interval.lower * (1 - 1e-5) <= value <= interval.upper * (1 + 1e-5)
                assert value == pytest.approx(everything.value(row, latent), rel=1e-4, abs=1e-5)


def test_random_examples_are_spread_over_strengths_as_the_firings_are(
    index: FeatureIndex, everything: Everything
) -> None:
    """Over all latents, how many random firings lie in each tenth of their latent's firings: chi-square."""
    observed = np.zeros(10)
    for latent in range(LATENTS):
        acts = everything.acts[:, latent]
        strengths = np.sort(acts[acts > 0])
        found = index[latent].random
        assert len(found) == min(RANDOM, len({everything.passages[place] for place in np.flatnonzero(acts > 0)}))
        assert len({row for row, _ in found}) == len(found)
        if len(strengths) < 200:
            continue
        for row, value in found:
            assert value == pytest.approx(everything.value(row, latent), rel=1e-4, abs=1e-5)
            rank = np.searchsorted(strengths, value) / len(strengths)
            observed[min(9, int(10 * rank))] += 1
    assert observed.sum() > 100
    assert chisquare(observed).pvalue > 0.01


def test_firings_by_position_and_token(index: FeatureIndex, everything: Everything) -> None:
    edges = position_edges(CONTEXT)
    bucket = np.searchsorted(edges, everything.positions, "right") - 1
    fires = everything.acts > 0
    kept_per_bucket = np.bincount(bucket[everything.keep], minlength=len(edges))
    in_sample = hashed(everything.rows) < np.uint64(3_000 * 2**64 // len(everything.rows))
    for latent in (0, 7, 23):
        shown = index[latent]
        expected = np.bincount(bucket, fires[:, latent], len(edges)) / np.maximum(kept_per_bucket, 1)
        np.testing.assert_allclose(shown.positions, expected)
        counts = np.bincount(everything.tokens[fires[:, latent] & in_sample])
        assert shown.tokens.values[0] == counts.max()
        assert np.array_equal(counts[shown.tokens.ids], shown.tokens.values)


def test_companions_are_those_of_the_sampled_rows(index: FeatureIndex) -> None:
    part = index.sample("train")
    assert 2_500 < len(part.rows) < 3_500
    fires = np.zeros((len(part.rows), LATENTS))
    fires[np.repeat(np.arange(len(part.rows)), np.diff(part.offsets)), part.latents] = 1
    together, alone = fires.T @ fires, fires.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(len(fires) * together / np.outer(alone, alone))
        jaccard = together / (alone[:, None] + alone - together)
    np.fill_diagonal(together, 0)
    for latent in range(LATENTS):
        shown = index[latent]
        assert latent not in shown.pmi.ids
        assert latent not in shown.jaccard.ids
        often = together[latent] >= 5
        np.testing.assert_allclose(shown.pmi.values, np.sort(pmi[latent, often])[::-1][:20], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shown.pmi.values, pmi[latent, shown.pmi.ids], rtol=1e-5, atol=1e-6)
        some = together[latent] > 0
        np.testing.assert_allclose(shown.jaccard.values, np.sort(jaccard[latent, some])[::-1][:20], rtol=1e-5)


def test_held_out_rows_are_in_their_sample_alone(index: FeatureIndex, store: Store) -> None:
    held_out = Everything(an_sae("relu", store), store, "validation")
    part = index.sample("validation")
    assert set(part.rows) <= set(held_out.rows)
    expected = (held_out.acts[[held_out.place[int(row)] for row in part.rows]] > 0).sum()
    assert len(part.latents) == expected > 0
    assert not set(part.rows) & set(index.sample("train").rows)


# ---------------------------------------------------------------------------------------- from weights


def test_decoder_geometry(index: FeatureIndex, store: Store) -> None:
    sae = an_sae("relu", store)
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2.0)
    for latent in (0, 5, 47):
        shown = index[latent]
        torch.testing.assert_close(torch.from_numpy(shown.neighbours.values), cosines[latent].topk(20).values)
        torch.testing.assert_close(torch.from_numpy(shown.neighbours.values), cosines[latent][shown.neighbours.ids])
    expected = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1).detach()
    np.testing.assert_allclose(index.columns["encoder_cosine"], expected, rtol=1e-4, atol=1e-6)


def test_neighbours_of_many_latents() -> None:
    """More than are searched one by one, in blocks of which the last is short."""
    sae = new_sae("relu", 8, 1280)
    initialise(sae, torch.zeros(8), torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCK_VALUES, "cpu", 500 * 1280)
        found = geometry(sae)
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2.0)
    np.testing.assert_allclose(found["cosines"], cosines.topk(20).values, atol=1e-6)
    np.testing.assert_allclose(found["cosines"], cosines.gather(1, torch.from_numpy(found["ids"]).long()), atol=1e-6)


def test_logit_effects_are_the_decoder_times_the_unembedding(index: FeatureIndex, store: Store) -> None:
    model = load_model(store.manifest["identity"]["model"]["id"], dtype="float32")
    weight = model.module.model.norm.weight.detach()  # the Llama shape's final RMSNorm
    effects = (an_sae("relu", store).W_dec.detach() * weight) @ model.module.lm_head.weight.detach().T
    effects = effects[:, : len(model.tokenizer)]  # the embedding is padded beyond the tokenizer
    assert len(model.tokenizer) < model.n_vocab
    for latent in (0, 11, 47):
        shown = index[latent]
        torch.testing.assert_close(
            torch.from_numpy(shown.top_logits.values), effects[latent].topk(20).values, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            torch.from_numpy(shown.bottom_logits.values), effects[latent][shown.bottom_logits.ids], rtol=1e-4, atol=1e-5
        )
        counts, low, high = shown.logit_histogram
        assert counts.sum() == effects.shape[1]
        expected = np.histogram(effects[latent].numpy(), len(counts), (low, high))[0]
        assert np.abs(counts - expected).sum() <= 2  # at the edges of bins rounding decides


def test_what_an_mlp_reads_has_no_direct_effect_on_the_logits(saved: Path) -> None:
    config = IndexConfig(sae=saved)
    plan = plan_of(config)
    assert "logits" in _static(config, plan)
    assert "logits" not in _static(
        config, dataclasses.replace(plan, ends=Ends((read := "blocks.1.mlp.hook_in",), (read,)))
    )


@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama", "gemma2"])
def test_the_final_norm_is_read_from_every_family(shape: str, checkpoints: dict[str, Path]) -> None:
    """At a scale of 1 the norm's output moves by `effects` of what is added, for a direction that keeps the scale."""
    model = load_model(str(checkpoints[shape]), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, WIDTH, generator=generator)
    x = (x - x.mean()) / (x - x.mean()).pow(2).mean().sqrt()
    found = unembedding(model)
    with torch.no_grad():
        name = {"gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}.get(shape, "model.norm")
        norm, unembed = model.module.get_submodule(name), model.module.get_output_embeddings()
        change = unembed(norm(x)) - unembed(norm(torch.zeros_like(x)))
        torch.testing.assert_close(change[0], found.effects(x[0]), rtol=1e-3, atol=1e-3)
        assert found.centred == (shape in ("gpt2", "neox"))


@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama", "gemma2"])
def test_a_store_carries_the_unembedding_of_its_model(
    shape: str, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    config = HarvestConfig(
        model=str(checkpoints[shape]), layers=(1,), tokens=500, context=CONTEXT, dtype="float32", out=tmp_path
    )
    made = harvest(config, TextConfig(dataset=str(corpus), validation_fraction=0.2))
    assert made is not None
    W_U, gamma, centred, scale = made.unembedding()
    expected = unembedding(load_model(str(checkpoints[shape]), dtype="float32"))
    assert torch.equal(W_U, expected.W_U)
    assert torch.equal(gamma, expected.gamma)
    assert (centred, scale) == (expected.centred, expected.scale) == (centred, 1.0)


def test_logit_effects_are_those_of_the_model_where_a_store_has_no_unembedding(
    saved: Path, index: FeatureIndex, store: Store, tmp_path: Path
) -> None:
    shutil.copytree(store.folder, tmp_path / "store")
    (tmp_path / "store" / "unembedding.safetensors").unlink()
    manifest = {name: value for name, value in store.manifest.items() if name != "unembedding_hash"}
    write_json(tmp_path / "store" / "manifest.json", manifest)
    config = IndexConfig(sae=saved, store=tmp_path / "store", out=tmp_path / "i.h5", tokens=500, rules=False)
    path = build_index(config)
    assert path is not None
    with h5py.File(index.path) as ours, h5py.File(path) as theirs:
        assert set(ours["logits"]) == set(theirs["logits"])
        for name in ours["logits"]:
            np.testing.assert_array_equal(ours[f"logits/{name}"][:], theirs[f"logits/{name}"][:])
    with open_feature_index(path, sae=saved) as opened:
        assert (
            candidates_html(opened[0], Names(opened)[0])
            == '<p class="rule">No rule: the index was made with --no-rules.</p>'
        )


def test_a_sample_joined_early_takes_in_what_lies_between_its_parts() -> None:
    """As where a snapshot is written before an earlier unit is done."""
    offsets = np.arange(0, 202, 2)
    whole = Sample(np.arange(0, 300, 3), offsets, np.arange(200) % 7, np.arange(200, dtype=np.float32))
    a, b, c, d = (whole.stretch(first, first + 25) for first in (0, 25, 50, 75))
    nothing = whole.stretch(30, 30)
    for parts in ([Sample.joined([c, a]), nothing, d, b], [c, a, Sample.joined([b, d])]):
        for column, expected in zip(Sample.joined(parts), whole, strict=True):
            np.testing.assert_array_equal(column, expected)


# ---------------------------------------------------------------------------------- order, kill, resume


def contents(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        found: dict[str, bytes] = {}

        def keep(name: str, item: Any) -> None:
            if hasattr(item, "shape"):
                texts = item.dtype.kind == "O"  # where a text lies in memory is no part of it
                found[name] = b"\0".join(item[:]) if texts else item[()].tobytes()

        file.visititems(keep)
        return found | {f"@{name}": np.asarray(value).tobytes() for name, value in file.attrs.items()}


def test_any_order_of_units_and_any_number_of_workers_give_the_same_index(
    saved: Path, index: FeatureIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build_index(IndexConfig(sae=saved, sample=3_000, workers=1, out=tmp_path / "one.h5"))
    pieces = plan._pieces
    monkeypatch.setattr(plan, "_pieces", lambda *args: list(pieces(*args))[::-1])
    three = build_index(IndexConfig(sae=saved, sample=3_000, workers=3, out=tmp_path / "three.h5"))
    assert one is not None
    assert three is not None
    assert contents(one) == contents(three) == contents(index.path)


def test_killed_at_any_time_and_resumed_is_uninterrupted(saved: Path, index: FeatureIndex, tmp_path: Path) -> None:
    out = tmp_path / "killed.h5"
    argv = ("index", "--sae", str(saved), "--sample", "3000", "--out", str(out), "--workers", "1")
    for times in range(2):
        child = processes.start(*argv, slow=0.05, unit_rows=40 * CONTEXT)
        seen = out.stat().st_mtime_ns if out.exists() else 0
        status, printed = processes.signal_when(
            child, lambda seen=seen: out.exists() and out.stat().st_mtime_ns > seen, signal.SIGKILL
        )
        assert status == -signal.SIGKILL, printed
        with open_feature_index(out, sae=saved) as partial:
            assert not partial.complete
            assert 0 < partial.share_done < 1, times
            assert partial[0].figures["fires"] <= index[0].figures["fires"]
            assert not len(partial[0].pmi.ids)
            assert partial[0].no_rule == "rules come last, and the index is not complete"
    made = build_index(IndexConfig(sae=saved, sample=3_000, out=out))
    assert made is not None
    assert contents(made) == contents(index.path)


def test_a_complete_index_is_not_built_again(saved: Path, index: FeatureIndex) -> None:
    before = index.path.stat().st_mtime_ns
    assert build_index(IndexConfig(sae=saved, sample=3_000)) == index.path
    assert index.path.stat().st_mtime_ns == before


def test_an_index_of_an_older_sae_is_built_anew(saved: Path, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "saes" / "relu"
    shutil.copytree(saved, folder)
    path = build_index(IndexConfig(sae=folder, logits=False))
    assert path is not None
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(an_sae("relu", store, seed=1), folder, metadata)
    with pytest.raises(ValueError, match=r"relu.h5 was made from another sae: it says \w{32}, this one is \w{32}"):
        open_feature_index(path)
    before = contents(path)
    build_index(IndexConfig(sae=folder, logits=False))
    assert contents(path) != before
    with open_feature_index(path) as opened:
        assert not len(opened[0].top_logits.ids)  # none were asked for


# --------------------------------------------------------------------------------------------- reading


def test_contexts_are_cut_from_the_token_stream(index: FeatureIndex, store: Store) -> None:
    shard = store.of_split("train")[1]
    first = sum(s.n_rows for s in store.shards[: store.shards.index(shard)])
    tokens = shard.column("tokens", 2 * CONTEXT, 3 * CONTEXT)
    whole = index.context_of(first + 2 * CONTEXT + 5)
    assert np.array_equal(whole.tokens, tokens)
    assert whole.peak == 5
    near = index.context_of(first + 2 * CONTEXT + 5, around=2)
    assert np.array_equal(near.tokens, tokens[3:8])
    assert near.peak == 2
    edge = index.context_of(first + 2 * CONTEXT + 1, around=3)
    assert np.array_equal(edge.tokens, tokens[:5])
    assert edge.peak == 1
    assert "".join(whole.pieces[1:]) == store.tokenizer().decode(tokens[1:])
    assert index.documents[whole.doc_id].endswith(".txt")


def test_examples_show_the_activation_of_each_token(
    index: FeatureIndex, everything: Everything, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.index.examples._ROWS", 50)
    sae = an_sae("relu", store)
    examples = index[7].top
    for around in (2, None):
        for example, shown in zip(examples, show(index, sae, 7, examples, around), strict=True):
            expected = [everything.value(row, 7) for row in shown.context.rows]
            np.testing.assert_allclose(shown.values, expected, rtol=1e-4, atol=1e-5)
            assert shown.values[shown.context.peak] == pytest.approx(example.value, rel=1e-4)
            assert len(shown.values) == len(shown.context.pieces) <= (5 if around else CONTEXT)


def test_bytes_that_are_no_character_are_shown_and_not_lost(index: FeatureIndex, store: Store) -> None:
    tokenizer = store.tokenizer()
    ids = np.array(tokenizer.encode("é\x00\n🙂"))
    pieces = index.pieces(ids)
    assert len(pieces) == len(ids)
    assert all(pieces)
    assert "\\xf0" in "".join(pieces)
    assert "\x00" in pieces
    assert "\n" in pieces


def test_a_latent_out_of_range_is_refused(index: FeatureIndex) -> None:
    with pytest.raises(ValueError, match=r"latent is 48; .*relu.h5 has 0 to 47"):
        index[48]
    with pytest.raises(ValueError, match="latent is -1"):
        index[-1]


# ------------------------------------------------------------------------------------------ by hand


def test_bins_are_quarter_octaves() -> None:
    edges = bin_edges(2.0)
    assert edges[0] == 0
    assert edges[1] == 2.0 * 2**-9.75
    assert edges[-2] == 2.0 * 2**5.75
    assert edges[-1] == np.inf
    values = np.array([1e-9, 2.0, 2.01, 2.0 * 2**0.24, 2.0 * 2**0.26, 1e9], np.float32)
    assert bins_of(values, 2.0).tolist() == [0, 40, 40, 40, 41, N_BINS - 1]


def test_position_buckets() -> None:
    assert position_edges(16).tolist() == [0, 1, 2, 3, 4, 6, 8, 12]
    assert position_edges(2).tolist() == [0, 1]


def a_unit(values: list[float], rows: list[int], latents: list[int], first_row: int = 0) -> Unit:
    return Unit(
        first_row, 8, 4, np.array(rows), np.array(latents, np.int32), np.array(values, np.float32), np.ones(8, bool),
        np.tile(np.arange(4), 2), np.arange(first_row, first_row + 8, dtype=np.uint32), np.zeros(0, np.int32),
    )  # fmt: skip


def test_a_passage_is_the_same_behind_any_document() -> None:
    """A licence at the head of two files, in contexts where other documents end before it; and its beginning in a third."""
    licence, BOS = [11, 12, 13], 0
    tokens = np.array([[BOS, 5, 6, BOS, *licence], [BOS, 7, 8, BOS, *licence], [BOS, *licence, 9, 9, 9]]).ravel()
    docs = np.array([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 3, 3, 3, 3], [4] * 7]).ravel()
    found = passages(tokens, np.tile(np.arange(7), 3), docs, tokens != BOS).reshape(3, 7)
    assert found[0, 4:].tolist() == found[1, 4:].tolist() == found[2, 1:4].tolist()
    assert found[0, 2] != found[1, 2]
    # Where no BOS parts documents, their numbers do.
    alone = passages(
        np.array([5, 6, *licence, 7, 8, *licence]),
        np.arange(10),
        np.repeat([0, 1, 2, 3], [2, 3, 2, 3]),
        np.ones(10, bool),
    )
    assert alone[2:5].tolist() == alone[7:].tolist() == found[0, 4:].tolist()


def test_of_equal_strengths_the_first_row_counts() -> None:
    evidence = Evidence.empty(2, 4)
    evidence.add(summarise(a_unit([3.0, 3.0, 3.0], [1, 2, 5], [0, 0, 0], first_row=8), 1.0, evidence))
    evidence.add(summarise(a_unit([3.0, 5.0], [0, 7], [0, 0]), 1.0, evidence))
    groups = intervals(evidence, 1.0)
    assert groups["counts"].sum() == 5
    assert rows_of_top(evidence.top)[0, :5].tolist() == [7, 0, 9, 13, -1]
    assert values_of_top(evidence.top)[0, :5].tolist() == [5.0, 3.0, 3.0, 3.0, 0.0]


def test_squares_of_large_activations_are_added_up() -> None:
    """Of 160,000 firings at about 1,000 times the scale; and of more than that there is a refusal, not another number."""
    evidence, unit = Evidence.empty(1, 4), a_unit([999.0, 1001.0] * 4, list(range(8)), [0] * 8)
    summary = summarise(unit, 1.0, evidence)
    for _ in range(20_000):
        evidence.sums += summary.sums
    assert evidence.moments(1.0).tolist() == [[160_000 * 1000.0], [160_000 * 1_000_001.0]]
    with pytest.raises(
        ValueError, match=r"latent 3 has an activation of 3e\+05; expected less than 2.62e\+05, 131,072 times"
    ):
        summarise(a_unit([1.0, 3e5], [1, 2], [0, 3]), 2.0, Evidence.empty(4, 4))
    with pytest.raises(ValueError, match="latent 0 has an activation of inf"):
        summarise(a_unit([np.inf], [1], [0]), 2.0, Evidence.empty(1, 4))


def a_busy_unit(first_row: int, random: np.random.Generator) -> Unit:
    """16 contexts of 4 rows, three latents of which one fires nearly everywhere; few strengths and few texts."""
    fires = random.random((64, 3)) < (0.9, 0.3, 0.02)
    rows, latents = np.nonzero(fires)
    values = random.choice([0.5, 1.0, 1.1, 3.0, 8.0], len(rows)).astype(np.float32)
    texts = random.integers(0, 60, 64).astype(np.uint32)
    everywhere, nowhere = np.ones(64, bool), np.zeros(0, np.int32)
    return Unit(
        first_row, 64, 4, rows, latents, values, everywhere, np.tile(np.arange(4), 16), texts, nowhere
    )  # fmt: skip


def test_evidence_is_that_of_all_firings_whatever_a_summary_was_compared_with() -> None:
    """Examples by sorting everything, against units in another order and summaries made before others were added."""
    random = np.random.default_rng(0)
    units = [a_busy_unit(64 * number, random) for number in range(20)]
    at_once, early, late = Evidence.empty(3, 4), Evidence.empty(3, 4), Evidence.empty(3, 4)
    for unit in units:
        at_once.add(summarise(unit, 1.0, at_once))
    for summary in [summarise(unit, 1.0, early) for unit in units][::-1]:
        early.add(summary)
    pending = [summarise(unit, 1.0, late) for unit in units[:7]]
    for unit in units[:6:-1]:
        pending.append(summarise(unit, 1.0, late))
        late.add(pending.pop(0))
    for summary in pending:
        late.add(summary)
    for name, column in vars(at_once).items():
        np.testing.assert_array_equal(column, getattr(early, name), name)
        np.testing.assert_array_equal(column, getattr(late, name), name)

    rows = np.concatenate([unit.rows + unit.first_row for unit in units])
    latents, values = (np.concatenate([getattr(unit, name) for unit in units]) for name in ("latents", "values"))
    texts = np.concatenate([unit.texts for unit in units])[rows]
    for latent in range(3):
        mine = [tuple(firing) for firing in np.stack([rows, values, texts], 1)[latents == latent].tolist()]
        assert at_once.counts[latent].sum() == len(mine)
        strongest, contexts, seen = [], set(), set()
        for row, value, text in sorted(mine, key=lambda firing: (-firing[1], firing[0])):
            if row // 4 not in contexts:  # the strongest of its context, if not of its text
                contexts.add(row // 4)
                if text not in seen:
                    seen.add(text)
                    strongest.append((row, value))
        kept = at_once.top[latent] > 0
        found = zip(rows_of_top(at_once.top[latent])[kept], values_of_top(at_once.top[latent])[kept], strict=True)
        assert list(found) == strongest[:TOP]
        first = {text: row for row, _, text in sorted(mine, reverse=True)}  # the lowest row of each text
        by_hash = sorted(first, key=lambda text: int(hashed(np.array([text]), latent + 1)[0] >> np.uint64(33)))
        drawn = at_once.random[latent]
        assert rows_of(drawn).tolist() == ([first[text] for text in by_hash] + [-1] * RANDOM)[:RANDOM]


def test_tokens_by_how_often_a_latent_fires_on_them() -> None:
    found = token_counts(np.array([0, 0, 0, 2, 2]), np.array([7, 9, 9, 4, 3]), 3)
    assert found["ids"][0, :3].tolist() == [9, 7, -1]
    assert found["counts"][0, :3].tolist() == [2, 1, 0]
    assert found["ids"][1, 0] == -1
    assert found["ids"][2, :3].tolist() == [3, 4, -1]


def test_companions_by_hand() -> None:
    """Ten rows: 0 and 1 fire together on five, 0 and 2 on one, 1 alone on one more."""
    rows = [[0, 1]] * 5 + [[0, 2], [1], [], [], []]
    offsets = np.cumsum([0, *map(len, rows)])
    latents = np.array([latent for row in rows for latent in row], np.int32)
    found = companions(Sample(np.arange(10), offsets, latents, np.ones(len(latents), np.float32)), 3)
    assert found["pmi_ids"][0, :2].tolist() == [1, -1]  # with 2 it was too seldom
    assert found["pmi"][0, 0] == pytest.approx(np.log(10 * 5 / (6 * 6)))
    assert found["jaccard_ids"][0, :3].tolist() == [1, 2, -1]
    assert found["jaccard"][0, :2] == pytest.approx([5 / 7, 1 / 6])
    assert found["rows"] == 10


def test_flags_by_hand() -> None:
    by_position = np.array([0, 100, 100, 1800])
    positions = np.array([[0, 0, 0, 0], [0, 30, 30, 1000], [0, 95, 2, 3], [0, 1, 1, 28]])
    tokens = np.array([[0, 0], [20, 20], [50, 50], [29, 1]])
    found = flags(positions.sum(1), tokens, tokens.sum(1), positions, by_position)
    assert found.tolist() == [1, 2, 8, 4]  # dead; dense; bound to a position; one token


def test_a_sample_does_not_depend_on_units() -> None:
    unit = a_unit([1.0, 2.0, 3.0], [0, 3, 6], [0, 1, 0])
    below = int(np.sort(hashed(np.arange(8)))[4])
    part = sample(unit, below)
    assert len(part.rows) == 4
    assert Sample.joined([]).rows.shape == (0,)
    halves = [part.take(np.array([True, True, False, False])), part.take(np.array([False, False, True, True]))]
    joined = Sample.joined(halves[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(joined, part, strict=True))


# ------------------------------------------------------------------------------------------- bad input


def test_an_sae_of_another_width_or_hook_is_refused(store: Store, tmp_path: Path) -> None:
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(new_sae("relu", 7, 9), tmp_path / "narrow", metadata)
    with pytest.raises(ValueError, match=rf"narrow has d_in 7, but {HOOK} in .* has {WIDTH}"):
        build_index(IndexConfig(sae=tmp_path / "narrow"))
    save_sae(an_sae("relu", store), tmp_path / "hook", metadata | {"hook_name": "blocks.7.hook_resid_post"})
    with pytest.raises(ValueError, match=r"blocks.7.hook_resid_post' is not in"):
        build_index(IndexConfig(sae=tmp_path / "hook"))
    save_sae(an_sae("relu", store), tmp_path / "nowhere", metadata | {"saebench": {}})
    with pytest.raises(ValueError, match="nowhere does not say what it was trained on; give a store"):
        build_index(IndexConfig(sae=tmp_path / "nowhere"))
    for option in ({"tokens": 0}, {"sample": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match="is 0; expected"):
            IndexConfig(sae=tmp_path, **option)


def test_a_store_that_lost_a_shard_is_named(saved: Path, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(store.folder, folder)
    lost = next(shard for shard in open_store(folder).of_split("train"))
    (folder / lost.name).unlink()
    with pytest.raises(ValueError, match=rf"{lost.name} is missing; restore it or harvest again"):
        build_index(IndexConfig(sae=saved, store=folder, out=tmp_path / "index.h5", logits=False))


def test_a_file_that_is_no_index_is_refused(tmp_path: Path, saved: Path, index: FeatureIndex) -> None:
    with pytest.raises(ValueError, match=r"none.h5 is not there; make it with `saebench index"):
        open_feature_index(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(ValueError, match=r"text.h5 cannot be read as HDF5"):
        open_feature_index(tmp_path / "text.h5")
    shutil.copy(index.path, tmp_path / "newer.h5")
    with h5py.File(tmp_path / "newer.h5", "a") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(ValueError, match="version 99, this saebench reads"):
        open_feature_index(tmp_path / "newer.h5", sae=saved)


def test_an_index_of_the_first_version_opens_and_goes_on(saved: Path, index: FeatureIndex, tmp_path: Path) -> None:
    """What it lacks is not shown, and its rules, of other labels, are words that are not applied."""
    old = tmp_path / "old.h5"
    shutil.copy(index.path, old)
    with h5py.File(old, "a") as file:
        file.attrs["schema_version"] = 1
        del file.attrs["longest"], file.attrs["ends"], file["latents/massive"], file["lists"], file["literals"]
        for name in ("any", "only", "but", "first_f1"):
            del file[f"rules/{name}"]
        text = file["rules/text"].asstr()[:]
        del file["rules/text"]
        file["rules/text"] = np.array([line.encode() for line in text])
    with open_feature_index(old, sae=saved) as opened:
        assert "massive" not in opened.columns
        assert (opened.longest, opened.ends) == (index.longest, Ends((HOOK,), (HOOK,)))
        assert opened.described("rules") == index.described("rules")
        assert opened.described("lists") == [""] * LATENTS
        latent = int(np.nanargmax(opened.columns["rule_f1"]))
        rule, now = opened[latent].rule, index[latent].rule
        assert rule is not None
        assert now is not None
        assert rule._replace(first_f1=now.first_f1) == now
        assert Names(opened)[latent].f1 == pytest.approx(now.f1)
        assert index.holds(latent, [np.array([0, 5, 6])]) is not None
        assert opened.holds(latent, [np.array([0, 5, 6])]) is None
    assert build_index(IndexConfig(sae=saved, sample=3_000, out=old)) == old
    child = processes.start(
        "index", "--sae", str(saved), "--sample", "3000", "--out", str(tmp_path / "cut.h5"), "--workers", "1", slow=0.05,
        unit_rows=40 * CONTEXT,
    )  # fmt: skip
    processes.signal_when(child, (tmp_path / "cut.h5").exists, signal.SIGKILL)
    with h5py.File(tmp_path / "cut.h5", "a") as file:
        file.attrs["schema_version"] = 1
        sums = file["state/sums"][:] @ np.array([1, 2**32])
        del file["state/massive"], file["state/top_texts"], file["state/sums"]
        file["state/sums"] = sums
    build_index(IndexConfig(sae=saved, sample=3_000, out=tmp_path / "cut.h5"))
    with open_feature_index(tmp_path / "cut.h5", sae=saved) as made:
        assert made.complete
        assert np.array_equal(made.columns["fires"], index.columns["fires"])
        assert np.array_equal(made.columns["max"], index.columns["max"])
        assert np.array_equal(made.columns["std"], index.columns["std"])


def test_texts_of_an_index_are_utf8(saved: Path, index: FeatureIndex, tmp_path: Path) -> None:
    """A rule may name any token."""
    path = tmp_path / "words.h5"
    shutil.copy(index.path, path)
    with h5py.File(path, "a") as file:
        del file["rules/text"]
        publish._write(file, {"rules": {"text": np.array(['token "漢"', *["é"] * (LATENTS - 1)], dtype=object)}})
    with open_feature_index(path, sae=saved) as opened:
        shown = {opened.described("rules")[latent] for latent in range(LATENTS) if opened[latent].rule}
        assert shown <= {'token "漢"', "é"}
        assert "é" in shown
        assert opened[1].rule is None or opened[1].rule.text == "é"


def test_paths_are_found_wherever_one_stands(
    store: Store, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of store and model, that were relative when the SAE was trained; from above the run, and from elsewhere."""
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    shutil.copytree(checkpoints["llama"], project / "models" / "llama")
    monkeypatch.chdir(project)
    corpus_file = project / "text.jsonl"
    corpus_file.write_text("".join(json.dumps({"text": sentences(number, 60)}) + "\n" for number in range(40)))
    harvest(
        HarvestConfig(model="models/llama", layers=(1,), tokens=1_000, context=CONTEXT, shard_contexts=64, dtype="float32", out=Path("store")),
        TextConfig(dataset="text.jsonl", validation_fraction=0.3),
    )  # fmt: skip
    train(TrainConfig(store=Path("store"), out=Path("run"), k=(4,), d_sae=(48,), tokens=2_000, batch=128, device="cpu"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sae = project / "run" / "saes" / "topk-k4"
    write_report(project / "run", evaluate(EvalConfig(run=project / "run", resamples=20, device="cpu")))
    assert build_index(IndexConfig(sae=sae, sample=500, device="cpu"))
    bench = open_bench(sae, device="cpu")
    assert bench.index
    assert bench.index.has_store
    assert bench.model.id == str(project / "models" / "llama")


def test_gated_is_indexed_as_it_encodes(store: Store, tmp_path: Path) -> None:
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    sae = an_sae("gated", store)
    assert isinstance(sae, GatedSAE)
    save_sae(sae, tmp_path / "saes" / "gated", metadata)
    path = build_index(IndexConfig(sae=tmp_path / "saes" / "gated", logits=False))
    assert path is not None
    with open_feature_index(path) as opened:
        x = torch.cat([shard.rows(HOOK)[torch.from_numpy(shard.column("keep"))] for shard in store.of_split("train")])
        with torch.no_grad():
            gate, acts = sae(x).pre, sae(x).acts
        sure, perhaps = ((acts > 0) & (gate > 1e-4)).sum(0).numpy(), (gate > -1e-4).sum(0).numpy()
        assert (sure <= opened.columns["fires"]).all()  # where a gate is zero but for rounding, either will do
        assert (opened.columns["fires"] <= perhaps).all()
        assert sure.sum() > 0.99 * opened.columns["fires"].sum()


# -------------------------------------------------------------------------------------------- search


TEXT = "the red cat runs over the blue house then return None"


def test_features_of_a_text_are_those_the_sae_encodes(index: FeatureIndex, store: Store) -> None:
    model = load_model(store.manifest["identity"]["model"]["id"], dtype="float32")
    sae = an_sae("relu", store)
    found = features_for_text(model, sae, index, TEXT, limit=None)
    assert "".join(found.pieces[1:]) == TEXT
    x_LD = capture(model, torch.tensor(found.tokens)[None], [HOOK])[HOOK][0]
    acts = sae.encode(x_LD.clone()).detach().numpy()
    acts[0] = 0.0  # the BOS token counts for nothing
    assert {firing.latent for firing in found.firings} == set(np.flatnonzero(acts.any(0)))
    for firing in found.firings:
        assert np.array_equal(firing.positions, np.flatnonzero(acts[:, firing.latent]))
        np.testing.assert_allclose(firing.values, acts[firing.positions, firing.latent], rtol=1e-3, atol=1e-4)
    peaks = [firing.peak for firing in found.firings]
    assert peaks == sorted(peaks, reverse=True)
    by_quantile = features_for_text(model, sae, index, TEXT, rank="quantile", limit=5).firings
    # Of m firings drawn at random, the strongest is below the q-quantile with probability q to the m.
    corrected = sorted((f.quantile ** len(f.positions) for f in found.firings), reverse=True)
    assert [firing.unusual for firing in by_quantile] == corrected[:5]
    assert max(len(firing.positions) for firing in found.firings) > 1
    here = features_for_text(model, sae, index, TEXT, position=3, limit=None).firings
    assert {firing.latent for firing in here} == set(np.flatnonzero(acts[3]))
    rare = features_for_text(model, sae, index, TEXT, max_density=0.05, limit=None).firings
    assert {firing.latent for firing in rare} == {f.latent for f in found.firings if f.density <= 0.05}


def test_attribution_ranks_by_effect_on_the_next_token(index: FeatureIndex, store: Store) -> None:
    model = load_model(store.manifest["identity"]["model"]["id"], dtype="float32")
    sae = an_sae("relu", store)
    found = features_for_text(model, sae, index, TEXT, rank="attribution", limit=None)
    with torch.no_grad():
        logits_LV = logits(model, torch.tensor(found.tokens)[None])[0]
    assert found.target == int(logits_LV[-1].argmax())
    effects = [abs(firing.effect) for firing in found.firings]
    assert effects == sorted(effects, reverse=True)
    # The first in rank, all its firings taken off a little: the logit falls in proportion to the effect.
    first = found.firings[0]
    x_LD = capture(model, torch.tensor(found.tokens)[None], [HOOK])[HOOK][0].clone()
    share, metric = 0.01, logit_of(found.target)
    less_LD = x_LD.clone()
    less_LD[first.positions] -= share * torch.tensor(first.values)[:, None] * sae.W_dec[first.latent].detach()
    with torch.no_grad():
        ends = [
            float(
                metric(spliced_logits(model, torch.tensor(found.tokens)[None], HOOK, lambda value, to=to: to[None])[0])
            )
            for to in (x_LD, less_LD)
        ]
    assert ends[0] - ends[1] == pytest.approx(share * first.effect, rel=0.1, abs=1e-4)
    here = features_for_text(model, sae, index, TEXT, rank="attribution", position=3, limit=None)
    assert here.target == here.tokens[4]
    # A token that is picked is where the logit is; what brings it lies before as well.
    x_LD.requires_grad_(True)
    with edits(model, {HOOK: lambda value: x_LD[None]})():
        logit_of(int(here.tokens[4]), 3)(logits(model, torch.tensor(here.tokens)[None])[0]).backward()
    assert x_LD.grad is not None
    assert here.parts is not None
    assert {place for firing in here.firings for place in firing.positions} == {1, 2, 3}
    due_L = (x_LD.grad * (x_LD - sae.b_dec)).sum(1).detach().numpy()
    assert sum(firing.effect for firing in here.firings) == pytest.approx(here.parts.latents, rel=1e-3, abs=1e-4)
    assert here.parts.latents + here.parts.error == pytest.approx(due_L[1:].sum(), rel=1e-3, abs=1e-3)
    assert here.parts.alone == pytest.approx(due_L[0], rel=1e-3, abs=1e-3)
    assert sum(here.parts.shares()) == pytest.approx(1.0)
    assert features_for_text(model, sae, index, TEXT, rank="attribution", target=7).target == 7


def test_a_logit_is_compared_with_that_of_another_token(index: FeatureIndex, store: Store) -> None:
    model = load_model(store.manifest["identity"]["model"]["id"], dtype="float32")
    sae, target, against = an_sae("relu", store), token_of(model, "·cat"), token_of(model, " dog")
    assert index.pieces(np.array([target, against])) == [" cat", " dog"]
    one, other = (
        features_for_text(model, sae, index, TEXT, rank="attribution", target=first, against=second, limit=None)
        for first, second in ((target, against), (against, target))
    )
    assert one.target == target
    assert [firing.effect for firing in one.firings] == pytest.approx(
        [-firing.effect for firing in other.firings], abs=1e-4
    )
    with pytest.raises(ValueError, match=r"'·cat dog' is 2 tokens \(' cat', ' dog'\); expected one"):
        token_of(model, "·cat dog")
    with pytest.raises(ValueError, match=f"against is {target}; expected 0 to 511, and another than target {target}"):
        features_for_text(model, sae, index, TEXT, rank="attribution", target=target, against=target)


def test_quantiles_are_those_of_the_firings(index: FeatureIndex, everything: Everything) -> None:
    for latent in (3, 20, 40):
        strengths = np.sort(everything.acts[:, latent])
        strengths = strengths[strengths > 0]
        values = strengths[[0, len(strengths) // 2, -1]]
        found = index.quantiles(np.full(3, latent), values)
        np.testing.assert_allclose(found, np.searchsorted(strengths, values, "right") / len(strengths), atol=0.03)


def test_latents_of_two_texts_are_ranked_by_how_their_peaks_differ(index: FeatureIndex, store: Store) -> None:
    model = load_model(store.manifest["identity"]["model"]["id"], dtype="float32")
    sae = an_sae("relu", store)
    both = [features_for_text(model, sae, index, text, limit=None) for text in (TEXT, "the blue dog runs")]
    peaks = [{firing.latent: firing.peak for firing in found.firings} for found in both]
    found = differences(*both, limit=None)
    assert {one.latent for one in found} == set(peaks[0]) | set(peaks[1])
    for one in found:
        assert one.peaks == tuple(peak.get(one.latent, 0.0) for peak in peaks)
        assert one.more == one.peaks[0] - one.peaks[1]
    sizes = [abs(one.more) for one in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0
    assert sorted(-one.more for one in differences(*both[::-1], limit=None)) == sorted(one.more for one in found)
    assert all(one.more == 0 for one in differences(both[0], both[0]))


def test_latents_are_found_by_what_their_strongest_examples_hold(index: FeatureIndex) -> None:
    texts = ExampleTexts(index)
    shown = {
        latent: [index.context_of(example.row, AROUND) for example in index[latent].top]
        for latent in range(index.d_sae)
    }
    for wanted in ("RED cat", "ru", "s under\nthe", "none"):
        found = texts.search(wanted)
        counts = {
            latent: sum(wanted.lower() in "".join(context.pieces).lower() for context in contexts)
            for latent, contexts in shown.items()
        }
        assert dict(zip(found.latents.tolist(), found.within.tolist(), strict=True)) == {
            latent: count for latent, count in counts.items() if count
        }
        for latent, row, firing in zip(found.latents.tolist(), found.rows.tolist(), found.firing.tolist(), strict=True):
            holding = [context for context in shown[latent] if wanted.lower() in "".join(context.pieces).lower()]
            assert row in [context.rows[context.peak] for context in holding]
            assert 0 <= firing <= counts[latent]
        assert found.firing.tolist() == sorted(found.firing.tolist(), reverse=True)
    token = int(index.top_tokens[0, 0])
    word = index.pieces(np.array([token]))[0].strip()
    assert texts.search(word).firing.max() > 0
    assert not len(texts.search("the " * 40).latents)
    with pytest.raises(ValueError, match="expected at least one character that is no space"):
        texts.search(" ")


def test_texts_that_cannot_be_searched_are_named(index: FeatureIndex, store: Store) -> None:
    model = load_model(store.manifest["identity"]["model"]["id"], dtype="float32")
    sae = an_sae("relu", store)
    with pytest.raises(ValueError, match="the text is empty"):
        features_for_text(model, sae, index, "")
    with pytest.raises(ValueError, match=r"the text has \d+ tokens; the model takes at most 64"):
        features_for_text(model, sae, index, TEXT * 20)
    with pytest.raises(ValueError, match="position is 99; the text has tokens 0 to"):
        features_for_text(model, sae, index, TEXT, position=99)
    with pytest.raises(ValueError, match="target is -1; the model's tokens are 0 to"):
        features_for_text(model, sae, index, TEXT, rank="attribution", target=-1)


# ------------------------------------------------------------------------------------------- compare


def test_an_sae_compared_with_itself_matches_everywhere(index: FeatureIndex, store: Store) -> None:
    sae = an_sae("relu", store)
    there, back = compare(index, sae, index, sae)
    alive = ~index.flagged("dead")
    assert [KINDS[kind] for kind in there.kinds] == ["matched" if living else "dead" for living in alive]
    assert np.array_equal(there.nearest[alive], np.flatnonzero(alive))
    assert np.array_equal(there.partners[alive], np.flatnonzero(alive))
    np.testing.assert_allclose(there.jaccard[alive], 1.0)
    assert np.array_equal(there.kinds, back.kinds)


def test_split_and_missing_latents_are_told(index: FeatureIndex, store: Store, tmp_path: Path) -> None:
    """The other SAE has latent 0 twice, not at all latent 1, and one direction more."""
    sae, other = an_sae("relu", store), an_sae("relu", store)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
        foreign = torch.linalg.qr(torch.cat([rows[:20], torch.randn(1, WIDTH)]).T).Q.T[-1]
        for weights in (other.W_dec, other.W_enc.T):
            weights[1] = weights[0] + 0.1 * weights[2]
            weights[3] = foreign * weights[3].norm()
        other.b_enc[[1, 3]] = torch.tensor([float(other.b_enc[0]), 0.0])  # type: ignore[index]
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(other, tmp_path / "saes" / "other", metadata)
    path = build_index(IndexConfig(sae=tmp_path / "saes" / "other", sample=3_000, logits=False))
    assert path is not None
    with open_feature_index(path) as opened:
        there, back = compare(index, sae, opened, other)
    assert KINDS[there.kinds[0]] == "split"
    assert KINDS[there.kinds[2]] == "matched"
    assert KINDS[back.kinds[0]] == "related"  # half of a split, though it is the nearest
    n_matched = [(side.kinds == KINDS.index("matched")).sum() for side in (there, back)]
    assert n_matched[0] == n_matched[1]
    assert KINDS[there.kinds[1]] in ("alone", "related")
    assert there.cosines[1] < 0.7
    assert there.jaccard[0] == pytest.approx(1.0)
    assert KINDS[back.kinds[3]] in ("alone", "related")
    assert back.cosines[3] < 0.7


def test_saes_of_different_stores_are_not_compared(index: FeatureIndex, store: Store) -> None:
    sae = an_sae("relu", store)
    with open_feature_index(index.path) as other:
        other.identity = other.identity | {"store": "0" * 32}
        with pytest.raises(ValueError, match=r"differ in store: \w{32} and 0{32}; index both on one"):
            compare(index, sae, other, sae)
