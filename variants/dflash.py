"""A block drafter that guesses all of a block's tokens in one forward: methods `dflash`, `dflash_graft_tail` and `dflash_graft`.

    python run.py "Why is the sky blue?" --method dflash_graft --draft FOLDER
    python run.py "Hello" --model Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16 --method dflash_graft
    python tools/train_dflash.py --out FOLDER                             how to make one for the demo model or another target

Source: DFlash, "Block Diffusion for Flash Speculative Decoding", arXiv 2602.06036, and the layout of its published checkpoints.
Changes: what drafts. The block is the root and B - 1 mask tokens; a few layers denoise it once, reading the target's features of the
committed text as keys and values of theirs. `dflash` verifies the likeliest token of each position, one chain, as published;
`dflash_graft_tail` keeps the chain's confident prefix and lets retrieval continue it (the Graft paper's way); `dflash_graft` makes a
tree of each position's likeliest tokens, which is then pruned, grafted and priced as an EAGLE-3 tree is (ours).
Needs: a DFlash checkpoint for the target (`--draft`, folder or Hub id), full attention in all of its layers.
Guarantees: the output of plain decoding, as every method in graft.py.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from graft import Sampler  # noqa: E402
from model import CheckpointError, KVCache, Layer, Linear, Model, ModelConfig, RMSNorm, fetch_checkpoint, read_json  # noqa: E402
from model import _Decoder, _fill, _stacked, _Tensors  # noqa: E402
from tree import Tree  # noqa: E402

DEMO_DRAFT = ROOT / "assets" / "smollm2-135m-dflash"
CONFIDENT = 0.3             # `dflash_graft_tail` keeps the chain as far as its probability is at least this


def prepare(setup, method: str):
    """The fields of run.py's Plan. Raises ValueError where there is no drafter, CheckpointError where it is not usable."""
    if not setup.draft and not DEMO_DRAFT.is_dir():
        raise ValueError(f"method '{method}' needs a DFlash drafter; give --draft, or train one for the demo model: "
                         "python tools/train_dflash.py --out assets/smollm2-135m-dflash")
    net = _load(fetch_checkpoint(setup.draft or str(DEMO_DRAFT)), setup.model)
    steps = net.block_size - 1                                 # positions of a block to guess; the first is expansion step 0
    if method == "dflash_graft":
        config = replace(setup.configure("graft"), depth=steps - 1, adjacency=True)
        if config.verify_cost:                                 # drafting on costs nothing: prices alone decide what is verified
            config = replace(config, checkpoints=(), thresholds=(), retained=())
    else:
        budget = min(steps, setup.base.budget)
        config = replace(setup.configure("graft_tail" if method == "dflash_graft_tail" else "eagle"), draft_top_k=1, depth=steps - 1, adjacency=True,
                         budget=budget, verify_cost=(), checkpoints=tuple(range(steps)), thresholds=(CONFIDENT,) * steps,
                         retained=tuple(min(1.0, step / budget) for step in range(steps)))
    return config, lambda: DFlashDrafter(net, setup.model)


class DFlash(_Decoder):
    """The network: Qwen3 layers over a block whose attention also reads a context, the target's features. It shares the target's
    embeddings and head, and holds neither."""

    def __init__(self, config: ModelConfig, taps: tuple[int, ...], block_size: int, mask_token_id: int):
        super().__init__(config)
        H, eps = config.hidden_size, config.rms_norm_eps
        self.taps, self.block_size, self.mask_token_id = taps, block_size, mask_token_id
        self.fc = Linear(len(taps) * H, H)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.hidden_norm, self.norm = RMSNorm(H, eps), RMSNorm(H, eps)

    def read(self, features: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Write context into `cache` (which the caller commits): features [b, n, len(taps) * H] of the target, positions [b, n]."""
        x = self.hidden_norm(self.fc(features))
        rotary = self.rotary(positions, x.dtype)
        for layer in self.layers:
            _, rows = layer.self_attn.project(x, rotary)
            cache.write(layer.index, rows)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None = None) -> Tensor:
        """Embeddings x [b, n, H] of blocks at positions [b, n] -> what the target's head reads [b, n, H]. mask [b, n, m]: True =
        attend; None = every token sees the whole context and every other."""
        rotary = self.rotary(positions, x.dtype)
        mask = None if mask is None else self.group(mask, x.shape[1], cache, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        return self.norm(x)


class DFlashDrafter:
    """Row i of its cache is the context that token i makes; a block's rows stand behind the committed ones and are never kept."""

    def __init__(self, net: DFlash, target: Model):
        self.net, self.target, self.taps = net, target, net.taps
        self.cache = KVCache(net.config, 0, target.cache_dtype, target.device)
        self.ids = torch.arange(target.config.vocab_size, device=target.device)

    def rewind(self, length: int) -> int:
        self.cache.length = min(self.cache.length, length)
        return self.cache.length

    def observe(self, features: Tensor, tokens: Tensor) -> None:
        """Read features [1, m, len(taps) * H] of m newly committed positions; which tokens stood there does not matter."""
        start, count = self.cache.length, features.shape[1]
        self.cache.reserve(start + count)
        self.net.read(features, torch.arange(start, start + count, device=features.device)[None], self.cache)
        self.cache.commit(list(range(count)))

    def guess(self, root: int, most: int) -> Tensor:
        """Logits [steps, V] of the tokens behind the root: all B - 1 that a block has, or the first `most`."""
        net, start = self.net, self.cache.length
        self.cache.reserve(start + net.block_size)
        block = torch.tensor([[root] + [net.mask_token_id] * (net.block_size - 1)], device=self.ids.device)
        positions = torch.arange(start, start + net.block_size, device=self.ids.device)[None]
        return self.target.lm_head(net(self.target.wide(self.target.embed_tokens(block)), positions, self.cache)[0, 1:most + 1])

    def expand(self, root: int, depth: int, top_k: int, sampler: Sampler) -> Iterator[Tree]:
        """Yield the tree after each of a block's positions: a node at depth i + 1 holds one of the top_k tokens of position i and
        the product of its path's probabilities; the top_k likeliest nodes go on. top_k = 1 is the published chain."""
        rows = self.guess(root, depth + 1).split(1)
        leaning = torch.cat([sampler.lean(row, step, self.ids) for step, row in enumerate(rows)])
        values, ids = leaning.topk(min(top_k, len(self.ids)), dim=-1)
        tree, frontier = Tree.rooted(root), [0]
        for tokens, logprobs in zip(ids.tolist(), values.tolist()):
            frontier = tree.best(tree.expand(frontier, [tokens] * len(frontier), [logprobs] * len(frontier)), top_k)
            yield tree


def stacked(config: ModelConfig) -> dict[str, dict[str, tuple]]:
    """Which published tensors make one of ours, as model._fill reads it."""
    return {name: parts for i in range(config.num_hidden_layers) for name, parts in
            _stacked(config, f"layers.{i}.", f"layers.{i}.", config.hidden_size, config.intermediate_size).items()}


def load_dflash(folder: str | Path, target: Model, *, pack: bool = True) -> DFlash:
    """Load a published DFlash checkpoint for `target`, in its dtype and on its device. Raises CheckpointError on a field or tensor
    that is missing, of another shape or unknown, and where the drafter belongs to another target."""
    folder, layers = Path(folder), target.config.num_hidden_layers
    config = replace(ModelConfig.read(folder, architectures=("DFlashDraftModel",)), qk_norm=True)
    path, count = folder / "config.json", config.num_hidden_layers
    raw = read_json(path)
    own = raw.get("dflash_config") or {}
    raw |= own if isinstance(own, dict) else {}                            # newer checkpoints have its fields beside the others
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
              ("target_layer_ids", isinstance(taps, list) and bool(taps) and all(whole(tap, -1, layers - 1) for tap in taps),
               f"a list of layer numbers from -1 to {layers - 1}")]
    checks += [(name, raw.get(name) in (None, accepted), f"{accepted}; nothing else is supported") for name, accepted in
               (("layer_types", ["full_attention"] * count), ("is_causal", False), ("input_embedding_scale", 1.0),
                ("output_multiplier", 1.0), ("final_logit_softcapping", 0.0))]
    for name, good, expected in checks:
        if not good:
            raise CheckpointError(f"{path}: field '{name}' is {raw.get(name)!r:.80}; expected {expected}")
    with torch.device("meta"):
        net = DFlash(config, tuple(taps), raw["block_size"], raw["mask_token_id"])
    tensors = _Tensors(folder)
    _fill(net, tensors, stacked(config), target.dtype, target.device, {name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq")}, pack,
          target.mixed)
    return net


_load = lru_cache(maxsize=1)(load_dflash)                                  # the three methods of one benchmark share their weights
