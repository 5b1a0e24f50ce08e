"""Interactions of tokens: known functions come out as they are, every split is faithful, and shared passes are the plain ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOK, VOCABULARY, WIDTH, an_sae
from scipy.optimize import linprog
from transformers import AutoModelForCausalLM, BloomConfig

from saebench.cli import main
from saebench.index import open_feature_index
from saebench.interactions import interactions
from saebench.interactions.found import agreed, curve, salient
from saebench.interactions.masking import Masked, Way, mask_of, resumes_maskings
from saebench.interactions.mobius import and_only, mobius, orders, split, zeta
from saebench.interactions.scalars import Scalar, activation, error, log_probability
from saebench.models import EMBEDDED_MODEL, LanguageModel, capture, load_model, logits
from saebench.sae import Ends
from saebench.store import Store

RANDOM = np.random.default_rng(0)


def present(n: int) -> np.ndarray:
    """`[2^n, n]` which units each subset has."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def large(found: np.ndarray) -> dict[int, float]:
    return {int(number): round(float(found[number]), 3) for number in np.flatnonzero(np.abs(found) > 1e-3)}


# ------------------------------------------------------------------------------------------ maths


def test_dividends_are_the_sums_that_define_them_and_zeta_undoes_them() -> None:
    v = RANDOM.standard_normal(32)
    naive = [sum((-1.0) ** ((s ^ t).bit_count()) * v[t] for t in range(32) if t & s == t) for s in range(32)]
    np.testing.assert_allclose(mobius(v), naive, atol=1e-12)
    np.testing.assert_allclose(zeta(mobius(v)), v, atol=1e-12)
    assert orders(3).tolist() == [0, 1, 1, 2, 1, 2, 2, 3]
    with pytest.raises(ValueError, match=r"there are 6 values; expected 2\^n"):
        mobius(np.zeros(6))


def test_and_or_and_exclusive_or_come_out_as_they_are() -> None:
    a, b, c, d = present(4).T
    found = split(3.0 * (a & b & c) + 5.0)
    assert (large(found.ands), large(found.ors), found.empty) == ({0b0111: 3.0}, {}, 5.0)
    found = split(2.0 * (b | c | d))
    assert (large(found.ands), large(found.ors)) == ({}, {0b1110: 2.0})
    found = split(1.0 * (a ^ b))  # an OR, unless both
    assert (large(found.ands), large(found.ors)) == ({0b0011: -1.0}, {0b0011: 1.0})
    found = split(4.0 * d - 1.0 * (a | b))  # one unit alone is an AND
    assert (large(found.ands), large(found.ors)) == ({0b1000: 4.0}, {0b0011: -1.0})


def test_a_majority_of_three_is_its_ands_or_ors_that_weigh_as_much() -> None:
    v = (present(3).sum(1) >= 2).astype(float)
    assert large(and_only(v).ands) == {0b011: 1.0, 0b101: 1.0, 0b110: 1.0, 0b111: -2.0}
    found = split(v)
    assert np.abs(found.ands).sum() + np.abs(found.ors).sum() == pytest.approx(
        5.0, abs=1e-3
    )  # each of its ANDs in size, as by ORs


@pytest.mark.parametrize("n", [1, 2, 5, 10, 12])
def test_a_split_is_faithful_at_every_masking(n: int) -> None:
    v = RANDOM.standard_normal(2**n) * 7 + 100
    found = split(v, most=60)  # far from the end
    sets = np.arange(2**n)
    for t in RANDOM.choice(sets, min(20, 2**n), replace=False):
        by_hand = found.empty + found.ands[(sets & t) == sets].sum() + found.ors[(sets & t) > 0].sum()
        assert by_hand == pytest.approx(v[t], rel=1e-10)
    np.testing.assert_allclose(found.rebuilt(), v, rtol=1e-10)
    assert not found.ors[orders(n) == 1].any()


@pytest.mark.parametrize("n", [3, 6])
def test_the_split_is_that_of_a_linear_program(n: int) -> None:
    v = np.maximum(present(n) @ RANDOM.standard_normal(n) + present(n)[:, 0] * present(n)[:, 2] - 0.3, 0)
    subsets = np.arange(1, 2**n)
    sets = np.arange(2**n)[:, None]
    rows = np.concatenate([(sets & subsets) == subsets, (sets & subsets) > 0], 1).astype(float)
    least = linprog(np.ones(4 * len(subsets)), A_eq=np.concatenate([rows, -rows], 1), b_eq=v - v[0]).fun
    found = split(v)
    norm = np.abs(found.ands).sum() + np.abs(found.ors).sum()
    assert norm == pytest.approx(least, rel=1e-4)
    assert norm * (1 - found.gap) <= least * (1 + 1e-9)  # the bound is one


def test_shapiq_has_the_same_dividends() -> None:
    shapiq = pytest.importorskip("shapiq")
    v = RANDOM.standard_normal(64)
    computer = shapiq.ExactComputer(n_players=6, game=lambda sets: v[(sets << np.arange(6)).sum(1)])
    theirs = computer("Moebius")
    for subset, place in theirs.interaction_lookup.items():
        if subset:
            assert theirs.values[place] == pytest.approx(mobius(v)[sum(1 << unit for unit in subset)], abs=1e-6)


# ---------------------------------------------------------------------------------------- masking


def plainly(model: LanguageModel, ids: torch.Tensor, units: list[list[int]], way: Way, token: int) -> np.ndarray:
    """log p(token) behind a text, each masking by a pass of its own that knows nothing of ours."""
    found, embed = [], model.module.get_input_embeddings()
    mask = mask_of(model, way)
    for row in present(len(units)):
        hidden = torch.zeros(len(ids), dtype=torch.bool)
        for here, unit in zip(row, units, strict=True):
            hidden[unit] = not here
        tokens, given = ids.clone(), {}
        if way == "neutral":
            tokens[hidden] = mask.token
        if way == "unattended":
            given = {"attention_mask": (~hidden)[None].long(), "position_ids": torch.arange(len(ids))[None]}
        handle = embed.register_forward_hook(
            lambda _, args, output, hidden=hidden: (
                torch.where(hidden[:, None], mask.vector.to(output), output) if way == "mean" else None
            )
        )
        with torch.no_grad():
            logits = model.module(tokens[None], use_cache=False, **given).logits[0, -1]
        handle.remove()
        found.append(float(logits.double().log_softmax(0)[token]))
    return np.array(found)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2", "embedded"])
def test_shared_passes_are_those_of_each_masking(
    name: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(checkpoints.get(name, EMBEDDED_MODEL)), device="cpu", dtype="float32")
    model.module.double()
    assert resumes_maskings(model)
    monkeypatch.setattr("saebench.interactions.masking._MOST", 4)  # so that the tree is gone down in parts
    ids = torch.tensor([0, *range(30, 46)])  # longer than gemma2's window
    units = [[2], [5, 6], [9], [14]]
    for way in ("mean", "neutral", "unattended"):
        ours = Masked(model, ids, units, log_probability(model, 40), mask_of(model, way))
        want = plainly(model, ids, units, way, 40)
        np.testing.assert_allclose(ours.every(), want, rtol=1e-7)  # some softmaxes are float32
        np.testing.assert_allclose(ours.values(present(4)), want, rtol=1e-7)
        ours._cache = None  # as of a model that cannot go on from keys and values
        np.testing.assert_allclose(ours.every(), want, rtol=1e-7)
        assert want.std() > 1e-3


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_a_latent_and_the_error_are_those_of_the_sae_on_each_masked_text(
    architecture: str, checkpoints: dict[str, Path], store: Store
) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    sae, ends = an_sae(architecture, store), Ends((HOOK,), (HOOK,))
    ids, mask = torch.tensor([0, *range(30, 40)]), mask_of(model, "neutral")
    texts = torch.where(
        torch.cat([torch.ones(8, 1), torch.from_numpy(present(3)), torch.ones(8, 7)], 1).bool(), ids, mask.token
    )
    x_BD = capture(model, texts, [HOOK])[HOOK][:, -1]
    with torch.no_grad():
        acts_BF, made_BD = sae.encode(x_BD), sae(x_BD).x_hat
    latent = int(acts_BF.std(0).argmax())
    for scalar, want in (
        (activation(sae, ends, latent), acts_BF[:, latent]),
        (error(sae, ends), (x_BD - made_BD).norm(dim=1)),
    ):
        found = Masked(model, ids, [[1], [2], [3]], scalar, mask).every()
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-4, atol=1e-4)
        assert found.std() > 1e-2
    with pytest.raises(ValueError, match="latent is 48; the SAE has 0 to 47"):
        activation(sae, ends, 48)


def test_a_layer_behind_which_no_attention_has_run_is_run_whole(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["gpt2"]), device="cpu", dtype="float32")
    first = Scalar("first", ("blocks.0.hook_resid_pre",), lambda at: at["blocks.0.hook_resid_pre"][:, 0])
    ids = torch.tensor([0, 31, 32, 33])
    want = float(capture(model, ids[None], list(first.hooks))[first.hooks[0]][0, -1, 0])
    found = Masked(model, ids, [[1], [2]], first, mask_of(model, "mean")).every()
    np.testing.assert_allclose(found, [want] * 4, rtol=1e-6)


def test_a_family_that_is_not_told_what_to_attend_to_is_refused_by_name(tmp_path: Path, tokenizer: Any) -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    with pytest.raises(
        ValueError, match=r"BloomForCausalLM\) cannot be masked by 'unattended'.*use 'mean' or 'neutral'"
    ):
        mask_of(model, "unattended")
    assert mask_of(model, "mean").vector is not None


def test_the_mean_embedding_is_that_of_the_corpus(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    weight, counts = model.module.get_input_embeddings().weight, np.zeros(VOCABULARY, np.int64)
    counts[[7, 9]] = 3, 1
    vector = mask_of(model, "mean", counts).vector
    torch.testing.assert_close(vector, (3 * weight[7] + weight[9]) / 4)


# ------------------------------------------------------------------------------------------ found


def test_interactions_are_ranked_by_what_they_change_over_all_maskings() -> None:
    v = 1.0 * present(4)[:, 0] + 1.5 * present(4).all(1)  # 1 in half of 16 maskings; 1.5 in one
    found = salient(split(v))
    assert [(one.kind, one.units, one.order) for one in found] == [("and", (0,), 1), ("and", (0, 1, 2, 3), 4)]
    assert found[0].size == pytest.approx(0.5, abs=1e-3)
    assert found[1].size == pytest.approx(1.5 * (15 / 16 / 16) ** 0.5, abs=1e-3)
    rebuilt = curve(split(v), v)
    assert rebuilt[0] == 0.0
    assert rebuilt[1] == pytest.approx(1 - np.var(v - present(4)[:, 0]) / np.var(v), abs=1e-3)
    assert rebuilt[2] == pytest.approx(1.0, abs=1e-6)


def test_agreement_is_the_share_of_sets_in_both() -> None:
    a, b, c = present(3).T
    marked, share = agreed(salient(split(2.0 * (a & b) + c)), salient(split(2.0 * (a & b) + 1.0 * (b | c))))
    assert [(one.units, one.agreed) for one in marked] == [((0, 1), True), ((2,), False)]
    assert share == pytest.approx(1 / 3)  # {a, b}; c; b or c


def test_the_units_that_matter_are_found_and_the_others_stay(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    ids = np.array([0, *range(30, 50)])
    scalar = log_probability(model, 40)
    heard: list[tuple[int, int]] = []
    found = interactions(
        model, ids, scalar, mask_of(model, "unattended"), mask_of(model, "neutral"), n=3, reach=8,
        step=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    assert heard[-1] == (16, 16)
    assert (len(found.units), found.left_out) == (3, 5)
    assert all(12 <= place < 20 for (place,) in found.units)
    np.testing.assert_allclose(found.split.rebuilt(), found.values, rtol=1e-10)
    assert found.curve[-1] == pytest.approx(1.0)
    told = json.loads(json.dumps(found.to_json()))
    assert told["sets"][0]["kind"] in ("and", "or")
    assert told["units"][0]["positions"] == list(found.units[0])
    assert found.whole == pytest.approx(float(scalar.of({"logits": logits(model, torch.tensor(ids)[None])[:, -1]})))
    # Of units that stay, one that matters less when masked and when present alone than each that was taken.
    every = interactions(model, ids, scalar, mask_of(model, "unattended"), n=8, reach=8, step=lambda *_: None)
    v, whole = every.values, 2**8 - 1
    matter = [max(abs(v[whole - 2**unit] - v[whole]), abs(v[2**unit] - v[0])) for unit in range(8)]
    assert sorted(np.argsort(matter)[-3:] + 12) == [place for (place,) in found.units]


def test_a_step_that_raises_ends_it(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["gpt2"]), device="cpu", dtype="float32")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interactions(model, np.arange(30, 40), log_probability(model, 40), mask_of(model, "mean"), step=stop)
    handles = [module for module in model.module.modules() if len(module._forward_hooks) > 1]
    assert not handles


@pytest.mark.parametrize(
    ("ids", "n", "token", "message"),
    [
        ([0, 31], 4, 40, "there is nothing to mask before token 1"),
        ([0, 31, 32], 13, 40, r"n is 13, with 2\^13 maskings; expected 1 to 12"),
        ([0, 31, 32], 0, 40, "n is 0"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    ids: list[int], n: int, token: int, message: str, checkpoints: dict[str, Path]
) -> None:
    model = load_model(str(checkpoints["gpt2"]), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=message):
        interactions(model, np.array(ids), log_probability(model, token), mask_of(model, "mean"), n=n)


def test_a_constant_and_a_latent_that_does_not_fire_are_refused(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["gpt2"]), device="cpu", dtype="float32")
    ids, mask = np.array([0, 31, 32, 33]), mask_of(model, "mean")
    with pytest.raises(ValueError, match=r"latent 5 at token 3 .* is 0: it does not fire there"):
        interactions(model, ids, Scalar("latent 5", (HOOK,), lambda at: at[HOOK][:, 0] * 0, True), mask)
    with pytest.raises(ValueError, match="same at token 3 .* is 7 whatever is masked by 'mean'"):
        interactions(model, ids, Scalar("same", (HOOK,), lambda at: at[HOOK][:, 0] * 0 + 7), mask)


def test_words_are_masked_whole(checkpoints: dict[str, Path]) -> None:
    model = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    ids = np.array(model.tokens_of("the qzx cat qzx runs"))
    assert len(ids) > 7  # with BOS: some words are several tokens
    found = interactions(
        model, ids, log_probability(model, 40), mask_of(model, "mean"), words=True, step=lambda *_: None
    )
    assert [found.text(unit) for unit in range(len(found.units))] == ["the", " qzx", " cat", " qzx"]


# ---------------------------------------------------------------------------------------- command


def test_why_explains_a_latent_and_a_token(run: Path, capsys: pytest.CaptureFixture) -> None:
    path = next((run / "index").glob("*.h5"))
    sae = run / "saes" / path.stem
    with open_feature_index(path) as index:
        latent = next(
            one for one in range(index.d_sae) if index[one].top and index.context_of(index[one].top[0].row).peak > 4
        )
        example = index[latent].top[0]
    command = ["why", "--sae", str(sae), "--latent", str(latent), "--n", "4"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["whole"] == pytest.approx(example.value, rel=1e-3)
    assert told["way"] == "unattended"
    assert 0 <= told["agreement"] <= 1
    text = ["why", "--sae", str(sae), "--text", "the red cat sees a blue dog", "--n", "5", "--words"]
    assert main([*text, "--token", "·house", "--against", "·dog"]) == 0
    assert "R² over 32 maskings" in capsys.readouterr().out
    assert main([*text, "--error"]) == 0
    assert capsys.readouterr().out.startswith("norm of the SAE's error at ")
    for wrong, message in (
        ([*command, "--position", "0"], f"latent {latent} does not fire at token 0"),
        ([*command, "--text", "."], f"latent {latent} fires nowhere in this text"),
        ([*command, "--example", "999"], "example is 999; the index has"),
        ([*command, "--text", "a", "--example", "1"], "--text and --example are both given"),
        (["why", "--sae", str(sae), "--text", "the cat"], "expected one of --latent N, --error and --token TOKEN"),
        ([*text, "--error", "--position", "99"], "position is 99; the text has tokens 0 to"),
        ([*text, "--error", "--other", "unattended"], "way and other are both 'unattended'"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
