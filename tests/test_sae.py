import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench.sae import (
    SAE,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    TopKSAE,
    Writes,
    fold,
    initialise,
    kind_of,
    load_sae,
    new_sae,
    part,
    read_config,
    reconstruct_sparse,
    save_sae,
    topk_relu,
    update_metadata,
)
from saebench.train.recipes import RECIPES

D, F, B = 6, 20, 40
METADATA = {"model_name": "m", "hook_name": "blocks.0.hook_resid_post", "context_size": 16}


def random_sae(architecture: str, seed: int = 0, **writes: Any) -> SAE:
    """An SAE whose every parameter is random, thresholds positive, decoder rows of various lengths."""
    sae = new_sae(architecture, D, F, k=5, writes=Writes(**writes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
            if name == "threshold":
                parameter.abs_()
        if not sae.tied:
            sae.mean_D.copy_(torch.randn(D, generator=generator))
    return sae


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed)) * 2


def numpy_forward(config: dict, weights: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(activations, reconstruction) by SAELens' definitions, in float64 and loops."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    z = x - w["b_dec"] if config.get("apply_b_dec_to_input", True) else x
    h = z @ w["W_enc"]
    norms = np.sqrt((w["W_dec"] ** 2).sum(1))
    rescale = config.get("rescale_acts_by_decoder_norm", False)
    architecture = re.sub("_?(skip_)?(transcoder|crosscoder)$", "", config["architecture"]) or "relu"
    if architecture in ("standard", "relu"):
        acts = np.maximum(h + w["b_enc"], 0)
    elif architecture == "jumprelu":
        pre = h + w["b_enc"]
        acts = np.maximum(pre, 0) * (pre > w["threshold"])
    elif architecture == "gated":
        acts = (h + w["b_gate"] > 0) * np.maximum(h * np.exp(w["r_mag"]) + w["b_mag"], 0)
    else:
        pre = (h + w["b_enc"]) * (norms if rescale else 1)
        acts = np.zeros_like(pre)
        for row in range(len(x)):
            for latent in np.argsort(-pre[row])[: config["k"]]:
                acts[row, latent] = max(pre[row, latent], 0)
    decoded = (acts / norms if rescale else acts) @ w["W_dec"] + w["b_dec"]
    return acts, decoded + x @ w["W_skip"].T if "W_skip" in w else decoded


# ------------------------------------------------------------------------------------------- maths


def test_relu_by_hand() -> None:
    sae = ReLUSAE(2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    out = sae(torch.tensor([[2.0, 3.0]]))
    assert out.pre.tolist() == [[1.5, -2.0]]  # (2 - 1)·1 + 0.5, (3 - 1)·(-1)
    assert out.acts.tolist() == [[1.5, 0.0]]
    assert out.x_hat.tolist() == [[4.0, 1.0]]


def test_topk_keeps_the_largest_and_cuts_negatives() -> None:
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-5.0, -2.0, -3.0, 1.0]])
    assert topk_relu(pre, 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


def test_gated_gate_and_magnitude_by_hand() -> None:
    sae = GatedSAE(1, 3)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.r_mag.fill_(math.log(2))
        sae.b_gate.copy_(torch.tensor([0.0, -3.0, 0.0]))
        sae.b_mag.copy_(torch.tensor([1.0, 1.0, -9.0]))
    # open gate; closed gate; open gate with a negative magnitude
    assert torch.allclose(sae.encode(torch.tensor([[2.0]])), torch.tensor([[5.0, 0.0, 0.0]]))


def test_jumprelu_threshold_is_strict() -> None:
    sae = JumpReLUSAE(1, 2)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.threshold.copy_(torch.tensor([2.0, 1.9]))
    assert sae.encode(torch.tensor([[2.0]])).tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
def test_saved_weights_mean_the_same_to_an_independent_forward(architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture)
    save_sae(sae, tmp_path, METADATA)
    weights = {name: value.numpy() for name, value in load_file(tmp_path / "sae_weights.safetensors").items()}
    acts, x_hat = numpy_forward(json.loads((tmp_path / "cfg.json").read_text()), weights, inputs().double().numpy())
    out = sae(inputs())
    assert np.allclose(out.acts.detach(), acts, atol=1e-5)
    assert np.allclose(out.x_hat.detach(), x_hat, atol=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
def test_folding_gives_unit_rows_and_the_same_reconstruction_in_input_units(architecture: str) -> None:
    sae, scale = random_sae(architecture), 0.37
    if architecture == "topk":  # selection is by pre-activation: training keeps these rows at norm 1
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    before = sae(inputs() * scale)
    norms = sae.W_dec.norm(dim=1)
    fold(sae, scale)
    after = sae(inputs())
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    assert torch.allclose(after.x_hat, before.x_hat / scale, atol=1e-5)
    assert torch.allclose(after.acts, before.acts * norms / scale, atol=1e-5)


def test_folding_leaves_a_latent_without_a_direction_alone() -> None:
    sae = random_sae("relu")
    with torch.no_grad():
        sae.W_dec[3] = 0
    fold(sae)
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())


@pytest.mark.parametrize(
    ("architecture", "row", "column"),
    [
        ("relu", math.sqrt(2 * D / F), math.sqrt(2 * D / F)), ("jumprelu", math.sqrt(2 * D / F), math.sqrt(2 * D / F)),
        ("topk", 1, 1), ("batchtopk", 1, 1), ("matryoshka", 1, 1), ("gated", 1, 2 * D / F),
    ],
)  # fmt: skip
def test_initial_weights_are_tied_and_scaled_by_architecture(architecture: str, row: float, column: float) -> None:
    sae = new_sae(RECIPES[architecture].sae.architecture, D, F, k=3)
    mean = torch.arange(D).float()
    initialise(sae, mean, torch.Generator().manual_seed(0), RECIPES[architecture].gains)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((F,), float(row)))
    assert torch.allclose(sae.W_enc.norm(dim=0), torch.full((F,), float(column)))
    assert torch.allclose(sae.W_enc.T / column, sae.W_dec / row, atol=1e-6)
    assert torch.equal(sae.b_dec, mean)


# ------------------------------------------------------------------- what reads here and writes there

KINDS: dict[str, dict[str, Any]] = {
    "transcoder": {"d_out": 4},
    "skip_transcoder": {"d_out": 4, "skip": True},
    "crosscoder": {"parts": (2, 4)},
}
KINDS_OF_ALL = [(architecture, kind) for architecture in ("relu", "topk", "gated", "jumprelu") for kind in KINDS]


def folded(architecture: str, kind: str) -> SAE:
    """As a training ends: its vectors were scaled, and centred where it is no autoencoder."""
    sae = random_sae(architecture, **KINDS[kind])
    with torch.no_grad():
        if architecture == "topk":
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    fold(sae, *SCALES[kind])
    return sae


EACH = torch.tensor([0.3, 0.3, 1.7, 1.7, 1.7, 1.7])
SCALES: dict[str, tuple[Any, ...]] = {"transcoder": (0.37, 2.3), "skip_transcoder": (0.37, 2.3), "crosscoder": (EACH,)}


@pytest.mark.parametrize(("architecture", "kind"), KINDS_OF_ALL)
def test_folding_scales_of_what_is_read_and_written_changes_no_reconstruction(architecture: str, kind: str) -> None:
    if (architecture, kind) == ("topk", "crosscoder"):
        pytest.skip("its latents compete by what folding changes: `train` refuses it")
    trained = random_sae(architecture, **KINDS[kind])
    if architecture == "topk":
        with torch.no_grad():
            trained.W_dec /= trained.W_dec.norm(dim=1, keepdim=True)
    reads, *writes = SCALES[kind]
    want, sae = trained(inputs() * reads).x_hat / (writes or [reads])[0], folded(architecture, kind)
    assert torch.allclose(sae(inputs()).x_hat, want, atol=1e-4)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    assert torch.allclose(sae.lengths_FH.square().sum(1), torch.ones(F), atol=1e-5)
    assert sae.lengths_FH.shape == (F, len(sae.parts))
    assert sae.tied or not sae.b_pre.any()


@pytest.mark.parametrize(("architecture", "kind"), KINDS_OF_ALL)
def test_they_are_saved_by_saelens_names_and_definitions(architecture: str, kind: str, tmp_path: Path) -> None:
    sae = folded(architecture, kind)
    save_sae(sae, tmp_path, METADATA)
    config, loaded = read_config(tmp_path), load_sae(tmp_path)
    assert config["architecture"] == (kind if architecture == "relu" else f"{architecture}_{kind}")
    assert config["apply_b_dec_to_input"] == (kind == "crosscoder")
    assert (config.get("d_out"), config.get("parts")) == ((None, [2, 4]) if kind == "crosscoder" else (4, None))
    weights = {name: value.numpy() for name, value in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert weights.get("W_skip", np.zeros((4, D))).shape == (4, D)
    acts, y_hat = numpy_forward(config, weights, inputs().double().numpy())
    assert np.allclose(loaded(inputs()).acts, acts, atol=1e-5)
    assert np.allclose(loaded(inputs()).x_hat, y_hat, atol=1e-5)
    assert np.allclose(reconstruct_sparse(loaded, inputs())[0], y_hat, atol=1e-5)
    assert kind_of(loaded) == kind
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in sae.state_dict().items())
    if architecture != "topk":
        latents = torch.tensor([7, 0, 3])
        torch.testing.assert_close(part(loaded, latents).encode(inputs()), loaded.encode(inputs())[:, latents])


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ({"parts": (2, 3)}, r"parts are \(2, 3\); expected widths that add up to 6"),
        ({"skip": True}, "skip is True of what writes what it reads"),
        ({"d_out": 4, "normalize": "layer_norm"}, "normalize is 'layer_norm' of a transcoder; expected 'none'"),
    ],
)
def test_what_cannot_be_written_is_named(writes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_sae("relu", D, F, normalize=writes.pop("normalize", "none"), writes=Writes(**writes))


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
def test_round_trip(architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture)
    save_sae(sae, tmp_path, METADATA)
    loaded = load_sae(tmp_path)
    assert type(loaded) is type(sae)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in sae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_configuration_is_what_saelens_asks_for(tmp_path: Path) -> None:
    save_sae(random_sae("topk"), tmp_path, METADATA)
    config = read_config(tmp_path)
    assert config == {
        "architecture": "topk", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "k": 5,
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": "6.0.0", **METADATA},
    }  # fmt: skip
    update_metadata(tmp_path, l0=5.0)
    assert read_config(tmp_path)["metadata"]["l0"] == 5.0


def write_saelens(folder: Path, architecture: str, **config: object) -> tuple[dict, dict[str, np.ndarray]]:
    """A directory as SAELens 6 writes it."""
    theirs = {"relu": "standard"}.get(architecture, architecture)
    tensors = {
        name: value.detach().contiguous() for name, value in random_sae(architecture, seed=5).state_dict().items()
    }
    cfg = {
        "architecture": theirs, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.0", **METADATA},
        **({"k": 5, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}), **config,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    return cfg, {name: value.numpy() for name, value in tensors.items()}


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_saelens_directories_reconstruct_as_in_saelens(architecture: str, pre_bias: bool, tmp_path: Path) -> None:
    config, weights = write_saelens(tmp_path, architecture, apply_b_dec_to_input=pre_bias)
    acts, x_hat = numpy_forward(config, weights, inputs().double().numpy())
    out = load_sae(tmp_path)(inputs())
    assert np.allclose(out.acts, acts, atol=1e-5)
    assert np.allclose(out.x_hat, x_hat, atol=1e-5)


def test_topk_with_activations_rescaled_by_decoder_norm(tmp_path: Path) -> None:
    config, weights = write_saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    acts, x_hat = numpy_forward(config, weights, inputs().double().numpy())
    out = load_sae(tmp_path)(inputs())
    assert np.allclose(out.acts, acts, atol=1e-5)
    assert np.allclose(out.x_hat, x_hat, atol=1e-5)


@pytest.mark.parametrize("how", ["constant_norm_rescale", "layer_norm", "expected_average_only_in"])
def test_input_normalisations_of_saelens(how: str, tmp_path: Path) -> None:
    config, weights = write_saelens(tmp_path, "relu", normalize_activations=how)
    x = inputs().double().numpy()
    scale, shift = 1.0, 0.0
    if how == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=1, keepdims=True) / math.sqrt(D)
    elif how == "layer_norm":
        shift, scale = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True) + 1e-5
    _, x_hat = numpy_forward(config, weights, (x - shift) / scale)
    assert np.allclose(load_sae(tmp_path)(inputs()).x_hat, x_hat * scale + shift, atol=1e-4)


def test_bfloat16_weights_load_in_float32(tmp_path: Path) -> None:
    write_saelens(tmp_path, "relu", dtype="bfloat16")
    tensors = {name: value.bfloat16() for name, value in load_file(tmp_path / "sae_weights.safetensors").items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    sae = load_sae(tmp_path)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, tensors["W_enc"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "temporal"},
            "has architecture 'temporal'; this version loads standard, topk, gated, jumprelu, transcoder, topk_transcoder, ",
        ),
        ({"architecture": "transcoder"}, "has no d_out; a transcoder cannot be used without it"),
        ({"architecture": "transcoder", "d_out": D}, "says apply_b_dec_to_input; expected false of a transcoder"),
        ({"architecture": "crosscoder"}, r"has parts \(\); expected those of two hooks or more of a crosscoder"),
        ({"parts": [2, 4]}, r"has parts \(2, 4\); expected those of two hooks or more of a crosscoder, and of no SAE"),
        ({"reshape_activations": "hook_z"}, "says reshape_activations: .hook_z., and reads blocks.0.hook_resid_post"),
        ({"normalize_activations": "covariance_whitening"}, "normalises its inputs by 'covariance_whitening'"),
        ({"d_sae": F + 1}, "does not hold the weights of this SAE"),
        ({"architecture": "gated"}, "does not hold the weights of this SAE"),
        ({"architecture": "topk", "k": F + 1}, f"k is {F + 1}; expected 1 to d_sae = {F}"),
        ({"architecture": "topk"}, "has no k; a topk SAE cannot be used without it"),
    ],
)
def test_what_cannot_be_loaded_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    config, _ = write_saelens(tmp_path, "relu")
    (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no SAE"):
        load_sae(tmp_path)
    write_saelens(tmp_path, "relu")
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="does not hold the weights of this SAE"):
        load_sae(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="does not hold the weights of this SAE"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text('{"d_in": 3}')
    with pytest.raises(ValueError, match="lacks architecture, d_sae"):
        load_sae(tmp_path)


def test_impossible_architectures_are_named() -> None:
    with pytest.raises(ValueError, match="architecture 'vanilla' is not one of relu, topk, gated, jumprelu"):
        new_sae("vanilla", D, F)
    with pytest.raises(ValueError, match="needs k"):
        new_sae("topk", D, F)
    with pytest.raises(ValueError, match="k is 21; expected 1 to d_sae = 20"):
        TopKSAE(D, F, 21)


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_a_part_of_an_sae_is_its_latents_in_the_order_given(architecture: str, normalize: str) -> None:
    sae, x_BD, latents = random_sae(architecture), inputs(), torch.tensor([7, 0, 3])
    sae.normalize = normalize
    whole, some = sae(x_BD), part(sae, latents)
    # Latents of a TopK SAE compete, and those of its part do not.
    acts_BF = torch.relu(whole.pre) if architecture == "topk" else whole.acts
    assert (acts_BF[:, latents] > 0).any()
    torch.testing.assert_close(some.encode(x_BD), acts_BF[:, latents])
    torch.testing.assert_close(some.decode(torch.eye(3)), sae.W_dec[latents] + sae.b_dec)
