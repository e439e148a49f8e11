"""What a run is made of beside its options: weights, prompts, code of rewards. `inputs.json` holds a digest of each.

`config.yaml` names these and does not hold them. A run that goes on after one has changed is another experiment, so it
is refused or said. Left out: test sets, which base and tuned model answer at the same time.
"""

import hashlib
import importlib
import json
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from data.problem import Problem
from grpo import distributed
from grpo.config import Config
from grpo.files import read_object, write_whole
from rewards import label, module_of

FILE = "inputs.json"


def of_model(policy: nn.Module) -> dict[str, str | None]:
    """What a model is, as it was loaded: a digest of its weights, and the commit that a branch of the hub stood for."""
    return {"model": of_weights(policy), "commit": policy.commit}


def of_weights(model: nn.Module) -> str:
    """A digest of the weights, the same on every device. A collective call.

    Raises:
        ValueError: ranks have loaded different weights, so that each would have its own reference.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        bits = weight.detach().view(torch.int64 if weight.dtype == torch.float64 else torch.int32)
        found.update(f"{name} {tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    digest = found.hexdigest()[:16]
    digests = distributed.gather_objects(digest)
    if len(set(digests)) > 1:
        other = next(rank for rank, each in enumerate(digests) if each != digests[0])
        raise ValueError(f"model: rank {other} has loaded other weights than rank 0; hosts must have the same files")
    return digest


def look(config: Config, base: dict, problems: Sequence[Problem], prompt_ids: Iterable) -> dict:
    """What the run is made of now.

    Args:
        config: the run's.
        base: what `of_model` said of the model as it was loaded.
        problems: of training.
        prompt_ids: their tokens: what tokenizer and chat template make of them.
    """
    prompts = zlib.crc32(b"")
    for ids in prompt_ids:
        prompts = zlib.crc32(bytes(ids) + b"|", prompts)
    told = json.dumps([astuple(problem) for problem in problems], sort_keys=True, default=repr)
    return {
        **base,
        "data": _digest(told.encode("utf-8", "replace")),
        "prompts": f"{prompts:08x}",
        "rewards": {label(name): of_code(module_of(name)) for name in config.rewards},
    }


def of_code(name: str) -> str:
    """A digest of a module's file and of the files that it uses, without those of Python and of installed packages."""
    seen: dict[str, bytes] = {}
    todo = [importlib.import_module(name)]
    while todo:
        module = todo.pop()
        file = Path(getattr(module, "__file__", None) or "")
        foreign = module.__name__.partition(".")[0] in sys.stdlib_module_names or "site-packages" in file.parts
        if module.__name__ in seen or not file.is_file() or (foreign and not module.__name__.startswith("rewards.")):
            continue
        seen[module.__name__] = file.read_bytes()
        for value in vars(module).values():
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str) and used in sys.modules:
                todo.append(sys.modules[used])
    return _digest(b"".join(seen[name] for name in sorted(seen)))


def check(directory: Path, config: Config, step: int, now: dict) -> None:
    """Compare with what the run began with, say what has changed, and write what it is made of now. A collective call.

    Args:
        step: steps done; nothing is compared before the first.
        now: what `look` says.

    Raises:
        ValueError: the model has changed, and the KL would be to another reference than before.
    """

    def act() -> list[str]:
        file = directory / FILE
        before = read_object(file.read_bytes(), file, {}) if step and file.exists() else now
        earlier = before.pop("earlier", []) if before is not now else []
        sentences = list(changes(directory, config, step, before, now))
        if before != now:
            earlier = [*earlier, before | {"until_step": step}]
        write_whole(file, json.dumps(now | {"earlier": earlier}, indent=1) + "\n")
        return sentences

    for sentence in distributed.on_main(act):
        if distributed.is_main():
            print(f"warning: {sentence}", file=sys.stderr, flush=True)


def changes(directory: Path, config: Config, step: int, before: dict, now: dict) -> Iterable[str]:
    """A sentence for each part that is not what it was; raises as `check`."""
    if before.get("model") != now["model"]:
        moved = f" (commit {before.get('commit')} then, {now['commit']} now)" if now["commit"] else ""
        what = f"model: the weights in {config.model!r} are not those that the run began with{moved}"
        if config.kl_coef > 0:
            raise ValueError(
                f"{what}, so that the reference of the KL would be another model; put them back, or take another "
                f"run_name (to go on all the same, delete {directory / FILE})"
            )
        yield f"{what}: the final evaluation compares with another base"
    if before.get("data") != now["data"]:
        yield (
            f"data: the training problems of {config.data!r} have changed after step {step}: what comes now is not the "
            "rest of the epoch"
        )
    elif before.get("prompts") != now["prompts"]:
        yield f"model: the same problems become other prompts since step {step}; tokenizer or chat template has changed"
    old = before.get("rewards") or {}
    for name, code in now["rewards"].items():
        if old.get(name) != code:
            yield f"rewards: the code of {name} has changed after step {step}: what is paid for now differs"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
