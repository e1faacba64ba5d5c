"""Graft: speculative decoding that prunes a draft tree and grafts retrieved branches into the freed budget.

After Shen et al., "Draft Less, Retrieve More: Hybrid Tree Construction for Speculative Decoding", arXiv 2605.20104. One
loop serves every method; they differ in which steps of a round they take (`METHODS`). Greedy output is that of plain
decoding, token by token: the tree decides only how many tokens a round commits, never which.

Letters in shapes: n nodes with the root, m accepted nodes, V vocabulary, H hidden size; while drafting f nodes of a
frontier, k children of each, r nodes drafted so far, v the draft's vocabulary.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Captured, Eagle3, KVCache, Model, PackedCache, StaticCache, fused
from retrieval import AdjacencyMatrix, NGramIndex
from tree import ADJACENCY, DRAFT, NGRAM, TARGET, Branch, Tree


@dataclass(frozen=True)
class Method:
    """Which steps a round takes, and where retrieved branches may start: at the root, at the draft's leaves, or
    anywhere. `prune` stops drafting early and, where prices are known, verifies only the nodes that pay."""

    draft: bool = False
    prune: bool = False
    retrieve: bool = False
    anchors: str = "all"


METHODS = {
    "ar": Method(),                                                   # plain decoding
    "retrieve": Method(prune=True, retrieve=True),                    # no draft head; only nodes that pay are verified
    "eagle": Method(draft=True),                                      # full tree, no retrieval
    "prune": Method(draft=True, prune=True),                          # pruned, not refilled
    "graft": Method(draft=True, prune=True, retrieve=True),
    "graft_root": Method(draft=True, retrieve=True, anchors="root"),  # ablation: no pruning, grafts at the root
    "graft_unpruned": Method(draft=True, retrieve=True),              # ablation: no pruning, grafts anywhere
    "graft_tail": Method(draft=True, prune=True, retrieve=True,       # ablation: grafts only extend the draft
                         anchors="leaves"),
}
CHUNK = 128       # of a row of logits, where the likeliest are looked for first
UNPRUNED = 2 / 3  # the budget's share that an unpruned draft keeps; the rest is for retrieval (the paper's 40 of 60)


@dataclass(frozen=True)
class GraftConfig:
    """Everything that decides what a generation does. Budgets count nodes without the root (EAGLE's code counts it)."""

    method: str = "graft"
    max_new_tokens: int = 256
    budget: int = 60                      # K_max
    depth: int = 7                        # expansion steps behind the root's own children
    draft_top_k: int = 10                 # children a node, and nodes expanded a step
    checkpoints: tuple[int, ...] = (0, 1, 5)   # expansion steps d after which confidence is checked
    thresholds: tuple[float, ...] = (0.4, 0.3, 0.1)   # tau_d: stop drafting where exp(max S_d) is below
    retained: tuple[float, ...] = (8 / 60, 24 / 60, 40 / 60)   # the budget's share that a stage's draft keeps
    verify_cost: tuple[float, ...] = ()   # price of n = 0, 1, ... nodes, in tokens; empty: the budget decides alone
    trust: tuple[float, float] = (1.0, 1.0)   # factors on the chance of n-gram and adjacency nodes beside the head's
    graft_anchors: int = 4                # draft nodes, besides the root, that retrieval may continue
    adjacency: bool = True
    ngrams: bool = True
    merge: bool = True                    # join retrieved branches as a trie; False: an ablation
    prefill_chunk: int = 512
    repetition_penalty: float = 1.0       # divides positive logits of tokens in the text, multiplies negative ones
    temperature: float = 0.0              # 0: greedy, and the three below do nothing; else they follow it in this order
    top_k: int = 0                        # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                    # keep the likeliest tokens that make up this probability
    min_p: float = 0.0                    # keep tokens that have this share of the likeliest one's probability
    lean: bool = True                     # let guesses lean towards what the known noise favours; False: an ablation
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None   # None: the model's own

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        for name, low, high in (("max_new_tokens", 1, 2**31), ("budget", 1, 1024), ("depth", 0, 64),
                                ("draft_top_k", 1, 64), ("graft_anchors", 0, 64), ("prefill_chunk", 1, 2**20),
                                ("top_k", 0, 2**31), ("seed", 0, 2**40)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
        for name, low, high in (("temperature", 0, 100), ("repetition_penalty", 0.01, 100),
                                ("top_p", 1e-6, 1), ("min_p", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected a number from {low} to {high}")
        if 0 < self.temperature < 1e-4:
            raise ValueError(f"temperature is {self.temperature!r}; expected 0 or a number from 0.0001 to 100")
        if not len(self.checkpoints) == len(self.thresholds) == len(self.retained):
            raise ValueError(f"checkpoints, thresholds and retained have lengths {len(self.checkpoints)}, "
                             f"{len(self.thresholds)} and {len(self.retained)}; expected one length")
        if list(self.checkpoints) != sorted(set(self.checkpoints)) or any(d < 0 for d in self.checkpoints):
            raise ValueError(f"checkpoints is {self.checkpoints}; expected rising expansion steps from 0")
        if self.verify_cost and len(self.verify_cost) != self.budget + 1:
            raise ValueError(f"verify_cost has {len(self.verify_cost)} entries; "
                             f"expected none or one for each of 0 to {self.budget} nodes")
        if not all(math.isfinite(cost) for cost in self.verify_cost):
            raise ValueError(f"verify_cost is {self.verify_cost}; expected finite numbers")
        if len(self.trust) != 2 or not all(0 < factor <= 1 for factor in self.trust):
            raise ValueError(f"trust is {self.trust}; expected two numbers above 0, at most 1")
        for name in ("thresholds", "retained"):
            if not all(0 <= value <= 1 for value in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected numbers from 0 to 1")

    @property
    def priced(self) -> bool:
        return METHODS[self.method].prune and bool(self.verify_cost)

    @cached_property
    def least(self) -> float:
        """The log-probability that a drafted node must have to be expanded: it pays for itself where nodes cost least;
        -inf without prices."""
        price = min((cost - self.verify_cost[0]) / n
                    for n, cost in enumerate(self.verify_cost) if n) if self.priced else 0
        return math.log(price) if price > 0 else -math.inf


@torch.inference_mode()
def verify_once(model: Model, cache: KVCache, n: int, taps: tuple[int, ...] = ()) -> None:
    """Run what verifies n nodes behind the committed rows of `cache`, for a clock: no row stays."""
    tree = Tree.rooted(0)
    for node in range(1, n + 1):  # other tokens, so that a mixture reads other experts
        tree.add(node % model.config.vocab_size, max(0, node - 3), 0.0, DRAFT)
    tokens, mask = torch.tensor([tree.tokens], device=model.device), tree.mask(model.device) if n else None
    logits, _ = model(tokens, tree.positions(cache.length, model.device)[None], cache, mask, taps=taps)
    likeliest(logits[0], model.kernels)


def measure_cost(model: Model, budget: int) -> list[float]:
    """Seconds that verifying n = 0, 1, ... `budget` nodes takes here: of a few sizes the fastest of four forwards, of
    fewer, but two at least, once they have taken half a second; straight lines between, and on behind the last."""
    seconds = dict.fromkeys((0, 1, 3, 5, 7, 15), math.inf)
    cache, start = model.new_cache(0), time.perf_counter()
    cache.reserve(128 + 16)
    cache.length = 128
    for turn in range(4):
        if turn > 1 and time.perf_counter() - start > 0.5:
            break
        for n in seconds:
            begin = time.perf_counter()
            verify_once(model, cache, n)
            seconds[n] = min(seconds[n], time.perf_counter() - begin)
    return list(accumulate(lines(seconds, budget), max))  # a larger tree never costs less: what looks so is noise


def lines(known: dict[int, float], last: int) -> list[float]:
    """Values at 0, 1, ... `last`, on straight lines between the known ones, of which 0 is the first,
    and on behind them."""
    places, values = list(known), []
    for n in range(last + 1):
        below, above = next(((a, b) for a, b in zip(places, places[1:]) if n <= b), places[-2:])
        values.append(known[below] + (known[above] - known[below]) * (n - below) / (above - below))
    return values


def tune(model: Model, budget: int = 32) -> dict:
    """GraftConfig's fields for a model and a machine for which tools/calibrate.py has not run: prices are measured, at
    twice the tokens that plain decoding makes in that time; drafting stops where the best path is less likely than 0.4;
    and the matrix is trusted beside a head as six calibrations found. On the demo model this decodes within some
    hundredths as fast as what calibration chooses."""
    seconds = measure_cost(model, budget)
    return {"budget": budget, "depth": 7, "draft_top_k": 8,
            "checkpoints": tuple(range(7)), "thresholds": (0.4,) * 7, "retained": (1.0,) * 7,
            "trust": (1.0, 0.08), "verify_cost": tuple(2 * each / seconds[0] for each in seconds)}


@dataclass
class Stats:
    """What a generation did so far."""

    prompt_tokens: int = 0
    tokens: int = 0                                     # committed, cut as plain decoding would be
    rounds: int = 0                                     # verification forwards: not prefill, of the first token
    nodes: Counter = field(default_factory=Counter)     # verified nodes by source
    merged: int = 0                                     # retrieved nodes that were there already, and cost nothing
    accepted: Counter = field(default_factory=Counter)  # committed tokens by source
    stages: Counter = field(default_factory=Counter)    # rounds by the checkpoint that ended drafting; "full": none
    seconds: Counter = field(default_factory=Counter)   # by step
    finish: str = ""                                    # eos, stop, length, context or interrupted; "" while it runs

    @property
    def mean_accepted(self) -> float:
        """Tokens a round commits on average, the target's own token included."""
        return (self.tokens - 1) / self.rounds if self.rounds else 0.0

    @contextmanager
    def clock(self, step: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


@dataclass
class Round:
    """One round's committed tokens and where each came from. `tree` is what was verified (None for prefill), `path` its
    accepted nodes from the root on, `stats` the generation's running statistics."""

    tokens: list[int]
    sources: list[str]
    tree: Tree | None
    path: list[int]
    stats: Stats


# ----------------------------------------------------------------------------------------------------------- sampling

class Sampler:
    """Which token the target picks after each node, and what of that is known in advance.

    Sampling is the Gumbel-max trick: argmax(logits + temperature * noise) is a sample at that temperature. The noise is
    a function of (seed, position, token) alone, so plain and speculative decoding pick the same tokens; and because it
    is known before the target has spoken, guesses can lean towards what it favours.
    """

    def __init__(self, config: GraftConfig, vocab_size: int, device, kernels: Callable | None = None):
        # position of the token to be picked next
        self.config, self.stream, self.position = config, mix(torch.tensor(config.seed)), 0
        self.kernels = kernels  # the target's; here only its `top` is used
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)           # which tokens the text holds
        self.rows: dict[int, Tensor] = {}                                              # the noise of whole positions

    @property
    def plain(self) -> bool:
        """Whether the pick is that of the logits, nothing added."""
        return not self.config.temperature and self.config.repetition_penalty == 1

    def read(self, tokens: list[int]) -> None:
        """The text has grown by these tokens."""
        self.position += len(tokens)
        self.rows = {position: row for position, row in self.rows.items() if position >= self.position}
        if self.config.repetition_penalty != 1:
            self.seen[tokens] = True

    def noise(self, tokens: Tensor, depth: int | Tensor) -> Tensor:
        """Standard Gumbel noise of tokens [...] for the pick after a node at this depth, or at depths [...]: float64,
        hashed from a counter, so that any of it can be had at once, on any device."""
        bits = mix(mix(self.stream + (self.position + depth)) + tokens * -0x61C8864680B583EB)
        uniform = ((bits >> 12 & 2**52 - 1).double() + 0.5) / 2**52                    # from 2^-53 to 1 - 2^-53
        return -(-uniform.log()).log()

    def row(self, depth: int) -> Tensor:
        """The noise [V] of all tokens for the pick after a node at this depth, which is made once: every position is
        picked in the end."""
        position = self.position + depth
        if position not in self.rows:
            self.rows[position] = self.noise(torch.arange(len(self.seen), device=self.seen.device), depth)
        return self.rows[position]

    def pick(self, logits: Tensor, tree: Tree) -> list[int]:
        """The target's token after each node: logits [n, V]."""
        return likeliest(self.scores(logits, tree), self.kernels)

    def scores(self, logits: Tensor, tree: Tree) -> Tensor:
        """What the pick is the largest of: logits [n, V], penalised, at their temperature, truncated, with noise."""
        config = self.config
        if config.repetition_penalty != 1:
            seen = self.seen.repeat(len(tree), 1)  # [n, V]: the text, and the node's own path
            on_path = [(node, tree.tokens[i]) for node in range(len(tree)) for i in tree.path(node)]
            if on_path:
                seen[tuple(torch.tensor(on_path, device=logits.device).T)] = True
            logits = penalise(logits.double(), seen, config.repetition_penalty)
        if config.temperature:
            logits = truncate(logits.double() / config.temperature, config)
            logits = logits + torch.stack([self.row(depth) for depth in tree.depths])
        return logits

    def lean(self, logits: Tensor, depth: int, ids: Tensor) -> Tensor:
        """A guesser's log-probabilities that the target picks the tokens `ids` [v] after a node at this depth, given
        its logits [rows, v]. Greedy: its log-softmax. Else the pick is argmax(logits + temperature * noise), so the
        noise joins the logits."""
        logits, config = logits.float(), self.config
        if config.repetition_penalty != 1:
            logits = penalise(logits, self.seen[ids], config.repetition_penalty)
        if config.temperature and config.lean:
            kept = truncate(logits / config.temperature, config) + self.row(depth)[ids].float()
            logits = kept * config.temperature
        return logits.log_softmax(-1)

    def children(self, logits: Tensor, depth: int, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest by `lean`, or all there are: log-probabilities and tokens [rows, k]."""
        k = min(k, len(ids))
        top = compiled_top(self.kernels, logits) if self.plain else None
        if top:
            values, best = top(logits, k, logs=True)
        else:
            values, best = self.lean(logits, depth, ids).topk(k, dim=-1)
        return values, ids.take(best)

    def lean_branches(self, branches: list[Branch], depths: list[int]) -> list[Branch]:
        """Retrieved branches, each below a node at its depth, their probabilities adjusted for the noise: a token
        competes with the rest, whose best has Gumbel noise too, 0.577 on average."""
        if not self.config.temperature or not self.config.lean:
            return branches
        above, leaning = [], []  # above: the depth of the node above each token
        for (_, parents, _), depth in zip(branches, depths):
            first = len(above)
            for parent in parents:
                above.append(above[first + parent] + 1 if parent >= 0 else depth)
        every = torch.tensor([token for tokens, _, _ in branches for token in tokens], dtype=torch.int64)
        noise = iter(self.noise(every, torch.tensor(above, dtype=torch.int64)).tolist())
        for tokens, parents, scores in branches:
            leaned = []
            for parent, score, luck in zip(parents, scores, noise):
                p = min(math.exp(score - (scores[parent] if parent >= 0 else 0.0)), 1 - 1e-9)
                odds = math.log(p / (1 - p)) + self.config.temperature * (luck - 0.5772)
                leaned.append((leaned[parent] if parent >= 0 else 0.0) - math.log1p(math.exp(-odds)))
            leaning.append((tokens, parents, leaned))
        return leaning


def mix(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele et al., OOPSLA 2014) on int64 numbers, which wrap:
    every bit depends on every bit."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


def compiled_top(kernels: Callable | None, logits: Tensor) -> Callable | None:
    """The search of the target's compiled layers, as torch.topk, where there are any and it takes these logits."""
    return kernels.top if kernels and logits.dtype == torch.float32 else None


def likeliest(logits: Tensor, kernels: Callable | None = None) -> list[int]:
    """argmax of each row [n, V]. Raises ValueError where damaged weights, or a dtype too narrow for the model,
    left no number."""
    n, v = logits.shape
    if top := compiled_top(kernels, logits):
        best, picks = (found[:, 0] for found in top(logits, 1))
    elif logits.device.type != "cpu" or v % CHUNK:
        best, picks = logits.max(-1)  # in bfloat16 four times as fast as argmax
    else:                             # a CPU is slow to say where in a long row
        chunks = logits.view(n, -1, CHUNK)
        best, chunk = chunks.amax(-1).max(-1)
        picks = chunk * CHUNK + chunks[torch.arange(n), chunk].max(-1).indices
    best, picks = best.tolist(), picks.tolist()
    if not all(map(math.isfinite, best)):
        raise ValueError(f"the model's logits are not finite in {logits.dtype}: "
                         "damaged weights, or weights for a wider dtype")
    return picks


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Keskar et al. (arXiv 1909.05858), section 4.1, in the form that transformers made usual:
    seen is bool, as logits."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Tensor, config: GraftConfig) -> Tensor:
    """-inf where top-k, then top-p, then min-p leave a token out: logits [n, V], divided by the temperature. Of tokens
    that tie with the last one kept, all stay, so that the result does not depend on a sort."""
    if config.top_k:
        last = logits.topk(min(config.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -math.inf)
    if config.top_p < 1:
        whole, best = logits.logsumexp(-1, keepdim=True), logits.topk(min(256, logits.shape[-1]), dim=-1).values
        if (best - whole).exp().sum(-1).min() < config.top_p:  # a flat distribution: sort all of it
            best = logits.sort(dim=-1, descending=True).values
        mass = (best - whole).exp().cumsum(-1)
        last = best.gather(-1, (mass < config.top_p).sum(-1, keepdim=True).clamp_max(best.shape[-1] - 1))
        logits = logits.masked_fill(logits < last, -math.inf)
    if config.min_p:
        logits = logits.masked_fill(logits < logits.max(-1, keepdim=True).values + math.log(config.min_p), -math.inf)
    return logits


# ------------------------------------------------------------------------------------------------------------ drafter

@dataclass
class Beam:
    """What an expansion step leaves on a GPU: a frontier of f nodes, the k children of each,
    and which of those go on."""

    values: Tensor                 # [f, k] the children's log-probabilities below their parents
    ids: Tensor                    # [f, k] their tokens
    kept: Tensor                   # [n] the next frontier: the likeliest children, counted row by row
    scores: Tensor                 # [n] float64, S of those
    hidden: Tensor                 # [1, f, H] of the frontier
    seen: Tensor      # bool [f, r]: which rows drafted so far each of the frontier attends to: its ancestors and itself
    packed: Tensor                 # the first three as one

    @classmethod
    def choose(cls, logits: Tensor, ids: Tensor, top_k: int, scores: Tensor, hidden: Tensor, seen: Tensor) -> "Beam":
        """From the logits [f, v] of a frontier and its S [f]; a GPU's top-k of long rows is slow,
        of many short ones it is not."""
        f, v = logits.shape
        best = torch.arange(v, device=ids.device).expand(f, v)
        if v % CHUNK == 0 and v > CHUNK >= top_k:
            some = logits.view(f, -1, CHUNK).topk(top_k, dim=-1, sorted=False).indices                  # [f, chunks, k]
            best = (some + torch.arange(0, v, CHUNK, device=ids.device)[:, None]).flatten(1)
        values, found = logits.float().log_softmax(-1).gather(1, best).topk(top_k, dim=-1)
        ids = ids[best.gather(1, found)]
        scores, kept = (scores[:, None] + values).flatten().topk(top_k)
        return cls(values, ids, kept, scores, hidden, seen,
                   torch.cat((values.flatten().double(), ids.flatten().double(), kept.double())))

    def frontier(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next frontier's tokens [1, n], its parents' hidden [1, n, H], which its children share, and what it
        sees [n, r + n]."""
        parents = self.kept // self.ids.shape[1]
        own = torch.eye(len(self.kept), dtype=torch.bool, device=self.kept.device)
        return (self.ids.flatten().index_select(0, self.kept)[None], self.hidden.index_select(1, parents),
                torch.cat((self.seen.index_select(0, parents), own), dim=1))

    def read(self) -> tuple[list[list[float]], list[list[int]], list[int]]:
        """Values, ids and kept on the host."""
        (f, k), numbers = self.ids.shape, self.packed.tolist()
        rows = [numbers[i:i + k] for i in range(0, 2 * f * k, k)]
        return rows[:f], [list(map(int, row)) for row in rows[f:]], list(map(int, numbers[2 * f * k:]))


class Drafter:
    """Grows a tree by beam search over a draft network's guesses. A subclass says how it reads committed text (`taps`,
    `rewind`, `observe`) and what one step runs (`run`, or `step` where no graph can hold it); `variants/` has others.
    What stands in its place needs the first three and `expand`."""

    taps: tuple[int, ...] = ()            # the target's layers whose outputs `observe` is given
    network: Eagle3 | Model | None = None # what `run` runs
    cache: KVCache
    dropped = 0                           # rows forgotten at the front of the text
    ids: Tensor                           # [draft V]: the network's vocabulary as ids of the target's

    def step(self, tokens: Tensor, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.run(self.network, tokens, hidden, positions, self.cache, mask)

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        """Run committed tokens [1, m] and keep their rows; what follows the last of them is where a tree starts."""
        start, count = self.cache.length, tokens.shape[1]
        self.cache.reserve(start + count)
        positions = torch.arange(start + self.dropped, start + self.dropped + count, device=tokens.device)[None]
        logits, hidden = self.step(tokens, hidden, positions, None)  # no mask: the last token's logits are enough
        self.cache.commit(list(range(count)))
        self.logits, self.hidden = logits[:, -1], hidden[:, -1:]

    def expand(self, root: int, depth: int, top_k: int, sampler: Sampler) -> Iterator[Tree]:
        """Yield the tree after expansion step 0 (the root's children), 1, ... `depth`; whoever stops asking stops
        drafting. Of the newest nodes the top_k likeliest go on, outside of graphs only those that could pay."""
        # ran: the nodes in the order of their cache rows
        self.tree, self.ran, start = Tree.rooted(root), [], self.cache.length
        tree, least = self.tree, sampler.config.least
        self.cache.reserve(start + depth * top_k)
        frontier, chain = [0], self.chain(depth, top_k) if sampler.plain else None
        logits, hidden = self.logits, self.hidden
        try:
            for step in range(depth + 1):
                self.ran += frontier if step else []
                if chain:
                    values, ids, kept = chain.grow(step).read()
                else:
                    if step:
                        logits, hidden = self.grow(frontier, above, hidden)
                    values, ids = (each.tolist() for each in sampler.children(logits, step, self.ids, top_k))
                grown, above = tree.expand(frontier, ids, values), frontier
                frontier = ([grown[child] for child in kept] if chain else
                            [i for i in tree.best(grown, top_k) if tree.scores[i] >= least])
                yield tree
                if not frontier:
                    break
        finally:
            self.cache.length = start                                              # guesses are not kept

    def grow(self, frontier: list[int], above: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run n nodes of one depth, the last in `ran`, children of `above`, whose hidden states [1, f, H] they read ->
        logits [n, v], hidden [1, n, H]. Each attends to its ancestors and itself, besides the text."""
        tree, device = self.tree, self.ids.device
        row, place = ({node: i for i, node in enumerate(nodes)} for nodes in (self.ran, above))
        seen = bytearray(len(frontier) * len(row))
        for i, node in enumerate(frontier):
            for other in tree.path(node):
                seen[i * len(row) + row[other]] = 1
        tokens = torch.tensor([[tree.tokens[node] for node in frontier]], device=device)
        parents = torch.tensor([place[tree.parents[node]] for node in frontier], device=device)
        position = self.dropped + self.cache.length + len(frontier) - len(row) + tree.depths[frontier[0]] - 1
        mask = torch.frombuffer(seen, dtype=torch.bool).view(len(frontier), -1).to(device)
        logits, hidden = self.step(tokens, hidden.index_select(1, parents), torch.full_like(tokens, position), mask)
        self.cache.commit(list(range(len(frontier))))
        return logits[0], hidden

    def chain(self, depth: int, top_k: int) -> "Chain | None":
        """The graphs of expansion steps, where there can be any."""
        cache, network = self.cache, self.network
        if network is None or not network.replays(cache) or top_k > len(self.ids):
            return None
        m = cache.span(depth * top_k)
        key = (id(network), "chain", top_k, m)
        if key not in cache.graphs:
            cache.graphs[key] = Chain(self, top_k, m)
        cache.graphs[key].begin(self)
        return cache.graphs[key]


class Chain:
    """Greedy expansion steps over fixed buffers, on CUDA a graph each: a step finds what it needs where the one above
    left it, so that the host launches it and reads one tensor."""

    def __init__(self, drafter: Drafter, top_k: int, m: int):
        # not the drafter: its cache holds this
        self.network, self.run, self.ids, self.top_k = drafter.network, drafter.run, drafter.ids, top_k
        self.logits, self.hidden = drafter.logits.clone(), drafter.hidden.clone()
        # the first row drafted, and its position
        self.start, self.position = (torch.zeros((), dtype=torch.int64, device=self.ids.device) for _ in range(2))
        self.static = StaticCache(drafter.cache, top_k, m, compiled=self.network.compiled)
        self.steps: list[Captured] = []
        self.beams: list[Beam] = []

    def begin(self, drafter: Drafter) -> None:
        """A tree grows from what the drafter read last."""
        self.logits.copy_(drafter.logits)
        self.hidden.copy_(drafter.hidden)
        self.start.fill_(drafter.cache.length)
        self.position.fill_(drafter.cache.length + drafter.dropped)

    def grow(self, step: int) -> Beam:
        """The expansion step below the one above, whose replay, or the next tree's, overwrites it."""
        if step == len(self.steps):
            self.steps.append(Captured(self.network, partial(self.compute, step)))
        self.beams[step:] = [self.steps[step]()]
        return self.beams[step]

    def compute(self, step: int) -> Beam:
        """`Drafter.grow`, every number of it on the device."""
        logits, hidden, device = self.logits, self.hidden, self.ids.device
        scores, seen = (torch.zeros(1, dtype=torch.float64, device=device),
                        torch.zeros(1, 0, dtype=torch.bool, device=device))
        if step:
            above, static = self.beams[step - 1], self.static
            tokens, hidden, seen = fused(Beam.frontier, static)(above)
            (n, rows), scores = seen.shape, above.scores
            static.start, static.length = self.start, self.start + (rows - n)
            # not the instance's: tools put clocks around it
            forward = partial(type(self.network).forward, self.network)
            logits, hidden = self.run(forward, tokens, hidden, (self.position + (step - 1)).expand(1, n), static,
                                      F.pad(seen, (0, 1)))
            logits = logits[0]
        return fused(Beam.choose, self.static)(logits, self.ids, self.top_k, scores, hidden, seen)


class EagleDrafter(Drafter):
    """Drafts with an EAGLE-3 head, which chains its own features. With a `window`, the head sees at least that many of
    the last tokens and at most twice as many, which bounds its cache and its cost where the text is long."""

    def __init__(self, head: Eagle3, window: int | None = None):
        self.network, self.taps, self.cache, self.window = head, head.taps, head.new_cache(0), window
        self.ids = head.to_target(torch.arange(head.config.draft_vocab_size, device=head.d2t.device))

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens of the text, or fewer; returns how many are still known."""
        known = min(self.dropped + self.cache.length, length - 1)   # row i also holds token i + 1
        if self.dropped and known - self.dropped < self.window:     # less than the window is left: start again
            known = self.dropped = 0
        self.cache.length = max(0, known - self.dropped)
        return self.dropped + self.cache.length

    def observe(self, features: Tensor, tokens: Tensor) -> None:
        """Read m newly committed positions: tokens [1, m + 1], those and the next root;
        features [1, m, 3H] of the target."""
        self.read(tokens[:, 1:], self.network.fc(features))
        if self.window and self.cache.length > 2 * self.window:
            self.dropped += self.cache.length - self.window
            self.cache.drop(self.cache.length - self.window)

    @staticmethod
    def run(head: Eagle3, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: KVCache,
            mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return head(tokens, hidden, positions, cache, mask, last_only=mask is None)


class ModelDrafter(Drafter):
    """Drafts with a whole smaller model of the target's vocabulary. Row i of its cache holds token i,
    the root included."""

    def __init__(self, model: Model):
        self.network, self.cache = model, model.new_cache(0)
        self.ids = torch.arange(model.config.vocab_size, device=model.device)

    def rewind(self, length: int) -> int:
        self.cache.length = min(self.cache.length, length)
        return max(0, self.cache.length - 1)  # the last token read is a root to `observe`

    def observe(self, features: Tensor | None, tokens: Tensor) -> None:
        unread = tokens[:, min(1, self.cache.length):]                             # the first was the root last time
        self.read(unread, torch.empty(*unread.shape, 0, device=unread.device))

    @staticmethod
    def run(model: Model, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: KVCache,
            mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """A model needs no feature from the step above, so `hidden` [1, n, 0] goes through empty."""
        return model(tokens, positions, cache, mask, last_only=mask is None)[0], hidden


# --------------------------------------------------------------------------------------------------------- generation

class State:
    """What outlives a generation: the KV caches and the tokens they stand for, and the two stores. Pass one state to
    several calls of `generate` and a conversation prefills only what is new: what its drafter has not read is read
    again, so give none to a method that does not draft."""

    def __init__(self, model: Model, drafter: Drafter | None = None, adjacency: AdjacencyMatrix | None = None,
                 ngrams: NGramIndex | None = None):
        self.cache = model.new_cache(0)
        self.tokens: list[int] = []                    # one for each committed row of the cache
        self.drafter = drafter
        if hasattr(drafter, "share"):                  # one that drafts with the target's own layers uses its cache
            drafter.share(self.cache)
        self.adjacency = adjacency or AdjacencyMatrix(model.config.vocab_size)
        self.ngrams = ngrams or NGramIndex()

    def rewind(self, prompt: list[int]) -> int:
        """Keep the rows that `prompt` shares with what is cached, but never all of it: the last token must be read
        again. Returns how many tokens the two texts share; the drafter may know fewer, and then so does the cache."""
        shared = 0
        while shared < min(len(self.tokens), len(prompt) - 1) and self.tokens[shared] == prompt[shared]:
            shared += 1
        known = self.drafter.rewind(shared) if self.drafter else shared
        self.cache.length, self.tokens = known, self.tokens[:known]
        return shared


class Sequence:
    """One text on its way: prompt, settings, state, and what came of them so far. Raises ValueError on an empty prompt,
    one longer than the context or of another vocabulary, or a method that needs a draft head there is not.

    progress: called while the prompt is read, with (tokens read, tokens in all)."""

    def __init__(self, model: Model, prompt: list[int], config: GraftConfig, state: State | None = None,
                 stopped: Callable[[list[int]], bool] | None = None,
                 progress: Callable[[int, int], None] = lambda read, total: None):
        vocab, self.limit = model.config.vocab_size, model.config.max_position_embeddings
        self.prompt, self.config, self.method, self.stopped, self.progress = (
            prompt, config, METHODS[config.method], stopped, progress)
        self.state = state or State(model)
        self.drafter = self.state.drafter if self.method.draft else None
        if not prompt:
            raise ValueError("the prompt is empty; expected at least one token")
        if len(prompt) >= self.limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context holds {self.limit}, "
                             f"so at most {self.limit - 1} are accepted")
        if not all(0 <= token < vocab for token in prompt):
            raise ValueError(f"the prompt holds a token id outside the model's vocabulary of {vocab}: "
                             "tokenizer of another model?")
        if self.method.draft and self.drafter is None:
            raise ValueError(f"method '{config.method}' needs a draft head; give one, or use ar or retrieve")
        self.eos = set(model.config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids)
        self.sampler = Sampler(config, vocab, model.device, model.kernels)
        self.stats, self.output = Stats(prompt_tokens=len(prompt)), []

    @property
    def root(self) -> int:
        return self.output[-1]

    @property
    def room(self) -> int:
        """How deep a guess below the root can still count."""
        return min(self.config.max_new_tokens, self.limit - len(self.prompt)) - len(self.output) - 1

    def commit(self, tree: Tree | None, path: list[int], token: int) -> Round:
        """Add the accepted nodes and the target's own token; cut where plain decoding would have
        stopped, and say why."""
        tokens = [tree.tokens[node] for node in path[1:]] + [token]
        sources = [tree.sources[node] for node in path[1:]] + [TARGET]
        for i, token in enumerate(tokens):
            self.output.append(token)
            self.stats.finish = ("eos" if token in self.eos else
                                 "stop" if self.stopped and self.stopped(self.output) else
                                 "length" if len(self.output) == self.config.max_new_tokens else
                                 "context" if len(self.prompt) + len(self.output) >= self.limit else "")
            if self.stats.finish:
                tokens, sources = tokens[:i + 1], sources[:i + 1]
                break
        self.sampler.read(tokens)
        self.stats.tokens += len(tokens)
        self.stats.rounds += tree is not None
        self.stats.accepted.update(sources)
        return Round(tokens, sources, tree, path[:len(tokens) + 1], self.stats)


def generate(model: Model, prompt: list[int], config: GraftConfig = GraftConfig(), *, state: State | None = None,
             stopped: Callable[[list[int]], bool] | None = None) -> Iterator[Round]:
    """Continue `prompt`; yield one Round after prefill and one for each round of verification.

    state: carries the draft head (`State(model, EagleDrafter(head))`), caches and stores. stopped: asked after
    every token with all new tokens so far, for stop strings. The output ends behind the first eos token, where
    `stopped` says so, at max_new_tokens, or where the context is full: exactly where plain decoding would end.
    Raises what `Sequence` does.
    """
    for _, step in run_rounds(model, [Sequence(model, prompt, config, state, stopped)]):
        yield step


def generate_batch(model: Model, prompts: list[list[int]], config: GraftConfig = GraftConfig(), *,
                   states: list[State] | None = None) -> Iterator[tuple[int, Round]]:
    """Continue several prompts side by side; yields (which prompt, its Round). Each has its own tree, caches and stores
    and gets the text it would get alone; one forward of the target verifies all trees, and a sequence that has ended is
    in none. Raises ValueError where prompts share a state."""
    states = states or [State(model) for _ in prompts]
    own = [each for state in states for each in (state, state.drafter) if each]
    if len(set(map(id, own))) < len(own):
        raise ValueError("states: two prompts share a State, or a drafter; expected one of its own for each")
    return run_rounds(model, [Sequence(model, prompt, config, state)
                              for prompt, state in zip(prompts, states, strict=True)])


@torch.inference_mode()
def run_rounds(model: Model, sequences: list[Sequence],
               own_verify: Callable | None = None) -> Iterator[tuple[int, Round]]:
    """The loop. A variant may pass its own `verify`."""
    for i, sequence in enumerate(sequences):
        yield i, prefill(model, sequence)
    while running := [i for i, sequence in enumerate(sequences) if not sequence.stats.finish]:
        trees = []
        for sequence in (sequences[i] for i in running):
            tree = draft_and_prune(sequence)
            branches = retrieve(sequence, tree)
            trees.append(graft(sequence, tree, branches))
        verified = (own_verify or verify)(model, [sequences[i] for i in running], trees)
        for i, tree, (path, picks, logits, features) in zip(running, trees, verified):
            step = sequences[i].commit(tree, path, picks[path[-1]])
            update(sequences[i], tree, path, picks, logits, features)
            yield i, step


def prefill(model: Model, sequence: Sequence) -> Round:
    """Read the prompt in chunks, as far as it is not cached; the target's first token becomes the root."""
    prompt, state, drafter, sampler = sequence.prompt, sequence.state, sequence.drafter, sequence.sampler
    chunk = sequence.config.prefill_chunk
    with sequence.stats.clock("prefill"):
        shared = state.rewind(prompt)
        state.cache.reserve(len(prompt) + 1)
        # what it holds already would vote twice
        state.ngrams.append([-1, *prompt[max(0, shared - state.ngrams.longest):]])
        sampler.read(prompt)
        ids = torch.tensor(prompt, device=model.device)
        start = len(state.tokens)
        while start < len(prompt):
            end = min((start // chunk + 1) * chunk, len(prompt))  # at multiples: see model.by_products
            positions = torch.arange(start, end, device=model.device)[None]
            logits, features = model(ids[None, start:end], positions, state.cache,
                                     taps=drafter.taps if drafter else (), last_only=True)
            state.cache.commit(list(range(end - start)))
            following = prompt[end] if end < len(prompt) else sampler.pick(logits[0], Tree.rooted(prompt[-1]))[0]
            if drafter:
                drafter.observe(features, torch.tensor([prompt[start:end] + [following]], device=model.device))
            start = end
            sequence.progress(end, len(prompt))
        state.tokens = list(prompt)
        state.ngrams.append([following])
    return sequence.commit(None, [], following)


def draft_and_prune(sequence: Sequence) -> Tree:
    """Steps 1 and 2. Draft step by step; where confidence c_d = exp(max S_d) falls below tau_d,
    stop and keep that stage's share."""
    config, method, stats = sequence.config, sequence.method, sequence.stats
    with stats.clock("draft"):
        if not sequence.drafter:
            return Tree.rooted(sequence.root)
        stages = dict(zip(config.checkpoints, zip(config.thresholds, config.retained))) if method.prune else {}
        share, stage, seen = UNPRUNED if method.retrieve and not method.prune else 1.0, "full", 1
        for step, tree in enumerate(
                sequence.drafter.expand(sequence.root, config.depth, config.draft_top_k, sequence.sampler)):
            newest, seen = tree.scores[seen:], len(tree)
            if step in stages and math.exp(max(newest)) < stages[step][0]:
                share, stage = stages[step][1], str(step)
                break
        stats.stages[stage] += 1
        return tree.top(max(int(share > 0), round(share * config.budget)))


def retrieve(sequence: Sequence, tree: Tree) -> list[tuple[int, str, Branch]]:
    """Step 3. Branches from the n-gram index and the adjacency matrix, from the root and from the
    likeliest draft nodes."""
    config, state, method = sequence.config, sequence.state, sequence.method
    with sequence.stats.clock("retrieve"):
        free = config.budget if config.priced else config.budget + 1 - len(tree)
        if not method.retrieve or free < 1:
            return []
        nodes = ([i for i in tree.leaves() if i] if method.anchors == "leaves" else
                 range(1, len(tree)) if method.anchors == "all" else ())
        anchors = tree.best(nodes, config.graft_anchors)
        if method.anchors != "leaves" or not anchors:
            anchors = [0, *anchors]
        branches = []
        if config.ngrams:
            # an unlikelier node would not pay by itself; where tokens are sampled, the noise may yet favour it
            least = -math.inf if config.temperature else config.least
            for node in anchors:
                path = tuple(tree.tokens[i] for i in tree.path(node))
                branches.append((node, NGRAM, state.ngrams.propose(free, path, least=least - tree.scores[node])))
        if config.adjacency:
            size = max(1, free // len(anchors)) if config.priced else free  # the template's last nodes would not pay
            found = state.adjacency.propose([tree.tokens[node] for node in anchors], size)
            branches += [(node, ADJACENCY, branch) for node, branch in zip(anchors, found)]
        leaning = sequence.sampler.lean_branches([branch for _, _, branch in branches],
                                                 [tree.depths[node] for node, _, _ in branches])
        # Where the head has proposed other tokens, it is less likely that a retrieved one is right.
        expanded, doubt = set(tree.parents), {NGRAM: math.log(config.trust[0]), ADJACENCY: math.log(config.trust[1])}
        return [(node, source,
                 (tokens, parents, [score + doubt[source] for score in scores] if node in expanded else scores))
                for (node, source, _), (tokens, parents, scores) in zip(branches, leaning)]


def graft(sequence: Sequence, tree: Tree, branches: list[tuple[int, str, Branch]]) -> Tree:
    """Step 4. Merge what was retrieved into the freed slots and mix the chances. Where prices are known, drafted and
    retrieved nodes compete, and only those likely enough to pay are kept (ours)."""
    config, stats = sequence.config, sequence.stats
    with stats.clock("graft"):
        stats.merged += tree.graft(branches, len(tree) - 1 + config.budget if config.priced else config.budget,
                                   config.merge)
        tree = tree.within(sequence.room)
        if config.priced:
            tree = tree.worth(config.verify_cost)
        stats.nodes.update(tree.sources[1:])
        return tree


def verify(model: Model, sequences: list[Sequence],
           trees: list[Tree]) -> list[tuple[list[int], list[int], Tensor, Tensor | None]]:
    """Step 5. One target forward over the roots and nodes of all sequences, then each one's acceptance walk.

    Returns, for each, the accepted nodes, the target's token after each node [n], logits [n, V] and
    features [1, n, 3H]."""
    begin, device, sizes = time.perf_counter(), model.device, [len(tree) for tree in trees]
    caches = [sequence.state.cache for sequence in sequences]
    for cache, size in zip(caches, sizes):
        cache.reserve(cache.length + size)
    tokens = torch.tensor([[token for tree in trees for token in tree.tokens]], device=device)
    positions = torch.tensor([[cache.length + depth for tree, cache in zip(trees, caches) for depth in tree.depths]],
                             device=device)
    masks = [tree.mask(device) if len(tree) > 1 else None for tree in trees]
    cache, mask = (caches[0], masks[0]) if len(trees) == 1 else (PackedCache(caches, sizes), masks)
    taps = sequences[0].drafter.taps if sequences[0].drafter else ()
    logits, features = model(tokens, positions, cache, mask, taps=taps)
    features = features.split_with_sizes(sizes, dim=1) if taps else [None] * len(trees)
    verified = []
    for sequence, tree, own, feature in zip(sequences, trees, logits[0].split_with_sizes(sizes), features):
        picks = sequence.sampler.pick(own, tree)
        verified.append((tree.accept(picks), picks, own, feature))
    for sequence in sequences:
        sequence.stats.seconds["verify"] += (time.perf_counter() - begin) / len(sequences)
    return verified


def update(sequence: Sequence, tree: Tree, path: list[int], picks: list[int], logits: Tensor,
           features: Tensor | None) -> None:
    """Step 6. Keep the accepted path's rows, teach both stores, and let the drafter read what was committed."""
    state = sequence.state
    read = [tree.tokens[node] for node in path]
    with sequence.stats.clock("update"):
        state.cache.commit(path)
        state.tokens += read
        state.ngrams.append(read[1:] + [picks[path[-1]]])
        if sequence.method.retrieve and sequence.config.adjacency:
            state.adjacency.update(torch.tensor(tree.tokens), logits,
                                   compiled_top(sequence.sampler.kernels, logits) or torch.topk)
    if sequence.drafter:
        with sequence.stats.clock("draft"):
            features = features[:, path] if features is not None else None
            sequence.drafter.observe(features, torch.tensor([read + [picks[path[-1]]]], device=logits.device))
