"""Hostile input: what is damaged, absurd, malicious, too large or interrupted gets one clear line and harms nothing.

Commands run in this process on a tiny checkpoint whose tokenizer is made here, except where only a process of its own
shows it.
"""

import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import demo_model  # noqa: E402
import endurance  # noqa: E402
import kernels  # noqa: E402
import model  # noqa: E402
import render_template  # noqa: E402
import run  # noqa: E402
import test_graft as base  # noqa: E402
from graft import EagleDrafter, GraftConfig, State, generate  # noqa: E402
from retrieval import AdjacencyMatrix, NGramIndex, load_stores, whole  # noqa: E402
from tree import Tree  # noqa: E402

# a shell's background jobs ignore Ctrl-C, and so would what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
CONTROL = ["<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


def small(folder: Path, **changes) -> Path:
    """A checkpoint folder: one layer, 258 tokens (the bytes and two control tokens), a context of 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
                                     merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.GOOD, "vocab_size", 258)
        patch.setitem(base.GOOD, "max_position_embeddings", 256)
        base.checkpoint(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def command(folder, capsys):
    """Runs run.py in this process on the small checkpoint: its exit code, standard output and standard error."""
    def execute(*arguments):
        code = run.main([*arguments, "--model", str(folder), "--dtype", "float32", "--device", "cpu"])
        return code, *capsys.readouterr()
    return execute


@contextmanager
def limited(which: int, amount: int):
    """A soft limit of this process, and for its time only: RLIMIT_FSIZE makes a full disk, RLIMIT_AS a machine short of
    memory."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@pytest.fixture(autouse=True, scope="module")
def compiled_before():
    """A machine's first start says that it compiles: not where a test counts lines."""
    if shutil.which(base.COMPILER):
        kernels.library()


def one_line(error: str, *words: str) -> bool:
    return error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)


# --------------------------------------------------------------------------------------------------------- checkpoints

def header(raw: bytes, change) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8:8 + size])
    change(entries["model.norm.weight"])
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size:]


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:7], lambda raw: raw[:100], lambda raw: raw[:-1], lambda raw: raw + b"x",
    lambda raw: struct.pack("<Q", 2**62) + raw[8:],
    lambda raw: b"version https://git-lfs.github.com/spec/v1\nsize 12\n", lambda raw: b"PK\3\4" + raw,
    lambda raw: header(raw, lambda e: e.update(data_offsets=[-1, 16])),
    lambda raw: header(raw, lambda e: e.update(shape=[2**40, 2**40])),
    lambda raw: header(raw, lambda e: e.update(dtype="Q3")), lambda raw: header(raw, lambda e: e.update(dtype="F64")),
    lambda raw: header(raw, lambda e: e.update(dtype="I32"))])
def test_a_damaged_or_mislabelled_file_is_named(damage, tmp_path):
    base.checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(model.CheckpointError, match=str(tmp_path)):
        model.load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers_are_refused(dtype, tmp_path):
    w = base.checkpoint(tmp_path)
    save_file(w | {"model.norm.weight": w["model.norm.weight"].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(model.CheckpointError, match=f"model.norm.weight' is of {dtype}"):
        model.load_model(tmp_path)


def test_weights_that_are_not_finite_give_an_error_and_no_text():
    damaged = base.tiny()
    damaged.lm_head.weight[3] = torch.nan
    for temperature in (0.0, 0.7):
        with pytest.raises(ValueError, match="not finite"):
            list(generate(damaged, [1, 2], GraftConfig(method="ar", temperature=temperature, top_p=0.9)))


def test_a_damaged_head_changes_no_token():
    head = base.tiny_head(base.MODEL)
    head.lm_head.weight[3], head.norm.weight[0] = torch.nan, torch.inf
    for method in ("eagle", "prune", "graft"):
        config = GraftConfig(method=method, max_new_tokens=12, budget=9, eos_token_ids=())
        assert (base.collect(base.MODEL, [1, 2, 3], config, state=State(base.MODEL, EagleDrafter(head)))[0]
                == base.plain_greedy(base.MODEL, [1, 2, 3], 12)[0])


@pytest.mark.parametrize("shard", ["gone", "", ".", "..", "../model.safetensors", "/etc/passwd", "a\0b", "\ud800",
                                   "x" * 5000, "config.json"])
def test_an_index_stays_in_its_folder(shard, tmp_path):
    base.checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(model.CheckpointError,
                       match="config.json: not a whole" if shard == "config.json" else "names the shard"):
        model.load_model(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_named(index, tmp_path):
    base.checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(model.CheckpointError, match="index.json"):
        model.load_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    w = base.checkpoint(tmp_path)
    save_file({"model.norm.weight": w["model.norm.weight"] * 7}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}))
    with pytest.raises(model.CheckpointError, match="model.norm.weight' is there twice"):
        model.load_model(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", [Evil(), [1], {"a": 3}, {3: torch.zeros(1)}])
def test_a_pickle_runs_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base.checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(model.CheckpointError):
        model.load_model(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_that_ends_early_is_named(tmp_path, monkeypatch):
    base.checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    def load(*args, weights_only, **kwargs):
        raise EOFError                                            # what torch's unpickler says, without a word

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(model.CheckpointError, match="pytorch_model.bin: not a file of plain tensors .EOFError"):
        model.load_model(tmp_path)


@pytest.mark.parametrize("words", ["the server left", ""])
def test_a_hub_that_breaks_off_is_named(words, monkeypatch):
    def snapshot(*args, **kwargs):
        raise huggingface_hub.errors.HTTPError(words)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(model.CheckpointError, match="'some/model' is no local folder and could not be had from the "
                                                    f"Hub: {words or 'HTTPError'}"):
        model.fetch_checkpoint("some/model")


MOE = dict(architectures=["Qwen3MoeForCausalLM"], num_experts=2**14, num_experts_per_tok=1, moe_intermediate_size=8)


@pytest.mark.parametrize("change, named", [
    (dict(hidden_size=10**9), "hidden_size"), (dict(vocab_size=10**30), "vocab_size"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers"), (dict(num_hidden_layers=1024), "num_hidden_layers"),
    (MOE | dict(num_hidden_layers=2**10), "experts"), (MOE | dict(mlp_only_layers=5), "mlp_only_layers"),
    (dict(vocab_size=2**24), "embed_tokens"), (dict(intermediate_size=2**24), "gate_proj"),
    (dict(head_dim=4096), "q_proj"), (dict(rope_scaling=[1]), "rope_scaling"),
    (dict(rope_parameters="x"), "rope_parameters"), (dict(rope_theta=1.0), "rope_theta"),
    (dict(rope_theta=float("nan")), "rope_theta"), (dict(rope_scaling={"rope_type": ["a"]}), "rope_type"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}), "beta_fast"),
    (dict(rms_norm_eps=float("inf")), "rms_norm_eps"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
     "low_freq_factor"),
    (dict(architectures=5), "architecture"), (dict(architectures=[["LlamaForCausalLM"]]), "architecture")])
def test_absurd_fields_are_refused_before_anything_is_allocated(change, named, tmp_path):
    base.checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(base.GOOD | change))
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(model.CheckpointError, match=named):
        model.load_model(tmp_path)
    # KB, seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 100 * 1024 and time.process_time() - start < 2


@pytest.mark.parametrize("config", [[], {"eagle_aux_hidden_state_layer_ids": 5},
                                    {"eagle_aux_hidden_state_layer_ids": [1, "2", 3]}])
def test_a_heads_config_of_wrong_types_is_named(config, tmp_path):
    base.save_head(tmp_path, base.HEAD, eagle_config=config)
    with pytest.raises(model.CheckpointError, match="eagle_"):
        model.load_eagle3(tmp_path, base.MODEL)


@pytest.mark.parametrize("content, named",
                         [("[]", "tokenizer_config"), ("{", "tokenizer_config"),
                          ('{"chat_template": 5}', "chat_template"), ('{"bos_token": ["<s>"]}', "bos_token"),
                          ('{"eos_token": {"content": 3}}', "eos_token")])
def test_a_tokenizer_config_of_wrong_types_is_named(content, named, tmp_path):
    small(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=named):
        run.Text(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    small(tmp_path)
    # with fewer, unused ids say nothing
    assert run.Text(tmp_path).decode([68, 999, 69]) == run.Text(tmp_path).decode([68, 69])
    base.checkpoint(tmp_path)                                                           # a vocabulary of 8
    assert run.main(["x", "--model", str(tmp_path)]) == 1
    assert one_line(capsys.readouterr().err, "tokenizer has 258 tokens, the model 8")


# ------------------------------------------------------------------------------------------------------ chat templates

@pytest.mark.parametrize("template, reason", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
    ("{% set n = namespace(a=[], b=[]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}"
     "{% endfor %}{{ n.a == n.b }}", "more than 1 seconds"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"), ("{{ 'a' * 10**10 }}", "MB of memory"),
    ("{{ '%09999999999d'|format(1) }}", "MB of memory"), ("{{ 'a' * 2**21 }}", "2097152 characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"), ("{{" + "(" * 3000, "recursion"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ 1 / 0 }}", "division"),
    ("{{", "unexpected"), ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
    ("{{ lipsum.__globals__['os'].system('touch pwned') }}", "unsafe"), ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"), ("{% include '/etc/passwd' %}", "no loader")])
def test_a_chat_template_is_held_in_check(template, reason, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(render_template, "SECONDS", 1)
    monkeypatch.setattr(render_template, "MEMORY", 1 << 28)
    text = run.Text(folder)
    text.template = template
    with pytest.raises(ValueError, match=f"chat template failed: .*{reason}"):
        text.render([{"role": "user", "content": "hi"}])
    assert not (tmp_path / "pwned").exists()


def test_a_chat_template_gets_what_it_needs(folder):
    text = run.Text(folder)
    text.template = ("{% for m in messages %}{% if loop.last %}{{ m.content }}{% break %}{% endif %}{% endfor %}"
                     "{{ bos_token }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}")
    text.names["bos_token"] = "<s>"
    assert text.render([{"content": "no"}, {"content": "ü\0\ud800"}]) == f"ü\0\ud800<s>{time.strftime('%Y')}True"


# ------------------------------------------------------------------------------------------------------------- prompts

def test_odd_prompts(command, tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"a\0b" * 9)
    assert command("--file", str(path), "--max-new-tokens", "3")[0] == 0
    for arguments in (("a\udcff",), ("a", "--system", "b\udcff")):
        code, out, error = command(*arguments)
        assert code == 1 and not out and one_line(error, "UTF-8")
    for text in ("a" * 10**6, CONTROL[1] * 90_000):                                     # a megabyte each
        path.write_text(text)
        code, out, error = command("--file", str(path))
        assert code == 1 and one_line(error, " tokens; the model's context holds 256")


def test_control_tokens_are_text_unless_asked(folder):
    text = run.Text(folder)
    words = "".join(CONTROL) * 3
    assert not set(text.encode(words)) & set(text.control.values())
    # the template's own
    assert sum(i in text.control.values() for i in text.prompt([{"role": "user", "content": words}])) == 3
    assert text.encode_control(words) == [256, 257] * 3


def test_without_a_template_a_text_begins_as_its_tokenizer_says(tmp_path, capsys):
    from tokenizers import Tokenizer, processors
    tokenizer = Tokenizer.from_file(str(small(tmp_path) / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{CONTROL[0]} $A",
                                                             special_tokens=[(CONTROL[0], 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for flag, tokens in (("--no-chat", 2), ("--chat", 4)):
        assert run.main(["a", flag, "--model", str(tmp_path), "--max-new-tokens", "2", "--json", "--dtype", "float32",
                         "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["statistics"]["prompt_tokens"] == tokens


def test_a_method_named_twice_runs_once_and_odd_lines_are_read(tmp_path):
    assert run.known("ar,graft,ar", "--methods") == ["ar", "graft"]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": 1, "task": "t", "turns": ["a\u2028b\x85c"]}, ensure_ascii=False) + "\n\n",
                    encoding="utf-8")
    assert [p["text"] for p in run.read_prompts(str(path), None)] == ["a\u2028b\x85c"]


@pytest.mark.parametrize("method", ["ar", "retrieve", "eagle", "graft"])
def test_a_prompt_at_the_end_of_the_context(method):
    config, limit = GraftConfig(method=method, eos_token_ids=()), base.MODEL.config.max_position_embeddings
    for size in (limit - 2, limit - 1):
        prompt = [i % 7 for i in range(size)]
        tokens, stats = base.collect(base.MODEL, prompt, config, state=State(base.MODEL, EagleDrafter(base.HEAD)))
        assert ((tokens, stats.finish) == base.plain_greedy(base.MODEL, prompt, 99) and stats.finish == "context"
                and len(tokens) == limit - size)
    for size in (limit, limit + 1):
        with pytest.raises(ValueError,
                           match=f"{size} tokens; the model's context holds {limit}, so at most {limit - 1}"):
            base.collect(base.MODEL, [1] * size, config, state=State(base.MODEL, EagleDrafter(base.HEAD)))


# --------------------------------------------------------------------------------------------------------- what is told

def test_a_difference_is_told(command, tmp_path, monkeypatch):
    """By bench and by verify, which also reads prompts in other chunks; both end with 1 then."""
    (tmp_path / "p").write_text(json.dumps({"id": 1, "task": "t", "turns": ["hi"]}))
    complete, chunks = run.complete, set()

    def wrong(setup, plan, batch, args):
        chunks.add(plan.config.prefill_chunk)
        change = lambda ids: [*ids[:2], (ids[2] + 1) % 256, *ids[3:]] if plan.config.method == "retrieve" else ids
        return [(change(ids), stats, seconds) for ids, stats, seconds in complete(setup, plan, batch, args)]

    for name, table in (("bench", "lossless"), ("verify", "counts")):
        for how, code in ((complete, 0), (wrong, 1)):
            monkeypatch.setattr(run, "complete", how)
            assert command(name, "--prompts", str(tmp_path / "p"), "--methods", "ar,retrieve", "--max-new-tokens", "6",
                           "--json", str(tmp_path / name))[0] == code
            assert (json.loads((tmp_path / name).read_text())[table]["retrieve"]
                    == {"identical": 1 - code, "near_tie": 0, "different": code})
    assert chunks == {512, 61}


def test_flags_reach_what_they_are_for(command, folder, tmp_path, monkeypatch):
    fields = {"temperature": 0.5, "seed": 3, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
              "max_new_tokens": 2, "budget": 5}
    said = command("a", "--json", *(word for name, value in fields.items()
                                    for word in (f"--{name.replace('_', '-')}", str(value))))[1]
    assert json.loads(said)["config"].items() >= fields.items()
    counted = [json.loads(command("a", "--json", "--max-new-tokens", "1", *more)[1])["statistics"]["prompt_tokens"]
               for more in ((), ("--system", "bc"))]
    assert counted[1] - counted[0] == len(["<|im_start|>", "b", "c", "<|im_end|>"])
    (tmp_path / "corpus").write_text("abcabd")
    setup = run.set_up(run.parse(["x", "--model", str(folder), "--dtype", "float32", "--device", "cpu",
                                  "--corpus", str(tmp_path / "corpus")]))
    state = setup.state()
    state.ngrams.append(setup.text.encode("ca"))
    assert state.ngrams.propose(1)[0] == setup.text.encode("b")
    prompts = [json.dumps({"id": i, "task": "t" * (1 + i % 2), "turns": ["hi"]}) for i in range(6)]
    (tmp_path / "p").write_text("\n".join(prompts))
    assert [prompt["id"] for prompt in run.read_prompts(str(tmp_path / "p"), 2)] == ["0", "1", "2", "3"]
    monkeypatch.setattr(run, "stop_check",
                        lambda text, stops: (lambda output: len(output) == 2) if stops == ["z"] else None)
    command("bench", "--prompts", str(tmp_path / "p"), "--methods", "ar", "--max-new-tokens", "5", "--stop", "z",
            "--json", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out").read_text())["methods"]["ar"]["tokens"] == 2 * len(prompts)


@pytest.mark.parametrize("multiplies", [False, True])
def test_precision_is_as_named_or_what_the_machine_allows(multiplies, folder, monkeypatch):
    """Bfloat16 where it is multiplied, in compiled layers where there is a compiler."""
    class Loaded(Exception):
        pass

    def load(*_, dtype, products, **rest):
        raise Loaded(dtype, bool(products))

    monkeypatch.setattr(run, "load_model", load)
    monkeypatch.setattr(run, "multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(run.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(run, "products", lambda: len)
    best = torch.bfloat16 if multiplies else torch.float32
    for compiler, more, chosen in ((True, (), (best, True)), (True, ("--no-compile",), (best, False)),
                                   (False, (), (best, False)),
                                   (True, ("--dtype", "bfloat16"), (torch.bfloat16, multiplies)),
                                   (False, ("--dtype", "bfloat16", "--compile"), (torch.bfloat16, True)),
                                   (True, ("--dtype", "float32"), (torch.float32, True)),
                                   (True, ("--dtype", "float64"), (torch.float64, False))):
        monkeypatch.setattr(run.shutil, "which", lambda _: compiler or None)
        with pytest.raises(Loaded) as loaded:
            run.set_up(run.parse(["x", "--model", str(folder), "--device", "cpu", *more]))
        assert loaded.value.args == chosen


def test_a_conversation_is_remembered_until_it_is_reset(command, monkeypatch):
    asked, answer, lines = [], run.answer, iter(["one", "two", "/reset", "three", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(run, "answer", lambda setup, plan, ids, *rest:
                        asked.append(ids) or answer(setup, plan, ids, *rest))
    assert command("chat", "--max-new-tokens", "3", "--method", "ar")[0] == 0
    first, second, third = asked
    assert (second[:len(first)] == first and len(second) > len(first) + len("two") + 3
            and len(third) == len(first) + len("three") - len("one"))


def test_a_comparison_is_ours_over_plain(command, monkeypatch):
    results = iter([([1, 2, 3], "", run.Stats(tokens=3), 2.0), ([1, 2, 4], "", run.Stats(tokens=3), 5.0)])
    monkeypatch.setattr(run, "answer", lambda *rest: next(results))
    report = json.loads(command("a", "--json", "--compare")[1])
    assert report["speedup"] == 2.5 and not report["identical"]


def test_text_is_what_was_written(folder):
    text = run.Text(folder)
    assert text.decode([*text.encode("a"), text.control["<|im_end|>"]]) == "a"               # no control token is shown
    # the mark is one that is not in use
    assert "x\ue000y" in text.tokenizer.decode(text.prompt([{"role": "user", "content": "x\ue000y"}]))
    for stop in ("\u00e9" * 3, "\u00e9" * 9):
        ids = text.encode("a" + stop)                                                       # two tokens for each letter
        assert run.stop_check(text, ["x", stop])(ids) and not run.stop_check(text, ["x", stop])(ids[:-1])


# ---------------------------------------------------------------------------------------------- memory, disks and pipes

def test_out_of_memory_is_one_line(tmp_path, capsys):
    """32 MB of weights whose cache for 512 tokens takes 1 GB."""
    small(tmp_path, num_attention_heads=128, num_key_value_heads=128, head_dim=4096)
    w, width = load_file(tmp_path / "model.safetensors"), 128 * 4096
    for name in ("q", "k", "v", "o"):
        w[f"model.layers.0.self_attn.{name}_proj.weight"] = torch.zeros((8, width) if name == "o" else (width, 8),
                                                                        dtype=torch.bfloat16)
    save_file(w, tmp_path / "model.safetensors")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, held + 700 * 2**20):
        assert run.main(["x", "--model", str(tmp_path), "--dtype", "bfloat16", "--device", "cpu"]) == 1
    assert one_line(capsys.readouterr().err, "out of memory", "shorter prompt")


def test_a_full_disk_harms_nothing(command, tmp_path, monkeypatch):
    store, prompts, out = tmp_path / "store", tmp_path / "p.jsonl", tmp_path / "out.json"
    assert command("warm", "--store", str(store), "--max-new-tokens", "3")[0] == 0
    before = store.read_bytes()
    with limited(resource.RLIMIT_FSIZE, 1000):
        code, text, error = command("x", "--store", str(store), "--max-new-tokens", "3", "--quiet")
    assert code == 1 and text.strip() and one_line(error, str(store), "could not be written")
    prompts.write_text(json.dumps({"id": 1, "task": "t", "turns": ["hi"]}))
    bench = "bench", "--prompts", str(prompts), "--methods", "ar", "--max-new-tokens", "3", "--json"
    assert command(*bench, str(out))[0] == 0
    earlier = out.read_bytes()
    for size in (100, len(earlier) - 200):                                         # at the first line, and at the table
        with limited(resource.RLIMIT_FSIZE, size):
            code, _, error = command(*bench, str(out))
        assert code == 1 and one_line(error.splitlines(keepends=True)[-1], "out.json")
    assert out.read_bytes() == earlier and store.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.json.partial", "p.jsonl", "store"]
    assert one_line(command(*bench, "/dev/full")[2], "--json /dev/full")
    # and no text before
    for name, words in (("/dev/full", "not a plain file"), (str(tmp_path / "gone" / "s"), "cannot be written")):
        code, text, error = command("x", "--store", name, "--quiet")
        assert code == 1 and not text and one_line(error, f"--store {name}", words)
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert command("x")[0] == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(OSError if isinstance(error, ValueError) else KeyboardInterrupt):
            with whole(path) as partial:
                partial.write_text("half")
                raise error
        assert path.read_text() == "old"
    with whole(link) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and link.is_symlink() and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match="not a plain file"), whole(tmp_path):
        pass


def test_what_cannot_take_the_result_is_told_before_the_work(command, tmp_path):
    (tmp_path / "p").write_text(json.dumps({"id": 1, "task": "t", "turns": ["hi"]}))
    for name in ("bench", "verify"):
        code, out, error = command(name, "--prompts", str(tmp_path / "p"), "--methods", "ar", "--json", str(tmp_path))
        assert code == 1 and not out and one_line(error, "not a plain file")


@pytest.mark.parametrize("arguments, words", [
    (("x", "--model", ""), "--model"), (("x", "--store", ""), "--store"),
    (("bench", "--prompts", "p", "--json", ""), "--json"), (("x", "--stop", "\udcff"), "--stop"),
    (("bench", "--prompts", "p", "--json", "./p"), "which is what --prompts reads"),
    (("x", "--revision", "main"), "--revision"), (("x", "--compare", "--quiet"), "--compare"),
    (("--file", "-", "--corpus", "-"), "both standard input"),
    (("verify", "--prompts", "p", "--store", "gone"), "--store"), (("x", "y\nz"), "y z")])
def test_what_cannot_be_meant_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        run.main(list(arguments))
    assert exit.value.code == 2 and one_line(capsys.readouterr().err, words)


@pytest.mark.parametrize("arguments, words", [
    (("x", "--draft-window", "9"), "--draft-window"), (("x", "--store", "nowhere/s"), "nowhere/s"),
    (("chat", "--no-chat"), "--no-chat"), (("x", "--temperature", "1e-320"), "temperature"),
    (("bench", "--methods", "graft,universal", "--draft", "d"), "two runs"), (("bench", "--methods", "ar"), "line 1")])
def test_what_cannot_be_done_is_told(arguments, words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_text('{"id": 1, "task": "t", "turns": "no list"}' if words == "line 1"
                                else '\ufeff{"id": 1, "task": "t", "turns": ["hi"]}', encoding="utf-8")
    code, out, error = command(*arguments, *(("--prompts", "p") if arguments[0] == "bench" else ()))
    assert code == 1 and not out and one_line(error, words)


@pytest.mark.parametrize("report", [
    {"environment": [1], "methods": {}}, {"methods": {"graft": {"config": {"temperature": 1.5, "budget": 3}}}},
    {"methods": {"graft": {"config": {"depth": 3}}}},
    {"methods": {"graft": {"config": {"budget": 3, "depth": "deep"}}}}])
def test_a_calibration_says_what_calibrate_says_and_no_more(report, command, tmp_path):
    (tmp_path / "c").write_text(json.dumps(report))
    code, out, error = command("x", "--calibration", str(tmp_path / "c"))
    assert code == 1 and not out and one_line(error, "calibration")


def test_a_device_that_holds_no_numbers_is_none():
    with pytest.raises(ValueError, match="--device is 'meta'"):
        run.choose_device("meta")


def test_finding_out_whether_a_file_can_be_written_leaves_none(tmp_path):
    run.writable(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("kept")
    run.writable(str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "kept"


def test_a_corpus_is_not_kept_in_the_store(command, tmp_path):
    (tmp_path / "corpus").write_text("z" * 50)
    for size in (1, 2):
        assert command("a", "--corpus", str(tmp_path / "corpus"), "--store", str(tmp_path / "s"),
                       "--max-new-tokens", "3", "--quiet")[0] == 0
        kept = load_file(tmp_path / "s")["tokens"].tolist()
        assert len(kept) < 20 * size and kept.count(-1) >= size


def test_a_store_of_other_tensors_is_refused(tmp_path):
    matrix = AdjacencyMatrix(base.VOCAB)
    for tokens in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int32)):
        save_file({"adjacency": matrix.rows, "tokens": tokens}, tmp_path / "s")
        with pytest.raises(ValueError, match="tokens has shape"):
            load_stores(tmp_path / "s", matrix, NGramIndex())


def process(folder, *arguments, **kwargs) -> subprocess.Popen:
    words = [sys.executable, str(ROOT / "run.py"), *arguments, "--model", str(folder), "--dtype", "float32"]
    # what is written may wait to the end
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(words, **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) | kwargs)


@pytest.mark.parametrize("arguments, words",
                         [(("--file", "-"), "the prompt is empty"), (("chat",), "ends the conversation")])
def test_a_closed_input_is_an_empty_one(arguments, words, folder):
    done = subprocess.run(f"exec {shlex.quote(sys.executable)} {ROOT / 'run.py'} {' '.join(arguments)} "
                          f"--model {folder} --method ar <&-", shell=True, capture_output=True, text=True, timeout=60)
    assert words in done.stderr and "Traceback" not in done.stderr and done.returncode == ("chat" not in arguments)


def test_what_chat_cannot_read_does_not_cost_the_store(folder, tmp_path):
    arguments = ("chat", "--model", str(folder), "--method", "retrieve", "--max-new-tokens", "5", "--dtype", "float32",
                 "--store", str(tmp_path / "store"))
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *arguments], input=b"one\n\xff\xfe\n",
                          capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr and load_file(tmp_path / "store")["tokens"].numel()


def test_a_reader_that_leaves_is_no_error(folder):
    reader = process(folder, "x", "--max-new-tokens", "200", "--quiet")
    assert len(reader.stdout.read(1)) == 1
    reader.stdout.close()
    assert reader.wait(60) == 0 and reader.stderr.read() == ""


def test_a_reader_that_left_before_the_end_is_no_error_and_a_full_disk_is_one(folder, tmp_path):
    (tmp_path / "p").write_text(json.dumps({"id": 1, "task": "t", "turns": ["hi"]}))
    words = "verify", "--prompts", str(tmp_path / "p"), "--methods", "retrieve", "--max-new-tokens", "2"
    reader = process(folder, *words)
    reader.stdout.close()
    assert reader.wait(60) == 0 and "Error" not in reader.stderr.read()
    with open("/dev/full", "w") as full:
        writer = process(folder, *words, stdout=full)
        assert writer.wait(60) == 1 and writer.stderr.read().splitlines()[-1].startswith("error: ")


# -------------------------------------------------------------------------------------------------------------- Ctrl-C

def struck(monkeypatch, owner, name: str, call: int) -> None:
    """Send this process the signal of Ctrl-C as `owner.name` is called for the `call`-th time."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("owner, name, call, shown", [
    (run, "load_model", 1, 0), (run.Text, "prompt", 1, 0), (model.Model, "forward", 1, 0),
    (model.Model, "forward", 4, 3), (Tree, "accept", 3, 3), (NGramIndex, "append", 6, 3), (run, "save_stores", 1, 9)])
def test_ctrl_c_keeps_the_text_so_far(owner, name, call, shown, command, tmp_path, monkeypatch):
    store = tmp_path / "store"
    arguments = "hi", "--method", "ar", "--max-new-tokens", "9", "--store", str(store), "--stop", "never there"
    code, whole_text, _ = command(*arguments)
    before = store.read_bytes()
    assert code == 0
    store.unlink()
    struck(monkeypatch, owner, name, call)
    code, text, error = command(*arguments)
    assert code == 130 and "Traceback" not in error and (not store.exists() or load_file(store)) and before
    if shown:
        assert text.strip("\n") and whole_text.startswith(text.rstrip("\n"))
    if name == "forward":
        assert f"{shown} tokens in" in error


def test_ctrl_c_in_the_comparison_compares_nothing(command, monkeypatch):
    struck(monkeypatch, model.Model, "forward", 12)
    code, text, error = command("hi", "--method", "ar", "--max-new-tokens", "9", "--compare")
    assert code == 130 and text.strip() and "plain decoding" not in error


def test_ctrl_c_in_bench_leaves_what_is_finished(command, tmp_path, monkeypatch):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    prompts.write_text("\n".join(json.dumps({"id": i, "task": "t", "turns": ["hi"]}) for i in range(3)))
    bench = "bench", "--prompts", str(prompts), "--methods", "ar", "--max-new-tokens", "9", "--json", str(out)
    for call, finished in ((2, 0), (8 + 9 + 4, 1)):                                   # warming up; in the second prompt
        with monkeypatch.context() as patch:
            struck(patch, model.Model, "forward", call)
            assert command(*bench)[0] == 130
        partial = tmp_path / "out.json.partial"
        assert (len(partial.read_text().splitlines()) if partial.exists() else 1) == 1 + finished
    assert command(*bench)[0] == 0 and json.loads(out.read_text())["prompts"] == 3 and not partial.exists()


def test_ctrl_c_in_chat_ends_the_answer_then_the_conversation(folder, monkeypatch, capsys):
    lines = iter(["one", "\udcff", "two", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    struck(monkeypatch, model.Model, "forward", 3)
    assert run.main(["chat", "--model", str(folder), "--method", "ar", "--max-new-tokens", "5",
                     "--dtype", "float32"]) == 0
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()[1:]] == \
        ["2 tokens", "error: the prompt holds bytes or surrogates that are no text; expected UTF-8", "5 tokens"]


def test_a_signal_while_importing_or_decoding_ends_a_process_cleanly(folder):
    early, late = process(folder, "x"), process(folder, "x", "--max-new-tokens", "240", "--show-tree")
    time.sleep(0.5)
    early.send_signal(signal.SIGINT)
    late.stdout.read(50)
    late.send_signal(signal.SIGINT)
    assert early.wait(60) in (-signal.SIGINT, 130) and "Traceback" not in early.stderr.read()
    _, error = late.communicate(timeout=60)
    assert late.returncode == 130 and "Traceback" not in error


# ----------------------------------------------------------------------------------------------------- the model cache

def gguf(path: Path) -> Path:
    """A tiny Llama as a GGUF file, laid out like the wheel's."""
    from gguf import GGUFWriter
    writer = GGUFWriter(path, "llama")
    for field, value in dict(head_count=2, head_count_kv=1, embedding_length=8, feed_forward_length=8, block_count=1,
                             context_length=64).items():
        getattr(writer, f"add_{field}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([chr(97 + i) for i in range(26)])
    writer.add_token_types([3, 3] + [1] * 24)
    writer.add_token_merges(["c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("x")
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_gate": (8, 8),
              "ffn_up": (8, 8), "ffn_down": (8, 8), "attn_norm": (8,), "ffn_norm": (8,)}
    shapes = ({f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
              | {"token_embd.weight": (26, 8), "output_norm.weight": (8,)})
    for name, shape in shapes.items():
        writer.add_tensor(name, numpy.ones(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FILL = """
import sys, time, pathlib
sys.path.insert(0, sys.argv[1])
import demo_model
demo_model._from_wheel = lambda folder: pathlib.Path(sys.argv[2])     # the download alone is left out
convert, meeting = demo_model.convert, pathlib.Path(sys.argv[3])
def together(*args):
    convert(*args)
    (meeting / sys.argv[4]).touch()
    while len(list(meeting.iterdir())) < 2:                           # neither moves its folder in before both have one
        time.sleep(0.01)
demo_model.convert = together
print(demo_model.demo_model(lambda words: None))
"""


def test_two_processes_fill_the_cache_at_once(tmp_path):
    cache, meeting, source = tmp_path / "cache", tmp_path / "meeting", gguf(tmp_path / "tiny.gguf")
    meeting.mkdir()
    environment = os.environ | {"GRAFT_CACHE": str(cache), "GRAFT_DEMO_FROM_WHEEL": "1"}
    words = [sys.executable, "-c", FILL, str(ROOT / "tools"), str(source), str(meeting)]
    both = [subprocess.Popen([*words, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for name in "ab"]
    for one in both:
        out, error = one.communicate(timeout=120)
        assert one.returncode == 0 and out.strip() == str(cache / "smollm2-135m-instruct"), error
    assert [p.name for p in cache.iterdir()] == ["smollm2-135m-instruct"]
    assert model.load_model(cache / "smollm2-135m-instruct").config.vocab_size == 26


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    source, blocked = gguf(tmp_path / "tiny.gguf"), tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("GRAFT_DEMO_FROM_WHEEL", "1")
    monkeypatch.setattr(demo_model, "_from_wheel", lambda folder: source)
    for cache, size in ((blocked, 1 << 30), (tmp_path / "full", 500)):                  # no folder; a full disk
        monkeypatch.setenv("GRAFT_CACHE", str(cache))
        with limited(resource.RLIMIT_FSIZE, size), pytest.raises(ValueError, match=f"{cache}: .*GRAFT_CACHE"):
            demo_model.demo_model(lambda words: None)
    assert not list((tmp_path / "full").iterdir())


# ----------------------------------------------------------------------------------------------------------- endurance

def test_fuzzing_finds_nothing_here_and_a_fault_where_there_is_one(monkeypatch):
    assert endurance.fuzz(0.03, seed=0, say=lambda words: None) > 20
    for name, fault in (("accept", lambda tree, picks: [0]), ("within", lambda tree, depth: tree),
                        ("graft", lambda tree, branches, budget: 0),
                        ("top", lambda tree, k: tree.select(list(range(min(k, len(tree) - 1) + 1))))):
        with monkeypatch.context() as patch:
            patch.setattr(Tree, name, fault)
            with pytest.raises(AssertionError, match="repeat it: .*--seed"):
                endurance.fuzz(0.05, seed=0, say=lambda words: None)


def test_long_generation_is_bounded_and_a_leak_is_found(monkeypatch):
    config = GraftConfig(max_new_tokens=40, budget=8, eos_token_ids=())
    prompts = [[i % base.VOCAB for i in range(n)] for n in (3, 20, 9)]
    new_state = lambda: State(base.MODEL, EagleDrafter(base.HEAD), AdjacencyMatrix(base.VOCAB), NGramIndex(200))
    assert endurance.generate(base.MODEL, new_state(), config, prompts, 300, 48, lambda words: None) >= 300
    leak, append = [], NGramIndex.append
    monkeypatch.setattr(NGramIndex, "append", lambda self, tokens:
                        leak.append(bytearray(b"x" * 2**21)) or append(self, tokens))
    with pytest.raises(AssertionError, match="memory grew"):
        endurance.generate(base.MODEL, new_state(), config, prompts, 400, 8, lambda words: None)
    monkeypatch.setattr(NGramIndex, "append", lambda self, tokens: self.tokens.extend(tokens))
    with pytest.raises(AssertionError, match="n-gram index"):
        endurance.generate(base.MODEL, new_state(), replace(config, method="eagle"), prompts, 400, 999,
                           lambda words: None)


def test_one_append_beyond_the_capacity_stays_within_it():
    index = NGramIndex(capacity=100)
    peak = []
    index.after = type("Watched", (dict,), {"setdefault": lambda self, *args:
                                            peak.append(len(self)) or dict.setdefault(self, *args)})()
    index.append(list(range(5000)))
    assert index.tokens == list(range(4900, 5000)) and max(peak) <= 100
