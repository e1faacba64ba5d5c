"""t(n) of a target with random weights of a published shape: what verifying n nodes costs on this device, and the
memory it takes.

    python tools/latency_curve.py --shape qwen3-8b --json results/latency_qwen3-8b_cuda.json

Latency does not depend on what the weights are, so no checkpoint is needed. The floor is the weights that a forward
must read, once, at the bandwidth that a large sum reaches here; of a mixture of experts, the experts that its rows
choose.
"""

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import run  # noqa: E402
from calibrate import bandwidth, bytes_read, median_ms  # noqa: E402
from demo_model import at_least, command_line, tool  # noqa: E402
from graft import verify_once  # noqa: E402
from kernels import kernels  # noqa: E402
from model import Linear, Model, ModelConfig, RMSNorm  # noqa: E402

ROPE = {"rope_type": "default", "rope_theta": 1e6, "original_max_position_embeddings": 40960}
QWEN3 = dict(architecture="Qwen3ForCausalLM", vocab_size=151936, rms_norm_eps=1e-6, max_position_embeddings=40960,
             rope=ROPE, head_dim=128, qk_norm=True)
SHAPES = {
    "qwen3-8b": ModelConfig(**QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                            num_attention_heads=32, num_key_value_heads=8),
    "qwen3-1.7b": ModelConfig(**QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
                              num_attention_heads=16, num_key_value_heads=8),
    "qwen3-30b-a3b": ModelConfig(**QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                                 num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
                                 moe_intermediate_size=768, norm_topk_prob=True, moe_layers=tuple(range(48))),
}


def random_model(config: ModelConfig, dtype: torch.dtype, device, blocks=None) -> Model:
    with torch.device("meta"):
        model = Model(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    for name, value in model.named_parameters():
        # as checkpoints are stored
        value.copy_(value.normal_(std=0.02).bfloat16()) if "norm" not in name else value.fill_(1.0)
    model.inverse = config.rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.pack()
        elif isinstance(module, Linear):
            module.pack(products=blocks)
    return model


@torch.inference_mode()
def curve(model: Model, length: int, grid: list[int], repeats: int) -> tuple[dict, dict]:
    """By nodes below the root: milliseconds of a forward behind `length` committed tokens, and on a GPU the peak memory
    in MiB."""
    cache = model.new_cache(length + max(grid) + 1)
    cache.length = length
    peaks = {}
    for n in grid if model.device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        verify_once(model, cache, n)
        peaks[n] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return {n: round(ms, 3) for n, ms in
            median_ms({n: (lambda n=n: verify_once(model, cache, n)) for n in grid}, repeats).items()}, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=list(SHAPES))
    parser.add_argument("--layers", type=at_least(1), help="fewer than the shape has, where memory is short")
    parser.add_argument("--length", type=at_least(3), default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--compile", action="store_true", help="compile it")
    parser.add_argument("--repeats", type=at_least(1), default=15)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    config = SHAPES[args.shape]
    run.writable(args.json)
    device = run.choose_device(args.device)
    if device.index:
        torch.cuda.set_device(device)
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers,
                         moe_layers=tuple(i for i in config.moe_layers if i < args.layers))
    dtype = getattr(torch, args.dtype)
    blocks = run.choose_products(args.compile, device, dtype)
    model = random_model(config, dtype, device, blocks)
    model.compiled = args.compile
    if blocks:
        model.kernels = kernels(model)
        if not model.kernels:
            raise ValueError(f"--compile takes, on a CPU, dense models; --shape is {args.shape}")
    times, peaks = curve(model, args.length, [0, 1, 3, 7, 15, 31, 60], args.repeats)
    speed = bandwidth(model.device)
    floor = bytes_read(model) / speed / 1e6
    report = {"command": command_line("tools/latency_curve.py"),
              "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine(),
              "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": args.dtype,
              "compiled": args.compile, "layers": config.num_hidden_layers, "committed_tokens": args.length,
              "gigabytes_per_second": round(speed, 1), "floor_ms_one_row": round(floor, 3),
              "milliseconds_by_nodes": times, "over_floor": round(times[0] / floor, 3),
              "verify_8_over_plain": round(times[7] / times[0], 3), "peak_mebibytes_by_nodes": peaks}
    print(json.dumps(report, indent=1))
    run.write(args.json, report)


if __name__ == "__main__":
    tool(main)
