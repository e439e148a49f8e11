"""Memory in bytes, of the machine and of the process."""

import torch

from grpo.run.machine import device_memory, peak_bytes

CPU = torch.device("cpu")


def test_free_memory_is_that_of_the_machine_or_of_the_gpu(monkeypatch):
    free, total = device_memory(CPU)
    assert 10**8 < free < total < 10**15
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index, 80))
    assert device_memory(torch.device("cuda", 3)) == (3, 80)


def test_peak_memory_is_in_bytes():
    peak = peak_bytes(CPU)["memory/peak_bytes"]
    assert 5e7 < peak < 1e12
    kept = torch.ones(40_000_000)
    assert peak_bytes(CPU)["memory/peak_bytes"] >= peak
    del kept
