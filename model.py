"""The models: a decoder for Llama 2/3.x, SmolLM2, Qwen3 and Qwen3-MoE, and the EAGLE-3 draft head.

Nothing here knows about trees. One `forward(tokens, positions, cache, mask)` serves chunked prefill, plain decoding and
the verification of any tree, because positions and mask are arguments.

Letters in shapes: b batch, n new tokens, m tokens attended to, V vocabulary, H hidden size, h query heads,
k key/value heads, g = h / k, d head size, I MLP size, E experts, L layers.
"""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
# what weights and ids come as
FLOATS, INTEGERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16), (torch.int64, torch.int32)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names the file, the field, and what is accepted."""


# ------------------------------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that decide the computation, under the names of transformers."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: dict                           # {"rope_type": ..., "rope_theta": ..., and what that type needs}
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    qk_norm: bool = False                # Qwen3: RMSNorm of each query and key head
    num_experts: int = 0                 # Qwen3-MoE; 0 = dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    moe_layers: tuple[int, ...] = ()
    draft_vocab_size: int = 0            # EAGLE-3 heads only, as the two below
    target_hidden_size: int = 0
    taps: tuple[int, ...] = ()           # outputs of these layers (-1: the embeddings) feed the head

    @classmethod
    def read(cls, folder: Path, *, head: bool = False, architectures: tuple[str, ...] = ARCHITECTURES) -> "ModelConfig":
        """Read and check `folder/config.json`. Raises CheckpointError naming the field,
        its value and what is accepted."""
        path = Path(folder) / "config.json"
        raw = read_json(path)

        def get(name, kind, default=None, low=None, high=2**31):
            value = raw.get(name)
            if value is None:
                value = default
            if value is None:
                raise CheckpointError(f"{path}: field '{name}' is missing; expected {kind.__name__}")
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind or (low is not None and not low <= value <= high):
                bounds = "" if low is None else f" from {low} to {high}"
                raise CheckpointError(f"{path}: field '{name}' is {value!r:.80}; expected {kind.__name__}{bounds}")
            return value

        for name, accepted in (("attention_bias", False), ("mlp_bias", False), ("use_sliding_window", False),
                               ("hidden_act", "silu"), ("quantization_config", None)):
            if raw.get(name, accepted) not in (accepted, None):
                raise CheckpointError(f"{path}: field '{name}' is {raw[name]!r:.80}; only {accepted!r} is supported")
        names = raw.get("architectures") or ["LlamaForCausalLM" if head else None]
        arch = names[0] if isinstance(names, list) and names else names
        if not head and arch not in architectures:
            raise CheckpointError(f"{path}: architecture {arch!r} is unknown; supported: {', '.join(architectures)}")
        hidden = get("hidden_size", int, low=1, high=2**20)
        heads = get("num_attention_heads", int, low=1, high=2**12)
        kv_heads = get("num_key_value_heads", int, heads, low=1, high=heads)
        if heads % kv_heads:
            raise CheckpointError(f"{path}: field 'num_key_value_heads' is {kv_heads}; "
                                  f"expected a divisor of {heads} heads")
        layers = get("num_hidden_layers", int, low=1, high=2**10)
        head_dim = get("head_dim", int, hidden // heads, low=2, high=2**12)
        if head_dim % 2:
            raise CheckpointError(f"{path}: field 'head_dim' is {head_dim}; expected an even number")
        context = get("max_position_embeddings", int, 2048 if head else None, low=1)
        eos = raw.get("eos_token_id")
        eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if not all(type(e) is int for e in eos):
            raise CheckpointError(f"{path}: field 'eos_token_id' is {raw['eos_token_id']!r:.80}; "
                                  "expected an int or a list of ints")
        fields = dict(
            architecture=arch, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=context, eos_token_ids=eos,
            vocab_size=get("vocab_size", int, low=1, high=2**24),
            intermediate_size=get("intermediate_size", int, low=1, high=2**24),
            rms_norm_eps=get("rms_norm_eps", float, 1e-6, low=0.0, high=1.0),
            rope=_rope_fields(path, raw, context),
            tie_word_embeddings=get("tie_word_embeddings", bool, False))
        if head:
            aux = get("eagle_config", dict, {}).get("eagle_aux_hidden_state_layer_ids") or []
            if not isinstance(aux, list) or not all(type(i) is int for i in aux) or len(aux) not in (0, 3):
                raise CheckpointError(f"{path}: field 'eagle_aux_hidden_state_layer_ids' is {aux!r:.80}; "
                                      "expected three layer numbers")
            if layers != 1:
                raise CheckpointError(f"{path}: field 'num_hidden_layers' is {layers}; an EAGLE-3 head has 1")
            return cls(
                **fields, taps=tuple(aux), target_hidden_size=get("target_hidden_size", int, hidden, low=1, high=2**20),
                draft_vocab_size=get("draft_vocab_size", int, fields["vocab_size"], low=1, high=fields["vocab_size"]))
        if arch == "Qwen3MoeForCausalLM":
            raw.setdefault("num_experts", raw.get("num_local_experts"))    # its name since transformers 5
            experts = get("num_experts", int, low=1, high=2**14)
            step = get("decoder_sparse_step", int, 1, low=1)
            dense = get("mlp_only_layers", list, [])
            fields |= dict(
                num_experts=experts, num_experts_per_tok=get("num_experts_per_tok", int, low=1, high=experts),
                moe_intermediate_size=get("moe_intermediate_size", int, low=1, high=2**24),
                norm_topk_prob=get("norm_topk_prob", bool, False),
                moe_layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0))
        return cls(**fields, qk_norm=arch.startswith("Qwen3"))


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found; a checkpoint folder needs it") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}; expected a JSON object")
    return raw


def _rope_fields(path: Path, raw: dict, context: int) -> dict:
    """Old files keep `rope_theta` and `rope_scaling`, newer ones `rope_parameters`; return one dict with every
    number checked."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise CheckpointError(f"{path}: field '{name}' is {raw[name]!r:.80}; expected a JSON object")
        rope |= raw.get(name) or {}
    kind = rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    needs = {"default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in needs:
        raise CheckpointError(f"{path}: field 'rope_type' is {kind!r:.80}; supported: {', '.join(needs)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise CheckpointError(f"{path}: field 'partial_rotary_factor' is not supported")
    rope.setdefault("original_max_position_embeddings", context)
    extras = [name for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
              if rope.get(name)]
    for name in ("rope_theta", *needs[kind], *extras):
        value, low = rope.get(name), 1 if name == "rope_theta" else 0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e15:
            raise CheckpointError(f"{path}: field '{name}' of the rope parameters is {value!r:.80}; "
                                  f"expected a number above {low}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise CheckpointError(f"{path}: field 'low_freq_factor' is {rope['low_freq_factor']}; "
                              "expected less than high_freq_factor")
    return rope


def rope_frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [d/2] (float32, as every published checkpoint was trained) and the factor on cos and sin.

    `llama3` after Meta's Llama 3.1 release, `yarn` after Peng et al. (arXiv 2309.00071),
    both as transformers computes them.
    """
    theta, kind, dims = rope["rope_theta"], rope["rope_type"], head_dim
    inverse = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if kind == "linear":
        return inverse / rope["factor"], 1.0
    if kind == "llama3":
        wavelength = 2 * math.pi / inverse
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)      # 0: long waves, slowed down; 1: short waves, kept
        return (1 - smooth) * inverse / factor + smooth * inverse, 1.0
    if kind == "yarn":
        factor, original = rope["factor"], rope["original_max_position_embeddings"]

        def dimension(turns):  # the dimension whose wave makes this many turns over the original context
            return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        mscale = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
        attention = rope.get("attention_factor")
        if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
        return inverse / factor * ramp + inverse * (1 - ramp), attention if attention is not None else mscale(1)
    return inverse, 1.0


# ---------------------------------------------------------------------------------------------------------- attention

FEW = 64  # rows of queries, up to which a forward is decoding or verification rather than a prompt


def by_products(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` runs as plain matrix products: in bfloat16 on a CPU those take half the time of torch's fused
    kernel where there is much to do. oneDNN compiles and keeps a megabyte of code for every shape that they have: let
    it see only whole chunks of a prompt, and few rows over a long cache of round size."""
    return (dtype == torch.bfloat16 and device.type == "cpu" and columns % 256 == 0
            and (rows % 256 == 0 or rows <= FEW and columns >= 2048))


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(queries keys^T / sqrt(d) + mask) values: queries [b, k, r, d], keys and values [b, k, m, d],
    mask [b, 1, r, w] for the last w of the m columns (all of them where `by_products` says no), or None.
    Returns [b, k, r, d].

    The products' scores are rounded to bfloat16, so each row is first shifted by its maximum over some columns (the
    first 32, and 32 before the mask), which softmax does not see; that halves the error."""
    (b, k, r, d), m = queries.shape, keys.shape[2]
    if not by_products(r, m, queries.device, queries.dtype):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    w, pad = 0 if mask is None else mask.shape[-1], -r % 12 if 4 < r <= FEW else 0
    masks = mask.expand(b, k, -1, -1).flatten(0, 1) if w else None
    queries, keys, values = F.pad(queries, (0, 0, 0, pad)).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    sample = torch.cat((keys[:, :32], keys[:, max(m - w - 32, 0):][:, :32]), dim=1)
    out = torch.empty_like(queries)
    # Few rows: all heads at once. Many: a head and some rows at a time, since larger scores would cost fresh pages
    # from the system.
    heads, most = (b * k, r + pad) if r <= FEW else (1, max(64, 2**23 // m // 64 * 64))
    for head in range(0, b * k, heads):
        key, value, some = keys[head:head + heads], values[head:head + heads], sample[head:head + heads]
        for row in range(0, r, most):
            query = queries[head:head + heads, row:row + most]                         # [heads, rows, d]
            highest = (query @ some.transpose(1, 2)).amax(-1, keepdim=True)
            scores = torch.baddbmm(highest, query, key.transpose(1, 2),
                                   beta=-d**-0.5, alpha=d**-0.5)                       # [heads, rows, m]
            if w:
                scores[:, :r, m - w:] += masks[head:head + heads, row:row + most]
            torch.bmm(scores.softmax(-1), value, out=out[head:head + heads, row:row + most])
    return out[:, :r].view(b, k, r, d)


# -------------------------------------------------------------------------------------------------------------- cache

class KVCache:
    """Static key/value cache [L, b, 2k, capacity, d], keys before values. The first `length` rows are committed; a
    forward writes its n rows behind them, and `commit` says which of those stay."""

    STEP = 512   # rows by which a cache grows, so that a long generation copies it rarely and its size is round
    # with graphs: storage that former caches of the network left, and what is bound to it
    spare: list[tuple[Tensor, dict]] | None = None

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device, batch: int = 1):
        with torch.inference_mode(False):                                              # to be written to in any mode
            self._hold(torch.zeros(config.num_hidden_layers, batch, 2 * config.num_key_value_heads, capacity,
                                   config.head_dim, dtype=dtype, device=device))
        self.length = 0

    def _hold(self, rows: Tensor, graphs: dict | None = None) -> None:
        # unbind: indexing a layer once, not in every forward
        self.rows, self.layers, self.capacity = rows, rows.unbind(0), rows.shape[3]
        self.keys, self.values = rows.chunk(2, dim=2)
        self.graphs = {} if graphs is None else graphs                                 # bound to these very rows

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` rows or some more, keeping what is there."""
        if capacity > self.capacity and self.spare is None:
            with torch.inference_mode(False):                                          # to be written to in any mode
                self._hold(F.pad(self.rows, (0, 0, 0, -(-capacity // self.STEP) * self.STEP - self.capacity)))
        elif capacity > self.capacity:
            old, held, shape, size = self.rows, self.capacity, list(self.rows.shape), roomy(capacity, 4 * self.STEP)
            fitting = [i for i, (rows, _) in enumerate(self.spare) if rows.shape[3] == size]
            if fitting:
                storage = self.spare.pop(max(fitting, key=lambda i: len(self.spare[i][1])))
            else:
                with torch.inference_mode(False):                                      # to be written to in any mode
                    storage = old.new_zeros(*shape[:3], size, shape[4]), {}
            self._leave()
            self._hold(*storage)
            self.rows[:, :, :, held:].zero_()  # what is masked must still be finite
            self.rows[:, :, :, :held] = old

    def _leave(self) -> None:
        """Storage goes to the next cache, so that a new text finds the graphs of the last one."""
        if (self.spare is not None and len(self.spare) < 3 and self.capacity
                and self.capacity == roomy(self.capacity, 4 * self.STEP)):
            self.spare.append((self.rows, self.graphs))

    __del__ = _leave

    def drop(self, count: int) -> None:
        """Forget the first `count` committed rows; the others move to the front."""
        self.rows[:, :, :, :self.length - count] = self.rows[:, :, :, count:self.length].clone()
        self.length -= count

    def columns(self, r: int, n: int) -> int:
        """How many rows r queries read once n rows are written: those, or the whole cache where that
        makes a round size."""
        m = self.length + n
        round_size = (r <= FEW and self.capacity - m <= self.STEP
                      and by_products(r, self.capacity, self.rows.device, self.rows.dtype))
        return self.capacity if round_size else m

    def span(self, n: int) -> int:
        """How many rows, one of few sizes, a graph reads where n follow the committed ones."""
        return min(self.capacity, roomy(self.length + n, self.STEP))

    def write(self, layer: int, rows: Tensor) -> Tensor:
        """Put rows [b, 2k, n, d], keys and values, behind the committed ones; return the layer's cache."""
        n = rows.shape[2]
        if self.length + n > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} rows and {self.length + n} are needed; reserve more")
        self.layers[layer].narrow(2, self.length, n).copy_(rows)  # narrow is indexing, at a third of its time
        return self.layers[layer]

    def attend(self, layer: int, queries: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Write rows [b, 2k, n, d], keys and values, then let queries [b, k, g*n, d] read all that is there;
        returns [b, k, g*n, d]. A mask is for the last of `columns`; without one, what was written last ends them."""
        n = rows.shape[2]
        columns = self.length + n if mask is None else self.columns(queries.shape[2], n)
        kept = self.write(layer, rows).narrow(2, 0, columns)
        return attention(queries, *kept.chunk(2, dim=1), mask)

    def commit(self, rows: list[int]) -> None:
        """Keep these of the rows written last (0 = the first of them; ascending); the others are
        overwritten next time."""
        for to, row in enumerate(rows):  # a path through a tree closes up, in all layers
            if row != to:
                self.rows.select(3, self.length + to).copy_(self.rows.select(3, self.length + row))
        self.length += len(rows)


class NoCache:
    """Attention over the texts of one forward and nothing else: keeps no rows, so gradients pass."""

    length = 0

    def columns(self, r: int, n: int) -> int:
        return n

    def attend(self, layer: int, queries: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        keys, values = rows.chunk(2, dim=1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


class PackedCache:
    """The caches of several texts behind one forward: their tokens stand in one row, text after text, and share every
    matrix product; each attends to its own cache, under its own mask. `commit` is the single caches' business."""

    def __init__(self, caches: list[KVCache], sizes: list[int]):
        self.caches, self.sizes = caches, sizes                                    # sizes: tokens of each in the row

    def attend(self, layer: int, queries: Tensor, rows: Tensor, masks: list[Tensor | None]) -> Tensor:
        k, n, d = queries.shape[1], *rows.shape[2:]
        parts = (x.split(self.sizes, dim=-2) for x in (queries.view(1, k, -1, n, d), rows))
        out = [cache.attend(layer, own.flatten(2, 3), row, mask).view(1, k, own.shape[2], -1, d)
               for cache, mask, own, row in zip(self.caches, masks, *parts)]
        return torch.cat(out, dim=3).flatten(2, 3)


# ------------------------------------------------------------------------------------------------------------- graphs

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)   # tokens of a forward over fixed buffers; fewer are padded


def roomy(rows: int, least: int) -> int:
    """`rows` rounded up to one of few sizes: powers of two, from 8192 on its multiples."""
    return max(least, 1 << (rows - 1).bit_length() if rows <= 8192 else -(-rows // 8192) * 8192)


class StaticCache:
    """The first m rows of a KVCache, for forwards of n tokens whose place is in tensors, so that a CUDA graph can find
    it there: they are written from `length` on. A forward's mask is bool [n, w + 1], for the w columns from `start` on;
    its last column is False."""

    def __init__(self, cache: KVCache, n: int, m: int, w: int = 0, compiled: bool = False):
        self.compiled = compiled  # whether what reads it is compiled first
        self.layers, device = [layer.narrow(2, 0, m) for layer in cache.layers], cache.rows.device
        self.length, self.start = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.seen = torch.ones(n, w + 1, dtype=torch.bool, device=device) if w else None   # a buffer for such a mask
        self.rows, self.columns = torch.arange(n, device=device), torch.arange(m, device=device)

    def mask(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[n, m]: 0 where a token attends, -inf elsewhere; on a GPU no narrower than float32, as scores are there.
        Every row attends to something, the padded ones too."""
        self.index = self.length + self.rows                                       # the rows that are written
        if seen is None:
            allowed = self.columns <= self.index[:, None]
        else:
            allowed = (seen.index_select(1, (self.columns - self.start).clamp(0, seen.shape[1] - 1))
                       | (self.columns < self.start))
        dtype = torch.promote_types(dtype, torch.float32) if allowed.is_cuda else dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)

    def write(self, layer: int, rows: Tensor) -> None:
        self.layers[layer].index_copy_(2, self.index, rows)

    def attend(self, layer: int, queries: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        return attend_static(self.layers[layer], self.index, queries, rows, mask)


def attend_static(kept: Tensor, index: Tensor, queries: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """`KVCache.attend` on one layer's cache [1, 2k, m, d], the rows [1, 2k, n, d] going to index [n]."""
    keys, values = (x[0] for x in kept.index_copy_(2, index, rows).chunk(2, dim=1))
    if not queries.is_cuda:
        return F.scaled_dot_product_attention(queries, keys[None], values[None], attn_mask=mask)
    # Few heads read many columns: plain products spread them over the whole GPU, the fused kernels do not.
    wide, scale = {} if mask.dtype == queries.dtype else {"out_dtype": mask.dtype}, queries.shape[-1]**-0.5
    if torch.compiler.is_compiling():
        scores = torch.bmm(queries[0], keys.transpose(1, 2), **wide) * scale + mask[0]  # [k, g*n, m]
    else:
        scores = torch.baddbmm(mask[0], queries[0], keys.transpose(1, 2), alpha=scale, **wide)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values)[None]


def fused(function: Callable, cache) -> Callable:
    """The function, compiled by torch where a graph is to run it so: small operations in a row become one kernel. For
    any number of tokens and columns, so that it is done twice: for one token, and for more."""
    return _compile(function) if isinstance(cache, StaticCache) and cache.compiled else function


@lru_cache(None)
def _compile(function: Callable) -> Callable:
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor")    # advice to its developers
    return torch.compile(function, dynamic=True, options={"split_reductions": False})      # rows are few and short


class Captured:
    """A function of fixed buffers: on CUDA it is captured once, then replayed in one launch."""

    def __init__(self, network: "_Decoder", function: Callable):
        self.network, self.function, self.graph = network, function, None
        network.captured += 1

    def __call__(self):
        """What the function returns, in tensors that the next call overwrites."""
        if not self.network.inverse.is_cuda:
            return self.function()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.outputs

    def capture(self) -> None:
        """Once eagerly on the stream of the capture, which compiles, sets up kernels and workspaces, then recorded. All
        graphs of a network share their memory: they run one after the other."""
        network, device = self.network, self.network.inverse.device
        with torch.cuda.device(device):
            if network.graph_pool is None:
                network.graph_pool, network.graph_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            network.graph_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(network.graph_stream):
                self.function()
            torch.cuda.current_stream().wait_stream(network.graph_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=network.graph_pool, stream=network.graph_stream,
                                  capture_error_mode="thread_local"):
                self.outputs = self.function()
        self.graph = graph


class Graph(Captured):
    """A network's forward over fixed buffers, for n tokens or fewer.

    A padded row computes from what was last in its buffers; it is written behind the real ones, where nobody looks."""

    def __init__(self, network: "_Decoder", inputs: tuple[Tensor, ...], cache: StaticCache, options: dict):
        self.cache = cache
        self.inputs = [torch.zeros(1, len(cache.rows), *x.shape[2:], dtype=x.dtype, device=x.device) for x in inputs]
        forward = type(network).forward  # not the instance's: tools put clocks around it
        super().__init__(network, lambda: forward(network, *self.inputs, cache, cache.seen, **options))

    def __call__(self, inputs: tuple[Tensor, ...], length: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs [1, n, ...], which the next call overwrites."""
        cache, n = self.cache, inputs[0].shape[1]
        for buffer, x in zip(self.inputs, inputs):
            buffer[:, :n] = x
        cache.length.fill_(length)
        if mask is not None:
            w = mask.shape[1]
            cache.start.fill_(length + n - w)
            cache.seen[:n, w:] = False
            cache.seen[:n, :w] = mask
        return super().__call__()


# ------------------------------------------------------------------------------------------------------------- layers

class Part(nn.Module):
    """A module that is called as a plain function: nn.Module's look for hooks took 5% of a plain decoding step."""

    def __init_subclass__(cls):
        cls.__call__ = cls.forward


def halves_work() -> bool:
    """Whether this CPU's torch multiplies float32 by packed float16 weights."""
    return torch.backends.mkldnn.is_available() and torch.backends.quantized.engine in ("fbgemm", "x86")


def in_threes(x: Tensor) -> Tensor:
    """x [..., n, inputs], with more rows where FBGEMM without AVX512 would sum the last one or two of them, alone or
    behind sixes, in another order."""
    n, rows = x.shape[-2], x.numel() // x.shape[-1]
    if (not (rows in (1, 2, 7, 14) or rows > 30 and rows % 6 in (1, 2))
            or torch.backends.cpu.get_cpu_capability() != "AVX2"):
        return x
    return x.expand(*x.shape[:-2], 3, -1) if n == 1 else F.pad(x, (0, 0, 0, -n % 3))


def half_scale(weight: Tensor) -> float:
    """A power of two times which float16 holds a float32 matrix: no element is off by more than 2^-24 of the
    largest, as little as a float32 product tells. There is one where the matrix was stored in bfloat16 or float16; 0
    where there is none."""
    # most checkpoints, and soon found out
    if all(torch.equal(part.half().float(), part) for part in weight.split(512)):
        return 1.0
    largest = float(weight.abs().max())
    if 2**-20 < largest < 2**20:
        for scale in (1.0, 2.0 ** (15 - math.frexp(largest)[1])):
            scaled = (part * scale for part in weight.split(4096))
            if all((part.half() - part).abs().max() <= 2**-24 * largest * scale for part in scaled):
                return scale
    return 0.0


class Linear(Part):
    """x @ weight.T without bias. After `pack()` on a CPU it runs on prepacked weights. Where bfloat16 holds the matrix
    these may be `blocks` of tools/kernels.py. Else, in bfloat16, oneDNN's, about twice as fast at n = 1 as plain ones,
    and nearly as fast at n = 8 as at n = 1; in float32 FBGEMM's where float16 holds the matrix, which is half as much
    to read, and gives a row the same numbers however many there are; else oneDNN's too."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        # halves: the weights as float16, times scale
        self.inputs, self.packed, self.halves, self.scale = inputs, None, None, 0.0
        self.blocks: Callable | None = None  # a compiled product with the weights

    def pack(self, products: Callable | None = None) -> None:
        """Where that is the faster path: a CPU, in float32 or bfloat16. Inference only. products: makes `blocks` of a
        matrix, or None."""
        weight = self.weight.detach().contiguous()
        if (weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16)
                or not torch.backends.mkldnn.is_available()):
            return
        if products:
            self.blocks = products(weight)
        if self.blocks is None and weight.dtype == torch.float32 and halves_work():
            self.scale = half_scale(weight)
            if self.scale:
                self.halves = torch.ops.quantized.linear_prepack_fp16(
                    weight if self.scale == 1 else weight * self.scale, None)
        if self.blocks is self.halves is None:
            # an x86 CPU without AVX512
            if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks is not None:
            return self.blocks(x)
        if self.halves is not None:
            x, n = x if self.scale == 1 else x * (1 / self.scale), x.shape[-2]
            found = torch.ops.quantized.linear_dynamic_fp16.default(in_threes(x), self.halves)
            return found if found.shape[-2] == n else found[..., :n, :]
        held = self.weight if self.packed is None else self.packed
        if x.dtype != held.dtype:  # behind compiled layers
            return self(x.to(held.dtype)).to(x.dtype)
        if self.packed is None:
            return F.linear(x, self.weight)
        n = x.shape[-2]
        # one row: oneDNN's kernel for five reads the weights faster, and gives the same row
        if x.numel() == x.shape[-1]:
            return self(x.expand(*x.shape[:-2], 5, -1)).narrow(-2, 0, 1)
        if n > 32 and n % 8:  # oneDNN keeps megabytes of code for every number of rows that it has seen: let it see few
            return self(F.pad(x, (0, 0, 0, -n % 8)))[..., :n, :]
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")


class Embedding(Part):
    """nn.Embedding without its first values, for which torch imports 800 modules on the meta device:
    a second of every start."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(Part):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps, self.packed = nn.Parameter(torch.empty(size)), eps, None

    def pack(self) -> None:
        """For float32 on a CPU, where torch's own takes twice the time in small kernels: with n = size, mean(x^2) + eps
        is (|x|^2 + n eps) / n. Inference only."""
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.float32:
            size = len(self.weight)
            self.packed = self.weight.detach() * math.sqrt(size), torch.tensor(math.sqrt(size * self.eps))

    def forward(self, x: Tensor) -> Tensor:
        """In half precision on a CPU the layer norm of (x, -x), whose mean is 0 and whose variance is the mean of x
        squared: one fused kernel instead of eight small ones, and rounded exactly as in transformers. Elsewhere torch's
        own, which in bfloat16 rounds once less."""
        if self.packed is not None and x.dtype == torch.float32:
            weight, least = self.packed
            return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least) * weight
        size = x.shape[-1]
        if x.dtype == self.weight.dtype and (x.is_cuda or x.dtype in (torch.float32, torch.float64)):
            return F.rms_norm(x, (size,), self.weight, self.eps)
        return torch.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=self.eps).narrow(-1, 0, size) * self.weight


def rotary(turns: tuple[Tensor, Tensor], h: int, k: int) -> tuple[Tensor, Tensor]:
    """cos and sin [b, n, 1, d] -> for all heads [b, n, h + 2k, d]. Values do not turn: 1 and 0 there let one product
    serve queries, keys and values."""
    return tuple(F.pad(table.expand(-1, -1, h + k, -1), (0, 0, 0, k), value=value)
                 for table, value in zip(turns, (1.0, 0.0)))


def turn(rows: Tensor, rotary: tuple[Tensor, Tensor], h: int, k: int,
         norms: Sequence[Callable]) -> tuple[Tensor, Tensor]:
    """Rows [b, n, (h + 2k) * d] of `qkv_proj` -> queries [b, k, g*n, d], and keys and values [b, 2k, n, d], at the
    positions of `rotary`. norms: of query heads and key heads, or none. The g query heads that share a key head become
    rows of one attention: no key is read or copied twice."""
    (b, n, _), (cos, sin) = rows.shape, rotary  # [b, n, h + 2k, d]; sin of the first half is negative
    d = cos.shape[-1]
    rows = rows.view(b, n, h + 2 * k, d)
    if norms:
        queries, keys, values = rows.split((h, k, k), dim=2)
        rows = torch.cat((norms[0](queries), norms[1](keys), values), dim=2)
    queries, rows = (rows * cos + rows.roll(d // 2, -1) * sin).split_with_sizes((h, 2 * k), dim=2)
    return queries.view(b, n, k, h // k, d).permute(0, 2, 3, 1, 4).reshape(b, k, -1, d), rows.transpose(1, 2)


def join(out: Tensor, n: int) -> Tensor:
    """What attention gives n tokens, [b, k, g*n, d], as rows [b, n, h * d] for `o_proj`."""
    b, k, r, d = out.shape
    return out.view(b, k, -1, n, d).permute(0, 3, 1, 2, 4).reshape(b, n, k * r // n * d)


class Attention(Part):
    def __init__(self, config: ModelConfig, inputs: int):
        super().__init__()
        self.h, self.k, self.d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = Linear(inputs, (self.h + 2 * self.k) * self.d)
        self.o_proj = Linear(self.h * self.d, config.hidden_size)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.d, config.rms_norm_eps), RMSNorm(self.d, config.rms_norm_eps)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [b, k, g*n, d], and keys and values [b, 2k, n, d], of x [b, n, inputs] at their positions."""
        return turn(self.qkv_proj(x), rotary, self.h, self.k, (self.q_norm, self.k_norm) if self.qk_norm else ())

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, attend: Callable,
                last: bool = False) -> Tensor:
        """attend: a cache's, for one layer. last: only the last of the n tokens reads the cache and gives a result; the
        others just leave their keys and values there."""
        n = x.shape[1]
        queries, rows = self.project(x, rotary)
        if last:
            queries, n, mask = queries[:, :, n - 1::n], 1, None
        return self.o_proj(join(attend(queries, rows, mask), n))


def gated(rows: Tensor) -> Tensor:
    """SwiGLU's middle (Shazeer, arXiv 2002.05202): rows [..., 2I] of a gate and what it lets through -> [..., I]."""
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(Part):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


class MoE(Part):
    """Qwen3-MoE: softmax over all experts, the best `num_experts_per_tok` run, their weights renormalised if asked."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, H, I = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(H, experts)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(experts, H, I))

    def grouped(self) -> bool:
        """Whether all experts run in one launch each way, which nothing has to wait for: F.grouped_mm's terms."""
        weight = self.down_proj
        return (weight.is_cuda and weight.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
                and not any(size % 8 for size in weight.shape[1:]))

    def run_grouped(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """rows [r, H], weights and chosen [r, top_k] -> [r, H]: the pairs of row and expert, sorted by expert."""
        experts, order = chosen.flatten().sort()                                   # [r * top_k]
        ends = torch.searchsorted(experts, torch.arange(len(self.down_proj), device=experts.device),
                                  right=True, out_int32=True)
        middle = gated(F.grouped_mm(rows[order // self.top_k], self.gate_up_proj.transpose(1, 2), offs=ends))
        out = F.grouped_mm(middle, self.down_proj.transpose(1, 2), offs=ends)
        # in the rows' order again [r, top_k, H]
        out = torch.empty_like(out).index_copy_(0, order, out).view(*chosen.shape, -1)
        return (weights[:, None] @ out)[:, 0]  # no atomic adds: the same sum every time

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])                                          # [b*n, H]
        probs = self.gate(rows).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, chosen = probs.topk(self.top_k, dim=-1)                           # [b*n, top_k]
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.grouped():
            return self.run_grouped(rows, weights.to(x.dtype), chosen).view_as(x)
        weights, out = weights.to(x.dtype), torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            row, slot = (chosen == expert).nonzero(as_tuple=True)
            middle = gated(F.linear(rows[row], self.gate_up_proj[expert]))
            out.index_add_(0, row, F.linear(middle, self.down_proj[expert]) * weights[row, slot, None])
        return out.view_as(x)


class Layer(Part):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if index in config.moe_layers else MLP(config)

    def forward(self, x: Tensor, rotary, mask, cache: "KVCache | StaticCache", last: bool = False) -> Tensor:
        static = isinstance(cache, StaticCache)  # compiled code must not depend on the layer's number
        attend = (partial(attend_static, cache.layers[self.index], cache.index) if static else
                  partial(cache.attend, self.index))
        return fused(Layer.run, cache)(self, x, rotary, mask, attend, last)

    def run(self, x: Tensor, rotary, mask, attend: Callable, last: bool) -> Tensor:
        read = self.self_attn(self.input_layernorm(x), rotary, mask, attend, last)
        x = (x[:, -1:] if last else x) + read
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    """What the target and the head share: rotary tables, the shape of the mask, and forwards over fixed buffers.

    graphs: whether short forwards under inference_mode run as CUDA graphs; None: yes on CUDA. True on a CPU runs the
    same buffers uncaptured, for tests. Caches must come from `new_cache` after it is set."""

    graphs: bool | None = None
    graph_pool = graph_stream = None
    captured = 0                      # graphs made so far
    compiled = False                  # whether what graphs run is compiled first
    # on a CPU: all layers in C++, for forwards that its `fit` takes (tools/kernels.py)
    kernels: Callable | None = None
    products: Callable | None = None  # what its matrices were packed by, as `load_model` says

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.spare = config, []
        with torch.device("cpu"):
            inverse, self.rope_factor = rope_frequencies(config.rope, config.head_dim)
        self.register_buffer("inverse", inverse, persistent=False)

    def turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [b, n, 1, d] for positions [b, n], computed in float32. Dimension i turns with i + d/2, the first
        of the two by -sin; the sign is in the table."""
        angles = (positions[..., None].float() * self.inverse)[:, :, None]
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotary(self.turns(positions, dtype), self.config.num_attention_heads, self.config.num_key_value_heads)

    def group(self, mask: Tensor | list | None, n: int, cache: KVCache | PackedCache,
              dtype: torch.dtype) -> Tensor | list | None:
        """A mask [n, w] or [b, n, w] (True = attend; None = causal) as `attention` reads it, made once a forward:
        [b, 1, g*n, w or all columns]."""
        g = self.config.num_attention_heads // self.config.num_key_value_heads
        if isinstance(cache, StaticCache):
            return cache.mask(mask, dtype).repeat(g, 1)[None, None]
        if isinstance(cache, PackedCache):
            return [self.group(own, size, part, dtype) for own, size, part in zip(mask, cache.sizes, cache.caches)]
        m, columns = cache.length + n, cache.columns(g * n, n)
        if mask is None:
            if n == 1 and columns == m:
                return None
            mask = torch.ones(n, n, dtype=torch.bool, device=self.inverse.device).tril()
        if mask.dim() == 2:
            mask = mask[None]
        # SDPA's faster kind
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        if columns > m:  # rows of the cache that nothing was written to
            mask = F.pad(mask, (0, columns - m), value=-torch.inf)
        elif mask.shape[-1] < m and not by_products(g * n, m, mask.device, dtype):
            mask = F.pad(mask, (m - mask.shape[-1], 0))
        return mask[:, None].repeat(1, 1, g, 1)

    def graphed(self, tokens: Tensor, cache, mask: Tensor | None) -> bool:
        """Whether a forward goes over fixed buffers: one text, few tokens, its own cache,
        and no layer that has to wait for numbers."""
        return (self.replays(cache) and tokens.shape[0] == 1 and tokens.shape[1] <= BUCKETS[-1]
                and (mask is None or mask.dim() == 2))

    def replays(self, cache) -> bool:
        """Whether short forwards behind this cache go over fixed buffers."""
        return (type(cache) is KVCache and cache.spare is not None and self.graphs is not False
                and torch.is_inference_mode_enabled() and not (self.inverse.is_cuda and self.waits()))

    def waits(self) -> bool:
        """Whether a layer has to wait for numbers on a GPU: a graph cannot."""
        return False

    def replay(self, inputs: tuple[Tensor, ...], cache: KVCache, mask: Tensor | None, **options) -> list[Tensor | None]:
        """What `forward` returns for all of its tokens, by a graph that is bound to the storage of `cache`,
        made where there is none."""
        n = inputs[0].shape[1]
        padded = next(size for size in BUCKETS if size >= n)
        cache.reserve(cache.length + padded)
        m, w = cache.span(padded), 0 if mask is None else -(-mask.shape[1] // 128) * 128
        key = (id(self), padded, m, w, *options.values())
        if key not in cache.graphs:
            cache.graphs[key] = Graph(self, inputs, StaticCache(cache, padded, m, w, self.compiled), options)
        outputs = cache.graphs[key](inputs, cache.length, mask)
        return [None if out is None else out[:, :n].clone() for out in outputs]

    def new_cache(self, capacity: int) -> KVCache:
        cache = KVCache(self.config, capacity, self.norm.weight.dtype, self.norm.weight.device)
        if self.norm.weight.is_cuda if self.graphs is None else self.graphs:
            cache.spare = self.spare
        return cache


class Model(_Decoder):
    """The target. Build one with `load_model`."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def precision(self) -> str:
        """What --dtype calls it."""
        return str(self.dtype).removeprefix("torch.")

    def waits(self) -> bool:
        sparse = self.config.moe_layers
        # all mixtures are of one shape, dtype and device
        return bool(sparse) and not self.layers[sparse[0]].mlp.grouped()

    def forward(self, tokens: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None = None, *,
                taps: tuple[int, ...] = (), last_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run n new tokens behind the committed rows of `cache`; the caller then commits those that stay.

        tokens, positions: [b, n] int64. mask: bool [n, w] or [b, n, w], True = attend, for the last w of the
        cache.length + n columns; all earlier ones are attended to; None = causal; a list of such masks with a
        PackedCache. taps: layers whose outputs to return (-1 = the embeddings), for a draft head. last_only: logits of
        the last token alone; where attention is causal, the last layer then computes only keys and values for the
        others. Returns logits [b, n or 1, V] and features [b, n, len(taps) * H], or None without taps; from compiled
        layers both in float32.
        """
        if self.graphed(tokens, cache, mask):
            logits, features = self.replay((tokens, positions), cache, mask, taps=taps)
            return logits[:, -1:] if last_only else logits, features
        x = self.embed_tokens(tokens)                                              # [b, n, H]
        final = len(self.layers) - 1
        alone = last_only and mask is None and final not in taps  # only the last token goes through the last layer
        if self.kernels and self.kernels.fit(x, mask, cache):
            _, normed, features = self.kernels(x, positions, mask, cache, taps, causal=True, alone=alone)
        else:
            tapped = {-1: x}
            mask = fused(_Decoder.group, cache)(self, mask, tokens.shape[1], cache, x.dtype)
            rotary = fused(_Decoder.rotary, cache)(self, positions, x.dtype)
            for layer in self.layers:
                x = layer(x, rotary, mask, cache, alone and layer.index == final)
                if layer.index in taps:
                    tapped[layer.index] = x
            normed = self.norm(x[:, -1:] if last_only else x)
            features = torch.cat([tapped[i] for i in taps], dim=-1) if taps else None
        return self.lm_head(normed[:, -1:] if last_only else normed), features


class Eagle3(_Decoder):
    """The EAGLE-3 draft head (Li et al., arXiv 2503.01840; keys and pairing as in the EAGLE and
    SpecForge repositories).

    It reads, at position i, the target's feature of token i and the embedding of token i+1, and guesses token i+2. Its
    cache keeps committed positions only: its own guesses are overwritten by the next round's true features.
    """

    def __init__(self, config: ModelConfig, taps: tuple[int, ...]):
        super().__init__(config)
        H, eps = config.hidden_size, config.rms_norm_eps
        self.taps = taps
        self.fc = Linear(len(taps) * config.target_hidden_size, H)
        self.embed_tokens = Embedding(config.vocab_size, H)
        self.input_layernorm, self.hidden_norm = RMSNorm(H, eps), RMSNorm(H, eps)
        self.self_attn = Attention(config, 2 * H)
        self.post_attention_layernorm = RMSNorm(H, eps)
        self.mlp = MLP(config)
        self.norm = RMSNorm(H, eps)
        self.lm_head = Linear(H, config.draft_vocab_size)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))  # target id - draft id

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Ids in the draft vocabulary -> ids in the target's, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None = None, *,
                last_only: bool = False) -> tuple[Tensor, Tensor]:
        """One draft step. tokens, positions [b, n]; hidden [b, n, H] is `fc(target features)` or this method's own
        second result; mask, last_only as in Model.forward. Returns logits [b, n or 1, draft V] and hidden [b, n, H],
        or [b, 1, H] where only the last token went through the layer."""
        if self.graphed(tokens, cache, mask):
            logits, out = self.replay((tokens, hidden, positions), cache, mask)
            return logits[:, -1:] if last_only else logits, out[:, -1:] if last_only and mask is None else out
        return fused(Eagle3.run, cache)(self, tokens, hidden, positions, cache, mask, last_only)

    def run(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: "KVCache | StaticCache",
            mask: Tensor | None, last_only: bool) -> tuple[Tensor, Tensor]:
        x, alone = self.embed_tokens(tokens), last_only and mask is None
        if self.kernels and self.kernels.fit(hidden, mask, cache):
            hidden, normed, _ = self.kernels(hidden, positions, mask, cache, causal=True, alone=alone, given=x)
        else:
            hidden = hidden.to(x.dtype)  # a compiled target's features are float32's
            x = torch.cat((self.input_layernorm(x), self.hidden_norm(hidden)), dim=-1)                      # [b, n, 2H]
            mask = None if alone else self.group(mask, tokens.shape[1], cache, x.dtype)
            hidden = (hidden[:, -1:] if alone else hidden) + self.self_attn(
                x, self.rotary(positions, x.dtype), mask, partial(cache.attend, 0), alone)
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
            normed = self.norm(hidden[:, -1:] if last_only else hidden)
        return self.lm_head(normed[:, -1:] if last_only else normed), hidden


# ------------------------------------------------------------------------------------------------------------ loading

def fetch_checkpoint(name: str, revision: str | None = None) -> Path:
    """A local folder as it is, or a Hub id through huggingface_hub's cache (HF_HUB_OFFLINE and
    `revision` are honoured)."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"checkpoint {name!r} is neither a folder nor a Hub id such as 'owner/name'")
    from huggingface_hub import errors, snapshot_download
    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "pytorch_model.bin"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint {name!r} is no local folder "
                              f"and could not be had from the Hub: {reason}") from None


class _Tensors:
    """Names, shapes and lazily read tensors of a checkpoint folder: safetensors, sharded or not, or a
    `pytorch_model.bin`."""

    def __init__(self, folder: Path, rename=lambda name: name):
        self.shapes, self.read, self.where = {}, {}, folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
                raise CheckpointError(f"{index}: field 'weight_map' is missing or no object of file names")
            shards, present = sorted(set(names.values())), {path.name for path in folder.iterdir()}
            for shard in shards:
                if shard not in present:
                    raise CheckpointError(f"{index}: names the shard {shard!r:.120}, which is no file in that folder")
        elif (folder / "model.safetensors").exists():
            shards = ["model.safetensors"]
        elif (folder / "pytorch_model.bin").exists():
            path = folder / "pytorch_model.bin"
            try:  # weights_only: tensors and nothing that could run
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensors = {rename(str(name)): value for name, value in tensors.items()}
                self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            except Exception as error:  # torch raises whatever the damage provokes
                raise CheckpointError(f"{path}: not a file of plain tensors "
                                      f"({(str(error) or type(error).__name__).splitlines()[0]:.120})") from None
            self.read = {name: (lambda value=value: value) for name, value in tensors.items()}
            return
        else:
            raise CheckpointError(f"{folder}: holds no model.safetensors, no model.safetensors.index.json "
                                  "and no pytorch_model.bin")
        for shard in shards:
            try:
                with safe_open(folder / shard, framework="pt") as file:
                    for name in file.keys():
                        if rename(name) in self.shapes:
                            raise CheckpointError(f"{folder / shard}: tensor '{name}' is there twice")
                        self.shapes[rename(name)] = tuple(file.get_slice(name).get_shape())
                        self.read[rename(name)] = partial(_read_tensor, folder / shard, name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / shard}: not a whole safetensors file ({error})") from None


def _read_tensor(path: Path, name: str) -> Tensor:
    # a memory map of its own, gone with the tensor: no shard stays in memory
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _fill(module: nn.Module, tensors: _Tensors, parts: dict[str, dict[str, tuple]], dtype, device, optional=(),
          pack: bool = False, tied: bool = False, products: Callable | None = None) -> None:
    """Give every parameter of a meta-device `module` its tensor. `parts` maps a parameter to the tensors of the
    checkpoint, with their shapes, that are stacked to make it. A missing, extra or misshapen tensor is an error that
    names it. With `pack`, matrices are packed. They are read and packed side by side, so that no more of them than
    there are threads, and one, are in memory twice. tied: `lm_head` takes the embeddings."""
    module.products, used, placing, threads = products, set(optional), set(), torch.get_num_threads()

    def place(name: str, value: Tensor, sources: dict[str, tuple]) -> None:
        pieces = []
        for source in sources:
            tensor, accepted = tensors.read[source](), FLOATS if value.is_floating_point() else INTEGERS
            if tensor.dtype not in accepted:
                raise CheckpointError(f"{tensors.where}: tensor '{source}' is of {tensor.dtype}; "
                                      f"expected one of {', '.join(map(str, accepted))}")
            pieces.append(tensor.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype,
                                    copy=True))
        owner, _, own = name.rpartition(".")
        owner = module.get_submodule(owner)
        owner.load_state_dict({own: pieces[0] if len(pieces) == 1 else torch.cat(pieces).view(value.shape)},
                              strict=False, assign=True)
        if tied and name == "embed_tokens.weight":
            module.lm_head.weight, name, owner = owner.weight, "lm_head.weight", module.lm_head
        if pack and isinstance(owner, RMSNorm):
            owner.pack()
        elif pack and isinstance(owner, Linear):
            owner.pack(products)

    with ThreadPoolExecutor(threads) as pool:
        for name, value in module.state_dict().items():
            sources = parts.get(name, {name: tuple(value.shape)})
            for source, shape in sources.items():
                if source not in tensors.shapes:
                    raise CheckpointError(f"{tensors.where}: tensor '{source}' is missing; "
                                          f"expected shape {list(shape)}")
                if tensors.shapes[source] != shape:
                    raise CheckpointError(f"{tensors.where}: tensor '{source}' has shape "
                                          f"{list(tensors.shapes[source])}; config.json implies {list(shape)}")
            used.update(sources)
            placing.add(pool.submit(place, name, value, sources))
            if len(placing) > threads:
                done, placing = wait(placing, return_when=FIRST_COMPLETED)
                [each.result() for each in done]
        [each.result() for each in placing]
    extra = sorted(set(tensors.shapes) - used)
    if extra:
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        raise CheckpointError(f"{tensors.where}: tensor '{extra[0]}'{more} has no place in this architecture")
    module.inverse = module.inverse.to(device)
    module.requires_grad_(False).eval()
    # as plain attributes: nn.Module's search for its parts took 3% of a plain decoding step
    for part in module.modules():
        part.__dict__.update(part._modules)


def _stacked(config: ModelConfig, ours: str, theirs: str, inputs: int, size: int,
             moe: bool = False) -> dict[str, dict[str, tuple]]:
    """The tensors of one layer that we keep stacked: q, k and v; gate and up; the experts."""
    H, h, k, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    parts = {f"{ours}self_attn.qkv_proj.weight": {f"{theirs}self_attn.{p}_proj.weight": (n * d, inputs)
                                                  for p, n in (("q", h), ("k", k), ("v", k))}}
    if not moe:
        return parts | {f"{ours}mlp.gate_up_proj.weight": {f"{theirs}mlp.{p}_proj.weight": (size, H)
                                                           for p in ("gate", "up")}}
    experts = [f"{theirs}mlp.experts.{e}." for e in range(config.num_experts)]
    return parts | {
        f"{ours}mlp.gate_up_proj": {f"{e}{p}_proj.weight": (size, H) for e in experts for p in ("gate", "up")},
        f"{ours}mlp.down_proj": {f"{e}down_proj.weight": (H, size) for e in experts}}


def checkpoint_layout(model: Model) -> dict[str, dict[str, tuple]]:
    """For each parameter of a target, the tensors of its checkpoint, with their shapes, that are stacked to make it."""
    config = model.config
    parts = {name: {f"model.{name}": tuple(value.shape)}
             for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for i in range(config.num_hidden_layers):
        moe = i in config.moe_layers
        size = config.moe_intermediate_size if moe else config.intermediate_size
        parts |= _stacked(config, f"layers.{i}.", f"model.layers.{i}.", config.hidden_size, size, moe)
    return parts | {"lm_head.weight": parts["embed_tokens.weight"]} if config.tie_word_embeddings else parts


def unstacked(module: nn.Module, parts: dict[str, dict[str, tuple]],
              dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's weights as its checkpoint's tensors, on the CPU: the inverse of what `_fill` does with `parts`."""
    tensors = {}
    for name, value in module.state_dict().items():
        pieces = parts.get(name, {name: tuple(value.shape)})
        rows = value.reshape(-1, *next(iter(pieces.values()))[1:]).split([shape[0] for shape in pieces.values()])
        tensors |= {piece: part.to("cpu", dtype, copy=True).contiguous() for piece, part in zip(pieces, rows)}
    return tensors


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu",
               pack: bool = True, products: Callable | None = None) -> Model:
    """Load a target from a local folder holding config.json and safetensors.

    pack: prepack its matrices, on a CPU. products: what makes compiled products of matrices there (`products` in
    tools/kernels.py), in float32 and bfloat16; what drafts for the model takes it over. Raises CheckpointError on an
    unknown architecture or field and on any missing, extra or misshapen tensor.
    """
    folder = Path(folder)
    if torch.device(device).type == "cuda":
        # it plans a kernel for every new length of the text: some 25 ms each, on an H200
        torch.backends.cuda.enable_cudnn_sdp(False)
    config = ModelConfig.read(folder)
    tensors, experts = _Tensors(folder), len(config.moe_layers) * config.num_experts
    if config.num_hidden_layers + experts > len(tensors.shapes):     # found out before memory is spent on them
        raise CheckpointError(f"{folder / 'config.json'}: field 'num_hidden_layers' is {config.num_hidden_layers}, "
                              f"with {experts} experts in all; "
                              f"the checkpoint holds only {len(tensors.shapes)} tensors")
    with torch.device("meta"):
        model = Model(config)
    optional = {name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        optional.add("lm_head.weight")
    parts = checkpoint_layout(model)
    if config.tie_word_embeddings:
        model.lm_head.weight = None                    # not read a second time
    _fill(model, tensors, parts, dtype, device, optional, pack, config.tie_word_embeddings, products)
    return model


def _draft_ids(d2t: Tensor, vocab: int, tensors: _Tensors) -> Tensor:
    """A draft vocabulary as ids of the target's [draft V], of its d2t. Raises CheckpointError where one is outside."""
    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    if ids.min() < 0 or ids.max() >= vocab:
        raise CheckpointError(f"{tensors.where}: tensor 'd2t' points outside the target's vocabulary of {vocab}")
    return ids


def default_taps(layers: int) -> tuple[int, int, int]:
    """The layers, of so many, whose outputs an EAGLE-3 head reads unless its config.json names others."""
    return 1, layers // 2 - 1, layers - 4


def load_eagle3(folder: str | Path, target: Model, *, pack: bool = True) -> Eagle3:
    """Load an EAGLE-3 head for `target`: EAGLE's `pytorch_model.bin` or a safetensors layout,
    in the target's dtype and device.

    `t2d` is not needed and skipped; `d2t` may be absent where both vocabularies are one; `embed_tokens` is
    shared with the target where the head has none. Raises CheckpointError, also where the head belongs to a
    target of another shape.
    """
    folder = Path(folder)
    config = ModelConfig.read(folder, head=True)
    layers, wanted = target.config.num_hidden_layers, target.config.hidden_size
    for name, got, want in (("vocab_size", config.vocab_size, target.config.vocab_size),
                            ("target_hidden_size", config.target_hidden_size, wanted)):
        if got != want:
            raise CheckpointError(f"{folder / 'config.json'}: field '{name}' is {got}, but the target's is {want}: "
                                  "a head of another model?")
    taps = config.taps or default_taps(layers)
    if not all(-1 <= t < layers for t in taps):
        raise CheckpointError(f"{folder / 'config.json'}: the head reads the outputs of layers {taps}; "
                              f"the target has {layers}")

    def rename(name):  # every published layout down to EAGLE's own, then ours without 'midlayer.'
        for prefix in ("model.", "midlayer.", "layers.0."):
            name = name.removeprefix(prefix)
        return name

    tensors = _Tensors(folder, rename)
    with torch.device("meta"):
        head = Eagle3(config, taps)
    shared = "embed_tokens.weight" not in tensors.shapes
    if shared:
        if config.hidden_size != wanted:
            raise CheckpointError(f"{tensors.where}: tensor 'embed_tokens.weight' is missing "
                                  f"and the target's is {wanted} wide, not {config.hidden_size}")
        head.embed_tokens = None
    if "d2t" not in tensors.shapes:
        if config.draft_vocab_size != config.vocab_size:
            raise CheckpointError(f"{tensors.where}: tensor 'd2t' is missing; "
                                  f"expected shape [{config.draft_vocab_size}]")
        del head.d2t
    _fill(head, tensors, _stacked(config, "", "", 2 * config.hidden_size, config.intermediate_size),
          target.dtype, target.device,
          {"t2d", *(name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq"))},
          pack, products=target.products)
    if shared:
        head.embed_tokens = target.embed_tokens
    if not hasattr(head, "d2t"):
        head.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64, device=target.device))
    _draft_ids(head.d2t, config.vocab_size, tensors)
    head.graphs, head.compiled = target.graphs, target.compiled
    return head


def load_draft(folder: str | Path, target: Model) -> Eagle3 | Model:
    """What drafts for `target`: an EAGLE-3 head, or a smaller model, where config.json names one of `ARCHITECTURES` and
    none of the fields that only heads have (EAGLE's own call themselves LlamaForCausalLM too).

    A model must have the target's vocab_size, padding included: so have all Qwen3 sizes (151936) and Llama 3.x
    (128256). Raises CheckpointError."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    names = raw.get("architectures")
    arch = names[0] if isinstance(names, list) and names else names
    if arch not in ARCHITECTURES or "draft_vocab_size" in raw or "eagle_config" in raw:
        return load_eagle3(folder, target)
    config, want = ModelConfig.read(Path(folder)), target.config.vocab_size
    if config.vocab_size != want:
        raise CheckpointError(f"{path}: field 'vocab_size' is {config.vocab_size}, but the target's is {want}: "
                              "a draft model needs the target's vocabulary")
    return load_beside(folder, target)


def load_beside(folder: str | Path, target: Model) -> Model:
    """Load another model that runs as `target` does: its dtype, device, products and graphs. Raises CheckpointError."""
    model = load_model(folder, dtype=target.dtype, device=target.device, products=target.products)
    model.graphs, model.compiled = target.graphs, target.compiled
    return model
