"""Open converted SAEs in their own packages, and compare activations and what is written with ours, on the same rows.

First, in the environment of saebench: `python scripts/check_convert.py make OUT SAE ROWS`: converts the SAE, and small ones of every
architecture that each format has, and keeps what they make of rows of the store ROWS, or of made-up ones. Then, in one with
`sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0` (see make_foreign_fixtures.py): `python scripts/check_convert.py compare OUT`.

`python scripts/check_convert.py make-sets OUT [RUN…]` does so for circuit-tracer, of small sets of three layers and of the transcoders
and cross-layer transcoders of runs, on rows of their stores; `compare-sets OUT` with `circuit-tracer==0.5.0`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ARCHITECTURES = ("relu", "topk", "gated", "jumprelu")
KINDS = ("", "transcoder", "skip_transcoder")
TARGETS = ("saelens", "sparsify", "dictionary_learning")
D, F, ROWS = 32, 96, 256


def make(out: Path, sae: Path, store: Path) -> None:
    from saebench.sae import Writes, load_sae, new_sae, read_config, save_sae
    from saebench.sae.convert import ConvertConfig, convert
    from saebench.store import open_store

    hook = read_config(sae)["metadata"]["hook_name"]
    sources = {sae.name: (sae, open_store(store).of_split("validation")[0].rows(hook)[:ROWS].float())}
    torch.manual_seed(0)
    for architecture in ARCHITECTURES:
        for kind in KINDS:
            writes = Writes(d_out=D, skip=kind == "skip_transcoder") if kind else Writes()
            made = new_sae(architecture, D, F, k=8, writes=writes)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
            ends = {"hook_name": "blocks.3.mlp.hook_in" if kind else "blocks.3.hook_resid_post"}
            ends |= {"hook_name_out": "blocks.3.hook_mlp_out"} if kind else {}
            folder = out / "ours" / f"{architecture}_{kind or 'sae'}"
            save_sae(made, folder, {"model_name": "some/model", "context_size": 64, **ends})
            sources[folder.name] = folder, torch.randn(ROWS, D) * 3 + 1
    for name, (source, x) in sources.items():
        with torch.no_grad():
            ran = load_sae(source)(x)
        for to in TARGETS:
            try:
                path = convert(ConvertConfig(sae=source, to=to, out=out / to / name))
            except ValueError as error:
                print(f"{to:20} {name:28} refused: {error}")
                continue
            save_file({"x": x, "acts": ran.acts, "written": ran.x_hat}, path / "expected.safetensors")


@torch.no_grad()
def make_sets(out: Path, *runs: Path) -> None:
    """Each set as one folder of circuit-tracer's, with what its members make of rows, summed at each hook, in `expected.safetensors`."""
    from saebench.sae import Writes, ends_of, load_sae, new_sae, read_config, save_sae
    from saebench.sae.convert import ConvertConfig, convert
    from saebench.store import open_store
    from saebench.store.source import recorded_store

    sets: dict[str, list[Path]] = {}
    for run in runs:
        for file in sorted(run.glob("saes/*/cfg.json")):
            if name := read_config(file.parent)["metadata"].get("set"):
                sets.setdefault(f"{run.name}-{name}", []).append(file.parent)
    torch.manual_seed(0)
    into, written_at = ([f"blocks.{n}.{hook}" for n in range(3)] for hook in ("mlp.hook_in", "hook_mlp_out"))
    for architecture in ARCHITECTURES:
        for kind in (*KINDS[1:], "clt"):
            for n in range(3):
                parts = (D,) * (3 - n if kind == "clt" else 1)
                made = new_sae(architecture, D, F, k=8, writes=Writes(D * len(parts), kind == "skip_transcoder", parts))
                for name, parameter in made.named_parameters():
                    parameter.copy_(torch.randn(parameter.shape))
                    if name == "b_dec":
                        parameter[D:] = 0
                ends = {"hook_name": into[n], "hook_name_out": written_at[n]}
                if kind == "clt":
                    ends |= {
                        "reads": [into[n]],
                        "writes": written_at[n:],
                        "set": "clt",
                        "set_reads": into,
                        "joint": True,
                    }
                folder = out / "ours" / f"{architecture}_{kind}_{n}"
                save_sae(made, folder, {"model_name": "some/model", "context_size": 64, **ends})
                sets.setdefault(f"{architecture}_{kind}", []).append(folder)
    for name, members in sets.items():
        rows, acts, written = {}, {}, {}
        for folder in members:
            (hook,), hooks = ends_of(folder, read_config(folder))
            store = recorded_store(folder)
            rows[hook] = (
                open_store(store).of_split("validation")[0].rows(hook)[:ROWS].float() if store else torch.randn(ROWS, D)
            )
            sae = load_sae(folder)
            ran = sae(rows[hook])
            acts[hook] = ran.acts
            for at, part in zip(hooks, ran.x_hat.split(sae.parts, 1), strict=True):
                written[at] = written.get(at, 0) + part
            try:
                path = convert(ConvertConfig(sae=folder, to="circuit-tracer", out=out / "circuit-tracer" / name))
            except ValueError as error:
                print(f"{'circuit-tracer':20} {name:36} refused: {error}")
                break
        else:
            layer = {hook: int(hook.split(".")[1]) for hook in (*rows, *written)}
            found = {"x": rows, "acts": acts, "written": written}
            stacked = {key: torch.stack([of[hook] for hook in sorted(of, key=layer.get)]) for key, of in found.items()}
            save_file(
                stacked | {"layers": torch.tensor(sorted(layer[hook] for hook in rows))},
                path.with_name("expected.safetensors"),
            )


@torch.no_grad()
def compare_sets(out: Path) -> None:
    """By its own loader of a folder, which wants every layer from 0 on; layers of another range by that of one layer."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder
    from circuit_tracer.utils.caching import load_transcoders_from_cache

    for file in sorted((out / "circuit-tracer").glob("*/expected.safetensors")):
        want, folder = load_file(file), file.parent
        layers = want["layers"].tolist()
        if layers == [*range(len(layers))]:
            transcoders, _ = load_transcoders_from_cache(
                folder.name, cache_dir=str(folder.parent), device=torch.device("cpu")
            )
            acts = transcoders.encode(want["x"])
            written = transcoders.decode(acts, want["x"])
        else:
            each = [
                load_relu_transcoder(str(folder / f"layer_{n}.safetensors"), n, torch.device("cpu")) for n in layers
            ]
            acts = torch.stack([one.encode(x) for one, x in zip(each, want["x"], strict=True)])
            written = torch.stack([one(x) for one, x in zip(each, want["x"], strict=True)])
        show(
            "circuit-tracer",
            f"{folder.name} layers {layers[0]}-{layers[-1]}",
            (acts, want["acts"]),
            (written, want["written"]),
        )


@torch.no_grad()
def compare(out: Path) -> None:
    for to in TARGETS:
        for file in sorted((out / to).rglob("expected.safetensors")):
            want = load_file(file)
            acts, written = {"saelens": in_saelens, "sparsify": in_sparsify, "dictionary_learning": in_dictionary_learning}[
                to
            ](file.parent, want["x"])  # fmt: skip
            show(to, file.relative_to(out / to).parent.as_posix(), (acts, want["acts"]), (written, want["written"]))


def show(to: str, name: str, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """How far theirs is from ours, of activations and of what is written."""
    apart = [float((theirs - ours).abs().max() / ours.abs().max()) for theirs, ours in pairs]
    verdict = "equal" if max(apart) <= 1e-5 else "NOT EQUAL"
    print(f"{to:20} {name:36} acts {apart[0]:.1e}  written {apart[1]:.1e}  {verdict}")


def in_saelens(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import sae_lens

    sae = sae_lens.SAE.load_from_disk(folder)
    return sae.encode(x).to_dense(), sae(x)


def in_sparsify(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    top, indices, _ = coder.encode(x)
    return torch.zeros(len(x), coder.num_latents).scatter(1, indices, top), coder(x).sae_out


def in_dictionary_learning(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from dictionary_learning import utils

    sae, _ = utils.load_dictionary(str(folder), device="cpu")
    return sae.encode(x), sae(x)


if __name__ == "__main__":
    commands = {"make": make, "compare": compare, "make-sets": make_sets, "compare-sets": compare_sets}
    commands[sys.argv[1]](*map(Path, sys.argv[2:]))
