"""A run for the app: a tiny model, a corpus that would like to break the page, three SAEs, two of them indexed."""

from pathlib import Path

from conftest import CONTEXT, HOOK, sentences

from saebench.evaluate import EvalConfig, evaluate, write_report
from saebench.harvest import HarvestConfig, harvest
from saebench.index import IndexConfig, build_index
from saebench.text import TextConfig
from saebench.train import TrainConfig, train

HOSTILE = (
    b"<script>document.title='broken'</script> <b>bold</b> &amp; <img src=x onerror=\"document.title='broken'\"> ",
    b"**markdown** [link](javascript:alert(1)) $x^2$ :material/home: ``` # heading ",
    "\U0001f600 \u0634\u0643\u0631\u0627 \u202e\u05e2\u05d1\u05e8\u05d9\u05ea ".encode(),
    b"\x00 \t\r\n ",
)


def make_run(folder: Path, checkpoint: Path) -> Path:
    """The run directory; its store lies beside it."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number in range(40):
        body = b"".join(part + sentences(number, 20).encode() for part in HOSTILE)
        (corpus / f"{number:02d} <i>.txt").write_bytes(body)
    harvested = harvest(
        HarvestConfig(
            model=str(checkpoint), layers=(1,), tokens=8_000, context=CONTEXT, batch=32, shard_contexts=128,
            dtype="float32", out=folder / "store",
        ),
        TextConfig(dataset=str(corpus), validation_fraction=0.2),
    )  # fmt: skip
    assert harvested is not None
    run = folder / "runs" / "tiny"
    train(
        TrainConfig(
            store=folder / "store", hook=(HOOK,), out=run, arch=("topk", "relu"), k=(2, 4), target_l0=(4.0,), d_sae=(48,),
            tokens=20_000, batch=256, device="cpu",
        )
    )  # fmt: skip
    write_report(run, evaluate(EvalConfig(run=run, resamples=50, device="cpu")))
    for name in ("topk-k2", "topk-k4"):
        build_index(IndexConfig(sae=run / "saes" / name, workers=1, device="cpu"))
    return run
