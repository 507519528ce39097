"""What a merge reads of a base: its shards as they lie on the disk, its configuration, its tokenizer."""

import json
import shutil
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import UserError
from ..model.load import fetch_base
from ..ops.nf4 import StoredNf4, read_stored
from ..rundir import read_json, write_json
from ..safetensors_stream import DTYPE_NAMES, DTYPES, FLOATS, Entry, SafetensorsFile, nbytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_NF4_PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


class BaseFiles:
    """A base's weights on disk, and what the merged folder's weights will look like.

    Attributes:
        name: what the user called it.
        folder: where it lies.
        config: its config.json.
        shards: output file name → tensor names, in the order of the bytes.
        entries: tensor name → Entry of the output. Only dtype and shape hold for weights in NF4 (`quantized`), which
            are written dequantized.
        quantized: names of the weights that the base keeps in NF4.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        config = read_json(folder / "config.json")
        if config is None:
            raise UserError(f"{folder}: no config.json there, so it is not a model.", "Give a model's folder.")
        self.config = config
        self._files = {file: SafetensorsFile(folder / file) for file in self._file_names()}
        self._where: dict[str, str] = {}
        for file_name, file in self._files.items():
            for tensor in file.entries:
                if tensor in self._where:
                    raise UserError(
                        f"{folder}: tensor {tensor} is in {self._where[tensor]} and in {file_name}.",
                        "Remove the files that do not belong to the model.",
                    )
                self._where[tensor] = file_name
        index = read_json(folder / INDEX) or {"weight_map": {}}
        absent = sorted(set(index["weight_map"]) - set(self._where))
        if absent:
            raise UserError(f"{folder / INDEX}: names {absent[0]}, which no file holds.", "Fetch the model again.")
        self.quantized = self._find_quantized()
        parts = {f"{weight}.{part}" for weight in self.quantized for part in _NF4_PARTS}
        self.entries: dict[str, Entry] = {}
        self.shards: dict[str, list[str]] = {}
        for file_name, file in self._files.items():
            names = [tensor for tensor in file.entries if tensor not in parts]
            if names:
                self.shards[file_name] = names
            for tensor in names:
                entry = file.entries[tensor]
                self.entries[tensor] = self._dequantized(entry) if tensor in self.quantized else entry

    def _file_names(self) -> list[str]:
        index = read_json(self.folder / INDEX)
        if index is None:
            names = [SINGLE] if (self.folder / SINGLE).is_file() else []
        else:
            try:
                names = sorted(set(index["weight_map"].values()))
            except (KeyError, AttributeError, TypeError):
                raise UserError(f"{self.folder / INDEX}: has no weight_map.", "Fetch the model again.") from None
        if not names:
            others = ", ".join(sorted(p.name for p in self.folder.glob("*.bin"))[:3])
            raise UserError(
                f"{self.folder}: neither {SINGLE} nor {INDEX} there (found {others or 'no weights'}).",
                "Only safetensors are read; convert the weights with transformers' save_pretrained first.",
            )
        for name in names:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise UserError(f"{self.folder / INDEX}: names {name}, which is not there.", "Fetch the model again.")
        return names

    def _find_quantized(self) -> set[str]:
        settings = self.config.get("quantization_config")
        if settings is None:
            return set()
        found = {
            name.removesuffix(".quant_state.bitsandbytes__nf4")
            for name in self._where
            if name.endswith(".quant_state.bitsandbytes__nf4")
        }
        if not found or settings.get("bnb_4bit_quant_type") != "nf4":
            kind = f"{settings.get('quant_method')}/{settings.get('bnb_4bit_quant_type', 'other')}"
            raise UserError(
                f"{self.folder}/config.json: the base is stored quantized as {kind}; of quantized bases only "
                "bitsandbytes' NF4 can be merged onto.",
                "Give the 16-bit base with --base.",
            )
        return found

    def _dequantized(self, entry: Entry) -> Entry:
        dtype = self.nf4_output_dtype
        try:
            state = json.loads(bytes(self.tensor(f"{entry.name}.quant_state.bitsandbytes__nf4").numpy()))
            shape = (int(state["shape"][0]), int(state["shape"][1]))
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(f"{self.folder}: {entry.name} has no readable quant_state.", "Fetch it again.") from None
        return Entry(entry.name, dtype, shape, 0, nbytes(dtype, shape))

    @cached_property
    def nf4_output_dtype(self) -> str:
        """Safetensors name of the dtype that an NF4 base is written in: its compute dtype, bfloat16 by default."""
        told = str(self.config["quantization_config"].get("bnb_4bit_compute_dtype") or "bfloat16")
        return DTYPE_NAMES.get(getattr(torch, told.removeprefix("torch."), torch.bfloat16), "BF16")

    @property
    def dtype(self) -> str:
        """Torch's name of the dtype that most of the written weights have."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.dtype in FLOATS:
                sizes[entry.dtype] += entry.nbytes
        return str(DTYPES[sizes.most_common(1)[0][0]]).removeprefix("torch.") if sizes else "float32"

    def _file(self, name: str) -> SafetensorsFile:
        return self._files[self._where[name]]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, mapped: read-only."""
        return self._file(name).tensor(name)

    def copy_bytes(self, name: str, out: BinaryIO) -> None:
        self._file(name).copy_bytes(name, out)

    def stored_nf4(self, weight: str) -> StoredNf4:
        """A weight that the base keeps in NF4.

        Raises:
            UserError: it is incomplete, or in another 4-bit format.
        """
        stored = {"": self.tensor(weight)} if weight in self._where else {}
        stored |= {part: self.tensor(f"{weight}.{part}") for part in _NF4_PARTS if f"{weight}.{part}" in self._where}
        try:
            return read_stored(stored)
        except (KeyError, ValueError, AssertionError) as error:
            raise UserError(f"{self.folder}: {weight} cannot be dequantized: {error}.", "Fetch it again.") from None

    def metadata(self, shard: str) -> dict[str, str]:
        return self._files[shard].metadata

    def forget(self) -> None:
        """Let go of the file pages that were read."""
        for file in self._files.values():
            file.forget()

    def linears(self) -> set[str]:
        """Names of the weights that transformers' 4-bit loading quantizes: every linear layer but the output head's.

        Raises:
            UserError: transformers does not know the architecture, or the files name their weights otherwise.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self.folder}/config.json: not a model that transformers builds: {error}.") from None
        head = model.get_output_embeddings()
        names = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head
        }
        missing = sorted(names - set(self.entries))
        if missing:
            raise UserError(
                f"{self.folder}: no tensor {missing[0]} in its files.",
                "Save the base again with transformers.",
            )
        return names

    def write_index(self, out: Path) -> None:
        """The shards' index, as it was, or without what dequantizing removed."""
        index = read_json(self.folder / INDEX)
        if index is None:
            return
        if not self.quantized:
            shutil.copyfile(self.folder / INDEX, out / INDEX)
            return
        index["weight_map"] = {name: shard for shard, names in self.shards.items() for name in names}
        index["metadata"] = {"total_size": sum(entry.nbytes for entry in self.entries.values())}
        write_json(out / INDEX, index)


def open_base(base: str | Path, revision: str = "main") -> BaseFiles:
    """The base's files, checked; a hub id is fetched first (safetensors, JSON and tokenizer files only).

    Raises:
        UserError: there is none by that name, it has no safetensors, or a file of it is broken.
    """
    return BaseFiles(str(base), fetch_base(str(base), revision))


def model_files(files: BaseFiles, out: Path, tokenizer_from: Path | None) -> list[int]:
    """Write everything but the weights: config.json, generation_config.json, tokenizer, chat template, licence.

    Returns:
        The ids at which generation stops.
    """
    for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*"):
        for path in files.folder.glob(pattern):
            shutil.copyfile(path, out / path.name)
    copy_tokenizer(tokenizer_from or files.folder, out)

    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    config.pop("torch_dtype", None)
    config["dtype"] = files.dtype
    if not config.get("architectures"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder))
        config["architectures"] = [type(model).__name__]
    write_json(out / "config.json", config)

    generation = read_json(files.folder / "generation_config.json") or {"_from_model_config": False}
    if "bos_token_id" not in generation and config.get("bos_token_id") is not None:
        generation["bos_token_id"] = config["bos_token_id"]
    known = generation.get("eos_token_id", config.get("eos_token_id"))
    known = known if isinstance(known, list) else [] if known is None else [known]
    ids = list(dict.fromkeys([*_end_tokens(out), *known]))
    if ids:
        generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(out / "generation_config.json", generation)
    return ids


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer files and chat template.

    Raises:
        UserError: the folder has no tokenizer.
    """
    if not (source / "tokenizer_config.json").is_file() and not (source / "tokenizer.json").is_file():
        raise UserError(f"{source}: no tokenizer there.", "Give a folder with the tokenizer's files.")
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates", dirs_exist_ok=True)


def _end_tokens(folder: Path) -> list[int]:
    """The token with which the chat template ends a turn of the assistant, then the tokenizer's own eos."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    if tokenizer.chat_template:
        said = "ZQX"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template may raise anything, by Jinja's own `raise_exception` too
            raise UserError(f"{folder}: the chat template refuses a plain exchange: {error}.") from None
        tail = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        ids += [token for token in tail if token in special][:1]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
