"""What the doctor says of a host with GPUs."""

import socket

import pytest
import torch

from cluster import doctor
from jobs import nodes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_nvidia_smi_and_torch_see_the_same_gpus():
    found = doctor.gpus()
    assert len(found) == torch.cuda.device_count()
    for index, gpu in enumerate(found):
        total = torch.cuda.get_device_properties(index).total_memory / 2**20
        assert gpu["driver"] and int(gpu["memory_mib"]) == pytest.approx(total, rel=0.05)


def test_a_rank_joins_by_nccl():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    right, seconds = nodes.join(0, 1, "127.0.0.1", port, "nccl")
    assert right and seconds > 0
