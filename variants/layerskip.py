"""Self-speculation: the target's first E layers and its own head draft, the rest of its layers verify.

    python run.py "Why is the sky blue?" --method layerskip_graft
    python variants/layerskip.py calibrate          # which E; then LAYERSKIP_EXIT=E,GUESSES,SHARPNESS python run.py ...

Source: LayerSkip (Elhoushi et al., arXiv 2404.16710), section 4.3; here with trees, pruning and grafting instead of one
chain.
Changes: the drafter writes the keys and values of layers 0..E-1 straight into the target's cache and keeps the hidden
states that leave layer E-1. Verification takes both over: drafted nodes that survived pruning run only layers E..,
nodes that were never run (the draft's leaves, retrieved ones) run layers 0..E-1 first, among their drafted ancestors.
So there is one cache, no second copy of anything, and no weight besides the target's. `layerskip` verifies its tree as
`eagle` does, `layerskip_graft` as `graft` does.
Needs: any target. Guarantees: the text of plain decoding, as every method in graft.py.

A checkpoint trained for early exit (LayerSkip's own: layer dropout that grows with depth, and a loss at every exit)
makes the head read the first layers' states well: E can be a quarter of the layers or less, and sharpness 1. An
ordinary model's exits agree with its end only near the end, and no E pays. The code is the same.
"""

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from depth_pruned import chain_score, choices, forward_cost, held_out, model_folder, through  # noqa: E402
from demo_model import tool  # noqa: E402  (in tools/, which depth_pruned puts on the path)
from graft import Drafter, GraftConfig, Sequence  # noqa: E402
from kernels import Layers  # noqa: E402
from model import KVCache, Model, load_model  # noqa: E402
from train_eagle3 import TEXT  # noqa: E402
from tree import Tree  # noqa: E402

# By layers and hidden size: E, how many guesses make a chain, and sharpness. For SmolLM2-135M-Instruct by
# `calibrate --conversations 5` on the text of commit cd05438 (612 answer tokens), where plain decoding scores 1 and no
# exit pays: E = 1 scores 0.88 (its first choice is the target's on 8% of the tokens), E = 18 0.68 (15%), E = 29 0.82
# (61%).
CALIBRATED = {(30, 576): (1, 1, 0.3)}
SHARPNESS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)   # tried by calibrate


def prepare(setup, method: str):
    """The fields of run.py's Plan. E is LAYERSKIP_EXIT if that is set, else what was calibrated, else a quarter of the
    layers."""
    layers, config = (setup.model.config.num_hidden_layers,
                      setup.configure("graft" if method.endswith("graft") else "eagle"))
    early, guesses, sharpness = CALIBRATED.get((layers, setup.model.config.hidden_size),
                                               (max(1, layers // 4), config.depth + 1, 1.0))
    if given := os.environ.get("LAYERSKIP_EXIT"):
        parts = re.fullmatch(r"(\d+)(?:,([1-9]\d*),(\d+\.?\d*))?", given)
        if not parts or not 1 <= int(parts[1]) < layers:
            raise ValueError(f"LAYERSKIP_EXIT is {given!r}; expected a number of layers from 1 to {layers - 1}, "
                             "or E,GUESSES,SHARPNESS")
        early, guesses, sharpness = int(parts[1]), int(parts[2] or config.depth + 1), float(parts[3] or 1.0)
    # calibrated beside a draft head, which knows far better
    config = replace(config, depth=guesses - 1, trust=GraftConfig.trust, adjacency=True)
    return config, lambda: SkipDrafter(setup.model, early, sharpness), verify


class Stretch:
    """Some of the target's layers, on x [1, n, H]; positions and mask as in Model.forward. Returns what leaves the last
    of them, from compiled ones in float32, and its norm."""

    def __init__(self, model: Model, layers: nn.ModuleList):
        self.model, self.layers, self.compiled = model, layers, model.kernels and Layers(model, layers)

    def __call__(self, x: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.compiled and self.compiled.fit(x, mask, cache):
            return self.compiled(x, positions, mask, cache, causal=mask is None)[:2]
        x = x.to(self.model.dtype)
        rotary, mask = self.model.rotary(positions, x.dtype), self.model.group(mask, x.shape[1], cache, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        return x, self.model.norm(x)


class SkipDrafter(Drafter):
    """Drafts with the first `early` layers and the head, whose logits are multiplied by `sharpness`: an exit that was
    never trained is far too sure of itself, and would crowd out better nodes. Its cache is the target's: committed text
    is there already, and what it drafts stands behind, root first, then `ran`, in the rows of those layers."""

    def __init__(self, model: Model, early: int, sharpness: float = 1.0):
        self.model, self.sharpness = model, sharpness
        self.first, self.rest = Stretch(model, model.layers[:early]), Stretch(model, model.layers[early:])
        self.ids = torch.arange(model.config.vocab_size, device=model.device)

    def share(self, cache: KVCache) -> None:
        self.cache = cache

    def rewind(self, length: int) -> int:
        return length

    def observe(self, features: Tensor | None, tokens: Tensor) -> None:
        """Nothing to read: the target has written every committed row."""

    def expand(self, root, depth, top_k, sampler):
        length, self.exits = self.cache.length, []
        try:
            self.read(torch.tensor([[root]], device=self.ids.device), None)
            yield from super().expand(root, depth, top_k, sampler)
        finally:
            self.cache.length = length

    def step(self, tokens: Tensor, hidden: Tensor | None, positions: Tensor,
             mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, normed = self.first(self.model.embed_tokens(tokens), positions, self.cache, mask)
        self.exits.append(x)
        return self.model.lm_head(normed) * self.sharpness, x

    def rows(self, tree: Tree) -> list[int | None]:
        """For each node of a tree with the drafted root, which row behind the committed ones it has; None for one that
        never ran."""
        drafted, row = [0], {node: i for i, node in enumerate([0, *self.ran])}
        for parent, token in zip(tree.parents[1:], tree.tokens[1:]):
            drafted.append(self.tree.child.get((drafted[parent], token)))
        return [row.get(node) for node in drafted]


def verify(model: Model, sequences: list[Sequence], trees: list[Tree]) -> list[tuple]:
    """graft.verify, of which drafting has done a part; one text after the other."""
    return [verify_one(model, sequence, tree) for sequence, tree in zip(sequences, trees)]


def verify_one(model: Model, sequence: Sequence, tree: Tree) -> tuple[list[int], list[int], Tensor, None]:
    """A node's ancestors ran if it ran, so the reused nodes before the others is an order in which parents come
    first."""
    with sequence.stats.clock("verify"):
        drafter, cache, device, n = sequence.drafter, sequence.state.cache, model.device, len(tree)
        length, rows = cache.length, drafter.rows(tree)
        cache.reserve(length + n)
        reused, new = [i for i in range(n) if rows[i] is not None], [i for i in range(n) if rows[i] is None]
        order = reused + new
        positions, mask = tree.positions(length, device)[None], tree.mask(device)
        exits = torch.cat(drafter.exits, dim=1)
        x = model.embed_tokens(torch.tensor([tree.tokens], device=device)).to(exits.dtype)
        x[:, reused] = exits[:, [rows[i] for i in reused]]
        arrange(cache, [rows[i] for i in reused])
        cache.length += len(reused)
        if new:
            x[:, new] = drafter.first(x[:, new], positions[:, new], cache, mask[new][:, order])[0]
        cache.length = length
        arrange(cache, [order.index(i) for i in range(n)])           # the rows of the first layers in the tree's order
        logits = model.lm_head(drafter.rest(x, positions, cache, mask)[1])[0]
        picks = sequence.sampler.pick(logits, tree)
        return tree.accept(picks), picks, logits, None


def arrange(cache: KVCache, rows: list[int]) -> None:
    """Put these of the rows behind the committed ones (0 = the first of them) there in this order."""
    index = torch.tensor(rows, device=cache.rows.device) + cache.length
    cache.rows[:, :, :, cache.length:cache.length + len(rows)] = cache.rows[:, :, :, index]


@torch.inference_mode()
def calibrate(args) -> None:
    """Score every E as variants/depth_pruned.py scores a draft: tokens per unit of cost, a target forward being one
    unit. The sharpness is the one that gives the target's choices the highest likelihood (temperature scaling, arXiv
    1706.04599)."""
    model = load_model(model_folder(args), dtype=getattr(torch, args.dtype), device=args.device)
    texts, exits = held_out(args, model.config), range(1, model.config.num_hidden_layers)
    agree, losses = {early: [] for early in exits}, torch.zeros(len(exits) + 1, len(SHARPNESS), dtype=torch.float64)
    for number, (tokens, start) in enumerate(texts):
        states = through(model, model.layers, model.embed_tokens(torch.tensor([tokens], device=model.device)))
        wanted = choices(model, states[-1], start)
        for early in exits:
            logits = model.lm_head(model.norm(states[early][0, start - 1:])).float()
            agree[early].append(logits.max(-1).indices == wanted)
            losses[early] += torch.stack([F.cross_entropy(logits * sharpness, wanted, reduction="sum")
                                          for sharpness in SHARPNESS]).cpu()
        print(f"\r{number + 1} of {len(texts)} texts ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    scores = {early: chain_score(agree[early], forward_cost(model.config, early)) for early in exits}
    for early, score in scores.items():
        score["sharpness"] = SHARPNESS[losses[early].argmin()]
        print(f"E {early}: {score}")
    best = max(scores, key=lambda early: scores[early]["score"])
    print(f"best: E {best} with {scores[best]['score']} tokens per target forward (plain decoding: 1): "
          f"LAYERSKIP_EXIT={best},{scores[best]['guesses']},{scores[best]['sharpness']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("calibrate",))
    parser.add_argument("--model", help="target folder or Hub id (default: the demo model)")
    parser.add_argument("--text", default=str(TEXT), help="text that the target wrote (tools/train_eagle3.py text)")
    parser.add_argument("--conversations", type=int, default=8, help="held-out ones to score on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    calibrate(parser.parse_args())


if __name__ == "__main__":
    tool(main)
