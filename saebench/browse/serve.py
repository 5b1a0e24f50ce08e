"""Start the app's server."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Where the app is served."""

    port: int = 8501
    """of the server"""
    address: str = "localhost"
    """that it listens at; anyone who reaches it can read the runs and start commands in them"""
    browser: bool = True
    """open it in a browser"""

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
    options = {"server.port": config.port, "server.address": config.address, "server.headless": not config.browser}
    flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    return [sys.executable, "-P", "-m", "streamlit", "run", str(app_script()), *flags]


def serve(config: AppConfig, root: Path) -> int:
    """Serve the app on a run, or a folder of runs, until it is interrupted; returns the exit status."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; expected a run, or a folder of runs")
    environment = {**os.environ, "SAEBENCH_APP_ROOT": str(root), "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false"}
    try:
        return subprocess.call(command(config), env=environment)
    except KeyboardInterrupt:
        return 0
