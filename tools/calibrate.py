"""Measure this device, replay drafts, and choose the settings that commit the most tokens a second.

    python tools/calibrate.py                        the demo model on this device; writes assets/calibration/...json
    python tools/calibrate.py --model M --draft D    another target; pass the file to run.py with --calibration

The cost model. A round that takes s expansion steps of the head and verifies n nodes lasts

    T(s, n) = t_observe + t_head(f_1) + ... + t_head(f_s) + t(n) + t_rest

with t(n) the target's time for a forward of root + n nodes, t_observe and t_head(f) the head's time to read the
accepted tokens and to expand f nodes, those of a step that could pay (a GPU's graphs expand all), and t_rest the rest
of a round that retrieves (merging and bookkeeping too; of others it is counted as nothing); all are measured here. It
commits 1 + A tokens, A being the accepted nodes. By renewal reward, the policy with the most tokens a second is the one
that in every round maximises 1 + A - rate * T, for the rate that this policy itself reaches. Three decisions follow:

- which nodes to verify: the likeliest n for which the sum of their probabilities less rate * t(n) is largest.
  rate * t(n) is `verify_cost` in GraftConfig, the price of n nodes in tokens, and it takes the place of the paper's
  stage budgets: on a CPU, where t(n) rises, trees stay small; where t(n) is flat they fill the budget K_max.
- whether the adjacency matrix is worth its time: the tokens that it adds, against its share of t_rest;
- when to stop drafting: another step pays while confidence c_d = exp(max S_d) is high enough. The thresholds tau_d are
  found by coordinate search over recorded rounds: one pair (confidence, gain) for each step and each text position.

Because output does not depend on the tree, every position of a greedy text is a round that could have started there. So
the replay drafts to the full depth at each position of the target's answers to prompts of ours, builds the tree that
each stopping step would have given, with live stores, notes every node's probability and whether the text went that
way, and any policy can then be scored exactly by walking through the texts. `eagle` gets its own best fixed n and
depth; the paper's 60 nodes in stages of 8, 24 and 40 are scored too, for comparison, drafted with this beam.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import run  # noqa: E402
from demo_model import at_least, command_line, tool  # noqa: E402
from graft import (GraftConfig, Sampler, Sequence, Stats, draft_and_prune, graft, lines, retrieve, tune,  # noqa: E402
                   verify_once)
from model import Model  # noqa: E402
from tree import ADJACENCY, NGRAM, Tree  # noqa: E402

DEPTH, TOP_K, BUDGET, WIDEST = 7, 8, 32, 60
# written by us, of the kinds that people ask; no benchmark's
PROMPTS = str(ROOT / "tools" / "calibration_prompts.jsonl")


def median_ms(runs: dict, repeats: int) -> dict:
    """Milliseconds of each callable, the median over interleaved repeats."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, call in runs.items():
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 3:
                times[name].append((time.perf_counter() - begin) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def measure(setup: run.Setup, length: int, repeats: int) -> tuple[list[float], float, list[float]]:
    """t(n) for n = 0 to 60 nodes behind `length` committed tokens, t_observe, and t_head of 1 to TOP_K nodes, in
    milliseconds."""
    model, state = setup.model, setup.state()
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)          # which the clocks here and in gap.py wait for
    state.cache.reserve(length + WIDEST + 1)
    state.cache.length = length
    taps = state.drafter.taps if state.drafter else ()

    grid = [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 19, 23, 27, 31, 39, 47, 60]
    calls = {n: (lambda n=n: verify_once(model, state.cache, n, taps)) for n in grid}
    if state.drafter:
        drafter = state.drafter
        features = torch.randn(1, 3, 3 * model.config.hidden_size, device=model.device).to(model.dtype)
        tokens, sampler = (torch.tensor([[5, 6, 7, 8]], device=model.device),
                           Sampler(GraftConfig(), model.config.vocab_size, model.device, model.kernels))
        drafter.observe(features.repeat(1, length // 3, 1), tokens[:, :1].repeat(1, length // 3 * 3 + 1))

        def observe():
            drafter.rewind(length + 1)
            drafter.observe(features, tokens)

        calls |= {"observe": observe} | {f"expand {f}": (lambda f=f: list(drafter.expand(7, 4, f, sampler)))
                                         for f in range(1, TOP_K + 1)}
    times = median_ms(calls, repeats)
    t = lines({n: times[n] for n in grid}, WIDEST)
    for n in range(WIDEST - 1, -1, -1):     # a larger tree never costs less: what looks so is noise, or a padded kernel
        t[n] = min(t[n], t[n + 1])
    return t, times.get("observe", 0.0), [times.get(f"expand {f}", 0.0) / 4 for f in range(1, TOP_K + 1)]


def bookkeeping(setup: run.Setup, prompts: list[list[int]], options: argparse.Namespace) -> tuple[float, float]:
    """t_rest with the adjacency matrix and without: milliseconds that a round takes besides the forwards, of retrieval,
    merging and the update of the stores. options: run.py's."""
    plan, spent = setup.plan("graft" if setup.head else "retrieve"), ([], [])
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for adjacency, rounds in zip((True, False), spent):
            config = replace(plan.config, max_new_tokens=64, adjacency=adjacency)
            stats = run.complete(setup, replace(plan, config=config), [prompt], options)[0][1]
            if turn:                                               # the first is uncounted
                rounds.append((sum(stats.seconds[step] for step in ("retrieve", "graft", "update")), stats.rounds))
    return tuple(1000 * sum(seconds for seconds, _ in rounds) / max(sum(count for _, count in rounds), 1)
                 for rounds in spent)


def bandwidth(device) -> float:
    """GB/s that a large float32 sum reaches."""
    # long beside a launch
    block = torch.ones(100_000_000 * (10 if torch.device(device).type == "cuda" else 1), device=device)
    return block.numel() * block.element_size() / median_ms({"sum": lambda: block.sum().item()}, 7)["sum"] / 1e6


def bytes_read(model) -> float:
    """Of weights by a forward of one row: all but the embeddings and, of a mixture, the experts that it does not
    choose."""
    c, head = model.config, model.lm_head
    size = 2 if head.scale or head.blocks else model.norm.weight.element_size()             # float32, packed in 16 bits
    with torch.device("meta"):
        tensors = dict(Model(c).named_parameters())
    idle = 1 - c.num_experts_per_tok / c.num_experts if c.num_experts else 0.0
    return size * sum(p.numel() * (1 - idle * (p.dim() == 3))
                      for name, p in tensors.items() if "embed_tokens" not in name)


def floor(model, t: list[float]) -> dict:
    """What plain decoding cannot beat: its weights read once, at the bandwidth that a large sum reaches on this
    device."""
    speed, weights = bandwidth(model.device), bytes_read(model)
    ms = weights / speed / 1e6
    return {"gigabytes_per_second": round(speed, 1), "weights_megabytes": round(weights / 1e6, 1),
            "milliseconds": round(ms, 2), "plain_over_floor": round(t[0] / ms, 2),
            "verify_8_over_plain": round(t[7] / t[0], 2), "verify_16_over_plain": round(t[15] / t[0], 2)}


class Replay:
    """Stands in for a drafter: yields the recorded trees of one position."""

    def __init__(self, trees: list[Tree]):
        self.trees = trees

    def expand(self, root, depth, top_k, sampler):
        yield from self.trees[:depth + 1]


@torch.inference_mode()
def record(setup: run.Setup, prompts: list[list[int]], new: int,
           trust: tuple[float, float] = (1.0, 1.0)) -> list[list[dict]]:
    """For each prompt, for each position of its greedy text: what every stopping step would have verified.

    A position holds, by step s, frontier[s], the probabilities of its TOP_K likeliest nodes, the first of which is its
    confidence, and, for the methods `graft` (also `ngrams`: without the matrix) and `prune`, the nodes likeliest first
    as (probability, was the text's, source); for `retrieve` one such list. `paper` holds its fixed stages' trees."""
    wide = GraftConfig(method="graft", trust=trust, budget=BUDGET, verify_cost=(0.0,) * (BUDGET + 1), depth=DEPTH,
                       draft_top_k=TOP_K, checkpoints=(), thresholds=(), retained=())
    paper = GraftConfig(method="graft", budget=60, depth=DEPTH, draft_top_k=TOP_K)
    texts, sampler = [], Sampler(GraftConfig(), setup.model.config.vocab_size, setup.model.device)
    for which, prompt in enumerate(prompts):
        state = setup.state()
        drafter = state.drafter                                   # `build` puts recorded trees in its place
        text, features, rows = list(prompt), [], []
        state.cache.reserve(len(prompt) + new + 1)
        k = state.adjacency.rows.shape[1]
        while len(text) < len(prompt) + new and text[-1] not in setup.model.config.eos_token_ids:
            start = state.cache.length
            positions = torch.arange(start, len(text), device=setup.model.device)[None]
            ids = torch.tensor([text[start:]], device=setup.model.device)
            logits, tapped = setup.model(ids, positions, state.cache, taps=drafter.taps if drafter else ())
            state.cache.commit(list(range(len(text) - start)))
            features.append(tapped)
            rows.append((text[start:], logits[0].topk(k, dim=-1).indices.int().cpu()))
            text.append(int(logits[0, -1].argmax()))
        state.ngrams.append([-1, *prompt])
        rounds = []
        for i in range(len(prompt), len(text)):                # text[i] is the root; everything before it is committed
            root, future = text[i], text[i + 1:]
            state.ngrams.append([root])
            if i > len(prompt):
                tokens, found = rows[i - len(prompt)]
                state.adjacency.rows[torch.tensor(tokens)] = found
            trees = []
            if drafter:
                read = torch.tensor([text[:i + 1] if i == len(prompt) else [text[i - 1], root]],
                                    device=setup.model.device)
                drafter.observe(features[i - len(prompt)], read)
                trees = [tree.select(range(len(tree))) for tree in drafter.expand(root, DEPTH, TOP_K, sampler)]
            if not future:
                continue
            frontier = [sorted(map(math.exp, tree.scores[len(trees[s - 1]) if s else 1:]), reverse=True)[:TOP_K]
                        for s, tree in enumerate(trees)]
            entry = {"frontier": frontier, "graft": [], "ngrams": [], "prune": []}
            built = lambda method, config: build(setup.model, root, replace(config, method=method), trees, state,
                                                 len(future))
            for s in range(len(trees)):
                for method, change in (("graft", {}), ("ngrams", {"adjacency": False}), ("prune", {})):
                    tree, _ = built("prune" if method == "prune" else "graft", replace(wide, depth=s, **change))
                    entry[method].append(nodes_of(tree, future))
            entry["retrieve"] = nodes_of(built("retrieve", wide)[0], future)
            if trees:
                tree, stats = built("graft", paper)
                stage = next(iter(stats.stages))
                entry["paper"] = (DEPTH if stage == "full" else int(stage), nodes_of(tree, future))
            rounds.append(entry)
        texts.append(rounds)
        print(f"\r{which + 1}/{len(prompts)} texts replayed", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return texts


def build(model: Model, root: int, config: GraftConfig, trees: list[Tree], state, room: int) -> tuple[Tree, Stats]:
    """The tree that a round of this method would have verified; where all prices are 0, before they cut it."""
    state.drafter = Replay(trees)
    sequence = Sequence(model, [root], replace(config, max_new_tokens=room + 2), state)
    sequence.output.append(root)
    tree = draft_and_prune(sequence)
    return graft(sequence, tree, retrieve(sequence, tree)), sequence.stats


def nodes_of(tree: Tree, future: list[int]) -> list[tuple]:
    """(probability, did the text go this way, source) of each node below the root, likeliest first."""
    went = {0}
    for node in range(1, len(tree)):
        if (tree.parents[node] in went and tree.depths[node] <= len(future)
                and tree.tokens[node] == future[tree.depths[node] - 1]):
            went.add(node)
    return [(math.exp(tree.scores[i]), i in went, tree.sources[i]) for i in tree.best(range(1, len(tree)), len(tree))]


class Scorer:
    """Walks through recorded texts as a policy would, and adds up tokens and milliseconds."""

    def __init__(self, texts, t, observe, head, rest):
        self.texts, self.t, self.observe, self.head, self.rest = texts, t, observe, head, rest

    def walk(self, decide, rest: float = 0.0) -> dict:
        """decide(position) -> (drafting, nodes, n): its milliseconds, nodes likeliest first, how many of them to
        verify. rest: t_rest."""
        tokens = rounds = spent = verified = 0
        for rounds_of in self.texts:
            at = 0
            while at < len(rounds_of):
                drafting, nodes, n = decide(rounds_of[at])
                n = min(n, len(nodes))
                accepted = sum(went for _, went, _ in nodes[:n])
                spent += self.t[n] + rest + drafting
                tokens, rounds, verified, at = tokens + accepted + 1, rounds + 1, verified + n, at + accepted + 1
        return {"tokens_per_second": 1000 * tokens / spent, "tokens_a_round": tokens / rounds,
                "nodes_a_round": verified / rounds}

    def stop(self, position: dict, taus: list[float], depth: int) -> int:
        """How many expansion steps are taken: the first step whose confidence is below its threshold is the last."""
        for step in range(depth):
            if position["frontier"][step][0] < taus[step]:
                return step
        return depth

    def drafting(self, position: dict, steps: int, least: float = 0.0) -> float:
        """Milliseconds of so many expansion steps, of the nodes that have at least that probability."""
        return self.observe + sum(self.head[max(sum(p >= least for p in found), 1) - 1]
                                  for found in position["frontier"][:steps])

    def cut(self, nodes: list, rate: float) -> int:
        """How many nodes pay at `rate` tokens a second."""
        gain = best = 0.0
        n = 0
        for i, (p, _, _) in enumerate(nodes, 1):
            gain += p
            if gain - rate * (self.t[i] - self.t[0]) / 1000 > best:
                best, n = gain - rate * (self.t[i] - self.t[0]) / 1000, i
        return n

    def walk_priced(self, method: str, taus: list[float], depth: int, rate: float) -> dict:
        least = math.exp(GraftConfig(budget=BUDGET,
                                     verify_cost=tuple(rate * ms / 1000 for ms in self.t[:BUDGET + 1])).least)

        def decide(position):
            if method == "retrieve":
                return 0.0, position["retrieve"], self.cut(position["retrieve"], rate)
            steps = self.stop(position, taus, depth)
            nodes = position[method][steps]
            return self.drafting(position, steps, least), nodes, self.cut(nodes, rate)
        return self.walk(decide, self.rest.get(method, 0.0))


def choose(score: Scorer, method: str) -> dict:
    """Thresholds, depth and rate for a method that prunes, by coordinate search at each depth. The best rate for prices
    is not quite the rate reached: estimates are of the target's distribution, whose greedy choice is surer, and hold
    for all places, while a round starts where the last one failed. Of rates that are as good the highest is taken: its
    trees are smaller, which costs least where text is less predictable than here. Of depths that are as good, to the
    percent that these texts can tell, the greatest: thresholds stop where it does not pay, and nothing else goes on
    where text is more predictable."""
    speed = lambda taus, depth, rate: score.walk_priced(method, taus, depth, rate)["tokens_per_second"]
    found = []
    for depth in range(1 if method == "retrieve" else DEPTH + 1):
        taus, rate = [0.3] * DEPTH, 60.0
        for sweep in range(3):
            reached = speed(taus, depth, rate)
            speeds = {r: speed(taus, depth, r) for r in
                      (round(reached * factor, 3)
                       for factor in (0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4))}
            rate = max(r for r in speeds if speeds[r] > 0.995 * max(speeds.values()))
            for step in range(depth):
                taus[step] = max((0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7),
                                 key=lambda tau: speed([*taus[:step], tau, *taus[step + 1:]], depth, rate))
        found.append((score.walk_priced(method, taus, depth, rate), taus, depth, rate))
    best = max(result["tokens_per_second"] for result, *_ in found)
    print(method, "by depth:", [round(result["tokens_per_second"], 1) for result, *_ in found])
    result, taus, depth, rate = [choice for choice in found if choice[0]["tokens_per_second"] > 0.99 * best][-1]
    cost = [round(rate * ms / 1000, 4) for ms in score.t[:BUDGET + 1]]
    return {"config": {"budget": BUDGET, "draft_top_k": TOP_K, "depth": depth, "checkpoints": list(range(depth)),
                       "thresholds": taus[:depth], "retained": [1.0] * depth, "verify_cost": cost}, "predicted": result}


def reliability(texts: list) -> dict:
    """How often a node of each source and estimated probability was right: bin -> [mean estimate, share right,
    nodes]."""
    bins = {}
    for rounds_of in texts:
        for position in rounds_of:
            for p, went, source in position["graft"][-1] if position["graft"] else position["retrieve"]:
                entry = bins.setdefault(source, {}).setdefault(min(int(p * 10), 9), [0.0, 0, 0])
                entry[0], entry[1], entry[2] = entry[0] + p, entry[1] + went, entry[2] + 1
    return {source: {f"{b / 10:.1f}": [round(e / n, 3), round(w / n, 3), n] for b, (e, w, n) in sorted(found.items())}
            for source, found in bins.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--draft", "--device"):
        parser.add_argument(name, help="as run.py's")
    parser.add_argument("--out", help="file to write (default: the demo model's for this device, in assets/)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
                        help="as run.py's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="as run.py's")
    parser.add_argument("--prompts", default=PROMPTS, metavar="FILE.jsonl", help="what the replayed texts answer")
    parser.add_argument("--new-tokens", type=at_least(2), default=96, help="of each text (default: %(default)s)")
    parser.add_argument("--length", type=at_least(3), default=256, help="committed tokens when t(n) is measured")
    parser.add_argument("--repeats", type=at_least(1), default=15,
                        help="of each forward that is timed (default: %(default)s)")
    args = parser.parse_args()
    if args.draft and not (args.model or args.out):
        raise ValueError("--draft without --model needs --out: what is calibrated by default is for the shipped head")
    run.writable(args.out, "--out")
    given = [word for name in ("model", "draft", "device") if getattr(args, name)
             for word in (f"--{name}", getattr(args, name))]
    options = run.parse(["calibrating", "--dtype", args.dtype, *run.flag("compile", args.compile), *given])
    setup = run.set_up(options, calibrated=False)                   # or an earlier calibration would decide on this one
    setup.tuned = dict.fromkeys(("retrieve", "graft"), tune(setup.model, BUDGET))
    prompts = [setup.ask(p["text"]) for p in run.read_prompts(args.prompts, None)]
    t, observe, head = measure(setup, args.length, args.repeats)
    print("t(n), ms:", {n: round(t[n], 1) for n in (0, 3, 7, 15, 31, 60)},
          f"observe {observe:.2f}, head step of 1, 2, ... nodes", [round(x, 2) for x in head])
    begin = time.perf_counter()
    trust = (1.0, 1.0)
    if setup.head:  # how much less often a retrieved node is right than it claims, where the head proposed other tokens
        by_source = reliability(record(setup, prompts, args.new_tokens))
        rows = {source: list(by_source.get(source, {}).values()) for source in (NGRAM, ADJACENCY)}
        ratio = lambda found: sum(r * n for _, r, n in found) / sum(c * n for c, _, n in found) if found else 1.0
        trust = tuple(round(min(1.0, max(0.02, ratio(found))), 3) for found in rows.values())
        print("trust of n-grams and adjacency:", trust)
    texts = record(setup, prompts, args.new_tokens, trust)
    positions = sum(map(len, texts))
    print(f"{positions} positions in {time.perf_counter() - begin:.0f} s")
    rest = dict(zip(("graft", "ngrams"), bookkeeping(setup, prompts[:8], options)))
    rest["retrieve"] = rest["graft"]
    score = Scorer(texts, t, observe, head, rest)
    methods = {"retrieve": choose(score, "retrieve")}
    plain = score.walk(lambda position: (0.0, [], 0))
    if setup.head:
        methods |= {"prune": choose(score, "prune"), "graft": choose(score, "graft")}
        without = choose(score, "ngrams")
        pays = methods["graft"]["predicted"]["tokens_per_second"] > without["predicted"]["tokens_per_second"]
        methods["graft"] = methods["graft"] if pays else without
        methods["graft"]["config"] |= {"trust": trust, "adjacency": pays}
        fixed = {(depth, n): score.walk(lambda position: (score.drafting(position, depth), position["prune"][depth], n))
                 for depth in range(DEPTH + 1) for n in (3, 4, 5, 6, 7, 9, 11, 13, 15, 19, 23, 31)}
        depth, n = max(fixed, key=lambda key: fixed[key]["tokens_per_second"])
        methods["eagle"] = {"config": {"budget": n, "draft_top_k": TOP_K, "depth": depth}, "predicted": fixed[depth, n]}
        methods["paper"] = {"predicted": score.walk(
            lambda position: (score.drafting(position, position["paper"][0]), position["paper"][1], 60), rest["graft"])}
    for name, entry in methods.items():
        entry["predicted"]["speedup"] = entry["predicted"]["tokens_per_second"] / plain["tokens_per_second"]
        entry["predicted"] = {key: round(value, 3) for key, value in entry["predicted"].items()}
        print(name, entry["predicted"], {k: v for k, v in entry.get("config", {}).items() if k != "verify_cost"})
    out = Path(args.out) if args.out else run.calibration(setup.model, args.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": command_line("tools/calibrate.py"), "environment": run.environment(setup),
              "positions": positions, "plain_tokens_per_second": round(plain["tokens_per_second"], 2),
              "floor": floor(setup.model, t),
              "milliseconds": {"t": [round(x, 3) for x in t], "observe": round(observe, 3),
                               "head": [round(x, 3) for x in head],
                               "rest": {method: round(ms, 3) for method, ms in rest.items()}},
              "reliability": reliability(texts), "methods": methods}
    run.write(out, report)
    print("wrote", out)


if __name__ == "__main__":
    tool(main)
