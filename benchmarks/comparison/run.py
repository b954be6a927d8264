"""Runs the comparison: `python benchmarks/comparison/run.py {small,full,clarabel} [--out DIR]`, the rest to benchopt.

Nothing is read from the cache of benchopt, as results of another version would be. Writes NAME.csv, a row per run of
a solver, and NAME.png; `table.py` makes the tables from the CSV.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from results import draw, read_run

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run benchopt and convert what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="name of a file beside this one, without .yml")
    parser.add_argument("--out", type=Path, default=Path("results/comparison"))
    arguments, further = parser.parse_known_args()
    config = HERE / f"{arguments.config}.yml"
    if not config.is_file():
        parser.error(f"there is no {config.name}; one of {sorted(p.stem for p in HERE.glob('*.yml'))} is wanted")
    outputs = HERE / "outputs"
    before = set(outputs.glob("*.parquet"))
    command = [sys.executable, "-m", "benchopt", "run", str(HERE), "--config", str(config), "--no-cache"]
    command += ["--no-timeout", "--no-plot", "--no-display"]
    subprocess.run([*command, "--output", arguments.config, *further], check=True)
    written = sorted(set(outputs.glob("*.parquet")) - before) or sorted(outputs.glob(f"{arguments.config}*.parquet"))
    rows = read_run(max(written, key=lambda file: file.stat().st_mtime))
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(arguments.out / f"{arguments.config}.csv", index=False)
    draw(rows, arguments.out / f"{arguments.config}.png")
    print(arguments.out / f"{arguments.config}.csv")


if __name__ == "__main__":
    main()
