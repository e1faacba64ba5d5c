"""Verification in two tiers: method `via_sd`. NOT lossless.

Source: VIA-SD; written from a short description of it, since the paper was not at hand.
Changes: step 5. A slim verifier, made of the target's most influential layers, reads the tree first. Where its pick is
a drafted node, or the end of a path, and its probability reaches SURE, the token is settled; at the first pick it is
not sure of, the full model takes over and verifies what hangs below. A round that is settled to its end runs no full
forward.
The KV cache is the target's own: the slim tier attends to the full model's rows, which helps it much, and writes
provisional rows behind them. The next full forward reads all tokens settled meanwhile, in one batch with its tree, and
overwrites those rows; it cannot take the tokens back. So the full model runs fewer times on more tokens, and reads
every token but the last few. The draft head is fed the slim tier's features until then.
Needs: nothing but the target; drafts from an EAGLE-3 head and retrieval, or from retrieval alone.
Guarantees: none. With SURE above 1 it is plain decoding. `bench` reports how much of its output agrees with plain
decoding.

    python run.py "Why is the sky blue?" --method via_sd
"""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from graft import EagleDrafter, Sequence  # noqa: E402
from kernels import kernels  # noqa: E402
from model import Model  # noqa: E402
from tree import Tree  # noqa: E402

KEPT = 0.8        # share of the target's layers that the slim verifier runs
SURE = 0.7        # probability from which the slim verifier's pick is settled without the full model
UNREAD = 16       # most tokens that may be settled before the full model reads them


def slim_of(model: Model, tokens: list[int], taps: tuple[int, ...] = (), kept: float = KEPT) -> Model:
    """`model` without the layers that change the hidden states of `tokens` least: block influence, 1 -
    cos(input, output), after Men et al., "ShortGPT", arXiv 2403.03853. Layers in `taps` stay. Weights are shared, and
    layers keep their place in a KV cache."""
    count, n = model.config.num_hidden_layers, len(tokens)
    with torch.inference_mode():
        _, hidden = model(torch.tensor([tokens], device=model.device), torch.arange(n, device=model.device)[None],
                          model.new_cache(n), taps=tuple(range(-1, count)), last_only=True)
    hidden = hidden[0].double().view(n, count + 1, -1)
    influence = 1 - torch.cosine_similarity(hidden[:, :-1], hidden[:, 1:], dim=-1).mean(0)             # [L]
    influence[[layer for layer in taps if layer >= 0]] = math.inf
    chosen = influence.topk(max(1, len(set(taps)), round(kept * count))).indices.tolist()
    slim = copy.copy(model)
    slim._modules = dict(model._modules)
    slim.layers = nn.ModuleList(model.layers[layer] for layer in sorted(chosen))
    slim.kernels = model.kernels and kernels(slim)
    return slim


class TieredDrafter:
    """Another drafter, or none, and the tokens that the slim tier has settled ahead of the full model; one for each
    text."""

    def __init__(self, inner: EagleDrafter | None = None):
        self.inner, self.taps = inner, inner.taps if inner else ()
        self.unread: list[int] = []                 # the last committed tokens: their cache rows are provisional
        self.read = 0                               # how many tokens the full model has read, while `unread` holds some

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens of the text, or fewer: rows that the full model has not written are
        not kept."""
        length, self.unread = min(length, self.read) if self.unread else length, []
        return self.inner.rewind(length) if self.inner else length

    def observe(self, features: Tensor, tokens: Tensor) -> None:
        self.inner.observe(features, tokens)

    def expand(self, *args):
        return self.inner.expand(*args)


def forward(model: Model, sequence: Sequence, unread: list[int], tree: Tree) -> tuple[Tensor, Tensor | None]:
    """Run the tree behind `unread`, the last tokens in the cache, whose rows are written anew. Returns logits
    [u + n, V] and features."""
    cache, device, u = sequence.state.cache, model.device, len(unread)
    cache.reserve(cache.length + len(tree))
    whole = cache.length
    cache.length -= u
    tokens = torch.tensor([unread + tree.tokens], device=device)
    positions = torch.cat((torch.arange(cache.length, whole, device=device), tree.positions(whole, device)))[None]
    mask = torch.ones(u + len(tree), u + len(tree), dtype=torch.bool, device=device).tril()
    mask[u:, u:] = tree.mask(device)
    logits, features = model(tokens, positions, cache, mask, taps=sequence.state.drafter.taps)
    cache.commit(list(range(u)))
    return logits[0], features


def verify(model: Model, sequences: list[Sequence], trees: list[Tree], *, slim: Model, sure: float = SURE,
           most: int = UNREAD) -> list:
    """Step 5 in two tiers; takes and returns what graft.verify does. A tree that the full model verifies is cut, in
    `trees`, to the settled path and what hangs below it. Rounds without a full forward are counted as stage "slim"."""
    verified = []
    for which, (sequence, tree) in enumerate(zip(sequences, trees)):
        drafter, sampler = sequence.state.drafter, sequence.sampler
        with sequence.stats.clock("slim"):
            logits, features = forward(slim, sequence, [], tree)
            picks = sampler.pick(logits, tree)
            certain = (logits.float().softmax(-1)[range(len(tree)), picks] >= sure).tolist()
            path = [0]
            while certain[path[-1]] and (following := tree.child.get((path[-1], picks[path[-1]]))) is not None:
                path.append(following)
        if certain[path[-1]] and len(drafter.unread) + len(path) <= most:
            drafter.read = sequence.state.cache.length - len(drafter.unread)
            drafter.unread = drafter.unread + [tree.tokens[node] for node in path]
            sequence.stats.stages["slim"] += 1
        else:
            with sequence.stats.clock("verify"):
                below = [node for node in range(path[-1] + 1, len(tree)) if path[-1] in (0, *tree.path(node))]
                trees[which] = tree = tree.select(path + below)         # so the settled nodes are 0, 1, 2 ...
                unread = drafter.unread
                logits, features = forward(model, sequence, unread, tree)
                drafter.unread = []                           # not before: whoever breaks off leaves provisional rows
                if unread and drafter.inner:                  # the head reads again, now with the full model's features
                    drafter.inner.rewind(sequence.state.cache.length - len(unread) + 1)
                    drafter.inner.observe(features[:, :len(unread)],
                                          torch.tensor([unread + tree.tokens[:1]], device=model.device))
                logits, features = logits[len(unread):], features[:, len(unread):] if drafter.taps else None
                picks = tree.tokens[1:len(path)] + sampler.pick(logits, tree)[len(path) - 1:]
                path = tree.accept(picks)
        verified.append((path, picks, logits, features))
    return verified


def prepare(setup, method: str):
    """The fields of a Plan. Says on stderr that the output may differ."""
    if isinstance(setup.head, Model) or setup.window:
        raise ValueError(f"method '{method}' drafts with an EAGLE-3 head that sees all of the text; "
                         "leave out --draft-window, and a --draft that is a model")
    print(f"{method}: not lossless: tokens that {KEPT:.0%} of the layers are sure of (probability {SURE} or more) "
          "do not wait for the full model, so the output may differ from plain decoding", file=sys.stderr)
    slim = slim_of(setup.model, setup.text.encode(__doc__)[:256], setup.head.taps if setup.head else ())
    new_drafter = lambda: TieredDrafter(EagleDrafter(setup.head) if setup.head else None)
    return setup.configure("graft" if setup.head else "retrieve"), new_drafter, partial(verify, slim=slim), True
