"""SAELens' cache runner over contexts that it is given; benchmarks/harvest.py runs it in the peers' environment.

    VENV/bin/python benchmarks/caches.py MODEL_DIR LAYER BATCH DTYPE FOLDER

Prints a JSON line when the model is loaded; then reads the paths of token arrays `[contexts, length]` from standard input and
caches each with a `CacheActivationsRunner` of its own, model loading left out, printing the seconds of its `run`. One
buffer holds all of an array's activations, and they are not shuffled, which would cost it more.
"""

import contextlib
import importlib.metadata
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import sae_lens.cache_activations_runner as runner_module
import torch
from datasets import Dataset
from hooked import hooked
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig


def main() -> None:
    folder, layer, batch, dtype, out = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
        Path(sys.argv[5]),
    )
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        model = hooked(folder)
        runner_module.load_model = lambda **kwargs: model  # the runner's own would look on the hub
        print(
            json.dumps({"version": importlib.metadata.version("sae-lens"), "layers": [layer]}), file=answers, flush=True
        )
        for line in sys.stdin:
            tokens = np.load(line.strip())
            n_contexts, length = tokens.shape
            shutil.rmtree(out, ignore_errors=True)
            width = model.cfg.d_model * getattr(torch, dtype).itemsize
            config = CacheActivationsRunnerConfig(
                dataset_path="local", model_name="local", model_batch_size=batch, hook_name=f"blocks.{layer}.hook_resid_post",
                d_in=model.cfg.d_model, training_tokens=tokens.size, context_size=length, dtype=dtype, device="cpu",
                new_cached_activations_path=str(out), shuffle=False, streaming=False, prepend_bos=False,
                buffer_size_gb=(tokens.size + 0.5) * width / 1e9,
            )  # fmt: skip
            runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}))
            started = time.perf_counter()
            made = runner.run()
            seconds = time.perf_counter() - started
            assert len(made) == n_contexts, f"{len(made)} contexts cached of {n_contexts}"
            print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
