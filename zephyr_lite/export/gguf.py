"""Write a model's folder as one GGUF file: F16 or Q8_0, with tokenizer and chat template, streamed row by row.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md). The ``gguf`` package lays out the metadata and quantizes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UserError
from ..io.atomic import bytes_aside, make_folder
from ..io.safetensors import row_blocks
from ..io.text import is_whole, read_object, shown
from ..merge.base_files import GENERATION, BaseFiles
from ..model.base import check_weights, empty_model, read_model_config
from ..model.families import FAMILIES, NAMES, head_width, layer_windows
from .gguf_vocab import Vocabulary, read_vocabulary

logger = logging.getLogger(__name__)

Kind = Literal["f16", "q8_0"]
BLOCK_BYTES = 64 * 2**20  # of float32 rows held at once
QUANT_WIDTH = 32  # values that share a scale in Q8_0
_F16_MAX = 65504.0
_MAGIC = b"GGUF"
_CONVERTER = "llama.cpp's own converter (convert_hf_to_gguf.py) knows the others."


@dataclass
class GgufReport:
    """What a GGUF file holds."""

    out: Path
    bytes: int = 0
    seconds: float = 0.0
    types: Counter[str] = field(default_factory=Counter)  # GGUF's name of a type → number of tensors
    error: float | None = None  # ‖stored - original‖ / ‖original‖ over every weight; None: not computed
    pre: str = ""  # llama.cpp's name for how a text is split before the merges
    notes: list[str] = field(default_factory=list)  # what a server does differently from training

    def lines(self) -> list[str]:
        """For the console."""
        types = ", ".join(f"{count} in {name}" for name, count in self.types.most_common())
        error = f"; relative error of the weights {self.error:.1e}" if self.error is not None else ""
        return [
            f"{self.out}: {self.bytes / 1e9:.2f} GB in {self.seconds:.0f} s; tensors: {types}{error}",
            *(f"note: {note}" for note in self.notes),
        ]


@dataclass(frozen=True)
class _Part:
    """One tensor of the file: rows of a base's tensor, in an order; or given values."""

    name: str
    shape: tuple[int, ...]
    type: str  # F32, F16, Q8_0
    source: str = ""
    order: Tensor | None = None
    values: Tensor | None = None


def gguf_package() -> Any:
    """The ``gguf`` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF files are written with the gguf package, which is not installed.", 'pip install "zephyr-lite[export]"'
        ) from None
    return gguf


def write_gguf(folder: str | Path, out: str | Path, kind: Kind = "f16") -> GgufReport:
    """Write a model's folder as a GGUF file.

    Args:
        folder: as ``merge`` makes it: safetensors, config.json, tokenizer, chat template.
        out: the file; an existing GGUF file is replaced.
        kind: type of the matrices; vectors (the norms) stay float32.

    Raises:
        UserError: the gguf package is missing; no such folder; an unsupported family or tokenizer; values beyond
            float16; missing or misshaped weights; ``out`` is not a GGUF file.
    """
    start = time.monotonic()
    gguf = gguf_package()
    folder, out = model_folder(folder), Path(out).expanduser()
    check_place(out, folder)
    config = read_model_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{folder}: is stored quantized, and would be rounded twice.",
            "Export the 16-bit model; a merged folder is one.",
        )
    check_weights(folder, config)
    files = BaseFiles(str(folder), folder)
    vocabulary = read_vocabulary(folder, config.vocab_size, end_ids(folder, config))
    report = GgufReport(out, pre=vocabulary.pre, notes=list(vocabulary.notes))
    parts = list(_parts(gguf, folder, config, files, kind))
    narrow = [part.name for part in parts if part.type == "F16" and kind == "q8_0"]
    if narrow:
        report.notes.append(f"{len(narrow)} tensors are no multiple of {QUANT_WIDTH} wide and stay in F16")
    writer = gguf.GGUFWriter(None, FAMILIES[config.model_type].gguf)
    _describe(writer, folder, config, vocabulary, kind, gguf, report)
    for part in parts:
        if part.type == "Q8_0":
            form = gguf.GGMLQuantizationType.Q8_0
            shape = gguf.quant_shape_to_byte_shape(part.shape, form)
            writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=form)
        else:
            dtype = np.dtype(np.float32 if part.type == "F32" else np.float16)
            writer.add_tensor_info(part.name, part.shape, dtype, math.prod(part.shape) * dtype.itemsize)
    make_folder(out.parent)
    with bytes_aside(out) as aside:
        writer.write_header_to_file(Path(aside.name))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        squares = torch.zeros(2, dtype=torch.float64)
        done, told, total = 0, 0, sum(math.prod(part.shape) for part in parts)
        try:
            for part in parts:
                squares += _write(gguf, file, files, part)
                report.types[part.type] += 1
                files.forget()
                done += math.prod(part.shape)
                if total > 1e9 and done * 10 // total > told:  # below that it takes seconds
                    told = done * 10 // total
                    logger.info(f"written {done / 1e9:.1f} of {total / 1e9:.1f} billion weights")
            report.bytes = file.tell()
        finally:
            writer.close()
    report.error = float((squares[0] / squares[1]).sqrt())
    report.seconds = time.monotonic() - start
    return report


def model_folder(folder: str | Path) -> Path:
    """Check that a folder holds a whole model.

    Raises:
        UserError: it does not; names the command that makes one of a run or an adapter.
    """
    path = Path(folder).expanduser()
    if (path / "config.json").is_file():
        return path
    run = path.parent if (path / "stage.json").is_file() else path
    what, hint = "has no config.json, so it holds no model", "zephyr-lite merge --out model/"
    if not path.is_dir():
        what = "no such folder"
    elif (path / "adapter_config.json").is_file():
        what = "holds an adapter, not a whole model"
    elif any(run.glob("*/stage.json")):
        what, hint = "is a run, whose adapters are not merged", f"zephyr-lite merge --run {run} --out model/"
    raise UserError(f"{path}: {what}.", f"Merge first, and give the merged folder: {hint}")


def check_place(out: Path, folder: Path) -> None:
    """Raise a UserError if ``out`` is a folder, or a file other than a GGUF file."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder.", f"Name the file: --out {out / (folder.resolve().name + '.gguf')}")
    if out.exists():
        with out.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{out}: is there already, and no GGUF file.", "Name another file with --out.")


def end_ids(folder: Path, config: Any) -> list[int]:
    """The ids at which generation stops: of generation_config.json, or else of config.json.

    Raises:
        UserError: they are not ids of tokens.
    """
    path = folder / GENERATION
    told: Any = read_object(path, strict=False).get("eos_token_id") if path.is_file() else None
    told = config.eos_token_id if told is None else told
    ids = told if isinstance(told, list) else [] if told is None else [told]
    if not all(is_whole(index) and 0 <= index < config.vocab_size for index in ids):
        raise UserError(
            f"{path}: eos_token_id is {shown(ids)}, not the id of a token, or a list of them.", "Correct it."
        )
    return list(ids)


def _parts(gguf: Any, folder: Path, config: Any, files: BaseFiles, kind: Kind) -> Iterator[_Part]:
    """Every tensor of the file, in the order of the base's bytes.

    Raises:
        UserError: another family, or a weight is missing.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{folder}: a {config.model_type} model; GGUF files are made of the families {NAMES}.",
            _CONVERTER,
        )
    wanted = {name for name in empty_model(folder, config).state_dict() if not files.tied or name != "lm_head.weight"}
    if missing := wanted - files.entries.keys():
        raise UserError(f"{folder}: no tensor {shown(min(missing))} in its files.", "Merge again.")
    family, head = FAMILIES[config.model_type], head_width(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf.upper()], config.num_hidden_layers)
    for source in (name for name in files.entries if name in wanted):
        shape = files.entries[source].shape
        stem, _, suffix = source.rpartition(".")
        turned = family.neighbours and stem.endswith((".q_proj", ".k_proj"))
        form = "F32" if len(shape) == 1 else "F16"
        if kind == "q8_0" and form == "F16" and shape[-1] % QUANT_WIDTH == 0:
            form = "Q8_0"
        order = _interleaved(shape[0], head) if turned else None
        yield _Part(f"{names.get_name(stem)}.{suffix}", shape, form, source, order)
    if (factors := rope_factors(config)) is not None:
        if not family.rope_factors:
            raise UserError(
                f"{folder}: rotary embeddings of type {shown(config.rope_parameters['rope_type'])}; in the "
                f"{config.model_type} family only plain ones are exported.",
                _CONVERTER,
            )
        yield _Part("rope_freqs.weight", tuple(factors.shape), "F32", values=factors)


def _interleaved(rows: int, head: int) -> Tensor:
    """Row of the file → row of the Hugging Face matrix, of the query and key projections.

    transformers turns channel i of a head together with channel i + head/2, llama.cpp with its neighbour.
    """
    return torch.arange(rows).view(rows // head, 2, head // 2).transpose(1, 2).reshape(-1)


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotary frequencies, float32 [head / 2]; None: plain rotary embeddings.

    Raises:
        UserError: the type scales attention too, which a GGUF file cannot express.
    """
    told = config.rope_parameters or {}
    if (name := told.get("rope_type", "default")) == "default":
        return None
    if name not in ROPE_INIT_FUNCTIONS:
        raise UserError(f"rotary embeddings of type {shown(name)} are not known.", "Export a model of another type.")
    frequencies, attention = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"))
    if attention != 1.0:
        raise UserError(
            f"rotary embeddings of type {name} scale attention by {attention:.3g}, which this export does not support.",
            _CONVERTER,
        )
    head = head_width(config)
    plain = 1.0 / told["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return plain / frequencies.float()


def _describe(
    writer: Any, folder: Path, config: Any, vocabulary: Vocabulary, kind: Kind, gguf: Any, report: GgufReport
) -> None:
    head = head_width(config)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.rope_parameters or {})["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for window in {window for window in layer_windows(config) if window is not None}:  # one at most
        writer.add_sliding_window(window)
        if window < config.max_position_embeddings:
            report.notes.append(
                f"the model attends to the last {window:,} tokens; llama.cpp ignores that in this family, "
                "so that longer conversations differ"
            )
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, index in vocabulary.special.items():
        adders[name](index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _write(gguf: Any, file: BinaryIO, files: BaseFiles, part: _Part) -> Tensor:
    """Write one tensor and its padding; float64 [2]: Σ (stored - original)², Σ original²."""
    squares, start = torch.zeros(2, dtype=torch.float64), file.tell()
    whole = files.tensor(part.source) if part.values is None else part.values
    for rows in row_blocks(part.shape[0], math.prod(part.shape[1:]) * 4, BLOCK_BYTES):
        block = (whole[rows] if part.order is None else whole[part.order[rows]]).float()
        if part.type == "Q8_0":
            stored = gguf.quantize(block.numpy(), gguf.GGMLQuantizationType.Q8_0)
            back = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
        else:
            back = stored = (block if part.type == "F32" else block.half()).numpy()
            if not np.isfinite(stored).all():
                raise UserError(
                    f"{part.source}: holds {float(block.abs().max()):.3g}, and float16 reaches {_F16_MAX:.0f}.",
                    "Use the model as it is (transformers, vLLM); a GGUF file of it needs another type.",
                )
        difference = torch.from_numpy(np.ascontiguousarray(back)).float() - block
        squares += torch.stack([difference.double().square().sum(), block.double().square().sum()])
        file.write(np.ascontiguousarray(stored).tobytes())
    file.write(bytes(-(file.tell() - start) % gguf.GGUF_DEFAULT_ALIGNMENT))
    return squares
