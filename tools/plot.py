"""Plots losses and scores of runs, one row per run: `python tools/plot.py RUN... [--out FILE]`.

RUN is a run's folder, with its log.csv. Needs matplotlib: pip install matplotlib.
"""

import argparse
import csv
import sys
from pathlib import Path


def read_log(run):
    """The columns of a run's log.csv, by name, as lists of numbers."""
    with open(Path(run, "log.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def plot(runs, file):
    """Draws the logs of runs into an image file: losses on the left, other columns on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 2, squeeze=False)
    for run, (left, right) in zip(runs, axes, strict=True):
        log = read_log(run)
        steps = log.pop("step")
        del log["time"]
        for name, values in log.items():
            ax = left if name.startswith("loss") else right
            ax.plot(steps, values, label=name, linewidth=0.8)
        left.set_ylabel(Path(run).name)
        for ax in (left, right):
            ax.legend(loc="best")
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    figure.savefig(file, dpi=90)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    p.add_argument("--out", default="losses.png", help="image file to write")
    args = p.parse_args(argv)
    try:
        plot(args.runs, args.out)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: pip install matplotlib")
    except OSError as error:
        sys.exit(f"error: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
