"""What a run downloads and writes, said before anything is fetched."""

from __future__ import annotations

import glob
import shutil
from contextlib import suppress
from pathlib import Path

from ..config.load import Method, RunConfig
from ..data.sources import local_path
from ..errors import UserError
from ..io.run_dir import cache_dir
from ..model.base import compute_device, compute_dtype, quantized_dir
from ..model.files import named_folder
from .expected import GB, KNOWN_DATA, MISTRAL, MISTRAL_BYTES, base_shape, decimal, disk_bytes, expected_job
from .forecast import forecast_lines
from .machine import this_machine
from .plan import plan_run


def needs_lines(method: Method, config: RunConfig) -> list[str]:
    """What a run takes, before anything is downloaded: download and disk, and without a GPU memory and time.

    Raises:
        UserError: the base is still to be downloaded, and the run will not fit this card.
    """
    import datasets
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    # downloads: name → size in words; (folder, what is written there, bytes)
    fetch: dict[str, str] = {}
    written: list[tuple[Path, str, int]] = []
    name = config.model_name_or_path
    if named_folder("model", name) is None:
        weights = [try_to_load_from_cache(name, f"model.safetensors{end}") for end in ("", ".index.json")]
        if not isinstance(weights[0] or weights[1], str):
            fetch[name] = decimal(MISTRAL_BYTES) if name == MISTRAL else "(size not known)"
            written.append((Path(HF_HUB_CACHE), f"for {name}", MISTRAL_BYTES if name == MISTRAL else 0))
    for spec in (*config.dataset, *config.eval_dataset):
        known, converted = KNOWN_DATA.get(spec.path), Path(datasets.config.HF_DATASETS_CACHE)
        if local_path(spec) or spec.path in fetch or (converted / spec.path.replace("/", "___")).is_dir():
            continue
        fetch[spec.path] = "(size not known)" if known is None else decimal(known.download)
        written.append((converted, f"for {spec.path}", 0 if known is None else known.download + known.disk))
    lines = ["what this will take:"]
    lines.append("  download: " + (", ".join(f"{name} {size}" for name, size in fetch.items()) or "nothing"))
    job, device, run = None, compute_device(), Path(config.output_dir)
    dtype = compute_dtype(config.dtype, device)
    if config.engine == "fused" and (name == MISTRAL or (Path(name).expanduser() / "config.json").is_file()):
        with suppress(UserError, ValueError, KeyError, AttributeError):  # reported when the base is read
            job = expected_job(method, config, base_shape(name), dtype)
    if job is not None:
        there = {
            cache_dir(): any(quantized_dir().glob(f"{glob.escape(Path(name).name)}-*")),
            run: (run / config.stage).is_dir(),
        }
        for what, size in disk_bytes(job, config).items():
            place = cache_dir() if "quantized" in what else run
            if not there[place]:
                written.append((place, what, size))
    left: dict[int, int] = {}  # device → bytes that are free once this is written
    for place, what, size in written:
        if size < 1e6:  # or not known
            continue
        folder = next(path for path in (place, *place.absolute().parents) if path.exists())
        disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        left[disk] = left.get(disk, free) - size
        short = " — NOT ENOUGH" if left[disk] < 0 else ""
        lines.append(f"  disk: {decimal(size)} {what} in {place} ({free / GB:.0f} GB are free){short}")
    if job is not None and name in fetch:
        # the plan is printed once the rows are there; but nothing is downloaded for a run that does not fit
        cpu = device.type == "cpu"
        machine = this_machine(device, dtype, config.memory, measure=cpu)
        job, plan, _ = plan_run(job, machine, config.memory, config)
        if cpu:
            change = "`zephyr-lite plan --gpu 3060` plans for a card; `zephyr-lite demo` is a small run"
            lines += forecast_lines(job, machine, plan, config, change=change)
    return lines
