"""Interventions against the arithmetic on captured vectors, and steered generation, on four model shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.models import LanguageModel, capture, edits, load_model, logits
from saebench.sae import SAE, Ends, initialise, latent_encoder, new_sae
from saebench.steer import Intervention, Sampling, Units, Where, arms_of, generate, mask_of, steered, stream, units_of
from saebench.steer.generate import _nucleus
from saebench.text import encoder_of
from saebench.train.recipes import RECIPES

HOOK = "blocks.1.hook_resid_post"
ENDS = Ends((HOOK,), (HOOK,))
PROMPTS = ["the red cat runs under", "def house then return value over a blue dog and"]
LATENT = 7


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama", "gemma2"])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LanguageModel:
    return load_model(str(checkpoints[request.param]), device="cpu", dtype="float32")


def sae_for(model: LanguageModel, architecture: str = "relu", normalize: Any = "none") -> SAE:
    """Random directions, the encoder tied to them, at the scale of the model's vectors."""
    sae = new_sae(architecture, model.d_model, 64, k=16 if architecture == "topk" else None, normalize=normalize)
    vectors = residual(model, ids_of(model, PROMPTS[1]))[1:]
    mean_D = torch.zeros(model.d_model) if normalize != "none" else vectors.mean(0)
    initialise(sae, mean_D, torch.Generator().manual_seed(3), RECIPES[architecture].gains)
    return sae


def ids_of(model: LanguageModel, text: str) -> list[int]:
    encoder = encoder_of(model.tokenizer)
    return [encoder.bos, *encoder.encode([text])[0]]


def residual(model: LanguageModel, ids: list[int]) -> Tensor:
    return capture(model, torch.tensor([ids]), [HOOK])[HOOK][0].clone()


def logits_with(model: LanguageModel, ids: list[int], change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    with torch.inference_mode(), edits(model, {} if change is None else {HOOK: change})():
        return logits(model, torch.tensor([ids]))[0]


def near(left: Tensor, right: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance * float(right.abs().max()))


def by_hand(sae: SAE, mode: str, c: float, x_LD: Tensor) -> Tensor:
    """The equations of the module, with the whole encoder."""
    a_L = sae.encode(x_LD)[:, LATENT].detach()
    d_D = sae.W_dec[LATENT].detach()
    if mode == "orthogonal":
        unit_D = d_D / d_D.norm()
        return x_LD - torch.outer(x_LD @ unit_D, unit_D) + c * d_D
    times_L = {"add": torch.full_like(a_L, c), "clamp": c - a_L, "scale": (c - 1) * a_L, "ablate": -a_L}[mode]
    return x_LD + torch.outer(times_L, d_D)


@pytest.mark.parametrize("mode", ["add", "clamp", "scale", "ablate", "orthogonal"])
@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
def test_modes_equal_the_arithmetic_on_captured_vectors(model: LanguageModel, architecture: str, mode: Any) -> None:
    sae = sae_for(model, architecture)
    ids = ids_of(model, PROMPTS[1])

    def change(value: Tensor) -> Tensor:
        edited = by_hand(sae, mode, 2.5, value[0])
        return torch.cat([value[:, :1], edited[None, 1:]], 1)  # BOS as it was

    with steered(model, [Intervention(sae=sae, ends=ENDS, latent=LATENT, mode=mode, strength=2.5)]):
        logits_with(model, ids_of(model, PROMPTS[0]))  # two passes in one block do not mix
        got = logits_with(model, ids)
    near(got, logits_with(model, ids, change))
    assert not torch.equal(got, logits_with(model, ids))


def test_an_sae_that_normalises_steers_in_its_own_units(model: LanguageModel) -> None:
    sae = sae_for(model, normalize="constant_norm_rescale")
    ids = ids_of(model, PROMPTS[1])
    x_LD = residual(model, ids)
    factor_L = x_LD.norm(dim=1) / model.d_model**0.5

    def change(value: Tensor) -> Tensor:
        times_L = (2.0 - sae.encode(x_LD)[:, LATENT].detach()) * factor_L
        times_L[0] = 0
        return value + torch.outer(times_L, sae.W_dec[LATENT].detach())

    with steered(model, [Intervention(sae=sae, ends=ENDS, latent=LATENT, mode="clamp", strength=2.0)]):
        got = logits_with(model, ids)
    near(got, logits_with(model, ids, change))


def test_clamping_to_its_own_value_changes_nothing_and_ablation_is_clamping_to_zero(model: LanguageModel) -> None:
    sae, ids = sae_for(model), ids_of(model, PROMPTS[1])
    acts_L = latent_encoder(sae, [LATENT])(residual(model, ids))[:, 0]
    place = int(acts_L[1:].argmax()) + 1
    assert acts_L[place] > 0
    common: dict[str, Any] = {"sae": sae, "ends": ENDS, "latent": LATENT, "positions": mask_of([place], len(ids))}
    with steered(model, [Intervention(**common, mode="clamp", strength=float(acts_L[place]))]):
        got = logits_with(model, ids)
    near(got, logits_with(model, ids), 1e-5)
    with steered(model, [Intervention(**common, mode="ablate")]):
        ablated = logits_with(model, ids)
    with steered(model, [Intervention(**common, mode="clamp", strength=0.0)]):
        assert torch.equal(logits_with(model, ids), ablated)


@pytest.mark.parametrize(("mode", "strength"), [("add", 0.0), ("scale", 1.0)])
def test_no_change_is_none_bit_for_bit(model: LanguageModel, mode: Any, strength: float) -> None:
    sae = sae_for(model)
    one = Intervention(sae=sae, ends=ENDS, latent=LATENT, mode=mode, strength=strength)
    clean = logits_with(model, ids_of(model, PROMPTS[0]))
    with steered(model, [one]):
        assert torch.equal(logits_with(model, ids_of(model, PROMPTS[0])), clean)


def test_several_read_what_was_there_before_any_of_them(model: LanguageModel) -> None:
    sae, ids = sae_for(model), ids_of(model, PROMPTS[1])
    d_FD, x_LD = sae.W_dec.detach(), residual(model, ids)
    acts_LF = sae.encode(x_LD).detach()
    unit_D = d_FD[9] / d_FD[9].norm()

    def change(value: Tensor) -> Tensor:
        edited = x_LD + torch.outer(3 - acts_LF[:, LATENT], d_FD[LATENT]) - torch.outer(acts_LF[:, 8], d_FD[8])
        edited = edited - torch.outer(edited @ unit_D, unit_D)
        return torch.cat([value[:, :1], edited[None, 1:]], 1)

    interventions = [
        Intervention(sae=sae, ends=ENDS, latent=9, mode="orthogonal", strength=0.0),
        Intervention(sae=sae, ends=ENDS, latent=LATENT, mode="clamp", strength=3.0),
        Intervention(sae=sae, ends=ENDS, latent=8, mode="ablate"),
    ]
    with steered(model, interventions):
        got = logits_with(model, ids)
    near(got, logits_with(model, ids, change))


def test_vectors_too_long_are_left_alone(model: LanguageModel) -> None:
    sae, ids = sae_for(model), ids_of(model, PROMPTS[1])
    norms_L = residual(model, ids).norm(dim=1)
    longest = float(norms_L[1:].median())
    short_L = (norms_L <= longest) & (torch.arange(len(ids)) > 0)
    assert 0 < int(short_L.sum()) < len(ids) - 1
    one = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=4.0, longest=longest)
    with steered(model, [one]):
        got = logits_with(model, ids)
    near(got, logits_with(model, ids, lambda x: x + short_L[None, :, None] * 4.0 * sae.W_dec[LATENT].detach()))


def test_the_first_position_is_left_alone_whatever_stands_there(model: LanguageModel) -> None:
    sae, ids = sae_for(model), ids_of(model, PROMPTS[1])[1:]
    d_D = 4.0 * sae.W_dec[LATENT].detach()
    for bos in (False, True):
        with steered(model, [Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=4.0, bos=bos)]):
            got = logits_with(model, ids)
        there_L = (torch.arange(len(ids)) > 0) | bos
        near(got, logits_with(model, ids, lambda x, there_L=there_L: x + there_L[None, :, None] * d_D))


def test_layers_and_conditions(model: LanguageModel) -> None:
    """At two hooks, the second reads what the first made; where a latent fires, and nowhere else."""
    sae, ids = sae_for(model), ids_of(model, PROMPTS[1])
    acts_L = sae.encode(residual(model, ids))[:, 8].detach()
    threshold = float(acts_L[1:].sort().values[3:5].mean())  # between two, so that rounding does not decide
    chosen_L = (acts_L > threshold) & (torch.arange(len(ids)) > 0)
    assert 0 < int(chosen_L.sum()) < len(ids) - 1
    first = Intervention(
        sae=sae, ends=Ends(("blocks.0.hook_resid_post",), ("blocks.0.hook_resid_post",)), latent=3, strength=2.0
    )
    second = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=4.0, where=Where(8, threshold))
    with steered(model, [second]):
        got = logits_with(model, ids)
    near(got, logits_with(model, ids, lambda x: x + chosen_L[None, :, None] * 4.0 * sae.W_dec[LATENT].detach()))
    with steered(model, [first]):
        below = residual(model, ids)
        chosen_L = (sae.encode(below)[:, 8].detach() > threshold) & (torch.arange(len(ids)) > 0)
        want = logits_with(model, ids, lambda x: x + chosen_L[None, :, None] * 4.0 * sae.W_dec[LATENT].detach())
    with steered(model, [second, first]):
        near(logits_with(model, ids), want)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "mask"])
@pytest.mark.parametrize("where", [None, Where(8, 0.5)])
def test_generation_with_a_cache_and_padding_equals_whole_passes(
    model: LanguageModel, positions: Any, where: Where | None
) -> None:
    """Greedy continuations of prompts of two lengths, each token against one pass over its own text alone."""
    sae = sae_for(model, "topk")
    prompts = PROMPTS[:1] if positions == "mask" else PROMPTS
    if positions == "mask":
        positions = mask_of([1, -1], len(ids_of(model, prompts[0])))
    one = Intervention(sae=sae, ends=ENDS, latent=LATENT, mode="clamp", strength=6.0, positions=positions, where=where)
    made = generate(model, prompts, [one], Sampling(max_new_tokens=12, temperature=0.0))
    assert len(made.texts) == 2 * len(prompts)
    for text in made.texts:
        prompt = ids_of(model, prompts[text.prompt])
        whole = [*prompt, *text.tokens.tolist()]
        with steered(model, [] if text.arm == "unsteered" else [one], prompt_length=len(prompt)):
            own = logits_with(model, whole).log_softmax(-1)[len(prompt) - 1 : -1]
        clean = logits_with(model, whole).log_softmax(-1)[len(prompt) - 1 : -1]
        assert text.tokens.tolist() == own[:, : len(model.tokenizer)].argmax(-1).tolist()
        places = torch.arange(len(text.tokens))
        np.testing.assert_allclose(text.logp, own[places, text.tokens], atol=2e-3)
        np.testing.assert_allclose(text.clean_logp, clean[places, text.tokens], atol=2e-3)
        np.testing.assert_allclose(text.kl, (clean.exp() * (clean - own)).sum(-1), atol=2e-3)
    if positions == "generated" and where is None:
        steered_text, plain = made.of("steered")[0], made.of("unsteered")[0]
        assert steered_text.tokens[0] == plain.tokens[0]
        assert steered_text.kl[0] == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def llama(checkpoints: dict[str, Path]) -> LanguageModel:
    return load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")


def test_arms_share_their_noise(llama: LanguageModel) -> None:
    """An arm that changes nothing writes the unsteered text; batches and other arms do not matter; seeds and samples do."""
    sae = sae_for(llama)
    nothing = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=0.0)
    strong = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=40.0)
    settings = Sampling(max_new_tokens=10, n_samples=3, seed=5, top_p=0.95, repetition_penalty=1.1)
    made = generate(llama, PROMPTS, {"nothing": [nothing], "strong": [strong]}, settings)
    plain, same, strong_texts = made.of("unsteered"), made.of("nothing"), made.of("strong")
    assert [text.text for text in plain] == [text.text for text in same]
    assert all(text.diverges is None and (text.kl == 0).all() for text in same)
    assert any(text.diverges is not None for text in strong_texts)
    for text, other in zip(strong_texts, plain, strict=True):
        if text.diverges is not None:
            assert (text.tokens[: text.diverges] == other.tokens[: text.diverges]).all()
    alone = generate(llama, PROMPTS[1], [strong], Sampling(**{**vars(settings), "n_samples": 2}), measure="none")
    assert len({text.text for text in plain}) == 6
    # The second prompt is the first here: its noise is another, the text of the first prompt's place in the batch.
    again = generate(llama, PROMPTS[::-1], [strong], settings, measure="none")
    assert [t.text for t in alone.of("steered")] == [t.text for t in again.of("steered")[:2]]
    other_seed = generate(llama, PROMPTS, [nothing], Sampling(**{**vars(settings), "seed": 6}), measure="none")
    assert all(a.text != b.text for a, b in zip(other_seed.of("unsteered"), plain, strict=True))


def test_draws_follow_the_distribution(llama: LanguageModel) -> None:
    """Of 4,000 first tokens, at a temperature: a chi-square test against the softmax."""
    settings = Sampling(max_new_tokens=1, n_samples=4000, temperature=0.7, seed=1)
    made = generate(llama, PROMPTS[0], {}, settings, measure="none")
    counts = np.bincount([int(text.tokens[0]) for text in made.texts], minlength=len(llama.tokenizer))
    logits = logits_with(llama, ids_of(llama, PROMPTS[0]))[-1, : len(llama.tokenizer)]  # the model has more rows
    expected = 4000 * (logits / 0.7).softmax(-1).numpy()
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    statistic = float(((observed - expected) ** 2 / expected).sum())
    from scipy.stats import chi2

    assert chi2.sf(statistic, len(observed) - 1) > 1e-3


def test_nucleus_keeps_the_fewest_that_reach_the_sum() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.8, 0.1, 0.05]]).log()
    kept = _nucleus(logits, 0.79).isfinite()
    assert kept.tolist() == [[True, True, False, False], [False, True, False, False]]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(llama: LanguageModel) -> None:
    prompt = ids_of(llama, PROMPTS[0])
    logits = logits_with(llama, prompt)[-1, : len(llama.tokenizer)].clone()
    for token in set(prompt):
        logits[token] = logits[token] / 5 if logits[token] > 0 else logits[token] * 5
    made = generate(llama, PROMPTS[0], {}, Sampling(max_new_tokens=1, temperature=0.0, repetition_penalty=5.0))
    assert int(made.texts[0].tokens[0]) == int(logits.argmax())


def test_controls_have_the_same_size(llama: LanguageModel) -> None:
    sae = sae_for(llama)
    one = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=3.0)
    arms = arms_of([one], seed=4)
    assert list(arms) == ["unsteered", "steered", "random", "negative"]
    random = arms["random"][0].directions()[HOOK]
    assert float(random.norm()) == pytest.approx(float(sae.W_dec[LATENT].detach().norm()), rel=1e-5)
    assert abs(float(torch.nn.functional.cosine_similarity(random, sae.W_dec[LATENT].detach(), dim=0))) < 0.7
    assert arms["negative"][0].strength == -3.0
    ablate = Intervention(sae=sae, ends=ENDS, latent=LATENT, mode="ablate").negative()
    assert (ablate.mode, ablate.strength) == ("scale", 2.0)


def test_streaming_stops_and_leaves_the_model_clean(llama: LanguageModel) -> None:
    sae, ids = sae_for(llama), ids_of(llama, PROMPTS[0])
    clean = logits_with(llama, ids)
    strong = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=40.0)
    settings = Sampling(max_new_tokens=10, n_samples=2)
    steps = stream(llama, PROMPTS[0], arms_of([strong]), settings)
    first = next(steps)
    assert first.shape == (4, 1, 2)
    assert torch.equal(logits_with(llama, ids), clean)  # between two tokens
    whole = generate(llama, PROMPTS[0], arms_of([strong]), settings, measure="none")
    assert [text.tokens[0] for text in whole.texts] == first.ravel().tolist()
    asked = iter([True, True, False])
    part = generate(llama, PROMPTS[0], [strong], settings, on_step=lambda tokens: next(asked))
    assert max(len(text.tokens) for text in part.texts) == 3
    assert torch.equal(logits_with(llama, ids), clean)


def test_an_interruption_in_the_middle_of_a_pass_leaves_the_model_clean(llama: LanguageModel) -> None:
    sae, ids = sae_for(llama), ids_of(llama, PROMPTS[0])
    clean, passes = logits_with(llama, ids), iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(passes) == 4:
            raise KeyboardInterrupt

    handle = llama.blocks[2].register_forward_pre_hook(interrupt)
    strong = Intervention(sae=sae, ends=ENDS, latent=LATENT, strength=40.0)
    with pytest.raises(KeyboardInterrupt):
        generate(llama, PROMPTS[0], [strong], Sampling(max_new_tokens=10))
    handle.remove()
    assert next(passes) == 5
    assert torch.equal(logits_with(llama, ids), clean)


def test_units_convert_into_each_other() -> None:
    units = Units(decoder_norm=2.0, maximum=5.0, median_norm=40.0)
    assert units.raw("6x") == 30
    assert units.raw("0.5n") == 10  # 10 · 2 is half of 40
    assert units.raw(-3) == -3
    assert units.all(30.0) == {"raw": 30.0, "max": 6.0, "norm": 1.5}
    assert Units(1.0).all(2.0) == {"raw": 2.0, "max": None, "norm": None}
    for wrong in ("six", "6y", "nan", "inf", ""):
        with pytest.raises(ValueError, match=r"is not known; expected 12 \(raw\), 6x"):
            units.raw(wrong)
    with pytest.raises(ValueError, match="without an index: run `saebench index`, or give a raw strength"):
        Units(1.0).raw("6x")
    with pytest.raises(ValueError, match="never fired"):
        Units(1.0, 0.0, 1.0).raw("6x")


def test_bad_input_says_what_is_wrong(llama: LanguageModel) -> None:
    sae, short = sae_for(llama), Sampling(max_new_tokens=4)
    with pytest.raises(ValueError, match="latent is 64; the SAE has 0 to 63"):
        Intervention(sae=sae, ends=ENDS, latent=64)
    with pytest.raises(ValueError, match="latent is -1; the SAE has 0 to 63"):
        units_of(sae, -1)
    with pytest.raises(ValueError, match="strength is nan; expected a finite number"):
        Intervention(sae=sae, ends=ENDS, latent=0, strength=float("nan"))
    with pytest.raises(ValueError, match="where names latent 99"):
        Intervention(sae=sae, ends=ENDS, latent=0, where=Where(99))
    foreign = Intervention(sae=new_sae("relu", 16, 32), ends=ENDS, latent=0, strength=1.0)
    with pytest.raises(ValueError, match=r"d_in 16, but model .* has 32; it is of another model"):
        generate(llama, PROMPTS[0], [foreign], short)
    beyond = Intervention(
        sae=sae, ends=Ends(("blocks.9.hook_resid_post",), ("blocks.9.hook_resid_post",)), latent=0, strength=1.0
    )
    with pytest.raises(ValueError, match="layers are 0 to 2"):
        generate(llama, PROMPTS[0], [beyond], short)
    masked = Intervention(sae=sae, ends=ENDS, latent=0, strength=1.0, positions=(True, False))
    with pytest.raises(ValueError, match="mask of positions has 2 values; the prompt has"):
        generate(llama, PROMPTS[0], [masked], short)
    with pytest.raises(ValueError, match="position is 9; the prompt has tokens 0 to 3"):
        mask_of([9], 4)
    with pytest.raises(ValueError, match=r"at most 54 fit into the model's context of 64"):
        generate(llama, "the cat " * 60, [], Sampling(max_new_tokens=10))
    cut = generate(llama, "the cat " * 60, [], Sampling(max_new_tokens=10), truncate=True)
    assert len(cut.prompts[0]) == 54
    for name, value in (("temperature", -1.0), ("top_p", 0.0), ("n_samples", 0), ("repetition_penalty", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Sampling(**{name: value})
