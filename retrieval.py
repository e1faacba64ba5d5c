"""Two stores that guess continuations at next to no cost: an adjacency matrix and an n-gram index. Imports only torch.

Both answer with a branch (tokens, parents, scores): a small tree whose parents come first, -1 meaning the token it
grows from, and whose scores estimate the log-probability that the target follows it that far.
"""

import heapq
import math
import os
from array import array
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

Branch = tuple[list[int], list[int], list[float]]
RANK_PROBABILITIES = (0.3, 0.1, 0.06, 0.045, 0.03, 0.02, 0.02, 0.02)   # that a row's r-th token comes next
# that text goes on as after an m-token match
MATCH_PROBABILITIES = (0.0, 0.2, 0.51, 0.57, 0.67, 0.74, 0.77, 0.83, 0.92)


@lru_cache(maxsize=256)
def template(size: int, ranks: tuple[float, ...],
             depth: int = 16) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """The fixed tree of ranks for `size` free slots: parents, ranks and log-probabilities of its likeliest nodes.

    With falling `ranks` it is unbalanced as in the paper: the rank-0 chain runs deepest,
    lower ranks get fewer children.
    """
    parents, chosen, scores = [], [], []
    heap = [(-math.log(p), r, -1, 1) for r, p in enumerate(ranks) if p > 0]
    heapq.heapify(heap)
    while heap and len(parents) < size:
        cost, rank, parent, d = heapq.heappop(heap)
        parents.append(parent)
        chosen.append(rank)
        scores.append(-cost)
        if d < depth:
            for r, p in enumerate(ranks):
                if p > 0:
                    heapq.heappush(heap, (cost - math.log(p), r, len(parents) - 1, d + 1))
    return tuple(parents), tuple(chosen), tuple(scores)


class AdjacencyMatrix:
    """M: row x holds the k likeliest successors of token x when the target last verified it; -1 where it never has.

    [vocab, k] int32, bounded by its shape. Source: the Graft paper, and Token Recycling (arXiv 2408.08696), which
    introduced the matrix. The paper keeps it on the target's device; on the host a proposal launches nothing.
    """

    def __init__(self, vocab_size: int, k: int = 8, ranks: tuple[float, ...] = RANK_PROBABILITIES):
        # the same memory twice: an entry of a tensor takes a hundred times as long to read
        self.flat = array("i", [-1]) * (vocab_size * k)
        self.rows = torch.frombuffer(self.flat, dtype=torch.int32).view(vocab_size, k)
        self.ranks = tuple(ranks[:k])

    def update(self, tokens: Tensor, logits: Tensor, top: Callable = torch.topk) -> None:
        """Write the successors of each verified token: tokens [n], logits [n, vocab], on any device. top: finds them as
        torch.topk does."""
        self.rows[tokens.cpu()] = top(logits, self.rows.shape[1])[1].int().cpu()

    def propose(self, anchors: list[int], size: int) -> list[Branch]:
        """For each anchor token, the template for `size` nodes filled from the matrix. A row never written yields no
        node, and so nothing below it."""
        branches, k = [], self.rows.shape[1]
        for anchor in anchors:
            tokens, parents, scores = branch = [], [], []
            place = {-1: -1}  # the template's nodes that there are, as the branch's
            for node, (parent, rank, score) in enumerate(zip(*template(size, self.ranks))):
                if parent in place:
                    above = place[parent]
                    token = self.flat[(tokens[above] if above >= 0 else anchor) * k + rank]
                    if token >= 0:
                        place[node] = len(tokens)
                        tokens.append(token)
                        parents.append(above)
                        scores.append(score)
            branches.append(branch)
        return branches


class NGramIndex:
    """The latest earlier places where the text ended as it does now, over prompt, output and an optional corpus.

    A dictionary from token pairs to the last `places` positions after them; how much more than the pair agrees is found
    by comparing backwards. Lookup costs places * longest comparisons whatever the length of the text. Holds at most
    `capacity` tokens: when they are exceeded the older half is forgotten.
    """

    def __init__(self, capacity: int = 1 << 20, places: int = 16, longest: int = 8,
                 matches: tuple[float, ...] = MATCH_PROBABILITIES):
        self.capacity, self.places, self.longest, self.matches = capacity, places, longest, matches
        self.tokens: list[int] = []
        self.after: dict[tuple[int, int], list[int]] = {}

    def append(self, tokens: list[int]) -> None:
        """Add tokens to the text; -1 separates texts that have nothing to do with each other."""
        for token in tokens[-self.capacity:]:
            self.tokens.append(token)
            end = len(self.tokens)
            if end > 1 and token >= 0 and self.tokens[-2] >= 0:
                found = self.after.setdefault((self.tokens[-2], token), [])
                found.append(end)
                if len(found) > self.places:
                    del found[0]
        if len(self.tokens) > self.capacity:
            kept, self.tokens, self.after = self.tokens[-self.capacity // 2:], [], {}
            self.append(kept)

    def matches_of(self, path: tuple[int, ...]) -> list[tuple[int, int]]:
        """Where text + `path` ended the same way before: (position of the token that followed, length of the match)."""
        text, found = self.tokens, []
        tail = (tuple(text[-self.longest:]) + tuple(path))[-self.longest:]
        for place in self.after.get(tail[-2:], ()):
            length = 2
            while length < len(tail) and place > length and text[place - length - 1] == tail[-length - 1] >= 0:
                length += 1
            if place < len(text):
                found.append((place, length))
        return found

    def propose(self, size: int, path: tuple[int, ...] = (), depth: int = 16, least: float = -math.inf) -> Branch:
        """The `size` likeliest continuations of text + `path`, as one weighted tree; none whose log-probability is
        below `least`.

        Places that match longer weigh more (match length + 1, squared); where they disagree the probability is
        shared out by weight.
        """
        text, places, branch = self.tokens, self.matches_of(path), ([], [], [])
        heap = []

        def push(places, parent, score, level):
            votes: dict[int, list] = {}
            for place, length in places:
                if place < len(text) and text[place] >= 0:
                    votes.setdefault(text[place], []).append((place + 1, min(length, self.longest) + 1))
            total = sum(length * length for found in votes.values() for _, length in found)
            for token, found in votes.items():
                share = sum(length * length for _, length in found) / total
                matched = max(length for _, length in found) - 1
                heapq.heappush(heap, (-score - math.log(share * self.matches[min(matched, len(self.matches) - 1)]),
                                      len(branch[0]), token, parent, found, level))

        push(places, -1, 0.0, 1)
        while heap and len(branch[0]) < size and -heap[0][0] >= least:
            cost, _, token, parent, found, level = heapq.heappop(heap)
            branch[0].append(token)
            branch[1].append(parent)
            branch[2].append(-cost)
            if level < depth:
                push(found, len(branch[0]) - 1, -cost, level + 1)
        return branch


@contextmanager
def whole(path):
    """A file to write that takes the place of `path` once it is complete: a full disk or Ctrl-C leaves what was there.
    Raises OSError that names `path`, whatever the writer raised."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path}: not a plain file")
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        raise OSError(f"{path}: could not be written ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def save_stores(path, adjacency: AdjacencyMatrix, ngrams: NGramIndex, skip: int = 0) -> None:
    """Write both stores, the index without its first `skip` tokens, to a safetensors file, so that a later run starts
    warm. Raises OSError as `whole` does."""
    from safetensors.torch import save_file
    with whole(path) as partial:
        save_file({"adjacency": adjacency.rows, "tokens": torch.tensor(ngrams.tokens[skip:], dtype=torch.int32)},
                  partial)


def load_stores(path, adjacency: AdjacencyMatrix, ngrams: NGramIndex) -> None:
    """Read what `save_stores` wrote. Raises ValueError where the file is damaged or belongs to another vocabulary."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        stored = load_file(path)
        rows, tokens = stored["adjacency"], stored["tokens"]
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path}: not a store that Graft saved ({error})") from None
    vocab = adjacency.rows.shape[0]
    if rows.shape != adjacency.rows.shape or rows.dtype != torch.int32:
        raise ValueError(f"{path}: adjacency has shape {list(rows.shape)}; "
                         f"this model needs {list(adjacency.rows.shape)} of int32")
    if tokens.dtype != torch.int32 or tokens.dim() != 1:
        raise ValueError(f"{path}: tokens has shape {list(tokens.shape)} of {tokens.dtype}; expected one row of int32")
    if (rows.numel() and (rows.min() < -1 or rows.max() >= vocab)
            or tokens.numel() and (tokens.min() < -1 or tokens.max() >= vocab)):
        raise ValueError(f"{path}: holds token ids outside the vocabulary of {vocab}")
    adjacency.rows.copy_(rows)
    ngrams.append(tokens.tolist() + [-1])
