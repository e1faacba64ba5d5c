"""Graft: speculative decoding that prunes a draft tree and grafts retrieved branches into the freed budget.

After Shen et al., "Draft Less, Retrieve More: Hybrid Tree Construction for Speculative Decoding", arXiv 2605.20104. One loop
serves every method; they differ in which steps of a round they take (`METHODS`). Greedy output is that of plain decoding,
token by token: the tree decides only how many tokens a round commits, never which.

Letters in shapes: n nodes with the root, m accepted nodes, V vocabulary, H hidden size.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Eagle3, KVCache, Model
from retrieval import AdjacencyMatrix, NGramIndex
from tree import ADJACENCY, NGRAM, TARGET, Tree


@dataclass(frozen=True)
class Method:
    """Which steps a round takes, and where retrieved branches may start: at the root, at the draft's leaves, or anywhere.
    `prune` stops drafting early and, where prices are known, verifies only the nodes that pay."""

    draft: bool = False
    prune: bool = False
    retrieve: bool = False
    anchors: str = "all"


METHODS = {
    "ar": Method(),                                                                 # plain decoding
    "retrieve": Method(prune=True, retrieve=True),                                  # no draft head
    "eagle": Method(draft=True),                                                    # full tree, no retrieval
    "prune": Method(draft=True, prune=True),                                        # pruned, not refilled
    "graft": Method(draft=True, prune=True, retrieve=True),
    "graft_root": Method(draft=True, retrieve=True, anchors="root"),                # ablation: no pruning, grafts at the root
    "graft_unpruned": Method(draft=True, retrieve=True),                            # ablation: no pruning, grafts anywhere
    "graft_tail": Method(draft=True, prune=True, retrieve=True, anchors="leaves"),  # ablation: grafts only extend the draft
}
UNPRUNED = 2 / 3   # the budget's share that a draft keeps which is grafted to without having been pruned: the paper's 40 of 60


@dataclass(frozen=True)
class GraftConfig:
    """Everything that decides what a generation does. Budgets count nodes without the root (EAGLE's code counts it)."""

    method: str = "graft"
    max_new_tokens: int = 256
    budget: int = 60                             # K_max
    depth: int = 7                               # expansion steps behind the root's own children
    top_k: int = 10                              # children a node, and nodes expanded a step
    checkpoints: tuple[int, ...] = (0, 1, 5)     # expansion steps d after which confidence is checked
    thresholds: tuple[float, ...] = (0.4, 0.3, 0.1)   # tau_d: stop drafting where exp(max S_d) is below
    retained: tuple[float, ...] = (8 / 60, 24 / 60, 40 / 60)   # the budget's share that a stage's draft keeps
    sure: float = 1.0                            # n-gram probability from which the root's children are draft enough (ours)
    verify_cost: tuple[float, ...] = ()          # price of verifying n = 0, 1, ... nodes, in tokens; empty: the budget decides alone
    trust: tuple[float, float] = (1.0, 1.0)      # factors on the probability of n-gram and adjacency nodes beside the head's own
    graft_anchors: int = 4                       # draft nodes, besides the root, that retrieval may continue
    adjacency: bool = True
    ngrams: bool = True
    prefill_chunk: int = 256
    temperature: float = 0.0                     # 0: greedy
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None   # None: the model's own

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        for name, low, high in (("max_new_tokens", 1, 2**31), ("budget", 1, 1024), ("depth", 0, 64), ("top_k", 1, 64),
                                ("graft_anchors", 0, 64), ("prefill_chunk", 1, 2**20), ("seed", 0, 2**40)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature <= 100):
            raise ValueError(f"temperature is {self.temperature!r}; expected a number from 0 to 100")
        if not len(self.checkpoints) == len(self.thresholds) == len(self.retained):
            raise ValueError(f"checkpoints, thresholds and retained have lengths {len(self.checkpoints)}, {len(self.thresholds)} "
                             f"and {len(self.retained)}; expected one length")
        if list(self.checkpoints) != sorted(set(self.checkpoints)) or any(d < 0 for d in self.checkpoints):
            raise ValueError(f"checkpoints is {self.checkpoints}; expected rising expansion steps from 0")
        if self.verify_cost and len(self.verify_cost) != self.budget + 1:
            raise ValueError(f"verify_cost has {len(self.verify_cost)} entries; expected none or one for each of 0 to {self.budget} nodes")
        if len(self.trust) != 2 or not all(0 < factor <= 1 for factor in self.trust):
            raise ValueError(f"trust is {self.trust}; expected two numbers above 0, at most 1")
        if not 0 <= self.sure <= 1:
            raise ValueError(f"sure is {self.sure}; expected a number from 0 to 1")
        for name in ("thresholds", "retained"):
            if not all(0 <= value <= 1 for value in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected numbers from 0 to 1")


@dataclass
class Stats:
    """What a generation did so far."""

    prompt_tokens: int = 0
    tokens: int = 0                                                # committed, cut as plain decoding would be
    rounds: int = 0                                                # verification forwards; prefill, which gives the first token, is none
    nodes: Counter = field(default_factory=Counter)                # verified nodes by source
    merged: int = 0                                                # retrieved nodes that were in the tree already, and cost nothing
    accepted: Counter = field(default_factory=Counter)             # committed tokens by source
    stages: Counter = field(default_factory=Counter)               # rounds by the checkpoint that stopped drafting, or "full"
    seconds: Counter = field(default_factory=Counter)              # by step
    finish: str = ""                                               # eos, stop, length or context

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


# ------------------------------------------------------------------------------------------------------------ drafter

class EagleDrafter:
    """Grows a tree from an EAGLE-3 head. Any object with `taps`, `observe`, `expand` and `rewind` can stand in its place."""

    def __init__(self, head: Eagle3):
        self.head, self.taps = head, head.taps
        self.cache: KVCache = head.new_cache(0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self.cache.length = min(self.cache.length, length)

    def observe(self, features: Tensor, tokens: Tensor) -> None:
        """Read newly committed positions: the target's features [1, m, 3H] and, for each, the token after it [1, m]."""
        count = tokens.shape[1]
        start = self.cache.length
        self.cache.reserve(_roomy(start + count + 1))
        positions = torch.arange(start, start + count, device=tokens.device)[None]
        logits, hidden = self.head(tokens, self.head.fc(features), positions, self.cache)
        self.cache.commit(list(range(count)))
        self.logits, self.hidden = logits[:, -1], hidden[:, -1:]

    def expand(self, root: int, depth: int, top_k: int) -> Iterator[Tree]:
        """Yield the tree after expansion step 0 (the root's children), 1, ... `depth`; whoever stops asking stops drafting."""
        tree, length = Tree.rooted(root), self.cache.length
        self.cache.reserve(_roomy(length + depth * top_k))
        try:
            logprobs, tokens = self._children(self.logits, top_k)
            frontier = tree.expand([0], tokens, logprobs)
            hidden = self.hidden.expand(1, len(frontier), -1)                     # children share their parent's feature
            seen = torch.zeros(len(frontier), 0, dtype=torch.bool, device=hidden.device)   # [frontier, draft rows so far]
            yield tree
            for step in range(1, depth + 1):
                seen = torch.cat((seen, torch.eye(len(frontier), dtype=torch.bool, device=seen.device)), dim=1)
                committed = torch.ones(len(frontier), length, dtype=torch.bool, device=seen.device)
                positions = torch.full((1, len(frontier)), length + step - 1, device=seen.device)
                ids = torch.tensor([[tree.tokens[node] for node in frontier]], device=seen.device)
                logits, out = self.head(ids, hidden, positions, self.cache, torch.cat((committed, seen), dim=1))
                self.cache.commit(list(range(len(frontier))))
                logprobs, tokens = self._children(logits[0], top_k)
                grown = tree.best(tree.expand(frontier, tokens, logprobs), top_k)
                row = {node: i for i, node in enumerate(frontier)}
                above = torch.tensor([row[tree.parents[node]] for node in grown], device=seen.device)
                frontier, hidden, seen = grown, out[:, above], seen[above]
                yield tree
        finally:
            self.cache.length = length                                             # guesses are not kept

    def _children(self, logits: Tensor, top_k: int) -> tuple[list[list[float]], list[list[int]]]:
        """Log-probabilities and target ids of the top_k tokens for each row of logits [rows, draft V]."""
        values, ids = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
        return values.tolist(), self.head.to_target(ids).tolist()


def _roomy(rows: int) -> int:
    return -(-rows // 512) * 512   # caches grow in steps, so that a long generation copies them rarely


# --------------------------------------------------------------------------------------------------------- generation

class State:
    """What outlives a generation: the KV caches and the tokens they stand for, and the two stores. Pass one state to several
    calls of `generate` and a conversation prefills only what is new."""

    def __init__(self, model: Model, drafter: EagleDrafter | None = None, adjacency: AdjacencyMatrix | None = None,
                 ngrams: NGramIndex | None = None):
        self.cache = model.new_cache(0)
        self.tokens: list[int] = []                    # one for each committed row of the cache
        self.drafter = drafter
        self.adjacency = adjacency or AdjacencyMatrix(model.config.vocab_size, device=model.device)
        self.ngrams = ngrams or NGramIndex()

    def rewind(self, prompt: list[int]) -> None:
        """Keep the rows that `prompt` shares with what is cached, but never all of it: the last token must be read again."""
        shared = 0
        while shared < min(len(self.tokens), len(prompt) - 1) and self.tokens[shared] == prompt[shared]:
            shared += 1
        if self.drafter and shared < len(prompt):
            shared = max(0, min(shared - 1, self.drafter.cache.length))    # its row i also holds token i + 1
            self.drafter.rewind(shared)
        self.cache.length, self.tokens = shared, self.tokens[:shared]


@torch.inference_mode()
def generate(model: Model, prompt: list[int], config: GraftConfig = GraftConfig(), *, state: State | None = None,
             stopped: Callable[[list[int]], bool] | None = None) -> Iterator[Round]:
    """Continue `prompt`; yield one Round after prefill and one for each round of verification.

    state: carries the draft head (`State(model, EagleDrafter(head))`), caches and stores. stopped: asked after every token
    with all new tokens so far, for stop strings. The output ends behind the first eos token, where `stopped` says so, at
    max_new_tokens, or where the context is full: exactly where plain decoding would end.
    Raises ValueError on an empty prompt, one longer than the context, or a method that needs a head there is not.
    """
    method, limit = METHODS[config.method], model.config.max_position_embeddings
    state = state or State(model)
    drafter = state.drafter if method.draft else None
    _check(model, prompt, config, state, limit)
    eos = set(model.config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids)
    stats, output = Stats(prompt_tokens=len(prompt)), []

    def commit(tokens: list[int]) -> list[int]:
        """Cut where plain decoding would have stopped, and say why in stats.finish."""
        for i, token in enumerate(tokens):
            output.append(token)
            stats.finish = ("eos" if token in eos else "stop" if stopped and stopped(output) else
                            "length" if len(output) == config.max_new_tokens else
                            "context" if len(prompt) + len(output) >= limit else "")
            if stats.finish:
                tokens = tokens[:i + 1]
                break
        stats.tokens += len(tokens)
        return tokens

    with stats.clock("prefill"):
        root = prefill(model, prompt, config, state, drafter)
    tokens = commit([root])
    stats.accepted[TARGET] += 1
    yield Round(tokens, [TARGET], None, [], stats)
    while not stats.finish:
        room = min(config.max_new_tokens - len(output), limit - len(prompt) - len(output)) - 1   # no use in deeper guesses
        tree = draft_and_prune(root, config, method, state, drafter, stats)
        branches = retrieve(tree, config, method, state, stats)
        tree = graft(tree, branches, config, method, room, stats)
        path, picks, logits, features = verify(model, tree, config, state, drafter, stats)
        accepted = commit([tree.tokens[node] for node in path[1:]] + [picks[path[-1]]])
        update(tree, path, picks, logits, features, method, state, drafter, stats)
        root = picks[path[-1]]
        sources = ([tree.sources[node] for node in path[1:]] + [TARGET])[:len(accepted)]
        stats.rounds += 1
        stats.accepted.update(sources)
        yield Round(accepted, sources, tree, path, stats)


def choose(logits: Tensor, depths: list[int], position: int, config: GraftConfig) -> list[int]:
    """The target's token after each node: logits [n, V], for text position `position` + depth. Greedy, or a sample by the
    Gumbel-max trick whose noise depends on (seed, position) alone: plain and speculative decoding pick the same tokens."""
    if not config.temperature:
        return logits.max(-1).indices.tolist()   # in bfloat16 four times as fast as argmax
    noise = {}
    for depth in set(depths):   # on the CPU, so that a seed means the same on every device
        generator = torch.Generator().manual_seed(config.seed * 2**23 + position + depth)
        exponential = torch.empty(logits.shape[-1], dtype=torch.float64).exponential_(generator=generator)
        noise[depth] = -exponential.log().to(logits.device)
    return (logits.double() / config.temperature + torch.stack([noise[depth] for depth in depths])).argmax(-1).tolist()


def prefill(model: Model, prompt: list[int], config: GraftConfig, state: State, drafter: EagleDrafter | None) -> int:
    """Read the prompt in chunks, as far as it is not cached; return the target's first token, which becomes the root."""
    state.rewind(prompt)
    state.cache.reserve(_roomy(len(prompt) + 1))
    state.ngrams.append([-1, *prompt])
    ids = torch.tensor(prompt, device=model.device)
    start = len(state.tokens)
    while start < len(prompt):
        end = min(start + config.prefill_chunk, len(prompt))
        positions = torch.arange(start, end, device=model.device)[None]
        logits, features = model(ids[None, start:end], positions, state.cache, taps=drafter.taps if drafter else (), last_only=True)
        state.cache.commit(list(range(end - start)))
        root = choose(logits[0], [0], end, config)[0]
        if drafter:
            following = prompt[start + 1:end] + [prompt[end] if end < len(prompt) else root]
            drafter.observe(features, torch.tensor([following], device=model.device))
        start = end
    state.tokens = list(prompt)
    state.ngrams.append([root])
    return root


def draft_and_prune(root: int, config: GraftConfig, method: Method, state: State, drafter: EagleDrafter | None, stats: Stats) -> Tree:
    """Steps 1 and 2. Draft step by step; where confidence c_d = exp(max S_d) falls below tau_d, stop and keep that stage's share.
    Where the n-gram index is sure of what follows, do not draft beyond the root's children (ours)."""
    with stats.clock("draft"):
        if not drafter:
            return Tree.rooted(root)
        share, stage = UNPRUNED if method.retrieve and not method.prune else 1.0, "full"
        depth, seen = config.depth, 1
        if method.prune and method.retrieve and config.ngrams and config.sure < 1:
            _, _, scores = state.ngrams.propose(1)
            if scores and math.exp(scores[0]) >= config.sure:
                depth, stage = 0, "sure"
        for step, tree in enumerate(drafter.expand(root, depth, config.top_k)):
            newest, seen = tree.scores[seen:], len(tree)
            if method.prune and step in config.checkpoints:
                which = config.checkpoints.index(step)
                if math.exp(max(newest)) < config.thresholds[which]:
                    share, stage = config.retained[which], str(step)
                    break
        stats.stages[stage] += 1
        return tree.top(max(1, round(share * config.budget)))


def retrieve(tree: Tree, config: GraftConfig, method: Method, state: State, stats: Stats) -> list:
    """Step 3. Branches from the n-gram index and the adjacency matrix, from the root and from the likeliest draft nodes."""
    with stats.clock("retrieve"):
        free = config.budget if priced(config, method) else config.budget + 1 - len(tree)
        if not method.retrieve or free < 1:
            return []
        nodes = {"all": range(1, len(tree)), "leaves": [i for i in tree.leaves() if i], "root": ()}[method.anchors]
        anchors = tree.best(list(nodes), config.graft_anchors)
        if method.anchors != "leaves" or not anchors:
            anchors = [0, *anchors]
        branches = []
        if config.ngrams:
            for node in anchors:
                path = tuple(tree.tokens[i] for i in tree.path(node))
                branches.append((node, NGRAM, state.ngrams.propose(free, path)))
        if config.adjacency:
            found = state.adjacency.propose([tree.tokens[node] for node in anchors], free)
            branches += [(node, ADJACENCY, branch) for node, branch in zip(anchors, found)]
        # Where the head has proposed other tokens, it is less likely that a retrieved one is right.
        expanded, doubt = set(tree.parents), {NGRAM: math.log(config.trust[0]), ADJACENCY: math.log(config.trust[1])}
        return [(node, source, (tokens, parents, [score + doubt[source] for score in scores] if node in expanded else scores))
                for node, source, (tokens, parents, scores) in branches]


def priced(config: GraftConfig, method: Method) -> bool:
    return method.prune and bool(config.verify_cost)


def graft(tree: Tree, branches: list, config: GraftConfig, method: Method, room: int, stats: Stats) -> Tree:
    """Step 4. Merge what was retrieved into the freed slots; `room` is how many tokens may still follow the root. Where prices
    are known, drafted and retrieved nodes compete, and only those likely enough to pay are kept (ours)."""
    with stats.clock("graft"):
        stats.merged += tree.graft(branches, len(tree) - 1 + config.budget if priced(config, method) else config.budget)
        tree = tree.within(max(room, 0))
        if priced(config, method):
            tree = tree.worth(config.verify_cost)
        stats.nodes.update(tree.sources[1:])
        return tree


def verify(model: Model, tree: Tree, config: GraftConfig, state: State, drafter: EagleDrafter | None, stats: Stats):
    """Step 5. One target forward over root and nodes, then the acceptance walk.

    Returns the accepted nodes, the target's token after each node [n], logits [n, V] and features [1, n, 3H]."""
    with stats.clock("verify"):
        device, length = model.device, state.cache.length
        state.cache.reserve(_roomy(length + len(tree)))
        tokens = torch.tensor([tree.tokens], device=device)
        mask = tree.mask(length, device) if len(tree) > 1 else None
        logits, features = model(tokens, tree.positions(length, device)[None], state.cache, mask,
                                 taps=drafter.taps if drafter else ())
        picks = choose(logits[0], tree.depths, length + 1, config)
        return tree.accept(picks), picks, logits[0], features


def update(tree: Tree, path: list[int], picks: list[int], logits: Tensor, features: Tensor | None, method: Method,
           state: State, drafter: EagleDrafter | None, stats: Stats) -> None:
    """Step 6. Keep the accepted path's rows, teach both stores, and let the head read what was committed."""
    with stats.clock("update"):
        following = [tree.tokens[node] for node in path[1:]] + [picks[path[-1]]]
        state.cache.commit(path)
        state.tokens += [tree.tokens[node] for node in path]
        state.ngrams.append(following)
        if method.retrieve:
            state.adjacency.update(torch.tensor(tree.tokens, device=logits.device), logits)
    if drafter:
        with stats.clock("draft"):
            drafter.observe(features[:, path], torch.tensor([following], device=logits.device))


def _check(model: Model, prompt: list[int], config: GraftConfig, state: State, limit: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty; expected at least one token")
    if len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context holds {limit}, so at most {limit - 1} are accepted")
    vocab = model.config.vocab_size
    if not all(0 <= token < vocab for token in prompt):
        raise ValueError(f"the prompt holds a token id outside the model's vocabulary of {vocab}: tokenizer of another model?")
    if METHODS[config.method].draft and state.drafter is None:
        raise ValueError(f"method '{config.method}' needs a draft head; give one, or use ar or retrieve")
