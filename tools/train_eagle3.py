"""Text to train an EAGLE-3 head on, written by any target that model.py loads. No download, no dataset.

    python tools/train_eagle3.py generate --tokens 4000000      # resumable: finished shards are kept and counted

The target samples a user turn from the open user slot of its chat template (half of them after a short opener that names a
kind of task), the template's own tokens close it, and the target answers, greedily or at a temperature. Kept are the tokens
and the outputs of four layers: the three that an EAGLE-3 head reads, and the last, from which the target's distribution
follows. Nothing here reads a benchmark prompt. (Training itself is not written yet.)
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from demo_model import cache_folder, demo_model  # noqa: E402
from model import KVCache, fetch_checkpoint, load_model  # noqa: E402

OPENERS = [
    "Translate the following sentence into English:\n", "Translate this text from German to English:\n", "Translate into French: ",
    "Summarize the following article:\n\n", "Summarize this text in three sentences:\n\n", "Give a short summary of the story below.\n\n",
    "Write a Python function ", "Complete this Python function:\n\ndef ", "Implement in Python: ", "Fix the bug in this code:\n\n",
    "Solve this problem step by step: ", "Calculate ", "A farmer ", "If a train ", "Tom has ", "Find the value of ",
    "Answer the question from the context.\n\nContext: ", "Read the following passage and answer the question.\n\n", "Question: ",
    "Who ", "When did ", "What is the ", "Where ", "Why ", "How do I ", "Explain ", "List ", "Write an email ", "Write a story ",
    "Describe ", "Compare ", "Imagine that you are ", "Can you ", "I need help with ", "Give me some advice on ", "Edit the following text:\n\n",
]


class RingCache(KVCache):
    """One slot is written for all rows at once and the slots are used in a circle, so that a row can start a new text at any
    step: what it may attend to is a matter of the mask alone, since keys carry their rotary position."""

    slot = 0

    def write(self, layer, keys, values):
        self.keys[layer, :, :, self.slot] = keys[:, :, 0]
        self.values[layer, :, :, self.slot] = values[:, :, 0]
        return self.keys[layer], self.values[layer]


class Row:
    """One conversation being written: forced tokens first, then the user's turn, the template's closing, the answer."""

    def __init__(self, rng, encode, prefix, greedy_share):
        opener = encode(rng.choice(OPENERS).rstrip(" ")) if rng.random() < 0.5 else []
        self.tokens, self.forced, self.answer_from = [], prefix + opener, None
        self.user_temperature = rng.choice((0.8, 0.9, 1.0, 1.0))
        self.answer_temperature = 0.0 if rng.random() < greedy_share else 0.7
        self.prompt_limit = len(prefix) + len(opener) + rng.choice((40, 80, 160, 240))


def looping(tokens: list[int]) -> bool:
    """Text that repeats itself: fewer than a third of its 4-grams are new."""
    grams = list(zip(*(tokens[i:] for i in range(4))))
    return len(grams) > 32 and len(set(grams)) < len(grams) / 3


def generate(args) -> None:
    from run import Text
    folder, data = model_folder(args), data_folder(args)
    data.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, dtype=args.dtype, device=args.device)
    text = Text(folder)
    before, after = text.render([{"role": "user", "content": "\uE000"}]).split("\uE000")
    prefix, closing = text.encode_control(before), text.encode_control(after)
    eos, encode = set(model.config.eos_token_ids), text.encode
    layers = model.config.num_hidden_layers
    taps = (1, layers // 2 - 1, layers - 4, layers - 1)
    done = sorted(data.glob("shard-*.safetensors"))
    have = sum(shard_tokens(p) for p in done)
    number = int(done[-1].stem.split("-")[1]) + 1 if done else 0
    rng = random.Random(args.seed + number)
    noise = torch.Generator(model.device).manual_seed(args.seed + number)
    b, ring = args.batch, args.length
    cache = RingCache(model.config, ring, model.dtype, model.device, b)
    rows = [Row(rng, encode, prefix, args.greedy_share) for _ in range(b)]
    features = torch.zeros(b, ring, len(taps) * model.config.hidden_size, dtype=torch.bfloat16)
    ages = torch.arange(ring, device=model.device)
    finished, held, began, made, current = [], 0, time.time(), 0, [prefix[0]] * b
    for row in rows:
        row.forced = row.forced[1:]
    while have < args.tokens:
        age = torch.tensor([len(row.tokens) for row in rows], device=model.device)                   # [b] tokens before this one
        mask = ((cache.slot - ages) % ring)[None] <= age[:, None]                                   # [b, ring]
        with torch.inference_mode():
            logits, tapped = model(torch.tensor(current, device=model.device)[:, None], age[:, None], cache, mask[:, None], taps=taps)
            features[torch.arange(b), age.cpu()] = tapped[:, 0].to("cpu", torch.bfloat16)
            best = logits[:, 0].argmax(-1).tolist()
            heat = [0.0 if r.forced else r.user_temperature if r.answer_from is None else r.answer_temperature for r in rows]
            hot = [i for i, temperature in enumerate(heat) if temperature]        # noise is dear on a CPU: only where used
            scaled = logits[hot, 0].float() / torch.tensor(heat, device=model.device)[hot, None]
            scaled -= torch.empty_like(scaled).exponential_(generator=noise).log_()
            for i, token in zip(hot, scaled.argmax(-1).tolist()):
                best[i] = token
        cache.slot = (cache.slot + 1) % ring
        for i, row in enumerate(rows):
            row.tokens.append(current[i])
            size = len(row.tokens)
            if row.forced:
                current[i] = row.forced.pop(0)
                continue
            if row.answer_from is None:
                current[i] = best[i]
                if current[i] == closing[0] or current[i] in eos or size >= row.prompt_limit:
                    current[i], row.forced, row.answer_from = closing[0], closing[1:], size + len(closing)
                if ring - size > len(closing) + 8:
                    continue
            else:
                current[i] = best[i]
                if row.tokens[-1] not in eos or size <= row.answer_from:
                    if size < ring - 1 and size - row.answer_from < args.answer_length:
                        continue
            if row.answer_from and size - row.answer_from >= 8 and not looping(row.tokens[row.answer_from:]):
                finished.append((torch.tensor(row.tokens, dtype=torch.int32), row.answer_from, features[i, :size].clone()))
                held += size
                made += size
            rows[i] = Row(rng, encode, prefix, args.greedy_share)
            current[i] = rows[i].forced.pop(0)
        if held >= args.shard_tokens:
            lengths = torch.tensor([[len(t), a] for t, a, _ in finished], dtype=torch.int32)
            path = data / f"shard-{number:05d}.safetensors"
            save_file({"tokens": torch.cat([t for t, _, _ in finished]), "lengths": lengths,
                       "features": torch.cat([f for _, _, f in finished])}, data / "partial", metadata={"tokens": str(held)})
            (data / "partial").rename(path)
            have, number, held, finished = have + held, number + 1, 0, []
            print(f"{path.name}: {have:,} of {args.tokens:,} tokens, {made / (time.time() - began):.0f} tokens/s", flush=True)


def shard_tokens(path: Path) -> int:
    with safe_open(path, "pt") as f:
        return int(f.metadata()["tokens"])


def model_folder(args) -> Path:
    return fetch_checkpoint(args.model) if args.model else demo_model()


def data_folder(args) -> Path:
    return Path(args.data) if args.data else cache_folder() / "train" / model_folder(args).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="target folder or Hub id (default: the demo model)")
    parser.add_argument("--data", help="where self-made text and training state live (default: in Graft's cache)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="let the target write prompts and answers")
    make.add_argument("--tokens", type=int, default=4_000_000)
    make.add_argument("--batch", type=int, default=128)
    make.add_argument("--length", type=int, default=512, help="longest conversation, in tokens")
    make.add_argument("--answer-length", type=int, default=320)
    make.add_argument("--greedy-share", type=float, default=0.8, help="share of the answers decoded greedily; the rest at temperature 0.7")
    make.add_argument("--shard-tokens", type=int, default=100_000)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    {"generate": generate}[args.command](args)


if __name__ == "__main__":
    main()
