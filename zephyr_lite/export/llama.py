"""llama.cpp: Q4_K_M files by its quantizer, and a comparison of its prompt ids with training's."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex

from ..data.chat_template import resolve_template
from ..data.messages import Message
from ..errors import UserError
from ..io.atomic import bytes_aside, check_room, remove_tree
from ..model.tokenizer import load_tokenizer
from .gguf import GgufReport, check_place, gguf_package, model_folder, write_gguf

logger = logging.getLogger(__name__)

CHILD = [sys.executable, "-P", "-m", "zephyr_lite.export.llama_child"]
# where tokenizers differ: contractions, digits, runs of spaces, line ends, other scripts, code
PROBES: list[list[Message]] = [
    [{"role": "user", "content": "I'd say it's 12345.67 — isn't it?  Two  spaces,\n\nand a\ttab."}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "def f(x):\n    return x ** 2  # 42"},
        {"role": "assistant", "content": "It squares x."},
        {"role": "user", "content": " Übersetze: 日本語, привет, 🙂 "},
    ],
]


def find_quantizer(given: Path | None = None) -> list[str]:
    """The command of llama.cpp's quantizer: the program given, llama-cpp-python, or llama-quantize on PATH."""
    if given is None and find_spec("llama_cpp") is not None:
        return [*CHILD, "quantize"]
    name = "llama-quantize" if given is None else str(given.expanduser())
    if (found := shutil.which(name)) is not None:
        return [found]
    raise UserError(
        f"Q4_K_M is made by llama.cpp's own quantizer, and there is no program {name}.",
        "pip install llama-cpp-python; or get llama.cpp (https://github.com/ggml-org/llama.cpp/releases, brew install "
        "llama.cpp) and name its program with --llama-quantize. F16 and Q8_0 need neither.",
    )


def write_q4_k_m(folder: str | Path, out: str | Path, *, llama_quantize: Path | None = None) -> GgufReport:
    """Write a model's folder as a GGUF file in Q4_K_M: in F16 beside ``out``, which llama.cpp quantizes."""
    start = time.monotonic()
    quantizer = find_quantizer(llama_quantize)
    folder, out = model_folder(folder), Path(out).expanduser()
    check_place(out, folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_room(out.absolute().parent, int(size * 1.3), "the file in F16 and the one in Q4_K_M")
    half = out.with_name(f".{out.name}.{token_hex(4)}")
    with bytes_aside(out) as aside:
        try:
            notes = write_gguf(folder, half, "f16").notes
            logger.info("llama.cpp quantizes it")
            done = subprocess.run([*quantizer, str(half), aside.name, "Q4_K_M"], capture_output=True, check=False)
        finally:
            remove_tree(half)
        if done.returncode or not Path(aside.name).stat().st_size:
            raise UserError(
                f"llama.cpp's quantizer failed (exit code {done.returncode}): {_last_lines(done.stderr)}",
                "Export F16 or Q8_0, or try another version of llama.cpp.",
            )
    types = Counter(tensor.tensor_type.name for tensor in gguf_package().GGUFReader(out).tensors)
    if others := types.total() - types["F32"] - types["Q4_K"] - types["Q6_K"]:
        notes.append(f"{others} tensors are no multiple of 256 wide; llama.cpp stored them in other types")
    return GgufReport(out, out.stat().st_size, time.monotonic() - start, types, None, notes)


def _last_lines(output: bytes) -> str:
    return " | ".join(output.decode("utf-8", "replace").strip().splitlines()[-3:])[:500] or "no output"


def check_prompts(folder: Path, file: Path) -> str:
    """Compare llama.cpp's ids of conversations with training's; returns a line for the console."""
    tokenizer = load_tokenizer(folder)
    if find_spec("llama_cpp") is None:
        return "prompt ids not compared with llama.cpp's (pip install llama-cpp-python to have that done)"
    if not tokenizer.chat_template:
        return "note: the model has no chat template, so no prompt ids were compared with llama.cpp's"
    template = resolve_template("auto", tokenizer)
    texts = [template.text_of(messages, True) for messages in PROBES]
    done = subprocess.run(
        [*CHILD, "tokenize", str(file)], input=json.dumps(texts).encode(), capture_output=True, check=False
    )
    if done.returncode:
        raise UserError(f"{file}: llama.cpp cannot read it: {_last_lines(done.stderr)}", "Update llama-cpp-python.")
    for messages, text, found in zip(PROBES, texts, json.loads(done.stdout)):
        wanted = template.prompt_ids(messages).tolist()
        if found != wanted:
            raise UserError(
                f"{file}: llama.cpp makes the ids {found} of {text!r}, training made {wanted}.",
                "The file is there, and a server that uses it would see other prompts. Please report this.",
            )
    return f"prompt ids equal llama.cpp's in {len(texts)} texts"
