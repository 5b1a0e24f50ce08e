"""Train the embedded default: a small Llama-shaped language model of Python source, and its tokenizer.

    python scripts/train_demo_model.py --packages SITE_PACKAGES --tokens 32e6 --out saebench/demo/model

Trains on the standard library's training modules and on the sources of installed packages, measures
on its validation modules (the same split that the harvester makes), and writes an ordinary Hugging
Face directory with a model card. Interrupted, it continues from its last checkpoint in `--work`.
"""

import argparse
import copy
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saebench.text import Document, TextConfig, encoder_of, open_documents, pack, split_of

log = logging.getLogger("train_demo_model")

CausalLM = Any  # transformers' annotations of generate() and to() refuse transformers' own classes

EOT = "<|endoftext|>"
MAX_FILE = 200_000  # bytes; longer files are tables
MIN_LINE = 30  # characters; shorter lines are shared by unrelated files
PROMPTS = ("class Stack:\n    def __init__(self", "import os\nimport sys\n\n\ndef main(", "class Error(Exception):")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saebench/demo/model"))
    parser.add_argument("--work", type=Path, default=Path("runs/demo-model"), help="caches and checkpoints")
    parser.add_argument(
        "--packages", type=Path, action="append", help="folder of installed packages (default: this interpreter's)"
    )
    parser.add_argument("--package-cap", type=float, default=2e6, help="bytes of source taken from one package")
    parser.add_argument("--tokens", type=float, default=32e6, help="tokens in the shuffled mixture")
    parser.add_argument("--steps", type=int, help="train on the mixture's first so many batches (default: on all)")
    parser.add_argument("--decay", type=float, default=0.7, help="share of the steps in which the rate falls to zero")
    parser.add_argument("--stdlib-epochs", type=int, default=3, help="how often the standard library is in the mixture")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="contexts in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--keep",
        type=int,
        nargs="*",
        default=[],
        metavar="STEP",
        help="keep the model after so many steps, too, as WORK/step-STEP (0: as it begins)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    args = parser.parse_args()
    args.packages = args.packages or [Path(os.__file__).parent / "site-packages"]
    return args


# ---------------------------------------------------------------------------------------- corpus


def long_lines(text: str) -> set[str]:
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= MIN_LINE and not line.startswith("#")}


def path_hash(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def package_documents(folders: list[Path], cap: float, held_out: set[str]) -> Iterator[tuple[str, str]]:
    """(name, source) of packages' modules, without tests, tables and copies of held-out modules."""
    for folder in folders:
        for package in sorted(path for path in folder.iterdir() if not path.name.endswith(".dist-info")):
            taken = 0.0
            # In the order of a hash, what the cap lets through is a fair sample of the package.
            for path in (
                sorted(package.rglob("*.py"), key=lambda path: path_hash(path.relative_to(folder)))
                if package.is_dir()
                else [package]
            ):
                name = path.relative_to(folder).as_posix()
                parts = set(name.split("/"))
                if path.suffix != ".py" or parts & {"test", "tests", "testing"} or path.name.startswith("test_"):
                    continue
                if path.stat().st_size > MAX_FILE or taken > cap:
                    continue
                text = path.read_text(encoding="utf-8", errors="ignore")
                lines = long_lines(text)
                if lines and len(lines & held_out) > 0.1 * len(lines):
                    log.info("left out %s: it repeats held-out modules", name)
                    continue
                taken += len(text)
                yield name, text


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[EOT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOT, eos_token=EOT, pad_token=EOT, clean_up_tokenization_spaces=False
    )


def contexts(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, length: int) -> np.ndarray:
    """Every document packed as the harvester packs them, `[n, length]` uint16."""
    documents = (Document(i, name, "any", text) for i, (name, text) in enumerate(texts))
    packed = [context.tokens for context in pack(documents, encoder_of(tokenizer), length, 1e-9)]
    return np.stack(packed).astype(np.uint16)


def prepare(args: argparse.Namespace) -> None:
    """Tokenizer and packed contexts in `args.work`; done once."""
    if (args.work / "corpus.json").exists():
        return
    args.work.mkdir(parents=True, exist_ok=True)
    config = TextConfig()
    stdlib: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for document in open_documents(config):
        stdlib[split_of(document.key, config.validation_fraction)].append((document.name, document.text or ""))
    held_out = set().union(*(long_lines(text) for _, text in stdlib["validation"]))
    packages = list(package_documents(args.packages, args.package_cap, held_out))
    tokenizer = train_tokenizer(text for _, text in stdlib["train"] + packages)
    tokenizer.model_max_length = args.context
    tokenizer.save_pretrained(args.work / "tokenizer")
    for name, texts in (("stdlib", stdlib["train"]), ("packages", packages), ("validation", stdlib["validation"])):
        np.save(args.work / f"{name}.npy", contexts(texts, tokenizer, args.context))
    versions = (
        f"{d.name} {d.version}"
        for p in args.packages
        for d in importlib.metadata.distributions(path=[str(p)])
        if d.name != "saebench"
    )
    facts = {
        "validation_bytes": sum(len(text.encode()) for _, text in stdlib["validation"]),
        "validation_modules": len(stdlib["validation"]),
        "stdlib_modules": len(stdlib["train"]),
        "package_modules": len(packages),
        "packages": sorted(set(versions), key=str.lower),
        "python": sys.version.split()[0],
    }
    (args.work / "corpus.json").write_text(json.dumps(facts, indent=1))


def mixture(args: argparse.Namespace) -> np.ndarray:
    """The order of contexts to train on, as numbers into stdlib followed by packages."""
    rng = np.random.default_rng(args.seed)
    n_stdlib, n_packages = (len(np.load(args.work / f"{name}.npy", mmap_mode="r")) for name in ("stdlib", "packages"))
    needed = int(args.tokens) // args.context
    library = np.concatenate([rng.permutation(n_stdlib) for _ in range(args.stdlib_epochs)])
    rest = np.concatenate([rng.permutation(n_packages) for _ in range(1 + needed // n_packages)]) + n_stdlib
    order = np.concatenate([library, rest])[:needed]
    return order[rng.permutation(len(order))]


# -------------------------------------------------------------------------------------- training


def steps_of(args: argparse.Namespace) -> int:
    whole = int(args.tokens) // args.context // args.batch
    return min(args.steps or whole, whole)


def new_model(args: argparse.Namespace) -> CausalLM:
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=args.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised by a quintic Newton-Schulz iteration (Jordan 2024).

    As torch.optim.Muon with `match_rms_adamw`, but in float32 and with equal shapes batched:
    torch's casts to bfloat16, which takes 10 s a step on a CPU without bfloat16 units.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    gradient = parameter.grad
                    assert gradient is not None
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                step = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=step)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices `[n, rows, columns]` with their singular values brought near one."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    transposed = x.shape[1] > x.shape[2]
    x = x.mT if transposed else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [
        Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def save_checkpoint(
    path: Path, step: int, seconds: float, model: torch.nn.Module, opts: list[torch.optim.Optimizer]
) -> None:
    tensors = {f"model.{name}": value for name, value in model.named_parameters()}
    for i, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        path.with_suffix(".tmp"),
        {"step": str(step), "seconds": str(seconds)},
    )
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, model: torch.nn.Module, opts: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """The step that comes next, and the seconds spent so far."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"model.{name}"])
    for i, opt in enumerate(opts):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, index, name = key.split(".", 3)
                state.setdefault(int(index), {})[name] = value
        opt.load_state_dict({**opt.state_dict(), "state": state})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    return int(header["step"]), float(header["seconds"])


def keep(folder: Path, args: argparse.Namespace, model: CausalLM) -> None:
    """The model as it is, in bfloat16 as the trained one, and its tokenizer, as an ordinary Hugging Face directory."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer").save_pretrained(folder)


def train(args: argparse.Namespace) -> tuple[CausalLM, float]:
    """The trained model, and the seconds that it took."""
    order = mixture(args)
    sources = np.concatenate([np.load(args.work / "stdlib.npy"), np.load(args.work / "packages.npy")])
    model = new_model(args).to(args.device)
    opts = optimizers(model, args.lr)
    n_steps, warmup, first, before = steps_of(args), 100, 0, 0.0
    checkpoint = args.work / "checkpoint.safetensors"
    if checkpoint.exists():
        first, before = load_checkpoint(checkpoint, model, opts)
    started = time.monotonic() - before

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    if first == 0 and 0 in args.keep:
        keep(args.work / "step-0", args, model)
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, unit="step", mininterval=10)
    recent: list[float] = []
    for step in bar:
        rows = order[step * args.batch : (step + 1) * args.batch]
        tokens = torch.from_numpy(sources[rows].astype(np.int64)).to(args.device)
        scale = min((step + 1) / warmup, 1.0) * min(1.0, (1 - step / n_steps) / args.decay)
        for opt in opts:
            opt.param_groups[0]["lr"] = args.lr * scale
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
            loss = step_loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 20 == 0:
            recent = [*recent[-9:], loss.item()]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
        if step % 100 == 99 or step == n_steps - 1:
            save_checkpoint(checkpoint, step + 1, time.monotonic() - started, model, opts)
        if step + 1 in args.keep:
            keep(args.work / f"step-{step + 1}", args, model)
    return model, time.monotonic() - started


# ------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def held_out_nats(model: CausalLM, validation: np.ndarray, device: str) -> float:
    """Sum of -ln p over every token of the contexts but the first."""
    total = 0.0
    for start in range(0, len(validation), 16):
        tokens = torch.from_numpy(validation[start : start + 16].astype(np.int64)).to(device)
        logits = model(tokens).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return total


def ngram_nats(training: np.ndarray, validation: np.ndarray) -> tuple[float, float]:
    """The same sum under a unigram (add one) and an interpolated trigram model (Witten and Bell 1991)."""
    vocabulary = 4096
    train, held = training.astype(np.int64), validation.astype(np.int64)
    unigrams = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    p = unigrams[held[:, 1:]] / unigrams.sum()
    first = -np.log(p).sum()
    for order in (2, 3):
        # Histories shorter than the order (a context's second token) keep the lower order's p.
        def keys(rows: np.ndarray, order: int = order) -> np.ndarray:
            powers = vocabulary ** np.arange(order - 1, -1, -1)
            return np.lib.stride_tricks.sliding_window_view(rows, order, axis=1) @ powers

        grams, counts = np.unique(keys(train), return_counts=True)
        histories, begins = np.unique(grams // vocabulary, return_index=True)
        totals, kinds = np.add.reduceat(counts, begins), np.diff(np.append(begins, len(grams)))
        wanted = keys(held)

        def look_up(table: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
            return np.where(table[at] == wanted, values[at], 0)

        count = look_up(grams, counts, wanted)
        total = look_up(histories, totals, wanted // vocabulary)
        kind = look_up(histories, kinds, wanted // vocabulary)
        lower = p[:, order - 2 :]
        p = p.copy()
        p[:, order - 2 :] = np.where(total > 0, (count + kind * lower) / np.maximum(total + kind, 1), lower)
    return first, -np.log(p).sum()


@torch.no_grad()
def sample(model: CausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]], device=model.device)
    out = model.generate(ids, max_new_tokens=96, do_sample=True, temperature=0.8, top_p=0.95, pad_token_id=0)
    return str(tokenizer.decode(out[0, 1:], skip_special_tokens=False)).split(EOT)[0]


CARD = """---
license: mit
language: code
---
# saebench demo model

A Llama-shaped language model of Python source, small enough to ship: {layers} layers of width {width},
{parameters:.1f}M parameters, byte-level BPE vocabulary of 4,096, context {context}, bfloat16. It is the
embedded default of saebench: something real to harvest, train on and steer with nothing downloaded. It
completes Python plausibly and knows nothing.

Trained by `{command}`
on {hardware} in {hours} on {tokens:.1f}M tokens: {stdlib_modules} modules of Python {python}'s standard library
(tests, generated tables and the validation modules left out), seen up to {epochs} times, and {package_modules} modules of the
packages below, from which near copies of validation modules were removed.

## Held-out loss

{validation_modules} standard-library modules that a hash of their path holds out, {validation_tokens:,} tokens, {validation_bytes:,} bytes.

| model | nats/token | bits/byte |
|---|---|---|
{table}

Every token of a context but its opening BOS is predicted; the trigram is interpolated (Witten-Bell) and counted on
the same training corpus.

## Sampled continuations

Temperature 0.8, top-p 0.95, seeds 0, 1, 2.

{samples}

## Packages in the training corpus

{packages}
"""


def write(args: argparse.Namespace, model: CausalLM, seconds: float) -> None:
    """Save in bfloat16, measure what was saved, and write the card."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    facts = json.loads((args.work / "corpus.json").read_text())
    validation = np.load(args.work / "validation.npy")
    training = np.concatenate([np.load(args.work / "stdlib.npy"), np.load(args.work / "packages.npy")])
    unigram, trigram = ngram_nats(training, validation)
    rows = {"unigram": unigram, "trigram": trigram, "this model": held_out_nats(saved, validation, args.device)}
    predicted = validation[:, 1:].size
    table = "\n".join(
        f"| {name} | {nats / predicted:.3f} | {nats / math.log(2) / facts['validation_bytes']:.3f} |"
        for name, nats in rows.items()
    )
    samples = "\n\n".join(f"```python\n{sample(saved, tokenizer, p, i)}\n```" for i, p in enumerate(PROMPTS))
    names = ("tokens", "steps", "decay", "context", "batch", "lr", "seed")
    options = " ".join(f"--{name} {getattr(args, name):g}" for name in names if getattr(args, name) is not None)
    command = f"python scripts/train_demo_model.py {options}"
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    card = CARD.format(
        layers=saved.config.num_hidden_layers, width=saved.config.hidden_size, context=args.context, command=command,
        parameters=sum(p.numel() for p in saved.parameters()) / 1e6, tokens=steps_of(args) * args.batch * args.context / 1e6, epochs=args.stdlib_epochs,
        hardware=hardware, hours=f"{seconds / 3600:.1f} hours", table=table, samples=samples, validation_tokens=predicted,
        **{**facts, "packages": ", ".join(facts["packages"])},
    )  # fmt: skip
    (args.out / "README.md").write_text(card)
    log.info("\n%s", table)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    prepare(args)
    model, seconds = train(args)
    write(args, model, seconds)


if __name__ == "__main__":
    main()
