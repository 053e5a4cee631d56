"""The geometry of flow policies, where everything is known exactly: one study in six parts.

    python benchmarks/geometry.py --seeds 5 --out geometry

prints the tables, says which claims of the documentation hold, and writes the raw rows as JSON and
a figure of each part to the folder `--out`. With `--replot` it takes the rows from there instead.
"""

import argparse
import importlib.metadata
import json
import math
from collections.abc import Callable
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
    parser.add_argument("--replot", action="store_true", help="of the rows in --out, run nothing")
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
        if args.replot:
            results = _nan_for_null(json.loads(path.read_text(encoding="utf-8")))
            rows = results["rows"]
        else:
            rows = part.run(args.seeds, args.quick)
            results = dict(settings=settings, rows=rows)
        results["claims"] = part.claims(rows)
        claims += results["claims"]
        text = json.dumps(_null_for_nan(results), indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        part.print_table(rows)
        part.plot(rows).savefig(figures / f"geometry_{name}.png", dpi=100)
    print()
    for claim in claims:
        verdict = "holds" if claim["holds"] else "DOES NOT HOLD"
        print(f"{verdict:<15}{claim['claim']}: {claim['value']:.3g}")
    print(f"\nWrote {args.out} and {figures}.")


def _map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map_leaves(function, value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_map_leaves(function, value) for value in tree]
    return function(tree)


def _null_for_nan(tree: Any) -> Any:
    """JSON knows no NaN."""
    return _map_leaves(lambda x: None if isinstance(x, float) and math.isnan(x) else x, tree)


def _nan_for_null(tree: Any) -> Any:
    return _map_leaves(lambda x: math.nan if x is None else x, tree)


if __name__ == "__main__":
    main()
