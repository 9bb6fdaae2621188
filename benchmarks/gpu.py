"""What only a GPU shows, within minutes: laws on CUDA, costs at the papers' scale, and plans beside them.

    python benchmarks/gpu.py                                  # one card, 8 minutes at most
    python benchmarks/gpu.py --minutes 5 --only laws,llama-1b
    python benchmarks/gpu.py --device cpu --small             # every part on tiny sizes, in seconds
    python benchmarks/gpu.py --table                          # the results so far, as Markdown

It runs from a checkout with torch, transformers, timm and peft, and needs neither an installation nor a network. What
matters most comes first. Each part has a share of the time, and what a part leaves goes to the next. The results file
is written after every row. A row says why it has no numbers: refused, out of memory, or left out for lack of time. To
add a contender, add a line to `CONTENDERS` in `gpu_cases.py`.

Weights are random, as no cost depends on them. Steps are forward, backward and AdamW at a learning rate of 0. A
replay and a chunked loss are compared with the plain way in their first step, which is therefore never measured.
"""

from __future__ import annotations

import time

START = time.monotonic()

import argparse
import copy
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import sidestep as ss
from gpu_cases import BANKS, CONTENDERS, FAMILIES, METHODS, SCALES, SMALL, WAYS, Batch, Contender, Scale
from sidestep.backbone import trunk_of
from sidestep.disk.atomic import whole
from sidestep.fold.forms import KeepWarning
from sidestep.interface.keep import ROUNDED
from sidestep.measure.energy import EnergyCounter, energy_counter, energy_per_step
from sidestep.measure.memory import mib, peak_memory
from sidestep.measure.meters import Spread, attached
from sidestep.measure.plan import plan_for
from sidestep.measure.step import (
    accepted,
    idle_optimizer,
    measure_step,
    nbytes,
    predict,
    seconds_of,
    synchronize,
    train_step,
)
from sidestep.model.settings import Settings
from sidestep.tasks.together import Together
from sidestep.versions import versions

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("sidestep", "torch", "transformers", "timm", "peft", "bitsandbytes")
SEED = 0
LEFT_OUT = "left out: time"
GRACE = 0.05
"""Share of the time by which a row may overrun its part before it is stopped."""
MEMORY, TIMES = 0.6, 0.85
"""Shares of a part by whose end memory and times are measured. Energy has the rest."""

Row = dict[str, Any]


# --- the laws ----------------------------------------------------------------------------------------------------

SAME = {"float32": 1e-5, "bf16 autocast": 1e-2}
"""How far gradients and outputs that should be the same may be apart, relative to their norm."""
ALIKE = 0.999
"""Least cosine of gradients whose inputs were rounded."""


def laws(run: Run, rows: list[Row]) -> None:
    """Every way of keeping has the outputs and gradients of the plain one, and leaves the backbone as it was."""
    for family, kind in FAMILIES.items():
        with run.device:
            backbone, batch = kind.backbone(small=run.small), kind.batch(small=run.small)
        if kind.reads == "texts":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][-1, -2:] = 0
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        chosen = METHODS if not run.small or family == "bert" else {"read": METHODS["read"]}
        for name, method in chosen.items():
            wanted: dict[str, Any] = {}
            for keep, loss in WAYS:  # the plain one first
                if loss == "chunked" and not kind.writes:
                    continue
                own = Settings(method, keep=keep, lm_loss=loss)
                settings = own if kind.writes else Settings(method, ss.Classify(num_labels=2, pool="mean"), keep=keep)
                for precision in SAME:
                    row = {"family": family, "method": name, "precision": precision, "keep": keep, "loss": loss}
                    rows.append(row)
                    run.guarded(row, partial(_law, backbone, batch, settings, row, wanted))
                run.check()
            run.save()
        after = backbone.state_dict()
        same = all(torch.equal(after[name], value) for name, value in before.items())
        clean = not any(module._forward_hooks for module in backbone.modules())
        clean &= all(parameter.grad is None for parameter in backbone.parameters())
        rows.append({"family": family, "law": "the backbone is untouched", "status": "ok", "holds": same and clean})


def _law(backbone: nn.Module, batch: Batch, settings: Settings, row: Row, wanted: dict[str, Any]) -> Row:
    """One step, compared with the plain one of the same precision. The plain one, which comes first, is noted."""
    torch.manual_seed(SEED)
    with attached(backbone, settings) as model:
        generator = torch.Generator().manual_seed(SEED)
        trained = [parameter for _, parameter in model.trained_parameters()]
        with torch.no_grad():  # without any zero start, which hides errors
            for parameter in trained:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
        model.train()
        torch.manual_seed(SEED)  # the same dropout in all
        with torch.autocast(model.device.type, torch.bfloat16, enabled=row["precision"] != "float32"):
            output = model(**accepted(model, batch))
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten().float() for p in trained if p.grad is not None])
        logits = None if output.get("logits") is None else output.logits.detach().float()
        found = (gradient, output.loss.detach(), logits)
    if row["keep"] == "full" and row["loss"] == "own":
        wanted[row["precision"]] = found
        return {"holds": bool(gradient.isfinite().all() and gradient.norm() > 0)}
    plain, loss, plain_logits = wanted[row["precision"]]
    error, cosine = _apart(gradient, plain), float(torch.cosine_similarity(gradient, plain, dim=0))
    off = _apart(found[1], loss) if logits is None else _apart(logits, plain_logits)
    limit = SAME[row["precision"]]
    right = cosine >= ALIKE if row["keep"] in ROUNDED else error <= limit
    return {"gradient_error": error, "cosine": cosine, "output_error": off, "holds": right and off <= limit}


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- costs at the papers' scale ----------------------------------------------------------------------------------


@dataclass
class Stage:
    """A backbone in memory, and its batch. The quantised copy is made when it is first asked for."""

    run: Run
    scale: Scale
    copies: dict[bool, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with self.run.device:
            self.copies[False] = self.scale.backbone(small=self.run.small)
            self.batch = self.scale.batch(small=self.run.small)

    @contextmanager
    def attached(self, one: Contender) -> Iterator[Any]:
        """The contender's model, in the mode in which it is measured."""
        if one.on not in (None, self.scale.reads):
            raise ss.UnsupportedBackbone(f"it is for {one.on}")
        if one.quantised and True not in self.copies:
            self.copies[True] = in_four_bits(self.copies[False], self.run.device)
        around = _to_host(self.run.device) if one.to_host else nullcontext()
        with attached(self.copies[one.quantised], self.scale.settings(one)) as model, around:
            yield model.train(not one.bare)

    @contextmanager
    def step(self, one: Contender) -> Iterator[Callable[[], None]]:
        """A step of the contender, after a first one."""
        with self.attached(one) as model:
            inputs = accepted(model, self.batch)
            with nullcontext() if one.bare else idle_optimizer(model) as optimizer:
                step = partial(predict, model, inputs, False)
                if optimizer is not None:
                    step = partial(train_step, model, inputs, optimizer, False)
                step()
                yield step

    def memory(self, one: Contender) -> Row:
        """What a step keeps, and how far memory rises in it."""
        if one.bare:
            with self.step(one) as step:
                return {"peak_bytes": peak_memory(step, self.run.device).allocated, "kept_bytes": 0}
        with self.attached(one) as model:
            with idle_optimizer(model) as optimizer:
                train_step(model, accepted(model, self.batch), optimizer, False)
            cost = measure_step(model, self.batch)
            chunked = model.token_loss is not None and bool(model.token_loss.proved)
            return {
                "peak_bytes": cost.peak_bytes,
                "kept_bytes": 0 if one.to_host else cost.kept_bytes,
                "host_bytes": cost.kept_bytes if one.to_host else None,
                "gradient_bytes": cost.gradient_bytes,
                "optimizer_bytes": cost.optimizer_bytes,
                "model_bytes": nbytes([*model.parameters(), *model.buffers()]),
                "parameters": sum(parameter.numel() for _, parameter in model.trained_parameters()),
                "flops": cost.flops,
                "loss": "chunked" if chunked else "own",
            }

    def seconds(self, one: Contender, before: list[float]) -> Row:
        """Of some steps in a row, with those of earlier rounds."""
        with self.step(one) as step:
            values = [seconds_of(step, self.run.device) for _ in range(1 if self.run.small else 3)]
        return {"step_seconds": vars(Spread.of([*before, *values]))}

    def joules(self, one: Contender, counter: EnergyCounter) -> Row:
        """Of a step."""
        wait, seconds = partial(synchronize, self.run.device), 0.05 if self.run.small else 1.0
        with self.step(one) as step:
            return {"joules": energy_per_step(step, counter, wait, seconds=seconds), "joules_of": counter.source}


def costs(name: str, run: Run, rows: list[Row]) -> None:
    """Memory of every contender, then their times in turns, then their energy."""
    labels = SMALL if run.small else tuple(CONTENDERS)
    rows += [{"backbone": name, "contender": label, "status": LEFT_OUT} for label in labels]
    stage, began, counter = Stage(run, SCALES[name]), time.monotonic(), energy_counter(run.device)
    memory, times = (began + share * (run.ends - began) for share in (MEMORY, TIMES))
    for row in rows:
        if run.has_until(memory):
            run.guarded(row, partial(stage.memory, CONTENDERS[row["contender"]]))
            run.save()
    able = [row for row in rows if row["status"] == "ok"]
    for turn in range(1 if run.small else 3):
        first = turn % max(1, len(able))
        for row in [*able[first:], *able[:first]]:
            if row["status"] == "ok" and run.has_until(times):
                before = row.get("step_seconds", {"values": []})["values"]
                run.guarded(row, partial(stage.seconds, CONTENDERS[row["contender"]], before))
        run.save()
    for row in able if counter is not None else []:
        if row["status"] == "ok" and run.has_until(run.ends):
            run.guarded(row, partial(stage.joules, CONTENDERS[row["contender"]], counter))


def in_four_bits(backbone: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose linear maps, but for a head over tokens, are bitsandbytes' NF4 codes."""
    import bitsandbytes as bnb

    copied = copy.deepcopy(backbone)
    trunk = trunk_of(copied)
    plain = getattr(trunk, "_keep_in_fp32_modules", None) or ()
    for module in list(trunk.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is nn.Linear and name not in plain:
                dtype, bias = linear.weight.dtype, linear.bias is not None
                codes = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias, compute_dtype=dtype, quant_type="nf4"
                )
                weight = linear.weight.data.cpu()
                codes.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=codes)
                codes.bias = linear.bias
                setattr(module, name, codes.to(device))
    trunk.is_loaded_in_4bit = True  # by which PEFT knows
    return copied


def _to_host(device: torch.device) -> AbstractContextManager[Any]:
    return save_on_cpu(pin_memory=device.type == "cuda")


# --- many tasks from one pass ------------------------------------------------------------------------------------


@dataclass
class Resting:
    """A task in memory that is not on the backbone."""

    model: Any
    rest: Any
    identity: str


def banks(run: Run, rows: list[Row]) -> None:
    """Seconds of a bare pass, of many tasks from one pass, and of as many passes, in turns. Batch 8."""
    for name in ("vit-b", "bert-base"):
        for label, (_, _, counts) in BANKS.items():
            for count in counts[:1] if run.small else counts:
                rows.append({"backbone": name, "contender": label, "tasks": count, "status": LEFT_OUT})
    for row in rows:
        run.check()
        method, pool, _ = BANKS[row["contender"]]
        run.guarded(row, partial(_bank, run, SCALES[row["backbone"]], method, pool, row["tasks"]))
        run.save()


def _bank(run: Run, scale: Scale, method: ss.MethodConfig, pool: Any, count: int) -> Row:
    with run.device:
        backbone, batch = scale.backbone(small=run.small), scale.batch(small=run.small)
    inputs = {name: tensor[:8] for name, tensor in batch.items() if name != "labels"}
    tasks: dict[str, Any] = {}
    for number in range(count):
        model = ss.attach(backbone, method, head=ss.Classify(num_labels=2, pool=pool)).eval()
        tasks[str(number)] = Resting(model, model.attachment.rest(), str(number))
    together = Together(lambda name: tasks[name].model)

    def each() -> None:
        for one in tasks.values():
            one.model.attachment.resume(one.rest)
            one.model(**inputs)
            one.model.attachment.rest()

    ways = {"bare": lambda: backbone(**inputs), "together": lambda: together.run(tasks, inputs), "each": each}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(2 if run.small else 6):
            for name, work in ways.items():
                if name != "each" or count <= 16:
                    value = seconds_of(work, run.device)
                    seconds[name] += [value] if turn else []
    median = {name: sorted(values)[len(values) // 2] for name, values in seconds.items() if values}
    return {f"{name}_seconds": value for name, value in median.items()}


# --- several cards -----------------------------------------------------------------------------------------------


def cards(run: Run, rows: list[Row]) -> None:
    """Steps that two cards share (`rank_steps.py`): gradients beside those of one, and rows a second."""
    row: Row = {"status": LEFT_OUT}
    rows.append(row)
    run.guarded(row, partial(_on_two, run, "rank_steps.py"))


def shards(run: Run, rows: list[Row]) -> None:
    """Memory of each of two cards and seconds of a step, with whole blocks and with shards (`shard_steps.py`)."""
    row: Row = {"status": LEFT_OUT}
    rows.append(row)
    run.guarded(row, partial(_on_two, run, "shard_steps.py"))


def device_map(run: Run, rows: list[Row]) -> None:
    """A step on a backbone that is spread over two cards beside that of one card (`map_steps.py`)."""
    row: Row = {"status": LEFT_OUT}
    rows.append(row)
    run.guarded(row, partial(_on_two, run, "map_steps.py", processes=1))


def _on_two(run: Run, script: str, processes: int = 2) -> Row:
    """What a script finds that is started on two cards."""
    count = torch.cuda.device_count() if run.device.type == "cuda" else 0
    if count < 2:
        raise ValueError(f"{count} cards, and this needs two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = launcher if processes > 1 else launcher[:1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        command = [*launcher, str(Path(__file__).with_name(script)), str(file)]
        left = max(run.ends - time.monotonic(), 1)
        subprocess.run([*command, *(["--small"] if run.small else [])], check=True, timeout=left)
        return {"steps": json.loads(file.read_text())}


# --- plans -------------------------------------------------------------------------------------------------------


def plans(run: Run, rows: list[Row]) -> None:
    """What the planner says of every peak that was measured. It sees no weights."""
    measured = {
        (row["backbone"], row["contender"]): row["peak_bytes"]
        for name in SCALES
        for row in run.rows_of(name)
        if row.get("peak_bytes")
    }
    # the contenders that matter most on all backbones, then the others
    for label in CONTENDERS:
        for name in SCALES:
            if (name, label) in measured:
                given = {"backbone": name, "contender": label, "status": LEFT_OUT}
                rows.append({**given, "measured_bytes": measured[name, label]})
    for row in rows:
        run.check()
        one, scale = CONTENDERS[row["contender"]], SCALES[row["backbone"]]
        if one.bare or one.to_host or one.quantised:
            row.update(status="refused", reason="the planner knows plain steps of plain weights")
            continue
        run.guarded(row, partial(_plan, run, one, scale, row["measured_bytes"]))
        run.save()


def _plan(run: Run, one: Contender, scale: Scale, measured: int) -> Row:
    kind: Any = run.device.type
    with torch.device("meta"):
        settings = scale.settings(one)
        with attached(scale.backbone(small=run.small), settings) as model:
            batch = scale.batch(small=run.small)
            found = plan_for(model, batch, optimizer="AdamW (fused)", device=kind).peak_bytes
    return {"planned_bytes": found, "planned_over_measured": found / measured}


# --- the run -----------------------------------------------------------------------------------------------------


class Late(BaseException):
    """The time of a part is over. No `Exception`, so that nothing takes it for a failure of its own."""


@dataclass
class Run:
    """Where the parts run, until when, and what they found.

    Attributes:
        ends: of the part that runs, by the monotonic clock.
        content: of the results file.
    """

    device: torch.device
    small: bool
    path: Path
    content: dict[str, Any]
    ends: float = 0.0

    def part(self, name: str, work: Callable[[Run, list[Row]], None], ends: float, grace: float) -> None:
        """Run a part. Whatever happens in it, it is noted, and what it found is on the disk."""
        began = time.monotonic()
        part = self.content["parts"][name] = {"status": LEFT_OUT, "seconds": 0.0, "rows": []}
        self.ends = ends
        if began < ends:
            signal.setitimer(signal.ITIMER_REAL, ends + grace - began)
            try:
                work(self, part["rows"])
                part["status"] = "ok"
            except Late:
                part["status"] = LEFT_OUT
            except Exception as error:  # a card is lent for minutes: whatever fails, the next part runs
                part["status"], part["reason"] = "failed", _reason(error)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                self.free()
        part["seconds"] = round(time.monotonic() - began, 1)
        self.save()
        print(f"{name}: {part['status']}, {len(part['rows'])} rows, {part['seconds']:.0f} s", flush=True)

    def guarded(self, row: Row, work: Callable[[], Row]) -> None:
        """Add to a row what was found, or why nothing was."""
        try:
            row.update(work(), status="ok")
        except Late:
            row.update(status=LEFT_OUT, reason="it took too long")
            raise
        except ValueError as error:
            row.update(status="refused", reason=_reason(error))
        except ModuleNotFoundError as error:
            row.update(status="not installed", reason=_reason(error))
        except (torch.OutOfMemoryError, MemoryError) as error:
            row.update(status="out of memory", reason=_reason(error))
        except Exception as error:  # as above, of a row
            row.update(status="failed", reason=f"{type(error).__name__}: {_reason(error)}")
        if self.device.type == "cuda":
            self.free()

    def has_until(self, ends: float) -> bool:
        """Whether there is time left until a moment of the monotonic clock."""
        return time.monotonic() < ends

    def check(self) -> None:
        """Raise `Late` if the part's time is over."""
        if not self.has_until(self.ends):
            raise Late

    def free(self) -> None:
        """Give memory back that nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows_of(self, name: str) -> list[Row]:
        """What a part found."""
        return self.content["parts"].get(name, {"rows": []})["rows"]

    def save(self) -> None:
        """Bring the results to the disk, whole."""
        with whole(self.path) as path:
            path.write_text(json.dumps(self.content, indent=1))


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


PARTS: dict[str, tuple[float, Callable[[Run, list[Row]], None]]] = {
    "laws": (0.15, laws),
    "vit-b": (0.32, partial(costs, "vit-b")),
    "bert-base": (0.46, partial(costs, "bert-base")),
    "llama-1b": (0.68, partial(costs, "llama-1b")),
    "t5-base": (0.8, partial(costs, "t5-base")),
    "banks": (0.88, banks),
    "plans": (0.93, plans),
    "cards": (0.97, cards),
    "shards": (0.98, shards),
    "device_map": (0.99, device_map),
}
"""The parts in order, with the share of the time by whose end each has ended."""


def about(device: torch.device, minutes: float, *, small: bool) -> dict[str, Any]:
    """With what the results were made."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(PACKAGES), "cuda": torch.version.cuda},
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "minutes": minutes,
        "small": small,
    }


def results_file(device: torch.device, *, small: bool) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return FOLDER / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower())}{'_small' if small else ''}.json"


# --- tables ------------------------------------------------------------------------------------------------------


def tables(content: Mapping[str, Any]) -> str:
    """The results as Markdown: the laws in a sentence, costs by backbone, plans beside peaks."""
    about, parts = content["about"], content["parts"]
    version = about["versions"]
    made = f"{about['card']}, torch {version['torch']}, transformers {version['transformers']}, {about['date'][:10]}"
    found = [f"{made}, seed {about['seed']}."]
    if held := parts.get("laws", {}).get("rows"):
        broken = [row for row in held if not row.get("holds")]
        found.append(f"Laws: {len(held) - len(broken)} of {len(held)} hold.")
        found += [f"- broken: {json.dumps(row)}" for row in broken]
    if held := parts.get("banks", {}).get("rows"):
        found += [
            "",
            "Many tasks from one pass, over a bare pass:",
            "",
            "| | tasks | together | each alone |",
            "|---|---|---|---|",
        ]
        found += [_bank_line(row) for row in held]
    planned = {(row["backbone"], row["contender"]): row for row in parts.get("plans", {}).get("rows", ())}
    for name in SCALES:
        if name in parts:
            found += ["", f"**{name}** ({parts[name]['status']})", ""]
            found.append(
                "| | peak, MiB | planned, MiB | kept, MiB | step, ms | J | trained |\n|---|---|---|---|---|---|---|"
            )
            found += [_line(row, planned.get((name, row["contender"]), {})) for row in parts[name]["rows"]]
    return "\n".join(found)


def _line(row: Row, planned: Row) -> str:
    if row.get("peak_bytes") is None:
        return f"| {row['contender']} | {row['status']}: {row.get('reason', '')} |{' |' * 5}"
    spread, joules = row.get("step_seconds"), row.get("joules")
    cells = [
        row["contender"],
        f"{mib(row['peak_bytes']):.1f}",
        f"{mib(planned['planned_bytes']):.1f}" if "planned_bytes" in planned else "-",
        f"{mib(row['kept_bytes']):.1f}",
        "-" if spread is None else f"{1000 * spread['median']:.1f}",
        "-" if joules is None else f"{joules:.2f}",
        f"{row['parameters']:,}" if "parameters" in row else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _bank_line(row: Row) -> str:
    what = f"| {row['backbone']}, {row['contender']} | {row['tasks']} |"
    if "bare_seconds" not in row:
        return f"{what} {row['status']}: {row.get('reason', '')} | |"
    bare, each = row["bare_seconds"], row.get("each_seconds")
    return f"{what} {row['together_seconds'] / bare:.2f} | {'-' if each is None else f'{each / bare:.1f}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What only a GPU shows, within minutes.")
    parser.add_argument("--minutes", type=float, default=8, help="after which the script has ended")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs at all")
    parser.add_argument("--output", type=Path, help="the results file. By default it has the card's name")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results files as Markdown")
    given = parser.parse_args()
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: choose of {','.join(PARTS)}")
    if given.table:
        files = [given.output] if given.output else sorted(FOLDER.glob("gpu_*.json"))
        print("\n\n".join(tables(json.loads(path.read_text())) for path in files))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("CUDA is not available: add --device cpu --small to see whether the script runs")
    device = torch.device(given.device)
    path = given.output or results_file(device, small=given.small)
    if device.type == "cpu":
        torch.set_num_threads(1 if given.small else int(os.environ.get("THREADS", "2")))
    warnings.simplefilter("ignore", KeepWarning)  # offload on a CPU saves nothing, and is tried all the same
    signal.signal(signal.SIGALRM, _late)
    torch.manual_seed(SEED)
    seconds = 60 * given.minutes
    run = Run(device, given.small, path, {"about": about(device, given.minutes, small=given.small), "parts": {}})
    for name, (share, work) in PARTS.items():
        if name in chosen:
            run.part(name, work, START + share * seconds, GRACE * seconds)
    print(f"{path}: {time.monotonic() - START:.0f} s", flush=True)


def _late(*_: Any) -> None:
    raise Late


if __name__ == "__main__":
    main()
