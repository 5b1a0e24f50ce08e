"""The `saebench` command: argv -> config -> one call. The only place that configures logging."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saebench import __version__
from saebench.bench import BENCHES
from saebench.bench.stability import table_of
from saebench.browse.serve import AppConfig, serve
from saebench.circuits import CircuitConfig, circuits
from saebench.config import add_arguments, from_arguments
from saebench.demo import circuits as traced_demo
from saebench.demo import demo
from saebench.evaluate import CheckConfig, EvalConfig, ReportConfig, check, evaluate, report, write_report
from saebench.evaluate.diffing import DiffConfig, diff
from saebench.evaluate.push import PushConfig, push
from saebench.harvest import ExtendConfig, HarvestConfig, extend, harvest
from saebench.harvest.extend import settings_of
from saebench.harvest.run import open_model
from saebench.harvest.settings import settled
from saebench.index import IndexConfig, build_index
from saebench.index.export import ExportConfig, export
from saebench.index.layout import MapConfig, make_map
from saebench.interactions import InteractionsConfig, WhyConfig, survey, why
from saebench.judge import ExplainConfig, explain
from saebench.pipeline import RunConfig, run, run_stages
from saebench.printed import (
    effects_table,
    explanations_table,
    format_table,
    show_cases,
    show_evaluation,
    show_figures,
    show_needs,
    show_ranking,
    show_run,
    show_sweep,
    show_texts,
)
from saebench.runlog import progress
from saebench.sae.convert import ConvertConfig, convert
from saebench.sae.hub import Source, local
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
    usual = logging.INFO if _speaks() else logging.WARNING
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else usual, format="%(message)s", stream=sys.stderr, force=True
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
    if type(value) is tuple:  # and no record
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
        name: str, run: Callable[[argparse.Namespace], int], about: str, *configs: type, among: Any = commands
    ) -> argparse.ArgumentParser:
        sub = among.add_parser(name, help=about, description=about)
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
    about = "report anew on an evaluated run, or on several as on one"
    reporting = command("report", _report, about)
    reporting.add_argument("run", type=Path, nargs="+", help="run directories")
    reporting.add_argument(
        "--out", type=Path, help="folder to write to (default: of one run its own, of several: report)"
    )
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
    about = "how a model gets from a prompt to a token: the attribution graph through a set of transcoders"
    command("circuits", _circuits, about, CircuitConfig)
    about = "which tokens a latent, or the next token, needs together (AND), and which in place of each other (OR)"
    command("why", _why, about, WhyConfig)
    about = "what latents need beside their token: the sets that several examples have, and the rule these make"
    command("interactions", _interactions, about, InteractionsConfig)
    steering = command("steer", _steer, "generate with latents turned up, down or off, beside controls", SteerConfig)
    steering.add_argument(
        "action", nargs="?", choices=("rank",), help="rank: list the latents that are best to steer with"
    )
    app = command("app", _app, "browse latents and steer with them in a browser", AppConfig)
    app.add_argument(
        "run", type=Path, nargs="?", default=Path("runs"), help="a run, or a folder of runs (default: runs)"
    )
    small = command("demo", _demo, "the whole pipeline on the embedded model and corpus")
    small.add_argument(
        "of", nargs="?", choices=("circuits",), help="circuits: transcoders instead, and the graphs of a few prompts"
    )
    small.add_argument("--out", type=Path, help="run directory (default: runs/demo, of circuits runs/demo-circuits)")
    about = "what SAEs are worth beyond their reconstruction"
    benches = commands.add_parser("bench", help=about, description=about).add_subparsers(required=True, metavar="BENCH")
    for name, bench in BENCHES.items():
        command(name, _bench, bench.about, bench.config, among=benches).set_defaults(bench=bench)
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


def _speaks() -> bool:
    """Whether this process tells what all would: of several under torchrun, the first."""
    return os.environ.get("RANK", "0") == "0"


def _run(arguments: argparse.Namespace) -> int:
    config = from_arguments(RunConfig, arguments)
    summary = run(config)
    if summary is None:
        return INTERRUPTED
    print(show_run(summary, config.folder))
    print(f"next: saebench app {config.folder}")
    return 0


def _harvest(arguments: argparse.Namespace) -> int:
    store = harvest(from_arguments(HarvestConfig, arguments), from_arguments(TextConfig, arguments))
    if store is None:
        return INTERRUPTED
    if _speaks():
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
    if _speaks():
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
    summary = write_report(config.run, evaluate(config), config.store, more=[table_of(config.run)])
    print(show_evaluation(summary, config.run))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    more = [table_of(run) for run in arguments.run]
    print(show_evaluation(*report(ReportConfig(run=tuple(arguments.run), out=arguments.out), more)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    print(show_figures(arguments.bench.run(from_arguments(arguments.bench.config, arguments))))
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


def _circuits(arguments: argparse.Namespace) -> int:
    config = from_arguments(CircuitConfig, arguments)
    found = circuits(config)
    if found is None:
        return INTERRUPTED
    print("\n".join(found.lines()))
    for one in found.tried[: config.intervene is not None]:
        print(f"\n{one.title}\n{format_table(effects_table(one))}")
    print(found.path)
    return 0


def _why(arguments: argparse.Namespace) -> int:
    config = from_arguments(WhyConfig, arguments)
    found = why(config)
    print(json.dumps(found.to_json()) if config.json else "\n".join(found.lines()))
    return 0


def _interactions(arguments: argparse.Namespace) -> int:
    found = survey(from_arguments(InteractionsConfig, arguments))
    if found is None:
        return INTERRUPTED
    print(show_needs(*found))
    return 0


def _steer(arguments: argparse.Namespace) -> int:
    config = from_arguments(SteerConfig, arguments)
    if arguments.action == "rank":
        print(show_ranking(*rank(config)))
    elif config.sweep:
        print(show_sweep(sweep(config)))
        if config.out is not None:
            print(f"\n{config.out} and {config.out.with_suffix('.html')}")
    else:
        print(show_texts(config.prompt, steer(config)))
    return 0


def _app(arguments: argparse.Namespace) -> int:
    return serve(from_arguments(AppConfig, arguments), arguments.run)


def _demo(arguments: argparse.Namespace) -> int:
    traced = arguments.of == "circuits"
    out = arguments.out or Path("runs/demo-circuits" if traced else "runs/demo")
    summary = run_stages((traced_demo if traced else demo).stages(out))
    if summary is None:
        return INTERRUPTED
    shown = traced_demo.graphs(out) if traced else []
    if shown is None:
        return INTERRUPTED
    print(show_run(summary, out))
    print(
        show_cases(shown)
        if traced
        else f"next: saebench app {out}, or saebench steer rank --sae {out}/saes/{demo.INDEXED}"
    )
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
