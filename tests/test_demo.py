"""The embedded model, and the pipeline on the real thing, in small."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench.evaluate import EvalConfig, evaluate, write_report
from saebench.harvest import HarvestConfig, harvest
from saebench.models import EMBEDDED_MODEL_PATH, load_model
from saebench.store import Store
from saebench.text import TextConfig, encoder_of, open_documents, pack
from saebench.train import TrainConfig, train

ROOT = Path(__file__).parent.parent


def card() -> str:
    return (EMBEDDED_MODEL_PATH / "README.md").read_text()


def card_bits(row: str) -> float:
    """Bits per byte in a row of the card's table."""
    match = re.search(rf"^\| {row} \| [0-9.]+ \| ([0-9.]+) \|$", card(), re.MULTILINE)
    assert match
    return float(match[1])


def test_the_embedded_model_is_small_and_ordinary() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL_PATH.iterdir()) <= 16e6
    config = json.loads((EMBEDDED_MODEL_PATH / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (4, 256, 4096)
    assert config["dtype"] == "bfloat16"
    assert not list(EMBEDDED_MODEL_PATH.glob("*.bin"))  # no pickle


def test_the_embedded_model_predicts_modules_it_never_saw() -> None:
    model = load_model("embedded", device="cpu")
    contexts = pack(open_documents(TextConfig()), encoder_of(model.tokenizer), 512, 0.1)
    held_out = itertools.islice((context for context in contexts if context.split == "validation"), 16)
    tokens = torch.from_numpy(np.stack([context.tokens for context in held_out])).long()
    with torch.inference_mode():
        logits = model.module(tokens).logits[:, :-1].flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()
    text = "".join(model.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True))
    bits = nats / math.log(2) / len(text.encode())
    # Sixteen contexts of another Python's library: near the card's figure, and well under the trigram's.
    assert bits == pytest.approx(card_bits("this model"), rel=0.2)
    assert bits < 0.9 * card_bits("trigram") < card_bits("unigram")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("demo") / "store"
    store = harvest(HarvestConfig(layers=(2,), tokens=80_000, validation_tokens=10_000, out=out), TextConfig())
    assert store is not None
    return store


def test_architectures_rank_as_published_on_a_real_model(store: Store, tmp_path: Path) -> None:
    """At equal L0, TopK and Gated reconstruct better than ReLU and than PCA; training beats no training."""
    train(
        TrainConfig(
            store=store.folder, arch=("relu", "topk", "gated"), target_l0=(12.0, 40.0), d_sae=(512,), tokens=150_000,
            batch=256, lr=(2e-3,), out=tmp_path,
        )
    )  # fmt: skip
    summary = write_report(tmp_path, evaluate(EvalConfig(run=tmp_path)))
    (comparison,) = summary["equal_l0"]
    for place, _ in enumerate(comparison["l0s"]):
        fvu = {name: entry["values"][place] for name, entry in comparison["figures"]["fvu"].items()}
        assert max(fvu["topk"], fvu["gated"]) < min(fvu["relu"], fvu["PCA of rank L0"])
        assert max(fvu["topk"], fvu["gated"], fvu["relu"]) < fvu["untrained SAE"]
