"""An SAE inside a model: of `load_model`, of TransformerLens, and a plain Hugging Face module."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOOK, WIDTH, an_sae
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import saebench
from saebench.models import LanguageModel, capture, edits, load_model
from saebench.sae import SAE, Ends, Writes, attached, load_sae, new_sae, save_sae
from saebench.store import Store

IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 41, 42, 43, 44, 45]])
IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> LanguageModel:
    return load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def bridge(checkpoints: dict[str, Path]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(checkpoints["llama"]), device="cpu").eval()


@pytest.fixture(scope="module")
def sae(store: Store, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    folder = tmp_path_factory.mktemp("sae")
    save_sae(an_sae("topk", store), folder, {"hook_name": HOOK})
    return load_sae(folder)


@torch.no_grad()
def transcoder(skip: bool = True) -> SAE:
    made = new_sae("relu", WIDTH, 24, writes=Writes(d_out=WIDTH, skip=skip))
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.3)
    made.ends = Ends((IN,), (OUT,))
    return made.requires_grad_(False)


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out = (model.module if isinstance(model, LanguageModel) else model)(ids)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("kind", ["ours", "transformers", "bridge"])
def test_with_the_error_a_model_is_itself_and_without_it_the_sae_is_spliced(
    kind: str, model: LanguageModel, bridge: Any, sae: SAE, checkpoints: dict[str, Path]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()
    of = {"ours": model, "transformers": plain, "bridge": bridge}[kind]
    module = model.module if kind == "ours" else of
    with torch.no_grad():
        own, before = logits(of), hooks_of(module)
        for one in (sae, transcoder()):
            with attached(of, one) as on:
                assert torch.equal(logits(of), own)
            with attached(of, one, error=False):
                without = logits(of)
            read = capture(model, IDS, list(one.ends.hooks))
            x = read[one.ends.reads[0]]
            rows = one(x.flatten(0, 1))
            assert on.acts is not None
            torch.testing.assert_close(on.acts.flatten(0, 1), rows.acts, atol=1e-4, rtol=1e-4)
            with edits(model, {one.ends.writes[0]: lambda _, y=rows.x_hat.view_as(x): y})():
                torch.testing.assert_close(without, logits(model), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(without, own, atol=1e-2)
        assert torch.equal(logits(of), own)
        assert hooks_of(module) == before


def test_an_edit_is_the_intervention_by_hand(model: LanguageModel, sae: SAE) -> None:
    with torch.no_grad():
        acts = sae.encode(capture(model, IDS, [HOOK])[HOOK].flatten(0, 1)).view(*IDS.shape, -1)
        latent = int(acts[:, 1:].amax((0, 1)).argmax())

        def off(acts: Tensor) -> Tensor:
            acts[..., latent] = 0  # in place, too
            return acts

        where = IDS != 0
        with attached(model, sae, edit=off, where=where) as on:
            got = logits(model)
            on.edit = None
            assert torch.equal(logits(model), logits(model))
        change = acts[..., latent, None] * sae.W_dec[latent] * where[..., None]
        with edits(model, {HOOK: lambda y: y - change})():
            torch.testing.assert_close(got, logits(model), atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(model)[:, 0], got[:, 0])


@pytest.mark.parametrize("which", ["sae", "transcoder"])
def test_gradients_to_activations_are_finite_differences(which: str, model: LanguageModel, sae: SAE) -> None:
    one = sae if which == "sae" else transcoder()
    with attached(model, one) as on:
        logits(model)[0, -1, 7].backward()
        assert on.acts is not None
        assert on.acts.grad is not None
        gradient = on.acts.grad[0]
        place, latent = (int(each) for each in divmod(int(gradient.abs().argmax()), one.d_sae))
        ends = []
        for step in (-1e-2, 1e-2):

            def nudge(acts: Tensor, step: float = step) -> Tensor:
                acts[0, place, latent] += step
                return acts

            on.edit = nudge
            ends.append(float(logits(model)[0, -1, 7].detach()))
    assert (ends[1] - ends[0]) / 2e-2 == pytest.approx(float(gradient[place, latent]), rel=2e-2)


def test_gradients_pass_through_an_sae_to_one_before_it_and_the_error_is_a_constant(
    model: LanguageModel, sae: SAE
) -> None:
    with attached(model, transcoder()) as first, attached(model, sae) as second:
        logits(model)[0, -1].sum().backward()
    assert first.acts is not None
    assert second.acts is not None
    assert first.acts.grad is not None
    assert float(first.acts.grad.abs().max()) > 0
    # As in SAELens: what the SAE does not reconstruct has no gradient.
    x = torch.randn(1, 4, WIDTH, requires_grad=True)
    with attached(model, sae) as on:
        out = on.see(HOOK, x)
        assert out is not None
        got = torch.autograd.grad(out.sum(), x)[0]
    want = torch.autograd.grad(sae(x[0]).x_hat.sum(), x)[0]
    torch.testing.assert_close(got, want)


def test_blocks_nest_and_leave_nothing_behind_even_after_an_error(model: LanguageModel, sae: SAE) -> None:
    own, before = logits(model), hooks_of(model.module)
    with ExitStack() as stack:
        ons = [stack.enter_context(attached(model, one)) for one in (sae, transcoder(), sae)]
        assert torch.equal(logits(model), own)
        seen = ons[0].acts
        with attached(model, transcoder(False)):  # whose hooks are tried, and not by the SAEs
            assert ons[0].acts is seen
    with pytest.raises(ZeroDivisionError), attached(model, sae, edit=lambda acts: acts / (1 // 0)):
        logits(model)
    assert hooks_of(model.module) == before
    assert torch.equal(logits(model), own)


def test_where_may_be_a_function_of_what_is_read(model: LanguageModel, sae: SAE) -> None:
    with torch.no_grad():
        own, x = logits(model), capture(model, IDS, [HOOK])[HOOK]
        longest = float(x.norm(dim=-1)[:, 1:].max())
        with attached(model, sae, error=False, where=lambda x: x.norm(dim=-1) > 2 * longest + 1e6):
            assert torch.equal(logits(model), own)
        with attached(model, sae, error=False, where=lambda x: x.norm(dim=-1) > 0):
            assert not torch.equal(logits(model), own)


def test_what_does_not_fit_is_an_error(model: LanguageModel, bridge: Any, sae: SAE) -> None:
    def fails(message: str, one: SAE = sae, of: Any = model, **options: Any) -> None:
        with pytest.raises(ValueError, match=message), attached(of, one, **options):
            logits(of)

    fails("does not say which hooks", new_sae("relu", WIDTH, 8))
    fails("reads 8 numbers, and the model has 32", new_sae("relu", 8, 8), ends=Ends((HOOK,), (HOOK,)))
    crosscoder = new_sae("relu", 2 * WIDTH, 8, writes=Writes(parts=(WIDTH, WIDTH)))
    fails(
        "before it has read blocks.1",
        crosscoder,
        ends=Ends(("blocks.0.hook_resid_post", HOOK), ("blocks.0.hook_resid_post", HOOK)),
    )
    fails(r"edit returned NoneType; expected activations of shape \(2, 6, 48\)", edit=lambda acts: None)
    fails(r"where is torch.bool of shape \(6,\)", where=lambda x: torch.ones(6, dtype=torch.bool))
    fails(
        "hook 'blocks.9.hook_resid_post' is beyond",
        ends=Ends(("blocks.9.hook_resid_post",), ("blocks.9.hook_resid_post",)),
    )
    fails("has no hook 'blocks.9", of=bridge, ends=Ends(("blocks.9.hook_resid_post",), ("blocks.9.hook_resid_post",)))
    model.module.train()
    try:
        fails("is in training", of=model.module)
    finally:
        model.module.eval()


def test_the_names_a_notebook_begins_with_are_imported_as_they_are_asked_for() -> None:
    code = "import sys, saebench; assert not {'torch', 'saebench.sae'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in saebench._ROOMS:
        assert getattr(saebench, name).__name__ == name
    assert saebench.load_sae is load_sae
    with pytest.raises(AttributeError, match="saebench has no 'nothing'"):
        saebench.nothing  # noqa: B018
