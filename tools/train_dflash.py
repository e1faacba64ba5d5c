"""Train a DFlash block drafter (variants/dflash.py) on the text that tools/train_eagle3.py has stored; features are
stored on a CPU, computed on a GPU.

    python tools/train_eagle3.py generate --tokens 2000000       # or: text --read
    python tools/train_dflash.py --out assets/smollm2-135m-dflash

Blocks are rooted at random places of every answer; all blocks of a batch go through the layers in one forward, each
seeing the features before its root and itself. The loss is the cross-entropy to the target's distribution after each of
a block's tokens, given the text so far; what the drafter cannot know of that text it averages over. Embeddings and head
are the target's, frozen.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "variants")]
from demo_model import at_least, command_line, tool  # noqa: E402
from dflash import DFlash, load_dflash, stacked  # noqa: E402
from model import Model, NoCache, default_taps, load_model, unstacked  # noqa: E402
from retrieval import whole  # noqa: E402
from train_eagle3 import (Texts, chosen_device, chosen_dtype, data_folder, descend, learning_rate,  # noqa: E402
                          model_folder, narrow, new_optimizers, report_progress, training_state)


class BlockCache(NoCache):
    """What `DFlash.read` writes, kept with its gradient; every block of a batch attends to it under one mask."""

    def __init__(self):
        self.context: dict[int, Tensor] = {}

    def write(self, layer: int, rows: Tensor) -> None:
        self.context[layer] = rows

    def attend(self, layer: int, queries: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        keys, values = torch.cat((self.context[layer], rows), dim=2).chunk(2, dim=1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def denoise(net: DFlash, target: Model, tokens: Tensor, features: Tensor, roots: Tensor) -> Tensor:
    """What the head reads at the B - 1 guessed positions of each block [b, A, B - 1, H], as in drafting: tokens [b, n],
    features [b, n, len(taps) * H], roots [b, A] are the positions of A roots in each text."""
    (b, n), A, B, device = tokens.shape, roots.shape[1], net.block_size, tokens.device
    cache, at, which = (BlockCache(), torch.arange(n, device=device).expand(b, -1),
                        torch.arange(A, device=device).repeat_interleave(B))
    net.read(features.to(net.fc.weight.dtype), at, cache)
    ids = torch.full((b, A, B), net.mask_token_id, device=device)
    ids[:, :, 0] = tokens.gather(1, roots)
    before = at[:, None] < roots[:, which, None]                                   # [b, A * B, n]
    mask = torch.cat((before, (which == which[:, None]).expand(b, -1, -1)), dim=-1)
    positions = (roots[:, :, None] + torch.arange(B, device=device)).flatten(1)
    return net(target.embed_tokens(ids.flatten(1)), positions, cache, mask).view(b, A, B, -1)[:, :, 1:]


def draw(net: DFlash, kind: Tensor, spacing: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Roots [b, A] in the answers, one for `spacing` tokens of the longest; the B - 1 positions [b, A, B - 1] from each
    root on, after which a block guesses; and where those lie inside the text. kind [b, n]: 0 padding, 1 the user's
    turn, 2 an answer is predicted."""
    start, length = (kind == 1).sum(1, keepdim=True) + 1, (kind > 0).sum(1, keepdim=True)
    share = torch.rand(len(kind), max(1, int((length - start).max()) // spacing), generator=generator).to(kind.device)
    roots = start + (share * (length - 1 - start)).long()
    after = roots[:, :, None] + torch.arange(net.block_size - 1, device=kind.device)
    return roots, after.clamp_max(kind.shape[1] - 2), after < length[:, :, None] - 1


def new_net(target: Model, taps: tuple[int, ...], layers: int, block_size: int, mask_token_id: int,
            ids: Tensor) -> DFlash:
    """A fresh drafter that guesses among `ids` [draft V]: its layers start as the target's last but one, `fc` as the
    last of the features. Every query head has keys and values of its own, since all that a block learns of its context
    comes through them."""
    H, sources, h, k = (target.config.hidden_size, target.layers[-1 - layers:-1], target.config.num_attention_heads,
                        target.config.num_key_value_heads)
    config = replace(target.config, architecture="DFlashDraftModel", num_hidden_layers=layers, num_key_value_heads=h,
                     qk_norm=True, num_experts=0, moe_layers=())
    net = DFlash(config, taps, block_size, mask_token_id, len(ids))
    net.ids, net.d2t = ids, ids - torch.arange(len(ids), device=ids.device)
    with torch.no_grad():
        for value in net.parameters():
            value.fill_(1.0) if value.dim() == 1 else value.normal_(std=0.3 * value.shape[1]**-0.5)
        for layer, source in zip(net.layers, sources):
            own = layer.state_dict()                                # q_norm, k_norm and experts may have no counterpart
            layer.load_state_dict({k: v for k, v in source.state_dict().items()
                                   if k in own and v.shape == own[k].shape}, strict=False)
            q, kv = source.self_attn.qkv_proj.weight.unflatten(0, (-1, config.head_dim)).split((h, 2 * k))
            layer.self_attn.qkv_proj.weight.copy_(torch.cat((q, kv.repeat_interleave(h // k, dim=0))).flatten(0, 1))
        net.fc.weight[:, -H:] += torch.eye(H)
        net.hidden_norm.weight.copy_(sources[0].input_layernorm.weight)
        net.norm.weight.copy_(target.norm.weight * 0.3)
    return net


def save_dflash(net: DFlash, folder: Path, note: dict, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the published layout, d2t beside it where the net has one, and `note` as training.json."""
    config, ids = net.config, {} if net.ids is None else {"d2t": net.d2t.cpu()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(unstacked(net, stacked(config), dtype) | ids, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in
           ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")},
        "rope_theta": config.rope["rope_theta"],
        **({"rope_scaling": config.rope} if config.rope["rope_type"] != "default" else {}),
        "block_size": net.block_size, "num_target_layers": note["target_layers"],
        "dflash_config": {"mask_token_id": net.mask_token_id, "target_layer_ids": list(net.taps)}}, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(note, indent=1) + "\n")


@torch.no_grad()
def validate(net: DFlash, rows: Tensor, texts: Texts, target: Model, args) -> list[float]:
    """On held-out answers: how often the first 1, 2, ... B - 1 guesses are all the target's choice, of the places where
    the text itself is the target's choice up to there. rows: of the head, for the tokens that are guessed."""
    right, count, generator = (torch.zeros(net.block_size - 1), torch.zeros(net.block_size - 1),
                               torch.Generator().manual_seed(0))
    H = target.config.hidden_size
    for tokens, features, kind in texts.batches(random.Random(0), args.batch_tokens):
        roots, after, inside = draw(net, kind, args.spacing, generator)
        row = torch.arange(len(tokens), device=args.device)[:, None, None]
        with narrow(args.device):
            guess = F.linear(denoise(net, target, tokens, features[..., :-H], roots), rows).argmax(-1)
            guess = guess if net.ids is None else net.ids[guess]
        best = target.lm_head(target.norm(features[row, after, -H:].to(target.dtype))).argmax(-1)
        own = F.pad((tokens[row, after + 1] == best).cumprod(-1), (1, -1), value=1) * inside
        right += ((guess == best).cumprod(-1) * own).sum((0, 1)).cpu()
        count += own.sum((0, 1)).cpu()
    return [round(float(x), 4) for x in right / count]


def train(args) -> None:
    """Muon for the matrices, AdamW for the norms; the learning rate warms up, stays, and falls linearly over the last
    part of the run. The state is saved every few minutes; the same command continues, with a new order of the texts."""
    data = data_folder(args)
    target = load_model(model_folder(args), dtype=chosen_dtype(args.device), device=args.device, pack=False)
    H, L = target.config.hidden_size, target.config.num_hidden_layers
    shards = sorted(data.glob("shard-*.safetensors"))
    if len(shards) < 2:
        raise SystemExit(f"error: {data} holds fewer than two shards of self-made text; "
                         "run 'python tools/train_eagle3.py generate' first")
    held, state_file = Texts(shards[:1], target, args.held_out), data / f"{args.name}.pt"
    settings = "start", "layers", "block", "vocab", "spacing", "fade", "lr"
    state = training_state(state_file, args, "net", settings)
    for name, low, high in (("layers", 1, L - 1), ("block", 2, 64)):
        value = getattr(args, name)
        if not low <= value <= high:
            raise SystemExit(f"error: argument --{name} is {value}; expected {low} to {high}")
    if args.start:
        net = load_dflash(args.start, target, pack=False)
        net.head = None
    else:
        if state:
            mask, d2t = state["mask"], state["net"]["d2t"]
            ids = d2t + torch.arange(len(d2t), device=args.device)
        else:
            held_out, *others = (torch.bincount(safe_open(path, "pt").get_tensor("tokens").long(),
                                                minlength=target.config.vocab_size) for path in shards)
            counts = sum(others)
            mask = int((counts + held_out).argmin())               # a token that the text does not use, held out or not
            ids = counts.argsort(descending=True, stable=True)[:args.vocab].sort().values.to(args.device)
        net = new_net(target, default_taps(L), args.layers, args.block, mask, ids)
    net = net.float().to(args.device).requires_grad_()
    rows = target.lm_head.weight if net.ids is None else target.lm_head.weight[net.ids]
    matrices, others = [p for p in net.parameters() if p.dim() == 2], [p for p in net.parameters() if p.dim() == 1]
    optimizers = new_optimizers(matrices, others, args.lr)
    seen, updates, history, running = 0, 0, [], None
    if state:
        net.load_state_dict(state["net"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        seen, updates, history = state["seen"], state["updates"], state["history"]
        print(f"continuing after {seen:,} tokens")
    rng, generator = random.Random(args.seed + updates), torch.Generator().manual_seed(args.seed + updates)
    fade = args.fade ** torch.arange(net.block_size - 1, device=args.device)
    began = saved_at = time.time()
    start_seen = seen
    while seen < args.tokens:
        texts = Texts(sorted(data.glob("shard-*.safetensors"))[1:], target)
        for tokens, features, kind in texts.batches(rng, args.batch_tokens):
            roots, after, inside = draw(net, kind, args.spacing, generator)
            row = torch.arange(len(tokens), device=args.device)[:, None, None].expand_as(after)
            weight = fade.expand_as(inside)[inside]                                # [r]: the guesses inside the text
            with torch.no_grad():
                wanted = F.linear(target.norm(features[row[inside], after[inside], -H:].to(target.dtype)),
                                  rows).float().softmax(-1)
            with narrow(args.device):
                logits = F.linear(denoise(net, target, tokens, features[..., :-H], roots)[inside], rows)    # [r, vocab]
            loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weight).sum() / weight.sum()
            descend(loss, optimizers, learning_rate(args, seen, updates))
            seen, updates, loss = seen + int((kind > 0).sum()), updates + 1, loss.item()
            running = loss if running is None else 0.98 * running + 0.02 * loss
            if updates % 20 == 0:
                report_progress(seen, args.tokens, running, (seen - start_seen) / (time.time() - began))
            if updates % args.validate == 0 or seen >= args.tokens:
                history.append({"tokens": seen, "loss": round(running, 4),
                                "accepted": validate(net, rows, held, target, args)})
                print(json.dumps(history[-1]), flush=True)
            if time.time() - saved_at > 300 or seen >= args.tokens:
                with whole(state_file) as file:
                    torch.save({"net": net.state_dict(), "mask": net.mask_token_id, "seen": seen, "updates": updates,
                                "history": history, "optimizers": [o.state_dict() for o in optimizers],
                                **{name: getattr(args, name) for name in settings}}, file)
                saved_at = time.time()
            if seen >= args.tokens:
                break
    save_dflash(net, Path(args.out),
                {"command": command_line("tools/train_dflash.py"), "torch": torch.__version__, "device": args.device,
                 "threads": torch.get_num_threads(), "target_layers": L, "held_out": history})
    print(f"wrote {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="target folder or Hub id (default: the demo model)")
    parser.add_argument("--data", help="where text, features and training state live (default: in Graft's cache)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--out", required=True, help="folder for the finished drafter")
    parser.add_argument("--name", default="dflash", help="of the training state, which a second call continues")
    parser.add_argument("--start", help="folder of a drafter to start from, which has its layers, block and vocab")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block", type=int, default=8, help="tokens a block, the root included")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="training tokens, repetitions included")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens that are guessed: the text's most frequent")
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--spacing", type=at_least(1), default=4,
                        help="tokens of an answer for each block that is rooted in it")
    parser.add_argument("--fade", type=float, default=0.8,
                        help="weight of a position's loss relative to the one before")
    parser.add_argument("--lr", type=float, default=2.5e-2)
    parser.add_argument("--decay", type=float, default=0.6,
                        help="last share of the run, in which the learning rate falls to 2%%")
    parser.add_argument("--validate", type=at_least(1), default=500, help="updates between validations")
    parser.add_argument("--held-out", type=int, default=80, help="conversations of the first shard to validate on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.device = chosen_device(args.device)
    train(args)


if __name__ == "__main__":
    tool(main)
