"""Dictionaries written in others' formats: what is read back is the same, and what a format cannot express is refused by name.

scripts/check_convert.py holds what is written to the packages themselves.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_formats import FOREIGN

from saebench.cli import main
from saebench.files import read_json
from saebench.sae import SAE, JumpReLUSAE, Writes, ends_of, kind_of, load_sae, new_sae, read_config, save_sae
from saebench.sae.convert import ConvertConfig, convert
from saebench.sae.formats import WRITERS, found

D, F = 8, 20
IN, OUT, STREAM = "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out", "blocks.3.hook_resid_post"
NAMES = {"sparsify": "sparsify", "dictionary_learning": "dictionary_learning", "gemma-scope": "Gemma Scope 2",
         "circuit-tracer": "circuit-tracer", "saelens": "SAELens"}  # fmt: skip
TAKES = {
    "saelens": {("relu", ""), ("topk", ""), ("gated", ""), ("jumprelu", ""),
                *itertools.product(("relu", "jumprelu"), ("transcoder", "skip_transcoder"))},
    "sparsify": set(itertools.product(("topk",), ("", "transcoder", "skip_transcoder"))),
    "dictionary_learning": set(itertools.product(("relu", "topk", "gated", "jumprelu"), ("",))),
    "gemma-scope": set(itertools.product(("relu", "jumprelu"), ("", "transcoder", "skip_transcoder"))),
    "circuit-tracer": set(itertools.product(("relu", "jumprelu"), ("transcoder", "skip_transcoder"))),
}  # fmt: skip
EVERY = list(itertools.product(("relu", "topk", "gated", "jumprelu"), ("", "transcoder", "skip_transcoder")))


@torch.no_grad()
def made(architecture: str, kind: str = "", normalize: Any = "none") -> SAE:
    """Random weights: decoder rows of every norm, and thresholds below 0 among them."""
    writes = Writes(d_out=D, skip=kind == "skip_transcoder") if kind else Writes()
    sae = new_sae(architecture, D, F, k=5, normalize=normalize, writes=writes)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def saved(sae: SAE, folder: Path, **more: Any) -> Path:
    ends = {"hook_name": STREAM} if sae.tied else {"hook_name": IN, "hook_name_out": OUT}
    save_sae(sae, folder, {"model_name": "some/model", "context_size": 64, "stated_l0": 5, **ends, **more})
    return folder


@pytest.mark.parametrize("to", TAKES)
@pytest.mark.parametrize(("architecture", "kind"), EVERY)
def test_what_is_written_is_read_back_the_same_or_refused_by_name(
    architecture: str, kind: str, to: Any, tmp_path: Path
) -> None:
    sae, source = made(architecture, kind), saved(made(architecture, kind), tmp_path / "ours")
    config = ConvertConfig(sae=source, to=to, out=tmp_path / "theirs")
    if (architecture, kind) not in TAKES[to]:
        with pytest.raises(ValueError, match=f"{to} cannot express (an? (SAE|transcoder)|W_skip).*choose another"):
            convert(config)
        assert not config.out.exists()
        return
    path = convert(config)
    assert found(path)[0].name == NAMES[to]
    loaded, x = load_sae(path), torch.randn(200, D) * 3 + 1
    want, got = sae(x), loaded(x)
    for ours, theirs in ((want.acts, got.acts), (want.x_hat, got.x_hat)):
        assert (ours - theirs).abs().max() <= 1e-6 * ours.abs().max()
    assert torch.equal(want.acts > 0, got.acts > 0)
    assert kind_of(loaded) == kind
    said = read_config(path)
    assert ends_of(path, said) == ((IN,), (OUT,)) if kind else ((STREAM,), (STREAM,))
    assert said["metadata"]["model_name"] == "some/model"
    assert to in ("gemma-scope", "circuit-tracer") or said["metadata"]["context_size"] == 64
    assert said.get("k") == (5 if architecture == "topk" else None)
    assert architecture == "topk" or to in ("sparsify", "circuit-tracer") or said["metadata"]["stated_l0"] == 5


def test_what_else_a_format_has_no_place_for_is_named(tmp_path: Path) -> None:
    def refused(sae: SAE, to: Any, message: str, **more: Any) -> None:
        source = saved(sae, tmp_path / str(len(list(tmp_path.iterdir()))), **more)
        with pytest.raises(ValueError, match=message):
            convert(ConvertConfig(sae=source, to=to, out=tmp_path / "out"))

    refused(made("topk", normalize="layer_norm"), "sparsify", "inputs normalised by 'layer_norm'")
    refused(made("relu", normalize="center"), "saelens", "inputs normalised by 'center'")
    refused(made("topk"), "sparsify", "the hook 'blocks.3.attn.hook_z'", hook_name="blocks.3.attn.hook_z")
    # What Gemma's MLP puts out is not what hook_mlp_out has.
    gemma = {"hook_name": "blocks.3.hook_mlp_out", "model_name": "google/gemma-2-2b"}
    refused(made("topk"), "sparsify", "not the ends of 'layers.3.mlp'", **gemma)
    refused(made("relu"), "gemma-scope", "the hook 'blocks.3.hook_attn_out'", hook_name="blocks.3.hook_attn_out")
    crosscoder = new_sae("jumprelu", D, F, writes=Writes(parts=(D // 2, D // 2)))
    hooks = {"reads": [STREAM, IN], "writes": [STREAM, IN]}
    for to in TAKES:
        refused(crosscoder, to, "what is written to 2 hooks", **hooks)


def test_a_set_for_circuit_tracer_grows_by_layers_of_one_kind(tmp_path: Path) -> None:
    out = tmp_path / "set"

    def add(layer: int, architecture: str = "jumprelu") -> Path:
        ends = {"hook_name": IN.replace("3", str(layer)), "hook_name_out": OUT.replace("3", str(layer))}
        source = saved(made(architecture, "transcoder"), tmp_path / f"{architecture}{layer}", **ends)
        return convert(ConvertConfig(sae=source, to="circuit-tracer", out=out))

    assert add(0) == out / "layer_0.safetensors"
    assert found(out)[1] == out / "layer_0.safetensors"
    add(1)
    with pytest.raises(ValueError, match=r"several transcoders; give the path of one: layer_0.*layer_1"):
        load_sae(out)
    assert isinstance(load_sae(out / "layer_1.safetensors"), JumpReLUSAE)
    with pytest.raises(ValueError, match="choose another --out"):
        add(2, "relu")
    with pytest.raises(ValueError, match="is there already"):
        add(1)
    # The first layer says for all of a set what has a skip, and how wide they are.
    skip = saved(made("jumprelu", "skip_transcoder"), tmp_path / "skip", hook_name=IN, hook_name_out=OUT)
    with pytest.raises(ValueError, match=r"layer_0\.safetensors has .*, and this transcoder .*'W_skip'"):
        convert(ConvertConfig(sae=skip, to="circuit-tracer", out=out))


@torch.no_grad()
def cross_layer(layer: int, layers: int, folder: Path, **more: Any) -> Path:
    """A part that reads one layer and writes to it and those behind, each of whose biases is that of its own part."""
    sae = new_sae("jumprelu", D, F, writes=Writes(d_out=D * (layers - layer), parts=(D,) * (layers - layer)))
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer)))
    sae.b_dec[D:] = 0
    reads, writes = [hook.replace("3", str(layer)) for hook in (IN, OUT)]
    later = [OUT.replace("3", str(at)) for at in range(layer, layers)]
    ends = {"hook_name": reads, "hook_name_out": writes, "reads": [reads], "writes": later}
    whole = {"set": "whole", "joint": True, "set_reads": [IN.replace("3", str(at)) for at in range(layers)]}
    return saved(sae, folder / f"part{layer}", **ends | whole | more)


def test_the_parts_of_a_cross_layer_transcoder_are_written_and_read_one_by_one(tmp_path: Path) -> None:
    out, x = tmp_path / "whole", torch.randn(50, D) * 3 + 1
    for layer in range(3):
        source = cross_layer(layer, 3, tmp_path)
        path = convert(ConvertConfig(sae=source, to="circuit-tracer", out=out))
        assert path == out / f"W_enc_{layer}.safetensors"
        want, got = load_sae(source), load_sae(path)
        torch.testing.assert_close(got(x).acts, want(x).acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got(x).x_hat, want(x).x_hat, rtol=1e-5, atol=1e-5)
        assert got.parts == want.parts
        ours, theirs = read_config(source)["metadata"], read_config(path)["metadata"]
        assert all(ours[name] == theirs[name] for name in ("reads", "writes", "set", "joint", "set_reads"))
    with safe_open(out / "W_dec_1.safetensors", "pt") as opened:
        assert opened.get_slice("W_dec_1").get_shape() == [F, 2, D]  # latents, layers 1 and 2
    other = tmp_path / "other"
    for layer, layers, more, message in (
        (1, 4, {}, r"W_dec_0\.safetensors has shape .*, and beside this transcoder it would have"),
        (3, 4, {"set_reads": [IN]}, "begins at layer 3 and not at 0"),
        (1, 3, {"writes": [OUT.replace("3", "1"), OUT]}, "a transcoder from layer 1 to blocks.1.hook_mlp_out, blocks.3.hook_mlp_out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(ConvertConfig(sae=cross_layer(layer, layers, other, **more), to="circuit-tracer", out=out))
    sae = load_sae(cross_layer(0, 2, other))
    sae.b_dec.data[D:] = 1.0
    save_sae(sae, other / "part0", read_config(other / "part0")["metadata"])
    with pytest.raises(ValueError, match="a bias at a layer behind the one that is read"):
        convert(ConvertConfig(sae=other / "part0", to="circuit-tracer", out=tmp_path / "biased"))


def test_a_pt_is_a_plain_state_dict_and_nothing_is_written_over(tmp_path: Path) -> None:
    source = saved(made("topk"), tmp_path / "ours")
    config = ConvertConfig(sae=source, to="dictionary_learning", out=tmp_path / "theirs")
    convert(config)
    held = torch.load(config.out / "ae.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in held.items()} == {
        "encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "b_dec": (D,), "k": (), "threshold": (),
    }  # fmt: skip
    # Rows keep their norms: with others, other latents would be the k largest.
    assert torch.equal(held["decoder.weight"].T, made("topk").W_dec)
    for to in (*WRITERS, "saelens"):
        if to in ("dictionary_learning", "sparsify", "saelens"):
            convert(ConvertConfig(sae=source, to=to, out=tmp_path / f"{to} again"))
            with pytest.raises(ValueError, match="is there already; choose another --out"):
                convert(ConvertConfig(sae=source, to=to, out=tmp_path / f"{to} again"))


def test_one_of_anothers_format_goes_into_a_third_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    openai = FOREIGN / "gpt2-small/resid_delta_mlp/autoencoders/2.pt"
    assert main(["convert", str(openai), "--to", "dictionary_learning", "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a")
    x = torch.randn(20, 6)
    torch.testing.assert_close(load_sae(tmp_path / "a")(x).x_hat, load_sae(openai)(x).x_hat)
    goodfire = FOREIGN / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    copy = tmp_path / "nameless.pth"
    copy.write_bytes(goodfire.read_bytes())
    options = ["--to", "gemma-scope", "--out", str(tmp_path / "b")]
    assert main(["convert", str(copy), *options]) == 2
    assert "give it with --hook" in capsys.readouterr().err
    assert main(["convert", str(copy), *options, "--hook", STREAM, "--model", "some/model"]) == 0
    assert read_json(tmp_path / "b/config.json")["hf_hook_point_in"] == "model.layers.3.output"


def test_an_sae_of_heads_says_so_as_saelens_does(tmp_path: Path) -> None:
    folder = saved(made("relu"), tmp_path / "z", hook_name="blocks.3.attn.hook_z")
    assert read_json(folder / "cfg.json")["reshape_activations"] == "hook_z"
    load_sae(folder)
