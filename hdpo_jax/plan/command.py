"""`hdpo plan CONFIG`: each program compiled once for its slice, the figures kept, a table."""

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hdpo_jax.config import RLConfig
from hdpo_jax.plan.advice import advice
from hdpo_jax.plan.estimate import DoesNotFit, Estimate, check, estimate, programs_of, sizes_of
from hdpo_jax.plan.programs import Setting
from hdpo_jax.plan.topology import GIB, Topology
from hdpo_jax.plan.workload import Workload

SHARE = 0.85
"""Of a chip's memory that programs may take: the rest is for what XLA does not count, and for fragments."""
PLANS = Path("runs/plans")
"""Where figures are kept; they are found anew when settings, libraries or code have changed."""
PACKAGES = ("hdpo-jax", "jax", "libtpu", "flax", "optax")


def plan(config: RLConfig, *, as_json: bool, cache: Path) -> None:
    """Prints what the run's programs take on its slice."""
    check(config)
    topology = Topology(config.topology)
    console = Console(stderr=True)
    kept = cache / f"{_fingerprint(config)}.json"
    if kept.is_file():
        programs = {name: Estimate(**fields) for name, fields in json.loads(kept.read_text()).items()}
        console.print(f"figures of {kept}")
    else:
        programs = dict(_estimates(config, topology, console))
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({name: dataclasses.asdict(one) for name, one in programs.items()}))
    limit = SHARE * topology.chip.hbm_bytes
    if as_json:
        json.dump(summary(topology, programs, limit), sys.stdout, indent=2)
        print()
    else:
        out = Console()
        out.print(table(topology, programs))
        for line in verdict(config, topology, programs):
            out.print(line, highlight=False)
        for line in advice(config, programs, limit):
            out.print(f"  try {line}", highlight=False)


def _estimates(config: RLConfig, topology: Topology, console: Console) -> Iterator[tuple[str, Estimate]]:
    setting = Setting.of(config, sizes_of(config), topology.devices())
    programs = programs_of(setting)
    for number, (name, program) in enumerate(programs.items(), start=1):
        console.print(f"compiling {name} ({number}/{len(programs)}) for {topology.name}", highlight=False)
        try:
            found = estimate(name, program, setting, topology)
            console.print(f"  {found.compile_seconds:.0f} s", highlight=False)
        except DoesNotFit as error:
            found = Estimate.too_large(topology.chip.devices * error.needed)
            console.print(f"  no room: it asks for {error}", highlight=False)
        for scope in found.unknown_loops:
            console.print(f"  counted once, its length is not known: {scope}", highlight=False)
        yield name, found


def summary(topology: Topology, programs: Mapping[str, Estimate], limit: float) -> Mapping[str, Any]:
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "fits": all(one.hbm_bytes <= limit for one in programs.values()),
        "programs": {
            name: {
                "hbm_bytes_per_chip": one.hbm_bytes,
                "hbm_limit_bytes": topology.chip.hbm_bytes,
                "flops_per_chip": one.flops,
                "model_flops_per_chip": one.model_flops,
                "bytes_per_chip": one.bytes_moved,
                "collective_bytes_per_chip": one.collective_bytes,
                "collectives": one.collectives,
                "roofline_seconds": one.seconds,
            }
            for name, one in programs.items()
        },
    }


def table(topology: Topology, programs: Mapping[str, Estimate]) -> Table:
    chip = topology.chip
    drawn = Table(
        title=f"{topology.name}: a chip's share of {topology.chips}, each with {chip.hbm_bytes / GIB:.0f} GiB"
    )
    memory = ("HBM GiB", "of limit", "arguments", "temporary")
    columns = ("program", *memory, "TFLOP", "model", "ratio", "moved GB", "sent GB", "roofline s")
    for column in columns:
        drawn.add_column(column, justify="left" if column == "program" else "right")
    for name, one in programs.items():
        share = one.hbm_bytes / chip.hbm_bytes
        drawn.add_row(
            name,
            f"{one.hbm_bytes / GIB:.1f}",
            f"[{'red' if share > SHARE else 'green'}]{share:.0%}[/]",
            f"{one.argument_bytes / GIB:.1f}",
            f"{one.temporary_bytes / GIB:.1f}",
            f"{one.flops / 1e12:,.1f}",
            f"{one.model_flops / 1e12:,.1f}",
            f"{one.flops / one.model_flops:.2f}" if one.model_flops else "",
            f"{one.bytes_moved / 1e9:,.1f}",
            f"{one.collective_bytes / 1e9:,.1f}",
            f"{one.seconds:,.2f}",
        )
    return drawn


def verdict(config: RLConfig, topology: Topology, programs: Mapping[str, Estimate]) -> Iterator[str]:
    """What a step takes at the roofline whose rows are full, each of a prompt and a response at their longest."""
    workload = Workload.of(config, sizes_of(config))
    prefill, decode, update = (programs[name] for name in ("prefill", "decode", "update"))
    if prefill.seconds and decode.seconds and update.seconds:
        rate = decode.tokens / decode.seconds
        rollouts = config.train.prompts_per_step * config.train.group_size
        sampled = min(rollouts, workload.rows) * workload.response
        prefilling = prefill.seconds * config.train.prompts_per_step * workload.prompt / prefill.tokens
        step = prefilling + sampled / rate + update.seconds
        yield f"at the roofline: {rate:,.0f} sampled tokens/s"
        yield (
            f"a step of {rollouts:,} rollouts, {sampled / rollouts:,.0f} sampled tokens each: {prefilling:,.0f} s of "
            f"prefill, {sampled / rate:,.0f} s of decoding, {update.seconds:,.0f} s of update, "
            f"{step * topology.chips / 3600:,.1f} chip-hours"
        )
    kinds = {kind for one in programs.values() for kind in one.collectives}
    for kind in sorted(kinds):
        sent = ", ".join(
            f"{name} {one.collectives[kind] / 1e9:,.2f}" for name, one in programs.items() if one.collectives.get(kind)
        )
        yield f"{kind}, GB a chip: {sent}"


def _fingerprint(config: RLConfig) -> str:
    """Of all that the figures depend on: the settings, the libraries, and this code."""
    versions = {name: _version(name) for name in PACKAGES}
    code = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for folder in ("hdpo_jax", "models", "sharding"):
        for file in sorted((root / folder).rglob("*.py")):
            code.update(file.read_bytes())
    asked = json.dumps([dataclasses.asdict(config), versions, code.hexdigest()], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
