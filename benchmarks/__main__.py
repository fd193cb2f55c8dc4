"""The command line of the benchmarks: ``python -m benchmarks --help``.

``gpu`` has one of its own, which runs where little more than torch and Triton is installed.
"""

import sys


def main() -> int:
    """Entry point; returns the exit status."""
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks.gpu.command import main as command
    else:
        from benchmarks.command_line import main as command
    return command()


if __name__ == "__main__":
    sys.exit(main())
