"""A draft model with a tokenizer of its own: methods `universal` (draft only) and `universal_graft`.

Source: Universal Assisted Generation (Intel Labs and Hugging Face, 2024); Timor et al., "Accelerating LLM Inference
with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies", arXiv 2502.05202: its string-level exact
match.
Changes: what drafts. The draft model reads the text in its own tokens, drafts a likely chain with rivals beside it, and
their bytes come back as branches of target tokens. Bytes, not strings, so that half characters survive; the tokens at
the border are aligned (`Translator.longer`). The draft's KV cache is kept as far as its tokens of the text stay the
same.
Needs: byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, SmolLM2) on both sides and a draft model, `--draft` (folder or
Hub id).
Guarantees: the output of plain decoding; a branch is only a guess.

    python run.py "Why is the sky blue?" --method universal                 the demo model, a small draft model from
                                                                            assets/
    python run.py "Hello" --model FOLDER --draft FOLDER --method universal_graft
    python variants/universal.py train --out assets/smollm2-135m-universal  how that draft model was made
"""

import argparse
import json
import math
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from kernels import kernels  # noqa: E402
from model import (KVCache, Model, ModelConfig, NoCache, checkpoint_layout, fetch_checkpoint, load_beside,  # noqa: E402
                   unstacked)
from retrieval import Branch  # noqa: E402
from tree import DRAFT, Tree  # noqa: E402

DEMO_DRAFT = ROOT / "assets" / "smollm2-135m-universal"
LEAST = math.log(0.05)      # guesses less likely than this are not followed
OPEN = 4                    # words at the text's end that more text may still join differently
HELD = 8                    # most draft tokens of a last word that may turn out to begin a longer token
# GPT-2's letter for each byte
LETTERS = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


# --------------------------------------------------------------------------------------------------------------- bytes

class ByteTokenizer:
    """A byte-level BPE tokenizer as bytes: what every token spells, and the tokens of any bytes, whole characters or
    not. Neither its normalizer nor its control tokens come in between. Raises ValueError where `tokenizer`, out of
    `folder`, is of another kind."""

    def __init__(self, tokenizer, folder="tokenizer"):
        spec = json.loads(tokenizer.to_str())
        if (spec["model"]["type"] != "BPE" or not spec["pre_tokenizer"]
                or '"ByteLevel"' not in json.dumps(spec["decoder"])):
            raise ValueError(f"{folder}: the tokenizer is a {spec['model']['type']} with the decoder "
                             f"{(spec['decoder'] or {}).get('type')}; "
                             "expected byte-level BPE, as of GPT-2, Llama 3, Qwen or SmolLM2")
        self.model, self.splitter = tokenizer.model, tokenizer.pre_tokenizer
        self.start = tokenizer.encode("", add_special_tokens=True).ids  # what a text begins with
        self.control = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        plain = {i: token for token, i in tokenizer.get_vocab().items()
                 if token not in self.control and BYTES.keys() >= set(token)}
        self.spelled = ({i: bytes(map(BYTES.get, token)) for i, token in plain.items()}
                        | {i: name.encode() for name, i in self.control.items()})
        # vocabularies may lack bytes that are rare
        self.alphabet = {BYTES[token] for token in plain.values() if len(token) == 1}

    def words(self, data: bytes) -> list[str]:
        """`data` in letters, one a byte, cut where the tokenizer cuts before it merges; bytes that are no characters
        stand alone."""
        words, letters = [], "".join(map(LETTERS.get, data))
        for i, run in enumerate(re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))):
            words += ["".join(map(LETTERS.get, run.encode("utf-8", "surrogateescape")))] if i % 2 else \
                [word for word, _ in self.splitter.pre_tokenize_str(run)]
        return words if "".join(words) == letters else [letters]   # a splitter that adds or drops something is not used

    def tokens(self, words: list[str]) -> list[int]:
        return [token.id for word in words for token in self.model.tokenize(word)]

    def encode(self, data: bytes) -> list[int]:
        """Tokens that spell `data`, but for bytes that the vocabulary lacks."""
        return self.tokens(self.words(data))

    def spell(self, tokens: list[int]) -> bytes:
        return b"".join(self.spelled.get(token, b"") for token in tokens)

    def ends(self, tokens: list[int]) -> list[int]:
        """Where each token's bytes end."""
        return list(accumulate(len(self.spelled[token]) for token in tokens))


class Translator:
    """Between the tokens of a draft model and those of the target. A control token goes over as the one of the same
    name, or spelled out where the draft has none; what is spelled out never becomes a control token."""

    def __init__(self, draft: ByteTokenizer, target: ByteTokenizer, vocab: int):
        self.draft, self.target = draft, target
        # draft -> target
        self.namesake = {i: target.control[name] for name, i in draft.control.items() if name in target.control}
        self.own = {theirs: i for i, theirs in self.namesake.items()}
        controls = set(draft.control.values())
        self.plain = {i: data for i, data in draft.spelled.items()
                      if i not in controls and data and target.alphabet.issuperset(data)}
        self.sorted = sorted((data, i) for i, data in self.plain.items())
        self.ids = torch.tensor([i for _, i in self.sorted])
        self.mute = torch.ones(vocab, dtype=torch.bool)                 # draft tokens that the target cannot say
        self.mute[[*self.plain, *self.namesake]] = False

    def extend(self, ids: list[int], rest: bytes, tokens: list[int]) -> tuple[list[int], bytes]:
        """The draft's view of a text, its tokens and then bytes still open, grown by target tokens."""
        for token in tokens:
            if token in self.own:
                ids, rest = ids + self.draft.encode(rest) + [self.own[token]], b""
            else:
                rest += self.target.spelled.get(token, b"")
        return ids, rest

    def branch(self, ends: list[tuple[bytes, float]], last: int | None = None) -> Branch:
        """A chain of target tokens that spell `ends`, pieces of text with the scores of their ends, and behind them the
        namesake of draft token `last` if it is a control token. A token's score is that of the first piece that has all
        its bytes."""
        places, tokens = (list(accumulate(len(data) for data, _ in ends)),
                          self.target.encode(b"".join(data for data, _ in ends)))
        scores = [ends[bisect_left(places, end)][1] for end in self.target.ends(tokens)]
        if last in self.namesake:
            tokens, scores = tokens + [self.namesake[last]], scores + [ends[-1][1]]
        return tokens, list(range(-1, len(tokens) - 1)), scores

    def longer(self, word: bytes, logprobs: Tensor, k: int) -> list[tuple[float, int]]:
        """Draft tokens that begin with `word`, where the text ends for now, and go on, with their log-probabilities: of
        the k likeliest, those in which the target too has a border behind `word`; else it would have chosen another
        token there."""
        start, end = bisect_left(self.sorted, (word + b"\0",)), bisect_left(self.sorted, (word + b"\xff" * 256,))
        values, best = logprobs[self.ids[start:end]].topk(min(k, end - start))
        found = [(value, self.sorted[start + i][1]) for value, i in zip(values.tolist(), best.tolist())]
        return [(value, i) for value, i in found if len(word) in self.target.ends(self.target.encode(self.plain[i]))]


# ------------------------------------------------------------------------------------------------------------- drafting

class UniversalDrafter:
    """Drafts with a whole model of another vocabulary; one for each text."""

    taps = ()                                                           # it reads the text, not the target's features

    def __init__(self, model: Model, translator: Translator):
        self.model, self.translator, self.mute = model, translator, translator.mute.to(model.device)
        self.cache: KVCache = model.new_cache(0)
        self.cached: list[int] = []                                     # draft tokens, one for each row of the cache
        self.text: list[int] = []                                       # target tokens
        self.rewind(0)

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens of the text; returns how many are still known."""
        kept, self.text = self.text[:length], []
        self.ids, self.rest = list(self.translator.draft.start), b""  # the text in draft tokens, but for its last bytes
        self.read(kept)
        return len(kept)

    def observe(self, features: None, tokens: Tensor) -> None:
        """Note newly committed positions: tokens [1, m + 1], those and the next root. The draft model reads them when
        it drafts."""
        self.read(tokens[0, :-1].tolist())

    def read(self, tokens: list[int]) -> None:
        draft = self.translator.draft
        self.text += tokens
        self.ids, self.rest = self.translator.extend(self.ids, self.rest, tokens)
        settled = draft.words(self.rest)[:-OPEN]
        self.ids, self.rest = self.ids + draft.tokens(settled), self.rest[sum(map(len, settled)):]

    def forward(self, tokens: list[int], last_only: bool = False) -> Tensor:
        """Log-probabilities [n or 1, V] after n more draft tokens; what the target cannot say has none."""
        start, device = self.cache.length, self.model.device
        self.cache.reserve(start + len(tokens))
        positions = torch.arange(start, start + len(tokens), device=device)[None]
        logits, _ = self.model(torch.tensor([tokens], device=device), positions, self.cache, last_only=last_only)
        self.cache.commit(list(range(len(tokens))))
        self.cached += tokens
        return logits[0].float().masked_fill(self.mute, -math.inf).log_softmax(-1)

    def forget(self, rows: int) -> None:
        """Keep this many rows of the cache."""
        self.cache.length, self.cached = rows, self.cached[:rows]

    def catch_up(self, root: int, depth: int) -> tuple[list[int], Tensor]:
        """Read the text with its root. Returns the draft tokens of its last word, which may turn out to begin a longer
        token, and the log-probabilities [len + 1, V] before that word and after each of its tokens. Leaves room for
        depth more."""
        draft = self.translator.draft
        ids, rest = self.translator.extend(self.ids, self.rest, [root])
        *words, word = draft.words(rest) or [""]
        ids, last = ids + draft.tokens(words), draft.tokens([word])
        if not ids or len(last) > HELD:
            ids, last = ids + last or [0], []                           # 0: anything, where the text spells nothing
        half = self.model.config.max_position_embeddings // 2
        over = len(ids) + len(last) + depth - 2 * half
        ids = ids[max(0, -(-over // half)) * half:]                     # a full context drops its older half
        self.forget(shared(self.cached, ids[:-1]))
        for start in range(self.cache.length, len(ids) - 1, 256):
            self.forward(ids[start:min(start + 256, len(ids) - 1)], last_only=True)
        return last, self.forward(ids[-1:] + last)

    def expand(self, root: int, depth: int, top_k: int, sampler) -> Iterator[Tree]:
        """Yield one tree: the greedy chain of at most depth + 1 draft tokens, and at each of them its likely rivals,
        top_k - 1 at most."""
        translate = self.translator
        last, logprobs = self.catch_up(root, depth)
        word = translate.draft.spell(last)
        longer = translate.longer(word, logprobs[0], top_k) if last else []
        score = float(logprobs[range(len(last)), last].sum()) if longer else 0.0
        total = float(torch.tensor([score, *(value for value, _ in longer)]).logsumexp(0))
        choices = [(value - total, i, translate.plain[i][len(word):], len(last)) for value, i in longer]
        score, chain, branches = score - total, [], []
        for step in range(depth + 1):
            values, best = logprobs[-1].topk(min(top_k, logprobs.shape[-1]))
            choices += [(score + value, i, translate.plain.get(i, b""), 0)
                        for value, i in zip(values.tolist(), best.tolist())]
            (score, token, data, replaced), *rivals = sorted(choices, reverse=True)[:top_k]
            branches += [translate.branch([*chain, (data, value)], i) for value, i, data, _ in rivals if value > LEAST]
            chain.append((data, score))
            if token in translate.namesake or score < LEAST or step == depth:
                break
            self.forget(self.cache.length - replaced)
            logprobs, choices = self.forward([token]), []
        tree = Tree.rooted(root)
        branches.insert(0, translate.branch(chain, token))
        tree.graft([(0, DRAFT, branch) for branch in sampler.lean_branches(branches, [0] * len(branches))], 2**20)
        yield tree


def shared(a: list[int], b: list[int]) -> int:
    """How many items two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def prepare(setup, method: str):
    """The fields of a Plan; `--draft` names the draft model. Raises CheckpointError and ValueError, which say what is
    wrong with it."""
    folder = fetch_checkpoint(setup.draft or str(DEMO_DRAFT))
    text, model = type(setup.text)(folder), load_beside(folder, setup.model)
    model.kernels = kernels(model) if setup.model.kernels else None
    text.check(model)
    translator = Translator(ByteTokenizer(text.tokenizer, folder), ByteTokenizer(setup.text.tokenizer, "the target"),
                            model.config.vocab_size)
    # a weaker draft leaves the matrix work
    config = replace(setup.configure("eagle" if method == "universal" else "graft"), adjacency=True)
    return config, lambda: UniversalDrafter(model, translator)


# ------------------------------------------------------------------------------------------------- a draft model to try

def train(args) -> None:
    """A small Llama and its tokenizer, from the text that the demo model wrote (tools/train_eagle3.py); next-token
    cross-entropy."""
    from demo_model import demo_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from train_eagle3 import TEXT, descend, narrow, new_optimizers, read_text
    target = ByteTokenizer(Tokenizer.from_file(str(demo_model() / "tokenizer.json")))
    texts = [tokens for tokens, _ in read_text(TEXT)]
    control = sorted(name for name, i in target.control.items() if any(i in tokens for tokens in texts))
    plain = (target.spell([i for i in tokens if i not in target.control.values()]).decode("utf-8", "replace")
             for tokens in texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(plain, trainers.BpeTrainer(
        vocab_size=args.vocab, special_tokens=control, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    draft = ByteTokenizer(tokenizer)
    translator, stream = Translator(draft, target, args.vocab), []
    for tokens in texts:
        ids, rest = translator.extend([], b"", tokens)
        stream += ids + draft.encode(rest)
    blocks = torch.tensor(stream[:len(stream) // args.context * args.context]).view(-1, args.context)
    blocks, held = blocks[8:], blocks[:8].to(args.device)

    H = args.hidden
    torch.manual_seed(args.seed)
    model = Model(ModelConfig("LlamaForCausalLM", args.vocab, H, 8 * H // 3, args.layers, H // 32, H // 96, 32, 1e-5,
                              args.context, {"rope_type": "default", "rope_theta": 10000.0,
                                             "original_max_position_embeddings": args.context}, True)).to(args.device)
    model.lm_head.weight = model.embed_tokens.weight
    for name, value in model.named_parameters():
        torch.nn.init.ones_(value) if "norm" in name else torch.nn.init.normal_(value, std=0.02)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    optimizers = new_optimizers(matrices, others, args.lr)

    def losses(batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of a batch [b, context], and the share of tokens that were the likeliest."""
        positions = torch.arange(args.context - 1, device=batch.device)[None]
        with narrow(batch.device):
            logits = model(batch[:, :-1], positions, NoCache())[0].float()
        return (F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()),
                (logits.argmax(-1) == batch[:, 1:]).float().mean())

    updates, seen = max(1, args.tokens // (args.batch * args.context)), 0
    for update in range(updates):
        loss, _ = losses(blocks[torch.randint(len(blocks), (args.batch,))].to(args.device))
        # warm up, stay, fall over the second half
        descend(loss, optimizers, min((update + 1) / 50, 1.0, 2 * (updates - update) / updates))
        if update % 50 == 49 or update == updates - 1:
            print(f"{update + 1} of {updates} updates, loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        held_loss, right = (float(value) for value in losses(held))
    print(f"held out: loss {held_loss:.3f}, {right:.3f} right")
    save(model, tokenizer, Path(args.out))


def save(model: Model, tokenizer, folder: Path) -> None:
    """Write a checkpoint folder with transformers' names, in bfloat16."""
    from safetensors.torch import save_file
    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    save_file(unstacked(model, checkpoint_layout(model), torch.bfloat16), folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        **{name: getattr(c, name) for name in
           ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")},
        "rope_theta": c.rope["rope_theta"]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fit = parser.add_subparsers(dest="command", required=True).add_parser(
        "train", help="train a draft model for the demo model")
    fit.add_argument("--out", required=True, help="folder for the draft model")
    fit.add_argument("--tokens", type=int, default=900_000, help="training tokens, repetitions included")
    fit.add_argument("--vocab", type=int, default=2048)
    fit.add_argument("--hidden", type=int, default=192, help="width, a multiple of 96")
    fit.add_argument("--layers", type=int, default=2)
    fit.add_argument("--context", type=int, default=512)
    fit.add_argument("--batch", type=int, default=8)
    fit.add_argument("--lr", type=float, default=1e-2)
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
