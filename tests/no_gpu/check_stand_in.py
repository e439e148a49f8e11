"""What the stand-in for a GPU refuses, and that its graphs behave as those of a GPU. Run where it is loaded."""

import pytest
import torch

pytestmark = pytest.mark.gpu
X = torch.arange(6.0).view(2, 3)


def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + X,
        lambda x: x @ X.T,
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.gather(0, torch.zeros(1, 3, dtype=torch.long)),
        lambda x: torch.cat([x, X]),
        lambda x: X[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda x: x.index_put_((torch.tensor([0]),), X[:1]),
        lambda x: x.numpy(),
    ],
)
def test_what_mixes_host_and_device_is_refused(mix):
    with pytest.raises((RuntimeError, TypeError)):
        mix(X.cuda())


def test_numbers_and_indices_of_the_host_are_welcome():
    x = X.cuda()
    x[torch.tensor([1])] = torch.tensor(7.0)
    assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [14, 14, 14]]


def test_kernels_of_cpus_are_refused():
    q = torch.ones(1, 1, 2, 8, device="cuda")
    with pytest.raises(NotImplementedError, match="is a kernel of CPUs"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 2],
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.copy_(X),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.tensor(1.0, device="cuda"),
        lambda x: bool((x == x).all()),
    ],
)
def test_what_waits_is_refused_where_it_is_asked_and_in_a_graph(wait):
    x = X.cuda()
    wait(x)
    with pytest.raises(RuntimeError, match="waits for the device"):
        captured(lambda: wait(x))
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="waits for the device"):
        wait(x)
    torch.cuda.set_sync_debug_mode("default")
    wait(x)


def test_a_graph_reads_and_writes_the_same_memory_and_capturing_computes_nothing():
    x, total = X.cuda(), torch.zeros(3, device="cuda")
    graph, out = captured(lambda: total.add_(x.sum(0)).exp())
    assert total.tolist() == [0, 0, 0]
    graph.replay(), graph.replay()
    assert total.tolist() == [6, 10, 14]
    assert out.tolist() == total.exp().tolist()
    x.copy_(2 * X)
    graph.replay()
    assert total.tolist() == [12, 20, 28]
    x = -x  # other memory, of which the graph knows nothing
    graph.replay()
    assert total.tolist() == [18, 30, 42]


def test_a_gradient_is_that_of_the_host():
    ours, theirs = X.cuda().requires_grad_(), X.clone().requires_grad_()
    for x in (ours, theirs):
        with torch.autocast(x.device.type, torch.bfloat16):
            (x @ x.T).float().square().sum().backward()
    assert ours.grad.cpu().equal(theirs.grad)
