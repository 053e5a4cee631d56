"""What importing the library costs beside importing what it is built on.

    python benchmarks/import_time.py

Each import is timed in fresh interpreters, the two in turn; the ratio is of their medians.
"""

import subprocess
import sys

import numpy as np


def seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                check=True).stdout)  # fmt: skip


def main(num_runs: int = 15) -> None:
    names = ("equinox, diffrax", "fisher_flow")
    times = np.array([[seconds(name) for name in names] for _ in range(num_runs)])
    for name, column in zip(names, times.T, strict=True):
        low, median, high = np.quantile(column, [0.1, 0.5, 0.9])
        print(f"import {name:<17} {median:.2f} s ({low:.2f} to {high:.2f})")
    base, ours = np.median(times, axis=0)
    print(f"ratio of the medians     {ours / base:.2f}")


if __name__ == "__main__":
    main()
