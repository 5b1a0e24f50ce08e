"""Start the app's server."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

START_SECONDS = 60.0
EMBEDDER = "SAEBENCH_APP_EMBEDDER"
"""the environment's name for it"""


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Where the app is served."""

    port: int = 8501
    """of the server"""
    address: str = "localhost"
    """that it listens at; anyone who reaches it can read the runs and start commands in them"""
    browser: bool = True
    """open it in a browser"""
    embedder: Path | None = None
    """folder of a static embedding model (model2vec), by which names are searched by meaning"""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"port is {self.port}; expected 1 to 65535")


def app_script() -> Path:
    """The app's entry: in a wheel beside this package, in a checkout beside it one level up."""
    package = Path(__file__).parents[1]
    for folder in (package / "_app", package.parent / "app"):
        if (folder / "main.py").exists():
            return folder / "main.py"
    raise ValueError(f"the app is not installed beside {package}; install saebench again")


def command(config: AppConfig) -> list[str]:
    """The server's command line."""
    options = {
        "server.port": config.port, "server.address": config.address, "server.headless": not config.browser,
        "server.showEmailPrompt": False,  # which Streamlit would wait for on an account that never ran it
    }  # fmt: skip
    flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    return [sys.executable, "-P", "-m", "streamlit", "run", str(app_script()), *flags]


def serve(config: AppConfig, root: Path) -> NoReturn:
    """Serve the app on a run, or a folder of runs, in the place of this process: what ends it ends the server."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; expected a run, or a folder of runs")
    sys.stdout.write(f"{root}: http://{config.address}:{config.port} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command(config), _environment(root, config.embedder))


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The app in the background, at the address given; for what looks at it by itself. Raises RuntimeError where it does not start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        command(AppConfig(port=port, browser=False)),
        env=_environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while server.poll() is None and not _answers(port):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not _answers(port):
            raise RuntimeError(f"the app's server did not start at port {port}; try `saebench app {root}`")
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def _environment(root: Path, embedder: Path | None = None) -> dict[str, str]:
    own = {"SAEBENCH_APP_ROOT": str(root), "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false"}
    return {**os.environ, **own} | ({} if embedder is None else {EMBEDDER: str(embedder.resolve())})
