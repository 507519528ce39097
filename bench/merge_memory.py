"""How much memory a merge takes: a synthetic base of several GB, a chain of rank 16 + 128, RssAnon of the merge.

    python bench/merge_memory.py                       # 12 layers of Mistral-7B in bfloat16: 5.8 GB, in five shards
    python bench/merge_memory.py --layers 32 --dir /big/disk

Needs twice the base's size on the disk, in a folder that is removed afterwards. Prints one JSON object. RssAnon is the
process' own memory; pages of the base that the kernel caches (RssFile) are given back when something else needs them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from zephyr_lite.io.safetensors import nbytes, row_blocks, tensor_bytes, write_stream
from zephyr_lite.model.peft_io import LoraWeights, write_adapter

CHILD = """
import json, sys, time
from zephyr_lite.merge import chain_of_adapters, merge
sys.path.insert(0, {here!r})
from merge_memory import rss_anon
print(json.dumps(rss_anon("self")), flush=True)
start = time.monotonic()
merge({base!r}, chain_of_adapters({adapters!r}, base={base!r}).adapters, {out!r}, onto={onto!r})
print(json.dumps(time.monotonic() - start), flush=True)
"""


def rss_anon(pid: int | str) -> int:
    """RssAnon of a process in bytes, 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return 0


def linear_shapes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Module name → (out, in) of every linear layer that adapters reach."""
    hidden, inner, kv = args.hidden, args.intermediate, args.hidden // 4
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(args.layers) for name, shape in layer.items()}


def base_tensors(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (args.vocab, args.hidden)
    linears = linear_shapes(args)
    for i in range(args.layers):
        yield from ((f"{name}.weight", shape) for name, shape in linears.items() if name.split(".")[2] == str(i))
        yield f"model.layers.{i}.input_layernorm.weight", (args.hidden,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (args.hidden,)
    yield "model.norm.weight", (args.hidden,)
    yield "lm_head.weight", (args.vocab, args.hidden)


def write_base(folder: Path, args: argparse.Namespace) -> int:
    """Write a Mistral-shaped base of random bfloat16 weights, sharded; returns the bytes of its weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = dict(base_tensors(args))
    total = sum(nbytes("BF16", shape) for shape in tensors.values())
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        if shards[-1] and size > total / args.shards:
            shards.append({})
            size = 0
        shards[-1][name] = ("BF16", shape)
        size += nbytes("BF16", shape)

    def write(name: str, file: BinaryIO) -> None:
        shape = tensors[name]
        for rows in row_blocks(shape[0], 4 * (shape[1] if len(shape) > 1 else 1), 2**26):
            block = torch.randn((rows.stop - rows.start, *shape[1:]), generator=generator) * 0.02
            file.write(tensor_bytes(block.bfloat16()))

    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_stream(folder / name, shard, write, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "dtype": "bfloat16",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return total


def write_chain(folder: Path, args: argparse.Namespace) -> list[str]:
    """Write the two adapters of the recipe, rank 16 and rank 128, float32."""
    paths = []
    for rank in args.ranks:
        modules = {
            name: LoraWeights(torch.randn(rank, width) * 0.01, torch.randn(height, rank) * 0.01, 1.0)
            for name, (height, width) in linear_shapes(args).items()
        }
        paths.append(str(folder / f"rank-{rank}"))
        write_adapter(paths[-1], modules, base_model_name="synthetic")
    return paths


def measure(base: Path, adapters: list[str], out: Path, onto: str) -> dict[str, Any]:
    """Merge in a process of its own and watch its RssAnon every 5 ms."""
    code = CHILD.format(here=str(Path(__file__).parent), base=str(base), adapters=adapters, out=str(out), onto=onto)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    imported = json.loads(process.stdout.readline() or "0")
    peak = imported
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"the merge onto {onto} failed with exit code {process.returncode}")
    seconds = json.loads(process.stdout.readline())
    process.stdout.close()
    return {
        "seconds": round(seconds, 1),
        "peak_rss_anon_mb": round(peak / 1e6),
        "after_imports_mb": round(imported / 1e6),
        "above_imports_mb": round((peak - imported) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--onto", nargs="+", default=["base", "nf4"], choices=["base", "nf4"])
    parser.add_argument("--dir", default=None, help="where to put the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-memory-", dir=args.dir) as name:
        folder = Path(name)
        size = write_base(folder / "base", args)
        adapters = write_chain(folder, args)
        result: dict[str, Any] = {"base_gb": round(size / 1e9, 3), "layers": args.layers, "ranks": args.ranks}
        for onto in args.onto:
            result[onto] = measure(folder / "base", adapters, folder / "out", onto)
            shutil.rmtree(folder / "out")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
