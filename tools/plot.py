"""Plots the losses and scores of runs, one row per run.

    python tools/plot.py RUN...

RUN is a run's folder, with its log.csv. Writes losses.png into the first one, or replaces it. Needs
matplotlib: pip install matplotlib.
"""

import argparse
import csv
import os
import sys
from pathlib import Path


def read_log(run):
    """The columns of a run's log.csv, by name, as lists of numbers. Rows that are not whole, such
    as one still being written, are left out. Exits with an error if there are no others."""
    text = Path(run, "log.csv").read_text("utf-8", errors="replace")
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    rows = []
    for row in csv.DictReader(whole_lines):
        try:
            rows.append({name: float(value) for name, value in row.items()})
        except (TypeError, ValueError):
            continue
    if not rows:
        sys.exit(f"error: {Path(run, 'log.csv')} has no rows yet")
    return {name: [row[name] for row in rows] for name in rows[0]}


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
            if ax.lines:
                ax.legend(loc="best")
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    figure.savefig(file, dpi=90)


def main(argv=None):
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__.splitlines()[0], allow_abbrev=False
    )
    p.add_argument("runs", nargs="+", metavar="RUN", type=os.path.expanduser, help="a run's folder")
    args = p.parse_args(argv)
    file = Path(args.runs[0], "losses.png")
    try:
        plot(args.runs, file)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: pip install matplotlib")
    except OSError as error:
        sys.exit(f"error: {error}")
    print(file)


if __name__ == "__main__":
    main()
