"""Graft on the command line."""
import json
from pathlib import Path
from tokenizers import Tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Text:
    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.template = json.loads((Path(folder) / "tokenizer_config.json").read_text())["chat_template"]
    def render(self, messages):
        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template).render(messages=messages, add_generation_prompt=True)
    def encode(self, text): return self.tokenizer.encode(text, add_special_tokens=False).ids
    encode_control = encode
