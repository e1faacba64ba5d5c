"""A block drafter that guesses all of a block's tokens in one forward: methods `dflash`, `dflash_graft_tail` and
`dflash_graft`.

    python run.py "Why is the sky blue?" --method dflash_graft --draft FOLDER
    python run.py "Hello" --model Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16 --method dflash_graft
    python tools/train_dflash.py --out FOLDER                       how to make one for the demo model or another target

Source: DFlash, "Block Diffusion for Flash Speculative Decoding", arXiv 2602.06036, and the layout of its published
checkpoints.
Changes: what drafts. The block is the root and B - 1 mask tokens; a few layers denoise it once, reading the target's
features of the committed text as keys and values of theirs. `dflash` verifies the likeliest token of each position, one
chain, as published; `dflash_graft_tail` keeps the chain's confident prefix and lets retrieval continue it (the Graft
paper's way); `dflash_graft` makes a tree of each position's likeliest tokens, which is then pruned, grafted and priced
as an EAGLE-3 tree is (ours).
Needs: a DFlash checkpoint for the target (`--draft`, folder or Hub id), full attention in all of its layers.
Guarantees: the output of plain decoding, as every method in graft.py.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from graft import Sampler  # noqa: E402
from kernels import kernels  # noqa: E402
from model import (BUCKETS, Captured, CheckpointError, KVCache, Layer, Linear, Model, ModelConfig,  # noqa: E402
                   RMSNorm, StaticCache)
from model import _Decoder, _draft_ids, _fill, _stacked, _Tensors, fetch_checkpoint, read_json  # noqa: E402
from tree import Tree  # noqa: E402

DEMO_DRAFT = ROOT / "assets" / "smollm2-135m-dflash"
CONFIDENT = 0.3             # `dflash_graft_tail` keeps the chain as far as its probability is at least this


def prepare(setup, method: str):
    """The fields of run.py's Plan. Raises ValueError where there is no drafter, CheckpointError where it is not
    usable."""
    if not setup.draft and not DEMO_DRAFT.is_dir():
        raise ValueError(f"method '{method}' needs a DFlash drafter; give --draft, or train one for the demo model: "
                         "python tools/train_dflash.py --out assets/smollm2-135m-dflash")
    net = _load(fetch_checkpoint(setup.draft or str(DEMO_DRAFT)), setup.model)
    if setup.model.kernels:
        net.kernels = kernels(net)
    steps = net.block_size - 1                            # positions of a block to guess; the first is expansion step 0
    if method == "dflash_graft":
        config = replace(setup.configure("graft"), depth=steps - 1)
        if config.priced:                 # drafting on costs nothing: a level is looked at while any node of it can pay
            least = min(1.0, math.exp(config.least))
            config = replace(config, checkpoints=tuple(range(steps)), thresholds=(least,) * steps,
                             retained=(1.0,) * steps)
    else:
        budget = min(steps, setup.base.budget)
        config = replace(setup.configure("graft_tail" if method == "dflash_graft_tail" else "eagle"), draft_top_k=1,
                         depth=steps - 1, adjacency=True, budget=budget, verify_cost=(),
                         checkpoints=tuple(range(steps)), thresholds=(CONFIDENT,) * steps,
                         retained=tuple(min(1.0, step / budget) for step in range(steps)))
    return config, lambda: DFlashDrafter(net, setup.model)


class DFlash(_Decoder):
    """The network: Qwen3 layers over a block whose attention also reads a context, the target's features. It shares the
    target's embeddings and head, and holds neither. With `d2t` [draft V] (ours, as EAGLE-3 heads have it: target id -
    draft id) it guesses only among these tokens, and so needs only their rows of the head."""

    def __init__(self, config: ModelConfig, taps: tuple[int, ...], block_size: int, mask_token_id: int, vocab: int = 0):
        super().__init__(config)
        if vocab:
            self.register_buffer("d2t", torch.zeros(vocab, dtype=torch.int64))
        self.ids: Tensor | None = None                                     # [draft V], where `load_dflash` found d2t
        self.head: Linear | None = None                                    # the rows of these
        H, eps = config.hidden_size, config.rms_norm_eps
        self.taps, self.block_size, self.mask_token_id = taps, block_size, mask_token_id
        self.fc = Linear(len(taps) * H, H)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.hidden_norm, self.norm = RMSNorm(H, eps), RMSNorm(H, eps)

    def read(self, features: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Write context into `cache` (which the caller commits): features [b, n, len(taps) * H] of the target,
        positions [b, n]."""
        x = self.hidden_norm(self.fc(features))
        if self.kernels and self.kernels.fit(x, None, cache):
            return self.kernels.read(x, positions, cache)
        rotary = self.rotary(positions, x.dtype)
        for layer in self.layers:
            _, rows = layer.self_attn.project(x, rotary)
            cache.write(layer.index, rows)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None = None) -> Tensor:
        """Embeddings x [b, n, H] of blocks at positions [b, n] -> what the target's head reads [b, n, H]. mask
        [b, n, m]: True = attend; None = every token sees the whole context and every other."""
        if self.kernels and mask is None and self.kernels.fit(x, mask, cache):
            return self.kernels(x, positions, None, cache)[1]
        rotary = self.rotary(positions, x.dtype)
        mask = None if mask is None else self.group(mask, x.shape[1], cache, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        return self.norm(x)


class Block:
    """A round of drafting over fixed buffers, on CUDA a graph: up to p rows of context are read, then the block behind
    them is guessed."""

    def __init__(self, drafter: "DFlashDrafter", p: int, m: int):
        # not the drafter: its cache holds this
        self.net, self.target, B, device = drafter.net, drafter.target, drafter.net.block_size, drafter.ids.device
        self.features = torch.zeros(1, p, self.net.fc.inputs, dtype=self.target.dtype, device=device)
        self.ids = torch.full((1, B), self.net.mask_token_id, device=device)       # the root goes first
        # the first row read, and how many count
        self.start, self.count = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.context, self.block = (StaticCache(drafter.cache, p, m),
                                    StaticCache(drafter.cache, B, m, compiled=self.net.compiled))
        self.seen = F.pad(torch.ones(B, B, dtype=torch.bool, device=device), (0, 1))
        self.captured = Captured(self.net, self.compute)

    def compute(self) -> Tensor:
        net, context, block = self.net, self.context, self.block
        # rows that do not count are overwritten by the block, or seen by nobody
        context.index = self.start + context.rows
        net.read(self.features, context.index[None], context)
        block.start = block.length = self.start + self.count
        return net(self.target.embed_tokens(self.ids), (block.length + block.rows)[None], block, self.seen)

    def __call__(self, features: Tensor, start: int, root: int) -> Tensor:
        count = features.shape[1]
        self.features[:, :count] = features
        self.ids[:, :1].fill_(root)
        self.start.fill_(start)
        self.count.fill_(count)
        return self.captured()


class DFlashDrafter:
    """Row i of its cache is the context that token i makes; a block's rows stand behind the committed ones and are
    never kept."""

    def __init__(self, net: DFlash, target: Model):
        self.net, self.target, self.taps = net, target, net.taps
        self.cache = net.new_cache(0)
        self.ids = torch.arange(target.config.vocab_size, device=target.device) if net.ids is None else net.ids
        self.unread: Tensor | None = None                                   # features that the next block's graph reads

    def rewind(self, length: int) -> int:
        self.read()
        self.cache.length = min(self.cache.length, length)
        return self.cache.length

    def observe(self, features: Tensor, tokens: Tensor) -> None:
        """Read features [1, m, len(taps) * H] of m newly committed positions; which tokens stood there does not
        matter."""
        self.read()
        self.unread = features
        if not self.net.replays(self.cache) or features.shape[1] > BUCKETS[-1]:
            self.read()

    def read(self) -> None:
        """Read now what is left to the next graph."""
        if self.unread is not None:
            start, count = self.cache.length, self.unread.shape[1]
            self.cache.reserve(start + count)
            self.net.read(self.unread, torch.arange(start, start + count, device=self.ids.device)[None], self.cache)
            self.cache.commit(list(range(count)))
            self.unread = None

    def guess(self, root: int, most: int) -> Tensor:
        """Logits [steps, draft V] of the tokens behind the root: all B - 1 that a block has, or the first `most`."""
        hidden = (self.run if self.unread is None else self.replay)(root)
        logits = (self.net.head or self.target.lm_head)(hidden[0, 1:most + 1])
        return logits if logits.shape[1] == len(self.ids) else logits[:, self.ids]

    def run(self, root: int) -> Tensor:
        """What the head reads at a block's positions [1, B, H]."""
        net, start, device = self.net, self.cache.length, self.ids.device
        self.cache.reserve(start + net.block_size)
        ids = torch.tensor([[root] + [net.mask_token_id] * (net.block_size - 1)], device=device)
        return net(self.target.embed_tokens(ids),
                   torch.arange(start, start + net.block_size, device=device)[None], self.cache)

    def replay(self, root: int) -> Tensor:
        """The same, behind what is left to read."""
        cache, count = self.cache, self.unread.shape[1]
        p = next(size for size in BUCKETS if size >= count)
        cache.reserve(cache.length + p + self.net.block_size)
        key = (id(self.net), "block", p, m := cache.span(p + self.net.block_size))
        if key not in cache.graphs:
            cache.graphs[key] = Block(self, p, m)
        hidden = cache.graphs[key](self.unread, cache.length, root)
        cache.commit(list(range(count)))
        self.unread = None
        return hidden

    def expand(self, root: int, depth: int, top_k: int, sampler: Sampler) -> Iterator[Tree]:
        """Yield the tree after each of a block's positions: a node at depth i + 1 holds one of the top_k tokens of
        position i and the product of its path's probabilities; the top_k likeliest nodes go on. top_k = 1 is the
        published chain."""
        rows = self.guess(root, depth + 1)
        parts = [rows] if sampler.plain else rows.split(1)       # where noise is known, it is another one at each depth
        found = [sampler.children(part, step, self.ids, top_k) for step, part in enumerate(parts)]
        values, ids = (torch.cat(each).tolist() for each in zip(*found))
        tree, frontier = Tree.rooted(root), [0]
        for tokens, logprobs in zip(ids, values):
            frontier = tree.best(tree.expand(frontier, [tokens] * len(frontier), [logprobs] * len(frontier)), top_k)
            yield tree


def stacked(config: ModelConfig) -> dict[str, dict[str, tuple]]:
    """Which published tensors make one of ours, as model._fill reads it."""
    return {name: parts for i in range(config.num_hidden_layers) for name, parts in
            _stacked(config, f"layers.{i}.", f"layers.{i}.", config.hidden_size, config.intermediate_size).items()}


def load_dflash(folder: str | Path, target: Model, *, pack: bool = True) -> DFlash:
    """Load a published DFlash checkpoint for `target`, in its dtype and on its device. Raises CheckpointError on a
    field or tensor that is missing, of another shape or unknown, and where the drafter belongs to another target."""
    folder, layers = Path(folder), target.config.num_hidden_layers
    config = replace(ModelConfig.read(folder, architectures=("DFlashDraftModel",)), qk_norm=True)
    path, count = folder / "config.json", config.num_hidden_layers
    raw = read_json(path)
    own = raw.get("dflash_config") or {}
    raw |= own if isinstance(own, dict) else {}                    # newer checkpoints have its fields beside the others
    spread = [layers // 2] if count == 1 else [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]
    taps = raw["target_layer_ids"] = raw.get("target_layer_ids", spread)
    whole = lambda value, low, high: type(value) is int and low <= value <= high
    H, V = target.config.hidden_size, target.config.vocab_size
    checks = [("dflash_config", isinstance(own, dict), "a JSON object"),
              ("vocab_size", config.vocab_size == V, f"{V}, as the target has"),
              ("hidden_size", config.hidden_size == H, f"{H}, as the target has"),
              ("num_target_layers", raw.get("num_target_layers", layers) == layers, f"{layers}, as the target has"),
              ("block_size", whole(raw.get("block_size"), 2, 64), "a whole number from 2 to 64"),
              ("mask_token_id", whole(raw.get("mask_token_id"), 0, V - 1), f"a token id from 0 to {V - 1}"),
              ("target_layer_ids",
               isinstance(taps, list) and bool(taps) and all(whole(tap, -1, layers - 1) for tap in taps),
               f"a list of layer numbers from -1 to {layers - 1}")]
    checks += [(name, raw.get(name) in (None, accepted), f"{accepted}; nothing else is supported") for name, accepted in
               (("layer_types", ["full_attention"] * count), ("is_causal", False), ("input_embedding_scale", 1.0),
                ("output_multiplier", 1.0), ("final_logit_softcapping", 0.0))]
    for name, good, expected in checks:
        if not good:
            raise CheckpointError(f"{path}: field '{name}' is {raw.get(name)!r:.80}; expected {expected}")
    tensors = _Tensors(folder)
    with torch.device("meta"):
        net = DFlash(config, tuple(taps), raw["block_size"], raw["mask_token_id"],
                     math.prod(tensors.shapes.get("d2t", (0,))))
    _fill(net, tensors, stacked(config), target.dtype, target.device,
          {name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq")}, pack,
          products=target.products)
    net.graphs, net.compiled = target.graphs, target.compiled
    if hasattr(net, "d2t"):
        net.ids = _draft_ids(net.d2t, V, tensors)
        if target.config.tie_word_embeddings:                           # a packed head shows no rows, the embeddings do
            net.head = Linear(H, len(net.ids))
            net.head.weight = nn.Parameter(target.embed_tokens.weight[net.ids], requires_grad=False)
            net.head.pack(target.products)
    return net


_load = lru_cache(maxsize=1)(load_dflash)                       # the three methods of one benchmark share their weights
