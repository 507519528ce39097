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
from ..io.atomic import bytes_aside, check_room, make_folder, remove_tree
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
    """The command of llama.cpp's quantizer: the program given, llama-cpp-python, or llama-quantize on PATH.

    Raises:
        UserError: there is none.
    """
    if given is None and find_spec("llama_cpp") is not None:
        return [*CHILD, "quantize"]
    if (found := shutil.which("llama-quantize" if given is None else str(given.expanduser()))) is not None:
        return [found]
    raise UserError(
        "Q4_K_M is made by llama.cpp's own quantizer, which is not here."
        if given is None
        else f"--llama-quantize {given}: is no program.",
        "pip install llama-cpp-python; or get llama.cpp (https://github.com/ggml-org/llama.cpp/releases, brew install "
        "llama.cpp) and name its program with --llama-quantize. F16 and Q8_0 need neither.",
    )


def write_q4_k_m(folder: str | Path, out: str | Path, *, llama_quantize: Path | None = None) -> GgufReport:
    """Write a model's folder as a GGUF file in Q4_K_M: in F16 beside ``out``, which llama.cpp quantizes.

    Raises:
        UserError: as ``write_gguf``; there is no quantizer, it fails, or the disk is too small for both files.
    """
    start = time.monotonic()
    quantizer = find_quantizer(llama_quantize)
    folder, out = model_folder(folder), Path(out).expanduser()
    check_place(out, folder)
    make_folder(out.parent)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_room(out.absolute().parent, int(size * 1.3), "the file in F16 and the one in Q4_K_M")
    half = out.with_name(f".{out.name}.{token_hex(4)}")
    with bytes_aside(out) as aside:
        try:
            report = write_gguf(folder, half, "f16")
            logger.info("llama.cpp quantizes it")
            done = subprocess.run([*quantizer, str(half), aside.name, "Q4_K_M"], capture_output=True, check=False)
        finally:
            remove_tree(half)
        if done.returncode or not Path(aside.name).stat().st_size:
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]
            raise UserError(
                f"llama.cpp's quantizer failed (exit code {done.returncode}): {' | '.join(last)[:500] or 'no output'}",
                "Export F16 or Q8_0, or try another version of llama.cpp.",
            )
    types = Counter(tensor.tensor_type.name for tensor in gguf_package().GGUFReader(out).tensors)
    notes = list(report.notes)
    if fallbacks := sum(count for name, count in types.items() if name not in ("F32", "Q4_K", "Q6_K")):
        notes.append(f"{fallbacks} tensors are no multiple of 256 wide; llama.cpp stored them in other types")
    return GgufReport(out, out.stat().st_size, time.monotonic() - start, types, None, report.pre, notes)


def check_prompts(folder: Path, file: Path) -> str:
    """Compare llama.cpp's ids of conversations with training's; returns a line for the console.

    Without a chat template plain texts are compared, and differences are only reported.

    Raises:
        UserError: the ids of a conversation differ.
    """
    if find_spec("llama_cpp") is None:
        return "prompt ids not compared with llama.cpp's (pip install llama-cpp-python to have that done)"
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template:
        template = resolve_template("auto", tokenizer)
        texts = [template.text_of(messages, True) for messages in PROBES]
        wanted = [template.prompt_ids(messages).tolist() for messages in PROBES]
    else:
        texts = [message["content"] for messages in PROBES for message in messages]
        wanted = [tokenizer(text)["input_ids"] for text in texts]
    done = subprocess.run(
        [*CHILD, "tokenize", str(file)], input=json.dumps(texts).encode(), capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise UserError(f"{file}: llama.cpp cannot read it: {' '.join(last)[:500]}", "Update llama-cpp-python.")
    found_ids = json.loads(done.stdout)
    same = sum(ids == found for ids, found in zip(wanted, found_ids))
    if not tokenizer.chat_template and same < len(texts):
        return f"note: no chat template; llama.cpp makes other ids of {len(texts) - same} of {len(texts)} plain texts"
    for text, ids, found in zip(texts, wanted, found_ids):
        if ids != found:
            place = next((i for i, (a, b) in enumerate(zip(ids, found)) if a != b), min(len(ids), len(found)))
            raise UserError(
                f"{file}: llama.cpp makes other ids than training of {text!r}, from token {place} on: "
                f"{found[place : place + 4]} instead of {ids[place : place + 4]}.",
                "The file is there, and a server that uses it would see other prompts. Please report this.",
            )
    return f"prompt ids equal llama.cpp's in {len(texts)} texts"
