"""Render a chat template, which is a program that came with a download, where it can do no harm.

jinja2's sandbox keeps it from Python's insides. It does not keep it from running for ever or from filling the memory,
so a process of its own renders it (0.1 s), and is ended when it has used up its share.
"""

import json
import subprocess
import sys
import time

# CHARACTERS: how much longer than twice the messages the text may be
SECONDS, MEMORY, CHARACTERS = 10, 1 << 30, 1 << 20


def render_template(template: str, messages: list[dict], names: dict[str, str]) -> str:
    """The text of a conversation, ready for the assistant's turn; `names` are the template's other variables. Raises
    ValueError where the template fails or needs more than its share."""
    request = json.dumps([template, messages, names, MEMORY, CHARACTERS])
    try:
        done = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True,
                              timeout=SECONDS)
        reply = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        reply = {"error": f"it ran for more than {SECONDS} seconds"}
    except ValueError:
        reply = {"error": f"its process ended with {done.returncode} {' '.join(done.stderr.split()[-20:])}"}
    if "error" in reply:
        raise ValueError(f"the checkpoint's chat template failed: {reply['error']}")
    return reply["text"]


def main() -> dict:
    template, messages, names, memory, characters = json.load(sys.stdin)
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError):    # Windows, macOS: the time must do
        pass

    def refuse(reason):
        raise TemplateError(str(reason))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
        most = characters + 2 * sum(len(message["content"]) for message in messages)
        return ({"text": text} if len(text) <= most
                else {"error": f"it wrote {len(text)} characters; at most {most} are accepted"})
    except MemoryError:
        return {"error": f"it needs more than {memory >> 20} MB of memory"}
    except Exception as error:           # a template can fail in as many ways as a program
        return {"error": str(error)[:160] or type(error).__name__}


if __name__ == "__main__":
    print(json.dumps(main()))
