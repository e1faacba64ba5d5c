"""Draw speedup against tokens a round, from a table that `run.py bench` wrote: the paper's Pareto picture.

    pip install matplotlib && python tools/plot.py results/demo_cpu.json results/pareto.png

A small dot is a method on one task, a large one its sum over all tasks. Up is faster, right is more tokens a round; of
two methods at one height the one further left gets there with less.
"""

import argparse
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("table")
parser.add_argument("picture")
args = parser.parse_args()
try:
    report = json.loads(Path(args.table).read_text(encoding="utf-8"))
    report["methods"], report["prompts"]
except (OSError, ValueError, TypeError, KeyError) as error:
    raise SystemExit(f"error: {args.table}: not a table of 'run.py bench' ({error})") from None
figure, axes = plt.subplots(figsize=(8, 5.5), dpi=120)
for number, (name, entry) in enumerate(report["methods"].items()):
    colour = f"C{number}"
    axes.scatter([t["mean_accepted"] for t in entry["by_task"].values()],
                 [t["speedup"] for t in entry["by_task"].values()], s=12, color=colour, alpha=0.4)
    axes.scatter(entry["mean_accepted"], entry["speedup"], s=90, color=colour, label=name, edgecolors="black",
                 linewidths=0.6, zorder=3)
axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
axes.set_xlabel("tokens a round")
axes.set_ylabel("speedup over ar")
environment = report["environment"]
axes.set_title(f"{environment['device']}, {environment['dtype']}, torch {environment['torch']}, "
               f"{report['prompts']} prompts", fontsize=9)
axes.legend(fontsize=8)
figure.tight_layout()
figure.savefig(args.picture)
