"""Graft on the command line. This file only talks to people; graft.py does the work.

    python run.py "Why is the sky blue?"                 answer on the demo model
    python run.py chat                                   a conversation; caches and stores carry over
    python run.py bench --prompts FILE.jsonl --json OUT  methods side by side, prompt by prompt
    python run.py verify --prompts FILE.jsonl            is a method's output that of plain decoding?
"""

import argparse
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C before `main` just ends the process: no traceback from an import
    signalled = signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()      # until all is loaded: its passes over what importing torch makes take a tenth of a start

import torch  # noqa: E402

sys.path += [str(Path(__file__).resolve().parent / folder) for folder in ("tools", "variants")]
from demo_model import at_least, command_line, demo_model  # noqa: E402
from graft import (METHODS, EagleDrafter, GraftConfig, ModelDrafter, Sampler, Sequence, State, Stats,  # noqa: E402
                   measure_cost, run_rounds, tune)
from kernels import compiler, instructions, kernels, products  # noqa: E402
from model import CheckpointError, Model, fetch_checkpoint, load_draft, load_model, read_json  # noqa: E402
from render_template import render_template  # noqa: E402
from retrieval import AdjacencyMatrix, NGramIndex, load_stores, save_stores, whole  # noqa: E402
from tree import TARGET, Tree  # noqa: E402

DEMO_HEAD = Path(__file__).resolve().parent / "assets" / "smollm2-135m-eagle3"
DEMO_STORE = DEMO_HEAD.parent / "smollm2-135m-store.safetensors"   # tools/warm_store.py
CALIBRATION = DEMO_HEAD.parent / "calibration"                     # tools/calibrate.py
CALIBRATED = {"budget", "depth", "draft_top_k", "checkpoints", "thresholds", "retained", "trust",
              "adjacency", "verify_cost"}  # the fields that it chooses
# nodes below the root where nodes have no price; a CPU pays for each, a large GPU hardly
CPU_BUDGET, GPU_BUDGET = 15, 60
# tokens of a prompt a forward, on a GPU, which waits for the launches of 512 longer than for their work
GPU_CHUNK = 2048
PAPER = dict(budget=60, depth=7, draft_top_k=10, verify_cost=())   # EAGLE-3's defaults, on which the paper builds
ABLATIONS = {                        # what bench runs besides the methods: the method, and what it changes
    "eagle_60": ("eagle", PAPER),
    "graft_60": ("graft", PAPER | {name: getattr(GraftConfig, name)
                                   for name in ("checkpoints", "thresholds", "retained", "trust", "adjacency")}),
    "graft_at_root": ("graft", dict(graft_anchors=0)),       # pruned; METHODS' graft_root is not
    "graft_adjacency": ("graft", dict(adjacency=True)),      # where calibration leaves it out
    "graft_no_adjacency": ("graft", dict(adjacency=False)),
    "graft_not_leaning": ("graft", dict(lean=False)),
    "graft_unmerged": ("graft", dict(merge=False)),
    "graft_no_ngrams": ("graft", dict(ngrams=False, adjacency=True)),
}
VARIANTS = {                         # methods of the neighbours, each with its file in variants/
    "depth_pruned": "depth_pruned", "depth_pruned_graft": "depth_pruned",
    "layerskip": "layerskip", "layerskip_graft": "layerskip",
    "universal": "universal", "universal_graft": "universal",
    "via_sd": "via_sd",
    "dflash": "dflash", "dflash_graft_tail": "dflash", "dflash_graft": "dflash",
}
# variants that load --draft themselves
OWN_DRAFT = {name for name, module in VARIANTS.items() if module in ("universal", "dflash")}
EVERY = [*METHODS, *ABLATIONS, *VARIANTS]
# gap of two float32 logits that rounding in this dtype can close
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


def say(*words, end="\n") -> None:
    print(*words, end=end, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- text

class Text:
    """Tokenizer and chat template of a checkpoint folder. What a user writes never becomes a control
    token unless asked."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer
        self.folder = folder = Path(folder)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'}: not a usable tokenizer "
                             f"({str(error).splitlines()[0]:.120})") from None
        self.tokenizer.encode_special_tokens = True       # control tokens in plain text are plain text
        added = self.tokenizer.get_added_tokens_decoder()
        self.control = {token.content: i for i, token in added.items() if token.special}
        longest_first = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True)))
        self.splitter = re.compile(f"({longest_first})") if self.control else None
        path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(path) if path.exists() else {}
        template = config.get("chat_template")
        if isinstance(template, list):                    # several named ones: the default
            template = next((t.get("template") for t in template
                             if isinstance(t, dict) and t.get("name") == "default"), None)
        self.template = read_text(str(own), "chat template") if own.exists() else template
        tokens = {name: config.get(name) for name in ("bos_token", "eos_token")}
        self.names = {name: (token.get("content") if isinstance(token, dict) else token) or ""
                      for name, token in tokens.items()}
        for name, value in {"chat_template": self.template or "", **self.names}.items():
            if not isinstance(value, str):
                raise ValueError(f"{path}: field '{name}' is {value!r:.80}; expected text")

    def check(self, model: Model) -> None:
        """Raise CheckpointError unless the model knows every token."""
        if (size := self.tokenizer.get_vocab_size()) > model.config.vocab_size:
            raise CheckpointError(f"{self.folder}: the tokenizer has {size} tokens, "
                                  f"the model {model.config.vocab_size}: they do not belong together")

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """begin: with the tokens that the tokenizer puts around a whole text, such as Llama's first."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=begin).ids
        except TypeError:
            raise ValueError("the text holds bytes or surrogates that are no text; expected UTF-8") from None

    def encode_control(self, text: str, mark: str = "") -> list[int]:
        """As `encode`, but control tokens count, except where `mark` stands inside them; every `mark` is taken out."""
        pieces = self.splitter.split(text) if self.splitter else [text]
        ids = []
        for piece in pieces:
            ids += ([self.control[piece]] if piece in self.control else
                    self.encode(piece.replace(mark, "") if mark else piece))
        return ids

    def render(self, messages: list[dict]) -> str:
        """The chat template's text, ready for the assistant's turn; raises ValueError where the template misbehaves."""
        return render_template(self.template, messages, self.names)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation. Control tokens come from the template alone: those a message spells are
        broken by a mark."""
        written = "".join(message["content"] for message in messages)
        mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in written)
        shield = lambda text: self.splitter.sub(lambda m: m[0][0] + mark + m[0][1:], text) if self.splitter else text
        return self.encode_control(self.render([m | {"content": shield(m["content"])} for m in messages]), mark)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Stream:
    """Turns tokens into text as they come, holding back half characters and what may be the start of a stop string."""

    def __init__(self, text: Text, stops: list[str]):
        self.text, self.stops, self.ids, self.shown, self.window = text, stops, [], 0, 0
        self.done, self.pending = "", ""

    def push(self, ids: list[int], last: bool = False) -> str:
        """New printable text."""
        self.ids += ids
        fresh = self.text.decode(self.ids[self.window:])
        if fresh.endswith("\ufffd") and not last:
            return ""
        before = self.text.decode(self.ids[self.window:self.shown])
        self.pending += fresh[len(before):]
        # decode the next piece behind this one: spaces come out right
        self.window, self.shown = self.shown, len(self.ids)
        for stop in self.stops:  # none begins in what was shown: as much is held back
            if (found := self.pending.find(stop)) >= 0:
                self.pending, last = self.pending[:found], True
        held = 0 if last else max((len(stop) - 1 for stop in self.stops), default=0)
        cut = max(0, len(self.pending) - held)
        out, self.pending = self.pending[:cut], self.pending[cut:]
        self.done += out
        return out


def stop_check(text: Text, stops: list[str]):
    """The predicate `generate` asks after every token: does the text now hold a stop string? A token is
    a byte at least."""
    if not stops:
        return None
    reach = max(len(stop.encode()) for stop in stops) + 8
    return lambda output: any(stop in text.decode(output[-reach:]) for stop in stops)


# ------------------------------------------------------------------------------------------------------------- set-up

@dataclass
class Plan:
    """How a method runs: its settings, what drafts for it (a fresh one for each text), its own `verify` if it has one,
    and whether its output may differ from plain decoding."""

    config: GraftConfig
    new_drafter: Callable = lambda: None
    verify: Callable | None = None
    lossy: bool = False


@dataclass
class Setup:
    """A loaded target with all that a command needs to generate."""

    model: Model
    head: object              # what --draft names: an EAGLE-3 head or a smaller Model
    text: Text
    method: str               # the one asked for
    base: GraftConfig         # before calibration
    chat: bool
    system: str | None
    corpus: list[int]
    tuned: dict               # by method, what tools/calibrate.py chose for this device, or `tune`
    folder: Path              # the target's checkpoint
    window: int | None        # of the draft head
    store: Path | None        # --store: read if it is there, written at the end of an answer or a conversation
    warm: Path | None         # the demo model's own start
    draft: str | None = None  # --draft, for variants that load their own

    def state(self, plan: Plan | None = None) -> State:
        ngrams = NGramIndex()
        adjacency = AdjacencyMatrix(self.model.config.vocab_size)
        ngrams.append(self.corpus)
        start = self.store if self.store and self.store.exists() else self.warm
        if start:
            load_stores(start, adjacency, ngrams)
        return State(self.model, (plan or self.plan("graft" if self.head else "retrieve")).new_drafter(),
                     adjacency, ngrams)

    def keep(self, state: State) -> None:
        """Write --store; what comes from --corpus is read anew each time."""
        if self.store:
            count = len(self.corpus)
            save_stores(self.store, state.adjacency, state.ngrams,
                        count if state.ngrams.tokens[:count] == self.corpus else 0)

    def plan(self, method: str) -> Plan:
        """Of a method, an ablation or a variant. A variant's file has `prepare(setup, method)`,
        which returns a Plan's fields."""
        if method in VARIANTS:
            return Plan(*importlib.import_module(VARIANTS[method]).prepare(self, method))
        config = self.configure(method)
        if METHODS[config.method].draft and not self.head:
            raise ValueError(f"method '{method}' needs a draft head; give --draft")
        if not METHODS[config.method].draft:  # a drafter that reads nothing would have a conversation read again
            return Plan(config)
        if isinstance(self.head, Model):
            return Plan(config, lambda: ModelDrafter(self.head))
        return Plan(config, lambda: EagleDrafter(self.head, self.window))

    def configure(self, method: str) -> GraftConfig:
        """The configuration of a method or an ablation, with what was calibrated for this device."""
        method, changes = ABLATIONS.get(method, (method, {}))
        like = ("eagle" if METHODS[method].draft and not METHODS[method].prune else
                "graft" if method.startswith("graft") else method)
        tuned = self.tuned.get(like, {})
        if METHODS[method].draft and "graft" in self.tuned:          # ablations of graft use the matrix if it does
            tuned = tuned | {"adjacency": self.tuned["graft"].get("adjacency", True)}
        return replace(self.base, **{"method": method} | tuned | changes)

    @property
    def tie(self) -> float:
        return NEAR_TIE.get(self.model.precision, 1e-9)

    def exact(self) -> Model:
        """The target in float32 at least, as the judge of near ties."""
        good = self.model.dtype in (torch.float32, torch.float64)
        return self.model if good else load_model(self.folder, dtype=torch.float32, device=self.model.device)

    def ask(self, words: str) -> list[int]:
        """The prompt of a conversation's first turn."""
        return self.ids([{"role": "user", "content": words}])

    def ids(self, messages: list[dict]) -> list[int]:
        if not self.chat:
            return self.text.encode(messages[-1]["content"], begin=True)
        return self.text.prompt(
            ([{"role": "system", "content": self.system}] if self.system is not None else []) + messages)


def choose_device(name: str | None) -> torch.device:
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()           # there is a device named meta, which holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, which does not work here: {str(error).splitlines()[0]:.100}; "
                         "try cpu or cuda") from None
    return device


def multiplies_bfloat16() -> bool:
    """Whether this CPU does. oneDNN says yes wherever it can imitate it, at half the speed of float32 or less: on x86
    ask the hardware."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Unless named: bfloat16 wherever the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type != "cpu" or multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def flag(name: str, value: bool | None) -> list[str]:
    """What says so on a command line: nothing where nothing was said."""
    return [] if value is None else [f"--{'' if value else 'no-'}{name}"]


def choose_products(asked: bool | None, device: torch.device, dtype: torch.dtype) -> Callable | None:
    """What makes compiled products on a CPU: where they are asked for, and, where nothing was said, on the processors
    that they were measured on, if there is a compiler, and not in bfloat16 where it would be imitated. Raises
    ValueError where they are asked for and cannot be had."""
    measured = (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
                and (dtype == torch.float32 or dtype == torch.bfloat16 and multiplies_bfloat16()))
    if device.type != "cpu" or not (measured and shutil.which(compiler()[0]) if asked is None else asked):
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError("--compile is, on a CPU, for float32 and bfloat16; --dtype is "
                         f"{str(dtype).removeprefix('torch.')}")
    try:
        return products()
    except (ValueError, OSError) as error:
        if asked:
            raise
        say(f"{error}; going on without")


def set_up(args, calibrated: bool = True) -> Setup:
    """calibrated: with the settings of tools/calibrate.py, or what stands in for them."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    compiled = choose_products(args.compile, device, dtype)
    folder = fetch_checkpoint(args.model, args.revision) if args.model else demo_model(say)
    text = Text(folder)
    if args.compile and (device.type not in ("cpu", "cuda") or args.no_graphs):
        raise ValueError("--compile is for a CPU, or for a GPU with graphs; leave it out")
    model = load_model(folder, dtype=dtype, device=device, products=compiled)
    model.graphs, model.compiled = False if args.no_graphs else None, bool(args.compile)  # what drafts for it follows
    if args.compile and device.type == "cuda":
        say("Compiling as forwards come: half a minute, less once torch has kept some of it ...")
    text.check(model)
    own = OWN_DRAFT & asked(args)
    others = {name for name in asked(args) - own
              if METHODS.get(ABLATIONS.get(name, (name,))[0], METHODS["graft"]).draft}
    if args.draft and own and others:
        raise ValueError(f"--draft is {args.draft}, which cannot be for both {','.join(sorted(own))} "
                         f"and {','.join(sorted(others))}; compare them in two runs")
    draft = not own and args.draft or (str(DEMO_HEAD) if not args.model and DEMO_HEAD.is_dir() else None)
    head = load_draft(fetch_checkpoint(draft), model) if draft else None
    for network in (model, head) if model.products else ():
        if network:
            network.kernels = kernels(network)
    if args.compile and model.products and not model.kernels:
        raise ValueError(f"{folder}: --compile takes, on a CPU, dense models whose matrices bfloat16 holds, "
                         "in sizes that are multiples of 32; leave it out")
    if args.draft_window and not head:
        raise ValueError(f"--draft-window is {args.draft_window}, and there is no draft head; "
                         "give --draft, or leave it out")
    if isinstance(head, Model) and args.draft_window:
        raise ValueError(f"--draft-window is {args.draft_window}, but --draft names a model, "
                         "which reads all of the text; leave it out")
    method = getattr(args, "method", None) or ("graft" if head else "retrieve")
    chat = text.template is not None if args.chat is None else args.chat
    if chat and text.template is None:
        raise ValueError(f"{folder}: the checkpoint has no chat template; use --no-chat")
    if args.system is not None and not chat:
        raise ValueError("--system needs a chat template; leave it out with --no-chat")
    corpus = text.encode(read_text(args.corpus, "--corpus")) + [-1] if args.corpus else []
    config = GraftConfig(max_new_tokens=args.max_new_tokens, seed=args.seed, temperature=args.temperature,
                         top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
                         repetition_penalty=args.repetition_penalty,
                         budget=args.budget or (CPU_BUDGET if device.type == "cpu" else GPU_BUDGET),
                         prefill_chunk=GraftConfig.prefill_chunk if device.type == "cpu" else GPU_CHUNK)
    tuned = settings(args, model) if calibrated else {}
    for fields in tuned.values() if args.budget else ():
        fields["budget"], prices = args.budget, fields.pop("verify_cost", ())
        if len(prices) > args.budget:
            fields["verify_cost"] = prices[:args.budget + 1]
        elif prices:                            # a larger budget than was priced: the paper's stages share it out
            for name in ("checkpoints", "thresholds", "retained", "trust", "adjacency"):
                fields.pop(name, None)
    warm = DEMO_STORE if not args.model and not args.cold and DEMO_STORE.exists() else None
    if not gc.isenabled():                      # see above; what is loaded needs no pass later either
        gc.freeze()
        gc.enable()
    return Setup(model, head, text, method, config, chat, args.system, corpus, tuned, folder, args.draft_window,
                 Path(args.store) if args.store else None, warm, args.draft)


def calibration(model: Model, checkpoint: str | None = None) -> Path:
    """Where the settings are kept that were calibrated for a checkpoint; None: the demo model. With compiled products
    nodes are cheaper, by what the CPU can."""
    name = Path(checkpoint).name if checkpoint else "smollm2-135m-instruct"
    kind = instructions(model.dtype) if model.products else model.precision
    return CALIBRATION / f"{name}-{model.device.type}-{kind}.json"


def asked(args) -> set[str]:
    """The methods that are named."""
    return {*(getattr(args, "methods", None) or getattr(args, "method", None) or "").split(",")}


def settings(args, model: Model) -> dict:
    """By method, fields of GraftConfig: from --calibration, or the demo model's own for this device. On a CPU for which
    there are none, or with other threads, the prices of what is asked for are measured now."""
    path = Path(args.calibration) if args.calibration else calibration(model) if not args.model else None
    if not args.calibration and (path is None or not path.exists()):
        priced = asked(args) - {name for name, method in METHODS.items() if not method.prune}
        fields = tune(model) if model.device.type == "cpu" and priced else {}
        return {name: dict(fields) for name in ("retrieve", "prune", "graft") if fields}
    tuned, machine = read_calibration(path)
    priced = [fields for fields in tuned.values() if "verify_cost" in fields]
    if (priced and not args.calibration and model.device.type == "cpu"
            and machine != (processor(), torch.get_num_threads())):
        cost = measure_cost(model, max(fields["budget"] for fields in priced))
        for fields in priced:
            fields["verify_cost"] = tuple(fields["verify_cost"][0] * each / cost[0]
                                          for each in cost[:fields["budget"] + 1])
    return tuned


def read_calibration(path: Path) -> tuple[dict, tuple]:
    """By method, the fields of GraftConfig that tools/calibrate.py chose; and for which processor and threads."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        methods, machine = report["methods"], report.get("environment") or {}
        machine = machine.get("device"), machine.get("threads")
        tuned = {name: {k: tuple(v) if isinstance(v, list) else v for k, v in entry["config"].items()}
                 for name, entry in methods.items() if "config" in entry}
        for fields in tuned.values():
            if set(fields) - CALIBRATED or "budget" not in fields:
                raise ValueError(f"fields are {', '.join(fields)}; "
                                 f"expected budget and some of {', '.join(sorted(CALIBRATED))}")
            GraftConfig(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"calibration {path}: not a file that tools/calibrate.py wrote ({error})") from None
    return tuned, machine


def read_text(path: str, what: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def check_text(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt holds bytes or surrogates that are no text; expected UTF-8") from None
    if not prompt:
        raise ValueError("the prompt is empty; expected some text")
    return prompt


# ----------------------------------------------------------------------------------------------------- the tree, drawn

COLOURS = {"root": "1", "draft": "36", "ngram": "33", "adjacency": "35"}


def draw_tree(tree: Tree, path: list[int], text: Text, colour: bool) -> str:
    """One line a node: its token, its source and its estimated probability; the accepted path is
    marked with a bullet."""
    def paint(code, words):
        return f"\033[{code}m{words}\033[0m" if colour else words

    children = {}
    for node in range(1, len(tree)):
        children.setdefault(tree.parents[node], []).append(node)
    taken, lines = set(path), []
    stack = [(0, "", "")]
    while stack:
        node, lead, below = stack.pop()
        token = json.dumps(text.tokenizer.decode([tree.tokens[node]], skip_special_tokens=False), ensure_ascii=False)
        label = paint(COLOURS[tree.sources[node]] + (";1" if node in taken else ""), token)
        note = "" if node == 0 else f"  {tree.sources[node]} {math.exp(tree.scores[node]):.2f}"
        lines.append(lead + ("● " if node in taken else "○ ") + label + paint("2", note))
        kids = sorted(children.get(node, []), key=lambda kid: (kid not in taken, -tree.scores[kid]))
        for i, kid in reversed(list(enumerate(kids))):
            last = i == len(kids) - 1
            stack.append((kid, below + ("└─" if last else "├─"), below + ("  " if last else "│ ")))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- commands

def show_reading(read: int, total: int) -> None:
    """On a terminal, a bar while a long prompt is read; gone when it is."""
    if total >= 1024 and sys.stderr.isatty():
        bar = f"reading the prompt [{'#' * (20 * read // total):<20}] {read:,} of {total:,} tokens"
        say("\r" + (bar if read < total else "\033[K"), end="")


def answer(setup: Setup, plan: Plan, ids: list[int], state: State, args,
           show=None) -> tuple[list[int], str, Stats, float]:
    """Generate, stream the text to `show`, and return tokens, text, statistics and seconds.
    Ctrl-C keeps what is there."""
    start, stream = time.perf_counter(), Stream(setup.text, args.stop)
    sequence = Sequence(setup.model, ids, plan.config, state, stop_check(setup.text, args.stop), show_reading)
    stats, emit = sequence.stats, show if show and not args.show_tree else lambda piece: None
    try:
        for number, (_, step) in enumerate(run_rounds(setup.model, [sequence], plan.verify)):
            if args.show_tree and show and step.tree:
                colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
                own = json.dumps(setup.text.tokenizer.decode(step.tokens[-1:], skip_special_tokens=False),
                                 ensure_ascii=False)
                print(f"\nround {number}: {len(step.tree) - 1} nodes, {len(step.path) - 1} accepted"
                      + (f", then the target's own {own}" if step.sources[-1] == TARGET else ""))
                print(draw_tree(step.tree, step.path, setup.text, colour), flush=True)
            emit(stream.push(step.tokens, bool(stats.finish)))
    except KeyboardInterrupt:
        stats.finish = "interrupted"
        emit(stream.push(sequence.output[len(stream.ids):], True))   # committed, or held back
    return sequence.output, stream.done, stats, time.perf_counter() - start


def summary(setup: Setup, method: str, stats: Stats, seconds: float) -> str:
    model = setup.model
    return (f"{stats.tokens} tokens in {seconds:.2f} s, {stats.tokens / seconds:.1f} tokens/s, "
            f"{stats.mean_accepted:.2f} tokens a round ({method}, {model.precision}, {model.device.type})")


def command_generate(args) -> int:
    if args.prompt is None and args.file is None:
        raise ValueError("no prompt; give one in quotes, or --file FILE (- for standard input)")
    if args.prompt is not None and args.file is not None:
        raise ValueError("a prompt and --file were both given; expected one of them")
    prompt = check_text(args.prompt if args.prompt is not None else read_text(args.file, "--file"))
    writable(args.store, "--store")
    setup = set_up(args)
    ids = setup.ask(prompt)
    plan = setup.plan(setup.method)
    state = setup.state(plan)
    show = None if args.json else lambda piece: print(piece, end="", flush=True)
    output, text, stats, seconds = answer(setup, plan, ids, state, args, show)
    if args.json:
        report = {"text": text, "tokens": output, "seconds": seconds, "config": asdict(plan.config),
                  "statistics": vars(stats) | {"mean_accepted": stats.mean_accepted}}
    else:
        print("\n\n" + text if args.show_tree else "")
    line = summary(setup, setup.method, stats, seconds)
    if args.compare and stats.finish != "interrupted":
        plain = setup.plan("ar")
        expected, _, last, slow = answer(setup, plain, ids, setup.state(plain), args)
        if last.finish == "interrupted":
            stats.finish = "interrupted"
        else:
            ratio, same = stats.tokens / seconds / (len(expected) / slow), expected == output
            reason = "lossy method" if plan.lossy else "rounding: see README"
            line += f"; {ratio:.2f}x plain decoding, output {'identical' if same else f'differs ({reason})'}"
            if args.json:
                report |= {"speedup": ratio, "identical": same}
    if args.json:
        print(json.dumps(report, ensure_ascii=False), flush=True)
    elif not args.quiet:
        say(line)
    setup.keep(state)
    return 130 if stats.finish == "interrupted" else 0


def command_chat(args) -> int:
    if args.chat is False:
        raise ValueError("chat needs the chat template; leave out --no-chat")
    writable(args.store, "--store")
    setup = set_up(args)
    if not setup.chat:
        raise ValueError("chat needs a checkpoint with a chat template")
    plan = setup.plan(setup.method)
    state, messages = setup.state(plan), []
    if not args.quiet:
        say("An empty line or Ctrl-D ends the conversation; /reset starts a new one.")
    try:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                line = ""
            if not line:
                return 0
            if line == "/reset":
                messages = []
                continue
            turn = {"role": "user", "content": line}
            try:
                check_text(line)
                ids = setup.ids([*messages, turn])
                _, text, stats, seconds = answer(setup, plan, ids, state, args,
                                                 lambda piece: print(piece, end="", flush=True))
            except ValueError as error:
                say(f"error: {' '.join(str(error).split())}")
                continue
            messages += [turn, {"role": "assistant", "content": text}]
            print("\n\n" + text if args.show_tree else "")
            if not args.quiet:
                say(summary(setup, setup.method, stats, seconds))
    finally:
        setup.keep(state)


# -------------------------------------------------------------------------------------------------------------- bench

def read_prompts(path: str, per_task: int | None) -> list[dict]:
    prompts, counts = [], {}
    # splitlines would cut inside JSON's strings too
    for number, line in enumerate(read_text(path, "--prompts").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            first, *_ = entry["turns"] if isinstance(entry["turns"], list) else ()
            entry = {"id": str(entry["id"]), "task": str(entry["task"]), "text": check_text(first)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}, line {number}: expected an object with 'id', 'task' and 'turns' "
                             "(a list of texts)") from None
        counts[entry["task"]] = counts.get(entry["task"], 0) + 1
        if per_task is None or counts[entry["task"]] <= per_task:
            prompts.append(entry)
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def processor() -> str:
    """The CPU's name."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                     if line.startswith("model name")), name)
    return name


def environment(setup: Setup) -> dict:
    device = setup.model.device
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(), "kind": device.type,
            "dtype": setup.model.precision, "compiled": bool(setup.model.kernels or setup.model.compiled),
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "seed": setup.base.seed}


def quartiles(ratios: list[float]) -> list[float]:
    """The three cuts, rounded; of one value, itself."""
    return [round(cut, 3) for cut in (statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3)]


def total(runs: list[dict], plain: list[dict] | None) -> dict:
    """Sums over prompts; speedup is of tokens a second over `ar` in this run, with the prompts'
    median and quartiles."""
    tokens, seconds = sum(r["tokens"] for r in runs), sum(r["seconds"] for r in runs)
    decoding = seconds - sum(r["steps"].get("prefill", 0) for r in runs)
    rounds = sum(r["rounds"] for r in runs)
    out = {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 2),
           "decode_tokens_per_second": round((tokens - len(runs)) / max(decoding, 1e-9), 2),
           "mean_accepted": round((tokens - len(runs)) / max(rounds, 1), 3)}
    if runs[0]["peak_megabytes"] is not None:
        out["peak_megabytes"] = round(max(r["peak_megabytes"] for r in runs))
    if plain:
        slow = total(plain, None)
        ratios = sorted(r["tokens"] / r["seconds"] / (p["tokens"] / p["seconds"]) for r, p in zip(runs, plain))
        out |= {"speedup": round(out["tokens_per_second"] / slow["tokens_per_second"], 3),
                "decode_speedup": round(
                    out["decode_tokens_per_second"] / max(slow["decode_tokens_per_second"], 1e-9), 3),
                "prompt_speedup_quartiles": quartiles(ratios)}
    return out


def divergence(exact: Model, config: GraftConfig, prompt: list[int], plain: list[int], other: list[int],
               tie: float) -> dict:
    """How two outputs compare: identical; near_tie, where a float32 forward over the common prefix leaves each of the
    two tokens within `tie` (in logits) of being the pick; or different."""
    at = next((i for i, (x, y) in enumerate(zip(plain, other)) if x != y), None)
    if at is None:
        return {"kind": "identical" if plain == other else "different", "at": min(len(plain), len(other))}
    prefix = prompt + plain[:at]
    cache = exact.new_cache(len(prefix))
    with torch.inference_mode():
        for tokens in torch.tensor([prefix], device=exact.device).split(config.prefill_chunk, dim=1):
            count = tokens.shape[1]
            logits = exact(tokens, torch.arange(cache.length, cache.length + count, device=exact.device)[None],
                           cache, last_only=True)[0][0]
            cache.commit(list(range(count)))
    # cut: as the sampler scores them; whole: so that a token which rounding pushed over an edge has a score too
    scores = {}
    for name, rules in (("cut", config), ("whole", replace(config, top_k=0, top_p=1.0, min_p=0.0))):
        sampler = Sampler(rules, exact.config.vocab_size, exact.device)
        sampler.read(prefix)
        scores[name] = sampler.scores(logits, Tree.rooted(prefix[-1]))[0].cpu()
    scale, noise = (config.temperature, sampler.row(0)) if config.temperature else (1.0, 0.0)
    edge = (scores["whole"] - noise)[scores["cut"] > -torch.inf].min()  # the least likely token that was not cut off
    close = lambda token: max(scores["cut"].max() - scores["whole"][token],
                              edge - (scores["whole"] - noise)[token]) * scale <= tie
    pair = {"plain": plain[at], "other": other[at]}
    return {"kind": "near_tie" if all(map(close, pair.values())) else "different", "at": at, "tokens": pair,
            "float32_logits": {name: round(float(logits[0, token]), 4) for name, token in pair.items()}}


def agreement(plain: list[list[int]], other: list[list[int]]) -> dict:
    """Of a lossy method: the shares of tokens before an output's first difference, and of those that are the same in
    the same place."""
    same, count = ([[x == y for x, y in zip(*pair)] for pair in zip(plain, other)],
                   sum(max(map(len, pair)) for pair in zip(plain, other)))
    return {"before_first_difference": round(sum([*row, False].index(False) for row in same) / count, 4),
            "by_position": round(sum(map(sum, same)) / count, 4)}


def finished(partial: Path, key: str, batch_size: int) -> list[dict]:
    """The prompts that an interrupted run of the same benchmark has finished, in whole batches; leaves a file that
    holds no others."""
    lines = partial.read_text(encoding="utf-8", errors="replace").split("\n") if partial.exists() else []
    if lines and not re.fullmatch("[0-9a-f]{64}", lines[0]):
        raise ValueError(f"{partial}: is in the way; expected no file, or what an interrupted bench left")
    entire = lines[1:-1] if lines[:1] == [key] else []  # behind the last newline: nothing, or half a line
    entire = entire[:len(entire) // batch_size * batch_size]
    with whole(partial) as file:
        file.write_text("".join(line + "\n" for line in [key, *entire]), encoding="utf-8")
    return [json.loads(line) for line in entire]


def peak_memory(device: torch.device, reset: bool = False) -> float | None:
    """Most megabytes held since the last reset: of the GPU's allocator, or resident (Linux; None elsewhere)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return None


def complete(setup: Setup, plan: Plan, batch: list[list[int]], args) -> list[tuple[list[int], Stats, float]]:
    """Tokens, statistics and share of the seconds of prompts that are continued side by side."""
    states, stopped = [setup.state(plan) for _ in batch], stop_check(setup.text, args.stop)
    begin = time.perf_counter()
    sequences = [Sequence(setup.model, ids, plan.config, state, stopped) for ids, state in zip(batch, states)]
    for _ in run_rounds(setup.model, sequences, plan.verify):
        pass
    return [(s.output, s.stats, (time.perf_counter() - begin) / len(batch)) for s in sequences]


def command_verify(args) -> int:
    """Compare methods with plain decoding, and plain decoding with itself where the prompt is read in other chunks."""
    methods = known(args.methods, "--methods") if args.methods else []
    prompts = read_prompts(args.prompts, args.limit_per_task)
    writable(args.json)
    setup = set_up(args)
    plain, exact, found = setup.plan("ar"), None, {}
    plans = {"ar, other chunks": replace(plain, config=replace(plain.config, prefill_chunk=61))}
    plans |= {name: setup.plan(name) for name in methods or [setup.method] if name != "ar"}
    for number, prompt in enumerate(prompts):
        ids = setup.ask(prompt["text"])
        expected = complete(setup, plain, [ids], args)[0][0]
        for name, plan in plans.items():
            output = complete(setup, plan, [ids], args)[0][0]
            exact = exact or (setup.exact() if output != expected else None)
            entry = divergence(exact, plain.config, ids, expected, output, setup.tie)
            found.setdefault(name, []).append({"id": prompt["id"]} | entry)
            if entry["kind"] != "identical":
                say(f"\r{prompt['id']}, {name}: {entry['kind']} at token {entry['at']}, "
                    f"{entry.get('tokens', '')} {entry.get('float32_logits', '')}")
        say(f"\r{number + 1}/{len(prompts)} prompts ", end="")
    say()
    counts = {name: {kind: sum(e["kind"] == kind for e in entries) for kind in ("identical", "near_tie", "different")}
              for name, entries in found.items()}
    if args.json:
        report = {"command": command_line("run.py"), "environment": environment(setup),
                  "near_tie_in_logits": setup.tie, "counts": counts, "found": found}
        write(args.json, report)
    for name, count in counts.items():
        print(f"{name + ':':20} {count['identical']} identical, {count['near_tie']} near ties, "
              f"{count['different']} different{' (lossy)' * plans[name].lossy}")
    return 1 if any(count["different"] for name, count in counts.items() if not plans[name].lossy) else 0


def known(names: str, flag: str, accepted=EVERY) -> list[str]:
    for name in names.split(","):
        if name not in accepted:
            raise ValueError(f"{flag} names {name!r}; expected some of {','.join(accepted)}")
    return list(dict.fromkeys(names.split(",")))


def writable(path: str | None, flag: str = "--json") -> None:
    """Find out before the hour's work whether the result can be written."""
    if path:
        there = Path(path).exists()
        if there and not Path(path).is_file():
            raise ValueError(f"{flag} {path}: not a plain file")
        try:
            open(path, "a").close()
        except OSError as error:
            raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from None
        if not there:
            Path(path).unlink()


def write(path: str | Path, report: dict) -> None:
    """A result, which takes the place of what is there once it is complete."""
    with whole(path) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def command_bench(args) -> int:
    methods = known(args.methods or "ar,retrieve", "--methods")
    prompts = read_prompts(args.prompts, args.limit_per_task)
    writable(args.json)
    setup = set_up(args)
    if "ar" not in methods:
        methods = ["ar", *methods]
    encoded = [setup.ask(p["text"]) for p in prompts]
    runs: dict[str, list[dict]] = {name: [] for name in methods}
    outputs: dict[str, list[list[int]]] = {name: [] for name in methods}
    plans = {name: setup.plan(name) for name in methods}
    configs = {name: plan.config for name, plan in plans.items()}
    # or graphs would be captured while the clock runs
    whole_texts = setup.model.device.type == "cuda" and not args.no_graphs
    few = (min(encoded, key=len), max(encoded, key=len), *encoded[::6])
    warm_up = ([(ids, 1) for ids in encoded] + [(ids, args.max_new_tokens) for ids in few] if whole_texts else
               [(encoded[0], 8)])
    for name in methods:                # once each, uncounted: threads start, memory is touched
        for ids, new in warm_up:
            complete(setup, replace(plans[name], config=replace(configs[name], max_new_tokens=new)), [ids], args)
    # finished prompts, so that an interrupted run goes on
    partial = Path(f"{args.json}.partial") if args.json else None
    # prices are measured anew each time
    known_by = {name: asdict(replace(config, verify_cost=())) for name, config in configs.items()}
    read = [os.stat(path).st_mtime for path in (args.corpus, args.store) if path and os.path.exists(path)]
    key = json.dumps([environment(setup), vars(args), known_by, prompts, read])
    key = hashlib.sha256(key.encode()).hexdigest()
    done = finished(partial, key, args.batch_size) if partial else []
    resumed, began = len(done), time.perf_counter()
    for number in range(0, len(prompts), args.batch_size):
        batch = range(number, min(number + args.batch_size, len(prompts)))
        if number >= len(done):
            found = [{} for _ in batch]
            for turn in range(len(methods)):    # the order turns, so that no method always runs first
                name = methods[(turn + number // args.batch_size) % len(methods)]
                peak_memory(setup.model.device, reset=True)
                completed = complete(setup, plans[name], [encoded[i] for i in batch], args)
                peak = peak_memory(setup.model.device)
                for one, i, (output, stats, seconds) in zip(found, batch, completed):
                    one[name] = output, {
                        "id": prompts[i]["id"], "task": prompts[i]["task"], "prompt_tokens": len(encoded[i]),
                        "tokens": len(output), "seconds": seconds, "peak_megabytes": peak, "rounds": stats.rounds,
                        "steps": dict(stats.seconds), "nodes": dict(stats.nodes), "accepted": dict(stats.accepted),
                        "stages": dict(stats.stages), "merged": {"nodes": stats.merged}}
            if partial:
                try:
                    with open(partial, "a", encoding="utf-8") as file:
                        file.writelines(json.dumps(one) + "\n" for one in found)
                except OSError as error:
                    raise OSError(f"{partial}: could not be written ({error})") from None
            done += found
        for one in done[batch.start:batch.stop]:
            for name in methods:
                outputs[name].append(one[name][0])
                runs[name].append(one[name][1])
        passed, fresh = time.perf_counter() - began, max(1, batch.stop - resumed)
        say(f"\r{batch.stop}/{len(prompts)} prompts, {passed:.0f} s, "
            f"about {passed / fresh * (len(prompts) - batch.stop):.0f} s left   ", end="")
    say()
    tasks = sorted({p["task"] for p in prompts})
    of = lambda name, task: [r for r in runs[name] if task in (None, r["task"])]
    table = {name: total(of(name, None), of("ar", None)) | {
        "by_task": {task: total(of(name, task), of("ar", task))
                    | {"prompt_tokens": sum(r["prompt_tokens"] for r in of(name, task))} for task in tasks},
        **{key: {k: round(sum(r[key].get(k, 0) for r in runs[name]), 3)
                 for k in sorted({k for r in runs[name] for k in r[key]})}
           for key in ("steps", "nodes", "merged", "accepted", "stages")}} for name in methods}
    exacting = [name for name in methods if not plans[name].lossy]
    exact = setup.exact() if any(outputs[name] != outputs["ar"] for name in exacting) else setup.model
    kinds = {name: [divergence(exact, configs["ar"], *triple, setup.tie)["kind"]
                    for triple in zip(encoded, outputs["ar"], outputs[name])] for name in exacting}
    lossless = {name: {kind: kinds[name].count(kind) for kind in ("identical", "near_tie", "different")}
                for name in exacting}
    agreeing = {name: agreement(outputs["ar"], outputs[name]) for name in methods if plans[name].lossy}
    if args.json:
        report = {"command": command_line("run.py"), "environment": environment(setup),
                  "warm_start": bool(setup.warm or setup.store), "prompts": len(prompts),
                  "batch_size": args.batch_size, "config": {name: asdict(config) for name, config in configs.items()},
                  "methods": table, "lossless": lossless, "agreement": agreeing}
        write(args.json, report)
        partial.unlink()
    width = max(map(len, methods)) + 2
    print(f"{'':{width}}{'all':>22}" + "".join(f"{task:>22.20}" for task in tasks))
    for name in methods:
        cells = [table[name], *(table[name]["by_task"][task] for task in tasks)]
        print(f"{name:{width}}" + "".join(
            f"{c['tokens_per_second']:>9.1f} {c['speedup']:>5.2f}x {c['mean_accepted']:>5.2f}" for c in cells))
    verdicts = [f"{n}: {c['different']} different" for n, c in lossless.items()]
    verdicts += [f"{n}: lossy, {c['by_position']:.0%} as plain decoding" for n, c in agreeing.items()]
    print("tokens/s, speedup over ar, tokens a round;", ", ".join(verdicts))
    return 1 if any(c["different"] for c in lossless.values()) else 0


# --------------------------------------------------------------------------------------------------------------- main

class Parser(argparse.ArgumentParser):
    def error(self, message):
        say(f"error: {' '.join(message.split())}")
        sys.exit(2)


def parse(argv: list[str]) -> argparse.Namespace:
    command = argv[0] if argv and argv[0] in ("chat", "bench", "verify") else "generate"
    parser = Parser(prog="run.py" if command == "generate" else f"run.py {command}", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    if command == "generate":
        add("prompt", nargs="?", help="what to answer")
        add("--file", help="read the prompt from a file; - is standard input")
        add("--json", action="store_true", help="print one JSON object instead of text")
        add("--compare", action="store_true", help="also run plain decoding and report the speedup")
    if command in ("bench", "verify"):
        add("--prompts", required=True, help="JSON lines with id, task and turns (the first turn is used)")
        add("--methods", help=f"some of {','.join(EVERY)} "
                              f"(default: {'ar,retrieve' if command == 'bench' else 'the best there is'})")
        add("--limit-per-task", type=at_least(1), help="at most this many prompts a task")
        if command == "bench":
            add("--batch-size", type=at_least(1), default=1, help="prompts that are continued side by side")
        add("--json", metavar="OUT", help="write the result here")
    else:
        add("--method", choices=[*METHODS, *VARIANTS], metavar="METHOD",
            help=f"one of {', '.join([*METHODS, *VARIANTS])} (default: graft with a draft head, else retrieve)")
        add("--show-tree", action="store_true", help="draw each round's tree")
        add("--quiet", action="store_true", help="no statistics")
    add("--model", help="folder or Hub id (default: the demo model)")
    add("--revision", help="of a Hub model")
    add("--draft", help="EAGLE-3 head, a smaller model (of any vocabulary for `universal`), "
                        "or a DFlash drafter for `dflash`: folder or Hub id")
    add("--draft-window", type=at_least(1), metavar="N",
        help="let the head see the last N to 2 N tokens only (default: all)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32", "float64"),
        help="auto: bfloat16 where it is multiplied, else float32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="decode faster: on a CPU run all layers in C++, which is compiled once in some seconds "
             "(default: with AVX2 and AVX512, where there is a compiler, in float32, and in bfloat16 where "
             "the CPU multiplies it); "
             "on a GPU fuse small operations, half a minute of every start (default: no)")
    add("--no-graphs", action="store_true", help="on a GPU, launch every kernel instead of replaying CUDA graphs")
    add("--max-new-tokens", type=int, default=128 if command in ("bench", "verify") else 512,
        help="most tokens of an answer (default: %(default)s)")
    add("--budget", type=at_least(1),
        help="most nodes a tree holds below its root "
             f"(default: as calibrated, else {CPU_BUDGET} on a CPU, {GPU_BUDGET} on a GPU)")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that make up this probability")
    add("--min-p", type=float, default=0.0,
        help="sample from tokens with this share of the likeliest one's probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the text so far become less likely")
    add("--seed", type=int, default=0, help="of sampling: one seed, one text, whatever the method")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--system", help="system message")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end before this text, which is not printed; may be repeated")
    add("--corpus", help="text file whose n-grams may be retrieved")
    add("--store", help="file that keeps adjacency and n-grams between runs (bench and verify only read it)")
    add("--calibration", metavar="FILE",
        help="what tools/calibrate.py wrote (default: the demo model's for this device; "
             "where there is none, a CPU's prices are measured)")
    add("--cold", action="store_true", help="start the demo model's adjacency matrix empty, not from assets/")
    args = parser.parse_args(argv if command == "generate" else argv[1:])
    args.command = command
    args.show_tree = getattr(args, "show_tree", False)
    for name in ("file", "prompts", "methods", "json", "model", "revision", "draft", "corpus", "store", "calibration"):
        if getattr(args, name, None) == "":
            parser.error(f"argument --{name} is empty; leave it out, or say which")
    for stop in args.stop:
        if not stop or any("\ud800" <= letter <= "\udfff" for letter in stop):
            parser.error(f"argument --stop is {stop!r}; expected some text")
    for name in ("prompts", "corpus", "store", "calibration") if isinstance(getattr(args, "json", None), str) else ():
        if getattr(args, name) and os.path.realpath(args.json) == os.path.realpath(getattr(args, name)):
            parser.error(f"argument --json is {args.json}, which is what --{name} reads; expected another file")
    if args.revision and not args.model:
        parser.error(f"argument --revision is {args.revision}, of no model; give --model, or leave it out")
    if getattr(args, "compare", False) and args.quiet and not args.json:
        parser.error("argument --compare shows nothing with --quiet; leave out one of them")
    if [getattr(args, name, None) for name in ("file", "corpus")] == ["-", "-"]:
        parser.error("arguments --file and --corpus are both standard input; expected at most one")
    if command in ("bench", "verify") and args.store and not os.path.exists(args.store):
        parser.error(f"argument --store is {args.store}, which is no file; "
                     "expected one that a conversation has written")
    return args


def main(argv: list[str]) -> int:
    # None: closed by >&-
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdin = sys.stdin or open(os.devnull)
    try:
        args = parse(argv)
        code = {"generate": command_generate, "chat": command_chat,
                "bench": command_bench, "verify": command_verify}[args.command](args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:                     # the reader left: not our error
        return 0
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except (ValueError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise                               # our error
        say("error: out of memory; a shorter prompt, fewer --max-new-tokens or a smaller --model need less "
            f"({error!r:.160})")
        return 1
    finally:
        try:
            sys.stdout.flush()
        except OSError:                         # told already; Python would tell it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signalled)
    sys.exit(main(sys.argv[1:]))
