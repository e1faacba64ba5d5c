"""Graft beside other implementations of decoding, on the same prompts, weights, dtype and threads, prompt by prompt in
one run.

    pip install transformers &&
        python tools/bench_peers.py --prompts FILE.jsonl --dtype bfloat16 --json results/peers_cpu.json
    pip install llama-cpp-python, then add --gguf FILE for llama.cpp on a bfloat16 GGUF of the same weights

Peers: transformers' greedy `generate`, its prompt lookup (10 tokens), its assisted generation by early exit (the first
third of the layers drafts; made for checkpoints trained for it), its static cache under torch.compile (on a CPU by a
switch that it keeps for tests). Each runs once uncounted, on the longest prompt, which also compiles. A prompt's time
runs from token ids to the last token id, prefill included. `same` counts prompts whose output equals our `ar`.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import run  # noqa: E402
from demo_model import command_line, tool  # noqa: E402

PEERS = ("greedy", "prompt-lookup", "early-exit", "compiled")   # ways in which transformers generates


def ours(setup: run.Setup, method: str, new: int, options: argparse.Namespace):
    """A call that returns tokens and seconds, as `timed` makes of a peer's. options: run.py's."""
    plan = setup.plan(method)
    plan = replace(plan, config=replace(plan.config, max_new_tokens=new))

    def call(ids: list[int]) -> tuple[list[int], float]:
        output, _, seconds = run.complete(setup, plan, [ids], options)[0]
        return output, seconds
    return call


def timed(peer):
    def call(ids: list[int]) -> tuple[list[int], float]:
        begin = time.perf_counter()
        return peer(ids), time.perf_counter() - begin
    return call


def transformers_generate(model, new: int, **options):
    def call(ids: list[int]) -> list[int]:
        prompt = torch.tensor([ids], device=model.device)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new,
                             pad_token_id=0, **options)
        return out[0, len(ids):].tolist()
    return call


def llama_cpp(path: str, new: int, eos: tuple[int, ...], context: int):
    from llama_cpp import Llama
    llama = Llama(path, n_ctx=context, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
                  verbose=False)

    def call(ids: list[int]) -> list[int]:
        llama.reset()
        out = []
        for token in llama.generate(ids, temp=0.0, top_k=1):
            out.append(token)
            if token in eos or len(out) == new:
                return out
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit-per-task", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--model", help="folder or Hub id (default: the demo model)")
    parser.add_argument("--methods", default="ar,graft", help="ours")
    parser.add_argument("--peers", default="greedy,prompt-lookup",
                        help=f"some of {', '.join(PEERS)} (compiling takes a minute or more)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours as with run.py's --compile")
    parser.add_argument("--gguf", help="also llama.cpp on this file")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["ar", *run.known(args.methods, "--methods")]))
    if own := set(methods) & set(run.VARIANTS):
        raise ValueError(f"--methods names {own.pop()!r}; expected methods of graft.py")
    wanted = run.known(args.peers, "--peers", PEERS)
    run.writable(args.json)
    prompts = run.read_prompts(args.prompts, args.limit_per_task)
    import transformers
    options = run.parse(["peers", "--dtype", args.dtype, *(["--model", args.model] if args.model else []),
                         *run.flag("compile", args.compile)])
    setup = run.set_up(options)
    encoded, new = [setup.ask(p["text"]) for p in prompts], args.max_new_tokens
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        setup.folder, dtype=setup.model.dtype).to(setup.model.device).eval()
    compilation = (transformers.CompileConfig() if peer.device.type == "cuda"
                   else transformers.CompileConfig(mode="default"))
    compilation._compile_all_devices = True                      # else a CPU gets the static cache alone
    ways = {"greedy": {}, "prompt-lookup": dict(prompt_lookup_num_tokens=10),
            "early-exit": dict(assistant_early_exit=setup.model.config.num_hidden_layers // 3),
            "compiled": dict(cache_implementation="static", compile_config=compilation)}
    peers = {f"transformers {way.replace('-', ' ')}": transformers_generate(peer, new, **ways[way])
             for way in PEERS if way in ("greedy", *wanted)}
    if args.gguf:
        peers["llama.cpp"] = llama_cpp(args.gguf, new, setup.model.config.eos_token_ids,
                                       max(map(len, encoded)) + new + 1)
    calls = ({name: ours(setup, name, new, options) for name in methods}
             | {name: timed(call) for name, call in peers.items()})
    for name in list(calls):
        try:
            calls[name](max(encoded, key=len))                   # once uncounted
        except Exception as error:  # a peer that does not run here is left out, and said to be
            if name in (*methods, "transformers greedy"):        # what the others are compared with
                raise
            print(f"{name} does not run here: {(str(error) or type(error).__name__).splitlines()[0]:.120}")
            del calls[name]
    runs = {name: [] for name in calls}
    for number, ids in enumerate(encoded):
        order = list(calls)
        outputs = {}
        for turn in range(len(order)):
            name = order[(turn + number) % len(order)]
            outputs[name], seconds = calls[name](ids)
            runs[name].append((prompts[number]["task"], len(outputs[name]), seconds))
        for name in order:
            runs[name][-1] += (outputs[name] == outputs[order[0]],)
        print(f"\r{number + 1}/{len(encoded)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    speed = lambda rows: sum(n for _, n, _, _ in rows) / sum(s for _, _, s, _ in rows)
    tasks, table = sorted({p["task"] for p in prompts}), {}
    for name, rows in runs.items():
        base = runs["transformers greedy"]
        ratios = sorted((a[1] / a[2]) / (b[1] / b[2]) for a, b in zip(rows, base))
        table[name] = {"tokens_per_second": round(speed(rows), 2),
                       "over_transformers_greedy": round(speed(rows) / speed(base), 3),
                       "prompt_ratio_quartiles": run.quartiles(ratios), "same": sum(r[3] for r in rows),
                       "by_task": {task: round(speed([r for r in rows if r[0] == task]), 2) for task in tasks}}
        print(f"{name:28}", table[name])
    if args.json:
        report = {"command": command_line("tools/bench_peers.py"),
                  "environment": run.environment(setup) | {"transformers": transformers.__version__},
                  "prompts": len(prompts), "peers": table}
        run.write(args.json, report)


if __name__ == "__main__":
    tool(main)
