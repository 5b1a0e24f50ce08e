"""Open converted SAEs in their own packages, and compare activations and what is written with ours, on the same rows.

First, in the environment of saebench: `python scripts/check_convert.py make OUT SAE ROWS`: converts the SAE, and small ones of every
architecture that each format has, and keeps what they make of rows of the store ROWS, or of made-up ones. Then, in one with
`sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0` (see make_foreign_fixtures.py): `python scripts/check_convert.py compare OUT`.
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
def compare(out: Path) -> None:
    for to in TARGETS:
        for file in sorted((out / to).rglob("expected.safetensors")):
            want = load_file(file)
            acts, written = {"saelens": in_saelens, "sparsify": in_sparsify, "dictionary_learning": in_dictionary_learning}[
                to
            ](file.parent, want["x"])  # fmt: skip
            apart = [
                float((got - theirs).abs().max() / theirs.abs().max())
                for got, theirs in ((acts, want["acts"]), (written, want["written"]))
            ]
            verdict = "equal" if max(apart) <= 1e-5 else "NOT EQUAL"
            name = file.relative_to(out / to).parent.as_posix()
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
    make(*map(Path, sys.argv[2:])) if sys.argv[1] == "make" else compare(Path(sys.argv[2]))
