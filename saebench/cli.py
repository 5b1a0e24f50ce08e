"""The `saebench` command: argv -> config -> one call of `commands.py`. The only place that configures logging."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saebench import __version__
from saebench import commands as does
from saebench.bench.table import BENCHES
from saebench.browse.serve import AppConfig
from saebench.circuits import CircuitConfig
from saebench.config import add_arguments
from saebench.evaluate import CheckConfig, EvalConfig
from saebench.evaluate.diffing import DiffConfig
from saebench.evaluate.push import PushConfig
from saebench.harvest import ExtendConfig, HarvestConfig
from saebench.index import IndexConfig
from saebench.index.export import ExportConfig
from saebench.index.layout import MapConfig
from saebench.interactions import InteractionsConfig, WhyConfig
from saebench.judge import ExplainConfig
from saebench.pipeline import RunConfig
from saebench.sae.convert import ConvertConfig
from saebench.sae.hub import Source, local
from saebench.steer.run import SteerConfig
from saebench.text import TextConfig
from saebench.train import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, 130 when interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    behind = argv[cut + 1 :] if "train" in argv[:cut] else []
    arguments = _parser().parse_args(argv[:cut] if behind else argv)
    arguments.behind = behind
    usual = logging.INFO if does.speaks() else logging.WARNING
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
        return does.INTERRUPTED
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

    add_arguments(
        command("run", does.run_command, "all stages for one model: from its name to the browser"), RunConfig, "model"
    )
    command(
        "harvest",
        does.harvest_command,
        "run a model over text and keep its residual-stream vectors",
        HarvestConfig,
        TextConfig,
    )
    command("train", does.train_command, "train a grid of SAEs on a store", TrainConfig)
    command("eval", does.eval_command, "evaluate the SAEs of a run on held-out documents, and report", EvalConfig)
    about = "report anew on an evaluated run, or on several as on one"
    reporting = command("report", does.report_command, about)
    reporting.add_argument("run", type=Path, nargs="+", help="run directories")
    reporting.add_argument(
        "--out", type=Path, help="folder to write to (default: of one run its own, of several: report)"
    )
    about = "what each of two models has alone, by a crosscoder of both"
    command("diff", does.diff_command, about, DiffConfig)
    about = "look at an SAE before it is trusted: does it do on a store's rows what it says of itself?"
    add_arguments(command("check", does.check_command, about), CheckConfig, "sae")
    about = "publish an evaluated SAE on the Hugging Face hub, with a card of its figures"
    add_arguments(command("push", does.push_command, about), PushConfig, "sae", "to")
    about = "write an SAE in another package's format"
    add_arguments(command("convert", does.convert_command, about), ConvertConfig, "sae")
    command("index", does.index_command, "gather every latent's evidence in one pass over a store", IndexConfig)
    about = "have latents explained by a language model, and the explanations tried on held-out text"
    command("explain", does.explain_command, about, ExplainConfig)
    command("export", does.export_command, "write latents of an index as a page, or in others' forms", ExportConfig)
    command("map", does.map_command, "lay the latents of an index out in two dimensions, for the app's page", MapConfig)
    about = "how a model gets from a prompt to a token: the attribution graph through a set of transcoders"
    command("circuits", does.circuits_command, about, CircuitConfig)
    about = "which tokens a latent, or the next token, needs together (AND), and which in place of each other (OR)"
    command("why", does.why_command, about, WhyConfig)
    about = "what latents need beside their token: the sets that several examples have, and the rule these make"
    command("interactions", does.interactions_command, about, InteractionsConfig)
    steering = command(
        "steer", does.steer_command, "generate with latents turned up, down or off, beside controls", SteerConfig
    )
    steering.add_argument(
        "action", nargs="?", choices=("rank",), help="rank: list the latents that are best to steer with"
    )
    app = command("app", does.app_command, "browse latents and steer with them in a browser", AppConfig)
    app.add_argument(
        "run", type=Path, nargs="?", default=Path("runs"), help="a run, or a folder of runs (default: runs)"
    )
    small = command("demo", does.demo_command, "the whole pipeline on the embedded model and corpus")
    small.add_argument(
        "of", nargs="?", choices=("circuits",), help="circuits: transcoders instead, and the graphs of a few prompts"
    )
    small.add_argument("--out", type=Path, help="run directory (default: runs/demo, of circuits runs/demo-circuits)")
    about = "what SAEs are worth beyond their reconstruction"
    benches = commands.add_parser("bench", help=about, description=about).add_subparsers(required=True, metavar="BENCH")
    for name, bench in BENCHES.items():
        command(name, does.bench_command, bench.about, bench.config, among=benches).set_defaults(bench=bench)
    store = commands.add_parser("store", help="look into an activation store, or check it").add_subparsers(
        required=True, metavar="ACTION"
    )
    for action, act, about in (
        ("info", does.store_info_command, "what is in a store, and how long its rows are"),
        ("verify", does.store_verify_command, "check every block of a store"),
    ):
        sub = store.add_parser(action, help=about, description=about)
        sub.add_argument("path", type=Path)
        sub.set_defaults(command=act)
    about = "continue a finished store with more tokens, from where its data set stood"
    growing = store.add_parser("extend", help=about, description=about)
    add_arguments(growing, ExtendConfig)
    growing.add_argument("path", type=Path)
    growing.set_defaults(command=does.store_extend_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
