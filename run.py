"""Graft on the command line. This file only talks to people; graft.py does the work.

    python run.py "Why is the sky blue?"                 answer on the demo model
    python run.py chat                                   a conversation; caches and stores carry over
    python run.py bench --prompts FILE.jsonl --json OUT  methods side by side, prompt by prompt
"""

import argparse
import importlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parent / folder) for folder in ("tools", "variants")]
from demo_model import demo_model  # noqa: E402
from graft import METHODS, EagleDrafter, GraftConfig, Sequence, State, Stats, run_rounds  # noqa: E402
from model import Model, fetch_checkpoint, load_eagle3, load_model  # noqa: E402
from retrieval import AdjacencyMatrix, NGramIndex, load_stores, save_stores  # noqa: E402
from tree import Tree  # noqa: E402

DEMO_HEAD = Path(__file__).resolve().parent / "assets" / "smollm2-135m-eagle3"
DEMO_STORE = DEMO_HEAD.parent / "smollm2-135m-store.safetensors"   # tools/warm_store.py
CALIBRATION = DEMO_HEAD.parent / "calibration"                     # tools/calibrate.py
CPU_BUDGET, GPU_BUDGET = 15, 60      # nodes below the root where nothing was calibrated; a CPU pays for each, a large GPU hardly
PAPER = dict(budget=60, depth=7, draft_top_k=10, verify_cost=())   # EAGLE-3's defaults, on which the paper builds
ABLATIONS = {                        # what bench runs besides the methods: the method, and what it changes
    "eagle_60": ("eagle", PAPER),
    "graft_60": ("graft", PAPER | {name: getattr(GraftConfig, name) for name in ("checkpoints", "thresholds", "retained", "trust")}),
    "graft_at_root": ("graft", dict(graft_anchors=0)),
    "graft_no_adjacency": ("graft", dict(adjacency=False)),
    "graft_no_ngrams": ("graft", dict(ngrams=False)),
}
VARIANTS = {                         # methods of the neighbours, each with its file in variants/
    "universal": "universal", "universal_graft": "universal",
    "via_sd": "via_sd",
}
OWN_DRAFT = {"universal", "universal_graft"}   # variants that load --draft themselves: it is no EAGLE-3 head
EVERY = [*METHODS, *ABLATIONS, *VARIANTS]
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}   # gap of two float32 logits that rounding in this dtype can close


def say(*words, end="\n") -> None:
    print(*words, end=end, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- text

class Text:
    """Tokenizer and chat template of a checkpoint folder. What a user writes never becomes a control token unless asked."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer
        folder = Path(folder)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'}: not a usable tokenizer ({str(error).splitlines()[0]:.120})") from None
        self.tokenizer.encode_special_tokens = True       # control tokens in plain text are plain text
        added = self.tokenizer.get_added_tokens_decoder()
        self.control = {token.content: i for i, token in added.items() if token.special}
        longest_first = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True)))
        self.splitter = re.compile(f"({longest_first})") if self.control else None
        self.template, self.names = None, {}
        path = folder / "tokenizer_config.json"
        if path.exists():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not valid JSON ({error})") from None
            template = config.get("chat_template")
            if isinstance(template, list):                # several named ones: the default
                template = next((t["template"] for t in template if t.get("name") == "default"), None)
            self.template = template
            for name in ("bos_token", "eos_token"):
                value = config.get(name)
                self.names[name] = value.get("content") if isinstance(value, dict) else value or ""
        if (folder / "chat_template.jinja").exists():
            self.template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_control(self, text: str, mark: str = "") -> list[int]:
        """As `encode`, but control tokens count, except where `mark` stands inside them; every `mark` is taken out."""
        pieces = self.splitter.split(text) if self.splitter else [text]
        ids = []
        for piece in pieces:
            ids += [self.control[piece]] if piece in self.control else self.encode(piece.replace(mark, "") if mark else piece)
        return ids

    def render(self, messages: list[dict]) -> str:
        """The chat template's text, ready for the assistant's turn. Runs in jinja2's sandbox."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason):
            raise TemplateError(str(reason))

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        try:
            return environment.from_string(self.template).render(messages=messages, add_generation_prompt=True, **self.names)
        except Exception as error:  # a template can fail in as many ways as a program
            raise ValueError(f"the checkpoint's chat template failed: {str(error)[:160] or type(error).__name__}") from None

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation. Control tokens come from the template alone: those a message spells are broken by a mark."""
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
        self.window, self.shown = self.shown, len(self.ids)    # decode the next piece behind this one: spaces come out right
        for stop in self.stops:
            if (found := (self.done[-len(stop):] + self.pending).find(stop)) >= 0:
                self.pending = (self.done[-len(stop):] + self.pending)[len(self.done[-len(stop):]):found] if found > 0 else ""
                last = True
        held = 0 if last else max((len(stop) - 1 for stop in self.stops), default=0)
        out, self.pending = self.pending[:len(self.pending) - held], self.pending[len(self.pending) - held:]
        self.done += out
        return out


def stop_check(text: Text, stops: list[str]):
    """The predicate `generate` asks after every token: does the text now hold a stop string? A token is a byte at least."""
    if not stops:
        return None
    reach = max(len(stop.encode()) for stop in stops) + 8
    return lambda output: any(stop in text.decode(output[-reach:]) for stop in stops)


# ------------------------------------------------------------------------------------------------------------- set-up

@dataclass
class Plan:
    """How a method runs: its settings, what drafts for it (a fresh one for each text), its own `verify` if it has one, and whether
    its output may differ from plain decoding."""

    config: GraftConfig
    new_drafter: Callable = lambda: None
    verify: Callable | None = None
    lossy: bool = False


@dataclass
class Setup:
    """A loaded target with all that a command needs to generate."""

    model: Model
    head: object
    text: Text
    method: str               # the one asked for
    base: GraftConfig         # before calibration
    chat: bool
    system: str | None
    corpus: list[int]
    tuned: dict               # by method, what tools/calibrate.py chose for this device
    store: Path | None        # --store: read if it is there, written at the end
    warm: Path | None         # the demo model's own start
    draft: str | None = None  # --draft, for variants that load their own

    def state(self, plan: Plan | None = None) -> State:
        ngrams = NGramIndex()
        adjacency = AdjacencyMatrix(self.model.config.vocab_size, device=self.model.device)
        ngrams.append(self.corpus)
        start = self.store if self.store and self.store.exists() else self.warm
        if start:
            load_stores(start, adjacency, ngrams)
        return State(self.model, (plan or self.plan("graft" if self.head else "retrieve")).new_drafter(), adjacency, ngrams)

    def plan(self, method: str) -> Plan:
        """Of a method, an ablation or a variant. A variant's file has `prepare(setup, method)`, which returns a Plan's fields."""
        if method in VARIANTS:
            return Plan(*importlib.import_module(VARIANTS[method]).prepare(self, method))
        config = self.configure(method)
        if METHODS[config.method].draft and not self.head:
            raise ValueError(f"method '{method}' needs a draft head; give --draft")
        return Plan(config, lambda: EagleDrafter(self.head) if self.head else None)

    def configure(self, method: str) -> GraftConfig:
        """The configuration of a method or an ablation, with what was calibrated for this device."""
        method, changes = ABLATIONS.get(method, (method, {}))
        like = "eagle" if METHODS[method].draft and not METHODS[method].prune else "graft" if method.startswith("graft") else method
        tuned = self.tuned.get(like, {})
        return replace(self.base, **{"method": method} | tuned | changes)

    def ids(self, messages: list[dict]) -> list[int]:
        if not self.chat:
            return self.text.encode(messages[-1]["content"])
        return self.text.prompt(([{"role": "system", "content": self.system}] if self.system is not None else []) + messages)


def choose_device(name: str | None) -> torch.device:
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}, which does not work here: {str(error).splitlines()[0]:.100}; try cpu or cuda") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 wherever the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def set_up(args) -> Setup:
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    folder = fetch_checkpoint(args.model, args.revision) if args.model else demo_model(say)
    text = Text(folder)
    model = load_model(folder, dtype=dtype, device=device)
    if text.tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {text.tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}: "
                         "they do not belong together")
    own = OWN_DRAFT & {*getattr(args, "methods", "").split(","), getattr(args, "method", None)}
    draft = not own and args.draft or (str(DEMO_HEAD) if not args.model and DEMO_HEAD.is_dir() else None)
    head = load_eagle3(fetch_checkpoint(draft), model) if draft else None
    method = getattr(args, "method", None) or ("graft" if head else "retrieve")
    chat = text.template is not None if args.chat is None else args.chat
    if chat and text.template is None:
        raise ValueError(f"{folder}: the checkpoint has no chat template; use --no-chat")
    if args.system is not None and not chat:
        raise ValueError("--system needs a chat template; leave it out with --no-chat")
    corpus = text.encode(read_text(args.corpus, "--corpus")) + [-1] if args.corpus else []
    config = GraftConfig(max_new_tokens=args.max_new_tokens, seed=args.seed, temperature=args.temperature, top_k=args.top_k,
                         top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty,
                         budget=args.budget or (CPU_BUDGET if device.type == "cpu" else GPU_BUDGET))
    path = CALIBRATION / f"smollm2-135m-instruct-{device.type}-{str(dtype).removeprefix('torch.')}.json" if not args.model else None
    path = Path(args.calibration) if args.calibration else path
    tuned = read_calibration(path) if path and (args.calibration or path.exists()) else {}
    for fields in tuned.values() if args.budget else ():
        prices = fields.get("verify_cost", ())[:args.budget + 1]
        fields |= {"budget": args.budget, "verify_cost": prices if len(prices) == args.budget + 1 else ()}
    warm = DEMO_STORE if not args.model and not args.cold and DEMO_STORE.exists() else None
    return Setup(model, head, text, method, config, chat, args.system, corpus, tuned, Path(args.store) if args.store else None, warm, args.draft)


def read_calibration(path: Path) -> dict:
    """By method, the fields of GraftConfig that tools/calibrate.py chose."""
    try:
        methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
        tuned = {name: {k: tuple(v) if isinstance(v, list) else v for k, v in entry["config"].items()} for name, entry in methods.items() if "config" in entry}
        for fields in tuned.values():
            GraftConfig(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"calibration {path}: not a file that tools/calibrate.py wrote ({error})") from None
    return tuned


def read_text(path: str, what: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
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
    """One line a node: its token, its source and its estimated probability; the accepted path is marked with a bullet."""
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
        note = "" if node == 0 else f"  {tree.sources[node]} {2.718281828 ** tree.scores[node]:.2f}"
        lines.append(lead + ("● " if node in taken else "○ ") + label + paint("2", note))
        kids = sorted(children.get(node, []), key=lambda kid: (kid not in taken, -tree.scores[kid]))
        for i, kid in reversed(list(enumerate(kids))):
            last = i == len(kids) - 1
            stack.append((kid, below + ("└─" if last else "├─"), below + ("  " if last else "│ ")))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- commands

def answer(setup: Setup, plan: Plan, ids: list[int], state: State, args, show=None) -> tuple[list[int], str, Stats, float]:
    """Generate, stream the text to `show`, and return tokens, text, statistics and seconds. Ctrl-C keeps what is there."""
    stream, output, stats = Stream(setup.text, args.stop), [], Stats()
    start = time.perf_counter()
    text = ""
    try:
        sequence = Sequence(setup.model, ids, plan.config, state, stop_check(setup.text, args.stop))
        for number, (_, step) in enumerate(run_rounds(setup.model, [sequence], plan.verify)):
            stats, output = step.stats, output + step.tokens
            if args.show_tree and show:
                if step.tree:
                    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
                    print(f"\nround {number}: {len(step.tree) - 1} nodes, {len(step.path) - 1} accepted, then the target's own "
                          f"{json.dumps(setup.text.tokenizer.decode(step.tokens[-1:], skip_special_tokens=False), ensure_ascii=False)}")
                    print(draw_tree(step.tree, step.path, setup.text, colour), flush=True)
                text += stream.push(step.tokens, bool(stats.finish))
            else:
                piece = stream.push(step.tokens, bool(stats.finish))
                text += piece
                if show:
                    show(piece)
    except KeyboardInterrupt:
        stats.finish = "interrupted"
    return output, text, stats, time.perf_counter() - start


def summary(setup: Setup, method: str, stats: Stats, seconds: float) -> str:
    model = setup.model
    return (f"{stats.tokens} tokens in {seconds:.2f} s, {stats.tokens / seconds:.1f} tokens/s, {stats.mean_accepted:.2f} tokens a round "
            f"({method}, {str(model.dtype).removeprefix('torch.')}, {model.device.type})")


def command_generate(args) -> int:
    if args.prompt is None and args.file is None:
        raise ValueError("no prompt; give one in quotes, or --file FILE (- for standard input)")
    if args.prompt is not None and args.file is not None:
        raise ValueError("a prompt and --file were both given; expected one of them")
    prompt = check_text(args.prompt if args.prompt is not None else read_text(args.file, "--file"))
    setup = set_up(args)
    ids = setup.ids([{"role": "user", "content": prompt}])
    plan = setup.plan(setup.method)
    state = setup.state(plan)
    show = None if args.json else lambda piece: print(piece, end="", flush=True)
    output, text, stats, seconds = answer(setup, plan, ids, state, args, show)
    if setup.store:
        save_stores(setup.store, state.adjacency, state.ngrams)
    if args.json:
        report = {"text": text, "tokens": output, "seconds": seconds, "config": asdict(plan.config),
                  "statistics": vars(stats) | {"mean_accepted": stats.mean_accepted}}
    else:
        print("\n\n" + text if args.show_tree else "")
    line = summary(setup, setup.method, stats, seconds)
    if args.compare and stats.finish != "interrupted":
        plain = setup.plan("ar")
        expected, _, _, slow = answer(setup, plain, ids, setup.state(plain), args)
        ratio, same = stats.tokens / seconds / (len(expected) / slow), expected == output
        reason = "lossy method" if plan.lossy else "rounding: see README"
        line += f"; {ratio:.2f}x plain decoding, output {'identical' if same else f'differs ({reason})'}"
        if args.json:
            report |= {"speedup": ratio, "identical": same}
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    elif not args.quiet:
        say(line)
    return 130 if stats.finish == "interrupted" else 0


def command_chat(args) -> int:
    setup = set_up(args)
    if not setup.chat:
        raise ValueError("chat needs a checkpoint with a chat template")
    plan = setup.plan(setup.method)
    state, messages = setup.state(plan), []
    if not args.quiet:
        say("An empty line or Ctrl-D ends the conversation; /reset starts a new one.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            break
        if line == "/reset":
            messages = []
            continue
        messages.append({"role": "user", "content": check_text(line)})
        try:
            ids = setup.ids(messages)
            _, text, stats, seconds = answer(setup, plan, ids, state, args, lambda piece: print(piece, end="", flush=True))
        except ValueError as error:
            say(f"error: {error}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})
        print("\n\n" + text if args.show_tree else "")
        if not args.quiet:
            say(summary(setup, setup.method, stats, seconds))
    if setup.store:
        save_stores(setup.store, state.adjacency, state.ngrams)
    return 0


# -------------------------------------------------------------------------------------------------------------- bench

def read_prompts(path: str, per_task: int | None) -> list[dict]:
    prompts, counts = [], {}
    for number, line in enumerate(read_text(path, "--prompts").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry = {"id": str(entry["id"]), "task": str(entry["task"]), "text": check_text(entry["turns"][0])}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ValueError(f"{path}, line {number}: expected an object with 'id', 'task' and 'turns' (a list of texts)") from None
        counts[entry["task"]] = counts.get(entry["task"], 0) + 1
        if per_task is None or counts[entry["task"]] <= per_task:
            prompts.append(entry)
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def environment(setup: Setup) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), cpu)
    device = setup.model.device
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, "kind": device.type,
            "dtype": str(setup.model.dtype).removeprefix("torch."), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "seed": setup.base.seed}


def total(runs: list[dict], plain: list[dict] | None) -> dict:
    """Sums over prompts; speedup is of tokens a second over `ar` in this run, with the prompts' median and quartiles."""
    tokens, seconds = sum(r["tokens"] for r in runs), sum(r["seconds"] for r in runs)
    decoding = seconds - sum(r["steps"].get("prefill", 0) for r in runs)
    rounds = sum(r["rounds"] for r in runs)
    out = {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 2),
           "decode_tokens_per_second": round((tokens - len(runs)) / max(decoding, 1e-9), 2),
           "mean_accepted": round((tokens - len(runs)) / max(rounds, 1), 3)}
    if plain:
        slow = total(plain, None)
        ratios = sorted(r["tokens"] / r["seconds"] / (p["tokens"] / p["seconds"]) for r, p in zip(runs, plain))
        cuts = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        out |= {"speedup": round(out["tokens_per_second"] / slow["tokens_per_second"], 3),
                "decode_speedup": round(out["decode_tokens_per_second"] / slow["decode_tokens_per_second"], 3),
                "prompt_speedup_quartiles": [round(cut, 3) for cut in cuts]}
    return out


def first_difference(setup: Setup, exact: Model, ids: list[int], a: list[int], b: list[int]) -> str:
    """identical, near_tie (a float32 forward over the common prefix has the two tokens within rounding), or different."""
    if a == b:
        return "identical"
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
    if at is None:
        return "different"
    prefix = ids + a[:at]
    with torch.inference_mode():
        tokens = torch.tensor([prefix], device=exact.device)
        positions = torch.arange(len(prefix), device=exact.device)[None]
        logits, _ = exact(tokens, positions, exact.new_cache(len(prefix)), last_only=True)
    gap = abs(float(logits[0, -1, a[at]] - logits[0, -1, b[at]]))
    return "near_tie" if gap <= NEAR_TIE[str(setup.model.dtype).removeprefix("torch.")] else "different"


def agreement(plain: list[list[int]], other: list[list[int]]) -> dict:
    """Of a lossy method: the shares of tokens before an output's first difference, and of those that are the same in the same place."""
    same, count = [[x == y for x, y in zip(*pair)] for pair in zip(plain, other)], sum(max(map(len, pair)) for pair in zip(plain, other))
    return {"before_first_difference": round(sum([*row, False].index(False) for row in same) / count, 4),
            "by_position": round(sum(map(sum, same)) / count, 4)}


def finished(partial: Path, key: str) -> list[dict]:
    """The prompts that an interrupted run of the same benchmark has finished; leaves a file that holds no others."""
    lines = partial.read_text(encoding="utf-8").split("\n") if partial.exists() else []
    whole = lines[1:-1] if lines[:1] == [key] else []                    # behind the last newline: nothing, or half a line
    partial.write_text("".join(line + "\n" for line in [key, *whole]), encoding="utf-8")
    return [json.loads(line) for line in whole]


def command_bench(args) -> int:
    methods = args.methods.split(",")
    for name in methods:
        if name not in EVERY:
            raise ValueError(f"--methods names {name!r}; expected some of {','.join(EVERY)}")
    prompts = read_prompts(args.prompts, args.limit_per_task)
    if args.json:
        with open(args.json, "a"):      # find out before the hour's work whether it can be written
            pass
    setup = set_up(args)
    if "ar" not in methods:
        methods = ["ar", *methods]
    encoded = [setup.ids([{"role": "user", "content": p["text"]}]) for p in prompts]
    runs: dict[str, list[dict]] = {name: [] for name in methods}
    outputs: dict[str, list[list[int]]] = {name: [] for name in methods}
    plans = {name: setup.plan(name) for name in methods}
    configs = {name: plan.config for name, plan in plans.items()}
    for name in methods:                # once each, uncounted: threads start, memory is touched
        answer(setup, replace(plans[name], config=replace(configs[name], max_new_tokens=8)), encoded[0], setup.state(plans[name]), args)
    partial = Path(f"{args.json}.partial") if args.json else None       # finished prompts, so that an interrupted run goes on
    key = json.dumps([environment(setup), {name: asdict(config) for name, config in configs.items()}, [p["id"] for p in prompts]])
    done = finished(partial, key) if partial else []
    began = time.perf_counter()
    for number, (prompt, ids) in enumerate(zip(prompts, encoded)):
        found = done[number] if number < len(done) else {}
        for turn in range(len(methods) if not found else 0):  # the order turns, so that no method always runs first
            name = methods[(turn + number) % len(methods)]
            output, _, stats, seconds = answer(setup, plans[name], ids, setup.state(plans[name]), args)
            if stats.finish == "interrupted":
                say("\ninterrupted" + (": the same command continues" if partial else ""))
                return 130
            found[name] = output, {"id": prompt["id"], "task": prompt["task"], "prompt_tokens": len(ids), "tokens": len(output),
                                   "seconds": seconds, "rounds": stats.rounds, "steps": dict(stats.seconds), "nodes": dict(stats.nodes),
                                   "accepted": dict(stats.accepted), "stages": dict(stats.stages), "merged": {"nodes": stats.merged}}
        for name in methods:
            outputs[name].append(found[name][0])
            runs[name].append(found[name][1])
        if partial and number >= len(done):
            with open(partial, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        passed, fresh = time.perf_counter() - began, max(1, number + 1 - len(done))
        say(f"\r{number + 1}/{len(prompts)} prompts, {passed:.0f} s, about {passed / fresh * (len(prompts) - number - 1):.0f} s left   ", end="")
    say()
    tasks = sorted({p["task"] for p in prompts})
    of = lambda name, task: [r for r in runs[name] if task in (None, r["task"])]
    table = {name: total(of(name, None), of("ar", None)) | {
        "by_task": {task: total(of(name, task), of("ar", task)) for task in tasks},
        **{key: {k: round(sum(r[key].get(k, 0) for r in runs[name]), 3) for k in sorted({k for r in runs[name] for k in r[key]})}
           for key in ("steps", "nodes", "merged", "accepted", "stages")}} for name in methods}
    exact, exacting = setup.model, [name for name in methods if not plans[name].lossy]
    if exact.dtype != torch.float32 and any(outputs[name] != outputs["ar"] for name in exacting):
        exact = load_model(fetch_checkpoint(args.model, args.revision) if args.model else demo_model(say),
                           dtype=torch.float32, device=setup.model.device)
    kinds = {name: [first_difference(setup, exact, *triple) for triple in zip(encoded, outputs["ar"], outputs[name])] for name in exacting}
    lossless = {name: {kind: kinds[name].count(kind) for kind in ("identical", "near_tie", "different")} for name in exacting}
    agreeing = {name: agreement(outputs["ar"], outputs[name]) for name in methods if plans[name].lossy}
    width = max(map(len, methods)) + 2
    print(f"{'':{width}}{'all':>22}" + "".join(f"{task:>22.20}" for task in tasks))
    for name in methods:
        cells = [table[name], *(table[name]["by_task"][task] for task in tasks)]
        print(f"{name:{width}}" + "".join(f"{c['tokens_per_second']:>9.1f} {c['speedup']:>5.2f}x {c['mean_accepted']:>5.2f}" for c in cells))
    verdicts = [f"{n}: {c['different']} different" for n, c in lossless.items()]
    verdicts += [f"{n}: lossy, {c['by_position']:.0%} as plain decoding" for n, c in agreeing.items()]
    print("tokens/s, speedup over ar, tokens a round;", ", ".join(verdicts))
    if args.json:
        command = "python run.py " + " ".join(a if "/" not in a else Path(a).name for a in sys.argv[1:])
        report = {"command": command, "environment": environment(setup), "warm_start": bool(setup.warm or setup.store), "prompts": len(prompts),
                  "config": {name: asdict(config) for name, config in configs.items()}, "methods": table, "lossless": lossless, "agreement": agreeing}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.unlink()
    return 1 if any(c["different"] for c in lossless.values()) else 0


# --------------------------------------------------------------------------------------------------------------- main

class Parser(argparse.ArgumentParser):
    def error(self, message):
        say(f"error: {message}")
        sys.exit(2)


def parse(argv: list[str]) -> argparse.Namespace:
    command = argv[0] if argv and argv[0] in ("chat", "bench") else "generate"
    parser = Parser(prog="run.py" if command == "generate" else f"run.py {command}", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    if command == "generate":
        add("prompt", nargs="?", help="what to answer")
        add("--file", help="read the prompt from a file; - is standard input")
        add("--json", action="store_true", help="print one JSON object instead of text")
        add("--compare", action="store_true", help="also run plain decoding and report the speedup")
    if command == "bench":
        add("--prompts", required=True, help="JSON lines with id, task and turns (the first turn is used)")
        add("--methods", default="ar,retrieve", help=f"some of {','.join(EVERY)}")
        add("--limit-per-task", type=int, help="at most this many prompts a task")
        add("--json", metavar="OUT", help="write the result here")
    else:
        add("--method", choices=[*METHODS, *VARIANTS], metavar="METHOD", help=f"one of {', '.join([*METHODS, *VARIANTS])} (default: graft with a draft head, else retrieve)")
        add("--show-tree", action="store_true", help="draw each round's tree")
        add("--quiet", action="store_true", help="no statistics")
    add("--model", help="folder or Hub id (default: the demo model)")
    add("--revision", help="of a Hub model")
    add("--draft", help="EAGLE-3 head, or the draft model of universal: folder or Hub id")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32", "float64"))
    add("--max-new-tokens", type=int, default=128 if command == "bench" else 512)
    add("--budget", type=int, help=f"most nodes a tree holds below its root (default: as calibrated, else {CPU_BUDGET} on a CPU, {GPU_BUDGET} on a GPU)")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that make up this probability")
    add("--min-p", type=float, default=0.0, help="sample from tokens with this share of the likeliest one's probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the text so far become less likely")
    add("--seed", type=int, default=0, help="of sampling: one seed, one text, whatever the method")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--system", help="system message")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop behind this text; may be repeated")
    add("--corpus", help="text file whose n-grams may be retrieved")
    add("--store", help="file that keeps adjacency and n-grams between runs")
    add("--calibration", metavar="FILE", help="what tools/calibrate.py wrote (default: the demo model's, if this device has one)")
    add("--cold", action="store_true", help="start the demo model's adjacency matrix empty, not from assets/")
    args = parser.parse_args(argv if command == "generate" else argv[1:])
    args.command = command
    args.show_tree = getattr(args, "show_tree", False)
    if "" in args.stop:
        parser.error("argument --stop is empty; expected some text")
    if args.budget is not None and args.budget < 1:
        parser.error(f"argument --budget is {args.budget}; expected 1 or more")
    if getattr(args, "limit_per_task", None) is not None and args.limit_per_task < 1:
        parser.error(f"argument --limit-per-task is {args.limit_per_task}; expected 1 or more")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        return {"generate": command_generate, "chat": command_chat, "bench": command_bench}[args.command](args)
    except BrokenPipeError:                     # the reader left: not our error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
