"""Write tests/fixtures/foreign: a small dictionary in each format that others save, with what its own package makes of the same rows.

Run it in an environment with the packages: `pip install sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0`, then
`python scripts/make_foreign_fixtures.py`. SAELens, sparsify and dictionary_learning save and run their own classes. The other formats
come without a package that installs: their files are written, and their forward passes worked out, as their code has it.
circuit-tracer needs other versions of what these need: in an environment with `pip install circuit-tracer==0.5.0`,
`python scripts/make_foreign_fixtures.py circuit-tracer` makes its folder anew, and leaves the others.

`expected.safetensors` holds the rows `x`, and of each dictionary, by its path, activations and what is written. The 80 combinations of
SAELens' flags, on its five kinds of SAE, are in `saelens/combinations.safetensors`, in the order of `COMBINATIONS`.
"""

import itertools
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, E, F, B, K = 6, 6, 10, 5, 3
OUT = Path("tests/fixtures/foreign")
CIRCUIT_TRACER = OUT / "circuit-tracer"
KINDS = ("standard", "gated", "topk", "jumprelu", "batchtopk")
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
COMBINATIONS = list(itertools.product(KINDS, (True, False), NORMALIZATIONS, (True, False)))

expected: dict[str, torch.Tensor] = {}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.7


def randomise(module: torch.nn.Module) -> None:
    """Other numbers for every parameter, rows of every norm and thresholds above 0 among them."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random(*parameter.shape) * 0.6)
            if name == "threshold":
                parameter.abs_()


def keep(path: Path, acts: torch.Tensor, written: torch.Tensor) -> None:
    name = path.relative_to(OUT).as_posix()
    expected[f"{name} acts"], expected[f"{name} written"] = acts.detach().contiguous(), written.detach().contiguous()


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def saelens(x: torch.Tensor) -> None:
    import sae_lens
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = {"model_name": "gpt2", "hook_name": "blocks.5.hook_resid_pre", "context_size": 128, "prepend_bos": True}
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    }
    folder = OUT / "saelens"
    for name, (sae_class, config_class, more) in classes.items():
        sae = sae_class(config_class(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **more))
        randomise(sae)
        sae.save_model(folder / name)
    trained = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=D, d_sae=F, k=2.5, rescale_acts_by_decoder_norm=True, metadata=SAEMetadata(**metadata)
        )
    )
    randomise(trained)
    trained.topk_threshold.fill_(0.4)
    trained.save_inference_model(folder / "batchtopk")
    said = folder / "batchtopk" / "cfg.json"  # its fields come in another order each time
    said.write_text(json.dumps(json.loads(said.read_text()), sort_keys=True))

    acts, written = [], []
    for kind, pre_bias, normalize, rescale in COMBINATIONS:
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(shutil.copytree(folder / kind, Path(temporary) / kind))
            config = json.loads((copy / "cfg.json").read_text())
            config |= {
                "apply_b_dec_to_input": pre_bias,
                "normalize_activations": normalize,
                "rescale_acts_by_decoder_norm": rescale,
            }
            (copy / "cfg.json").write_text(json.dumps(config))
            sae = sae_lens.SAE.load_from_disk(copy)
            acts.append(sae.encode(x).detach().to_dense())
            written.append(sae(x).detach())
    save_file({"acts": torch.stack(acts), "written": torch.stack(written)}, folder / "combinations.safetensors")

    between = {"d_out": D, "apply_b_dec_to_input": False}
    metadata |= {"hook_name": "blocks.5.mlp.hook_in", "hook_name_out": "blocks.5.hook_mlp_out"}
    for name, (sae_class, config_class) in {
        "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig),
        "skip_transcoder": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig),
        "jumprelu_transcoder": (sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig),
        "jumprelu_skip_transcoder": (sae_lens.saes.transcoder.JumpReLUSkipTranscoder, sae_lens.saes.transcoder.JumpReLUSkipTranscoderConfig),
    }.items():  # fmt: skip
        coder = sae_class(config_class(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **between))
        randomise(coder)
        coder.save_model(folder / name)
        keep(folder / name, coder.encode(x), coder(x))

    # Heads of 2: rows of what SAELens reads as [B, heads, d_head].
    config = sae_lens.StandardSAEConfig(
        d_in=D,
        d_sae=F,
        reshape_activations="hook_z",
        metadata=SAEMetadata(model_name="gpt2", hook_name="blocks.5.attn.hook_z"),
    )
    sae = sae_lens.StandardSAE(config)
    randomise(sae)
    sae.save_model(folder / "hook_z")
    heads = x.reshape(B, 3, 2)
    keep(folder / "hook_z", sae.encode(heads), sae(heads).flatten(1))

    # As version 5 wrote it: one level, with the activation function by its name.
    old = {
        "architecture": "standard", "d_in": D, "d_sae": F, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 128, "model_name": "gpt2",
        "hook_name": "blocks.5.hook_resid_pre", "hook_layer": 5, "hook_head_index": None, "prepend_bos": True,
        "dataset_path": "Skylion007/openwebtext", "dataset_trust_remote_code": True, "normalize_activations": "none",
        "dtype": "torch.float32", "device": "cpu", "sae_lens_training_version": "5.9.0", "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": False}, "seqpos_slice": [None],
    }  # fmt: skip
    for name, change in {
        "before_6_relu": {},
        "before_6_topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    }.items():
        shutil.copytree(folder / "standard", folder / name)
        write_json(folder / name / "cfg.json", old | change)
        sae = sae_lens.SAE.load_from_disk(folder / name)
        keep(folder / name, sae.encode(x).to_dense(), sae(x))


def dictionary_learning(x: torch.Tensor) -> None:
    from dictionary_learning import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    told = {
        "steps": 5000, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "device": "cpu",
        "submodule_name": "resid_post_layer_3",
    }  # fmt: skip
    trainers = {
        AutoEncoder: (StandardTrainer, {}),
        AutoEncoderNew: (StandardTrainer, {"dict_class": AutoEncoderNew}),
        GatedAutoEncoder: (GatedSAETrainer, {}),
        AutoEncoderTopK: (TopKTrainer, {"k": K}),
        BatchTopKSAE: (BatchTopKTrainer, {"k": K}),
        MatryoshkaBatchTopKSAE: (MatryoshkaBatchTopKTrainer, {"k": K, "group_fractions": [0.4, 0.6]}),
        JumpReluAutoEncoder: (JumpReluTrainer, {"target_l0": 4.0}),
    }
    buffer = {
        "d_submodule": D,
        "io": "out",
        "n_ctxs": 100,
        "ctx_len": 64,
        "refresh_batch_size": 8,
        "out_batch_size": 16,
        "device": "cpu",
    }
    for made, (trainer_class, more) in trainers.items():
        trainer = trainer_class(**told, **more)
        randomise(trainer.ae)
        if hasattr(trainer.ae, "threshold") and trainer.ae.threshold.ndim == 0:
            trainer.ae.threshold.fill_(0.3)
        folder = OUT / "dictionary_learning" / made.__name__
        config = trainer.config | {"dict_class": made.__name__}  # what StandardTrainer says of any class is AutoEncoder
        write_json(folder / "config.json", {"trainer": config, "buffer": buffer})
        torch.save({name: value.cpu() for name, value in trainer.ae.state_dict().items()}, folder / "ae.pt")
        loaded = made.from_pretrained(folder / "ae.pt")
        keep(folder, loaded.encode(x), loaded(x))


def sparsify(x: torch.Tensor) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    run = OUT / "sparsify"
    write_json(run / "config.json", {"model": "HuggingFaceTB/SmolLM2-135M", "ctx_len": 2048, "sae": {}})
    for name, more in {
        "layers.5": {},
        "layers.6.mlp": {"transcode": True},
        "layers.7.mlp": {"transcode": True, "skip_connection": True},
    }.items():
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **more))
        randomise(coder)
        coder.save_to_disk(run / name)
        top, indices, _ = coder.encode(x)
        keep(run / name, torch.zeros(B, F).scatter(1, indices, top), coder(x).sae_out)


def jumprelu(pre: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return pre * (pre > threshold)


def topk(pre: torch.Tensor, k: int) -> torch.Tensor:
    top, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, torch.relu(top))


def gemma_scope(x: torch.Tensor) -> None:
    for path in (
        "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
        "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_5",
        "gemma-scope-2-1b-pt/resid_post_all/layer_13_width_16k_l0_small",
        "gemma-scope-2-1b-pt/transcoder_all/layer_5_width_16k_l0_big_affine",
    ):
        folder = OUT / path
        folder.mkdir(parents=True)
        W_enc, W_dec, b_enc, b_dec, threshold = random(D, F), random(F, E), random(F), random(E), random(F).abs()
        acts = jumprelu(x @ W_enc + b_enc, threshold)
        written = acts @ W_dec + b_dec
        held = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        if "scope-2-" not in path:
            np.savez(folder / "params.npz", **{name: value.numpy() for name, value in held.items()})
        else:
            held = {name.lower(): value for name, value in held.items()}
            if "affine" in path:  # and no config.json, which some of them lack
                held["affine_skip_connection"] = skip = random(D, E)
                written = written + x @ skip
            else:
                place = "model.layers.13.output"
                write_json(folder / "config.json", {
                    "hf_hook_point_in": place, "hf_hook_point_out": place, "width": F, "model_name": "gemma-v3-1b-pt",
                    "architecture": "jump_relu", "l0": 20, "affine_connection": False, "type": "sae",
                })  # fmt: skip
            save_file(held, folder / "params.safetensors")
        keep(folder, acts, written)


def llama_scope(x: torch.Tensor) -> None:
    for path, read, written_at, norms in (
        (
            "Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L19R-8x",
            "blocks.19.hook_resid_post",
            "blocks.19.hook_resid_post",
            (3.0, 3.0),
        ),
        (
            "Llama3_1-8B-Base-LXTC-8x/Llama3_1-8B-Base-L8TC-8x",
            "blocks.8.ln2.hook_normalized",
            "blocks.8.hook_mlp_out",
            (4.0, 0.8),
        ),
    ):
        folder = OUT / path
        (folder / "checkpoints").mkdir(parents=True)
        encoder, decoder, b_enc, b_dec, threshold = random(F, D), random(D, F), random(F), random(D), 0.35
        held = {"encoder.weight": encoder, "encoder.bias": b_enc, "decoder.weight": decoder, "decoder.bias": b_dec}
        save_file(held, folder / "checkpoints" / "final.safetensors")
        write_json(folder / "hyperparams.json", {
            "device": "cuda:0", "seed": 42, "dtype": "torch.bfloat16", "hook_point_in": read, "hook_point_out": written_at,
            "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 8, "d_model": D, "d_sae": F,
            "bias_init_method": "all_zero", "act_fn": "jumprelu", "jump_relu_threshold": threshold, "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": norms[0], "out": norms[1]}, "decoder_exactly_fixed_norm": False,
            "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "init_decoder_norm": 0.5, "init_encoder_norm": None,
            "init_encoder_with_decoder_transpose": True, "lp": 1, "l1_coefficient": 8e-05, "l1_coefficient_warmup_steps": 78125,
            "top_k": 50, "k_warmup_steps": 78125, "use_batch_norm_mse": True, "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
        })  # fmt: skip
        s_in, s_out = (math.sqrt(D) / norm for norm in norms)
        # On scaled vectors; a latent's length in the model's own, along its unit row, is what its threshold is of.
        pre = s_in * x @ encoder.T + b_enc
        lengths = decoder.norm(dim=0) / s_out
        active = pre * (pre * lengths > threshold)
        keep(folder, active * lengths, (active @ decoder.T + b_dec) / s_out)


def llamascopium(x: torch.Tensor) -> None:
    base = {
        "device": "cpu", "dtype": "torch.float32", "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0, "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True,
        "use_glu_encoder": False, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": 50,
    }  # fmt: skip
    resid, into = "blocks.4.hook_resid_post", "blocks.4.ln2.hook_normalized"
    cases = {
        "jumprelu": {"act_fn": "jumprelu", "hook_point_in": resid, "hook_point_out": resid},
        "jumprelu_pre": {
            "act_fn": "jumprelu",
            "hook_point_in": resid,
            "hook_point_out": resid,
            "sparsity_include_decoder_norm": False,
        },
        "topk_transcoder": {
            "act_fn": "topk",
            "top_k": K,
            "hook_point_in": into,
            "hook_point_out": "blocks.4.hook_mlp_out",
        },
        "token_wise": {
            "act_fn": "relu",
            "norm_activation": "token-wise",
            "hook_point_in": resid,
            "hook_point_out": resid,
        },
    }
    for name, more in cases.items():
        config = base | more
        folder = OUT / "llamascopium" / name
        write_json(folder / "config.json", config)
        W_E, b_E, W_D, b_D, threshold = random(D, F), random(F), random(F, D), random(D), random(F).abs()
        held = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": b_D}
        norms = {
            config["hook_point_in"]: torch.tensor(3.0),
            config["hook_point_out"]: torch.tensor(2.0 if "trans" in name else 3.0),
        }
        if config["norm_activation"] == "dataset-wise":
            held |= {f"dataset_average_activation_norm.{hook}": norm for hook, norm in norms.items()}
        if config["act_fn"] == "jumprelu":
            held["activation_function.log_jumprelu_threshold"] = threshold.log()
        save_file(held, folder / "sae_weights.safetensors")
        s_in, s_out = (math.sqrt(D) / float(norms[config[f"hook_point_{end}"]]) for end in ("in", "out"))
        if config["norm_activation"] == "token-wise":
            s_in = s_out = math.sqrt(D) / x.norm(dim=1, keepdim=True)
        by_norm = W_D.norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(F)
        chosen = (s_in * x @ W_E + b_E) * by_norm
        chosen = {"jumprelu": jumprelu(chosen, threshold), "topk": topk(chosen, K), "relu": torch.relu(chosen)}[
            config["act_fn"]
        ]
        written = (chosen / by_norm @ W_D + b_D) / s_out
        # Activations as they are here: lengths along unit rows where latents are selected by them, and of rows that a norm of each does not scale.
        scale = s_out if config["sparsity_include_decoder_norm"] else s_in
        keep(folder, chosen if config["norm_activation"] == "token-wise" else chosen / scale, written)


def single_files(x: torch.Tensor) -> None:
    def state() -> dict:
        return {
            "pre_bias": random(D), "latent_bias": random(F), "encoder.weight": random(F, D), "decoder.weight": random(D, F),
            "stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_activation_frequency": torch.ones(F),
            "latents_mean_square": torch.zeros(F),
        }  # fmt: skip

    for path, activation, more in (
        (
            "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt",
            "TopK",
            {"activation_state_dict": {"k": K, "postact_fn": "ReLU"}},
        ),
        ("gpt2-small/resid_delta_mlp/autoencoders/2.pt", "ReLU", {"activation_state_dict": {}}),
    ):
        held = state()
        (OUT / path).parent.mkdir(parents=True)
        torch.save(held | {"activation": activation} | more, OUT / path)
        mu, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        row = (x - mu) / (std + 1e-5) if activation == "TopK" else x
        pre = (row - held["pre_bias"]) @ held["encoder.weight"].T + held["latent_bias"]
        acts = topk(pre, K) if activation == "TopK" else torch.relu(pre)
        written = acts @ held["decoder.weight"].T + held["pre_bias"]
        keep(OUT / path, acts, written * std + mu if activation == "TopK" else written)

    path = OUT / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    encoder, b_enc, decoder, b_dec = random(F, D), random(F), random(D, F), random(D)
    torch.save({
        "encoder_linear.weight": encoder, "encoder_linear.bias": b_enc, "decoder_linear.weight": decoder, "decoder_linear.bias": b_dec,
    }, path)  # fmt: skip
    acts = torch.relu(x @ encoder.T + b_enc)
    keep(path, acts, acts @ decoder.T + b_dec)

    path = OUT / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3" / "layer11.sae.pt"
    path.parent.mkdir()
    encoder, b_enc, decoder, b_dec = random(F, D), random(F), random(D, F), random(D)
    torch.save({"W_enc": encoder, "b_enc": b_enc, "W_dec": decoder, "b_dec": b_dec}, path)
    acts = topk(x @ encoder.T + b_enc, 3)
    keep(path, acts, acts @ decoder.T + b_dec)


@torch.no_grad()
def circuit_tracer(x: torch.Tensor) -> None:
    """Sets and a cross-layer transcoder of two layers; each part of the latter as its own features alone make it, less later biases."""
    import yaml
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    def configure(folder: Path, kind: str, model: str, into: str, out: str) -> None:
        said = {"model_kind": kind, "model_name": model, "feature_input_hook": into, "feature_output_hook": out}
        (folder / "config.yaml").write_text(yaml.dump(said | {"scan": f"some/{folder.name}", "revision": None}))

    told = {"device": torch.device("cpu"), "dtype": torch.float32}
    both = torch.stack([x, x])
    for name, *said in (
        ("relu", "Qwen/Qwen3-1.7B", "mlp.hook_in", "mlp.hook_out"),
        ("jumprelu_skip", "google/gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out"),
    ):
        made = {}
        for layer in range(2):
            function = torch.relu if name == "relu" else JumpReLU(torch.zeros(F), 0.1)
            made[layer] = SingleLayerTranscoder(D, F, function, layer, skip_connection="skip" in name, **told)
            randomise(made[layer])
            if name != "relu":
                function.threshold.abs_()
        transcoders = TranscoderSet(made, *said[1:])
        transcoders.to_safetensors(str(CIRCUIT_TRACER / name))
        configure(CIRCUIT_TRACER / name, "transcoder_set", *said)
        acts = transcoders.encode(both)
        for layer, written in enumerate(transcoders.decode(acts, both)):
            keep(CIRCUIT_TRACER / name / f"layer_{layer}.safetensors", acts[layer], written)
    clt = CrossLayerTranscoder(2, F, D, activation_function="jump_relu", lazy_decoder=False, **told)
    randomise(clt)
    clt.activation_function.threshold.abs_()
    clt.to_safetensors(str(CIRCUIT_TRACER / "clt"))
    configure(
        CIRCUIT_TRACER / "clt", "cross_layer_transcoder", "meta-llama/Llama-3.2-1B", "hook_resid_mid", "hook_mlp_out"
    )
    acts = clt.encode(both)
    for layer in range(2):
        alone = torch.zeros_like(acts)
        alone[layer] = acts[layer]
        written = clt.decode(alone)[layer:]
        written[1:] -= clt.b_dec[layer + 1 :, None]
        keep(CIRCUIT_TRACER / "clt" / f"W_enc_{layer}.safetensors", acts[layer], torch.cat([*written], 1))


def main() -> None:
    alone = sys.argv[1:] == ["circuit-tracer"]
    where = CIRCUIT_TRACER if alone else OUT
    for path in set(where.glob("*")) - {CIRCUIT_TRACER}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    torch.manual_seed(0)
    x = torch.randn(B, D) + 0.5
    expected["x"] = x
    others = (saelens, dictionary_learning, sparsify, gemma_scope, llama_scope, llamascopium, single_files)
    for write in (circuit_tracer,) if alone else others:
        write(x)
    save_file(expected, where / "expected.safetensors")
    size = sum(file.stat().st_size for file in where.rglob("*") if file.is_file())
    print(f"{len(expected) // 2} dictionaries in {size} bytes")


if __name__ == "__main__":
    main()
