"""Write a model's folder as one GGUF file: F16 or Q8_0, with tokenizer and chat template, streamed row by row.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md). The ``gguf`` package lays out the metadata and quantizes.
"""

from __future__ import annotations

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

from ..errors import UserError, optional
from ..io.atomic import bytes_aside
from ..io.safetensors import row_blocks
from ..io.text import read_object, shown
from ..merge.base_files import GENERATION, BaseFiles
from ..model.base_folder import check_weights, empty_model, read_model_config
from ..model.families import FAMILIES, head_width, layer_windows
from .gguf_vocab import add_vocabulary

Kind = Literal["f16", "q8_0"]
BLOCK_BYTES = 64 * 2**20  # of float32 rows held at once
QUANT_WIDTH = 32  # values that share a scale in Q8_0
_MAGIC = b"GGUF"
_CONVERTER = "llama.cpp's own converter (convert_hf_to_gguf.py) knows the others."
_WINDOWED = ("gemma3_text",)  # llama.cpp ignores the sliding window of the others
_SCALED = {"gemma3_text": "linear", "ministral3": "yarn", "phi3": "longrope"}  # what the metadata can say of rotations


@dataclass
class GgufReport:
    """What a GGUF file holds."""

    out: Path
    bytes: int = 0
    seconds: float = 0.0
    types: Counter[str] = field(default_factory=Counter)  # GGUF's name of a type → number of tensors
    error: float | None = None  # ‖stored - original‖ / ‖original‖ over every weight; None: not computed
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
    """One tensor of the file: a tensor of the folder with its rows in another order and a number added, or given values."""

    name: str
    shape: tuple[int, ...]
    type: Any  # gguf's GGMLQuantizationType: F32, F16, Q8_0
    source: str = ""
    order: Tensor | None = None
    added: float = 0.0
    values: Tensor | None = None


def gguf_package() -> Any:
    """The ``gguf`` package."""
    with optional("export"):
        import gguf
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
    _check_fixed(folder, config)
    files = BaseFiles(folder)
    writer = gguf.GGUFWriter(None, FAMILIES[config.model_type].gguf)
    report = GgufReport(out)
    parts = [*_parts(gguf, folder, config, files, kind), *_add_rope(gguf, writer, folder, config, report.notes)]
    report.types.update(part.type.name for part in parts)
    _add_architecture(gguf, writer, folder, config, kind)
    if kind == "q8_0" and report.types["F16"]:
        report.notes.append(f"{report.types['F16']} tensors are no multiple of {QUANT_WIDTH} wide and stay in F16")
    for window in set(layer_windows(config)) - {None}:  # one at most
        writer.add_sliding_window(window)
        if window < config.max_position_embeddings and config.model_type not in _WINDOWED:
            report.notes.append(
                f"the model attends to the last {window:,} tokens; llama.cpp ignores that in this family, so that longer "
                "conversations differ"
            )
    report.notes += add_vocabulary(writer, folder, config.vocab_size, end_ids(folder, config))
    for part in parts:
        shape = gguf.quant_shape_to_byte_shape(part.shape, part.type)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=part.type)
    out.parent.mkdir(parents=True, exist_ok=True)
    squares = torch.zeros(2, dtype=torch.float64)
    with bytes_aside(out) as aside:
        writer.write_header_to_file(Path(aside.name))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        try:
            for part in parts:
                squares += _write(gguf, file, files, part)
                files.forget()
            report.bytes = file.tell()
        finally:
            writer.close()
    report.error = float((squares[0] / squares[1]).sqrt())
    report.seconds = time.monotonic() - start
    return report


def model_folder(folder: str | Path) -> Path:
    """Check that a folder holds a whole model, and not a run or an adapter."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: holds no model (there is no config.json).",
            "Of a run or an adapter, make one first: zephyr-lite merge --run runs/NAME --out model/",
        )
    return path


def check_place(out: Path, folder: Path) -> None:
    """Raise a UserError if ``out`` is a folder, or a file other than a GGUF file."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder.", f"Name the file: --out {out / (folder.resolve().name + '.gguf')}")
    if out.exists():
        with out.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{out}: is there already, and no GGUF file.", "Name another file with --out.")


def end_ids(folder: Path, config: Any) -> list[int]:
    """The ids at which generation stops: of generation_config.json, or else of config.json."""
    path = folder / GENERATION
    told: Any = read_object(path).get("eos_token_id") if path.is_file() else None
    told = config.eos_token_id if told is None else told
    return list(told) if isinstance(told, list) else [] if told is None else [told]


def _parts(gguf: Any, folder: Path, config: Any, files: BaseFiles, kind: Kind) -> Iterator[_Part]:
    """Every tensor of the folder, in the order of its bytes."""
    types = gguf.GGMLQuantizationType
    wanted = {name for name in empty_model(folder, config).state_dict() if not files.tied or name != "lm_head.weight"}
    if missing := wanted - files.entries.keys():
        raise UserError(f"{folder}: no tensor {shown(min(missing))} in its files.", "Merge again.")
    family, head = FAMILIES[config.model_type], head_width(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf.upper()], config.num_hidden_layers)
    for source in (name for name in files.entries if name in wanted):
        shape = files.entries[source].shape
        form = types.F32 if len(shape) == 1 else types.F16
        if kind == "q8_0" and len(shape) > 1 and shape[-1] % QUANT_WIDTH == 0:
            form = types.Q8_0
        stem, _, suffix = source.rpartition(".")
        order = None
        if family.neighbours and stem.endswith((".q_proj", ".k_proj")):
            # transformers turns channel i of a head together with channel i + head/2, llama.cpp with its neighbour
            order = torch.arange(shape[0]).view(shape[0] // head, 2, head // 2).transpose(1, 2).reshape(-1)
        added = float(family.norm_offset and len(shape) == 1)  # llama.cpp multiplies by the weight of a norm alone
        yield _Part(f"{names.get_name(stem)}.{suffix}", shape, form, source, order, added)


def _check_fixed(folder: Path, config: Any) -> None:
    """Refuse a configuration that differs from what llama.cpp has in its code, and not in the file."""
    count, fixed = config.num_hidden_layers, dict[str, Any]()
    if config.model_type == "smollm3":
        fixed["no_rope_layers"] = [int(layer % 4 != 3) for layer in range(count)]
    elif config.model_type == "gemma3_text":
        fixed["layer_types"] = [f"{'full' if layer % 6 == 5 else 'sliding'}_attention" for layer in range(count)]
        # llama.cpp knows the 27B model by its layers
        width = config.hidden_size // config.num_attention_heads if count == 62 else config.head_dim
        fixed["query_pre_attn_scalar"] = width
    for key, known in fixed.items():
        if (found := getattr(config, key)) != known:
            raise UserError(
                f"{folder}: {key} is {shown(found)}; llama.cpp computes this architecture with {shown(known)}.",
                "Use the model as it is (transformers, vLLM).",
            )


def _add_rope(gguf: Any, writer: Any, folder: Path, config: Any, notes: list[str]) -> list[_Part]:
    """Add the metadata of the rotary embeddings; returns the tensors that llama.cpp reads besides.

    Raises:
        UserError: the type scales attention too, or llama.cpp does not compute it in this architecture.
    """
    tables, head, kind = config.rope_parameters, head_width(config), config.model_type
    rope = tables.get("full_attention", tables)  # Gemma 3's layers with a window have a table of their own
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope is not tables:
        writer.add_rope_freq_base_swa(float(tables["sliding_attention"]["rope_theta"]))
    name = rope.get("rope_type", "default")
    if name == "default":
        return []
    layer_type = None if rope is tables else "full_attention"
    frequencies, attention = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), layer_type=layer_type)
    types = gguf.GGMLQuantizationType
    if name == _SCALED.get(kind) and (attention == 1.0 or name == "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(name))
        if name == "longrope":
            length = rope["original_max_position_embeddings"]
            writer.add_rope_scaling_attn_factors(attention)
            writer.add_rope_scaling_orig_ctx_len(length)
            notes.append(
                f"with a context of more than {length:,} tokens, versions of llama.cpp rotate short conversations as this "
                f"model rotates long ones: set its context to {length}"
            )
            factors = {which: torch.tensor(rope[f"{which}_factor"]) for which in ("long", "short")}
            return [_Part(f"rope_factors_{n}.weight", tuple(f.shape), types.F32, values=f) for n, f in factors.items()]
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if name == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
            writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
            writer.add_rope_scaling_yarn_log_mul(float(rope["mscale_all_dim"]))
            writer.add_attn_temperature_scale(float(rope["llama_4_scaling_beta"]))
        return []
    if attention != 1.0:
        what = " scale attention, which this export does not support"
    elif FAMILIES[kind].rope_factors:
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
        factors = plain / frequencies.float()
        return [_Part("rope_freqs.weight", tuple(factors.shape), types.F32, values=factors)]
    else:
        what = f"; in the {kind} family only {_SCALED.get(kind, 'plain')} ones are exported"
    raise UserError(f"{folder}: rotary embeddings of type {shown(name)}{what}.", _CONVERTER)


def _add_architecture(gguf: Any, writer: Any, folder: Path, config: Any, kind: Kind) -> None:
    """Add the metadata that is not the tokenizer's."""
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
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write(gguf: Any, file: BinaryIO, files: BaseFiles, part: _Part) -> Tensor:
    """Write one tensor and its padding; float64 [2]: Σ (stored - original)², Σ original²."""
    squares, start = torch.zeros(2, dtype=torch.float64), file.tell()
    whole = files.tensor(part.source) if part.values is None else part.values
    for rows in row_blocks(part.shape[0], math.prod(part.shape[1:]) * 4, BLOCK_BYTES):
        block = (whole[rows] if part.order is None else whole[part.order[rows]]).float() + part.added
        with np.errstate(over="ignore"):  # checked below
            stored = np.ascontiguousarray(gguf.quantize(block.numpy(), part.type))
        back = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(stored, part.type)))
        if not back.isfinite().all():
            raise UserError(
                f"{part.source}: holds {float(block.abs().max()):.3g}, and float16 reaches 65504.",
                "Use the model as it is (transformers, vLLM); a GGUF file of it needs another type.",
            )
        squares += torch.stack([(back - block).double().square().sum(), block.double().square().sum()])
        file.write(stored.tobytes())
    file.write(bytes(-(file.tell() - start) % gguf.GGUF_DEFAULT_ALIGNMENT))
    return squares
