"""On a CPU: compile a layer's matrix products and what stands between them; `run.py --compile` does it there.

The products of a few rows with weights that come from memory are the C++ of `product.cpp`, which is compiled in a second. Between them a
small model's step is thirty small operations a layer, and torch takes as long to dispatch one as to compute it. torch.export and
AOTInductor make three functions of them, for any number of tokens and any length of text, in some ten seconds each and once for a model's
shapes, dtype and machine. They are called as AOTInductor's loader offers them: torch.compile looks before each call whether what it
compiled still holds, which takes longer here than the call. Both are kept in Graft's cache folder; a C++ compiler is needed.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
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
from model import Kernels, ModelConfig, gated, join, rotary, turn

THREADS = min(2, torch.get_num_threads())   # of what stands between the products: a second one is awake from those, more have too little to do


class Read(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.h, self.k, self.d, self.eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps

    def forward(self, rows: Tensor, cos: Tensor, sin: Tensor, kept: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        n, m = rows.shape[1], mask.shape[3]
        norms = [partial(F.rms_norm, normalized_shape=(self.d,), weight=weight, eps=self.eps) for weight in weights]
        queries, new = turn(rows, rotary((cos, sin), self.h, self.k), self.h, self.k, norms)
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
    read = (zeros(n, heads * d), zeros(n, 1, d), zeros(n, 1, d), zeros(2 * k, 77, d), zeros(1, h // k * n, m), *norms)
    return {"read": (Read(config), read, ({1: vary}, {1: vary}, {1: vary}, {2: vary}, {2: vary, 3: vary}, *[(None, None)] * config.qk_norm)),
            "add_norm": (AddNorm(config), (zeros(n, H), zeros(n, H), torch.zeros(H, dtype=dtype)), ({1: vary}, {1: vary}, None)),
            "gate": (Gate(), (zeros(n, 2 * config.intermediate_size),), ({1: vary},))}


def place(name: str, sources: list, *what) -> Path:
    """The folder for what is compiled from these sources, for this processor and torch, and for `what` else decides it."""
    processor, cpuinfo = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()], Path("/proc/cpuinfo")
    if cpuinfo.exists():                                       # what it can: code for another one may not run
        processor += [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    texts = [Path(file).read_text(encoding="utf-8") for file in sources]
    return cache_folder() / f"{name}-{hashlib.sha256(repr((what, processor, torch.__version__, texts)).encode()).hexdigest()[:16]}"


def build(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Compile the functions into a folder, which is there once they all are."""
    import torch._inductor
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")    # torch's own, about its own
    options = {"cpp.threads": THREADS, "compile_threads": 1}
    with filled(folder, "gate.pt2") as whole:
        whole.mkdir()
        for name, (function, arguments, vary) in examples(config, dtype).items():
            with torch.no_grad():
                exported = torch.export.export(function, arguments, dynamic_shapes=vary)
            torch._inductor.aoti_compile_and_package(exported, package_path=str(whole / f"{name}.pt2"), inductor_configs=options)


def load(folder: Path) -> Kernels:
    from torch._C._aoti import AOTIModelPackageLoader          # what torch._inductor.aoti_load_package wraps, without importing the compiler
    return Kernels(*(AOTIModelPackageLoader(str(folder / f"{field.name}.pt2"), "model", True, 1, -1).boxed_run for field in fields(Kernels)))


def loaded(load: Callable, folder: Path):
    """What `load` makes of a folder of compiled code. Raises ValueError where it is damaged."""
    try:
        return load(folder)
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: not what --compile put there; delete that folder ({str(error).splitlines()[0]:.100})") from None


def kernels(config: ModelConfig, dtype: torch.dtype, say: Callable = print) -> Kernels:
    """The functions of a network, compiled where no earlier run did. dtype: of decoding. Raises ValueError where they cannot be had."""
    if config.moe_layers:
        raise ValueError("--compile on a CPU takes a dense model, and this one is a mixture of experts; leave it out")
    shapes = [getattr(config, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "qk_norm")]
    folder = place("kernels", [__file__, model.__file__], shapes, dtype, THREADS)
    if not folder.is_dir():
        begin = time.perf_counter()
        say("Compiling for this model's shapes, once on this machine: a minute or less ...")
        try:
            build(folder, config, dtype)
        except Exception as error:  # theirs are of many kinds
            raise ValueError(f"--compile needs torch's AOTInductor and a C++ compiler, which failed here: {' '.join(str(error).split())[:200]}") from None
        say(f"... compiled in {time.perf_counter() - begin:.0f} s")
    return loaded(load, folder)


# ----------------------------------------------------------------------------------------------------------- products

class Blocks:
    """x @ weight.T in float32 by tools/product.cpp, for a matrix [outputs, inputs] in bfloat16, `outputs` being a multiple of the block."""

    def __init__(self, run: Callable, block: int, weight: Tensor):
        self.outputs, self.inputs = weight.shape
        self.weight = weight.view(-1, 2, block // 2, self.inputs).permute(0, 3, 2, 1).contiguous()
        self.run, self.block, self.pointer = run, block, self.weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        x = x.contiguous()
        *rows, inputs = x.shape
        if inputs != self.inputs or x.dtype != torch.float32:
            raise ValueError(f"a compiled product takes rows of {self.inputs} in float32; these are of {inputs} in {x.dtype}")
        out = x.new_empty(*rows, self.outputs)
        self.run(self.pointer, x.data_ptr(), out.data_ptr(), x.numel() // inputs, inputs, self.outputs, torch.get_num_threads())
        return out


def load_products(folder: Path) -> Callable:
    code = ctypes.CDLL(str(folder / "product.so"))
    run, block = code.product, ctypes.c_int64.in_dll(code, "block_size").value
    run.argtypes, run.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4, None

    def blocks(weight: Tensor) -> Blocks | None:
        narrow = weight.bfloat16()
        same = (torch.equal(part.to(weight.dtype), other) for part, other in zip(narrow.split(4096), weight.split(4096)))
        return Blocks(run, block, narrow) if len(weight) % block == 0 and all(same) else None

    return blocks


def products() -> Callable:
    """From a matrix to its Blocks, or None where it cannot have any; compiled where no earlier run did. Raises ValueError where there is no
    compiler."""
    source, compiler = Path(__file__).with_name("product.cpp"), os.environ.get("CXX", "g++")
    folder = place("product", [source], compiler)
    if not folder.is_dir():
        with filled(folder, "product.so") as whole:
            whole.mkdir()
            flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
            try:
                subprocess.run([*shlex.split(compiler), *flags, str(source), "-o", str(whole / "product.so")], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or str(error)
                raise ValueError(f"--compile needs a C++ compiler, and {compiler!r} failed here: {' '.join(said.split())[:200]}") from None
    return loaded(load_products, folder)
