"""Shards of a policy (FSDP2): each process holds a part of every weight, gradient and moment, and not all of them.

A layer's weights are gathered when it runs and given back behind it. So are those beside the layers: embedding, last
norm and head. Gradients of a micro-batch are averaged over processes in its backward pass, and each process keeps its
part. Numbers are those of DistributedDataParallel up to rounding: weights are gathered in float32, and autocast rounds
them as it does there. Left out: families that transformers' own code computes; gathering rounded weights, which would
halve what is sent.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from grpo import distributed
from grpo.policy.model import Policy


def shards(how: str) -> bool:
    """Whether `shard` divides anything: not where there is a single process."""
    return how != "none" and distributed.world_size() > 1


def is_sharded(policy: nn.Module) -> bool:
    """Whether a policy holds only its part of the weights."""
    return isinstance(policy, FSDPModule)


def shard(policy: nn.Module, how: str) -> None:
    """Shard a policy, or a reference that is one, in place, on the device of this process. A collective call.

    A layer may be compiled before, but not copied afterwards.

    Args:
        policy: the same weights on all ranks. What holds no weights of its own stays as it is.
        how: the option `shard`. `full`: over all processes. `hybrid`: over those of a machine; each machine has all.

    Raises:
        ValueError: transformers' own code computes the model; or `hybrid`, and machines run unequal numbers of them.
    """
    if not shards(how) or not isinstance(policy, Policy) or is_sharded(policy):
        return
    if not policy.is_decoder:
        raise ValueError(
            f"shard is {how!r}: a {type(policy.model).__name__} runs as transformers wrote it, and only models of our "
            "decoder can be sharded; must be none"
        )
    # The root is given back too: so at rest every weight is a shard, whoever looks.
    options = {"mesh": mesh(how), "reshard_after_forward": True}
    for layer in policy.layers:
        fully_shard(layer, **options)
    embedding = policy.model.get_input_embeddings()
    if embedding.weight is not policy.model.get_output_embeddings().weight:
        fully_shard(embedding, **options)  # apart from the head, so that they are not gathered together
    fully_shard(policy, **options)


def mesh(how: str) -> DeviceMesh:
    """The processes among which a weight is divided, and under `hybrid` their copies on other machines."""
    device, processes, near = distributed.carrier().type, distributed.world_size(), distributed.nearby()
    if how == "hybrid" and len(set(distributed.gather_objects(near))) > 1:
        raise ValueError("shard is 'hybrid': all machines must run the same number of processes; or take full")
    if how == "full" or near == processes:
        return init_device_mesh(device, (processes,))
    return init_device_mesh(device, (processes // near, near), mesh_dim_names=("copies", "shards"))
