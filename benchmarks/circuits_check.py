"""Whether a graph is circuit-tracer's own: the same Llama-shaped model, transcoders and prompt, edge by edge.

    python benchmarks/circuits_check.py ours OUT --run RUN --set SET --prompt TEXT
    …/python benchmarks/circuits_check.py theirs OUT     # in an environment with circuit-tracer

The first writes the transcoders in circuit-tracer's format and the graph to OUT; the second traces the prompt with
circuit-tracer and prints how far edges, activations and scores are from one another.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch


def ours(out: Path, run: Path, name: str, prompt: str) -> None:
    from saebench.circuits import Replacement, chosen_logits, scores, trace
    from saebench.circuits.opened import model_of, open_set
    from saebench.models import model_path
    from saebench.sae.convert import ConvertConfig, convert

    members = open_set(run, name, "cpu")
    model = model_of(members, device="cpu")
    for one in members:
        convert(ConvertConfig(sae=one.folder, to="circuit-tracer", out=out / "transcoders"))
    replacement = Replacement(model, members, torch.tensor(model.tokens_of(prompt)), {})
    start = time.perf_counter()
    graph = trace(replacement, chosen_logits(replacement))
    assert graph is not None
    seconds = time.perf_counter() - start
    np.savez(
        out / "ours.npz", adjacency=graph.adjacency.numpy(), ids=graph.ids.numpy(),
        latents=torch.stack([graph.latent_layers, graph.latents.position, graph.latents.latent], 1).numpy(),
        activations=graph.latents.activation.numpy(), logits=np.array([logit.token for logit in graph.logits]),
        scores=np.array(scores(graph)), seconds=seconds,
    )  # fmt: skip
    (out / "model.json").write_text(json.dumps(str(Path(model_path(model.id)).absolute())))
    print(f"{graph.n_latents} latents of {len(graph.ids)} tokens in {seconds:.1f} s")


def theirs(out: Path) -> None:
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    found, folder = np.load(out / "ours.npz"), json.loads((out / "model.json").read_text())
    paths = sorted((out / "transcoders").glob("*.safetensors"))
    transcoders = load_transcoder_set(
        dict(enumerate(map(str, paths))), "check", "mlp.hook_in", "hook_mlp_out", device=torch.device("cpu")
    )
    model = _hooked(folder, transcoders)
    start = time.perf_counter()
    graph = attribute(
        torch.from_numpy(found["ids"]), model, attribution_targets=torch.from_numpy(found["logits"]), batch_size=64
    )
    seconds = time.perf_counter() - start
    nodes = {tuple(node): place for place, node in enumerate(graph.active_features[graph.selected_features].tolist())}
    both = [place for place, node in enumerate(found["latents"].tolist()) if tuple(node) in nodes]
    mine, n = len(found["latents"]), len(nodes)
    rest = graph.adjacency_matrix.shape[0] - n
    here = np.array([*both, *range(mine, mine + rest)])
    there = np.array([*(nodes[tuple(found["latents"][place])] for place in both), *range(n, n + rest)])
    left, right = found["adjacency"][np.ix_(here, here)], graph.adjacency_matrix.float().numpy()[np.ix_(there, there)]
    print(
        f"latents: {mine} here, {n} there, {len(both)} of both; circuit-tracer took {seconds:.1f} s, ours {found['seconds']:.1f} s"
    )
    whole = _scores(graph, left)
    length, logits = len(found["ids"]), len(found["logits"])
    errors = slice(len(both), len(left) - length - logits)
    left[:, errors][:, ::length] = 0  # which circuit-tracer sets to 0 at the first position
    tokens = slice(errors.stop, errors.stop + length)
    for kind, of in {
        "latents": slice(0, len(both)),
        "errors but the first position's": errors,
        "tokens": tokens,
    }.items():
        print(
            f"edges from {kind}: at most {abs(left[:, of] - right[:, of]).max():.2g} apart, of {abs(right[:, of]).max():.3g}"
        )
    print(f"scores of the whole graph: {found['scores']} here, {whole} by circuit-tracer's functions")
    print(f"without errors of the first position: {_scores(graph, left)} here, {_scores(graph, right)} there")


def _scores(graph, adjacency: np.ndarray) -> np.ndarray:
    from circuit_tracer.graph import compute_graph_scores

    graph.adjacency_matrix = torch.from_numpy(adjacency.copy())
    return np.array(compute_graph_scores(graph))


def _hooked(folder: str, transcoders):
    """circuit-tracer's model of a Llama-shaped checkpoint on disk, of which it knows names on the hub alone."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    told = json.loads((Path(folder) / "config.json").read_text())
    theta = told.get("rope_theta") or told["rope_parameters"]["rope_theta"]
    hf = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in told.items() if name != "rope_parameters"}))
    state = {
        name: value.float() for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()
    }
    hf.load_state_dict(state, strict=False)
    hf.tie_weights()
    heads, groups = told["num_attention_heads"], told["num_key_value_heads"]
    width = told.get("head_dim") or told["hidden_size"] // heads
    cfg = HookedTransformerConfig(
        model_name="checked", d_model=told["hidden_size"], d_head=width, n_heads=heads, d_mlp=told["intermediate_size"],
        n_layers=told["num_hidden_layers"], n_ctx=told["max_position_embeddings"], eps=told["rms_norm_eps"],
        d_vocab=told["vocab_size"], act_fn=told["hidden_act"], n_key_value_heads=None if groups == heads else groups,
        normalization_type="RMS", positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=width,
        rotary_base=int(theta), final_rms=True, gated_mlp=True, device="cpu", dtype=torch.float32,
        use_attn_result=False, default_prepend_bos=True,
    )  # fmt: skip
    model = TransformerLensReplacementModel(cfg)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    model._configure_replacement_model(transcoders)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"))
    first = tokenizer.convert_ids_to_tokens(told["bos_token_id"])
    tokenizer.add_special_tokens({"bos_token": first, "eos_token": first, "pad_token": first})
    model.tokenizer = tokenizer
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--set")
    parser.add_argument("--prompt", default="def main(path):\n    for line in open(path")
    given = parser.parse_args()
    if given.side == "theirs":
        theirs(given.out)
    else:
        ours(given.out, given.run, given.set, given.prompt)


if __name__ == "__main__":
    main()
