"""``python -m tests``: the whole suite, in the two processes that it needs.

Kernels are run in Triton's interpreter, which is chosen once for a process, and compiled ahead of time, which a process
that interprets cannot do. Arguments go to both pytest runs.
"""

import os
import subprocess
import sys


def main(arguments: list[str]) -> int:
    """Run both kinds of test; non-zero if either fails."""
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    plain.setdefault("OMP_NUM_THREADS", "1")  # a worker on each core: more threads would wait for one another
    workers = str(min(8, os.cpu_count() or 1))
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal"]
    ordinary = subprocess.call([*pytest, "tests", "--ignore=tests/kernels", *arguments], env=plain)
    interpreter = subprocess.call([*pytest, "tests/kernels", *arguments], env={**plain, "TRITON_INTERPRET": "1"})
    return ordinary or interpreter


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
