"""A model of the same shape whose weights were never trained: what SAEs find in it, no training of the model has put there."""

import copy
from pathlib import Path

import torch

from saebench.files import read_json, write_json
from saebench.models.load import load_model

_NOTE = "randomised.json"


def randomised(
    name: str, seed: int, folder: Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Make `folder` a model like another, with weights as transformers draws them for a new model of that configuration, under a seed.

    It is an ordinary `save_pretrained` directory, in float32, with the other's tokenizer; returned as it is where it was made already
    (Heap et al. 2025, arXiv 2501.17727, compare SAEs of such models). Raises ValueError where the folder is another model.
    """
    made = {"model": name, "revision": revision, "seed": seed}
    if (folder / _NOTE).exists() and read_json(folder / _NOTE) == made:
        return folder
    if folder.exists() and any(folder.iterdir()):
        said = read_json(folder / _NOTE) if (folder / _NOTE).exists() else "something else"
        raise ValueError(f"{folder} holds {said}; expected {made}, or nothing: choose another --out, or delete it")
    model = load_model(name, device="cpu", dtype="float32", revision=revision, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = type(model.module)(copy.deepcopy(model.module.config))
    module.to(torch.float32).save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    write_json(folder / _NOTE, made)  # last: a folder without it is not whole
    return folder
