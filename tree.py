"""The token tree: one structure from drafting through pruning, grafting and verification. Imports only torch.

A tree hangs below its root, the last committed token, which the target chose but has not read yet. Node 0 is the root;
every other node is one guess at a continuation. n counts nodes with the root; budgets count them without.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

ROOT, DRAFT, NGRAM, ADJACENCY, TARGET = "root", "draft", "ngram", "adjacency", "target"
# tokens, parents (-1: the anchor it grows from), scores: see `Tree.graft`
Branch = tuple[list[int], list[int], list[float]]


@dataclass
class Tree:
    """Lists of length n. A parent always comes before its children, and no parent has two children with one token,
    except after `graft(merge=False)`."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    # S: log-probability that the target goes this way from the root
    scores: list[float] = field(default_factory=lambda: [0.0])
    sources: list[str] = field(default_factory=lambda: [ROOT])
    child: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)   # (parent, token) -> node

    @classmethod
    def rooted(cls, token: int) -> "Tree":
        return cls([token])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, score: float, source: str, merge: bool = True) -> int:
        """The child of `parent` that holds `token`: the one that is there already, with the better score, else a new
        node. Returns its number."""
        key, above = (parent, token), self.scores[parent]
        node = self.child.get(key) if merge else None
        if score > above:                                       # a child is never likelier than its parent
            score = above
        if node is None:
            node = self.child[key] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.scores.append(score)
            self.sources.append(source)
        elif score > self.scores[node]:  # two sources agree: the surer one counts until `graft` mixes them
            self.scores[node] = score
        return node

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def leaves(self) -> list[int]:
        inner = set(self.parents)
        return [node for node in range(len(self)) if node not in inner]

    # ------------------------------------------------------------------------------------------ draft, prune, graft

    def expand(self, frontier: list[int], tokens: list[list[int]], logprobs: list[list[float]]) -> list[int]:
        """One beam step: give frontier node i the children tokens[i] with log-probabilities logprobs[i].
        Returns the new nodes."""
        return [self.add(token, node, self.scores[node] + logprob, DRAFT)
                for node, row, row_logprobs in zip(frontier, tokens, logprobs)
                for token, logprob in zip(row, row_logprobs)]

    def best(self, nodes: Iterable[int], k: int) -> list[int]:
        """The k likeliest of `nodes`, best first; of equals, the older."""
        return sorted(nodes, key=lambda node: (-self.scores[node], node))[:k]

    def top(self, k: int) -> "Tree":
        """The root and the k likeliest nodes, in the old order. Prefix-closed, because a child never scores
        above its parent."""
        kept = [0] + sorted(self.best(range(1, len(self)), k))
        return self.select(kept)

    def within(self, depth: int) -> "Tree":
        """The part that is at most `depth` below the root."""
        return self if max(self.depths) <= depth else self.select([i for i, d in enumerate(self.depths) if d <= depth])

    def select(self, kept: list[int]) -> "Tree":
        """The tree of these nodes, which must be ascending, hold the root, and hold each one's parent."""
        number = {old: new for new, old in enumerate(kept)}
        number[-1] = -1
        pick = lambda values: [values[i] for i in kept]
        parents = [number[p] for p in pick(self.parents)]
        tree = Tree(pick(self.tokens), parents, pick(self.depths), pick(self.scores), pick(self.sources))
        tree.child = {(parents[i], tree.tokens[i]): i for i in range(1, len(kept))}
        return tree

    def graft(self, branches: list[tuple[int, str, Branch]], budget: int, merge: bool = True) -> int:
        """Merge retrieved branches as a trie, likeliest node first over all of them, until the tree has `budget`
        nodes below its root. Each branch is (anchor node, source, (tokens, parents, scores)) with scores relative to
        its anchor and never rising from parent to child. A branch that repeats what is there walks on through it and
        costs nothing; returns how many nodes were there already. Without `merge` (an ablation) it does not, and slots
        go to repetitions.

        Then chances are mixed (ours): n-grams say that with probability R the text goes on behind a node as it did
        before, with r for this child, R being the sum of r over the children; else it goes on as the head says. So a
        child has r + (1 - R) d, whoever proposed it."""
        if not branches:
            return 0
        before = [math.exp(score) for score in self.scores]
        # d of what is drafted
        heads = [chance / max(before[max(parent, 0)], 1e-30) for chance, parent in zip(before, self.parents)]
        order = sorted((-self.scores[anchor] - score, which, i)
                       for which, (anchor, _, (_, _, scores)) in enumerate(branches) for i, score in enumerate(scores))
        place, shared, ngrams, others = {}, 0, {}, {}
        for minus_score, which, i in order:
            anchor, source, (tokens, parents, scores) = branches[which]
            parent = anchor if parents[i] < 0 else place[which, parents[i]]
            there = merge and (parent, tokens[i]) in self.child
            if not there and len(self) > budget:
                break
            shared += there
            node = place[which, i] = self.add(tokens[i], parent, -minus_score, source, merge)
            if source == NGRAM:
                ngrams[node] = max(math.exp(scores[i] - (scores[parents[i]] if parents[i] >= 0 else 0.0)),
                                   ngrams.get(node, 0.0))
            else:                                                   # stands for d where the head said nothing
                others[node] = max(math.exp(min(0.0, -minus_score - self.scores[parent])), others.get(node, 0.0))
        told = [0.0] * len(self)                                    # R
        for node, chance in ngrams.items():
            told[self.parents[node]] += chance
        for node in range(1, len(self)):
            parent, head = self.parents[node], heads[node] if node < len(heads) else others.get(node, 0.0)
            chance = ngrams.get(node, 0.0) + (1 - min(told[parent], 1.0)) * head
            self.scores[node] = self.scores[parent] + math.log(min(max(chance, 1e-9), 1.0))
        return shared

    def worth(self, cost: Sequence[float]) -> "Tree":
        """The root and as many of the likeliest nodes as pay. cost[n] is the price of verifying n nodes, in tokens: the
        seconds that it takes, times the tokens a second that decoding reaches. A node's gain is its probability,
        exp(S): n is where the sum of gains most exceeds the price."""
        best = self.best(range(1, len(self)), len(cost) - 1)
        gains = list(accumulate((math.exp(self.scores[node]) for node in best), initial=0.0))
        return self.top(max(range(len(gains)), key=lambda n: gains[n] - cost[n]))

    # ------------------------------------------------------------------------------------------------------- verify

    def mask(self, device="cpu") -> Tensor:
        """bool [n, n], True = attend: every node sees its ancestors and itself, besides all committed tokens."""
        n, seen = len(self), bytearray(len(self)**2)
        for node, parent in enumerate(self.parents):
            if node:
                seen[node * n:node * n + n] = seen[parent * n:parent * n + n]
            seen[node * n + node] = 1
        return torch.frombuffer(seen, dtype=torch.bool).view(n, n).to(device)

    def positions(self, start: int, device="cpu") -> Tensor:
        """int64 [n]: the root's position `start` plus each node's depth."""
        return torch.tensor([start + depth for depth in self.depths], device=device)

    def accept(self, picks: list[int]) -> list[int]:
        """The acceptance walk: picks[i] is the token the target puts after node i. Returns the nodes it agrees with,
        from the root on, the root included; the pick at the last of them is the next root. A scan of all nodes:
        unmerged siblings may both agree."""
        agreed, deepest = {0}, 0
        for node, (parent, token) in enumerate(zip(self.parents, self.tokens)):
            if parent in agreed and token == picks[parent]:
                agreed.add(node)
                deepest = max(deepest, node, key=self.depths.__getitem__)
        return [0, *self.path(deepest)]
