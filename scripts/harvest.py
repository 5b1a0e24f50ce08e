"""`saebench harvest` as a script, for launchers that want a file."""

import sys

from saebench.cli import main

if __name__ == "__main__":
    sys.exit(main(["harvest", *sys.argv[1:]]))
