"""What evaluation costs beyond the passes that it cannot do without, and how much memory it takes.

    python benchmarks/evaluate.py --sae runs/demo/saes/topk-k48 [--tokens 20000]
    python benchmarks/evaluate.py --vocabulary 262144 [--context 1024] [--width 2304]

For an SAE: batch by batch, the passes alone (one whole, and one from the hook on for each of the zero, the mean and the SAE's
arm, logits at the scored positions) and the evaluation of the batch take turns; `ratio` is the evaluation's time over
theirs. Loading, baselines and the count of dead latents are timed apart. With --vocabulary, a model of two layers and that many
tokens is made, and evaluated in a process of its own: `beyond_mb` is its peak resident memory less that of one that only loads model
and SAE. Prints one JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from index import measured, synthetic
from transformers import LlamaConfig, LlamaForCausalLM

from saebench.evaluate.baselines import PCA, untrained_fvus
from saebench.evaluate.measure import (
    Batch,
    Dictionary,
    Measurement,
    Subject,
    silent_latents,
    splice,
    validation_batches,
)
from saebench.harvest import HarvestConfig, harvest
from saebench.models import LanguageModel, clean_pass, head, resumed_states
from saebench.sae import Ends, load_sae, read_config
from saebench.store import open_store
from saebench.store.norms import usual_moments
from saebench.store.source import model_of, recorded_store
from saebench.text import TextConfig

_LOAD = """
from pathlib import Path
import sys
from saebench.sae import load_sae
from saebench.store import open_store
from saebench.store.source import model_of
store, sae = model_of(open_store(Path(sys.argv[1])), "cpu", None), load_sae(Path(sys.argv[2]))
"""


@torch.inference_mode()
def needed(model: LanguageModel, hook: str, batch: Batch, value_BLD: torch.Tensor) -> None:
    """The passes that figures of one SAE ask for: clean, and three with other vectors at the hook; logits where a kept token follows."""
    clean = clean_pass(model, batch.tokens, hook)
    scored = batch.keep.clone()
    scored[:, :-1] &= batch.keep[:, 1:]
    scored[:, -1] = False
    head(model, clean.states[scored])
    for _ in range(3):
        head(model, resumed_states(model, clean, splice(clean.value, batch.keep, value_BLD[batch.keep]))[scored])


@torch.inference_mode()
def speed(sae: Path, tokens: int, batch: int, dead_rows: int) -> dict[str, Any]:
    spent: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        started = time.perf_counter()
        result = call()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return result

    folder = recorded_store(sae)
    assert folder is not None
    store, hook = open_store(folder), read_config(sae)["metadata"]["hook_name"]
    model = timed("load", lambda: model_of(store, "cpu", None))
    ends = Ends((hook,), (hook,))
    dictionary = Dictionary(sae, load_sae(sae), ends)
    pca = timed("pca", lambda: PCA.fit(store, (hook,), "cpu"))
    means = {hook: torch.from_numpy(usual_moments(store, hook)[0]).float()}
    subject, bounds = Subject(sae, [dictionary], ends), {hook: store.norms(hook).bound}
    measurement = Measurement(model, ends, means, pca, [subject], bounds)
    batches = list(validation_batches(store, tokens, batch))
    values = (
        torch.randn(*batches[0].tokens.shape, store.d_in(hook)) * store.norms(hook).median / store.d_in(hook) ** 0.5
    )
    needed(model, hook, batches[0], values)  # warm
    for each in batches:
        timed("passes", lambda each=each: needed(model, hook, each, values[: len(each.tokens)]))
        timed("evaluation", lambda each=each: measurement.add(each))
    rows = int(sum(int(each.keep.sum()) for each in batches))
    timed("dead_latents", lambda: silent_latents(store, ends, [dictionary], dead_rows))
    timed("untrained", lambda: untrained_fvus(store, ends, dictionary.sae.d_sae, [32.0], 0, rows))
    return {
        "tokens": sum(each.tokens.numel() for each in batches), "latents": dictionary.sae.d_sae,
        "ratio": round(spent["evaluation"] / spent["passes"], 3), **{f"{name}_s": round(s, 1) for name, s in spent.items()},
    }  # fmt: skip


def memory(vocabulary: int, context: int, width: int, batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=context, tie_word_embeddings=True, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=2, num_attention_heads=width // 64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / "model")
        random = np.random.default_rng(0)
        lines = (json.dumps({"input_ids": random.integers(3, vocabulary, context).tolist()}) for _ in range(1000))
        (root / "ids.jsonl").write_text("\n".join(lines))
        settings = HarvestConfig(
            model=str(root / "model"), layers=(0,), tokens=64 * context, validation_tokens=2 * batch * context, context=context,
            out=root / "store",
        )  # fmt: skip
        store = harvest(settings, TextConfig(dataset=str(root / "ids.jsonl")))
        assert store is not None
        hook = next(iter(store.hooks))
        sae = root / "run" / "saes" / "untrained"
        synthetic(sae, store, hook, 4096, {"hook_name": hook, "saebench": {"store": str(store.folder)}})
        _, _, loaded, _ = measured([sys.executable, "-c", _LOAD, store.folder, sae])
        command = [sys.executable, "-m", "saebench.cli", "eval", "--run", root / "run", "--batch", str(batch)]
        seconds, _, peak, _ = measured(command)
    return {
        "vocabulary": vocabulary, "context": context, "width": width, "batch": batch, "seconds": round(seconds, 1), "loaded_mb": round(loaded),
        "peak_mb": round(peak), "beyond_mb": round(peak - loaded),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=Path("runs/demo/saes/topk-k48"))
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--dead-rows", type=int, default=1_000_000, help="rows in which dead latents are looked for")
    parser.add_argument("--batch", type=int, default=16, help="contexts in a pass")
    parser.add_argument("--vocabulary", type=int, metavar="V", help="measure memory on a model of V tokens instead")
    parser.add_argument("--context", type=int, default=1024, help="of that model")
    parser.add_argument("--width", type=int, default=2304, help="of that model")
    args = parser.parse_args()
    if args.vocabulary:
        print(json.dumps(memory(args.vocabulary, args.context, args.width, args.batch)))
    else:
        print(json.dumps(speed(args.sae, args.tokens, args.batch, args.dead_rows)))


if __name__ == "__main__":
    main()
