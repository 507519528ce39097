"""Malformed inputs: each ends with exit code 2 and names its place, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.malformed import make_adapter

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD.encode() + b'{"messages": "\xff"}\n', "a.jsonl line 2: not UTF-8 (byte 15 is 0xff)."),
        ("a.jsonl", b"null\n", "a.jsonl line 1: expected an object {…}, found 'null'."),
        ("a.jsonl", POINTER, "a.jsonl line 1: broken JSON"),
        ("a.jsonl", GOOD.replace("user", "\\u001b[2Jroot").encode(), "unknown role '\\x1b[2Jroot': 1 (a.jsonl row 1)"),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", "a.csv line 3: not readable as CSV: expected 2 cells, found 3."),
        ("a.csv", "prompt,completion\nä,b\n".encode("latin-1"), "a.csv line 2: not UTF-8 (byte 1 is 0xe4)."),
        ("a.parquet", b"PAR1" + bytes(90) + b"ding", "a.parquet: cannot be read: ArrowInvalid"),
        ("a.txt", GOOD.encode(), "a.txt: .txt is not read."),
    ],
)
def test_rows(invoke, tiny_base, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    code, out, err = invoke("data", "show", "sft", f"dataset={name}", f"model_name_or_path={tiny_base}")
    assert code == 2 and says in err and "Traceback" not in out + err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nlora_r: 2\nseed: 3\n", "run.yaml line 3: not readable as YAML: duplicate key 'seed'."),
        ("stage: !!python/object/apply:os.system [id]\n", "run.yaml line 1: not readable as YAML"),
        ("memory: " + "[" * 5000, "run.yaml: not readable as YAML: it is nested too deeply."),
        ("- seed\n", "run.yaml: expected `key: value` lines, found ['seed']."),
        ("stage: ../../etc\n", "run.yaml: stage: expected one word of letters"),
        (
            "lora_rr: 8\nengine: magic\n",
            "run.yaml: there is no key 'lora_rr'. Did you mean 'lora_r'?\nrun.yaml: engine: expected 'fused', 'trl' or",
        ),
    ],
)
def test_configurations(invoke, tmp_path, text, says):
    (tmp_path / "run.yaml").write_text(text)
    code, out, err = invoke("sft", "--config", "run.yaml")
    assert code == 2 and says in err and "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


def test_a_stage_json_that_was_cut_off(invoke, tmp_path, pair_rows):
    (tmp_path / "runs/t/sft").mkdir(parents=True)
    (tmp_path / "runs/t/sft/stage.json").write_text('{"format": 1, "status": "compl')
    code, _, err = invoke("dpo", "output_dir=runs/t", f"dataset={pair_rows}")
    assert code == 2 and "runs/t/sft/stage.json: not valid JSON (Unterminated string" in err


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def changed(name, **keys):
    """Change keys of a JSON file of the base."""
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **keys}))


def shard(name, link=None):
    """An index that names this file, which may be a link, in place of the one file."""

    def change(folder):
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        if link is not None:
            (folder / name).symlink_to(link)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (written(WEIGHTS, POINTER), f"base/{WEIGHTS}: is a git-lfs pointer, not the weights."),
        (written(WEIGHTS, b"PK\x03\x04" + bytes(100)), "it is a pickle, and pickles are never opened."),
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "(found pytorch_model.bin)."),
        (shard("../../etc/passwd"), f"base/{INDEX}: names '../../etc/passwd'"),
        (shard("pytorch_model.bin"), f"base/{INDEX}: names 'pytorch_model.bin'"),
        (shard("b.safetensors"), "base/b.safetensors: is not a file."),
        (shard("b.safetensors", "/etc/passwd"), "base/b.safetensors: is a link out of its folder, to /etc/passwd."),
        (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "base/LICENSE: is a link out of its folder"),
        (changed("config.json", attn_implementation="someone/kernel"), "attn_implementation is someone/kernel; only"),
        (changed("config.json", model_type="own", auto_map={"AutoConfig": "c.C"}), "needs code of its own"),
        (
            changed("config.json", model_type="phi3", rope_parameters=None, rope_scaling={"type": "su"}),
            'Write "longrope"',
        ),
        (written("config.json", "[" * 100_000), "base/config.json: not valid JSON"),
        (written("adapter_config.json", '{"peft_type": "LORA"}'), "base: holds adapter_config.json beside config.json"),
    ],
)
def test_bases(invoke, tiny_base, tmp_path, change, says):
    shutil.copytree(tiny_base, tmp_path / "base")
    make_adapter(tmp_path / "a")
    change(tmp_path / "base")
    code, out, err = invoke("merge", "--no-check", "--out", "out", "--adapter", "a", "--base", "base")
    assert code == 2 and says in err and "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"r": 0}, "a/adapter_config.json: r is 0: expected a number greater than 0."),
        ({"r": 4}, "by adapter_config.json they are float matrices [r, in] and [out, r] of rank 4."),
        ({"value": float("nan")}, "a/adapter_model.safetensors: the LoRA of model.layers.0.self_attn.q_proj holds NaN"),
    ],
)
def test_adapters(invoke, tiny_base, tmp_path, keys, says):
    make_adapter(tmp_path / "a", **keys)
    code, out, err = invoke("merge", "--no-check", "--out", "out", "--adapter", "a", "--base", tiny_base)
    assert code == 2 and says in err and "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


def test_a_template_cannot_reach_into_python_and_a_tokenizer_has_an_end(invoke, tiny_base, chat_rows, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "t.jinja").write_text("{{ ''.__class__.__mro__ }}")
    words = ["data", "show", "sft", f"dataset={chat_rows}", "model_name_or_path=base"]
    code, _, err = invoke(*words, "chat_template=t.jinja")
    assert code == 2 and "access to attribute '__class__' of 'str' object is unsafe." in err
    changed("tokenizer_config.json", eos_token=None)(tmp_path / "base")
    code, _, err = invoke(*words, "chat_template=zephyr")
    assert code == 2 and "has no eos token" in err
