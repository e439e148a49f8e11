"""Atomic and exact checkpoints: weights, optimiser and counters of a step, in `step_000010/`.

A checkpoint is written under a temporary name (`step_000010.tmp`), flushed to the disk and then renamed. So a crash at
any moment leaves the last good one intact. Rank 0 writes and reads, so hosts need no common disk. What is sharded is
whole in the files, and passes through rank 0 one tensor after another. So a run may go on with another number of
processes. Left out: what a run keeps in `state` (`state.py`).

    step_000010/model.safetensors   parameters and buffers, or adapters; shared (tied) tensors are stored once
                optimizer.pt        `optimizer.state_dict()`
                reference.safetensors   the same of the reference of the KL, if it changes in the run
                sampler.safetensors     the same of the sampler's weights, if they are older
                state.json          step, the caller's state, sizes of the files above, and check sums
"""

import copy
import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from grpo import distributed
from grpo.files import check_kinds, give_usual_mode

_NAME = re.compile(r"step_(\d{6,})(\.old)?")
_MISFITS = (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What torch and safetensors raise for files of another model or version."""
_FILES = ("model.safetensors", "optimizer.pt")
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_CODES |= {torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
"""Names of dtypes in files of safetensors."""


def save(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    others: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint of a step, and remove what a crash has left. An older one of the same step is replaced.

    A collective call.

    Args:
        directory: holds the checkpoints; created if missing.
        step: number of steps done.
        model: the module itself, not its DistributedDataParallel wrapper; or the part of it that is trained.
        optimizer: the optimiser of its parameters.
        state: JSON values: counters, best result, scaler state. Floats come back exactly.
        others: further modules by the names of their files; the reference is one if it changes.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full or not writable; one sentence. The last good checkpoint is untouched.
    """
    path = Path(directory) / f"step_{step:06d}"
    modules = {"model": model, **others}
    found = {name: _distinct(module) for name, module in modules.items()}
    weights = [tensor for named in found.values() for tensor in named.values()]
    pieces = (distributed.whole(x, host=True) for x in [*_tensors(optimizer.state_dict()["state"]), *weights])
    distributed.hand_to_main(pieces, lambda pieces: _write(path, step, found, optimizer, pieces, state))
    return path


def _write(
    path: Path,
    step: int,
    found: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    pieces: Iterator[Tensor],
    state: dict[str, Any],
) -> None:
    """Write what `save` was asked for; `pieces` are the whole tensors of the optimiser and of `found`, in order."""
    new, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    try:
        _clean(path.parent)
        new.mkdir(parents=True)
        _write_moments(optimizer, pieces, new / "optimizer.pt")
        for name, named in found.items():
            _write_tensors(named, pieces, new / f"{name}.safetensors")
        names = ("optimizer.pt", *(f"{name}.safetensors" for name in found))
        content = {"step": step, "state": state, "sizes": {name: (new / name).stat().st_size for name in names}}
        (new / "state.json").write_text(json.dumps(content | {"crc32": _check_sums(new, content)}, indent=1))
        give_usual_mode(new)
        for written in (*new.iterdir(), new):
            _flush(written)
        if _is_complete(path):
            os.replace(path, old)  # `latest` finds this name if a crash prevents the second rename
        elif path.exists():
            shutil.rmtree(path)
        os.replace(new, path)
        _flush(path.parent)
        _clean(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # the types of torch and safetensors for a full disk
        first = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's error hides it
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0]
        raise OSError(f"cannot write checkpoint {path} ({reason}); the one before it is untouched") from error


def latest(directory: str | Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. It only reads, so any rank may call it."""
    found = complete(Path(directory))
    return found[max(found)] if found else None


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, nn.Module] = MappingProxyType({}),
) -> dict[str, Any]:
    """Load a checkpoint's weights and optimiser state into `model`, `optimizer` and `others`, exactly to the bit.

    A collective call; rank 0 reads.

    Returns:
        `state` as it was given to `save`, with `step` added.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to a different model or optimiser.
    """
    path, modules = Path(path), {"model": model, **others}
    found: dict[str, dict] = {}

    def read() -> dict[str, Any]:
        if not _is_complete(path):
            raise ValueError(f"{path} is not a complete checkpoint")
        content = json.loads((path / "state.json").read_text())
        if content.get("crc32") != _check_sums(path, content):
            raise ValueError(f"{path} does not match its check sums; remove it to resume from the checkpoint before it")
        try:
            for name, module in modules.items():
                found[name] = safetensors.torch.load_file(path / f"{name}.safetensors")
                _refuse_others(found[name], _distinct(module))
            found["optimizer"] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
            _make_room(optimizer, found["optimizer"])
        except _MISFITS as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not fit this model and optimizer: {reason}") from error
        check_kinds(content, path / "state.json", {"state": dict, "step": int})
        return content["state"] | {"step": content["step"]}

    state = distributed.on_main(read)
    for name, module in modules.items():
        for tensor_name, tensor in _distinct(module).items():
            distributed.put(tensor, found.get(name, {}).get(tensor_name))
    stored = found.get("optimizer", {"param_groups": [], "state": {}})
    groups = [{k: v for k, v in group.items() if k != "params"} for group in stored["param_groups"]]
    for group, theirs in zip(optimizer.param_groups, distributed.broadcast_object(groups), strict=True):
        group.update(theirs)
    for tensor, value in zip_longest(_tensors(optimizer.state_dict()["state"]), _tensors(stored["state"])):
        distributed.put(tensor, value)
    return state


def prune(directory: str | Path, keep: int, best_step: int | None = None) -> None:
    """Remove all complete checkpoints except the `keep` newest and that of `best_step` (the best on validation)."""
    found = complete(Path(directory))
    for step in sorted(found)[:-keep]:
        if step != best_step:
            _remove(found[step])


def complete(directory: Path) -> dict[int, Path]:
    """{step: path} of the complete checkpoints. An `.old` one counts if a crash cut its replacement short."""
    found = {}
    for path in sorted(directory.glob("step_*"), reverse=True):  # .old comes first, so that the plain name wins
        match = _NAME.fullmatch(path.name)
        if match and _is_complete(path):
            found[int(match[1])] = path
    return found


def _is_complete(path: Path) -> bool:
    """Whether `state.json` is readable, and the files have the sizes that it records."""
    try:
        sizes = json.loads((path / "state.json").read_text())["sizes"]
        return all((path / name).stat().st_size == sizes[name] for name in {*_FILES, *sizes})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_sums(path: Path, content: dict[str, Any]) -> dict[str, int]:
    """CRC-32 of each file, and of the contents of `state.json`: a disk or a copy may change bytes but no size."""
    sums = {"state.json": zlib.crc32(json.dumps([content.get(name) for name in ("step", "state")]).encode())}
    for name in content["sizes"]:
        sums[name] = 0
        with open(path / name, "rb") as file:
            while piece := file.read(1 << 24):
                sums[name] = zlib.crc32(piece, sums[name])
    return sums


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors, a tied one under the first of its names; those of wide numbers first, as files align them."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        found.setdefault(id(tensor), (name, tensor))
    return dict(sorted(found.values(), key=lambda pair: -pair[1].itemsize))


def _tensors(state: Mapping[int, Mapping[str, Any]]) -> list[Tensor]:
    """The tensors in an optimiser's state, in the order of its parameters."""
    values = [value for _, of_one in sorted(state.items()) for _, value in sorted(of_one.items())]
    return [value for value in values if isinstance(value, Tensor)]


def _write_tensors(named: Mapping[str, Tensor], pieces: Iterator[Tensor], file: Path) -> None:
    """Write a file of safetensors: the length of a header, the header, and tensors, one of which is whole at a time.

    Args:
        named: says names, shapes and dtypes.
        pieces: the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in islice(pieces, len(named)):
            out.write(piece.cpu().reshape(-1).view(torch.uint8).numpy())


def _write_moments(optimizer: torch.optim.Optimizer, pieces: Iterator[Tensor], file: Path) -> None:
    """Write an optimiser's `state_dict` with whole tensors, which lie in memory all at once."""
    content = optimizer.state_dict()
    state = {
        i: {name: next(pieces) if isinstance(value, Tensor) else value for name, value in sorted(of_one.items())}
        for i, of_one in sorted(content["state"].items())
    }
    with file.open("wb") as opened:  # so that a full disk has its name in an error
        torch.save(content | {"state": state}, opened)


def _refuse_others(found: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Raise ValueError if what a file holds has other names or shapes than ours."""
    for name in [*sorted(found), *sorted(ours)]:
        shapes = [list(named[name].shape) if name in named else "missing" for named in (found, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the file, and {shapes[1]} here")


def _make_room(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> None:
    """Give an optimiser that has made no step a state. Raises ValueError if what a file holds is of another one."""
    groups = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in found["param_groups"]]:
        raise ValueError("the optimizer in the file has other parameters")
    parameters = [parameter for group in groups for parameter in group["params"]]
    for i, values in found["state"].items():
        if not optimizer.state[parameters[i]]:
            optimizer.state[parameters[i]] = copy.deepcopy(values)
    states = found["state"], optimizer.state_dict()["state"]
    _refuse_others(*({f"{i} {name}": x for i, of in state.items() for name, x in of.items() if isinstance(x, Tensor)}
                     for state in states))  # fmt: skip


def _clean(directory: Path) -> None:
    """Remove what a crash has left: temporary directories, and an `.old` whose successor is complete."""
    for path in directory.glob("step_*.tmp"):
        shutil.rmtree(path)
    for path in directory.glob("step_*.old"):
        if _is_complete(path.with_suffix("")):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a crash half-way leaves a directory that `_clean` removes."""
    doomed = Path(f"{path}.tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Force a file, or the entries of a directory, to the disk, so that a power cut cannot lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
