"""What each command does: its options to a config, one call, and the result as text. Nothing else prints."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

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
from saebench.steer.run import SteerConfig, rank, steer, sweep
from saebench.store import open_store
from saebench.store.manifest import check_manifest, read_manifest
from saebench.store.norms import describe
from saebench.store.schema import MANIFEST
from saebench.text import TextConfig
from saebench.train import TrainConfig, train

INTERRUPTED = 130


def speaks() -> bool:
    """Whether this process tells what all would: of several under torchrun, the first."""
    return os.environ.get("RANK", "0") == "0"


def run_command(arguments: argparse.Namespace) -> int:
    config = from_arguments(RunConfig, arguments)
    summary = run(config)
    if summary is None:
        return INTERRUPTED
    print(show_run(summary, config.folder))
    print(f"next: saebench app {config.folder}")
    return 0


def harvest_command(arguments: argparse.Namespace) -> int:
    store = harvest(from_arguments(HarvestConfig, arguments), from_arguments(TextConfig, arguments))
    if store is None:
        return INTERRUPTED
    if speaks():
        print(describe(store))
    return 0


def train_command(arguments: argparse.Namespace) -> int:
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
    if speaks():
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


def eval_command(arguments: argparse.Namespace) -> int:
    config = from_arguments(EvalConfig, arguments)
    summary = write_report(config.run, evaluate(config), config.store, more=[table_of(config.run)])
    print(show_evaluation(summary, config.run))
    return 0


def report_command(arguments: argparse.Namespace) -> int:
    more = [table_of(run) for run in arguments.run]
    print(show_evaluation(*report(ReportConfig(run=tuple(arguments.run), out=arguments.out), more)))
    return 0


def bench_command(arguments: argparse.Namespace) -> int:
    print(show_figures(arguments.bench.run(from_arguments(arguments.bench.config, arguments))))
    return 0


def diff_command(arguments: argparse.Namespace) -> int:
    found = diff(from_arguments(DiffConfig, arguments))
    print(format_table(found.count_table(), left=(0, 2)))
    for model in ("tuned", "base"):
        print(f"\nmost of all the {model} model's own")
        print(format_table(found.table(found.towards(model)[:10].tolist()), left=(1,)))
    print(f"figures of {found.rows:,} held-out rows")
    return 0


def check_command(arguments: argparse.Namespace) -> int:
    found = check(from_arguments(CheckConfig, arguments))
    print("\n".join(found.lines()))
    print("\n".join(f"warning: {warning}" for warning in found.warnings) or "nothing amiss")
    return 0


def push_command(arguments: argparse.Namespace) -> int:
    print(push(from_arguments(PushConfig, arguments)))
    return 0


def convert_command(arguments: argparse.Namespace) -> int:
    print(convert(from_arguments(ConvertConfig, arguments)))
    return 0


def index_command(arguments: argparse.Namespace) -> int:
    return _path_of(build_index(from_arguments(IndexConfig, arguments)))


def export_command(arguments: argparse.Namespace) -> int:
    print("\n".join(map(str, export(from_arguments(ExportConfig, arguments)))))
    return 0


def map_command(arguments: argparse.Namespace) -> int:
    return _path_of(make_map(from_arguments(MapConfig, arguments)))


def _path_of(result: Path | None) -> int:
    """Print where a result is; of what was stopped there is none."""
    if result is None:
        return INTERRUPTED
    print(result)
    return 0


def explain_command(arguments: argparse.Namespace) -> int:
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


def circuits_command(arguments: argparse.Namespace) -> int:
    config = from_arguments(CircuitConfig, arguments)
    found = circuits(config)
    if found is None:
        return INTERRUPTED
    print("\n".join(found.lines()))
    for one in found.tried[: config.intervene is not None]:
        print(f"\n{one.title}\n{format_table(effects_table(one))}")
    print(found.path)
    return 0


def why_command(arguments: argparse.Namespace) -> int:
    config = from_arguments(WhyConfig, arguments)
    found = why(config)
    print(json.dumps(found.to_json()) if config.json else "\n".join(found.lines()))
    return 0


def interactions_command(arguments: argparse.Namespace) -> int:
    found = survey(from_arguments(InteractionsConfig, arguments))
    if found is None:
        return INTERRUPTED
    print(show_needs(*found))
    return 0


def steer_command(arguments: argparse.Namespace) -> int:
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


def app_command(arguments: argparse.Namespace) -> int:
    return serve(from_arguments(AppConfig, arguments), arguments.run)


def demo_command(arguments: argparse.Namespace) -> int:
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


def store_info_command(arguments: argparse.Namespace) -> int:
    print(describe(open_store(arguments.path), norms=True))
    return 0


def store_extend_command(arguments: argparse.Namespace) -> int:
    store = extend(arguments.path, from_arguments(ExtendConfig, arguments))
    if store is None:
        return INTERRUPTED
    print(describe(store))
    return 0


def store_verify_command(arguments: argparse.Namespace) -> int:
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
