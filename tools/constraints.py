"""Print the lock as pip constraints, with the line of a torch that is already installed replaced by that torch."""

import importlib.metadata
import sys


def main() -> None:
    lock = open(sys.argv[1], encoding="utf-8").read().splitlines()
    try:
        have = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        have = None
    for line in lock:
        print(f"torch=={have}" if have and line.startswith("torch==") else line)


if __name__ == "__main__":
    main()
