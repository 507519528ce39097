"""The base's files that a merge reads, and the files of the merged folder beside the weights."""

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.chat_template import ChatTemplate
from ..io.atomic import write_json
from ..io.safetensors import DTYPE_NAMES, DTYPES, FLOATS, Entry
from ..io.text import read_object
from ..model.base_folder import NF4_STATE, empty_model, read_model_config, stored_settings
from ..model.files import INDEX, SINGLE, again, check_config_file, has_text_model, open_shards
from ..model.tokenizer import check_vocabulary, copy_files, load_tokenizer, save_tokenizer
from ..ops.nf4 import read_stored

GENERATION = "generation_config.json"


class BaseFiles:
    """A base's weights on disk, and the layout of the merged folder's weights.

    Attributes:
        config: config.json; of a multimodal base the text model's.
        shards: output file name → tensor names, in the order of the bytes.
        entries: tensor name → Entry of the output. Of weights in NF4 (`quantized`), which are written dequantized, only dtype
            (the base's compute dtype) and shape are meaningful.
        quantized: names of the weights that the base keeps in NF4.
        files: name → SafetensorsFile of the base.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = check_config_file(folder)
        if has_text_model(self.config):
            self.config = json.loads(read_model_config(folder, any_family=True).to_json_string())
        self.files = open_shards(folder)
        self._holds = {tensor: file for file in self.files.values() for tensor in file.entries}
        nf4_dtype = ""
        if (settings := self.config.get("quantization_config")) is not None:
            stored_settings(settings, folder)
            told = str(settings.get("bnb_4bit_compute_dtype") or "bfloat16")
            nf4_dtype = DTYPE_NAMES[getattr(torch, told.removeprefix("torch."))]
        self.quantized = {name.removesuffix(NF4_STATE) for name in self._holds if name.endswith(NF4_STATE)}
        self.entries: dict[str, Entry] = {}
        self.shards: dict[str, list[str]] = {}
        for tensor, file in self._holds.items():
            if f"{tensor.rpartition('.weight.')[0]}.weight" in self.quantized:
                continue  # a part of an NF4 weight
            entry = file.entries[tensor]
            if tensor in self.quantized:
                shape = json.loads(bytes(self.tensor(tensor + NF4_STATE)))["shape"]
                entry = Entry(tensor, nf4_dtype, tuple(shape))
            self.entries[tensor] = entry
            self.shards.setdefault(file.path.name, []).append(tensor)

    @property
    def dtype(self) -> str:
        """Torch's name of the dtype that most of the written weights have."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.dtype in FLOATS:
                sizes[entry.dtype] += entry.nbytes
        return str(DTYPES[sizes.most_common(1)[0][0]]).removeprefix("torch.")

    @cached_property
    def tied(self) -> bool:
        """Whether one matrix is both embedding and output head: as config.json says, unless the files hold two that differ
        (which transformers then does not tie)."""
        if not self.config.get("tie_word_embeddings"):
            return False
        ends = ("embed_tokens.weight", "lm_head.weight")
        pair = [self.tensor(name) for end in ends for name in self.entries if name.endswith(end)]
        return len(pair) != 2 or (pair[0].shape == pair[1].shape and torch.equal(pair[0], pair[1].to(pair[0].dtype)))

    @property
    def nbytes(self) -> int:
        """Size of the written weights."""
        return sum(entry.nbytes for entry in self.entries.values())

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, mapped: read-only."""
        return self._holds[name].tensor(name)

    def parameter(self, name: str) -> Tensor | None:
        """A parameter of the model (a tied head is the embedding); None: the base has none."""
        if name not in self.entries and self.tied and name.endswith("lm_head.weight"):
            name = next((other for other in self.entries if other.endswith("embed_tokens.weight")), name)
        return self.tensor(name) if name in self.entries else None

    def stored_nf4(self, weight: str) -> Tensor:
        """A weight that the base keeps in NF4, dequantized."""
        parts = {name.removeprefix(f"{weight}."): name for name in self._holds if name.startswith(f"{weight}.")}
        return read_stored({"": self.tensor(weight), **{part: self.tensor(name) for part, name in parts.items()}})

    def forget(self) -> None:
        """Release the file pages that were read."""
        for file in self.files.values():
            file.forget()

    def linears(self) -> set[str]:
        """Names of the weights that transformers' 4-bit loading quantizes: every linear layer but the output head's."""
        model = empty_model(self.folder, read_model_config(self.folder, any_family=True))
        head = model.get_output_embeddings()
        modules = model.named_modules()
        names = {f"{name}.weight" for name, module in modules if type(module) is nn.Linear and module is not head}
        assert names <= self.entries.keys(), names - self.entries.keys()
        return names

    def write_index(self, out: Path) -> None:
        """The shards' index."""
        if SINGLE in self.files:
            return
        weight_map = {name: shard for shard, names in self.shards.items() for name in names}
        write_json(out / INDEX, {"weight_map": weight_map, "metadata": {"total_size": self.nbytes}})


def model_files(files: BaseFiles, out: Path, tokenizer_from: Path | None) -> list[int]:
    """Write everything but the weights: config.json, generation_config.json, tokenizer, chat template, licence.

    Returns:
        The ids at which generation stops.
    """
    copy_files(files.folder, out, ("LICENSE*", "NOTICE*", "USE_POLICY*"))
    source = tokenizer_from or files.folder
    tokenizer = load_tokenizer(source)
    rows = (entry.shape[0] for name, entry in files.entries.items() if name.endswith("embed_tokens.weight"))
    check_vocabulary(tokenizer, next(rows, files.config.get("vocab_size")) or len(tokenizer), source)
    ids = _end_tokens(tokenizer)
    save_tokenizer(tokenizer, out)
    config = _config(files)
    write_json(out / "config.json", config)

    path = files.folder / GENERATION
    generation: dict[str, Any] = {"_from_model_config": False}
    if path.is_file():
        generation = read_object(path, hint=again(path))
    if config.get("bos_token_id") is not None:
        generation.setdefault("bos_token_id", config["bos_token_id"])
    known = generation.get("eos_token_id", config.get("eos_token_id"))
    ids += known if isinstance(known, list) else [] if known is None else [known]
    ids = list(dict.fromkeys(ids))
    if ids:
        generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(out / GENERATION, generation)
    return ids


def _config(files: BaseFiles) -> dict[str, Any]:
    """config.json of the merged folder, with the keys of transformers 4 and 5."""
    left_out = ("quantization_config", "auto_map")  # the merged weights are dense; no code is copied
    config = {key: value for key, value in files.config.items() if key not in left_out}
    config["dtype"] = config["torch_dtype"] = files.dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "full_attention" in rope:  # Gemma 3's
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
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


def _end_tokens(tokenizer: Any) -> list[int]:
    """The token that ends an assistant's turn in the chat template, then the tokenizer's own eos."""
    ids: list[int] = []
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ZQX"}]
        text = ChatTemplate(tokenizer, template, "the tokenizer's own").text_of(turns)
        tail = tokenizer(text.rpartition("ZQX")[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        ids += [token for token in tail if token in special][:1]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
