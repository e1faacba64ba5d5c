"""On a GPU everything says what it says on the CPU, with CUDA graphs and without; tiny random models of test_graft.py.

    python -m pytest -q tools/test_cuda.py                   skipped where there is no GPU
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "variants")]
import test_dflash as blocks  # noqa: E402
import test_graft as base  # noqa: E402
from graft import METHODS, EagleDrafter, GraftConfig, ModelDrafter, State, generate_batch  # noqa: E402
from model import KVCache, MoE, RMSNorm  # noqa: E402

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TARGET = base.tiny(4, context=256)
HEAD, SMALL = base.tiny_head(TARGET), base.tiny(5, context=256, num_hidden_layers=2)
PROMPTS = ([1, 2, 3, 4, 1, 2, 3], [7], list(range(30)) * 2)


def there(network, graphs: bool, dtype=torch.float32):
    """A copy on the GPU."""
    network = copy.deepcopy(network).to(DEVICE, dtype)
    network.graphs = graphs
    return network


def say(model, drafter, prompt, state=None, **fields):
    config = GraftConfig(**dict(max_new_tokens=40, budget=12, draft_top_k=4, depth=4) | fields)
    return base.collect(model, prompt, config, state=state or State(model, drafter))[0]


@pytest.mark.parametrize("graphs", [True, False])
def test_logits_and_features_are_those_of_the_cpu(graphs):
    """Through a prompt, trees, commits and steps of one token, in float32; graphs leave nothing behind that a later
    replay changes."""
    cpu, gpu = copy.deepcopy(TARGET).float(), there(TARGET, graphs)
    caches = cpu.new_cache(256), gpu.new_cache(0)
    generator, kept = torch.Generator().manual_seed(0), []
    with torch.inference_mode():
        for n in (40, 1, 13, 5, 1, 1, 31, 2, 60, 1):
            tokens = torch.randint(0, base.VOCAB, (1, n), generator=generator)
            parents = [-1, *(int(torch.randint(0, i, (), generator=generator)) for i in range(1, n))]
            tree = base.Tree(tokens[0].tolist())
            tree.parents, tree.depths = parents, [0] * n
            for i in range(1, n):
                tree.depths[i] = tree.depths[parents[i]] + 1
            outs = []
            for network, cache in zip((cpu, gpu), caches):
                device, causal = network.device, n in (40, 2)
                cache.reserve(cache.length + n)
                positions = cache.length + torch.arange(n) if causal else tree.positions(cache.length)
                mask = None if causal or n == 1 else tree.mask(device)
                outs.append(network(tokens.to(device), positions.to(device)[None], cache, mask, taps=(-1, 2, 5)))
                cache.commit(list(range(n)) if causal else [0, *tree.path(n - 1)])
            # features reach 50
            close = lambda theirs, ours: torch.testing.assert_close(theirs.cpu(), ours, atol=2e-3, rtol=1e-4)
            for theirs, ours in zip(*reversed(outs)):
                close(theirs, ours)
            close(*(cache.rows[:, :, :, :caches[0].length] for cache in reversed(caches)))
            kept.append((outs[1][0], outs[1][0].cpu()))
    assert all(torch.equal(now.cpu(), then) for now, then in kept)
    assert (gpu.captured > 0) == graphs


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_the_cpu_says(method, temperature, graphs):
    fields = dict(method=method, seed=3)
    fields |= dict(temperature=temperature, repetition_penalty=1.2, top_p=0.95) if temperature else {}
    cpu, head = copy.deepcopy(TARGET).float(), copy.deepcopy(HEAD).float()
    gpu, gpu_head = there(TARGET, graphs), there(HEAD, graphs)
    for prompt in PROMPTS:
        assert say(gpu, EagleDrafter(gpu_head), prompt, **fields) == say(cpu, EagleDrafter(head), prompt, **fields)


@pytest.mark.parametrize("method", ["ar", "graft"])
def test_compiled_forwards_say_what_the_cpu_says_and_are_compiled_once(method):
    """Whatever the length of text and tree: for one row and for more, with a mask and without."""
    torch._dynamo.reset()
    counted, made = torch._dynamo.utils.counters["stats"], []
    cpu, gpu, head = copy.deepcopy(TARGET).float(), there(TARGET, True), there(HEAD, True)
    gpu.compiled = head.compiled = True
    for fields in (dict(), dict(budget=9, depth=3), dict(budget=30, draft_top_k=5, thresholds=(0.0, 0.0, 0.0)),
                   dict(budget=5, depth=1)):
        for prompt in PROMPTS:
            assert say(gpu, EagleDrafter(head), prompt, method=method, **fields) == say(cpu, None, prompt, method="ar")
        made.append(counted["unique_graphs"])
    assert made[0] > 0 and made[3] == made[2] <= made[0] + 3


@pytest.mark.parametrize("drafter", ["window", "model"])
def test_other_drafters_say_what_the_cpu_says(drafter):
    cpu, gpu, small, head = copy.deepcopy(TARGET).float(), there(TARGET, True), there(SMALL, True), there(HEAD, True)
    own = ModelDrafter(small) if drafter == "model" else EagleDrafter(head, window=5)
    for prompt in PROMPTS:
        assert say(gpu, own, prompt, method="graft") == say(cpu, None, prompt, method="ar")


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("method", blocks.METHODS)
def test_blocks_are_those_of_the_cpu_and_say_what_it_says(method, graphs):
    cpu, gpu, net = copy.deepcopy(TARGET).float(), there(TARGET, graphs), blocks.tiny_net(TARGET, block=9)
    nets, guesses = (copy.deepcopy(net).float(), there(net, graphs)), []
    for device, own, target in zip(("cpu", DEVICE), nets, (cpu, gpu)):
        drafter, features = blocks.DFlashDrafter(own, target), blocks.features_of(PROMPTS[0], TARGET).float().to(device)
        with torch.inference_mode():
            drafter.observe(features, torch.tensor([PROMPTS[0] + [5]], device=device))
            guesses += [drafter.guess(5, most).cpu() for most in (8, 3)]
    assert all(torch.allclose(ours, theirs, atol=2e-3, rtol=1e-3) for ours, theirs in zip(guesses[:2], guesses[2:]))
    config, new_drafter = blocks.plan_of(method, gpu, nets[1], max_new_tokens=40, budget=12)
    for prompt in PROMPTS:
        assert (base.collect(gpu, prompt, config, state=State(gpu, new_drafter()))[0]
                == say(cpu, None, prompt, method="ar"))
    assert (nets[1].captured > 0) == graphs


def test_growing_storage_and_a_conversation(monkeypatch):
    monkeypatch.setattr(KVCache, "STEP", 4)
    cpu, gpu, head = copy.deepcopy(TARGET).float(), there(TARGET, True), there(HEAD, True)
    state, text = State(gpu, EagleDrafter(head)), [1, 2, 3]
    for _ in range(3):
        said = say(gpu, None, text, state, method="graft")
        assert said == say(cpu, None, text, method="ar")
        text = text + said + [5]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_captured_anew_for_the_same_text(method):
    """With one state, and with a new one once the old is gone, whose storage it takes."""
    gpu, head = there(TARGET, True), there(HEAD, True)
    count = lambda: (gpu.captured, head.captured)
    state, counts = State(gpu, EagleDrafter(head)), []
    for _ in range(5):
        say(gpu, None, PROMPTS[0], state, method=method)
        counts.append(count())
    assert counts[0][0] > 0 and counts[4] == counts[3]
    if not METHODS[method].retrieve:                     # else a text that was said before makes larger trees
        assert counts[4] == counts[1]                    # the second time, less of the prompt is read
    del state
    for _ in range(3):
        said = say(gpu, EagleDrafter(head), PROMPTS[0], method=method)
    before = count()
    assert said == say(gpu, EagleDrafter(head), PROMPTS[0], method=method) and count() == before
    held = [value for _, graphs in gpu.spare + head.spare for value in graphs.values()]
    graphs = [graph for value in held for graph in getattr(value, "steps", [value])]         # a chain's steps
    assert graphs and all(graph.graph is not None for graph in graphs) or DEVICE == "cpu"


@pytest.mark.parametrize("method", ["ar", "retrieve", "graft"])
def test_a_batch_is_each_prompt_alone(method):
    gpu, head = there(TARGET, True), there(HEAD, True)
    texts = [[] for _ in PROMPTS]
    config = GraftConfig(method=method, max_new_tokens=40, budget=12, draft_top_k=4, depth=4)
    for i, step in generate_batch(gpu, list(PROMPTS), config, states=[State(gpu, EagleDrafter(head)) for _ in PROMPTS]):
        texts[i] += step.tokens
    assert texts == [say(gpu, EagleDrafter(head), prompt, method=method) for prompt in PROMPTS]


def test_experts_run_as_one_product_each_way(monkeypatch):
    """In bfloat16: grouped against the loop, over few rows and a prompt; then a mixture's forwards in graphs against
    eager ones."""
    model = base.tiny(4, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, moe_layers=(1, 3), context=256)
    plain, graphed = there(model, False, torch.bfloat16), there(model, True, torch.bfloat16)
    moe = plain.layers[1].mlp
    for n in (1, 3, 300):
        x = torch.randn(1, n, 32, device=DEVICE, dtype=torch.bfloat16)
        exact = copy.deepcopy(moe).double()(x.double())
        assert moe.grouped() or DEVICE == "cpu"
        grouped = moe(x)
        with monkeypatch.context() as patch:
            patch.setattr(MoE, "grouped", lambda self: False)
            loop = moe(x)
        assert (grouped - exact).abs().mean() <= 1.5 * (loop - exact).abs().mean() + 1e-4
    with torch.inference_mode():
        for n in (1, 3, 32):
            positions = torch.arange(n, device=DEVICE)[None]
            tokens = positions % base.VOCAB
            ours, eager = (network(tokens, positions, network.new_cache(64))[0].float() for network in (graphed, plain))
            assert (ours - eager).abs().max() < 0.1 * eager.abs().max()
    assert graphed.captured == 3


def test_the_norm_is_the_cpus():
    """In bfloat16 the two may differ by one rounding."""
    norm = RMSNorm(576, 1e-5).requires_grad_(False).bfloat16()
    norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(1, 7, 576).bfloat16() * 3
    cpu, gpu = norm(x).float(), copy.deepcopy(norm).to(DEVICE)(x.to(DEVICE)).float().cpu()
    assert ((cpu - gpu).abs() <= cpu.abs() * 2**-7 + 1e-6).all()
    assert ((copy.deepcopy(norm).float().to(DEVICE)(x.float().to(DEVICE)).cpu() - norm.float()(x.float())).abs().max()
            < 1e-5)


def test_the_demo_model_says_on_a_gpu_what_it_says_on_a_cpu():
    """In float32, with its head and the settings of `graft`."""
    said = {}
    for device in ("cpu", DEVICE):
        demo = base.run.set_up(base.run.parse(["x", "--device", device, "--dtype", "float32"]))
        prompts = [demo.ask(text) for text in ("Why is the sky blue?", "Write a Python function that reverses a list.")]
        for method in ("ar", "graft"):
            config = base.replace(demo.configure(method), max_new_tokens=48)
            said[device, method] = [base.collect(demo.model, ids, config, state=demo.state())[0] for ids in prompts]
    assert len(set(map(str, said.values()))) == 1
