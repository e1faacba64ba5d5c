"""Tests of variants/via_sd.py against plain decoding and fresh forwards, on tiny float64 models and on the demo
model."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent),
                str(Path(__file__).resolve().parent.parent / "tools")]
import kernels
import run
import via_sd
from demo_model import demo_model
from graft import EagleDrafter, GraftConfig, Sampler, Sequence, State, run_rounds
from model import Model, load_model
from test_graft import HEAD, MODEL, VOCAB, command, needs_compiler, plain_greedy, plain_sampling, tokens_of
from tree import Tree

ALL = via_sd.slim_of(MODEL, [1, 2, 3], kept=1.0)
SLIM = via_sd.slim_of(MODEL, [1, 2, 3, 4, 5, 6], HEAD.taps, kept=4 / 6)


def decode(prompt, slim, head=HEAD, state=None, new=24, each=None, **tiers):
    """Tokens and statistics; `each` is called after every round with the state."""
    config = GraftConfig(method="graft" if head else "retrieve", max_new_tokens=new, budget=8, draft_top_k=3, depth=3,
                         eos_token_ids=(), temperature=tiers.pop("temperature", 0.0))
    state = state or State(MODEL, via_sd.TieredDrafter(EagleDrafter(head) if head else None))
    tokens = []
    for _, step in run_rounds(MODEL, [Sequence(MODEL, prompt, config, state)],
                              partial(via_sd.verify, slim=slim, **tiers)):
        tokens += step.tokens
        if each:
            each(state, prompt + tokens)
    return tokens, step.stats


def test_the_slim_verifier_is_the_targets_own_layers():
    assert [layer.index for layer in ALL.layers] == list(range(6)) and len(SLIM.layers) == 4
    assert ({1, 2} <= {layer.index for layer in SLIM.layers}
            and all(any(layer is own for own in MODEL.layers) for layer in SLIM.layers))
    assert len(MODEL.layers) == 6 and SLIM.lm_head is MODEL.lm_head


@given(tokens_of(1, 8), st.sampled_from([HEAD, None]), st.sampled_from([0.0, 1.0]))
def test_a_threshold_above_one_is_plain_decoding(prompt, head, temperature):
    tokens, stats = decode(prompt, SLIM, head, sure=1.01, temperature=temperature)
    assert (tokens == plain_sampling(MODEL, prompt, 24, GraftConfig(temperature=temperature))
            and not stats.stages["slim"])


@given(tokens_of(1, 8), st.sampled_from([HEAD, None]), st.sampled_from([0.0, 0.3, 0.9]), st.integers(1, 20),
       st.sampled_from([0.0, 1.0]))
def test_with_all_layers_it_is_plain_decoding_in_fewer_full_forwards(prompt, head, sure, most, temperature):
    forwards, whole = [], Model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "forward", lambda self, *args, **kwargs:
                      forwards.append(self) or whole(self, *args, **kwargs))
        tokens, stats = decode(prompt, ALL, head, sure=sure, most=most, temperature=temperature)
    assert tokens == plain_sampling(MODEL, prompt, 24, GraftConfig(temperature=temperature))
    full = sum(model is MODEL for model in forwards) - 1                                # one is the prompt
    assert full == stats.rounds - stats.stages["slim"] and sum(model is ALL for model in forwards) == stats.rounds
    assert sure > 0 or full <= 24 / (most + 1) + 1                                 # at least `most` + 1 tokens for each


@given(tokens_of(1, 8), st.sampled_from([HEAD, None]), st.sampled_from([0.0, 0.2, 0.5, 0.8]), st.integers(1, 20))
def test_what_the_full_model_has_read_is_a_fresh_forward(prompt, head, sure, most):
    """After every round: the rows it has written, the head's rows, and what it says of the token that follows."""
    seen = []

    def each(state, text):
        drafter, n = state.drafter, len(state.tokens) - len(state.drafter.unread)
        assert (state.cache.length == len(state.tokens) and text[:len(state.tokens)] == state.tokens
                and len(drafter.unread) <= most)
        fresh = MODEL.new_cache(n)
        _, features = MODEL(torch.tensor([text[:n]]), torch.arange(n)[None], fresh, taps=HEAD.taps)
        assert ((state.cache.keys[:, :, :, :n] - fresh.keys).abs().max() < 1e-9
                > (state.cache.values[:, :, :, :n] - fresh.values).abs().max())
        if head:
            other = EagleDrafter(head)
            other.observe(features, torch.tensor([text[:n + 1]]))
            assert (drafter.inner.cache.keys[:, :, :, :n] - other.cache.keys[:, :, :, :n]).abs().max() < 1e-9
        seen.append(len(drafter.unread))

    with torch.inference_mode():
        decode(prompt, SLIM, head, each=each, sure=sure, most=most)
    assert any(seen) or sure > 0


def test_settled_tokens_stay_and_the_full_model_goes_on_behind_them():
    """With SURE at 0 all that the draft and the slim verifier agree on is settled; `most` = 1 then sends such rounds to
    the full model."""
    calls, whole, overruled = [], Sampler.pick, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "pick", lambda self, logits, tree:
                      calls.append((tree, whole(self, logits, tree))) or calls[-1][1])
        for token in range(VOCAB):
            config, state = (GraftConfig(max_new_tokens=30, budget=8, eos_token_ids=()),
                             State(MODEL, via_sd.TieredDrafter(EagleDrafter(HEAD))))
            sequence = Sequence(MODEL, [token], config, state)
            for _, step in run_rounds(MODEL, [sequence], partial(via_sd.verify, slim=SLIM, sure=0.0, most=1)):
                if step.tree and not step.stats.finish:
                    tree, picks = calls[0]
                    settled = [tree.tokens[node] for node in tree.accept(picks)[1:]]
                    assert step.tokens[:len(settled)] == settled and (len(calls) == 2 or not settled)
                    if settled:
                        tree, picks = calls[1]
                        assert step.tokens[len(settled):] == [*(tree.tokens[i] for i in step.path[len(settled) + 1:]),
                                                              picks[step.path[-1]]]
                        overruled += picks[0] != settled[0]
                calls.clear()
    assert overruled > 3


@given(tokens_of(1, 6), st.sampled_from([HEAD, None]))
def test_rows_that_the_full_model_has_not_written_are_not_reused(prompt, head):
    state = State(MODEL, via_sd.TieredDrafter(EagleDrafter(head) if head else None))
    for _ in range(3):
        tokens, _ = decode(prompt, SLIM, head, state, new=9, sure=0.0, most=20)         # ends with tokens unread
        assert len(state.drafter.unread) >= 9 - 1
        following = prompt + tokens + [3]
        assert decode(following, SLIM, head, state, new=5, sure=1.01)[0] == plain_greedy(MODEL, following, 5)[0]
        prompt = following[-12:]


def test_agreement_is_a_share_of_tokens():
    assert (run.agreement([[1, 2, 3, 4], [5]], [[1, 2, 9, 4], [5, 6]])
            == {"before_first_difference": 0.5, "by_position": 0.6667})


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_loaded_models_slim_tier_runs_its_own_layers(compiled):
    """Loading leaves a model's parts as plain attributes, which must not hide the slim tier's; nor may the target's
    compiled layers run."""
    model = load_model(demo_model(), dtype=torch.float32, products=kernels.products() if compiled else None)
    model.kernels = kernels.kernels(model) if compiled else None
    taps = (1, 14, 26)
    slim = via_sd.slim_of(model, list(range(20)), taps, kept=0.5)
    assert (len(slim.layers) == model.config.num_hidden_layers // 2
            and len(model.layers) == model.config.num_hidden_layers and bool(slim.kernels) == compiled)
    twin, caches = copy.copy(slim), [slim.new_cache(8) for _ in range(2)]
    twin.kernels = None
    tree = Tree([5, 6, 7, 8], [-1, 0, 1, 1], [0, 1, 2, 2])
    tokens, positions, mask = torch.tensor([tree.tokens]), tree.positions(0)[None], tree.mask()
    with torch.inference_mode():
        (logits, features), wanted = (tier(tokens, positions, cache, mask, taps=taps)
                                      for tier, cache in zip((slim, twin), caches))
        assert not torch.equal(logits, model(tokens, positions, model.new_cache(8), mask)[0])
    for ours, theirs in ((logits, wanted[0]), (features, wanted[1]), (caches[0].rows, caches[1].rows)):
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_the_demo_model_says_that_it_is_lossy_and_how_far_it_agrees(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"id": 0, "task": "t", "turns": ["Count from one to ten in words."]}))
    done = command("bench", "--prompts", str(prompts), "--methods", "ar,via_sd", "--max-new-tokens", "40",
                   "--dtype", "float32", "--json", str(tmp_path / "out"))
    assert done.returncode == 0 and "not lossless" in done.stderr, done.stderr
    report = json.loads((tmp_path / "out").read_text())
    assert "via_sd" not in report["lossless"] and 0 < report["agreement"]["via_sd"]["before_first_difference"] <= 1
    assert report["agreement"]["via_sd"]["by_position"] >= report["agreement"]["via_sd"]["before_first_difference"]
