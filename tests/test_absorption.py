"""Absorption: the rule by hand, SAEs into which it is built or not, and where the examples come from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOK, WIDTH, an_sae
from scipy import sparse

from saebench.bench.absorption import AbsorptionConfig, Asked, absorption
from saebench.bench.concepts import Concepts, Examples, _letters_of, labelled, letters, parents_of, prompted
from saebench.bench.projections import Probe, absorbed_at, fit_probe, main_latents
from saebench.bench.results import Figure
from saebench.labels import labeller_of
from saebench.models import capture, load_model
from saebench.sae import Ends, ReLUSAE, new_sae, save_sae
from saebench.store import Store

ENDS = Ends((HOOK,), (HOOK,))
WORDS = 80  # each with a direction of its own, behind that of the concept; even ones are of it
TRAINED = 50  # the others are held out: 15 of the concept
HOLES = (48, 50, 60, 70)  # words of the concept that latents of their own have taken over, three of them held out
ROWS = 6  # of each word


def test_the_worked_example() -> None:
    sae = new_sae("relu", 2, 3).requires_grad_(False)
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))
    acts = sparse.csr_array([[2.0, 0, 0], [0, 2.0, 0], [0.4, 1.0, 0], [0, 0, 3.0]])
    x = torch.tensor([[2.0, 0.0], [1.2, 1.6], [1.0, 0.8], [0.5, 3.0]])
    found = absorbed_at(sae, np.array([0]), Probe(np.array([5.0, 0.0]), 0.0), acts, x, x)
    assert found.full.tolist() == [False, True, False, False]
    assert found.fraction.tolist() == pytest.approx([0, 1, 0.6, 0])
    sae.b_dec.copy_(torch.tensor([7.0, 0.0]))  # what is written always is no latent's to carry
    shifted = absorbed_at(sae, np.array([0]), Probe(np.array([5.0, 0.0]), 0.0), acts, x + sae.b_dec, x + sae.b_dec)
    assert shifted.full.tolist() == found.full.tolist()
    assert shifted.fraction.tolist() == pytest.approx(found.fraction.tolist(), abs=1e-5)


def examples(words: range, scale: float = 1.0) -> Examples:
    """x = 2 e₀ where the concept holds, with a little noise, and the word's direction."""
    word = np.repeat(np.array(words), ROWS)
    x = torch.zeros(len(word), 1 + WORDS)
    x[torch.arange(len(word)), torch.from_numpy(word) + 1] = 1.0
    x[:, 0] = torch.from_numpy(2.0 * (word % 2 == 0))
    x[:, 0] += 0.01 * torch.randn(len(x), generator=torch.Generator().manual_seed(words.start))
    holds = np.stack([word % 2 == 0, word % 20 == 1], axis=1)  # the second concept has too few words
    children = np.isin(word, HOLES)[:, None]
    return Examples(x * scale, x * scale, holds, children, word)


def built(absorbs: bool) -> ReLUSAE:
    """A latent for the concept and one for each word; of one that absorbs, those of `HOLES` write the concept in its place."""
    sae = ReLUSAE(1 + WORDS, 1 + WORDS).requires_grad_(False)
    weights = torch.eye(1 + WORDS)
    for part in (sae.W_dec, sae.W_enc):
        part.copy_(weights)
    for word in HOLES if absorbs else ():
        sae.W_enc[1 + word, 0] = -50.0
        sae.W_dec[1 + word, 0], sae.W_enc[1 + word, 1 + word] = 2.0, 5**0.5
        sae.W_dec[1 + word] /= 5**0.5
    sae.b_enc.fill_(-0.1)  # noise makes nothing fire
    return sae.eval()


def asked(store: Store, train: Examples, test: Examples, **settings: Any) -> Asked:
    made = Asked(AbsorptionConfig(run=Path("nowhere"), device="cpu", **settings), store, ENDS)
    made.concepts = Concepts(["even", "rare"], [(0, "holes")], train, test)
    return made


def by_name(figures: list) -> dict[tuple[str, str], Any]:
    return {(each.of, each.figure): each for each in figures}


def test_absorption_that_is_built_in_is_found_and_none_where_there_is_none(store: Store, caplog: Any) -> None:
    of = asked(store, examples(range(TRAINED)), examples(range(TRAINED, WORDS)))
    found, none = (by_name(of.figures(built(absorbs), "x")) for absorbs in (True, False))
    assert "rare left out: fewer than 10 words" in caplog.text
    assert found["even", "main_latents"].value == none["even", "main_latents"].value == 1
    rate = found["even", "full_absorption"]
    assert (rate.value, rate.n) == (pytest.approx(3 / 15), 15 * ROWS)
    assert rate.low < 0.2 < rate.high
    assert found["even", "absorption_fraction"].value == pytest.approx(3 / 15)
    assert found["even ⊃ holes", "full_absorption"].value == 1
    assert found["even ⊃ holes", "full_absorption"].low is None  # of three words
    assert none["even", "full_absorption"].value == none["even", "absorption_fraction"].value == 0
    assert found["even", "probe_f1"].value == none["even", "main_f1"].value == 1
    assert found["rare", "full_absorption"].value is None
    assert found["all letters", "left_out"].value == 1
    assert found["all letters", "full_absorption"].value == pytest.approx(3 / 15)
    assert found["all letters", "full_absorption"].low is None  # of one concept


def test_the_mean_over_concepts_has_students_interval_from_five_on(store: Store) -> None:
    of = asked(store, examples(range(TRAINED)), examples(range(TRAINED, WORDS)))
    of.probes = {}

    def means(values: list[float]) -> dict[tuple[str, str], Figure]:
        of.concepts.names[:] = [f"c{place}" for place in range(len(values))]
        names = "full_absorption", "main_latents"
        rows = [Figure("x", f"c{place}", name, None, value) for place, value in enumerate(values) for name in names]
        return by_name(of._means(rows, "x"))

    some = means([0.5, 0.6, 0.4, 0.6, 0.4])["all letters", "full_absorption"]
    assert (some.value, some.n) == (pytest.approx(0.5), 5)  # s = 0.1, t(4) = 2.776, half 0.1242; percentiles have 0.08
    assert (some.low, some.high) == (pytest.approx(0.3758, abs=1e-4), pytest.approx(0.6242, abs=1e-4))
    few = means([0.0, 0.0, 0.0, 0.0, 0.5])
    assert few["all letters", "full_absorption"].low == 0  # a share is no less
    low = few["all letters", "main_latents"].low
    assert low is not None
    assert low < 0
    assert means([0.5, 0.6, 0.4, 0.6])["all letters", "full_absorption"].low is None


def test_what_no_latent_is_of_is_not_absorbed(store: Store) -> None:
    of = asked(store, examples(range(TRAINED)), examples(range(TRAINED, WORDS)))
    silent = built(True)
    silent.b_enc.fill_(-1e6)
    found = by_name(of.figures(silent, "x"))
    assert found["even", "main_latents"].value == found["even", "main_f1"].value == 0
    for of_what in ("even", "even ⊃ holes", "all letters"):
        for figure in ("full_absorption", "absorption_fraction"):
            assert (found[of_what, figure].value, found[of_what, figure].n) == (None, 0)
    assert found["even", "probe_f1"].n == 15 * ROWS


def test_neither_scale_nor_order_matters(store: Store) -> None:
    sides = examples(range(TRAINED)), examples(range(TRAINED, WORDS))
    sae = built(True)
    once = asked(store, *sides).figures(sae, "x")
    backwards = [
        Examples(side.read.flip(0), side.written.flip(0), *(part[::-1].copy() for part in side[2:])) for side in sides
    ]
    assert [(each.value, each.low, each.high) for each in asked(store, *backwards).figures(sae, "x")] == [
        pytest.approx((each.value, each.low, each.high), abs=1e-9) for each in once
    ]
    sae.b_enc *= 1000
    long = asked(store, examples(range(TRAINED), 1000.0), examples(range(TRAINED, WORDS), 1000.0)).figures(sae, "x")
    assert [each.value for each in long] == [pytest.approx(each.value, abs=1e-4) for each in once]


def test_a_concept_that_two_latents_share_has_both() -> None:
    holds = np.arange(400) < 200
    acts = np.zeros((400, 3))
    acts[:120, 0], acts[120:200, 1], acts[:, 2] = 1.0, 3.0, 0.5
    main, f1 = main_latents(sparse.csc_array(acts), holds, 0.03)
    assert (main.tolist(), f1) == ([0, 1], 1.0)
    assert main_latents(sparse.csc_array(acts), holds, 0.3)[0].tolist() == [
        0
    ]  # 2·120/320 = 0.75 to 1 is no more than 0.3


def test_a_constant_coordinate_is_no_part_of_a_probe() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 5.0
    holds = (x[:, 0] > 0).numpy()
    probe = fit_probe(x, holds)
    assert probe.weight_E[2] == 0
    assert (probe.finds(x) == holds).mean() > 0.95


def test_words_are_whole_tokens_with_a_space_before_them(store: Store) -> None:
    assert _letters_of([b" cat", b" Cat", b"cat", b" a", b" c4t", b" zoo"]).tolist() == [2, 2, -1, -1, -1, 25]
    found = letters(store, ENDS, per_word=3)
    tokenizer = store.tokenizer()
    for side in (found.train, found.test):
        assert np.unique(side.cluster, return_counts=True)[1].max() <= 3
        texts = tokenizer.convert_ids_to_tokens(side.cluster.tolist())
        assert all(
            text.startswith("Ġ") and found.names[row.argmax()] == text[1].lower()
            for text, row in zip(texts, side.holds, strict=True)
        )
    assert not set(found.train.cluster) & set(found.test.cluster)
    rows = {tuple(row.tolist()) for row in torch.cat([one.rows(HOOK).float() for one in store.of_split("train")])}
    assert all(tuple(row.tolist()) in rows for row in found.train.read)
    assert found.train.read.shape[1] == WIDTH == store.d_in(HOOK)


def test_a_model_is_run_over_words(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu")
    found = prompted(model, ENDS, words=10, batch=4)
    assert len(found.train.read) + len(found.test.read) == 10
    token = int(found.train.cluster[0])
    ids = torch.tensor([[*model.encoder.opened(model.encoder.encode(["The word is"])[0]), token]])
    torch.testing.assert_close(
        found.train.read[0], capture(model, ids, [HOOK])[HOOK][0, -1].float(), atol=1e-4, rtol=1e-4
    )


def test_a_parent_holds_where_a_child_does(store: Store, caplog: Any) -> None:
    children = ['token " cat"', 'token " dog"', 'token " nothing"']
    found = labelled(store, ENDS, labeller_of("tokens"), {"pet": children, "cat": children[:1]}, rows=1000)
    assert found.names == ["pet", "cat"]
    assert [parent for parent, _ in found.children] == [0, 0, 0, 1]
    for side in (found.train, found.test):
        np.testing.assert_array_equal(side.holds[:, 0], side.children[:, :3].any(1))
        np.testing.assert_array_equal(side.holds[:, 1], side.children[:, 3])
        assert len(side.read) == len(side.holds) == len(side.cluster)
    assert 0 < found.train.holds[:, 1].sum() < found.train.holds[:, 0].sum() < len(found.train.read)
    assert "'token \" nothing\"' holds on none of" in caplog.text


def test_the_bench_leaves_out_what_it_has_too_few_of_and_goes_on(store: Store, tmp_path: Path) -> None:
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": 16}
    save_sae(an_sae("topk", store), tmp_path / "saes/topk", metadata)
    config = AbsorptionConfig(run=tmp_path, store=store.folder, device="cpu")
    figures = by_name(absorption(config))
    assert figures["all letters", "full_absorption"].value is None
    assert figures["all letters", "left_out"].value == 26
    written = (tmp_path / "bench/absorption.json").stat().st_mtime_ns
    assert by_name(absorption(config)) == figures
    assert (tmp_path / "bench/absorption.json").stat().st_mtime_ns == written
    absorption(replace(config, tau=0.1))
    assert (tmp_path / "bench/absorption.json").stat().st_mtime_ns != written


def test_an_untrained_sae_as_wide_and_as_sparse_stands_beside(store: Store, tmp_path: Path) -> None:
    sae = an_sae("topk", store)
    save_sae(sae, tmp_path / "saes/topk", {"model_name": "m", "hook_name": HOOK, "context_size": 16})
    file = tmp_path / "parents.json"
    file.write_text(json.dumps({"pet": ['token " cat"', 'token " dog"']}))
    config = AbsorptionConfig(
        run=tmp_path, store=store.folder, concepts=str(file), labeller="tokens", resamples=20, device="cpu"
    )
    figures = absorption(config)
    (ours, untrained), written = dict.fromkeys(each.sae for each in figures), tmp_path / "bench/absorption.json"
    assert (ours, untrained.startswith(f"untrained, {sae.d_sae} latents, k ")) == ("topk", True)
    found = {(each.sae, each.figure): each.value for each in figures}
    assert found[ours, "probe_f1"] == found[untrained, "probe_f1"] is not None  # the probe is the same
    assert found[ours, "main_f1"] != found[untrained, "main_f1"] is not None
    before = written.stat().st_mtime_ns
    assert absorption(config) == figures
    assert written.stat().st_mtime_ns == before
    # What it writes is as near as one factor makes it.
    of = Asked(config, store, ENDS)
    made = of.untrained(sae.d_sae, 3)
    x, written_ND = of.concepts.train.read, of.concepts.train.written
    assert ((made.encode(x) > 0).sum(1) <= 3).all()
    out = made(x).x_hat - made.b_dec
    errors = [float((made.b_dec + factor * out - written_ND).pow(2).sum()) for factor in (0.95, 1.0, 1.05)]
    assert min(errors) == errors[1]


def test_what_cannot_be_asked_is_refused(store: Store, tmp_path: Path) -> None:
    config = AbsorptionConfig(run=tmp_path, store=store.folder, device="cpu")
    with pytest.raises(ValueError, match=r"has no SAEs in saes/ that write a hook by themselves; train some with"):
        absorption(config)
    with pytest.raises(
        ValueError, match=r"concepts is 'nothing'; expected letters, python, supersenses, or a JSON file"
    ):
        parents_of("nothing")
    file = tmp_path / "parents.json"
    file.write_text(json.dumps({"pet": "cat"}))
    with pytest.raises(ValueError, match="is not an object of lists"):
        parents_of(str(file))
    file.write_text(json.dumps({"pet": ['token " cat"']}))
    save_sae(an_sae("topk", store), tmp_path / "saes/topk", {"model_name": "m", "hook_name": HOOK, "context_size": 16})
    with pytest.raises(ValueError, match="nothing says whose literals they are; give --labeller"):
        absorption(replace(config, concepts=str(file)))
