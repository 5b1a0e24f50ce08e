"""SAEDashboard's own run over the contexts, SAE and latents that it is given; benchmarks/index.py runs it in the peers' environment.

    VENV/bin/python benchmarks/dashboards.py --model DIR --sae DIR --tokens contexts.npy --features 2048 --out DIR

The settings are those of its `NeuronpediaRunner` (128 features at a time, 32 prompts a forward pass, activations of the
model cached on disk), the model a HookedTransformer of a Llama checkpoint on disk. Writes `batch-N.json` and prints one JSON line.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from hooked import hooked
from sae_dashboard.layout import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SaeVisLayoutConfig,
    SequencesConfig,
)
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--sae", "--tokens", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--features", type=int, required=True)
    args = parser.parse_args()

    model = hooked(args.model)
    sae = SAE.load_from_disk(args.sae)
    if torch.allclose(sae.W_dec.norm(dim=1), torch.ones(()), atol=1e-3):
        sae.fold_W_dec_norm = lambda: None  # there is nothing to fold, and SAELens refuses it for a TopK SAE
    tokens = torch.from_numpy(np.load(args.tokens))
    layout = SaeVisLayoutConfig(
        columns=[
            Column(
                SequencesConfig(
                    stack_mode="stack-all", buffer=None, compute_buffer=True, n_quantiles=5, top_acts_group_size=20,
                    quantile_group_size=5,
                ),
                ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3),
            )
        ]
    )  # fmt: skip
    names = {number: name for name, number in model.tokenizer.vocab.items()}
    settings = NeuronpediaRunnerConfig(
        sae_set="local", sae_path=str(args.sae), outputs_dir=str(args.out), model_id="local", layer=0,
        n_prompts_total=len(tokens), n_tokens_in_prompt=tokens.shape[1],
    )  # fmt: skip
    started = time.perf_counter()
    for batch, first in enumerate(range(0, args.features, BATCH)):
        config = SaeVisConfig(
            hook_point=sae.cfg.metadata["hook_name"], features=list(range(first, min(first + BATCH, args.features))),
            minibatch_size_features=BATCH, quantile_feature_batch_size=64, minibatch_size_tokens=32, device="cpu",
            dtype="float32", feature_centric_layout=layout, cache_dir=args.out / "cache",
            ignore_tokens={model.tokenizer.bos_token_id},
        )  # fmt: skip
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        text = NeuronpediaConverter.convert_to_np_json(model, data, settings, names)
        (args.out / f"batch-{batch}.json").write_text(text)
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
