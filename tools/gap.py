"""How far plain decoding and a round of Graft are from what this device allows, part by part.

    python tools/gap.py --json results/gap_cpu.json

The floor of a forward is its weights read once at the bandwidth that a large sum reaches here; a forward of n rows is
also compared with the time that the same weights take as bare matrix products. A round's overhead is what is left of
its wall time without the forwards of target and head: retrieving, merging, masks, picks, walking, compaction and
Python. Prompts are every second one of `tools/calibration_prompts.jsonl`. On a CPU start it alone: another busy process
doubles some of these figures.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import run  # noqa: E402
from calibrate import PROMPTS, floor, measure, median_ms  # noqa: E402
from demo_model import at_least, command_line, tool  # noqa: E402
from graft import Chain, Sequence, run_rounds  # noqa: E402
from model import Linear  # noqa: E402
from retrieval import AdjacencyMatrix, NGramIndex  # noqa: E402


@torch.inference_mode()
def products(model, rows: int, repeats: int) -> float:
    """Milliseconds of the target's matrix products alone, one after the other as in a forward, for so many rows."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    inputs = [torch.randn(rows, linear.inputs, device=model.device).to(model.dtype) for linear in linears]
    return median_ms({"all": lambda: [linear(x) for linear, x in zip(linears, inputs)]}, repeats)["all"]


def clocked(name: str, function, spent: Counter):
    """The function, its wall time added up under a name."""
    def call(*args, **kwargs):
        begin = time.perf_counter()
        out = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - begin
        return out
    return call


def rounds(setup: run.Setup, prompts: list[list[int]]) -> dict:
    """Of all rounds together, prefill left out: each part's share of the wall time."""
    spent, total, count = Counter(), 0.0, 0
    modules, fc, grow = (("target", setup.model), ("head", setup.head)), setup.head.fc, Chain.grow
    for name, module in modules:
        module.forward = clocked(name, module.forward, spent)
    # a Part is called as its class says: what stands on the instance is not asked
    setup.head.__dict__["fc"] = clocked("head", fc, spent)
    Chain.grow = clocked("head", grow, spent)                # on a GPU the head runs there
    steps = Counter()
    for prompt in prompts:
        plan = setup.plan("graft")
        sequence = Sequence(setup.model, prompt, plan.config, setup.state(plan))
        for i, (_, step) in enumerate(run_rounds(setup.model, [sequence])):
            if i == 0:
                before, start = Counter(spent), time.perf_counter()
        total += time.perf_counter() - start
        steps.update({name: seconds for name, seconds in step.stats.seconds.items() if name != "prefill"})
        count += step.stats.rounds
        for name in ("target", "head"):
            steps[f"{name} forward"] += spent[name] - before[name]
    for _, module in modules:
        del module.forward
    setup.head.__dict__["fc"], Chain.grow = fc, grow
    share = {name: round(seconds / total, 4) for name, seconds in steps.items()}
    return {"rounds": count, "milliseconds_a_round": round(1000 * total / count, 2), "share": share,
            "overhead_share": round(1 - share["target forward"] - share["head forward"], 4)}


def lookups(lengths=(1_000, 10_000, 100_000), vocab: int = 5_000, size: int = 32) -> dict:
    """Microseconds to retrieve `size` tokens behind synthetic texts of these lengths, half of them copied from further
    up."""
    rng, times = random.Random(0), {}
    text = [rng.randrange(vocab) for _ in range(100)]
    for length in lengths:
        while len(text) < length:
            start = rng.randrange(len(text) - 20)
            text += text[start:start + 20] + [rng.randrange(vocab) for _ in range(20)]
        ngrams, matrix = NGramIndex(), AdjacencyMatrix(vocab)
        ngrams.append(text[:length])
        for at in range(0, length, 500):
            found = torch.tensor(text[at:at + 500])
            matrix.update(found, torch.randn(len(found), vocab))
        paths = [tuple(text[at:at + 4]) for at in rng.sample(range(length - 4), 200)]
        calls = {"ngram": lambda: [ngrams.propose(size, path) for path in paths],
                 "adjacency": lambda: [matrix.propose([path[-1]], size) for path in paths]}
        times[length] = {name: round(5 * ms, 1) for name, ms in median_ms(calls, 15).items()}
    return times


def first_use(repeats: int, options: list[str]) -> dict:
    """What a person at the command line sees, the model being on disk: seconds from the command to the first text and
    to the end of 64 tokens, and the process's peak memory; and both of a process that only imports torch. Medians."""
    rows = {"run.py": [], "import torch": []}
    for _ in range(repeats):
        for name, command in (("run.py", ["run.py", "Why is the sky blue?", "--max-new-tokens", "64", "--quiet",
                                          *options]),
                              ("import torch", ["-c", "import torch; print()"])):
            begin = time.perf_counter()
            with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE) as process:
                process.stdout.read(1)
                first = time.perf_counter() - begin
                process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise ValueError(f"{' '.join(command)} exited with {process.returncode}")
            rows[name].append((first, time.perf_counter() - begin, usage.ru_maxrss / 1024))
    return {name: dict(zip(("seconds_to_first_text", "seconds", "peak_megabytes"),
                           (round(statistics.median(column), 2) for column in zip(*found))))
            for name, found in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--device")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="as run.py's")
    parser.add_argument("--prompts", type=at_least(1), default=14, help="at most so many")
    parser.add_argument("--repeats", type=at_least(1), default=25)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    run.writable(args.json)
    options = ["--dtype", args.dtype, *(["--device", args.device] if args.device else []),
               *run.flag("compile", args.compile)]
    # before this process grows: Linux counts a parent's memory at the start towards its child's peak
    seen = first_use(5, options)
    setup = run.set_up(run.parse(["x", "--max-new-tokens", "96", *options]))
    t, observe, head = measure(setup, 256, args.repeats)
    bare = {n: products(setup.model, n, args.repeats) for n in (1, 8, 16, 32)}
    report = {"command": command_line("tools/gap.py"), "environment": run.environment(setup),
              "floor": floor(setup.model, t),
              "milliseconds": {f"forward_{n}": round(t[n - 1], 2) for n in (1, 4, 8, 16, 32)}
              | {f"products_{n}": round(ms, 2) for n, ms in bare.items()}
              | {"head_step": {f: round(head[f - 1], 2) for f in (1, 4, len(head))}, "head_observe": round(observe, 2)},
              "lookup_microseconds_by_text_length": lookups(),
              "graft": rounds(setup, [setup.ask(p["text"])
                                      for p in run.read_prompts(PROMPTS, None)[::2][:args.prompts]]),
              "command_line": seen}
    print(json.dumps(report, indent=1))
    run.write(args.json, report)


if __name__ == "__main__":
    tool(main)
