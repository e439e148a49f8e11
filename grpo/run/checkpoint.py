"""Atomic and exact checkpoints: weights, optimiser and counters of a step, in `step_000010/`.

A checkpoint is written under a temporary name (`step_000010.tmp`), flushed to the disk and then renamed. So a crash at
any moment leaves the last good one intact. Left out: what a run keeps in `state` (`state.py`), and which rank calls
(rank 0 saves and loads).

    step_000010/model.safetensors   parameters and buffers, or adapters; shared (tied) tensors are stored once
                optimizer.pt        `optimizer.state_dict()`
                reference.safetensors   the same of the reference of the KL, if it changes in the run
                sampler.safetensors     the same of the sampler's weights, if they are older
                state.json          step, the caller's state, sizes of the files above, and check sums
"""

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
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


def save(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    others: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint of a step, and remove what a crash has left. An older one of the same step is replaced.

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
    new, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    try:
        _clean(Path(directory))
        new.mkdir(parents=True)
        safetensors.torch.save_model(model, str(new / "model.safetensors"))
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        for name, module in others.items():
            safetensors.torch.save_file(_distinct(module), str(new / f"{name}.safetensors"))
        names = (*_FILES, *(f"{name}.safetensors" for name in others))
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
        _clean(Path(directory))
    except (OSError, SafetensorError, RuntimeError) as error:  # the types of torch and safetensors for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write checkpoint {path} ({reason}); the one before it is untouched") from error
    return path


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

    Returns:
        `state` as it was given to `save`, with `step` added.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to a different model or optimiser.
    """
    path = Path(path)
    if not _is_complete(path):
        raise ValueError(f"{path} is not a complete checkpoint")
    content = json.loads((path / "state.json").read_text())
    if content.get("crc32") != _check_sums(path, content):
        raise ValueError(f"{path} does not match its check sums; remove it to resume from the checkpoint before it")
    try:
        safetensors.torch.load_model(model, path / "model.safetensors")
        for name, module in others.items():
            found = safetensors.torch.load_file(path / f"{name}.safetensors")
            for tensor_name, tensor in _distinct(module).items():
                tensor.copy_(found[tensor_name])
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    except _MISFITS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this model and optimizer: {reason}") from error
    check_kinds(content, path / "state.json", {"state": dict, "step": int})
    return content["state"] | {"step": content["step"]}


def share(model: nn.Module, optimizer: torch.optim.Optimizer, others: Iterable[nn.Module] = ()) -> None:
    """Give every rank the weights and the optimiser state that rank 0 has loaded. A collective call.

    Args:
        model: the same on all ranks but for its numbers.
        optimizer: of its parameters, with the same names in its state.
        others: what was loaded beside it.
    """
    for module in (model, *others):
        for tensor in module.state_dict().values():
            distributed.broadcast_tensor(tensor)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for group, theirs in zip(optimizer.param_groups, distributed.broadcast_object(groups), strict=True):
        group.update(theirs)
        for parameter in group["params"]:
            for _, tensor in sorted(optimizer.state[parameter].items()):
                distributed.broadcast_tensor(tensor)


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
    """A module's tensors, a tied one under the first of its names. They may be parts of larger ones, as a sampler's."""
    found: dict[tuple, tuple[str, Tensor]] = {}
    for name, tensor in sorted(module.state_dict().items()):
        found.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return dict(found.values())


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
