"""On a CPU, in float32 and bfloat16: matrix products, and all layers of a forward, in C++. `run.py` uses it where it
can.

In bfloat16 that is what products read, attention's too, and what caches hold; all sums, norms and what goes from layer
to layer are float32's.

The products of a few rows with weights that come from memory take half as long as FBGEMM's. Between them a small
model's step is thirty small operations a layer, and torch takes as long to dispatch one as to compute it; here one call
runs all layers. `kernels.cpp` is compiled in some seconds, once for a machine, and kept in Graft's cache folder; a C++
compiler is needed. (torch.compile slows a CPU down: before each call it looks whether what it made still holds, which
takes longer than the call.)
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_model import cache_folder, filled
from model import KVCache, Linear, PackedCache, _Decoder

SOURCE = Path(__file__).with_name("kernels.cpp")
# aligned: where a loop begins decides on a twelfth of its speed
FLAGS = "-O3 -march=native -fno-strict-aliasing -falign-loops=64 -std=c++17 -fopenmp -shared -fPIC".split()
NUMBER, POINTER = ctypes.c_int64, ctypes.c_void_p


class Call(ctypes.Structure):
    _fields_ = [*((name, NUMBER) for name in
                  "n first texts h k d threads layers inputs hidden middle taps narrow".split()),
                *((name, ctypes.c_float) for name in ("eps", "factor"))]


class Text(ctypes.Structure):
    """Of a call."""

    _fields_ = [*((name, NUMBER) for name in "n m w causal capacity".split()),
                *((name, POINTER) for name in ("cache", "mask"))]


class Weights(ctypes.Structure):
    """Of a layer."""

    _fields_ = [*((name, POINTER) for name in
                  "qkv o gate_up down input_norm attention_norm query_norm key_norm hidden_norm".split()),
                ("index", NUMBER)]


def compiler() -> list[str]:
    """Its command."""
    command = os.environ.get("CXX", "").strip() or "g++"
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"CXX is {command!r}, which is no command ({error})") from None


def library() -> ctypes.CDLL:
    """kernels.cpp, compiled where no earlier run did. Raises ValueError where there is no compiler, or where what was
    kept is damaged."""
    return _library(tuple(compiler()), cache_folder())


@lru_cache(None)
def _library(command: tuple[str, ...], kept: Path) -> ctypes.CDLL:
    cpuinfo = Path("/proc/cpuinfo")
    processor = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    if cpuinfo.exists():                                       # what it can: code for another one may not run
        processor += [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    key = repr((command, FLAGS, processor, SOURCE.read_text(encoding="utf-8"))).encode()
    folder = kept / f"kernels-{hashlib.sha256(key).hexdigest()[:16]}"
    if not folder.is_dir():
        print(f"Compiling {SOURCE.name} for this machine, once: some seconds ...", file=sys.stderr, flush=True)
        with filled(folder, "kernels.so") as whole:
            whole.mkdir()
            try:
                subprocess.run([*command, *FLAGS, str(SOURCE), "-o", str(whole / "kernels.so")],
                               check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or str(error)
                raise ValueError(f"--compile needs a C++ compiler, and {' '.join(command)!r} failed here: "
                                 f"{' '.join(said.split())[:200]}") from None
    try:
        code = ctypes.CDLL(str(folder / "kernels.so"))
        code.product.argtypes = [POINTER] * 3 + [NUMBER] * 5
        code.pack.argtypes = [POINTER] * 2 + [NUMBER] * 3
        code.layers.argtypes = [POINTER] * 12
        code.context.argtypes = [POINTER] * 6
        code.top.argtypes = [POINTER] + [NUMBER] * 5 + [POINTER] * 2
    except (OSError, AttributeError) as error:
        raise ValueError(f"{folder}: not what --compile put there; delete that folder "
                         f"({str(error).splitlines()[0]:.100})") from None
    code.product.restype = code.layers.restype = code.context.restype = code.top.restype = None
    return code


def instructions(dtype: torch.dtype) -> str:
    """What the library was compiled for, as far as products in a dtype use it."""
    capability = torch.backends.cpu.get_cpu_capability()
    wide, narrows = constant("block_size") == 32, dtype == torch.bfloat16 and constant("narrows")
    return (("avx512-bf16" if narrows else "avx512") if wide else
            "avx2" if capability.startswith("AVX") else capability.lower().replace(" ", "-"))


def constant(name: str) -> int:
    """One of the library's."""
    return NUMBER.in_dll(library(), name).value


class Blocks:
    """x @ weight.T for a matrix [outputs, inputs] that bfloat16 holds, in the dtype that it was given in: in bfloat16
    (`narrow`) x is rounded to that too. Sums are float32's either way. whole: its outputs as packed, with rows of zeros
    up to a multiple of the block."""

    def __init__(self, run: Callable, weight: Tensor, outputs: int, whole: int, inputs: int, narrow: bool):
        self.run, self.weight, self.outputs, self.whole, self.inputs, self.narrow, self.data_ptr = (
            run, weight, outputs, whole, inputs, narrow, weight.data_ptr)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], of x's dtype."""
        dtype, (*rows, inputs) = x.dtype, x.shape
        if inputs != self.inputs or dtype != torch.float32 and not (self.narrow and dtype == torch.bfloat16):
            raise ValueError(f"a compiled product takes rows of {self.inputs} in float32"
                             f"{' or bfloat16' if self.narrow else ''}; these are of {inputs} in {dtype}")
        x = x.float().contiguous()
        out = x.new_empty(*rows, self.whole)
        self.run(self.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel() // inputs, inputs, self.whole,
                 torch.get_num_threads(), self.narrow)
        return (out if self.whole == self.outputs else out[..., :self.outputs]).to(dtype)


def products() -> Callable:
    """From a matrix to its Blocks, or None where it cannot have any. Raises what `library` does."""
    code, block = library(), constant("block_size")

    def blocks(weight: Tensor) -> Blocks | None:
        (outputs, inputs), narrow = weight.shape, weight.dtype == torch.bfloat16
        if narrow and inputs % 2 or not (narrow or weight.dtype == torch.float32):
            return None
        weight = weight.float().contiguous()
        if outputs % block:
            weight = F.pad(weight, (0, 0, 0, -outputs % block))
        packed = torch.empty(len(weight) // block, inputs, block // 2, dtype=torch.int32)
        return (Blocks(code.product, packed, outputs, len(weight), inputs, narrow)
                if code.pack(weight.data_ptr(), packed.data_ptr(), len(weight), inputs, narrow) else None)

    return blocks


def matrices(layer: nn.Module) -> list[Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]


class Layers:
    """All layers of a dense network whose matrices are Blocks, or some of them, and its last norm; or the one layer of
    an EAGLE-3 head."""

    def __init__(self, network: _Decoder, layers: list[nn.Module]):
        config, code = network.config, library()
        self.run, self.read_only, self.find, self.inverse, self.norm = (
            code.layers, code.context, code.top, network.inverse.float(), network.norm.weight.float())
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.sizes = len(layers), layers[0].self_attn.qkv_proj.inputs, config.hidden_size, config.intermediate_size
        self.dtype = network.norm.weight.dtype
        self.eps, self.factor = config.rms_norm_eps, network.rope_factor
        self.weights, self.held = (Weights * len(layers))(), []  # held: alive as long as the pointers to them
        for weights, layer in zip(self.weights, layers):
            attention = layer.self_attn
            found = dict(zip("qkv o gate_up down".split(), (linear.blocks for linear in matrices(layer))))
            norms = dict(input_norm=layer.input_layernorm, attention_norm=layer.post_attention_layernorm,
                         hidden_norm=getattr(layer, "hidden_norm", None))
            norms |= dict(query_norm=attention.q_norm, key_norm=attention.k_norm) if attention.qk_norm else {}
            found |= {name: norm.weight.float() for name, norm in norms.items() if norm}
            self.held.append(found)
            weights.index = getattr(layer, "index", 0)
            for name, each in found.items():
                setattr(weights, name, each.data_ptr())

    def fit(self, x: Tensor, mask: Tensor | list | None, cache: KVCache | PackedCache) -> bool:
        """Whether a forward of x [b, n, H] can be run so."""
        return x.dtype in (self.dtype, torch.float32) and x.shape[0] == 1 and all(
            type(own) is KVCache and own.rows.dtype == self.dtype and 0 < n <= own.capacity - own.length
            and (seen is None or seen.dim() == 2 and len(seen) == n and seen.shape[1] <= own.length + n)
            for own, n, seen in self.texts(x, mask, cache))

    @staticmethod
    def texts(x: Tensor, mask: Tensor | list | None, cache: KVCache | PackedCache) -> list[tuple]:
        """Of each text in x: its cache, number of tokens, and mask."""
        if type(cache) is PackedCache:
            return list(zip(cache.caches, cache.sizes, mask))
        return [(cache, x.shape[1], mask)]

    def call(self, x: Tensor, cache: KVCache | PackedCache, mask: Tensor | list | None = None, causal: bool = False,
             first: int = 0, taps: int = 0) -> tuple[Call, ctypes.Array, list]:
        """What C is told, and what must live as long."""
        texts = [(own, n, seen if seen is None else seen.contiguous()) for own, n, seen in self.texts(x, mask, cache)]
        return (Call(x.shape[1], first, len(texts), *self.heads, torch.get_num_threads(), *self.sizes, taps,
                     self.dtype == torch.bfloat16, self.eps, self.factor),
                (Text * len(texts))(*(
                    (n, own.length + n, 0 if seen is None else seen.shape[1], causal and seen is None, own.capacity,
                     own.rows.data_ptr(), None if seen is None else seen.data_ptr()) for own, n, seen in texts)),
                texts)

    def read(self, x: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Write the keys and values that x [1, n, inputs] makes in each layer, at positions [1, n], behind the
        committed ones."""
        (call, texts, _), x, positions = self.call(x, cache), x.float().contiguous(), positions.contiguous()
        self.read_only(*map(ctypes.addressof, (call, texts, self.weights)),
                       *(each.data_ptr() for each in (x, positions, self.inverse)))

    def __call__(self, x: Tensor, positions: Tensor, mask: Tensor | list | None, cache: KVCache | PackedCache,
                 taps: tuple[int, ...] = (), causal: bool = False, alone: bool = False,
                 given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """In float32 what comes out of the last layer [1, n, H], its norm, and features [1, n, len(taps) * H] as
        `Model.forward` returns them. positions [1, n]. mask: bool [n, w], True = attend, for the last w columns; None:
        all are attended to, or with `causal` those up to each token's own; a list of such masks with a PackedCache.
        alone: the last layer gives what the last token needs, [1, 1, H]. given: a head's embeddings [1, n, H]."""
        _, n, size = x.shape
        first = n - 1 if alone else 0
        call, texts, held = self.call(x, cache, mask, causal, first, len(taps))
        x, positions = x.float().contiguous(), positions.contiguous()
        given = given if given is None else given.to(x).contiguous()
        out, normed, features = (torch.empty_like(x), x.new_empty(1, n - first, size),
                                 x.new_empty(1, n, len(taps) * size) if taps else None)
        tensors = x, given, positions, self.inverse, self.norm, None, features, out, normed
        pointers = [each if each is None else each.data_ptr() for each in tensors]
        pointers[5] = (NUMBER * len(taps))(*taps)
        self.run(*map(ctypes.addressof, (call, texts, self.weights)), *pointers)
        return out[:, first:], normed, features

    def top(self, logits: Tensor, k: int, logs: bool = False) -> tuple[Tensor, Tensor]:
        """`topk` of each row [n, V] in float32, of equals the first, best first; with `logs`, of its log-softmax. A row
        that holds what is no number gives none."""
        logits = logits.contiguous()
        n, size = logits.shape
        values, places = logits.new_empty(n, k), logits.new_empty(n, k, dtype=torch.int64)
        self.find(logits.data_ptr(), n, size, k, logs, torch.get_num_threads(), values.data_ptr(), places.data_ptr())
        return values, places


def kernels(network: _Decoder) -> Layers | None:
    """A network's layers, or None where one of its matrices is no Blocks, or an expert's, or where the outputs of one,
    or in bfloat16 a head's size, are no multiple of the block. Raises what `library` does."""
    layers = list(getattr(network, "layers", [network]))                           # a head is its only layer
    dense, whole = not network.config.moe_layers, (network.norm.weight.dtype == torch.float32
                                                   or network.config.head_dim % constant("block_size") == 0)
    return (Layers(network, layers) if dense and whole
            and all(linear.blocks and linear.blocks.whole == linear.blocks.outputs
                    for layer in layers for linear in matrices(layer)) else None)
