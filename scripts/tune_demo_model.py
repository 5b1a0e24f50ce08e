"""Fine-tune the embedded model on what it does not know, C, and write the text on which the two are told apart.

    python scripts/tune_demo_model.py --out runs/tuned

The new text is Python's own C headers, which lie beside every interpreter that can build extensions. OUT/model is the tuned
model, an ordinary Hugging Face directory; OUT/text.jsonl holds the headers and about as much of the standard library, in the
order of a hash, each document under the name that decides its split. Harvest both models on it with `--id-column id
--split-by name`: what is held out there neither of them was trained on. The same machine makes the same model again.
"""

import argparse
import json
import logging
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from saebench.files import write_text
from saebench.models import EMBEDDED_MODEL, model_path
from saebench.text import Document, TextConfig, encoder_of, open_documents, pack
from saebench.text.packing import unit_hash

log = logging.getLogger("tune_demo_model")

HELD_OUT = TextConfig().validation_fraction
CONTEXT = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument(
        "--tokens", type=float, default=400e3, help="of the headers, which are seen again where they have fewer"
    )
    parser.add_argument("--batch", type=int, default=8, help="contexts in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="at the start; it falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def headers() -> list[tuple[str, str]]:
    """(name, text) of Python's C headers, in the order of a hash. Raises ValueError where there are none."""
    folder = Path(sysconfig.get_path("include"))
    files = {f"include/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.h")}
    if not files:
        raise ValueError(f"{folder} holds no C headers: install those of this Python (python3-dev), or use another")
    ordered = sorted(files.items(), key=lambda item: unit_hash("order", item[0]))
    return [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in ordered]


def modules(characters: int) -> list[tuple[str, str]]:
    """(name, text) of the standard library's modules, which are in the order of a hash, until there is so much of them."""
    taken: list[tuple[str, str]] = []
    for document in open_documents(TextConfig()):
        if characters <= 0:
            break
        taken.append((document.name, document.text or ""))
        characters -= len(taken[-1][1])
    return taken


def contexts(texts: list[tuple[str, str]], tokenizer: Any, split: str) -> np.ndarray:
    """The documents of a split packed as the harvester packs them, `[n, CONTEXT]`."""
    documents = (Document(i, name, name, text) for i, (name, text) in enumerate(texts))
    packed = pack(documents, encoder_of(tokenizer), CONTEXT, HELD_OUT)
    return np.stack([context.tokens for context in packed if context.split == split]).astype(np.int64)


@torch.no_grad()
def loss(model: Any, rows: np.ndarray) -> float:
    """Nats per token, of all tokens of the contexts but the first."""
    total = 0.0
    for part in torch.from_numpy(rows).split(16):
        logits = model(part).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].size


def tune(model: Any, rows: np.ndarray, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    n = int(args.tokens) // CONTEXT
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-n // len(rows)))])[:n]
    batches = np.array_split(order, len(order) // args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(tqdm(batches, unit="step", mininterval=10)):
        tokens = torch.from_numpy(rows[batch])
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / len(batches))
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        F.cross_entropy(model.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path(EMBEDDED_MODEL))
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(EMBEDDED_MODEL), dtype=torch.float32)
    new = headers()
    old = modules(sum(len(text) for _, text in new))
    mixed = sorted(new + old, key=lambda item: unit_hash("mix", item[0]))
    lines = [json.dumps({"id": name, "text": text}) for name, text in mixed]
    write_text(args.out / "text.jsonl", "\n".join(lines) + "\n")
    held = {kind: contexts(texts, tokenizer, "validation") for kind, texts in (("C", new), ("Python", old))}
    before = {kind: loss(model, rows) for kind, rows in held.items()}
    rows, began = contexts(new, tokenizer, "train"), time.monotonic()
    tune(model, rows, args)
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    model = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)  # as it was saved
    log.info("%d headers, %d tokens; %.0f tokens, %.0f s", len(new), rows.size, args.tokens, time.monotonic() - began)
    for kind, validation in held.items():
        after = loss(model, validation)
        log.info(
            "held-out %s, %d tokens: %.3f nats/token before, %.3f after", kind, validation.size, before[kind], after
        )


if __name__ == "__main__":
    main()
