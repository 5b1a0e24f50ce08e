"""Attribution to latents: sums, and agreement with what ablation does."""

import math

import numpy as np
import pytest
import torch

from saebench.evaluate.attribution import ablation_effects, attribute, logit_of
from saebench.models import LanguageModel, capture, edits, load_model, logits
from saebench.models.attach import first_of
from saebench.sae import SAE, Ends, initialise, new_sae
from saebench.sae.architectures import normalized

HOOK = "blocks.2.hook_resid_post"
ENDS = Ends((HOOK,), (HOOK,))
TEXT = "import os\n\ndef main(path, name):\n    for line in open(path):\n        print(line)\n    return"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokens(model: LanguageModel) -> np.ndarray:
    return np.array([model.tokenizer.bos_token_id, *model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]])


@pytest.fixture(scope="module", params=["none", "layer_norm", "constant_norm_rescale"])
def sae(request: pytest.FixtureRequest, model: LanguageModel, tokens: np.ndarray) -> SAE:
    """Random decoder rows fitted to the text's own vectors, so that the error is a part and not the whole."""
    made = new_sae("topk", 256, 512, k=24, normalize=request.param)
    x_LD = vectors(model, tokens)
    initialise(made, normalized(x_LD, request.param)[0].mean(0), torch.Generator().manual_seed(0))
    return made


def vectors(model: LanguageModel, tokens: np.ndarray) -> torch.Tensor:
    return capture(model, torch.from_numpy(tokens)[None], [HOOK])[HOOK][0].clone()


def logits_at(model: LanguageModel, tokens: np.ndarray, x_LD: torch.Tensor) -> torch.Tensor:
    with edits(model, {HOOK: lambda value: x_LD[None]})():
        return logits(model, torch.from_numpy(tokens)[None])[0]


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("everywhere", [True, False])
def test_effects_and_errors_sum_to_the_difference(
    model: LanguageModel, sae: SAE, tokens: np.ndarray, steps: int, everywhere: bool
) -> None:
    """BOS is an attention sink and left as it is, unless asked for."""
    target = int(model.tokenizer(" line", add_special_tokens=False)["input_ids"][0])
    metric = logit_of(target)
    got = attribute(model, sae, ENDS, tokens, metric, steps=steps, longest=None if everywhere else math.inf)
    x_LD = vectors(model, tokens)
    # At x₀ the decoder bias stands at every position, brought back to the size of the row where the SAE rescales.
    _, scale, shift = normalized(x_LD, sae.normalize)
    base_LD = (sae.b_dec * scale + shift).expand_as(x_LD).detach().clone()
    if not everywhere:
        base_LD[0] = x_LD[0]
        assert 0 not in got.positions
        assert got.errors[0] == 0
    with torch.no_grad():
        assert got.metric == pytest.approx(float(metric(logits_at(model, tokens, x_LD))), rel=1e-4)
        assert got.baseline == pytest.approx(float(metric(logits_at(model, tokens, base_LD))), rel=1e-4)
    if steps == 1:
        leaf = x_LD.requires_grad_(True)
        metric(logits_at(model, tokens, leaf)).backward()
        assert leaf.grad is not None
        expected = float((leaf.grad * (x_LD - base_LD)).sum().detach())
        assert got.total == pytest.approx(expected, rel=1e-3, abs=1e-3)
    else:
        assert got.total == pytest.approx(got.metric - got.baseline, rel=0.05)
    assert np.abs(got.errors).sum() > 0
    assert len(got.errors) == len(tokens)


def test_a_small_activation_is_attributed_what_its_ablation_takes_away(
    model: LanguageModel, sae: SAE, tokens: np.ndarray
) -> None:
    """To first order the two are one: shown where the latent's part is made small against its row."""
    metric = logit_of(5, position=-1)
    got = attribute(model, sae, ENDS, tokens, metric)
    alone = [latent for latent in np.unique(got.latents) if (got.latents == latent).sum() == 1]
    effects = {latent: float(got.effects[got.latents == latent].sum()) for latent in alone}
    chosen = sorted(effects, key=lambda latent: -abs(effects[latent]))[:8]
    changes = [-float(metric(ablation_effects(model, sae, ENDS, tokens, int(latent))[0])) for latent in chosen]
    assert np.corrcoef(changes, [effects[latent] for latent in chosen])[0, 1] > 0.8


def test_ablating_a_latent_that_does_not_fire_changes_nothing(
    model: LanguageModel, sae: SAE, tokens: np.ndarray
) -> None:
    got = attribute(model, sae, ENDS, tokens, logit_of(5))
    silent = next(latent for latent in range(sae.d_sae) if latent not in got.latents)
    logits, loss = ablation_effects(model, sae, ENDS, tokens, silent)
    assert logits.abs().max() == 0
    assert loss[:-1].abs().max() == 0
    assert loss[-1].isnan()


def test_the_gradient_is_that_of_the_vectors_at_the_hook_alone(
    model: LanguageModel, sae: SAE, tokens: np.ndarray
) -> None:
    """No weight has one, and what lies before the hook is not part of it."""
    outputs: dict[int, bool] = {}

    def see(layer: int, output: object) -> None:
        if torch.is_grad_enabled():
            outputs[layer] = first_of(output).requires_grad

    handles = [
        block.register_forward_hook(lambda _module, _args, output, layer=layer: see(layer, output))
        for layer, block in enumerate(model.blocks)
    ]
    attribute(model, sae, ENDS, tokens, logit_of(5))
    for handle in handles:
        handle.remove()
    assert outputs == {layer: layer > 2 for layer in range(model.n_layers)}
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_massive_vectors_are_left_alone(model: LanguageModel, sae: SAE, tokens: np.ndarray) -> None:
    norms = vectors(model, tokens).norm(dim=1)
    longest = float(norms[1:].median())
    short = np.flatnonzero((norms <= longest).numpy() & (np.arange(len(tokens)) > 0))
    got = attribute(model, sae, ENDS, tokens, logit_of(5), longest=longest)
    assert set(got.positions) == set(short)
    everywhere = attribute(model, sae, ENDS, tokens, logit_of(5), longest=None)
    assert set(everywhere.positions) == set(range(len(tokens)))
    at = {int(latent): set(everywhere.positions[everywhere.latents == latent]) for latent in everywhere.latents}
    latent = next(latent for latent, places in at.items() if not places & set(short))
    assert ablation_effects(model, sae, ENDS, tokens, latent, longest=longest)[0].abs().max() == 0
    assert ablation_effects(model, sae, ENDS, tokens, latent, longest=None)[0].abs().max() > 0


def test_the_first_position_is_left_alone_whatever_stands_there(
    model: LanguageModel, sae: SAE, tokens: np.ndarray
) -> None:
    """A ready-made context need not begin with BOS; its first vector is a sink all the same, and no store keeps it."""
    ready = tokens[1:]
    everywhere = attribute(model, sae, ENDS, ready, logit_of(5), longest=None)
    assert 0 in everywhere.positions
    assert 0 not in attribute(model, sae, ENDS, ready, logit_of(5)).positions
    at = {int(latent): set(everywhere.positions[everywhere.latents == latent]) for latent in everywhere.latents}
    first = next(latent for latent, places in at.items() if places == {0})
    assert ablation_effects(model, sae, ENDS, ready, first)[0].abs().max() == 0
    assert ablation_effects(model, sae, ENDS, ready, first, longest=None)[0].abs().max() > 0


def test_nonsense_is_refused(model: LanguageModel, sae: SAE, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="steps is 0; expected 1"):
        attribute(model, sae, ENDS, tokens, logit_of(5), steps=0)
    with pytest.raises(ValueError, match=r"latent is 512; the SAE has 0 to 511"):
        ablation_effects(model, sae, ENDS, tokens, 512)
