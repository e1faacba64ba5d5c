"""A draft model made from the target itself, by leaving out whole layers.

    python run.py "Why is the sky blue?" --method depth_pruned_graft
    python variants/depth_pruned.py search                           # which layers to leave out; continues where it was
    python variants/depth_pruned.py heal --drop 9,10,11 --out FOLDER # distil, then run.py --draft FOLDER

Source: layers of a decoder are redundant enough to be removed one by one (ShortGPT, arXiv 2403.03853), and what is left
can draft for the whole (Draft & Verify, arXiv 2309.08168, which also searches the layers by measurement); healed by a
short distillation.
Changes: only who drafts, a `ModelDrafter` (graft.py). `depth_pruned` verifies its tree as `eagle` does,
`depth_pruned_graft` prunes and grafts as `graft` does. Needs: nothing for the demo model, whose pruned copy shares the
target's weights in memory; `--draft FOLDER` for any other. Guarantees: the text of plain decoding, as every method in
graft.py.

The search scores a draft by tokens per unit of cost. Along a text that the target wrote, a chain of D guesses is right
as far as the draft's first choices are the target's own; a round commits these and one token more, and costs one target
forward plus D of the draft. A forward costs its weights: the layers, and the output head. No healed draft is shipped:
it would be 70% as large as the target.
"""

import argparse
import copy
import json
import random
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from demo_model import cache_folder, tool  # noqa: E402
from graft import ModelDrafter  # noqa: E402
from kernels import kernels  # noqa: E402
from model import Layer, Model, ModelConfig, NoCache, checkpoint_layout, load_model, unstacked  # noqa: E402
from retrieval import whole  # noqa: E402
from train_eagle3 import SHARD, TEXT, model_folder, narrow, read_text  # noqa: E402

HELD_OUT = SHARD      # conversations at the start of the text, which neither the head nor `heal` is trained on
LONGEST = 8         # chain of guesses that is scored


# By layers and hidden size: what to leave out, and how many guesses make a chain. For SmolLM2-135M-Instruct it was
# found by `search --conversations 5` on the text of commit cd05438 (612 answer tokens). There no unhealed draft pays:
# plain decoding scores 1, a draft of 29 layers 0.94, and fewer ever less, but nearly level from 24 (0.87) to 19 (0.85,
# agreement 0.45): the last of these. 10 score 0.74.
DROPPED = {(30, 576): ((3, 4, 5, 6, 7, 13, 14, 22, 23, 25, 26), 1)}


def prepare(setup, method: str):
    """The fields of run.py's Plan."""
    # a weaker draft leaves the matrix work
    config = replace(setup.configure("graft" if method.endswith("graft") else "eagle"), adjacency=True)
    draft, target = setup.head, setup.model.config
    if not isinstance(draft, Model):
        if (target.num_hidden_layers, target.hidden_size) not in DROPPED:
            raise ValueError(f"method '{method}' needs a draft model and --draft names none; "
                             "variants/depth_pruned.py makes one")
        dropped, guesses = DROPPED[target.num_hidden_layers, target.hidden_size]
        # depth does not count the root's children
        draft, config = prune(setup.model, dropped), replace(config, depth=guesses - 1)
        draft.kernels = kernels(draft) if setup.model.kernels else None
    return config, lambda: ModelDrafter(draft), None


def prune(model: Model, dropped: tuple[int, ...]) -> Model:
    """The same model without these layers; all weights are shared. Raises ValueError on a layer there is not."""
    config, layers = model.config, model.config.num_hidden_layers
    if not set(dropped) < set(range(layers)):
        raise ValueError(f"the layers to drop are {sorted(dropped)}; expected some, not all, of 0 to {layers - 1}")
    kept = [layer for layer in model.layers if layer.index not in dropped]
    sparse = tuple(i for i, layer in enumerate(kept) if layer.index in config.moe_layers)
    with torch.device("meta"):
        small = Model(replace(config, num_hidden_layers=len(kept), moe_layers=sparse))
    for new, old in ((small, model), *zip(small.layers, kept)):     # a layer's own number says where it is in the cache
        for name, part in old.named_children():
            if name != "layers":
                setattr(new, name, part)
    small.inverse, small.graphs, small.compiled = model.inverse, model.graphs, model.compiled
    return small.requires_grad_(False).eval()


def save(model: Model, folder: Path, source: Path) -> None:
    """Write a pruned, unpacked model as the checkpoint folder that `source`, the unpruned one's, would be without those
    layers."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("layer_types", None)                           # Qwen3's list: full attention in every layer, the default
    config |= {"num_hidden_layers": len(model.layers), "torch_dtype": str(model.dtype).removeprefix("torch.")}
    if model.config.num_experts:
        config |= {"decoder_sparse_step": 1,
                   "mlp_only_layers": [i for i in range(len(model.layers)) if i not in model.config.moe_layers]}
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*source.glob("tokenizer*"), *source.glob("chat_template.jinja")):
        shutil.copy(file, folder)
    save_file(unstacked(model, checkpoint_layout(model)), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- search

def through(model: Model, layers, x: Tensor) -> list[Tensor]:
    """x [b, n, H] and what it becomes after each of `layers`, from the start of the text on."""
    positions, states = torch.arange(x.shape[1], device=x.device)[None], [x]
    rotary, mask = model.rotary(positions, x.dtype), model.group(None, x.shape[1], NoCache(), x.dtype)
    for layer in layers:
        states.append(layer(states[-1], rotary, mask, NoCache()))
    return states


def choices(model: Model, x: Tensor, answer_from: int) -> Tensor:
    """The first choice after each token of the answer, and for its first: x [1, n, H] after the last layer."""
    return model.lm_head(model.norm(x[0, answer_from - 1:])).max(-1).indices


def forward_cost(config: ModelConfig, layers: int) -> float:
    """A forward of this many layers and the head, as a share of the whole model's: by weights."""
    with torch.device("meta"):
        head = config.vocab_size * config.hidden_size / sum(p.numel() for p in Layer(config, 0).parameters())
    return (layers + head) / (config.num_hidden_layers + head)


def chain_score(agree: list[Tensor], cost: float) -> dict:
    """Tokens that a round commits per unit of cost, at the best length of chains: agree holds for each text a bool [n],
    whether the draft's first choice is the target's; cost is a draft forward's, in target forwards."""
    alive, tokens, best = agree, 1.0, {"score": 0.0}
    for guesses in range(1, LONGEST + 1):
        tokens += float(torch.cat(alive).double().mean())
        score = round(tokens / (1 + guesses * cost), 4)
        if score > best["score"]:
            best = {"score": score, "guesses": guesses, "tokens": round(tokens, 4)}
        # right here and in the next `guesses` places
        alive = [a[:-1] & whole[guesses:] for a, whole in zip(alive, agree)]
    return best | {"agreement": round(float(torch.cat(agree).double().mean()), 4)}


def held_out(args, config: ModelConfig) -> list[tuple[list[int], int]]:
    """Spread-out conversations to score on, and where their answers start."""
    if args.conversations < 1:
        raise ValueError(f"--conversations is {args.conversations}; expected 1 or more")
    texts = conversations(args, config)[:HELD_OUT]
    return texts[::max(1, len(texts) // args.conversations)][:args.conversations]


def conversations(args, config: ModelConfig) -> list[tuple[list[int], int]]:
    texts = [(tokens, start) for tokens, start in read_text(Path(args.text)) if len(tokens) - start >= LONGEST]
    if not texts or max(max(tokens) for tokens, _ in texts) >= config.vocab_size:
        raise ValueError(f"--text {args.text}: holds no answers, or tokens outside the model's vocabulary of "
                         f"{config.vocab_size}")
    return texts


@torch.inference_mode()
def search(args) -> None:
    """Leave out, again and again, the layer without which the score is best; what is common to all trials is computed
    once."""
    folder, out = model_folder(args), Path(args.out or cache_folder() / "depth_pruned.json")
    model = load_model(folder, dtype=getattr(torch, args.dtype), device=args.device)
    texts, total = held_out(args, model.config), model.config.num_hidden_layers
    if not 1 <= args.keep < total:
        raise ValueError(f"--keep is {args.keep}; expected 1 to {total - 1}")
    settings = {"model": asdict(model.config), "dtype": args.dtype, "text": Path(args.text).name,
                "conversations": args.conversations}
    settings = json.loads(json.dumps(settings))
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"settings": settings, "path": []}
    if done["settings"] != settings:
        raise ValueError(f"--out {out}: holds a search with other settings; give another file, or delete it")
    path = done["path"]
    kept = [i for i in range(total) if i not in [step["dropped"] for step in path]]
    layers = lambda numbers: [model.layers[i] for i in numbers]
    begin = [model.embed_tokens(torch.tensor([tokens], device=model.device)) for tokens, _ in texts]
    wanted = [choices(model, through(model, model.layers, x)[-1], start) for x, (_, start) in zip(begin, texts)]
    print(f"{sum(map(len, wanted))} tokens of {len(texts)} answers; {len(path)} of {total - args.keep} "
          "layers left out so far")
    while len(kept) > args.keep:
        cost, trials, started = forward_cost(model.config, len(kept) - 1), {}, time.time()
        states = [through(model, layers(kept), x) for x in begin]
        for at, dropped in enumerate(kept):
            ends = (through(model, layers(kept[at + 1:]), own[at])[-1] for own in states)
            trials[dropped] = chain_score([choices(model, x, start) == want
                                           for x, (_, start), want in zip(ends, texts, wanted)], cost)
            print(f"\r{len(kept)} layers: {at + 1} tried, {time.time() - started:.0f} s ", end="",
                  file=sys.stderr, flush=True)
        dropped = max(kept, key=lambda i: trials[i]["score"])
        kept.remove(dropped)
        path.append({"layers": len(kept), "dropped": dropped, "cost": round(cost, 4), **trials[dropped]})
        print("\r" + json.dumps(path[-1]), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as file:
            file.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    best = max(range(len(path)), key=lambda i: path[i]["score"])
    print(f"best: {path[best]['score']} tokens per target forward (plain decoding: 1) "
          f"with chains of {path[best]['guesses']}, "
          f"--drop {','.join(str(i) for i in sorted(step['dropped'] for step in path[:best + 1]))}")


# --------------------------------------------------------------------------------------------------------------- heal

def heal(args) -> None:
    """Distil: cross-entropy to the target's distribution in the answers, AdamW on the kept layers and the last norm;
    embeddings and head stay the target's. Each step draws its conversations by (seed, step), so an interrupted run
    continues as if it were not."""
    folder, out = model_folder(args), Path(args.out)
    target = load_model(folder, dtype=torch.float32, device=args.device, pack=False)
    dropped, held = tuple(sorted(args.drop)), held_out(args, target.config)
    student = prune(target, dropped)
    student.layers, student.norm = copy.deepcopy((student.layers, student.norm))
    trained = [p for part in (student.layers, student.norm) for p in part.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    texts, state_file, first = conversations(args, target.config)[HELD_OUT:], out / "heal.pt", 0
    if not texts:
        raise ValueError(f"--text {args.text}: holds {HELD_OUT} conversations at most, which are held out; "
                         "expected more")
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        if tuple(state["dropped"]) != dropped:
            raise ValueError(f"--out {out}: a draft without layers {list(state['dropped'])} is being healed there, "
                             f"not {list(dropped)}")
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for ours, saved in zip(trained, state["trained"]):
            ours.data.copy_(saved)
    out.mkdir(parents=True, exist_ok=True)

    def keep(step):
        state = {"dropped": dropped, "step": step, "trained": [p.data for p in trained],
                 "optimizer": optimizer.state_dict()}
        with whole(state_file) as file:
            torch.save(state, file)

    print(f"step {first}: {agreement(target, student, held)}", flush=True)
    began = saved = time.time()
    for step in range(first, args.steps):
        batch = random.Random(args.seed * 2**32 + step).sample(texts, min(args.batch, len(texts)))
        longest = max(len(tokens) for tokens, _ in batch)
        # behind a text: unseen
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch], device=args.device)
        where = torch.arange(longest)
        answer = torch.stack([(where >= start - 1) & (where < len(tokens))
                              for tokens, start in batch]).to(args.device)   # [b, n]
        x = target.embed_tokens(ids)
        with narrow(args.device):
            with torch.no_grad():
                # [answers, V]
                wanted = target.lm_head(target.norm(through(target, target.layers, x)[-1][answer])).float().softmax(-1)
            logits = student.lm_head(student.norm(through(student, student.layers, x)[-1][answer])).float()
        loss = (logits.logsumexp(-1) - (wanted * logits).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        # rises, stays, falls
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 20, (args.steps - step) / (0.5 * args.steps))
        optimizer.step()
        left = (time.time() - began) / (step + 1 - first) * (args.steps - step - 1)
        print(f"\rstep {step + 1} of {args.steps}, loss {loss.item():.4f}, about {left / 60:.0f} min left ",
              end="", flush=True)
        if time.time() - saved > 120:
            keep(step + 1)
            saved = time.time()
    print(f"\nstep {args.steps}: {agreement(target, student, held)}")
    save(student.to(getattr(torch, args.dtype)), out, folder)
    state_file.unlink(missing_ok=True)                           # three times as large as the draft, and of no more use
    print(f"wrote {out}")


@torch.inference_mode()
def agreement(target: Model, draft: Model, texts: list[tuple[list[int], int]]) -> dict:
    """What `search` would say of this draft."""
    agree = []
    for tokens, start in texts:
        x = target.embed_tokens(torch.tensor([tokens], device=target.device))
        agree.append(choices(draft, through(draft, draft.layers, x)[-1], start)
                     == choices(target, through(target, target.layers, x)[-1], start))
    return chain_score(agree, forward_cost(target.config, len(draft.layers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="target folder or Hub id (default: the demo model)")
    parser.add_argument("--text", default=str(TEXT), help="text that the target wrote (tools/train_eagle3.py text)")
    parser.add_argument("--conversations", type=int, default=12, help="held-out ones to score on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"),
                        help="of the search, or of the saved draft")
    commands = parser.add_subparsers(dest="command", required=True)
    find = commands.add_parser("search", help="find layers to leave out")
    find.add_argument("--keep", type=int, default=10, help="stop when so many layers are left")
    find.add_argument("--out", help="file of what was found so far (default: in Graft's cache)")
    fit = commands.add_parser("heal", help="distil a pruned model and save it as a checkpoint; --steps 0 only saves it")
    fit.add_argument("--drop", required=True, type=lambda words: [int(word) for word in words.split(",")],
                     help="layers, such as 9,10,11")
    fit.add_argument("--out", required=True, help="folder for the checkpoint")
    fit.add_argument("--steps", type=int, default=300)
    fit.add_argument("--batch", type=int, default=8, help="conversations a step")
    fit.add_argument("--lr", type=float, default=3e-4)
    fit.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"search": search, "heal": heal}[args.command](args)


if __name__ == "__main__":
    tool(main)
