"""Tests of dflash.py and tools/train_dflash.py: parity with a drafter written from DESIGN.md without cache or batch,
losslessness, what a tree holds, training against drafting, and damaged checkpoints."""

import json
import math
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants"), str(ROOT / "tools")]
import dflash  # noqa: E402
import kernels  # noqa: E402
import run  # noqa: E402
import train_dflash  # noqa: E402
from dflash import DFlash, DFlashDrafter, load_dflash, prepare  # noqa: E402
from graft import GraftConfig, Sampler, Sequence, State, generate, run_rounds  # noqa: E402
from model import CheckpointError, Model, checkpoint_layout, load_model  # noqa: E402
from test_graft import (LLAMA3, MODEL, ROPE, VOCAB, YARN, command, full_forward, plain_sampling, tiny,  # noqa: E402
                        tokens_of)
from train_dflash import denoise, draw, new_net, save_dflash  # noqa: E402
from train_eagle3 import write_shard  # noqa: E402
from tree import ADJACENCY, DRAFT, NGRAM  # noqa: E402

METHODS = ("dflash", "dflash_graft_tail", "dflash_graft")
BLOCK, MASK, TAPS = 5, 30, (1, 2, 4)
LAYER = [f"self_attn.{p}_proj" for p in "qkvo"] + ["self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj",
                                                   "mlp.up_proj", "mlp.down_proj", "input_layernorm",
                                                   "post_attention_layernorm"]


def tiny_net(target: Model = MODEL, seed=2, block=BLOCK, layers=2, **changes) -> DFlash:
    torch.manual_seed(seed)
    config = replace(target.config, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=3,
                     intermediate_size=40, qk_norm=True, **changes)
    net = DFlash(config, TAPS, block, MASK).double().requires_grad_(False)
    for name, value in net.named_parameters():
        value.copy_(torch.rand_like(value) + 0.5 if "norm" in name else torch.randn_like(value) * 0.3)
    return net


def save(folder: Path, net: DFlash = None) -> Path:
    save_dflash(net or tiny_net(), folder, {"target_layers": MODEL.config.num_hidden_layers}, torch.float64)
    return folder


NET = tiny_net()
features_of = lambda text, target=MODEL: full_forward(target, text, taps=TAPS)[1]


def plain_dflash(w: dict, config, features, root: int) -> torch.Tensor:
    """Logits [B - 1, V] of one block, token by token: features[i] is what the target felt at token i, the root comes
    after them."""
    h, k, d, eps, n = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps,
                       len(features))
    norm = lambda x, weight: x / torch.sqrt((x * x).mean() + eps) * weight

    def rotate(x, position):
        angle = position / config.rope["rope_theta"] ** (torch.arange(0, d, 2).double() / d)
        a, b = x[: d // 2], x[d // 2:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    context = [norm(w["fc.weight"] @ feature, w["hidden_norm.weight"]) for feature in features]
    block = [MODEL.embed_tokens.weight[token] for token in [root] + [MASK] * (BLOCK - 1)]
    for layer in range(config.num_hidden_layers):
        own = {name: w[f"layers.{layer}.{name}.weight"] for name in LAYER}
        entering = [norm(x, own["input_layernorm"]) for x in block]
        part = lambda x, name, i: (own[f"self_attn.{name}_proj"] @ x)[i * d:(i + 1) * d]
        attended = []
        for j, x in enumerate(entering):
            heads = []
            for i in range(h):
                query, shared = rotate(norm(part(x, "q", i), own["self_attn.q_norm"]), n + j), i // (h // k)
                keys = [rotate(norm(part(y, "k", shared), own["self_attn.k_norm"]), position)
                        for position, y in enumerate(context + entering)]
                weights = torch.stack([query @ key / math.sqrt(d) for key in keys]).softmax(0)
                heads.append(sum(weight * part(y, "v", shared) for weight, y in zip(weights, context + entering)))
            attended.append(own["self_attn.o_proj"] @ torch.cat(heads))
        block = [x + out for x, out in zip(block, attended)]
        for j, x in enumerate(block):
            y = norm(x, own["post_attention_layernorm"])
            gate = own["mlp.gate_proj"] @ y
            block[j] = x + own["mlp.down_proj"] @ (gate * torch.sigmoid(gate) * (own["mlp.up_proj"] @ y))
    return torch.stack([MODEL.lm_head.weight @ norm(x, w["norm.weight"]) for x in block[1:]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("dflash"))


# ------------------------------------------------------------------------------------------------------------- parity

def test_a_published_checkpoint_is_a_plain_dflash_however_its_context_arrives(saved):
    w, net = load_file(saved / "model.safetensors"), load_dflash(saved, MODEL)
    assert set(w) == {"fc.weight", "norm.weight", "hidden_norm.weight",
                      *(f"layers.{i}.{name}.weight" for i in range(2) for name in LAYER)}
    assert (net.taps, net.block_size, net.mask_token_id) == (TAPS, BLOCK, MASK)

    @settings(max_examples=8)
    @given(tokens_of(1, 9), st.integers(0, VOCAB - 1), st.data())
    def check(text, root, data):
        features, drafter, at = features_of(text), DFlashDrafter(net, MODEL), 0
        with torch.inference_mode():
            while at < len(text):
                end = data.draw(st.integers(at + 1, len(text)))
                drafter.observe(features[:, at:end], torch.tensor([(text + [root])[at:end + 1]]))
                at = end
            if data.draw(st.booleans()):                                           # a block leaves nothing behind
                drafter.guess(data.draw(st.integers(0, VOCAB - 1)), BLOCK - 1)
            logits, first = drafter.guess(root, BLOCK - 1), drafter.guess(root, 1)
            expected = plain_dflash(w, net.config, list(features[0]), root)
        assert expected.std() > 0.5 and logits.shape == (BLOCK - 1, VOCAB)
        # rotary angles are float32
        assert max((logits - expected).abs().max(), (first - expected[:1]).abs().max()) < 1e-5

    check()


@settings(max_examples=15)
@given(st.sampled_from(METHODS), tokens_of(1, 8), st.integers(1, 20), st.integers(1, 9))
def test_the_cache_after_rounds_is_a_fresh_one(method, prompt, new, chunk):
    drafter = DFlashDrafter(NET, MODEL)
    state, config = State(MODEL, drafter), plan_of(method, max_new_tokens=new, prefill_chunk=chunk)[0]
    for _ in range(2):                                                             # the second turn rewinds
        for _ in generate(MODEL, prompt, config, state=state):
            pass
        text, fresh = state.tokens, DFlashDrafter(NET, MODEL)
        fresh.observe(features_of(text), torch.tensor([text + [0]]))
        assert drafter.cache.length == fresh.cache.length == len(text) == state.cache.length
        for ours, theirs in ((drafter.cache.keys, fresh.cache.keys), (drafter.cache.values, fresh.cache.values)):
            assert (ours[:, :, :, :len(text)] - theirs[:, :, :, :len(text)]).abs().max() < 1e-9
        prompt = text[:len(text) // 2 + 1] + [3]


@given(st.lists(tokens_of(4, 14), min_size=1, max_size=3), st.data())
def test_training_runs_the_blocks_that_drafting_runs(texts, data):
    """Texts of several lengths side by side, padded; several blocks of each in one forward."""
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    features = torch.zeros(len(texts), longest, 3 * MODEL.config.hidden_size, dtype=torch.float64)
    for row, text in enumerate(texts):
        features[row, :len(text)] = features_of(text)[0]
    roots = [data.draw(st.lists(st.integers(1, len(text) - 1), min_size=3, max_size=3)) for text in texts]
    logits = MODEL.lm_head(denoise(NET, MODEL, tokens, features, torch.tensor(roots)))
    for row, text in enumerate(texts):
        for which, root in enumerate(roots[row]):
            drafter = DFlashDrafter(NET, MODEL)
            drafter.observe(features_of(text[:root]), torch.tensor([text[:root + 1]]))
            assert (logits[row, which] - drafter.guess(text[root], BLOCK - 1)).abs().max() < 1e-9


# ---------------------------------------------------------------------------------------------------- trees, lossless

def plan_of(method: str, target: Model = MODEL, net: DFlash = NET, tuned=None, **fields):
    """What `prepare` plans, for a drafter that is not on disk."""
    base = GraftConfig(eos_token_ids=(), **fields)
    setup = run.Setup(model=target, head=None, text=None, method=method, base=base, chat=False, system=None, corpus=[],
                      tuned=tuned or {}, folder=Path(), draft=str(ROOT), window=None, store=None, warm=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dflash, "_load", lambda folder, model: net)
        return prepare(setup, method)


@given(tokens_of(1, 8), st.integers(0, VOCAB - 1), st.integers(1, 6), st.integers(0, 9), st.sampled_from([0.0, 0.8]))
def test_scores_are_products_of_each_positions_probabilities(text, root, top_k, depth, temperature):
    drafter, sampler = DFlashDrafter(NET, MODEL), Sampler(GraftConfig(temperature=temperature), VOCAB, "cpu")
    drafter.observe(features_of(text), torch.tensor([text + [root]]))
    sampler.read(text + [root])
    leaning = [sampler.lean(row, i, torch.arange(VOCAB))[0].tolist()
               for i, row in enumerate(drafter.guess(root, BLOCK - 1).split(1))]
    sizes = []
    for tree in drafter.expand(root, depth, top_k, sampler):
        sizes.append(len(tree))
    steps = min(depth + 1, BLOCK - 1)
    # a tree after each position
    assert sizes == [1 + top_k + i * top_k**2 for i in range(steps)] and max(tree.depths) == steps
    below, best = {0}, lambda i: sorted(range(VOCAB), key=lambda token: -leaning[i][token])[:top_k]
    for i in range(steps):
        level = [node for node in range(1, len(tree)) if tree.depths[node] == i + 1]
        assert {tree.parents[node] for node in level} == below
        for parent in below:
            # so siblings differ
            assert [tree.tokens[node] for node in level if tree.parents[node] == parent] == best(i)
        for node in level:
            assert abs(tree.scores[node] - sum(leaning[j][tree.tokens[step]]
                                               for j, step in enumerate(tree.path(node)))) < 1e-5
        below = set(sorted(level, key=lambda node: -tree.scores[node])[:top_k])


@settings(max_examples=60)
@given(st.sampled_from(METHODS), st.integers(0, 2), tokens_of(1, 9), st.sampled_from([0.0, 0.8]), st.integers(1, 24),
       st.integers(1, 16), st.data())
def test_every_method_is_plain_decoding(method, seed, prompt, temperature, new, budget, data):
    target = tiny(seed, qk_norm=data.draw(st.booleans()))
    tuned = data.draw(st.sampled_from([{}, {"graft": {"verify_cost": tuple(0.02 * n for n in range(budget + 1))}}]))
    config, new_drafter = plan_of(method, target, tiny_net(target, block=data.draw(st.integers(2, 9))), tuned,
                                  max_new_tokens=new, budget=budget,
                                  temperature=temperature, seed=seed, draft_top_k=data.draw(st.integers(1, 5)))
    expected, state = plain_sampling(target, prompt, new, config), State(target, new_drafter())
    for _ in range(2):                                                             # cold, then warm stores
        steps = list(generate(target, prompt, config, state=state))
        assert [token for step in steps for token in step.tokens] == expected
        for step in steps[1:]:
            assert len(step.tree) - 1 <= budget
            if method == "dflash":
                assert (step.tree.parents == list(range(-1, len(step.tree) - 1))
                        and set(step.tree.sources[1:]) <= {DRAFT})
            if method == "dflash_graft_tail":                  # the chain's confident part, and what grows from its end
                chain = [i for i, source in enumerate(step.tree.sources) if source == DRAFT]
                assert chain == list(range(1, len(chain) + 1))
                assert all(math.exp(step.tree.scores[i]) >= dflash.CONFIDENT for i in chain)
                assert all(parent >= len(chain) for parent, source in zip(step.tree.parents, step.tree.sources)
                           if source in (NGRAM, ADJACENCY))


@settings(max_examples=10)
@given(st.lists(tokens_of(1, 7), min_size=2, max_size=3))
def test_a_batch_is_each_prompt_alone(prompts):
    config, new_drafter = plan_of("dflash_graft", max_new_tokens=9, budget=6)
    sequences = [Sequence(MODEL, prompt, config, State(MODEL, new_drafter())) for prompt in prompts]
    for _ in run_rounds(MODEL, sequences):
        pass
    assert [s.output for s in sequences] == [plain_sampling(MODEL, prompt, 9, config) for prompt in prompts]


def test_a_good_drafter_is_believed():
    """One that knows the answer fills whole blocks: the seam hands its chain on as it is."""
    prompt, new = [1, 2, 3], 21
    truth = plain_sampling(MODEL, prompt, new, GraftConfig())
    for method in METHODS:
        config, new_drafter = plan_of(method, max_new_tokens=new)
        drafter = new_drafter()

        def knowing(root, most):
            at = drafter.cache.length - len(prompt) + 1
            return 20.0 * torch.eye(VOCAB)[(truth[at:] + [0] * BLOCK)[:min(most, BLOCK - 1)]]

        drafter.guess = knowing
        *_, last = generate(MODEL, prompt, config, state=State(MODEL, drafter))
        assert last.stats.rounds == (new - 1) / BLOCK and last.stats.accepted[DRAFT] == (new - 1) - last.stats.rounds


# ------------------------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("layers, expected", [(1, (3,)), (2, (1, 3)), (3, (1, 2, 3))])
def test_the_features_layers_are_spread_evenly_by_default(layers, expected, tmp_path):
    net = tiny_net(layers=layers)
    net.taps = expected                                                            # of 6: from 1 to 3
    torch.nn.init.normal_(weight := torch.empty(32, 32 * len(expected), dtype=torch.float64))
    net.fc.weight = torch.nn.Parameter(weight)
    save(tmp_path, net)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dflash_config"]["target_layer_ids"], config["num_target_layers"]
    config |= config.pop("dflash_config")                                       # newer checkpoints have no inner object
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_dflash(tmp_path, MODEL).taps == expected


@pytest.mark.parametrize("rope", [ROPE, LLAMA3, YARN])
def test_rope_scaling_comes_back(rope, tmp_path):
    assert load_dflash(save(tmp_path, tiny_net(rope=rope)), MODEL).config.rope == rope


@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_vocabulary_guesses_its_own_tokens_alone(tied, tmp_path):
    target, own = tiny(1, tie_word_embeddings=tied), torch.tensor([0, 3, 4, 9, 17, 30])
    if tied:
        target.lm_head.weight = target.embed_tokens.weight
    net = tiny_net(target)
    save(tmp_path / "whole", net)
    net.register_buffer("d2t", own - torch.arange(6))
    net.ids = own
    nets, text = ([load_dflash(folder, target) for folder in (tmp_path / "whole", save(tmp_path / "part", net))],
                  [5, 1, 2])
    logits = []
    for each in nets:
        drafter = DFlashDrafter(each, target)
        drafter.observe(features_of(text, target), torch.tensor([text + [7]]))
        logits.append(drafter.guess(7, BLOCK - 1))
    assert (logits[1].shape == (BLOCK - 1, 6) and torch.allclose(logits[0][:, own], logits[1], atol=1e-12)
            and (nets[1].head is not None) == tied)
    *_, tree = drafter.expand(7, 3, 4, Sampler(GraftConfig(), VOCAB, "cpu"))
    assert set(tree.tokens[1:]) <= set(own.tolist())
    net.d2t[-1] = VOCAB
    with pytest.raises(CheckpointError, match="d2t"):
        load_dflash(save(tmp_path / "part", net), target)


P = "layers.1."


@pytest.mark.parametrize("change, named", [
    (lambda w: w.pop("fc.weight"), "'fc.weight' is missing"),
    (lambda w: w.pop(f"{P}self_attn.k_norm.weight"), "layers.1.self_attn.k_norm.weight"),
    (lambda w: w.update(surprise=torch.zeros(1)), "surprise"),
    (lambda w: w.update({"layers.2.mlp.up_proj.weight": torch.zeros(1)}), "layers.2.mlp.up_proj"),
    (lambda w: w.update({f"{P}self_attn.v_proj.weight": torch.zeros(3, 3)}), "v_proj.weight' has shape"),
    (lambda w: w.update({"hidden_norm.weight": torch.zeros(3)}), "hidden_norm.weight' has shape")])
def test_a_damaged_tensor_is_named(change, named, tmp_path):
    w = load_file(save(tmp_path) / "model.safetensors")
    change(w)
    save_file(w, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load_dflash(tmp_path, MODEL)


@pytest.mark.parametrize("field, value", [
    ("architectures", ["Qwen3ForCausalLM"]), ("vocab_size", 32), ("hidden_size", 16), ("num_target_layers", 7),
    ("block_size", 1), ("block_size", None), ("block_size", True), ("mask_token_id", VOCAB), ("mask_token_id", None),
    ("target_layer_ids", [1, 6]), ("target_layer_ids", []), ("target_layer_ids", 3), ("dflash_config", 7),
    ("layer_types", ["sliding_attention"] * 2), ("is_causal", True), ("output_multiplier", 2.0)])
def test_a_bad_field_is_named(field, value, tmp_path):
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (config["dflash_config"] if field in config["dflash_config"] else config)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=field.replace("architectures", "architecture")):
        load_dflash(tmp_path, MODEL)


def test_without_a_drafter_one_line_says_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.setattr(dflash, "DEMO_DRAFT", tmp_path / "none")
    with pytest.raises(ValueError, match="train_dflash.py"):
        prepare(Namespace(draft=None), "dflash")
    done = command("x", "--method", "dflash", "--draft", "gone/")
    assert done.returncode != 0 and "gone" in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------- training

@given(st.lists(st.tuples(st.integers(1, 9), st.integers(8, 30)), min_size=1, max_size=5), st.integers(1, 6),
       st.integers(0, 99))
def test_roots_lie_in_answers_and_guesses_inside_the_text(lengths, spacing, seed):
    kind = torch.zeros(len(lengths), max(map(sum, lengths)), dtype=torch.int8)
    for row, (answer_from, size) in enumerate(lengths):
        kind[row, :answer_from - 1], kind[row, answer_from - 1:answer_from + size] = 1, 2
    roots, after, inside = draw(NET, kind, spacing, torch.Generator().manual_seed(seed))
    for row, (answer_from, size) in enumerate(lengths):
        assert ((answer_from <= roots[row]) & (roots[row] < answer_from + size - 1)).all()
        for root, places, there in zip(roots[row].tolist(), after[row].tolist(), inside[row].tolist()):
            end = answer_from + size - 1                                           # the last token has no successor
            assert there == [root + j < end for j in range(BLOCK - 1)]
            assert ([place for place, valid in zip(places, there) if valid]
                    == list(range(root, min(root + BLOCK - 1, end))))


def save_target(folder: Path, target: Model) -> None:
    layout, w = checkpoint_layout(target), {}
    for name, value in target.state_dict().items():
        pieces = layout.get(name, {name: tuple(value.shape)})
        w |= {piece: own.contiguous()
              for piece, own in zip(pieces, value.split([shape[0] for shape in pieces.values()]))}
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0} | {
        name: getattr(target.config, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")}))


def test_training_learns_continues_and_writes_what_drafts(tmp_path, monkeypatch, capsys):
    (tmp_path / "target").mkdir()
    save_target(tmp_path / "target", tiny())
    target, rng = load_model(tmp_path / "target", dtype=torch.float32), torch.Generator().manual_seed(0)
    assert (full_forward(target, [1, 2, 3])[0] - full_forward(MODEL, [1, 2, 3])[0]).abs().max() < 1e-3
    conversations = []
    for _ in range(24):
        text = torch.randint(0, VOCAB - 1, (4,), generator=rng).tolist()           # the last token stays unused
        text += plain_sampling(target, text, 20, GraftConfig())
        conversations.append((torch.tensor(text, dtype=torch.int32), 4,
                              full_forward(target, text, taps=(1, 2, 2, 5))[1][0].bfloat16()))
    for shard in range(2):                                           # validated on what it learns: the target is random
        write_shard(tmp_path / f"shard-{shard:05d}.safetensors", conversations)
    arguments = ["--model", str(tmp_path / "target"), "--data", str(tmp_path), "--device", "cpu",
                 "--out", str(tmp_path / "out"), "--layers", "1", "--block", "4", "--batch-tokens", "72",
                 "--validate", "100", "--lr", "0.05"]
    for tokens in (12000, 24000):
        monkeypatch.setattr(sys, "argv", ["train_dflash.py", *arguments, "--tokens", str(tokens)])
        train_dflash.main()
    assert "continuing after" in capsys.readouterr().out
    history = json.loads((tmp_path / "out" / "training.json").read_text())["held_out"]
    first, last = history[0], history[-1]
    assert (last["tokens"] >= 24000 and last["loss"] < 0.85 * first["loss"]
            and last["accepted"][0] > 0.45 > first["accepted"][0])
    net = load_dflash(tmp_path / "out", MODEL)
    assert (net.block_size, net.taps) == (4, (1, 2, 2)) and len(net.ids) == VOCAB
    again = ["--name", "again", "--start", str(tmp_path / "out"), "--out", str(tmp_path / "again"),
             "--tokens", "100", "--lr", "0"]
    monkeypatch.setattr(sys, "argv", ["train_dflash.py", *arguments, *again])
    train_dflash.main()                                                            # goes on from a finished one
    accepted = json.loads((tmp_path / "again" / "training.json").read_text())["held_out"][0]["accepted"]
    assert accepted == pytest.approx(last["accepted"], abs=0.05)                   # it was saved in bfloat16
    saved = [load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0]) and saved[0].keys() == saved[1].keys()
    config, new_drafter = plan_of("dflash_graft", net=net, max_new_tokens=12)
    *_, last = generate(MODEL, [1, 2, 3], config, state=State(MODEL, new_drafter()))
    assert last.stats.nodes[DRAFT] > 0
    for wrong in (["--layers", "2"], ["--block", "5"]):
        monkeypatch.setattr(sys, "argv", ["train_dflash.py", *arguments, *wrong])
        with pytest.raises(SystemExit, match=wrong[0]):
            train_dflash.main()


# ----------------------------------------------------------------------------------------- the demo model, end to end

@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiled_block_is_the_block():
    guesses = []
    for made in (kernels.products(), None):
        target = load_model(train_dflash.model_folder(Namespace(model=None)), dtype=torch.float32, products=made)
        net = load_dflash(dflash.DEMO_DRAFT, target)
        net.kernels = kernels.kernels(net)
        assert bool(net.kernels) == bool(made) == bool(net.head.blocks)
        drafter, ids = DFlashDrafter(net, target), torch.arange(1000, 1040)[None]
        with torch.inference_mode():
            _, features = target(ids, torch.arange(40)[None], target.new_cache(40), taps=net.taps)
            drafter.observe(features, ids)
            guesses.append(drafter.guess(1040, 7))
    assert guesses[0].shape == (7, 8192) and guesses[0].std() > 1 and (guesses[0] - guesses[1]).abs().max() < 1e-2


def test_bench_drafts_blocks_for_the_demo_model(tmp_path):
    target = load_model(train_dflash.model_folder(Namespace(model=None)), dtype=torch.bfloat16, pack=False)
    save_dflash(new_net(target, (1, 14, 26), 1, 8, 16, torch.arange(0, 49152, 6)), tmp_path / "net",
                {"target_layers": 30})
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": 0, "task": "t", "turns": ["List three fruits."]}))
    done = command("bench", "--prompts", str(tmp_path / "p.jsonl"), "--methods", ",".join(METHODS),
                   "--draft", str(tmp_path / "net"), "--dtype", "float32", "--max-new-tokens", "16",
                   "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert all(report["lossless"][method] == {"identical": 1, "near_tie": 0, "different": 0} for method in METHODS)
    assert report["methods"]["dflash"]["nodes"]["draft"] >= 7 and report["config"]["dflash_graft"]["verify_cost"]
