"""Endurance: many prompts in one process with flat memory, and the tree's functions against brute force.

    python tools/endurance.py generate --tokens 100000 # demo model; exit 1 where memory or a store outgrows its bound
    python tools/endurance.py fuzz --minutes 10        # exit 1 at the first violation, with the command that repeats it

On a CPU, oneDNN compiles kernels for each number of rows that it meets in a matrix product and keeps them, some hundred
MB by and by. They are in the first quarter of a long run.
"""

import argparse
import math
import os
import random
import sys
import time
import traceback
from dataclasses import replace
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import run  # noqa: E402
from demo_model import at_least  # noqa: E402
from graft import Sequence, State, run_rounds  # noqa: E402
from retrieval import AdjacencyMatrix, NGramIndex  # noqa: E402
from train_eagle3 import TEXT, read_text  # noqa: E402
from tree import ADJACENCY, DRAFT, NGRAM, Tree  # noqa: E402


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


# --------------------------------------------------------------------------------------------------------- generation

def resident() -> float:
    """MB of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def check_bounds(sequence: Sequence) -> None:
    """Every store is within the bound that README.md states for it."""
    state, config, ngrams = sequence.state, sequence.config, sequence.state.ngrams
    check(len(ngrams.tokens) <= ngrams.capacity,
          f"n-gram index: {len(ngrams.tokens)} tokens, capacity {ngrams.capacity}")
    check(len(ngrams.after) < max(2, len(ngrams.tokens)),
          f"n-gram index: {len(ngrams.after)} pairs of {len(ngrams.tokens)} tokens")
    check(all(len(places) <= ngrams.places for places in ngrams.after.values()),
          "n-gram index: more places than allowed")
    most = sequence.limit + config.budget + 1 + 512                              # the context, a tree, a step of growth
    check(state.cache.capacity <= most, f"KV cache: {state.cache.capacity} rows; expected at most {most}")
    most += config.depth * config.draft_top_k
    check(state.drafter.cache.capacity <= most,
          f"head's KV cache: {state.drafter.cache.capacity} rows; expected at most {most}")


def generate(model, state: State, config, prompts: list[list[int]], tokens: int, growth: float, say=print) -> int:
    """Generate so many tokens, greedily and by sampling in turn. Raises AssertionError where a store outgrows its
    bound, or where memory after the first quarter grows by more than `growth` MB."""
    made, shown, most, began = 0, 0, 0.0, time.time()
    for number in count():
        settings = replace(config, temperature=0.8 * (number % 2), seed=number)
        sequence = Sequence(model, prompts[number % len(prompts)], settings, state)
        for _ in run_rounds(model, [sequence]):
            held = len(sequence.sampler.rows)                             # a tree's depth, and 16 of retrieval below it
            check(held <= config.depth + 18, f"noise of {held} positions; expected at most {config.depth + 18}")
        check_bounds(sequence)
        made, held = made + len(sequence.output), resident()
        most = max(most, held) if made <= tokens / 4 or not most else most
        if made >= shown or made >= tokens:
            say(f"{made} tokens, {number + 1} prompts, {time.time() - began:.0f} s: {held:.0f} MB")
            shown += tokens / 40
        check(held <= most + growth,
              f"memory grew from {most:.0f} to {held:.0f} MB; at most {growth:.0f} more are allowed")
        if made >= tokens:
            return made


# --------------------------------------------------------------------------------------------------------------- fuzz

class Paths:
    """The plainest tree: a dictionary from paths of tokens below the root to (score, source), in order of arrival."""

    def __init__(self):
        self.nodes = {(): (0.0, "root")}

    def add(self, parent: tuple, token: int, score: float, source: str) -> tuple:
        score = min(score, self.nodes[parent][0])
        before, source = self.nodes.get((*parent, token), (score, source))
        self.nodes[(*parent, token)] = max(before, score), source
        return (*parent, token)

    def best(self) -> list[tuple]:
        return sorted(list(self.nodes)[1:], key=lambda path: -self.nodes[path][0])      # stable: of equals, the older

    def graft(self, branches: list, budget: int) -> int:
        if not branches:
            return 0
        head = {path: math.exp(score) / math.exp(self.nodes[path[:-1]][0])
                for path, (score, _) in self.nodes.items() if path}
        order = sorted((-self.nodes[anchor][0] - score, which, i)
                       for which, (anchor, _, (_, _, scores)) in enumerate(branches) for i, score in enumerate(scores))
        shared, ngrams, others = 0, {}, {}
        for cost, which, i in order:
            anchor, source, (tokens, parents, scores) = branches[which]
            above, at = [], i
            while at >= 0:
                above, at = [tokens[at], *above], parents[at]
            path = (*anchor, *above)
            shared += path in self.nodes
            if path not in self.nodes and len(self.nodes) > budget:
                break
            self.add(path[:-1], path[-1], -cost, source)
            if source == NGRAM:
                ngrams[path] = max(ngrams.get(path, 0.0),
                                   math.exp(scores[i] - (scores[parents[i]] if parents[i] >= 0 else 0.0)))
            else:
                others[path] = max(others.get(path, 0.0), math.exp(min(0.0, -cost - self.nodes[path[:-1]][0])))
        for path, (_, source) in list(self.nodes.items())[1:]:
            told = sum(chance for other, chance in ngrams.items() if other[:-1] == path[:-1])
            chance = ngrams.get(path, 0.0) + (1 - min(told, 1.0)) * head.get(path, others.get(path, 0.0))
            self.nodes[path] = self.nodes[path[:-1]][0] + math.log(min(max(chance, 1e-9), 1.0)), source
        return shared


def path_of(tree: Tree, node: int) -> tuple:
    return tuple(tree.tokens[i] for i in tree.path(node))


def check_tree(tree: Tree, nodes: dict[tuple, tuple], what: str) -> None:
    """A tree is sound and holds exactly these paths, in this order, with these scores and sources."""
    found = [path_of(tree, node) for node in range(len(tree))]
    check(found == list(nodes), f"{what}: paths {found}, expected {list(nodes)}")
    check(list(zip(tree.scores, tree.sources)) == list(nodes.values()), f"{what}: scores or sources differ")
    check(tree.depths == [len(path) for path in found], f"{what}: depths {tree.depths}")
    check(tree.parents[0] == -1 and all(parent < i for i, parent in enumerate(tree.parents)),
          f"{what}: parents {tree.parents}")
    check(tree.child == {(tree.parents[i], tree.tokens[i]): i for i in range(1, len(tree))},
          f"{what}: index of children")
    inner = {path[:-1] for path in found if path}
    check([path_of(tree, leaf) for leaf in tree.leaves()] == [path for path in found if path not in inner],
          f"{what}: leaves")


def case(seed: int) -> None:
    """Grow, graft, prune, mask and walk one random tree beside its brute-force twin."""
    rng = random.Random(seed)
    vocab, size = rng.choice((2, 3, 7, 1000)), rng.choice((0, 1, 5, 20, 60))
    token, score = lambda: rng.randrange(vocab), lambda: -rng.choice((0.0, 0.5, rng.expovariate(1.0)))
    tree, plain = Tree.rooted(token()), Paths()
    frontier = [0]
    for _ in range(rng.randrange(6)):                                              # beam steps
        rows = [[token() for _ in range(rng.randint(0, 4))] for _ in frontier]
        gains = [[score() for _ in row] for row in rows]
        for node, row, gain in zip(frontier, rows, gains):
            for t, g in zip(row, gain):
                plain.add(path_of(tree, node), t, tree.scores[node] + g, DRAFT)
        grown = tree.expand(frontier, rows, gains)
        check(len(grown) == sum(map(len, rows)), "expand: one node for each token")
        frontier = tree.best(list(dict.fromkeys(grown)), rng.randint(1, 6)) or [0]
    for _ in range(size):
        parent, t, s = rng.randrange(len(tree)), token(), score()
        check(path_of(tree, tree.add(t, parent, s, DRAFT)) == plain.add(path_of(tree, parent), t, s, DRAFT),
              "add: its path")
    check_tree(tree, plain.nodes, "grown")

    branches = []
    for _ in range(rng.randrange(5)):                                           # scores never rise from parent to child
        parents = [rng.randrange(-1, i) for i in range(rng.randrange(20))]
        scores = []
        for parent in parents:
            scores.append(score() + (scores[parent] if parent >= 0 else 0.0))
        branches.append((rng.randrange(len(tree)), rng.choice((NGRAM, ADJACENCY)),
                         ([token() for _ in parents], parents, scores)))
    budget, twins = rng.randrange(len(tree) + 40), [(path_of(tree, anchor), *rest) for anchor, *rest in branches]
    check(tree.graft(branches, budget) == plain.graft(twins, budget), "graft: nodes that were there already")
    check_tree(tree, plain.nodes, "grafted")
    check(sum(source != DRAFT for source in tree.sources[1:]) <= max(0, budget - tree.sources.count(DRAFT)),
          "graft: over its budget")

    keep = lambda chosen: {path: value for path, value in plain.nodes.items() if path == () or path in chosen}
    k, depth = rng.randint(0, len(tree) + 2), rng.randrange(6)
    check_tree(tree.top(k), keep(set(plain.best()[:k])), f"top {k}")
    check_tree(tree.within(depth), keep({path for path in plain.nodes if len(path) <= depth}), f"within {depth}")
    cost = [rng.choice((0.02, 0.3)) * n for n in range(rng.randint(1, len(tree) + 5))]
    values = [sum(math.exp(plain.nodes[path][0]) for path in plain.best()[:n]) - cost[n]
              for n in range(min(len(cost), len(tree)))]
    kept = tree.worth(cost)
    check(len(kept) <= len(values) and values[len(kept) - 1] >= max(values) - 1e-9, "worth: another size is worth more")
    check_tree(kept, keep(set(plain.best()[:len(kept) - 1])), "worth")

    paths, length = list(plain.nodes), rng.randrange(4)
    check(tree.mask().tolist() == [[path[:len(other)] == other for other in paths] for path in paths],
          "mask: other than prefixes")
    check(tree.positions(length).tolist() == [length + len(path) for path in paths], "positions")
    picks = [token() for _ in paths]
    aim = paths[rng.randrange(len(paths))]                                    # the target agrees with one path at least
    for i, path in enumerate(paths):
        if aim[:len(path)] == path and len(path) < len(aim):
            picks[i] = aim[len(path)]
    walk = [()]
    while (following := (*walk[-1], picks[paths.index(walk[-1])])) in plain.nodes:
        walk.append(following)
    check([path_of(tree, node) for node in tree.accept(picks)] == walk and len(walk) > len(aim),
          "accept: the longest agreed path")


def fuzz(minutes: float, seed: int, say=print) -> int:
    """Cases seed, seed + 1, ... for so long; returns how many ran. Raises AssertionError, naming the case, at a
    violation."""
    ends, shown = time.time() + 60 * minutes, time.time()
    for number in count(seed):
        try:
            case(number)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\nrepeat it: "
                                 f"python tools/endurance.py fuzz --minutes 0 --seed {number}") from error
        if time.time() >= min(ends, shown + 30):
            shown = time.time()
            say(f"{number - seed + 1} trees, no violation; seed {seed}")
            if shown >= ends:
                return number - seed + 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("generate", "fuzz"))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--growth", type=float, default=48, help="MB that memory may grow by after the first quarter")
    parser.add_argument("--capacity", type=at_least(2), default=1 << 14,
                        help="of the n-gram index: small, so that it forgets many times")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**40))
    args = parser.parse_args(argv)
    try:
        if args.command == "fuzz":
            fuzz(args.minutes, args.seed)
            return 0
        setup = run.set_up(run.parse(["-", "--max-new-tokens", "256"]))
        plan, prompts = setup.plan("graft"), [tokens[:answer_from] for tokens, answer_from in read_text(TEXT)]
        adjacency = AdjacencyMatrix(setup.model.config.vocab_size)
        state = State(setup.model, plan.new_drafter(), adjacency, NGramIndex(args.capacity))
        generate(setup.model, state, plan.config, prompts, args.tokens, args.growth)
    except (AssertionError, ValueError, OSError) as error:
        traceback.print_exception(error.__cause__) if error.__cause__ else None
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
