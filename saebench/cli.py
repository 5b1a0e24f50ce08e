"""The `saebench` command: argv -> config -> one call. The only place that configures logging."""

import argparse
import dataclasses
import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saebench import __version__
from saebench.browse.serve import AppConfig, serve
from saebench.config import add_arguments, from_arguments
from saebench.demo import demo
from saebench.evaluate import (
    CheckConfig,
    EvalConfig,
    check,
    equal_l0_table,
    evaluate,
    massive_note,
    set_table,
    table,
    write_report,
)
from saebench.evaluate.diffing import DiffConfig, diff
from saebench.evaluate.push import PushConfig, push
from saebench.harvest import ExtendConfig, HarvestConfig, extend, harvest
from saebench.harvest.extend import settings_of
from saebench.harvest.run import open_model
from saebench.harvest.settings import settled
from saebench.index import IndexConfig, build_index
from saebench.index.explanations import Explanation, Halves
from saebench.index.export import ExportConfig, export
from saebench.index.layout import MapConfig, make_map
from saebench.index.names import Names
from saebench.judge import ExplainConfig, explain
from saebench.pipeline import RunConfig, run, run_stages
from saebench.runlog import progress
from saebench.sae.convert import ConvertConfig, convert
from saebench.sae.hub import Source, local
from saebench.steer import Generation
from saebench.steer.run import SteerConfig, rank, steer, sweep
from saebench.store import open_store
from saebench.store.manifest import check_manifest, read_manifest
from saebench.store.norms import describe
from saebench.store.schema import MANIFEST
from saebench.text import TextConfig
from saebench.train import TrainConfig, train

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, 130 when interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    behind = argv[cut + 1 :] if "train" in argv[:cut] else []
    arguments = _parser().parse_args(argv[:cut] if behind else argv)
    arguments.behind = behind
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    if not arguments.verbose:
        for name in ("datasets", "fsspec", "h5py", "httpx", "httpx2", "huggingface_hub", "transformers", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        for name, value in vars(arguments).items():  # SAEs on the hub are fetched once there is a log to say so
            setattr(arguments, name, _here(value))
        return arguments.command(arguments)
    except ValueError as error:
        if arguments.verbose:
            raise
        print(f"saebench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a table closed it early
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        if arguments.verbose:
            raise
        print(f"saebench: error: {error}", file=sys.stderr)
        return 2


def _here(value: Any) -> Any:
    """The directories of SAEs that options name; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_here, value))
    return local(value) if isinstance(value, Source) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saebench", description="A workbench for sparse autoencoders on language models."
    )
    parser.add_argument("--version", action="version", version=f"saebench {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="debug messages, and tracebacks of errors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, *configs: type
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(command=run)
        for config in configs:
            add_arguments(sub, config)
        return sub

    add_arguments(command("run", _run, "all stages for one model: from its name to the browser"), RunConfig, "model")
    command(
        "harvest", _harvest, "run a model over text and keep its residual-stream vectors", HarvestConfig, TextConfig
    )
    command("train", _train, "train a grid of SAEs on a store", TrainConfig)
    command("eval", _eval, "evaluate the SAEs of a run on held-out documents, and report", EvalConfig)
    about = "what each of two models has alone, by a crosscoder of both"
    command("diff", _diff, about, DiffConfig)
    about = "look at an SAE before it is trusted: does it do on a store's rows what it says of itself?"
    add_arguments(command("check", _check, about), CheckConfig, "sae")
    about = "publish an evaluated SAE on the Hugging Face hub, with a card of its figures"
    add_arguments(command("push", _push, about), PushConfig, "sae", "to")
    about = "write an SAE in another package's format"
    add_arguments(command("convert", _convert, about), ConvertConfig, "sae")
    command("index", _index, "gather every latent's evidence in one pass over a store", IndexConfig)
    about = "have latents explained by a language model, and the explanations tried on held-out text"
    command("explain", _explain, about, ExplainConfig)
    command("export", _export, "write latents of an index as a page, or in others' forms", ExportConfig)
    command("map", _map, "lay the latents of an index out in two dimensions, for the app's page", MapConfig)
    steering = command("steer", _steer, "generate with latents turned up, down or off, beside controls", SteerConfig)
    steering.add_argument(
        "action", nargs="?", choices=("rank",), help="rank: list the latents that are best to steer with"
    )
    app = command("app", _app, "browse latents and steer with them in a browser", AppConfig)
    app.add_argument(
        "run", type=Path, nargs="?", default=Path("runs"), help="a run, or a folder of runs (default: runs)"
    )
    small = command("demo", _demo, "the whole pipeline on the embedded model and corpus")
    small.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory (default: runs/demo)")
    store = commands.add_parser("store", help="look into an activation store, or check it").add_subparsers(
        required=True, metavar="ACTION"
    )
    for action, act, about in (
        ("info", _store_info, "what is in a store, and how long its rows are"),
        ("verify", _store_verify, "check every block of a store"),
    ):
        sub = store.add_parser(action, help=about, description=about)
        sub.add_argument("path", type=Path)
        sub.set_defaults(command=act)
    about = "continue a finished store with more tokens, from where its data set stood"
    growing = store.add_parser("extend", help=about, description=about)
    add_arguments(growing, ExtendConfig)
    growing.add_argument("path", type=Path)
    growing.set_defaults(command=_store_extend)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    config = from_arguments(RunConfig, arguments)
    summary = run(config)
    if summary is None:
        return INTERRUPTED
    _show_run(summary, config.folder)
    print(f"next: saebench app {config.folder}")
    return 0


def _harvest(arguments: argparse.Namespace) -> int:
    store = harvest(from_arguments(HarvestConfig, arguments), from_arguments(TextConfig, arguments))
    if store is None:
        return INTERRUPTED
    if os.environ.get("RANK", "0") == "0":  # of several processes under torchrun, one says it
        print(describe(store))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    config = from_arguments(TrainConfig, arguments)
    device, trusted = None, False
    if arguments.behind:
        head, text, spare = _head_of(config, arguments.behind)
        if spare and harvest(head, text, spare) is None:
            return INTERRUPTED
        device, trusted = head.device, head.trust_remote_code
    folders = train(config, model_device=device, trust_remote_code=trusted)
    if folders is None:
        return INTERRUPTED
    print("\n".join(map(str, folders)))
    print(f"next: saebench eval --run {config.out}")
    return 0


def _head_of(config: TrainConfig, behind: list[str]) -> tuple[HarvestConfig, TextConfig, int]:
    """(head of a rolling run by the options of `harvest`, its text, training tokens of the windows behind it; 0 for one that is finished)."""
    if config.rolling is None:
        raise ValueError(
            f"options after `--` are those of `harvest` for --rolling N, which is not given: {' '.join(behind)}"
        )
    parser = argparse.ArgumentParser(
        prog="saebench train", add_help=False, allow_abbrev=False,
        usage="saebench train --rolling N … -- OPTIONS, those of `saebench harvest` without --tokens and --out",
    )  # fmt: skip
    add_arguments(parser, HarvestConfig)
    add_arguments(parser, TextConfig)
    manifest = read_manifest(config.store) if (config.store / MANIFEST).exists() else None
    made = manifest["identity"] if manifest and manifest["complete"] else None
    usual = ["--layers", ",".join(map(str, made["layers"]))] if made else []
    given = parser.parse_args(["--out", str(config.store), *usual, *behind])
    if "tokens" in given or given.out != config.store:
        raise ValueError(
            "after `--`, --tokens and --out are not for you to give: they follow from --rolling and --store"
        )
    head, text = from_arguments(HarvestConfig, given), from_arguments(TextConfig, given)
    if made:
        told, told_text = settings_of(config.store, made, ExtendConfig(tokens=1))
        for new, old in ((head, told), (text, told_text)):
            for name in vars(given).keys() & vars(old).keys() - {"out", "device", "trust_remote_code"}:
                if getattr(new, name) != getattr(old, name):
                    raise ValueError(
                        f"{name} is {getattr(new, name)!r} after `--`, and {config.store} was made with {getattr(old, name)!r}: "
                        "leave the option out, or choose another --store"
                    )
        return head, text, 0
    if head.shard_contexts is None:  # how many fit depends on the model's width
        head = settled(head, open_model(head, head.device))
    shard = head.per_shard * head.context
    tokens = config.rolling // 3 * shard
    return dataclasses.replace(head, tokens=tokens), text, config.rolling * shard - tokens


def _eval(arguments: argparse.Namespace) -> int:
    config = from_arguments(EvalConfig, arguments)
    _show(write_report(config.run, evaluate(config), config.store), config.run)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    found = diff(from_arguments(DiffConfig, arguments))
    print(format_table(found.count_table(), left=(0, 2)))
    for model in ("tuned", "base"):
        print(f"\nmost of all the {model} model's own")
        print(format_table(found.table(found.towards(model)[:10].tolist()), left=(1,)))
    print(f"figures of {found.rows:,} held-out rows")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    found = check(from_arguments(CheckConfig, arguments))
    print("\n".join(found.lines()))
    print("\n".join(f"warning: {warning}" for warning in found.warnings) or "nothing amiss")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    print(push(from_arguments(PushConfig, arguments)))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    print(convert(from_arguments(ConvertConfig, arguments)))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    path = build_index(from_arguments(IndexConfig, arguments))
    if path is None:
        return INTERRUPTED
    print(path)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    print("\n".join(map(str, export(from_arguments(ExportConfig, arguments)))))
    return 0


def _map(arguments: argparse.Namespace) -> int:
    path = make_map(from_arguments(MapConfig, arguments))
    if path is None:
        return INTERRUPTED
    print(path)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    config = from_arguments(ExplainConfig, arguments)
    found = explain(config)
    if found is None:
        return INTERRUPTED
    if config.judge is None:
        print(f"{len(found)} explanations taken; with --judge, too, they are scored")
        return 0
    print(format_table(explanations_table(found), left=(0, 7)))
    print("each figure is of the second half of the held-out documents, and chance is 0.5")
    return 0


def explanations_table(found: dict[int, Explanation]) -> list[list[str]]:
    """A heading, a row of figures for each latent and their medians; – where there are too few windows."""
    names = ("detection", "fuzzing", "other_explanation", "other_windows", "rule", "tokens")
    scores = {latent: [_second(getattr(each, name)) for name in names] for latent, each in found.items()}
    known = ([each for each in column if each is not None] for column in zip(*scores.values(), strict=True))
    medians = [statistics.median(column) if column else None for column in known]
    tallies = [tally for each in found.values() for name in names[:3] for tally in getattr(each, name) or ()]
    unusable, all_of_them = sum(tally.unusable for tally in tallies), sum(tally.asked for tally in tallies)
    rows = [
        [str(latent), *map(_figure, scores[latent]), found[latent].text or "no usable explanation"] for latent in found
    ]
    heading = ["latent", "detection", "fuzzing", "other's text", "other's windows", "rule", "tokens", "explanation"]
    return [heading, *rows, ["median", *map(_figure, medians), f"({unusable} of {all_of_them} answers were unusable)"]]


def _second(halves: Halves | None) -> float | None:
    return None if halves is None else halves[1].score


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _steer(arguments: argparse.Namespace) -> int:
    config = from_arguments(SteerConfig, arguments)
    if arguments.action == "rank":
        _print_ranking(config)
    elif config.sweep:
        _print_sweep(config)
    else:
        print(show_texts(config.prompt, steer(config)))
    return 0


def _print_ranking(config: SteerConfig) -> None:
    bench, scores, latents = rank(config)
    assert bench.index
    tops = bench.index.top_logits
    assert tops is not None
    rows = [["latent", "output", "input", "top logits", "name"]]
    names = Names(bench.index)
    for latent in latents:
        tokens = " ".join(map(repr, bench.index.pieces(tops[latent, :5])))
        figures = (
            f"{scores.output[latent]:.3f}{'' if scores.measured[latent] else ' ~'}",
            f"{scores.input[latent]:.3f}",
        )
        name = names[int(latent)]
        rows.append([str(latent), *figures, tokens, name.text if name.explained else "-"])
    print(format_table(rows, left=(0, 3, 4)))
    if not scores.measured[latents].all():
        print("~ estimated on a few short prompts; `--latent N` measures it whole")


def show_texts(prompt: str, made: Generation) -> str:
    """The texts of a generation under a heading for each arm."""
    lines: list[str] = []
    for arm in dict.fromkeys(text.arm for text in made.texts):
        texts = made.of(arm)
        kl = sum(float(text.kl.mean()) for text in texts) / len(texts)
        surprise = sum(text.cross_entropy for text in texts) / len(texts)
        lines.append(f"\n=== {arm}: cross-entropy {surprise:.2f}, KL {kl:.2f} nats per token")
        for text in texts:
            apart = "" if text.diverges is None else f" (differs from token {text.diverges} on)"
            lines += [f"--- {text.sample + 1}{apart}", prompt + text.text]
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in made.seconds.items())
    return "\n".join([*lines, "", f"took {seconds}"])


def _print_sweep(config: SteerConfig) -> None:
    found = sweep(config)
    names = ("firing", "activation", "rule", "top_tokens", "cross_entropy", "diversity", "logits", "kl")
    rows = [["arm", "strength", "of the norm", "concept", "fluency", "score", *names]]
    for dose in found.doses:
        norm = "–" if dose.norm is None else f"{dose.norm:.2f}"
        figures = ("–" if (value := getattr(dose, name)) is None else f"{value:.3f}" for name in names)
        best = dose.arm == "steered" and dose.strength == found.best.strength
        rows.append([dose.arm + " *" * best, f"{dose.strength:.2f}", norm, *dose.told(), *figures])
    print(format_table(rows))
    if found.other is not None:
        print(f"other: the direction of latent {found.other}, which fires about as often")
    print("rule: in which share of the texts it holds, labelled as the index labels; (…): 95%, bootstrap over prompts")
    print(
        "* best: the harmonic mean of concept and fluency on half of the prompts; on the other half, at this strength:"
    )
    rows = [["arm", "concept", "fluency", "score"], *([dose.arm, *dose.told()] for dose in found.tested)]
    print(format_table(rows))
    for arm, text in found.samples.items():
        print(f"\n=== {arm}\n{text}")
    if config.out is not None:
        print(f"\n{config.out} and {config.out.with_suffix('.html')}")


def _show(summary: dict[str, Any], run: Path) -> None:
    print(format_table(table(summary["saes"])))
    if "sets" in summary:
        print("\n" + format_table(set_table(summary["sets"])))
    if note := massive_note(summary["saes"]):
        print(note)
    if summary["equal_l0"]:
        print("\n" + format_table(equal_l0_table(summary["equal_l0"])) + "\n")
    print(f"report: {run / 'report.html'}")


def _app(arguments: argparse.Namespace) -> int:
    return serve(from_arguments(AppConfig, arguments), arguments.run)


def _demo(arguments: argparse.Namespace) -> int:
    summary = run_stages(demo.stages(arguments.out))
    if summary is None:
        return INTERRUPTED
    _show_run(summary, arguments.out)
    print(f"next: saebench app {arguments.out}, or saebench steer rank --sae {arguments.out}/saes/{demo.INDEXED}")
    return 0


def _show_run(summary: dict[str, Any], run: Path) -> None:
    _show(summary, run)
    print("took " + ", ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items()))


def _store_info(arguments: argparse.Namespace) -> int:
    print(describe(open_store(arguments.path), norms=True))
    return 0


def _store_extend(arguments: argparse.Namespace) -> int:
    store = extend(arguments.path, from_arguments(ExtendConfig, arguments))
    if store is None:
        return INTERRUPTED
    print(describe(store))
    return 0


def _store_verify(arguments: argparse.Namespace) -> int:
    check_manifest(arguments.path)  # before it is believed
    store = open_store(arguments.path)
    with progress(sum(shard.n_rows for shard in store.shards), f"verify {arguments.path}", "row") as bar:
        damage = store.verify(bar.update)
    if damage:
        raise ValueError("\n".join(damage))
    print(
        f"{arguments.path}: {len(store.shards)} shards, every block matches its checksum, and all that lies beside them what was written"
    )
    return 0


def format_table(rows: list[list[str]], left: Sequence[int] = (0,)) -> str:
    """Columns aligned: those of `left` to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
