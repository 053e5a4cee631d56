"""The geometry of flow policies, where everything is known exactly: one study in six parts.

    python benchmarks/geometry.py --seeds 5 --out geometry

prints the tables, says which claims of the documentation hold, and writes the raw rows as JSON and
a figure of each part to the folder `--out`. A part that is already there is not run again.
"""

import argparse
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import jax
from geometry_study import chains, efficiency, kl, optimality, radius, score


PARTS = dict(
    score=score, kl=kl, optimality=optimality, radius=radius, chains=chains, efficiency=efficiency
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of problems (default: 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default="geometry", help="folder (default: geometry)")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: --out)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: little of everything")
    args = parser.parse_args()
    figures = args.figures or args.out
    for folder in (args.out, figures):
        folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        seeds=list(range(args.seeds)),
        quick=args.quick,
        jax=jax.__version__,
        fisher_flow=importlib.metadata.version("fisher_flow"),
    )
    claims = []
    for name in args.parts:
        part, path = PARTS[name], args.out / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if found.get("settings") == settings:
            rows = found["rows"]
            print(f"{name}: from {path}")
        else:
            rows = part.run(args.seeds, args.quick)
        claims += part.claims(rows)
        results = dict(settings=settings, claims=part.claims(rows), rows=rows)
        path.write_text(json.dumps(_finite(results), indent=1) + "\n", encoding="utf-8")
        part.print_table(rows)
        part.plot(rows).savefig(figures / f"geometry_{name}.png", dpi=100)
    print(f"\n{args.seeds} problems a part.\n")
    for claim in claims:
        verdict = "holds" if claim["holds"] else "DOES NOT HOLD"
        print(f"{verdict:<15}{claim['claim']}: {claim['value']:.3g}")
    print(f"\nWrote {args.out} and {figures}.")


def _finite(tree: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


if __name__ == "__main__":
    main()
