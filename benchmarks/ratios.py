"""All speeds that have a peer, in one table: what ``make bench`` prints.

python -m benchmarks.ratios [--rounds 3] [--only input overhead tracking detection whole] [--timm outputs/pytorch-image-models]
"""

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import Row, detection, input_pipeline, machine, overhead, table, tracking, whole_training, workshop


def loops(rounds: int) -> Iterable[Row]:
    """Loop overhead."""
    with workshop() as folder:
        yield from overhead.measure_all(rounds, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures all speeds that have a peer, as ratios.")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, in turns")
    parser.add_argument("--timm", type=Path, default=whole_training.TIMM, help="folder of timm's repository")
    parts: dict[str, Callable[[int], Iterable[Row]]] = {
        "input": lambda rounds: [
            *input_pipeline.compare((500, 375), 200, rounds),
            *input_pipeline.compare((4000, 3000), 20, rounds),
        ],
        "overhead": loops,
        "tracking": lambda rounds: tracking.measure(list(overhead.CASES), rounds),
        "detection": detection.reference,
        "whole": lambda rounds: whole_training.measure(timm, min(rounds, 2)),
    }
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="parts of the table")
    options = parser.parse_args()
    timm = options.timm.resolve()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for name in options.only:
        rows += parts[name](options.rounds)
        print(f"\n{table(rows)}", flush=True)  # as far as it is
    print(
        f"\n{machine()}; medians of {options.rounds} rounds in turns, of a whole training of {min(options.rounds, 2)}"
    )


if __name__ == "__main__":
    main()
