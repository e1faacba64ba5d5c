"""Tests of variants/universal.py: no byte is lost between two tokenizers, and the output is that of plain decoding.

The toy tokenizers are byte-level BPE of different vocabulary, splitting, normalizer and control tokens; the models are
tiny, random and in float64, so their text is mostly broken characters.
"""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import universal
from graft import GraftConfig, Sampler, State
from model import load_model
from test_graft import checkpoint, collect, command, demo, full_forward, plain_greedy, tiny  # noqa: F401
from universal import ByteTokenizer, Translator, UniversalDrafter

SAMPLE = ("Hello, the sky isn't blue 2024.  def f(x):\n    return x + 1\n日本語のテキスト — naïve café, e\u0301 🙂👩‍🚀 "
          "<|end|> Привет")


def toy(size, control, splitter, normalizer=None, more=""):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.train_from_iterator([SAMPLE + more],
                                  trainers.BpeTrainer(vocab_size=size, special_tokens=control, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.encode_special_tokens = True
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DRAFT = toy(330, ["<|end|>", "<|only draft|>"], GPT2, more=" 日 🙂" * 9)
TARGET = toy(290, ["<|start|>", "<|end|>"], pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]),
             normalizers.NFKC())
# adds a space, so its splitting cannot be used
WHOLE = toy(330, ["<|end|>"], pre_tokenizers.ByteLevel(add_prefix_space=True))
PAIR = Translator(ByteTokenizer(DRAFT), ByteTokenizer(TARGET), 330)
DRAFTER = tiny(5, context=40, vocab_size=330)
pieces = st.sampled_from([*SAMPLE, *SAMPLE.split(" "), " ", "   ", "\n", "'", "'ll", "<|end|>", "<|only draft|>",
                          "\u0301", "\ufb01", "\x00"])
texts = st.lists(st.one_of(pieces, st.text(max_size=4)), max_size=14).map("".join)
anything = st.one_of(texts.map(str.encode), st.binary(max_size=20),
                     st.tuples(texts, st.integers(0, 3)).map(lambda t: t[0].encode()[t[1]:]))


@pytest.mark.parametrize("tokenizer", [DRAFT, TARGET, WHOLE])
@given(data=anything)
def test_tokens_spell_exactly_the_bytes_and_none_is_a_control_token(tokenizer, data):
    ours = ByteTokenizer(tokenizer)
    tokens = ours.encode(data)
    assert ours.spell(tokens) == data and not set(tokens) & set(ours.control.values())
    assert ours.ends(tokens) == [len(ours.spell(tokens[:i + 1])) for i in range(len(tokens))]


@given(texts)
def test_text_is_split_as_the_tokenizer_itself_does(text):
    assert ByteTokenizer(DRAFT).encode(text.encode()) == DRAFT.encode(text).ids


@given(anything, st.data())
def test_a_drafted_chain_becomes_target_tokens_of_the_same_bytes(data, choose):
    tokens = (PAIR.draft.encode(data) if choose.draw(st.booleans())
              else choose.draw(st.lists(st.sampled_from(list(PAIR.plain)), max_size=12)))
    scores = [-0.5 * (i + 1) for i in range(len(tokens))]
    last = choose.draw(st.sampled_from([None, *PAIR.draft.control.values()]))
    out, parents, got = PAIR.branch([*zip(map(PAIR.plain.get, tokens), scores)], last if tokens else None)
    if tokens and last in PAIR.namesake:
        assert out.pop() == TARGET.token_to_id("<|end|>") and got.pop() == scores[-1] and parents.pop() == len(out) - 1
    assert PAIR.target.spell(out) == PAIR.draft.spell(tokens) and parents == list(range(-1, len(out) - 1))
    for end, score in zip(PAIR.target.ends(out), got):                       # no token before all its bytes are drafted
        assert score == next(s for place, s in zip(PAIR.draft.ends(tokens), scores) if place >= end)


def whole_view(tokens: list[int]) -> list[int]:
    """A text of target tokens in draft tokens, from scratch."""
    end, out, run = TARGET.token_to_id("<|end|>"), [], b""
    for token in tokens:
        if token == end:
            out, run = out + PAIR.draft.encode(run) + [DRAFT.token_to_id("<|end|>")], b""
        else:
            run += PAIR.target.spelled[token]
    return out + PAIR.draft.encode(run)


@given(st.one_of(anything.map(PAIR.target.encode), st.lists(st.integers(0, 289), max_size=30)), st.integers(1, 4),
       st.integers(0, 30))
@example(PAIR.target.tokens(list("ab'll")), 1, 3)                                # "'" + "l" are two words, "'ll" is one
def test_the_drafts_view_of_a_growing_text_is_that_of_the_whole(tokens, step, kept):
    drafter = UniversalDrafter(DRAFTER, PAIR)
    for at in range(0, len(tokens), step):
        drafter.observe(None, torch.tensor([tokens[at:at + step] + [0]]))
        assert drafter.ids + PAIR.draft.encode(drafter.rest) == whole_view(tokens[:at + step])
    assert drafter.rewind(kept) == len(drafter.text) == min(kept, len(tokens))
    assert drafter.ids + PAIR.draft.encode(drafter.rest) == whole_view(tokens[:kept])


def test_a_word_at_the_border_may_begin_a_longer_token_where_the_target_would_have_stopped_there():
    longer = lambda word, pair=PAIR: {pair.plain[i] for _, i in pair.longer(word, torch.zeros(330), 330)}
    assert "日".encode() in PAIR.draft.spelled.values() and "日".encode() not in PAIR.target.spelled.values()
    assert longer("日".encode()[:1]) and all(data.startswith("日".encode()[:1]) and len(data) > 1
                                            for data in longer("日".encode()[:1]))
    same = Translator(ByteTokenizer(DRAFT), ByteTokenizer(DRAFT), 330)
    whole = [data for data in same.plain.values() if data.decode("utf-8", "ignore").encode() == data]
    # it would not have stopped within its own tokens
    assert not any(data in whole for word in whole for data in longer(word, same))
    assert any(data.startswith(word) for word in whole for data in whole if data != word)


# ----------------------------------------------------------------------------------------------------------- lossless

@settings(max_examples=40)
@given(st.sampled_from(["eagle", "prune", "graft", "graft_tail"]), st.integers(0, 2),
       st.lists(st.integers(0, 289), min_size=1, max_size=12), st.integers(0, 7), st.integers(1, 5),
       st.sampled_from([0.0, 0.8]), st.sampled_from([(), tuple(0.02 * n for n in range(9))]))
def test_it_is_plain_decoding(method, seed, prompt, depth, top_k, temperature, cost):
    model = tiny(seed, vocab_size=290)
    fields = dict(max_new_tokens=20, temperature=temperature, eos_token_ids=())
    config = GraftConfig(method=method, budget=8, depth=depth, draft_top_k=top_k, verify_cost=cost,
                         prefill_chunk=5, **fields)
    expected = collect(model, prompt, GraftConfig(method="ar", **fields))[0]
    assert temperature or expected == plain_greedy(model, prompt, 20)[0]
    state = State(model, UniversalDrafter(DRAFTER, PAIR))
    for _ in range(2):                                                      # cold, then warm stores and a rewound draft
        assert collect(model, prompt, config, state=state)[0] == expected


@given(st.lists(st.integers(0, 289), min_size=2, max_size=60), st.integers(0, 7))
def test_the_drafts_cache_is_a_fresh_forward_and_reads_only_what_is_new(tokens, depth):
    drafter, widths, sampler = UniversalDrafter(DRAFTER, PAIR), [], Sampler(GraftConfig(), 290, "cpu")
    forward = drafter.forward
    drafter.forward = lambda tokens, *args, **kwargs: widths.append(len(tokens)) or forward(tokens, *args, **kwargs)
    for before, root in zip(range(len(tokens)), tokens):
        drafter.observe(None, torch.tensor([tokens[max(before - 1, 0):before] + [root]]))
        known, view = universal.shared(drafter.cached, whole_view(tokens[:before + 1])), whole_view(tokens[:before + 1])
        widths.clear()
        tree, = drafter.expand(root, depth, 3, sampler)
        assert len(tree) > 1 and tree.tokens[0] == root and len(widths) <= depth + 2
        if len(view) + depth + 1 <= 40:                                        # the whole text fits the draft's context
            assert widths[0] <= len(view) - min(known, len(view) - 1 - universal.HELD) + 1
        rows = DRAFTER.new_cache(64)
        n = drafter.cache.length
        with torch.inference_mode():
            DRAFTER(torch.tensor([drafter.cached]), torch.arange(n)[None], rows)
        assert (n == len(drafter.cached) <= 40
                and (drafter.cache.keys[:, :, :, :n] - rows.keys[:, :, :, :n]).abs().max() < 1e-9)


def plain_expand(model, tokens: list[int], depth: int, top_k: int) -> dict[tuple, float]:
    """What a drafter should draft behind `tokens`, without cache: paths of target tokens with their scores."""
    end = TARGET.token_to_id("<|end|>")
    after = len(tokens) - tokens[::-1].index(end) if end in tokens else 0
    word = (PAIR.draft.words(PAIR.target.spell(tokens[after:])) or [""])[-1]
    last, text = PAIR.draft.tokens([word]), whole_view(tokens)
    before = text[:len(text) - len(last)]
    if not before or len(last) > universal.HELD:
        before, last = text, []

    def logprobs(ids):
        return full_forward(model, ids)[0][0, -1].masked_fill(PAIR.mute, -torch.inf).log_softmax(-1)

    spelled, options = PAIR.draft.spell(last), []  # (score, draft tokens of the text and the guess, bytes of the guess)
    if last:
        row = logprobs(before)
        likely = sorted((i for i, data in PAIR.plain.items() if data.startswith(spelled) and data != spelled),
                        key=lambda i: -row[i])[:top_k]
        fits = lambda tokens: any(PAIR.target.spell(tokens[:n]) == spelled for n in range(len(tokens)))
        options = [(float(row[i]), before + [i], PAIR.plain[i][len(spelled):])
                   for i in likely if fits(PAIR.target.encode(PAIR.plain[i]))]
    stays = sum(float(logprobs(before + last[:i])[token]) for i, token in enumerate(last)) if options else 0.0
    whole = math.log(sum(math.exp(score) for score, *_ in options) + math.exp(stays))
    options, score, ids, chain = [(score - whole, *rest) for score, *rest in options], stays - whole, before + last, []
    paths, branches = {}, []
    for step in range(depth + 1):
        row = logprobs(ids)
        options += [(score + float(row[i]), ids + [i], PAIR.plain.get(i, b""))
                    for i in sorted(range(len(row)), key=lambda i: -row[i])[:top_k]]
        (score, ids, data), *rivals = sorted(options, reverse=True)[:top_k]
        branches += [PAIR.branch([*chain, (guess, value)], other[-1])
                     for value, other, guess in rivals if value > universal.LEAST]
        chain, options = [*chain, (data, score)], []
        if ids[-1] in PAIR.namesake or score < universal.LEAST:
            break
    for out, _, scores in [*branches, PAIR.branch(chain, ids[-1])]:
        for n, value in enumerate(scores, 1):
            paths[tuple(out[:n])] = max(value, paths.get(tuple(out[:n]), -math.inf))
    return paths


@given(st.one_of(anything.map(PAIR.target.encode), st.lists(st.integers(0, 289), max_size=12)), st.integers(0, 289),
       st.integers(0, 4), st.integers(1, 5))
# two thirds of a character
@example(PAIR.target.encode("a 日".encode()[:3]), PAIR.target.encode("日".encode()[1:2])[0], 2, 5)
def test_it_drafts_what_a_plain_search_finds(tokens, root, depth, top_k):
    """One drafter reads a growing text; after each part its tree must be that of a search from scratch."""
    model = tiny(6, context=512, vocab_size=330)
    drafter, tokens = UniversalDrafter(model, PAIR), [*tokens, root]
    for at in {len(tokens) // 2, len(tokens) - 1}:
        at = max(at, len(drafter.text))
        drafter.observe(None, torch.tensor([tokens[len(drafter.text):at + 1]]))
        tree, = drafter.expand(tokens[at], depth, top_k, Sampler(GraftConfig(), 290, "cpu"))
        got = {tuple(tree.tokens[i] for i in tree.path(node)): tree.scores[node] for node in range(1, len(tree))}
        expected = plain_expand(model, tokens[:at + 1], depth, top_k)
        assert got.keys() == expected.keys() and all(abs(got[path] - expected[path]) < 1e-4 for path in got)


# ------------------------------------------------------------------------------------------- checkpoints, end to end

def test_a_saved_draft_model_is_loaded_as_it_was(tmp_path):
    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = model.embed_tokens.weight
    for value in model.parameters():
        value.copy_(value.bfloat16())
    universal.save(model, DRAFT, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float64)
    # rotary tables: float32
    assert (full_forward(loaded, [1, 2, 3, 4])[0] - full_forward(model, [1, 2, 3, 4])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["universal", "universal_graft"])
def test_the_small_draft_model_helps_the_demo_model(demo, method):  # noqa: F811
    plan = demo.plan(method)
    ids = demo.ids([{"role": "user", "content": "Why is the sky blue?"}])
    config = dict(max_new_tokens=40)
    expected = collect(demo.model, ids, replace(demo.configure("ar"), **config))[0]
    got, stats = collect(demo.model, ids, replace(plan.config, **config), state=demo.state(plan))
    assert got == expected and stats.accepted["draft"] > 0 and stats.rounds < len(got) - 1


def test_train_makes_a_draft_model_that_runs(tmp_path):
    tiny_one = "--tokens 600 --vocab 300 --hidden 96 --layers 1 --context 64 --batch 2".split()
    done = subprocess.run([sys.executable, universal.__file__, "train", "--out", str(tmp_path), *tiny_one],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "held out" in done.stdout, done.stderr
    done = command("Say hello.", "--method", "universal", "--draft", str(tmp_path), "--max-new-tokens", "8",
                   "--dtype", "float32", "--compare")
    assert done.returncode == 0 and "identical" in done.stderr, done.stderr


def test_a_draft_that_cannot_be_used_is_named(demo, tmp_path):  # noqa: F811
    checkpoint(tmp_path)
    words_only = Tokenizer(models.WordLevel({"a": 0}, "a"))
    for tokenizer, words in ((None, "tokenizer.json"), (DRAFT, "330 tokens, the model 8"),
                             (words_only, "byte-level BPE")):
        if tokenizer:
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=words):
            universal.prepare(replace(demo, draft=str(tmp_path)), "universal")
