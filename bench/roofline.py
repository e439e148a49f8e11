"""Compare a step with its lower bound on this machine, from operations, bytes and measured speeds.

    python -m bench.roofline --model DIR --train FILE --shots 8 --prompts 4 --group 8 --new-tokens 64

The lower bound ("floor") of each part of a step is the larger of two times:

- its operations, divided by the speed of matrix products at the model's own shapes;
- its bytes, divided by the speed of a memory copy.

Shared prefixes count once. Weights, keys, values, logits and optimiser are counted. Left out: reading and writing
activations, so no step reaches the floor.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.ours import LONGEST_PROMPT, problems_of, problems_of_step
from bench.process import call, machine, versions
from bench.speed import fastest, measured
from bench.work import Work, at_least, check_out, prepared
from grpo import options
from grpo.dataloader import encode_prompts
from grpo.doctor.facts import sizes
from grpo.files import write_whole
from grpo.kernels import onednn
from grpo.policy import load_shapes
from grpo.tree import build_trie

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = {"cpu": 1024, "cuda": 16384}
"""Tokens in the matrix products that are timed, enough to make them fast."""


@dataclass(frozen=True)
class Roofline(Work):
    """Compare a step of ours with its lower bound on this machine."""

    limit: float = 3600.0
    """Seconds that the step may take."""
    out: str = "roofline.json"
    """File of the results."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size or file that is not allowed."""
        super().__post_init__()
        at_least(self, {"limit": 1})


@dataclass(frozen=True)
class Part:
    """One part of the work of a step."""

    phase: str
    """`rollout` or `learn`."""
    name: str
    operations: float
    read_and_written: float
    """In bytes."""

    def floor(self, flops: float, bandwidth: float) -> float:
        """The least possible seconds, for `flops` operations and `bandwidth` bytes per second."""
        return max(self.operations / flops, self.read_and_written / bandwidth)


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, 1 if the step failed, or 2 for a wrong option."""
    asked = options.parse(Roofline, argv, "bench.roofline")
    try:
        check_out(asked.out)
        with tempfile.TemporaryDirectory() as place:
            written = measure(asked, place)
        write_whole(Path(asked.out), json.dumps(written, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"bench.roofline: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"bench.roofline: {error}", file=sys.stderr)
        return 1
    console = Console()
    for table in tables(written):
        console.print(table)
    return 0


def measure(asked: Roofline, place: str) -> dict:
    """Run our step in its own process, measure the machine, and compute the floors.

    Args:
        asked: the options.
        place: directory for a model with random weights.

    Raises:
        ValueError: the model or the data cannot be read.
        RuntimeError: the step failed.
    """
    work = prepared(asked, place, asked.limit)
    step = _or_raise(call("bench.ours:ours", {"work": work}, limit=asked.limit, threads=asked.threads))
    if asked.threads:
        torch.set_num_threads(asked.threads)
    model, tokenizer = load_shapes(work["model"])
    speeds = shape_speeds(model, ROWS[asked.device], asked)
    _, bandwidth = measured(torch.device(asked.device), asked.dtype)
    flops = mean_speed(model, speeds)
    computed, remembered = step["tokens_computed"], step["tokens_remembered"]
    floors = parts(asked, model, len(tokenizer), prompts(asked, tokenizer), computed, remembered)
    rows = [asdict(part) | {"floor_s": part.floor(flops, bandwidth)} for part in floors]
    phases = {}
    for phase in ("rollout", "learn"):
        floor = sum(row["floor_s"] for row in rows if row["phase"] == phase)
        phases[phase] = {"floor_s": floor, "measured_s": step[f"{phase}_s"], "times": step[f"{phase}_s"] / floor}
    return {
        "machine": machine(asked.device),
        "versions": versions(),
        "settings": vars(asked) | {"trunk_tokens": step["trunk_tokens"]},
        "shapes": [{"in": i, "out": o, "flops": speed} for (i, o), speed in speeds.items()],
        "flops": flops,
        "bytes_per_s": bandwidth,
        "parts": rows,
        "phases": phases,
        "step": step,
    }


def _or_raise(outcome: dict) -> dict:
    if "error" in outcome:
        raise RuntimeError(outcome["error"])
    return outcome


def linear_shapes(model: nn.Module) -> dict[tuple[int, int], int]:
    """{(in, out): number of such matrices} of the model, including the head."""
    found: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            found[shape] = found.get(shape, 0) + 1
    return found


def shape_speeds(model: nn.Module, rows: int, asked: Work) -> dict[tuple[int, int], float]:
    """Operations per second of `rows` tokens times a matrix of each shape in the model; the fastest call counts."""
    speeds, dtype = {}, DTYPES[asked.dtype]
    for i, o in linear_shapes(model):
        tokens = torch.randn(rows, i, device=asked.device, dtype=dtype)
        weight = torch.randn(o, i, device=asked.device, dtype=dtype)
        ways = (partial(torch.matmul, tokens, weight.t()), partial(onednn.multiply, tokens, weight))
        seconds = min(fastest(way, asked.device == "cuda") for way in ways)
        speeds[i, o] = 2 * rows * i * o / seconds
    return speeds


def mean_speed(model: nn.Module, speeds: dict[tuple[int, int], float]) -> float:
    """Operations per second of all products of the model together."""
    work = {shape: number * shape[0] * shape[1] for shape, number in linear_shapes(model).items()}
    return sum(work.values()) / sum(work[shape] / speeds[shape] for shape in work)


def prompts(asked: Work, tokenizer) -> list[list[int]]:
    """Token ids of the prompts of the last step."""
    problems = problems_of_step(asked, problems_of(asked), asked.warmup + asked.steps)
    encoded = encode_prompts(problems, tokenizer, chat=False, max_prompt_tokens=LONGEST_PROMPT)
    return [row.tolist() for row in encoded]


def parts(
    asked: Work, model: nn.Module, vocabulary: int, prompt_ids: list[list[int]], computed: float, remembered: int
) -> list[Part]:
    """The parts of a step, with operations and bytes.

    Args:
        asked: sizes of the step.
        model: for its shapes.
        vocabulary: number of rows of the head that are used.
        prompt_ids: prompts of the step.
        computed: tokens that learning computes, in the packed tree.
        remembered: leading tokens of it that the reference need not compute.
    """
    size, width = sizes(model), DTYPES[asked.dtype].itemsize
    N, B, T = asked.prompts, asked.prompts * asked.group, asked.new_tokens
    layers, head = size.rounded, vocabulary * size.width
    weights = width * (layers + head)
    positions = build_trie(prompt_ids).position_ids
    stored = len(positions)
    per_key = 4 * size.layers * size.query_width  # operations of attention per token and key
    cache = 2 * size.layers * size.key_width * width  # bytes of keys and values per token
    keys_of_prompts = int((positions + 1).sum())
    keys_of_decode = asked.group * sum(len(row) + t for row in prompt_ids for t in range(1, T))
    read = sum(stored + B * t for t in range(1, T))  # tokens read from the cache, over all decoding steps

    prefill = 2 * (layers * stored + head * N) + per_key * keys_of_prompts
    decode = 2 * (layers + head) * B * (T - 1) + per_key * keys_of_decode
    forward = 2 * (layers * computed + head * B * T) + per_key * (keys_of_prompts + keys_of_decode)
    known = 2 * layers * remembered + per_key * remembered * (remembered + 1) // 2
    return [
        Part("rollout", "prefill", prefill, weights + cache * stored),
        Part("rollout", "decode", decode, weights * (T - 1) + cache * read),
        Part("learn", "reference forward", forward - known, weights),
        Part("learn", "policy forward", forward, weights),
        Part("learn", "policy backward", 2 * forward, 2 * weights),
        Part("learn", "optimiser", 0, 7 * 4 * size.parameters),  # reads 4 arrays (weight, gradient, moments), writes 3
    ]


def tables(written: dict) -> list[Table]:
    """The results for a terminal: the floors of all parts, and the measured seconds of each phase."""
    flops, bandwidth = written["flops"] / 1e9, written["bytes_per_s"] / 1e9
    must = Table(
        "part",
        "10^9 operations",
        "10^9 bytes",
        "floor s",
        title=f"{flops:.0f} x 10^9 operations/s, {bandwidth:.1f} x 10^9 bytes/s",
    )
    for row in written["parts"]:
        numbers = (row["operations"] / 1e9, row["read_and_written"] / 1e9, row["floor_s"])
        must.add_row(f"{row['phase']}: {row['name']}", *(f"{number:.4g}" for number in numbers))
    stands = Table("phase", "floor s", "measured s", "times the floor")
    for phase, row in written["phases"].items():
        stands.add_row(phase, *(f"{row[name]:.4g}" for name in ("floor_s", "measured_s", "times")))
    return [must, stands]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
