"""`saebench train` as a script, for launchers that want a file."""

import sys

from saebench.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
