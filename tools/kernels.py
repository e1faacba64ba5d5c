"""On a CPU: compile what stands between a layer's matrix products; `run.py --compile` does it there.

A small model's step is thirty small operations a layer, and torch takes as long to dispatch one as to compute it. torch.export and
AOTInductor make three functions of them, for any number of tokens and any length of text, in some ten seconds each and once for a model's
shapes, dtype and machine: they are kept in Graft's cache folder. They are called as AOTInductor's loader offers them: torch.compile looks
before each call whether what it compiled still holds, which takes longer here than the call. A C++ compiler is needed.
"""

import hashlib
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from demo_model import cache_folder, filled
from model import Kernels, ModelConfig, gated, join, turn


class Read(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.h, self.k, self.d, self.eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps

    def forward(self, rows: Tensor, cos: Tensor, sin: Tensor, kept: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        n, m = rows.shape[1], mask.shape[3]
        norms = [partial(F.rms_norm, normalized_shape=(self.d,), weight=weight, eps=self.eps) for weight in weights]
        queries, new = turn(rows, (cos, sin), self.h, self.k, norms)
        kept.narrow(2, m - n, n).copy_(new)
        keys, values = kept.narrow(2, 0, m).chunk(2, dim=1)
        if rows.dtype != torch.float32:                        # oneDNN would compile products for every m
            return join(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask), n)
        scores = queries[0] @ keys[0].transpose(1, 2) * self.d**-0.5 + mask[0]   # few rows: in half to two thirds of the fused kernel's time
        return join((scores.softmax(-1) @ values[0])[None], n)


class AddNorm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = x + added
        return x, F.rms_norm(x, weight.shape, weight, self.eps)


class Gate(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return gated(rows)


def examples(config: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], tuple[dict | None, ...]]]:
    """Each function with arguments to trace it by, and which of their sizes vary."""
    h, k, d, H, n, m = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size, 6, 45
    zeros, vary = partial(torch.zeros, 1, dtype=dtype), torch.export.Dim.AUTO
    heads, norms = h + 2 * k, [torch.zeros(d, dtype=dtype) for _ in range(2 * config.qk_norm)]
    read = (zeros(n, heads * d), zeros(n, heads, d), zeros(n, heads, d), zeros(2 * k, 77, d), zeros(1, h // k * n, m), *norms)
    return {"read": (Read(config), read, ({1: vary}, {1: vary}, {1: vary}, {2: vary}, {2: vary, 3: vary}, *[(None, None)] * config.qk_norm)),
            "add_norm": (AddNorm(config), (zeros(n, H), zeros(n, H), torch.zeros(H, dtype=dtype)), ({1: vary}, {1: vary}, None)),
            "gate": (Gate(), (zeros(n, 2 * config.intermediate_size),), ({1: vary},))}


def place(config: ModelConfig, dtype: torch.dtype) -> Path:
    """The folder for functions of these shapes, of this source, machine and torch."""
    shapes = [getattr(config, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "qk_norm")]
    processor, cpuinfo = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()], Path("/proc/cpuinfo")
    if cpuinfo.exists():                                       # what it can: code for another one may not run
        processor += [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    source = [Path(file).read_text(encoding="utf-8") for file in (__file__, model.__file__)]
    return cache_folder() / f"kernels-{hashlib.sha256(repr((shapes, dtype, processor, torch.__version__, source)).encode()).hexdigest()[:16]}"


def build(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Compile the functions into a folder, which is there once they all are."""
    import torch._inductor
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")    # torch's own, about its own
    options = {"cpp.threads": 1, "compile_threads": 1}         # a function is done before a second thread has woken up
    with filled(folder, "gate.pt2") as whole:
        whole.mkdir()
        for name, (function, arguments, vary) in examples(config, dtype).items():
            with torch.no_grad():
                exported = torch.export.export(function, arguments, dynamic_shapes=vary)
            torch._inductor.aoti_compile_and_package(exported, package_path=str(whole / f"{name}.pt2"), inductor_configs=options)


def load(folder: Path) -> Kernels:
    from torch._C._aoti import AOTIModelPackageLoader          # what torch._inductor.aoti_load_package wraps, without importing the compiler
    return Kernels(*(AOTIModelPackageLoader(str(folder / f"{field.name}.pt2"), "model", True, 1, -1).boxed_run for field in fields(Kernels)))


def kernels(config: ModelConfig, dtype: torch.dtype, say: Callable = print) -> Kernels:
    """The functions of a network, compiled where no earlier run did. dtype: of decoding. Raises ValueError where they cannot be had."""
    if config.moe_layers:
        raise ValueError("--compile on a CPU takes a dense model, and this one is a mixture of experts; leave it out")
    folder = place(config, dtype)
    if not folder.is_dir():
        begin = time.perf_counter()
        say("Compiling for this model's shapes, once on this machine: a minute or less ...")
        try:
            build(folder, config, dtype)
        except Exception as error:  # theirs are of many kinds
            raise ValueError(f"--compile needs torch's AOTInductor and a C++ compiler, which failed here: {' '.join(str(error).split())[:200]}") from None
        say(f"... compiled in {time.perf_counter() - begin:.0f} s")
    try:
        return load(folder)
    except RuntimeError as error:
        raise ValueError(f"{folder}: not what --compile put there; delete that folder ({str(error).splitlines()[0]:.100})") from None
