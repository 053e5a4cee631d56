"""What it costs to leave the data on disk: updates a second and memory, beside those of data that
were loaded.

    python benchmarks/streaming.py --rows 5_000_000

The data are noise, of 29 observations and 8 actions; batches are of 256. The time of an update is
that of a long training less that of a short one, over the difference in updates, the two ways in
turn. The memory is the peak of what cannot be dropped when it gets scarce, as pages of files can
(Linux only).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

import fisher_flow


def write(folder: Path, num_rows: int) -> None:
    rng = np.random.default_rng(0)

    def parts():
        for start in range(0, num_rows, 250_000):
            num = min(250_000, num_rows - start)
            o, next_o = rng.normal(size=(2, num, 29)).astype(np.float32)
            a, next_a = rng.uniform(-1, 1, (2, num, 8)).astype(np.float32)
            ones = np.ones(num, np.float32)
            yield fisher_flow.Transitions(o, a, rng.normal(size=num), ones, next_o, next_a)

    fisher_flow.save_transitions(folder, parts())


def train(transitions, network: tuple[int, int], num_updates: int) -> float:
    width, depth = network
    agent = fisher_flow.OneStep(
        flow=fisher_flow.BehaviourFlow(width_size=width, depth=depth),
        critic=fisher_flow.TemporalDifference(width_size=width, depth=depth),
    )
    start = time.perf_counter()
    fisher_flow.train(agent, transitions, num_updates, progress=False)
    return time.perf_counter() - start


def peak_memory(folder: Path, stream: bool) -> None:
    """Prints what a training needs beyond what the library does."""
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.005):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            seen.append(int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024)

    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.1)
    before = max(seen)
    transitions = fisher_flow.open_transitions(folder)
    if not stream:
        transitions = jax.tree.map(np.array, transitions)
    train(transitions, (64, 2), 1500)
    done.set()
    print(json.dumps(max(seen) - before))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory-of", type=Path)
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    if args.memory_of is not None:
        peak_memory(args.memory_of, args.stream)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        write(path, args.rows)
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        print(f"{args.rows} rows, {size:.0f} MB")
        for options in ([], ["--stream"]):
            command = [sys.executable, __file__, "--memory-of", str(path), *options]
            memory = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            print(f"memory {'streamed' if options else 'loaded'}: {memory:.0f} MB")
        opened = fisher_flow.open_transitions(path)
        loaded = jax.tree.map(np.array, opened)
        for network, num in (((256, 2), 100), ((512, 4), 20)):
            for transitions in (loaded, opened):  # compiles
                train(transitions, network, num)
            rates = []
            for _ in range(args.repetitions):
                times = [
                    train(transitions, network, 2 * num) - train(transitions, network, num)
                    for transitions in (loaded, opened)
                ]
                rates.append(num / np.array(times))
            in_memory, streamed = np.median(rates, axis=0)
            low, ratio, high = np.quantile(np.divide(*np.transpose(rates)[::-1]), [0.1, 0.5, 0.9])
            print(
                f"{network[1]} x {network[0]}: {in_memory:.1f} updates a second in memory, "
                f"{streamed:.1f} streamed, ratio {ratio:.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
