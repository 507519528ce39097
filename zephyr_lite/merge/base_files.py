"""The base's files that a merge reads, and the files of the merged folder beside the weights."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..data.chat_template import ChatTemplate
from ..data.formats import RowError
from ..errors import UserError
from ..io.atomic import copy_file, make_folder, write_json
from ..io.safetensors import DTYPE_NAMES, DTYPES, FLOATS, Entry
from ..io.text import is_whole, read_object, shown
from ..model.base import fetch_base, read_model_config
from ..model.check_weights import NF4_STATE, empty_model, stored_settings
from ..model.config_file import check_config_file
from ..model.shards import INDEX, SINGLE, again, checked_place, open_shards
from ..model.tokenizer import OWN_FILES, check_vocabulary, load_tokenizer, make_portable, save_tokenizer
from ..ops.nf4 import StoredNf4, read_stored

GENERATION = "generation_config.json"
TOKENIZER_FILES = (*OWN_FILES, "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


class BaseFiles:
    """A base's weights on disk, and the layout of the merged folder's weights.

    Attributes:
        name: the name that the user gave.
        folder: the base's folder.
        config: its config.json.
        shards: output file name → tensor names, in the order of the bytes.
        entries: tensor name → Entry of the output. Of weights in NF4 (`quantized`), which are written dequantized, only dtype
            and shape are meaningful.
        quantized: names of the weights that the base keeps in NF4.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.config = check_config_file(folder)
        self._files = open_shards(folder)
        self._holds = {tensor: file for file in self._files.values() for tensor in file.entries}
        if (settings := self.config.get("quantization_config")) is not None:
            stored_settings(settings, folder)
        self.quantized = {name.removesuffix(NF4_STATE) for name in self._holds if name.endswith(NF4_STATE)}
        self.entries: dict[str, Entry] = {}
        self.shards: dict[str, list[str]] = {}
        for file_name, file in self._files.items():
            names = [
                tensor for tensor in file.entries if f"{tensor.rpartition('.weight.')[0]}.weight" not in self.quantized
            ]
            if names:
                self.shards[file_name] = names
            for tensor in names:
                entry = file.entries[tensor]
                self.entries[tensor] = self._dequantized(entry) if tensor in self.quantized else entry

    def _dequantized(self, entry: Entry) -> Entry:
        dtype = self.nf4_output_dtype
        shape = tuple(json.loads(bytes(self.tensor(entry.name + NF4_STATE)))["shape"])
        return Entry(entry.name, dtype, shape)

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

    @cached_property
    def tied(self) -> bool:
        """Whether one matrix is both embedding and output head: as config.json says, unless the files hold two that differ
        (which transformers then does not tie)."""
        if not self.config.get("tie_word_embeddings"):
            return False
        ends = ("embed_tokens.weight", "lm_head.weight")
        pair = [self.tensor(name) for end in ends for name in self.entries if name.endswith(end)]
        return len(pair) != 2 or (pair[0].shape == pair[1].shape and torch.equal(pair[0], pair[1].to(pair[0].dtype)))

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, mapped: read-only."""
        return self._holds[name].tensor(name)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding, where it has its usual name; else as config.json says."""
        rows = (entry.shape[0] for name, entry in self.entries.items() if name.endswith("embed_tokens.weight"))
        return next(rows, self.config.get("vocab_size"))

    def parameter(self, name: str) -> Tensor | None:
        """A parameter of the model (a tied head is the embedding); None: the base has none."""
        if name not in self.entries and self.tied and name.endswith("lm_head.weight"):
            name = next((other for other in self.entries if other.endswith("embed_tokens.weight")), name)
        return self.tensor(name) if name in self.entries else None

    def copy_bytes(self, name: str, out: BinaryIO) -> None:
        self._holds[name].copy_bytes(name, out)

    def stored_nf4(self, weight: str) -> StoredNf4:
        """A weight that the base keeps in NF4."""
        parts = {name.removeprefix(f"{weight}."): name for name in self._holds if name.startswith(f"{weight}.")}
        return read_stored({"": self.tensor(weight), **{part: self.tensor(name) for part, name in parts.items()}})

    def metadata(self, shard: str) -> dict[str, str]:
        return self._files[shard].metadata

    def forget(self) -> None:
        """Release the file pages that were read."""
        for file in self._files.values():
            file.forget()

    def linears(self) -> set[str]:
        """Names of the weights that transformers' 4-bit loading quantizes: every linear layer but the output head's.

        Raises:
            UserError: transformers does not know the architecture, or the files name their weights otherwise.
        """
        model = empty_model(self.folder, read_model_config(self.folder, any_family=True))
        head = model.get_output_embeddings()
        linears = {name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}
        names = {f"{name}.weight" for name in linears}
        if missing := sorted(names - set(self.entries)):
            raise UserError(
                f"{self.folder}: no tensor {missing[0]} in its files.", "Save the base again with transformers."
            )
        return names

    def write_index(self, out: Path) -> None:
        """The shards' index: a copy of the base's, without the parts that dequantizing removed."""
        if SINGLE in self._files:
            return
        if not self.quantized:
            copy_file(self.folder / INDEX, out / INDEX)
            return
        weight_map = {name: shard for shard, names in self.shards.items() for name in names}
        total = sum(entry.nbytes for entry in self.entries.values())
        write_json(out / INDEX, {"weight_map": weight_map, "metadata": {"total_size": total}})


def open_base(base: str | Path, revision: str = "main") -> BaseFiles:
    """The base's files; a hub id is downloaded first (safetensors, JSON and tokenizer files only).

    Raises:
        UserError: there is none by that name, it has no safetensors, or a file of it is broken.
    """
    return BaseFiles(str(base), fetch_base(str(base), revision))


def model_files(files: BaseFiles, out: Path, tokenizer_from: Path | None) -> list[int]:
    """Write everything but the weights: config.json, generation_config.json, tokenizer, chat template, licence.

    Returns:
        The ids at which generation stops.
    """
    _copy_all(files.folder, out, ("LICENSE*", "NOTICE*", "USE_POLICY*"))
    source = tokenizer_from or files.folder
    tokenizer = load_tokenizer(source)
    if files.vocabulary and check_vocabulary(tokenizer, files.vocabulary, source):
        save_tokenizer(tokenizer, out)
    else:
        copy_tokenizer(source, out)
    config = _config(files)
    write_json(out / "config.json", config)

    path = files.folder / GENERATION
    generation: dict[str, Any] = {"_from_model_config": False}
    if path.is_file():
        generation = read_object(path, strict=False, hint=again(path))
    if "bos_token_id" not in generation and config.get("bos_token_id") is not None:
        generation["bos_token_id"] = config["bos_token_id"]
    place = path if "eos_token_id" in generation else files.folder / "config.json"
    ends: Any = generation.get("eos_token_id", config.get("eos_token_id"))
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(is_whole(token) and token >= 0 for token in known):
        raise UserError(
            f"{place}: eos_token_id is {shown(known)}; it is a token's number, or a list of them.", again(place)
        )
    ids = list(dict.fromkeys([*_end_tokens(source), *known]))
    if ids:
        generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(out / GENERATION, generation)
    return ids


def _config(files: BaseFiles) -> dict[str, Any]:
    """config.json of the merged folder, with the keys of transformers 4 and 5."""
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    config["dtype"] = config["torch_dtype"] = files.dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = files.tied
    if not config.get("architectures"):
        model = empty_model(files.folder, read_model_config(files.folder, any_family=True))
        config["architectures"] = [type(model).__name__]
    return config


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy tokenizer files and chat templates.

    Raises:
        UserError: the folder has no tokenizer.
    """
    if not (source / "tokenizer_config.json").is_file() and not (source / "tokenizer.json").is_file():
        raise UserError(f"{source}: no tokenizer there.", "Give a folder with the tokenizer's files.")
    _copy_all(source, out, TOKENIZER_FILES)
    more = source / "additional_chat_templates"
    if more.is_dir():
        make_folder(out / more.name)
        _copy_all(more, out / more.name, ("*.jinja",))
    make_portable(out)


def _copy_all(source: Path, out: Path, patterns: Iterable[str]) -> None:
    """Copy files by pattern. A link out of the folder is refused: a merged model is published, and the link may lead to a
    private key."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if not path.is_dir():
                copy_file(checked_place(path), out / path.name)


def _end_tokens(folder: Path) -> list[int]:
    """The token that ends an assistant's turn in the chat template, then the tokenizer's own eos."""
    tokenizer = load_tokenizer(folder)
    ids: list[int] = []
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        said = "ZQX"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        try:
            text = ChatTemplate(tokenizer, template, "the tokenizer's own").text_of(turns)
        except RowError as error:
            raise UserError(
                f"{folder}: on a plain exchange {error}.",
                "Merge with the tokenizer of a stage, or change the template.",
            ) from None
        tail = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        ids += [token for token in tail if token in special][:1]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
