"""Tests of depth_pruned.py and of drafting with a model: what a smaller model drafts, that pruning is deleting layers,
that a saved draft is a checkpoint, that search and healing do what they say, and that the text is plain decoding's."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import depth_pruned  # noqa: E402
import run  # noqa: E402
from depth_pruned import agreement, chain_score, prune, save  # noqa: E402
from graft import AdjacencyMatrix, GraftConfig, ModelDrafter, NGramIndex, Sampler, State, generate  # noqa: E402
from model import CheckpointError, Eagle3, Model, load_draft, load_model  # noqa: E402
from test_graft import (FAMILIES, HEAD, MODEL, ROOT, VOCAB, demo, full_forward,  # noqa: E402, F401
                        held_to_plain_decoding, plain_greedy, plain_sampling, save_head, tiny, tokens_of)
from tree import DRAFT  # noqa: E402

DRAFT_MODEL = tiny(5, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1)


def write_text(folder: Path, model: Model, count: int, length=24) -> str:
    """Conversations that the model wrote itself, in the form of tools/train_eagle3.py."""
    torch.manual_seed(0)
    texts = [[i % VOCAB, (i * 7) % VOCAB, i // VOCAB] for i in range(count)]
    texts = [text + plain_greedy(model, text, length)[0] for text in texts]
    lengths = torch.tensor([[len(text), 3] for text in texts])
    save_file({"tokens": torch.tensor(sum(texts, [])).to(torch.uint16), "lengths": lengths.to(torch.uint16)},
              folder / "text.safetensors")
    return str(folder / "text.safetensors")


# ------------------------------------------------------------------------------------------------ drafting with a model

@given(tokens_of(2, 12), st.integers(0, 3), st.integers(1, 4), st.sampled_from([0.0, 0.8]), st.data())
def test_scores_are_a_full_forwards_after_any_reading(text, depth, top_k, temperature, data):
    drafter, committed = ModelDrafter(DRAFT_MODEL), 0
    with torch.inference_mode():
        while committed < len(text) - 1:                        # prefill and rounds, with other text that is taken back
            count = data.draw(st.integers(1, len(text) - 1 - committed))
            drafter.observe(None, torch.tensor([text[committed:committed + count + 1]]))
            committed += count
            if data.draw(st.booleans()):
                drafter.observe(None, torch.tensor([[text[committed], 3, 4, 5]]))
                committed = drafter.rewind(data.draw(st.integers(0, committed)))
        sampler = Sampler(GraftConfig(temperature=temperature), VOCAB, "cpu")
        sampler.read(text)
        for tree in drafter.expand(text[-1], depth, top_k, sampler):
            pass
        assert drafter.cache.length == len(text) and max(tree.depths) == depth + 1
        for leaf in tree.leaves():
            guesses = [tree.tokens[i] for i in tree.path(leaf)]
            logits = full_forward(DRAFT_MODEL, text + guesses[:-1])[0][0, len(text) - 1:]
            score = sum(float(sampler.lean(row[None], at, drafter.ids)[0, token])
                        for at, (row, token) in enumerate(zip(logits, guesses)))
            assert abs(score - tree.scores[leaf]) < 1e-5                        # log-probabilities are taken in float32
        root_children = [tree.tokens[i] for i in range(1, len(tree)) if tree.depths[i] == 1]
        expected = sampler.lean(full_forward(DRAFT_MODEL, text)[0][:, -1], 0,
                                drafter.ids).topk(top_k).indices[0].tolist()
        assert root_children == expected


@settings(max_examples=60)
@given(st.sampled_from(["eagle", "prune", "graft", "graft_root", "graft_unpruned", "graft_tail"]),
       st.sampled_from(["small", "pruned", "itself"]), tokens_of(1, 8), st.sampled_from([0.0, 0.8]),
       st.integers(0, 9), st.data())
def test_every_turn_is_plain_decoding(method, kind, prompt, temperature, seed, data):
    draft = {"small": DRAFT_MODEL, "pruned": prune(MODEL, (1, 3, 4)), "itself": MODEL}[kind]
    budget = data.draw(st.integers(1, 16))
    config = GraftConfig(method=method, max_new_tokens=data.draw(st.integers(1, 14)), budget=budget,
                         depth=data.draw(st.integers(0, 4)), eos_token_ids=(), draft_top_k=data.draw(st.integers(1, 5)),
                         temperature=temperature, seed=seed, prefill_chunk=data.draw(st.integers(1, 9)),
                         thresholds=data.draw(st.sampled_from([(0.0, 0.0, 0.0), (0.3, 0.2, 0.1)])),
                         verify_cost=data.draw(st.sampled_from([(), tuple(0.02 * n for n in range(budget + 1))])))
    state = State(MODEL, ModelDrafter(draft), AdjacencyMatrix(VOCAB, 4), NGramIndex())
    for turn in range(3):                                           # cold, then warm; the last forgets half of the text
        expected = plain_sampling(MODEL, prompt, config.max_new_tokens, config)
        rounds = list(generate(MODEL, prompt, config, state=state))
        assert [token for step in rounds for token in step.tokens] == expected
        if kind == "itself" and not config.verify_cost and method == "eagle":   # the target's own guess is always right
            assert all(len(step.path) > 1 for step in rounds[1:-1])
        prompt = (prompt + expected)[:len(prompt) // 2 + 1 if turn == 1 else 40] + [turn]


# ---------------------------------------------------------------------------------------------- pruning and checkpoints

def checkpoint(folder: Path, family: str, **changes) -> Path:
    transformers = pytest.importorskip("transformers")
    kind, extra = FAMILIES[family]
    config = getattr(transformers, kind + "Config")(**dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        tie_word_embeddings=False) | extra | changes)
    torch.manual_seed(0)
    getattr(transformers, kind + "ForCausalLM")(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"kept": true}')
    return folder


@pytest.mark.parametrize("family", ["llama-tied", "llama-llama3", "qwen3", "qwen3-moe"])
def test_a_pruned_model_is_one_whose_layers_were_deleted_and_so_is_its_checkpoint(family, tmp_path):
    source, dropped, tokens = checkpoint(tmp_path / "source", family), (0, 3), [3, 1, 4, 1, 5, 9, 2, 6]
    target = load_model(source, dtype=torch.float64, pack=False)
    small = prune(target, dropped)
    raw = load_file(source / "model.safetensors")                                  # by hand, in the source's own names
    by_hand, place = {}, {"1": "0", "2": "1", "4": "2"}
    for name, value in raw.items():
        parts = name.split(".")
        if parts[1] != "layers":
            by_hand[name] = value
        elif parts[2] in place:
            by_hand[".".join([*parts[:2], place[parts[2]], *parts[3:]])] = value
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 3}
    config.pop("layer_types", None)
    if "moe" in family:
        config["mlp_only_layers"] = [0]                                            # layer 1 was the dense one
    (tmp_path / "hand").mkdir()
    save_file(by_hand, tmp_path / "hand" / "model.safetensors")
    (tmp_path / "hand" / "config.json").write_text(json.dumps(config))
    save(small, tmp_path / "saved", source)
    expected = full_forward(load_model(tmp_path / "hand", dtype=torch.float64), tokens)[0]
    assert (expected - full_forward(target, tokens)[0]).abs().max() > 0.1
    saved = load_draft(tmp_path / "saved", target)
    assert isinstance(saved, Model) and (tmp_path / "saved" / "tokenizer.json").read_text() == '{"kept": true}'
    for model in (small, saved):
        assert torch.equal(full_forward(model, tokens)[0], expected)
    assert ({name: value.shape for name, value in load_file(tmp_path / "saved" / "model.safetensors").items()}
            == {n: v.shape for n, v in by_hand.items()})
    assert small.layers[0].self_attn is target.layers[1].self_attn                 # shared, not copied
    trees = []
    for model in (small, saved):
        drafter = ModelDrafter(model)
        with torch.inference_mode():
            drafter.observe(None, torch.tensor([tokens]))
            trees.append(list(drafter.expand(tokens[-1], 3, 4, Sampler(GraftConfig(), VOCAB, "cpu")))[-1])
    assert trees[0] == trees[1] and len(trees[0]) > 40
    transformers = pytest.importorskip("transformers")                             # and a checkpoint to others as well
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.num_hidden_layers == 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.inference_mode():
        assert (theirs(torch.tensor([tokens])).logits - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dropped", [(6,), (-1,), range(6)])
def test_layers_there_are_not_or_all_of_them_are_refused(dropped):
    with pytest.raises(ValueError, match="expected some, not all, of 0 to 5"):
        prune(MODEL, tuple(dropped))


def test_the_config_says_what_a_draft_is(tmp_path):
    save_head(tmp_path / "a", HEAD, architectures=["LlamaForCausalLM"])           # as EAGLE's own heads call themselves
    save_head(tmp_path / "b", HEAD)
    for folder in "ab":
        assert isinstance(load_draft(tmp_path / folder, MODEL), Eagle3)
    source = checkpoint(tmp_path / "c", "qwen3")
    assert isinstance(load_draft(source, MODEL), Model)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))
    with pytest.raises(CheckpointError, match=f"'vocab_size' is {VOCAB + 1}, but the target's is {VOCAB}"):
        load_draft(source, MODEL)


# --------------------------------------------------------------------------------------------------- search and healing

@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=30), min_size=1, max_size=3), st.floats(0.05, 1.0))
def test_a_chains_score_is_counted_by_walking(texts, cost):
    best = []
    for guesses in range(1, 9):
        tokens = 1.0
        for reach in range(1, guesses + 1):                   # the share of places from which `reach` guesses are right
            places = [all(text[i:i + reach]) for text in texts for i in range(len(text) - reach + 1)]
            tokens += sum(places) / len(places)
        best.append(tokens / (1 + guesses * cost))
    got = chain_score([torch.tensor(text) for text in texts], cost)
    # rounded to 4 digits
    assert abs(got["score"] - max(best)) < 1e-4 and abs(best[got["guesses"] - 1] - max(best)) < 1e-4
    assert abs(got["tokens"] - best[got["guesses"] - 1] * (1 + got["guesses"] * cost)) < 1e-4


def arguments(tmp_path, text, **changes) -> SimpleNamespace:
    return SimpleNamespace(**dict(model=str(tmp_path / "source"), text=text, conversations=5, device="cpu",
                                  dtype="float32", out=str(tmp_path / "out"), keep=1, drop=[1, 3], steps=30, batch=4,
                                  lr=3e-3, seed=0) | changes)


@pytest.fixture(scope="module")
def small_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    checkpoint(folder / "source", "llama-tied")
    return folder, write_text(folder, load_model(folder / "source", dtype=torch.float32), 12)


def test_search_drops_the_layer_without_which_the_score_is_best_and_goes_on_after_a_stop(small_text, tmp_path):
    folder, text = small_text
    whole = arguments(folder, text, out=str(tmp_path / "whole"))
    depth_pruned.search(whole)
    depth_pruned.search(arguments(folder, text, out=str(tmp_path / "parts"), keep=3))
    depth_pruned.search(arguments(folder, text, out=str(tmp_path / "parts")))
    found = json.loads((tmp_path / "whole").read_text())
    assert found == json.loads((tmp_path / "parts").read_text()) and len(found["path"]) == 4
    model, texts = load_model(folder / "source", dtype=torch.float32), depth_pruned.held_out(whole, MODEL.config)
    dropped = []
    for step in found["path"]:                                               # each step again, with whole pruned models
        trials = {i: agreement(model, prune(model, (*dropped, i)), texts)["score"]
                  for i in range(5) if i not in dropped}
        assert trials[step["dropped"]] == max(trials.values()) == step["score"]
        dropped.append(step["dropped"])
    with pytest.raises(ValueError, match="other settings"):
        depth_pruned.search(arguments(folder, text, out=str(tmp_path / "whole"), conversations=4))
    with pytest.raises(ValueError, match="outside the model's vocabulary of 9"):
        depth_pruned.held_out(whole, replace(MODEL.config, vocab_size=9))


def test_healing_helps_and_an_interrupted_one_ends_the_same(small_text, tmp_path, monkeypatch):
    folder, text = small_text
    monkeypatch.setattr(depth_pruned, "HELD_OUT", 5)
    once = arguments(folder, text, out=str(tmp_path / "once"))
    depth_pruned.heal(once)
    clock, clip, calls = iter(range(0, 10**6, 500)), torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(depth_pruned.time, "time", lambda: next(clock))         # so the state is saved after every step

    def stop_once(*arguments):
        calls.append(0)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_once)
    twice = arguments(folder, text, out=str(tmp_path / "twice"))
    with pytest.raises(KeyboardInterrupt):
        depth_pruned.heal(twice)
    with pytest.raises(ValueError, match=r"without layers \[1, 3\] is being healed"):
        depth_pruned.heal(arguments(folder, text, out=str(tmp_path / "twice"), drop=[2]))
    depth_pruned.heal(twice)
    assert len(calls) == 31 and not (tmp_path / "twice" / "heal.pt").exists()
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    target = load_model(folder / "source", dtype=torch.float32, pack=False)
    texts = depth_pruned.conversations(once, target.config)

    def entropy(draft):                                                     # to the target's distribution, on all texts
        total = 0.0
        for tokens, start in texts:
            wanted, got = (full_forward(model, tokens)[0][0, start - 1:] for model in (target, draft))
            total -= float((wanted.softmax(-1) * got.log_softmax(-1)).sum(-1).mean())
        return total / len(texts)

    cut, healed = entropy(prune(target, (1, 3))), entropy(load_draft(tmp_path / "once", target))
    assert healed < 0.9 * cut
    none = arguments(folder, text, out=str(tmp_path / "none"), steps=0)
    depth_pruned.heal(none)
    assert abs(entropy(load_draft(tmp_path / "none", target)) - cut) < 1e-4


# ------------------------------------------------------------------------------------------------------ the demo model

def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "run.py"), "x", *map(str, arguments)], capture_output=True,
                          text=True, timeout=300)


def test_the_command_drafts_with_a_model_of_the_same_vocabulary_and_refuses_others(tmp_path):
    checkpoint(tmp_path / "other", "llama-tied")
    done = command("--draft", tmp_path / "other", "--no-compile")                # which would say so, the first time
    assert (done.returncode == 1 and f"'vocab_size' is {VOCAB}, but the target's is 49152" in done.stderr
            and done.stderr.count("\n") == 1)
    checkpoint(tmp_path / "same", "qwen3", vocab_size=49152, tie_word_embeddings=True)
    done = command("--draft", tmp_path / "same", "--draft-window", 64)
    assert (done.returncode == 1 and "--draft-window is 64, but --draft names a model" in done.stderr
            and done.stderr.count("\n") == 1)
    done = command("--draft", tmp_path / "same", "--method", "eagle", "--max-new-tokens", 8, "--dtype", "float32",
                   "--compare", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] and report["statistics"]["nodes"]["draft"] > 0


def test_a_model_without_a_draft_is_told_so():
    setup = SimpleNamespace(head=HEAD, model=MODEL, configure=lambda method: GraftConfig(method=method))
    with pytest.raises(ValueError, match="'depth_pruned_graft' needs a draft model"):
        depth_pruned.prepare(setup, "depth_pruned_graft")
    setup.head = DRAFT_MODEL
    config, new_drafter, verify = depth_pruned.prepare(setup, "depth_pruned")
    assert ((config.method, new_drafter().network, verify) == ("eagle", DRAFT_MODEL, None)
            and new_drafter() is not new_drafter())


@pytest.mark.parametrize("method", ["depth_pruned", "depth_pruned_graft"])
def test_the_demo_model_says_what_plain_decoding_says(demo, method):  # noqa: F811
    assert held_to_plain_decoding(demo, demo.plan(method)).accepted[DRAFT] > 0
