"""``python -m tests``: the suite, in the two processes that it needs; ``python -m tests --slow``: what takes longer.

Kernels are run in Triton's interpreter, which is chosen once for a process, and compiled ahead of time, which a process
that interprets cannot do. Other arguments go to both pytest runs.
"""

import os
import subprocess
import sys

NOTHING_COLLECTED = 5  # pytest's exit code


def main(arguments: list[str]) -> int:
    """Run both kinds of test; non-zero if either fails."""
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    plain.setdefault("OMP_NUM_THREADS", "1")  # a worker on each core: more threads would wait for one another
    workers = str(min(8, os.cpu_count() or 1))
    chosen = "slow" if "--slow" in arguments else "not slow"
    arguments = [argument for argument in arguments if argument != "--slow"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", "-m", chosen]
    ordinary = subprocess.call([*pytest, "tests", "--ignore=tests/kernels", *arguments], env=plain)
    interpreter = subprocess.call([*pytest, "tests/kernels", *arguments], env={**plain, "TRITON_INTERPRET": "1"})
    if chosen == "slow" and interpreter == NOTHING_COLLECTED:
        interpreter = 0
    return ordinary or interpreter


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
