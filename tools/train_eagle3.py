"""Text that any target which model.py loads writes itself, and the training of an EAGLE-3 head on it. No download, no
dataset.

    python tools/train_eagle3.py text --read                    # the demo model's text that is shipped, or:
    python tools/train_eagle3.py generate --tokens 4000000      # resumable: finished shards are kept and counted
    python tools/train_eagle3.py generate --compose --length 1024 --tokens 5000000      # and 1M with long prompts
    python tools/train_eagle3.py generate --prompts assets/prompts.jsonl --tokens 5700000
                                                                # and 0.7M in answer to given prompts
    python tools/train_eagle3.py generate --prompts assets/prompts.jsonl --cut --tokens 9700000
                                                                # and 4M that go on where these are cut
    python tools/train_eagle3.py train --out HEAD               # resumable

The target samples a user turn from the open user slot of its chat template (seven in ten after a short opener that
names a kind of task), the template's own tokens close it, and the target answers, greedily or at a temperature. Long
prompts are composed of such answers; others, ours or those of your users, are given in a file, or their beginnings are.
Kept are the tokens and, on a CPU, the outputs of four layers: the three that an EAGLE-3 head reads, and the last, from
which the target's distribution follows. Nothing here reads a benchmark prompt.
"""

import argparse
import hashlib
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "assets" / "smollm2-135m-text.safetensors"
SHARD = 250      # conversations in each shard that is made from TEXT; the first shard is held out
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from demo_model import at_least, cache_folder, command_line, demo_model, tool  # noqa: E402
from kernels import kernels  # noqa: E402
from model import (Eagle3, KVCache, Model, NoCache, PackedCache, _stacked, default_taps,  # noqa: E402
                   fetch_checkpoint, load_eagle3, load_model, unstacked)
from retrieval import whole  # noqa: E402

SHORT = [                                                                          # how a user's turn may begin
    "Write a Python function ", "Complete this Python function:\n\ndef ", "Implement in Python: ",
    "Fix the bug in this code:\n\n", "Write a program that ", "def ", "Solve this problem step by step: ",
    "Calculate ", "A farmer ", "If a train ", "Tom has ", "Find the value of ", "A store ", "How many ", "Question: ",
    "Who ", "When did ", "What is the ", "Where ", "Why ", "How do I ", "Explain ", "List ",
    "Write an email ", "Write a story ", "Describe ", "Compare ", "Imagine that you are ", "Can you ",
    "I need help with ", "Give me some advice on ", "Edit the following text:\n\n", "Translate into French: ",
    "Translate into German: ", "Translate to Spanish: ",
]
LONG = [                                                                           # ... where a longer text follows
    "Summarize the following article:\n\n", "Summarize this text in three sentences:\n\n",
    "Give a short summary of the story below.\n\n", "Summarize: ", "What are the main points of this report?\n\n",
    "Answer the question from the context.\n\nContext: ", "Read the following passage and answer the question.\n\n",
    "Here are some documents. Use them to answer the question.\n\nDocument 1: ",
    "Reference texts:\n\n", "Background:\n", "Find the mistakes in this essay:\n\n",
]
FORMS = [                                                          # of composed prompts: start, between texts, question
    ("Summarize the following article:\n\n", "\n\n", ""), ("Give a short summary of this text.\n\n", "\n\n", ""),
    ("Answer the question from the context.\n\nContext: ", "\n\n", "\n\nQuestion: "),
    ("Here are some documents. Use them to answer the question.\n\nDocument: ", "\n\nDocument: ", "\n\nQuestion: "),
]
FOREIGN = {"German": "Der Die Das Wir Ich Es Am Nach", "French": "Le La Les Nous Il En", "Spanish": "El La Los En Una",
           "Italian": "Il La In"}
TRANSLATE = [form.format(language) + start for language, starts in FOREIGN.items() for start in starts.split()
             for form in ("Translate the following {} sentence into English:\n", "Translate {} to English: ",
                          "Translate this {} text: ", "What does this mean in English? ")]
KINDS = (([""], (40, 60, 80, 100), 3), (SHORT, (40, 60, 80, 100), 3), (LONG, (100, 200, 300), 2),
         (TRANSLATE, (30, 60, 90), 2))


class RingCache(KVCache):
    """One slot is written for all rows at once and the slots are used in a circle, so that a row can start a new text
    at any step: what it may attend to is a matter of the mask alone, since keys carry their rotary position."""

    slot = 0

    def _hold(self, rows: torch.Tensor) -> None:
        L, b, k, capacity, d = rows.shape
        # apart: each one block
        self.capacity, (self.keys, self.values) = capacity, rows.view(L, 2, b, k // 2, capacity, d).unbind(1)

    def columns(self, r, n):
        return n                                                                   # the mask is for all slots already

    def attend(self, layer, queries, rows, mask):
        for kept, new in zip((self.keys, self.values), rows[:, :, 0].chunk(2, dim=1)):
            kept[layer, :, :, self.slot] = new
        scores = queries @ self.keys[layer].transpose(-1, -2) * queries.shape[-1]**-0.5 + mask
        return scores.softmax(-1) @ self.values[layer]      # on a CPU more than twice as fast here as the fused kernel


def looping(tokens: list[int]) -> bool:
    """Text that repeats itself: fewer than a third of its 4-grams are new."""
    grams = list(zip(*(tokens[i:] for i in range(4))))
    return len(grams) > 32 and len(set(grams)) < len(grams) / 3


def template(words) -> tuple[list[int], list[int]]:
    """The chat template's tokens before and behind a user's turn."""
    before, after = words.render([{"role": "user", "content": "\uE000"}]).split("\uE000")
    return words.encode_control(before), words.encode_control(after)


def given_prompts(file: str, words, longest: int, shards: list[Path],
                  cut: random.Random | None = None) -> Iterator[tuple[list[int], float | None]]:
    """The prompts of a file and the temperatures of their answers, without end: first each that no shard has an answer
    to, for a greedy one, then all again and again, at 0.7. With `cut`, which draws, the beginning of any of them
    instead, which the target writes on, and None. Prompts of more than `longest` tokens are left out, which is told."""
    from run import read_prompts
    prefix, closing = template(words)
    prompts = [prefix + words.encode(entry["text"]) + closing for entry in read_prompts(file, None)]
    random.Random(0).shuffle(prompts)
    fitting = [tokens for tokens in prompts if len(tokens) <= longest]
    if not fitting:
        raise SystemExit(f"error: argument --prompts is {file}, whose prompts all have more than {longest} tokens; "
                         "give a larger --length")
    longer = f"{len(prompts) - len(fitting)} have more than {longest} tokens"
    if cut:
        print(f"{len(fitting)} prompts to begin with; {longer}", flush=True)
        drawn = iter(lambda: cut.choice(fitting), None)
        return ((tokens[:cut.randint(len(prefix) + 1, len(tokens) - len(closing))], None) for tokens in drawn)
    answered = {tuple(tokens[:start]) for path in shards for tokens, start in read_text(path)}
    fresh = [tokens for tokens in fitting if tuple(tokens) not in answered]
    print(f"{len(fresh)} prompts without an answer yet, {len(fitting) - len(fresh)} with one; {longer}", flush=True)
    return itertools.chain(zip(fresh, itertools.repeat(0.0)), zip(itertools.cycle(fitting), itertools.repeat(0.7)))


class Writer:
    """Rows of conversations that a target writes side by side, each at its own place: given tokens first (the template
    and an opener), then the user's turn, the template's closing, the answer. All of their state [b] lives on the
    target's device."""

    def __init__(self, model: Model, words, args, taps: tuple[int, ...] = (), stock: list[tuple[list[int], int]] = (),
                 prompts: Iterator | None = None):
        """stock: conversations to compose prompts of, as `read_text` gives them. prompts: as `given_prompts` gives
        them. With neither, the target writes the user's turns too."""
        prefix, self.closing = template(words)
        self.kinds = [([prefix + words.encode(opener.rstrip(" ")) for opener in openers], lengths, share)
                      for openers, lengths, share in KINDS]
        self.forms = [(prefix + words.encode(start), words.encode(between), question and words.encode(question))
                      for start, between, question in FORMS]
        # composed prompts are longer
        most = len(self.closing) + max(len(given) + max(lengths)
                                       for openers, lengths, _ in self.kinds for given in openers)
        self.stock = [(tokens[len(prefix):start - len(self.closing)], tokens[start:-1])
                      for tokens, start in stock if start <= most]
        self.model, self.args, self.taps, self.prompts, self.rng = model, args, taps, prompts, random.Random(args.seed)
        b, n, device = args.batch, args.length, model.device
        # a CPU's compiled layers take texts with a cache each
        self.cache = (PackedCache([model.new_cache(n) for _ in range(b)], [1] * b) if model.kernels else
                      RingCache(model.config, n, model.dtype, device, b))
        self.features = torch.zeros(b, n, len(taps) * model.config.hidden_size, dtype=torch.bfloat16, device=device)
        self.text = torch.zeros(b, n, dtype=torch.int64, device=device)
        zeros = lambda dtype=torch.int64: torch.zeros(b, dtype=dtype, device=device)
        self.size, self.given = zeros(), zeros()                                 # tokens read; known without the target
        self.limit = zeros()                                                     # longest prompt
        self.answer_from, self.done = zeros(), zeros(torch.bool)                 # 0: the user's turn is still open
        self.user_heat, self.answer_heat = zeros(torch.float32), zeros(torch.float32)
        self.rows, self.ages = torch.arange(b, device=device), torch.arange(n, device=device)
        self.closers = torch.tensor([*model.config.eos_token_ids, self.closing[0]], device=device)
        self.noise = torch.Generator(device).manual_seed(args.seed)
        self.begin(range(b))

    def begin(self, rows) -> None:
        """Start a new conversation in each of these rows."""
        args, rng, columns = self.args, self.rng, []
        for _ in rows:
            heat, lengths = None, ()                               # lengths: of what the target adds to the user's turn
            if self.prompts:
                given, heat = next(self.prompts)
                lengths = (10, 20, 40, 80) if heat is None else ()
            elif self.stock:
                given = self.compose()
            else:
                openers, lengths, _ = rng.choices(self.kinds, [share for *_, share in self.kinds])[0]
                given = rng.choice(openers)
            limit = min(len(given) + rng.choice(lengths), args.length - len(self.closing) - 16) if lengths else 0
            user_heat = rng.choice((0.7, 0.8, 0.9, 1.0))
            if heat is None:
                heat = 0.0 if rng.random() < args.greedy_share else 0.7
            columns.append((given, len(given), 0 if lengths else len(given), limit, user_heat, heat))
        text, *values = zip(*columns)
        device, rows = self.text.device, torch.tensor(list(rows), device=self.text.device)
        width = max(map(len, text))
        self.text[rows, :width] = torch.tensor([given + [0] * (width - len(given)) for given in text], device=device)
        for state, value in zip((self.given, self.answer_from, self.limit, self.user_heat, self.answer_heat), values):
            state[rows] = torch.tensor(value, dtype=state.dtype, device=device)
        for state in (self.size, self.done):
            state[rows] = 0

    def compose(self) -> list[int]:
        """A long prompt out of answers in stock: an article, or documents and the question that one of them answers."""
        rng, text = self.rng, []
        start, between, question = rng.choice(self.forms)
        longest = self.args.length * rng.choice((3, 4, 5, 6)) // 8
        asked, answer = rng.choice(self.stock)
        answers, size = [answer], len(answer)
        while size < longest:
            answers.append(rng.choice(self.stock)[1])
            size += len(answers[-1])
        rng.shuffle(answers)
        for answer in answers:
            text += between + answer
        text = start + text[len(between):][:longest] + (question + asked if question else [])
        return text[:self.args.length - len(self.closing) - 16] + self.closing

    def step(self) -> None:
        """Every row reads its next token and, where none is given, gets one more."""
        n, rows, size = self.args.length, self.rows, self.size
        closing = torch.tensor(self.closing, device=size.device)
        read = self.text[rows, size]
        if self.model.kernels:
            for cache, length in zip(self.cache.caches, size.tolist()):
                cache.length = length
            logits, tapped = self.model(read[None], size[None], self.cache, [None] * len(rows), taps=self.taps)
        else:
            mask = ((self.cache.slot - self.ages) % n)[None] <= size[:, None]                        # [b, n]
            logits, tapped = self.model(read[:, None], size[:, None], self.cache, mask[:, None], taps=self.taps)
            self.cache.slot = (self.cache.slot + 1) % n
        if self.taps:
            self.features[rows, size] = tapped.flatten(0, 1).to(torch.bfloat16)
        logits, answering = logits.flatten(0, 1), self.answer_from > 0
        drawn = logits.max(-1).indices
        heat = torch.where(answering, self.answer_heat, self.user_heat) * (size + 1 >= self.given)
        hot = heat.nonzero()[:, 0]                                             # noise is dear on a CPU: only where used
        sums = (logits[hot].float() / heat[hot, None]).softmax(-1).cumsum(-1)
        noise = torch.rand(len(hot), 1, generator=self.noise, device=size.device)
        drawn[hot] = torch.searchsorted(sums, noise * sums[:, -1:]).clamp_max(logits.shape[-1] - 1)[:, 0]
        size = self.size = size + ~self.done
        ended = ((size > self.answer_from) & torch.isin(read, self.closers[:-1])
                 | (size - self.answer_from >= self.args.answer_length))
        self.done = self.done | answering & ended | (size >= n - 1)
        new = (size >= self.given) & ~self.done
        closed = new & ~answering & (torch.isin(drawn, self.closers) | (size >= self.limit))
        self.text[rows, size] = torch.where(new, drawn, self.text[rows, size])
        spots = rows[:, None], (size[:, None] + torch.arange(len(closing), device=size.device)).clamp_max(n - 1)
        self.text[spots] = torch.where(closed[:, None], closing, self.text[spots])
        self.given = torch.where(closed, size + len(closing), self.given)
        self.answer_from = torch.where(closed, self.given, self.answer_from)

    def finished(self) -> list[tuple]:
        """The conversations that are done and worth keeping, as `write_shard` takes them; their rows begin anew."""
        ready = self.done.nonzero()[:, 0]
        if not len(ready):
            return []
        kept, texts = [], self.text[ready].int().cpu()
        for row, text, size, start in zip(ready.tolist(), texts, self.size[ready].tolist(),
                                          self.answer_from[ready].tolist()):
            if start and size - start >= 8 and not looping(text[start:size].tolist()):
                kept.append((text[:size], start, self.features[row, :size].to("cpu", copy=True) if self.taps else None))
        self.begin(ready.tolist())
        return kept


@torch.inference_mode()
def generate(args) -> None:
    from run import Text
    if args.length < 128:
        raise SystemExit(f"error: argument --length is {args.length}; expected at least 128")
    if args.cut and not args.prompts:
        raise SystemExit("error: argument --cut needs --prompts: it is their beginnings that the target writes on")
    args.batch = args.batch or (64 if stores_features(args) else 256)
    folder, data = model_folder(args), data_folder(args)
    data.mkdir(parents=True, exist_ok=True)
    done = sorted(data.glob("shard-*.safetensors"))
    have = sum(shard_tokens(p) for p in done)
    number = int(done[-1].stem.split("-")[1]) + 1 if done else 0
    args.seed += number
    model = writing_model(folder, args)
    words = Text(folder)
    stock = [text for path in done[1:] for text in read_text(path)] if args.compose else []
    prompts = (given_prompts(args.prompts, words, args.length - 64, done,
                             random.Random(args.seed) if args.cut else None) if args.prompts else None)
    writer = Writer(model, words, args, four_taps(model) if stores_features(args) else (), stock, prompts)
    if args.compose and not writer.stock:
        raise SystemExit(f"error: --compose needs answers to compose prompts of; {data} holds none after its first "
                         "shard: run 'generate' without it first")
    kept, began, made, steps = [], time.time(), 0, 0
    while have < args.tokens:
        writer.step()
        steps += 1
        if steps % 8:                                                              # looking waits for the device
            continue
        kept += writer.finished()
        held = sum(len(tokens) for tokens, _, _ in kept)
        if held >= args.shard_tokens:
            path = data / f"shard-{number:05d}.safetensors"
            write_shard(path, kept)
            have, made, number, kept = have + held, made + held, number + 1, []
            print(f"{path.name}: {have:,} of {args.tokens:,} tokens, {made / (time.time() - began):.0f} tokens/s",
                  flush=True)


def writing_model(folder: Path, args) -> Model:
    """A target to write with: on a CPU, where it can, in compiled layers, which texts side by side share."""
    from run import choose_products
    compiled = choose_products(None, torch.device(args.device), args.dtype)
    if compiled:
        model = load_model(folder, dtype=args.dtype, products=compiled)
        model.kernels = kernels(model)
        if model.kernels:
            return model
        del model
    return load_model(folder, dtype=args.dtype, device=args.device, pack=False)


def stores_features(args) -> bool:
    """On a CPU features are kept on disk; a GPU computes them again faster than they could be moved."""
    return torch.device(args.device).type == "cpu"


def four_taps(target: Model) -> tuple[int, ...]:
    """The outputs that a head reads, and the last."""
    layers = target.config.num_hidden_layers
    return *default_taps(layers), layers - 1


def features_of(target: Model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """The outputs of those layers [b, n, 4H], side by side, for whole texts [b, n]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
    return target(tokens, positions, cache, taps=four_taps(target), last_only=True)[1]


# ------------------------------------------------------------------------------------------------------------ training

class ChainCache(NoCache):
    """Attention during training-time test (EAGLE-3, section 3.2). In chained step k, position i reads the true features
    up to i - k and, behind them, the head's own guesses of steps 1..k: the one of step s that belongs to it was made at
    i - (k - s). Every position of a batch is trained at once, so those guesses lie on diagonals."""

    def __init__(self):
        self.past = []                                                             # a pair (keys, values) for each step

    def attend(self, layer, queries, rows, mask):                                  # [b, k, g*n, d], [b, 2k, n, d]
        keys, values = rows.chunk(2, dim=1)
        self.past.append((keys, values))
        b, k, n, d = keys.shape
        step, queries = len(self.past) - 1, queries * d**-0.5
        scores = (queries @ self.past[0][0].transpose(-1, -2) + mask).view(b, k, -1, n, n)
        queries = queries.view(b, k, -1, n, d)
        own = [(queries * behind(self.past[s][0], step - s)[:, :, None]).sum(-1) for s in range(1, step + 1)]
        weights = torch.cat((scores, *(score[..., None] for score in own)),
                            dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
        out = weights[..., :n].flatten(2, 3) @ self.past[0][1]
        for s in range(1, step + 1):
            out = out + (weights[..., n + s - 1, None] * behind(self.past[s][1], step - s)[:, :, None]).flatten(2, 3)
        return out


def behind(x: torch.Tensor, by: int) -> torch.Tensor:
    """x [..., n, d] moved `by` positions to the right, zeros in front."""
    return F.pad(x[..., :x.shape[-2] - by, :], (0, 0, by, 0)) if by else x


def chain(head: Eagle3, tokens, features, steps: int):
    """Yield the head's logits [b, n, draft V] in `steps` chained steps: tokens [b, n] follow the positions of features
    [b, n, 3H]."""
    n, cache = tokens.shape[1], ChainCache()
    positions = torch.arange(n, device=tokens.device)[None].expand(len(tokens), -1)
    hidden = head.fc(features.to(head.fc.weight.dtype))
    for step in range(steps):
        mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril(-step)
        logits, hidden = head(tokens, hidden, positions, cache, mask)
        yield logits
        hidden = behind(hidden, 1)


class Texts:
    """The conversations of some shards: tokens in memory, features from disk where they are there, else from the
    target."""

    def __init__(self, shards: list[Path], target: Model, most: int = 2**31):
        if most < 1:
            raise ValueError(f"--held-out is {most}; expected 1 or more")
        self.target, self.entries, tokens, base = target, [], [], 0
        for path in shards:
            file, at = safe_open(path, "pt"), 0
            stored = file if "features" in file.keys() else None
            tokens.append(file.get_tensor("tokens"))
            for size, answer_from in file.get_tensor("lengths").tolist():
                self.entries.append((base + at, size, answer_from, stored, at))
                at += size
            base += at
        # spread out: short conversations are finished first
        self.entries = self.entries[::max(1, len(self.entries) // most)][:most]
        self.tokens, self.text = sum(entry[1] for entry in self.entries), torch.cat(tokens).to(target.device)

    def batches(self, rng: random.Random, size: int):
        """One pass in random order; a batch holds conversations of similar length, about `size` tokens with padding.
        Yields, on the target's device, tokens [b, n] int64, features [b, n, 4H] and kind [b, n]: 0 padding, 1 the
        user's turn, 2 where a token of the answer is predicted."""
        order = sorted(self.entries, key=lambda entry: entry[1] + rng.uniform(0, 20))
        batches, batch, longest = [], [], 0
        for entry in order:
            longest = max(longest, entry[1])
            if batch and (len(batch) + 1) * longest > size:
                batches.append(batch)
                batch, longest = [], entry[1]
            batch.append(entry)
        batches.append(batch)
        rng.shuffle(batches)
        for batch in batches:
            start, length, answer_from = torch.tensor([entry[:3] for entry in batch],
                                                      device=self.text.device).T[..., None]           # each [b, 1]
            at = torch.arange(int(length.max()), device=self.text.device)
            inside = at < length
            tokens = self.text[(start + at).clamp_max(len(self.text) - 1)].long() * inside
            yield tokens, self.features(tokens, batch), torch.where(at < answer_from - 1, 1, 2) * inside

    @torch.no_grad()
    def features(self, tokens: torch.Tensor, batch: list[tuple]) -> torch.Tensor:
        if any(file is None for *_, file, _ in batch):
            return features_of(self.target, tokens, NoCache())                    # padding comes last: no token sees it
        features = torch.zeros(*tokens.shape, 4 * self.target.config.hidden_size, dtype=torch.bfloat16)
        for row, (_, size, _, file, at) in enumerate(batch):
            features[row, :size] = file.get_slice("features")[at:at + size]
        return features.to(tokens.device)


def new_head(target: Model, d2t: torch.Tensor) -> Eagle3:
    """A fresh head: the layer starts as one of the target's last, `lm_head` as the target's own rows, `fc` as the last
    feature."""
    layers, H = target.config.num_hidden_layers, target.config.hidden_size
    config = replace(target.config, num_hidden_layers=1, draft_vocab_size=len(d2t), target_hidden_size=H, qk_norm=False,
                     architecture="LlamaForCausalLMEagle3", tie_word_embeddings=False)
    head = Eagle3(config, default_taps(layers))
    head.embed_tokens, head.d2t = None, d2t                               # shared with the target, whose dtype it keeps
    source, theirs = target.layers[layers - 2], dict(target.layers[layers - 2].named_parameters())
    with torch.no_grad():
        head.fc.weight.normal_(std=0.3 * (3 * H)**-0.5)
        head.fc.weight[:, 2 * H:] += torch.eye(H)
        qkv = source.self_attn.qkv_proj.weight.float()
        head.self_attn.qkv_proj.weight.copy_(torch.cat((torch.randn_like(qkv) * qkv.std(), qkv), dim=1))
        for name in ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "post_attention_layernorm"):
            own, given = head.get_submodule(name).weight, theirs.get(f"{name}.weight")
            if given is not None and given.shape == own.shape:
                own.copy_(given)
            else:                                                                  # the target's layer has experts
                own.normal_(std=0.3 * own.shape[1]**-0.5)
        for norm, weight in ((head.input_layernorm, torch.ones(H)), (head.hidden_norm, source.input_layernorm.weight),
                             (head.norm, target.norm.weight * 0.3)):
            norm.weight.copy_(weight)
        head.lm_head.weight.copy_(target.lm_head.weight[torch.arange(len(d2t), device=d2t.device) + d2t])
    return head


def save_head(head: Eagle3, folder: Path, target: Model, note: dict) -> None:
    """Write the published EAGLE-3 layout in bfloat16; `embed_tokens` is shared with the target and left out."""
    c = head.config
    tensors = unstacked(head, _stacked(c, "", "", 2 * c.hidden_size, c.intermediate_size), torch.bfloat16)
    tensors = {name if name in ("fc.weight", "norm.weight", "lm_head.weight") else f"midlayer.{name}": value
               for name, value in tensors.items() if name not in ("embed_tokens.weight", "d2t")}
    t2d = torch.zeros(c.vocab_size, dtype=torch.bool)
    t2d[torch.arange(c.draft_vocab_size) + head.d2t.cpu()] = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {"d2t": head.d2t.cpu(), "t2d": t2d}, folder / "model.safetensors")
    rope = target.config.rope
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_act": "silu", "num_hidden_layers": 1, "tie_word_embeddings": False,
        **{name: getattr(c, name) for name in
           ("vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size", "intermediate_size",
            "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")},
        "rope_theta": rope["rope_theta"], **({"rope_scaling": rope} if rope["rope_type"] != "default" else {}),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(head.taps)}}, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(note, indent=1) + "\n")


@torch.no_grad()
def validate(head: Eagle3, texts: Texts, target: Model, args, steps: int = 6) -> dict:
    """On held-out answers: how often the target's choice is the head's first, or among its first 8, in each chained
    step."""
    top, count, lm_head = torch.zeros(2, steps), 0, target.lm_head.weight.float()
    for tokens, features, kind in texts.batches(random.Random(0), args.batch_tokens):
        H, kind = target.config.hidden_size, kind[:, 1:]
        best = F.linear(target.norm(features[:, 1:, 3 * H:].float()), lm_head).argmax(-1)   # after position i + 1
        count += int((kind == 2)[:, steps:].sum())
        with narrow(args.device):
            for step, logits in enumerate(chain(head, tokens[:, 1:], features[:, :-1, :3 * H], steps)):
                guesses = head.to_target(logits.topk(8).indices)
                right = (guesses == best[..., None]) & (kind == 2)[..., None]
                right[:, :steps] = False
                top[:, step] += torch.stack((right[..., 0].sum(), right.any(-1).sum())).cpu()
    return {"top1": [round(float(x) / count, 4) for x in top[0]], "top8": [round(float(x) / count, 4) for x in top[1]]}


def new_optimizers(matrices: list, others: list, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW at a third of the rate for the rest: what every training here uses."""
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr / 3, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(args, seen: int, updates: int) -> float:
    """The share of the learning rate: it rises over 100 updates, stays, and falls over the last `args.decay` of the
    run."""
    return min((updates + 1) / 100, 1.0, max(0.02, (args.tokens - seen) / max(1, args.decay * args.tokens)))


def descend(loss: torch.Tensor, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One update of all that the optimizers hold, at this share of their learning rates, gradients clipped to norm
    1."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group.setdefault("base", group["lr"]) * rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
    with Wide() if chosen_dtype(loss.device) == torch.float32 else nullcontext():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Wide(TorchFunctionMode):
    """Within it no tensor becomes bfloat16, as torch's Muon wants: where a CPU imitates it, it takes a minute."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].float() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


def report_progress(seen: int, tokens: int, loss: float, speed: float) -> None:
    print(f"{seen:,} of {tokens:,} tokens, loss {loss:.4f}, {speed:.0f} tokens/s, "
          f"about {(tokens - seen) / speed / 60:.0f} min left", flush=True)


def training_state(file: Path, args, part: str, settings: tuple[str, ...]) -> dict | None:
    """What an earlier call of the same training saved, if it did; refuses another tool's, and that of a run with other
    settings."""
    if not file.exists():
        return None
    state = torch.load(file, map_location=args.device, weights_only=True)
    if part not in state:
        raise SystemExit(f"error: {file} is another tool's training state; give another --name, or delete the file")
    for name in settings:
        value = getattr(args, name)
        if state.get(name, value) != value:
            raise SystemExit(f"error: argument --{name.replace('_', '-')} is {value}, but {file} was begun with "
                             f"{state[name]}; give another --name, or delete the file")
    return state


def train(args) -> None:
    """Minimise the cross-entropy to the target's distribution on the draft vocabulary, in every chained step
    (training-time test); a batch has a random number of them.

    Matrices are updated by Muon, the rest by AdamW. The learning rate warms up, stays, and falls linearly over the last
    part of the run. The state is saved every few minutes; the same command continues, with a new order of the texts."""
    if not 0 <= args.blend <= 1 or args.blend < 1 and (not args.start or args.draft_vocab):
        raise SystemExit(f"error: argument --blend is {args.blend}; expected between 0 and 1, and less than 1 needs "
                         "--start, without --draft-vocab")
    data = data_folder(args)
    target = load_model(model_folder(args), dtype=args.dtype, device=args.device, pack=False)
    H = target.config.hidden_size
    shards = sorted(data.glob("shard-*.safetensors"))
    if len(shards) < 2:
        raise SystemExit("error: fewer than two shards of self-made text; run the command 'generate' first")
    held, state_file = Texts(shards[:1], target, args.held_out), data / f"{args.name}.pt"
    settings = "start", "draft_vocab", "steps", "fade", "user_weight", "lr"
    state, start = training_state(state_file, args, "head", settings), None
    if args.start and (not state or args.blend < 1):
        start = load_eagle3(args.start, target, pack=False)
        if start.taps != (taps := default_taps(target.config.num_hidden_layers)):
            raise SystemExit(f"error: --start {args.start}: the head reads the outputs of layers {start.taps}; "
                             f"expected {taps}")
        if start.embed_tokens is not target.embed_tokens:
            raise SystemExit(f"error: --start {args.start}: the head has embeddings of its own; "
                             "expected one that reads the target's")
        start = start.state_dict()
    if state:
        d2t = state["head"]["d2t"]
    elif start and not args.draft_vocab:
        d2t = start["d2t"].to(args.device)
    else:
        counts = torch.zeros(target.config.vocab_size)
        for path in shards[1:]:
            counts += torch.bincount(safe_open(path, "pt").get_tensor("tokens").long(), minlength=len(counts))
        chosen = counts.argsort(descending=True, stable=True)[:args.draft_vocab or 8192].sort().values
        print(f"draft vocabulary: {len(chosen)} tokens, {float(counts[chosen].sum() / counts.sum()):.4f} of the text")
        d2t = (chosen - torch.arange(len(chosen))).to(args.device)
    head = new_head(target, d2t).to(args.device).float()
    head.embed_tokens = target.embed_tokens.requires_grad_(False)
    for name, value in head.state_dict().items() if start else ():
        if name not in ("d2t", "lm_head.weight") and start[name].shape != value.shape:
            raise SystemExit(f"error: --start {args.start}: tensor '{name}' has shape {list(start[name].shape)}; "
                             f"expected {list(value.shape)}")
    rows = target.lm_head.weight[torch.arange(len(d2t), device=d2t.device) + d2t].float()
    matrices = [p for name, p in head.named_parameters()
                if p.dim() == 2 and "lm_head" not in name and "embed" not in name]
    others = [p for name, p in head.named_parameters() if "embed" not in name and all(p is not m for m in matrices)]
    optimizers = new_optimizers(matrices, others, args.lr)
    seen, updates, history = 0, 0, []
    if state:
        head.load_state_dict(state["head"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        seen, updates, history = state["seen"], state["updates"], state["history"]
        print(f"continuing after {seen:,} tokens")
    elif start:
        # by target id: its row in the start's lm_head
        row_of = torch.full((target.config.vocab_size,), -1, device=d2t.device)
        row_of[start["d2t"] + torch.arange(len(start["d2t"]), device=d2t.device)] = torch.arange(
            len(start["d2t"]), device=d2t.device)
        row = row_of[d2t + torch.arange(len(d2t), device=d2t.device)]
        with torch.no_grad():
            head.lm_head.weight[row >= 0] = start["lm_head.weight"][row[row >= 0]].float()
        head.load_state_dict({name: value for name, value in start.items()
                              if name not in ("d2t", "lm_head.weight", "embed_tokens.weight")}, strict=False)
    rng = random.Random(args.seed + updates)
    began, start_seen, running, saved_at = time.time(), seen, None, time.time()

    def save():
        keep = {name: value for name, value in head.state_dict().items() if "embed" not in name}
        with whole(state_file) as file:
            torch.save({"head": keep, "optimizers": [o.state_dict() for o in optimizers], "seen": seen,
                        "updates": updates, "history": history,
                        **{name: getattr(args, name) for name in settings}}, file)

    while seen < args.tokens:
        # what `generate` has added meanwhile counts
        texts = Texts(sorted(data.glob("shard-*.safetensors"))[1:], target)
        for tokens, features, kind in texts.batches(rng, args.batch_tokens):
            kind = kind[:, 1:]
            weight = torch.tensor((0.0, args.user_weight, 1.0), device=args.device)[kind]             # [b, n - 1]
            with torch.no_grad():
                wanted = F.linear(target.norm(features[:, 1:, 3 * H:].float()), rows).softmax(-1)  # [b, n - 1, draft V]
            loss, share = 0.0, 0.0
            with narrow(args.device):
                steps = rng.randint(1, args.steps)               # more text for the same work than all steps every time
                for step, logits in enumerate(chain(head, tokens[:, 1:], features[:, :-1, :3 * H], steps)):
                    here = weight[:, step:]
                    losses = F.cross_entropy(logits[:, step:].flatten(0, 1), wanted[:, step:].flatten(0, 1),
                                             reduction="none").view_as(here)
                    loss = loss + args.fade**step * (losses * here).sum() / here.sum()
                    share += args.fade**step
            loss = loss / share
            descend(loss, optimizers, learning_rate(args, seen, updates))
            seen, updates = seen + int((kind > 0).sum()), updates + 1
            loss = loss.item()
            running = loss if running is None else 0.98 * running + 0.02 * loss
            if updates % 20 == 0:
                report_progress(seen, args.tokens, running, (seen - start_seen) / (time.time() - began))
            if updates % args.validate == 0 or seen >= args.tokens:
                history.append({"tokens": seen, "text_tokens": texts.tokens, "loss": round(running, 4),
                                **validate(head, held, target, args)})
                print(json.dumps(history[-1]), flush=True)
            if time.time() - saved_at > 300 or seen >= args.tokens:
                save()
                saved_at = time.time()
            if seen >= args.tokens:
                break
    if args.blend < 1:
        with torch.no_grad():
            for name, weight in head.named_parameters():
                if "embed" not in name:
                    weight.lerp_(start[name].float(), 1 - args.blend)
        history.append({"tokens": seen, "blend": args.blend, **validate(head, held, target, args)})
        print(json.dumps(history[-1]))
    note = {"command": command_line("tools/train_eagle3.py"),
            "torch": torch.__version__, "device": args.device, "threads": torch.get_num_threads(), "held_out": history}
    save_head(head, Path(args.out), target, note)
    print(f"wrote {args.out}")


def text(args) -> None:
    """Put the text of all shards, without features, into one small file; with --read, make shards from such a file."""
    data = data_folder(args)
    if not args.read:
        shards = [safe_open(path, "pt") for path in sorted(data.glob("shard-*.safetensors"))]
        if not args.file:
            raise SystemExit("error: 'text' needs a file to write, or --read")
        if not shards:
            raise SystemExit(f"error: {data} holds no self-made text; run the command 'generate' first")
        tensors = {name: torch.cat([shard.get_tensor(name) for shard in shards]) for name in ("tokens", "lengths")}
        with whole(args.file) as file:
            save_file({name: value.to(torch.uint16 if value.max() < 2**16 else torch.int32)
                       for name, value in tensors.items()}, file)
        return
    texts = read_text(Path(args.file or TEXT))
    if stores_features(args):
        target = load_model(model_folder(args), dtype=args.dtype, device=args.device, pack=False)
    data.mkdir(parents=True, exist_ok=True)
    shards = -(-len(texts) // SHARD)
    for number in range(shards):
        part, path = texts[number * SHARD:(number + 1) * SHARD], data / f"shard-{number:05d}.safetensors"
        if path.exists():
            if read_text(path)[:1] != part[:1]:
                raise SystemExit(f"error: {path} holds other text; give another --data, or delete its shards")
            continue
        found = []
        with torch.inference_mode():
            for tokens, answer_from in part:
                ids, features = torch.tensor([tokens]), None
                if stores_features(args):
                    features = features_of(target, ids, target.new_cache(len(tokens)))[0].to(torch.bfloat16)
                found.append((ids[0].int(), answer_from, features))
        write_shard(path, found)
        print(f"\r{number + 1} of {shards} shards", end="", flush=True)
    print()


def read_text(path: Path) -> list[tuple[list[int], int]]:
    """Conversations as (tokens, where the answer starts)."""
    with safe_open(path, "pt") as file:
        tokens, out, at = file.get_tensor("tokens").tolist(), [], 0
        for size, answer_from in file.get_tensor("lengths").tolist():
            out.append((tokens[at:at + size], answer_from))
            at += size
    return out


def write_shard(path: Path, conversations: list) -> None:
    """conversations: (tokens [n] int32, where the answer starts, features [n, 4H] or None). Whole or not at all."""
    tokens, starts, features = zip(*conversations)
    tensors = {"tokens": torch.cat(tokens),
               "lengths": torch.tensor([[len(t), a] for t, a in zip(tokens, starts)], dtype=torch.int32)}
    if features[0] is not None:
        tensors["features"] = torch.cat(features)
    with whole(path) as partial:
        save_file(tensors, partial, metadata={"tokens": str(len(tensors["tokens"]))})


def shard_tokens(path: Path) -> int:
    with safe_open(path, "pt") as f:
        return int(f.metadata()["tokens"])


def chosen_device(name: str | None) -> str:
    from run import choose_device
    return str(choose_device(name))


def chosen_dtype(device: str, name: str = "auto") -> torch.dtype:
    from run import choose_dtype
    return choose_dtype(name, torch.device(device))


def narrow(device: str | torch.device) -> torch.autocast:
    """Products in bfloat16 where the hardware multiplies it: a CPU that imitates it takes five times as long."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=chosen_dtype(device) == torch.bfloat16)


def model_folder(args) -> Path:
    return fetch_checkpoint(args.model) if args.model else demo_model()


def data_folder(args) -> Path:
    if args.data:
        return Path(args.data)
    folder = model_folder(args)
    # others may have the same last name
    own = f"-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}" if args.model else ""
    return cache_folder() / "train" / f"{folder.name}{own}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="target folder or Hub id (default: the demo model)")
    parser.add_argument("--data", help="where self-made text and training state live (default: in Graft's cache)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
                        help="of the target (default: as run.py's)")
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="let the target write prompts and answers")
    make.add_argument("--tokens", type=int, default=4_000_000,
                      help="in all; on a CPU each takes 8 x hidden_size bytes of disk")
    make.add_argument("--batch", type=int, help="conversations side by side (default: 256, on a CPU 64)")
    make.add_argument("--length", type=int, default=512, help="longest conversation, in tokens")
    make.add_argument("--answer-length", type=at_least(8), default=200)
    own = make.add_mutually_exclusive_group()
    own.add_argument("--compose", action="store_true", help="make long prompts, documents up to three quarters of "
                     "--length, of the answers that are there")
    own.add_argument("--prompts", help="have these prompts answered (JSON lines with id, task and turns) instead of "
                     "prompts of the target's own")
    make.add_argument("--cut", action="store_true",
                      help="of each of --prompts give a beginning of random length alone, and let the target write on")
    make.add_argument("--greedy-share", type=float, default=0.8,
                      help="share of the answers decoded greedily; the rest at temperature 0.7")
    make.add_argument("--shard-tokens", type=int, default=100_000)
    words = commands.add_parser("text", help="write the text alone into one small file, or make shards from it")
    words.add_argument("file", nargs="?", help="with --read, default: the shipped text of the demo model")
    words.add_argument("--read", action="store_true", help="make shards from the file")
    fit = commands.add_parser("train", help="train a head on it")
    fit.add_argument("--out", required=True, help="folder for the finished head")
    fit.add_argument("--name", default="eagle3", help="of the training state, which a second call continues")
    fit.add_argument("--start", help="folder of a head to start from")
    fit.add_argument("--blend", type=float, default=1.0, help="in the finished head, the share of what was trained, "
                     "beside that of --start, which forgets less than all of it (WiSE-FT, arXiv 2109.01903)")
    fit.add_argument("--tokens", type=int, default=4_000_000, help="training tokens, repetitions included")
    fit.add_argument("--draft-vocab", type=int,
                     help="this many of the text's most frequent tokens (default: those of --start, or 8192)")
    fit.add_argument("--steps", type=int, default=4, help="most chained steps; each batch has 1 to so many")
    fit.add_argument("--fade", type=float, default=0.8, help="weight of a step's loss relative to the one before")
    fit.add_argument("--user-weight", type=float, default=0.3, help="weight of the user's turn in the loss")
    fit.add_argument("--batch-tokens", type=int, default=2048)
    fit.add_argument("--lr", type=float, default=2e-3)
    fit.add_argument("--decay", type=float, default=0.5,
                     help="last share of the run, in which the learning rate falls to 2%%")
    fit.add_argument("--validate", type=at_least(1), default=500, help="updates between validations")
    fit.add_argument("--held-out", type=int, default=80, help="conversations of the first shard to validate on")
    args = parser.parse_args()
    args.device = chosen_device(args.device)
    args.dtype = chosen_dtype(args.device, args.dtype)
    {"generate": generate, "text": text, "train": train}[args.command](args)


if __name__ == "__main__":
    tool(main)
