"""LoRA, https://arxiv.org/abs/2106.09685: y = W x + b + s B (A x) with s = alpha / rank, and only A and B are trained.

A linear layer becomes `Adapted` by another class: names of weights stay, and fast paths for plain layers leave it out.
B begins as zeros, so a policy with new adapters is its base model, to the bit. `merged` gives the weights W + s B A,
which sampler and `final/` have; the policy's own W never changes. Left out: dropout, since sampler, learner and
reference have to agree; adapters of embedding and head; the reference (`reference.py`); files (`adapter_files.py`).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.kernels import onednn
from grpo.policy.model import Policy


class Adapter(nn.Module):
    """The product s B A of a layer."""

    def __init__(self, A: Tensor, B: Tensor, alpha: float):
        """Take the two factors.

        Args:
            A: [r,D].
            B: [E,r].
            alpha: r times s.
        """
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(A), nn.Parameter(B), alpha

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / len(self.A)

    def forward(self, x: Tensor) -> Tensor:
        """[..,D] -> [..,E]."""
        return F.linear(F.linear(x, self.A) * self.scale, self.B)

    def product(self) -> Tensor:
        """[E,D]: s B A."""
        return (self.B.detach() * self.scale) @ self.A.detach()


class Adapted(nn.Linear):
    """A linear layer with an adapter beside it. Made of a plain one by `adapt`."""

    adapter: Adapter
    on: bool

    def adapt(self, adapter: Adapter) -> None:
        """Make this plain linear layer an adapted one."""
        self.__class__ = Adapted
        self.adapter, self.on = adapter, True

    def forward(self, x: Tensor) -> Tensor:
        """[..,D] -> [..,E]."""
        out = onednn.product(x, self.weight, self.bias)
        return out + self.adapter(x) if self.on else out

    def merged(self) -> Tensor:
        """[E,D]: W + s B A, in the dtype of the adapter."""
        return self.weight + self.adapter.product()


def add_adapters(policy: Policy, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> None:
    """Freeze a policy's weights and give its linear layers new adapters, the same on every rank; rank 0: do nothing.

    Under autocast, frozen linear layers are from now on stored in its dtype if that loses nothing, as with files of
    bfloat16. Adapters have the dtype of master weights.

    Args:
        policy: on its device.
        rank: r, of all adapters.
        alpha: r times the factor s.
        targets: names of linear layers, or `all`.
        seed: of A, which is uniform within 1 / sqrt(D), as peft's is.

    Raises:
        ValueError: a target names no linear layer of the model.
    """
    if rank == 0:
        return
    chosen, dtype = linear_layers(policy.model, targets), policy.dtype
    policy.requires_grad_(False)
    for layer in linear_layers(policy.model).values():
        if policy.autocast_dtype is not None and _holds(policy.autocast_dtype, layer):
            layer.to(policy.autocast_dtype)
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen.values():
        bound = 1 / math.sqrt(layer.in_features)
        A = torch.empty(rank, layer.in_features, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(layer.out_features, rank)
        Adapted.adapt(layer, Adapter(A.to(policy.device, dtype), B.to(policy.device, dtype), alpha))


def linear_layers(model: nn.Module, targets: str | Sequence[str] = "all") -> dict[str, nn.Linear]:
    """{name: layer} of a model's linear layers, but not its head: `all`, or those of these last names.

    Raises:
        ValueError: there is no such layer.
    """
    head = model.get_output_embeddings()
    found = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear) and x is not head}
    names = {name.rpartition(".")[2] for name in found}
    chosen = names if targets == "all" else set(targets)
    if not chosen or chosen - names:
        known = f"it must be all, or of {', '.join(sorted(names))}" if names else "there is no linear layer to adapt"
        raise ValueError(f"lora_targets is {targets!r}: for this model {known}")
    return {name: layer for name, layer in found.items() if name.rpartition(".")[2] in chosen}


def _holds(dtype: torch.dtype, layer: nn.Linear) -> bool:
    """Whether a layer's weights are the same numbers in this dtype."""
    return all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in layer.parameters())


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """{name: layer} of the layers with an adapter; {}: it has none."""
    return {name: module for name, module in model.named_modules() if type(module) is Adapted}


def trained(policy: nn.Module) -> nn.Module:
    """What a checkpoint holds of a policy: its adapters if it has any, by the names of their layers; else all of it."""
    found = adapted(policy)
    return nn.ModuleDict({name.replace(".", "/"): x.adapter for name, x in found.items()}) if found else policy


def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and its name as if there were no adapters, with W + s B A in the place of an adapted W."""
    layers = adapted(model)
    left_out = {id(parameter) for layer in layers.values() for parameter in layer.adapter.parameters()}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if id(parameter) not in left_out:
            yield name, layers[owner].merged() if leaf == "weight" and owner in layers else parameter


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Make a model plain: add each adapter to its layer's weights, and remove it."""
    for layer in adapted(model).values():
        layer.weight.copy_(layer.merged())
        del layer.adapter, layer.on
        layer.__class__ = nn.Linear
