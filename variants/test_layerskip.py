"""Tests of layerskip.py: reuse changes nothing but the work, and the text is plain decoding's."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import depth_pruned  # noqa: E402
import kernels  # noqa: E402
import layerskip  # noqa: E402
from demo_model import demo_model  # noqa: E402
from graft import AdjacencyMatrix, GraftConfig, NGramIndex, Sequence, State, prefill, run_rounds  # noqa: E402
from layerskip import SkipDrafter, prepare, verify  # noqa: E402
from model import Layer, load_model  # noqa: E402
from test_depth_pruned import write_text  # noqa: E402
from test_graft import (MODEL, VOCAB, demo, full_forward, held_to_plain_decoding,  # noqa: E402, F401
                        needs_compiler, plain_greedy, plain_sampling, tiny, tokens_of)
from tree import DRAFT, NGRAM, Tree  # noqa: E402

LAYERS = MODEL.config.num_hidden_layers


def texts_of(model, prompts, config, states) -> list[list[int]]:
    texts = [[] for _ in prompts]
    for i, step in run_rounds(model, [Sequence(model, prompt, config, state) for prompt, state in zip(prompts, states)],
                              verify):
        texts[i] += step.tokens
    return texts


@settings(max_examples=60)
@given(st.sampled_from(["eagle", "prune", "graft", "graft_root", "graft_unpruned", "graft_tail"]),
       st.integers(1, LAYERS - 1), st.integers(0, 2), tokens_of(1, 8), st.sampled_from([0.0, 0.8]),
       st.integers(0, 9), st.data())
def test_every_turn_is_plain_decoding(method, early, weights, prompt, temperature, seed, data):
    model = tiny(weights, qk_norm=data.draw(st.booleans()))
    budget = data.draw(st.integers(1, 16))
    config = GraftConfig(method=method, max_new_tokens=data.draw(st.integers(1, 14)), budget=budget,
                         depth=data.draw(st.integers(0, 4)), eos_token_ids=(), draft_top_k=data.draw(st.integers(1, 5)),
                         temperature=temperature, seed=seed, prefill_chunk=data.draw(st.integers(1, 9)),
                         thresholds=data.draw(st.sampled_from([(0.0, 0.0, 0.0), (0.3, 0.2, 0.1)])),
                         verify_cost=data.draw(st.sampled_from([(), tuple(0.02 * n for n in range(budget + 1))])))
    state = State(model, SkipDrafter(model, early), AdjacencyMatrix(VOCAB, 4), NGramIndex())
    for turn in range(3):                                           # cold, then warm; the last forgets half of the text
        expected = plain_sampling(model, prompt, config.max_new_tokens, config)
        assert texts_of(model, [prompt], config, [state]) == [expected]
        prompt = (prompt + expected)[:len(prompt) // 2 + 1 if turn == 1 else 40] + [turn]


@given(st.lists(tokens_of(1, 7), min_size=2, max_size=3), st.integers(1, LAYERS - 1))
def test_a_batch_is_each_prompt_alone(prompts, early):
    config = GraftConfig(max_new_tokens=9, budget=6, draft_top_k=3, eos_token_ids=())
    states = [State(MODEL, SkipDrafter(MODEL, early)) for _ in prompts]
    assert texts_of(MODEL, prompts, config, states) == [plain_greedy(MODEL, prompt, 9)[0] for prompt in prompts]


@given(st.integers(1, LAYERS - 1), tokens_of(1, 8), st.integers(0, 3), st.integers(1, 4), st.data())
def test_verification_runs_early_layers_for_new_nodes_only_and_its_logits_and_rows_are_a_full_forwards(
        early, prompt, depth, top_k, data):
    sequence = Sequence(MODEL, prompt, GraftConfig(max_new_tokens=30), State(MODEL, SkipDrafter(MODEL, early)))
    ran = [0] * LAYERS                                                             # tokens that went through each layer
    whole = Layer.forward

    def counted(layer, x, *args):
        ran[layer.index] += x.shape[1]
        return whole(layer, x, *args)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Layer, "__call__", counted)
        prefill(MODEL, sequence)
        ran[:] = [0] * LAYERS
        for drafted in sequence.drafter.expand(sequence.root, depth, top_k, sequence.sampler):
            pass
        cache, parents = sequence.state.cache, set(drafted.parents)
        assert cache.length == len(prompt)
        assert ran == [1 + depth * top_k if depth else 1] * early + [0] * (LAYERS - early)
        tree = Tree.rooted(sequence.root)                          # what of it survives, in any order, with other nodes
        kept = {0: 0}
        for node in data.draw(st.lists(st.integers(1, len(drafted) - 1), max_size=9, unique=True)):
            for above in drafted.path(node):
                kept[above] = tree.add(drafted.tokens[above], kept[drafted.parents[above]], 0.0, DRAFT)
        for _ in range(data.draw(st.integers(0, 6))):
            tree.add(data.draw(st.integers(0, VOCAB - 1)), data.draw(st.integers(0, len(tree) - 1)), 0.0, NGRAM)
        ran[:] = [0] * LAYERS
        [(path, picks, logits, _)] = verify(MODEL, [sequence], [tree])
        node, reused = {0: 0}, 0                          # nodes of `tree` that the beam had run: known by their tokens
        for i in range(len(tree)):
            walked = tuple(tree.tokens[j] for j in tree.path(i))
            reused += any(walked == tuple(drafted.tokens[j] for j in drafted.path(r))
                          for r in {0, *sequence.drafter.ran})
        assert parents - {-1} <= {0, *sequence.drafter.ran} and reused >= 1
        assert ran == [len(tree) - reused] * early + [len(tree)] * (LAYERS - early)
    for leaf in tree.leaves():
        nodes = [0, *tree.path(leaf)]
        text = prompt + [tree.tokens[i] for i in nodes]
        assert (logits[nodes] - full_forward(MODEL, text)[0][0, len(prompt):]).abs().max() < 1e-9
    keep = [0, *tree.path(data.draw(st.integers(0, len(tree) - 1)))]
    text, rows = prompt + [tree.tokens[i] for i in keep], MODEL.new_cache(64)
    with torch.inference_mode():
        MODEL(torch.tensor([text]), torch.arange(len(text))[None], rows)
        cache.commit(keep)
    for ours, theirs in ((cache.keys, rows.keys), (cache.values, rows.values)):
        assert (ours[:, :, :, :len(text)] - theirs[:, :, :, :len(text)]).abs().max() < 1e-9


@needs_compiler
@pytest.mark.parametrize("early", [1, 7, 29])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_compiled_stretches_are_the_layers(early, dtype, bound):
    """Each writes its own layers' rows alone, and gives what these layers give, under any mask; one behind the other,
    to the last bit what all layers give."""
    model = load_model(demo_model(), dtype=dtype, products=kernels.products())
    model.kernels, found, tree = kernels.kernels(model), [], Tree([5, 6, 7, 8], [-1, 0, 1, 1], [0, 1, 2, 2])
    drafter = SkipDrafter(model, early)
    assert drafter.first.compiled and drafter.rest.compiled
    for mask in (tree.mask(), None):
        for compiled in (True, False):
            cache, outputs = model.new_cache(8), []
            with torch.inference_mode():
                x = model.embed_tokens(torch.tensor([tree.tokens]))
                for stretch in (drafter.first, drafter.rest):
                    stretch = stretch if compiled else copy.copy(stretch)
                    stretch.compiled = compiled and stretch.compiled
                    x, normed = stretch(x, tree.positions(0)[None], cache, mask)
                    outputs += [x, normed, cache.rows.clone()]
                if compiled:
                    whole = model(torch.tensor([tree.tokens]), tree.positions(0)[None], model.new_cache(8), mask)[0]
                    assert torch.equal(model.lm_head(normed), whole)
            found.append(outputs)
        ours, theirs = found[-2:]
        assert not ours[2][early:].any()
        assert all((a - b).abs().max() < bound * b.abs().max() for a, b in zip(ours, theirs))


def test_calibration_scores_an_exit_as_the_model_without_the_layers_behind_it(tmp_path, monkeypatch, capsys):
    args = SimpleNamespace(model=None, text=write_text(tmp_path, MODEL, 6), conversations=6, device="cpu",
                           dtype="float64")
    monkeypatch.setattr(layerskip, "model_folder", lambda args: tmp_path)
    monkeypatch.setattr(layerskip, "load_model", lambda folder, **kwargs: MODEL)
    layerskip.calibrate(args)
    lines = capsys.readouterr().out.splitlines()
    texts = depth_pruned.held_out(args, MODEL.config)
    expected = [depth_pruned.agreement(MODEL, depth_pruned.prune(MODEL, tuple(range(early, LAYERS))), texts)
                for early in range(1, LAYERS)]
    for early, line in enumerate(lines[:-1], 1):
        losses = dict.fromkeys(layerskip.SHARPNESS, 0.0)
        for tokens, start in texts:
            wanted = full_forward(MODEL, tokens)[0][0, start - 1:].argmax(-1)
            logits = full_forward(depth_pruned.prune(MODEL, tuple(range(early, LAYERS))), tokens)[0][0, start - 1:]
            for sharpness in losses:
                losses[sharpness] -= float((logits * sharpness).log_softmax(-1)[range(len(wanted)), wanted].sum())
        expected[early - 1]["sharpness"] = min(losses, key=losses.get)
        assert line == f"E {early}: {expected[early - 1]}"
    best = max(range(1, LAYERS), key=lambda early: expected[early - 1]["score"])
    assert len({expected[early - 1]["sharpness"] for early in range(1, LAYERS)}) > 1
    assert len(lines) == LAYERS and lines[-1].startswith(f"best: E {best} ")


@pytest.mark.parametrize("given", ["0", "6", "-1", "two"])
def test_a_bad_exit_is_named(given, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_EXIT", given)
    with pytest.raises(ValueError, match=f"LAYERSKIP_EXIT is '{given}'; expected a number of layers from 1 to 5"):
        prepare(SimpleNamespace(model=MODEL, configure=lambda method: GraftConfig(method=method)), "layerskip")


@pytest.mark.parametrize("method, early, depth", [("layerskip", None, None), ("layerskip", 26, 3),
                                                  ("layerskip_graft", None, None), ("layerskip_graft", 26, 3)])
def test_the_demo_model_says_what_plain_decoding_says(demo, method, early, depth, monkeypatch):  # noqa: F811
    if early:
        monkeypatch.setenv("LAYERSKIP_EXIT", str(early))
    plan = demo.plan(method)
    plan.config = replace(plan.config, depth=plan.config.depth if depth is None else depth)
    assert held_to_plain_decoding(demo, plan).accepted[DRAFT] > 0
