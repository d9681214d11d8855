"""What machines are made of: GPUs with their published figures, nodes, and what connects them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """Base of what a profile's file says: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(Frozen):
    """A GPU as its maker describes it.

    Args:
        product: name that the driver reports; Kubernetes labels nodes with it, spaces as hyphens.
        ray_type: what Ray calls it, in the resource `accelerator_type:…` of its nodes.
        memory_gib: what CUDA can allocate of it, as torch's out-of-memory error names it, in GiB.
        tflops: dense peak by precision in 10¹² operations a second, sums in fp32 where factors are shorter.
        source: where the figures come from.
    """

    product: str
    ray_type: str
    memory_gib: float
    tflops: Mapping[Precision, float]
    source: str


_A100: Mapping[Precision, float] = {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5, "fp64": 9.7}
_HOPPER: Mapping[Precision, float] = {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9, "fp64": 33.5}

GPUS: Mapping[str, Gpu] = {
    "rtx4090": Gpu(
        product="NVIDIA GeForce RTX 4090",
        ray_type="GeForce-RTX-4090",
        memory_gib=23.6,
        tflops={"bf16": 165.2, "fp16": 165.2, "fp32": 82.6, "fp64": 1.3},
        source="NVIDIA Ada GPU architecture whitepaper, table 2",
    ),
    "a100-40gb": Gpu(
        product="NVIDIA A100-SXM4-40GB",
        ray_type="A100",
        memory_gib=39.4,
        tflops=_A100,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "a100-80gb": Gpu(
        product="NVIDIA A100-SXM4-80GB",
        ray_type="A100",
        memory_gib=79.1,
        tflops=_A100,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "h100": Gpu(
        product="NVIDIA H100 80GB HBM3",
        ray_type="H100",
        memory_gib=79.1,
        tflops=_HOPPER,
        source="NVIDIA H100 GPU architecture whitepaper, table 2 (SXM5)",
    ),
    "h200": Gpu(
        product="NVIDIA H200",
        ray_type="H200",
        memory_gib=139.8,
        tflops=_HOPPER,
        source="NVIDIA H200 data sheet (SXM)",
    ),
}


class Node(Frozen):
    """One machine: what jobs may use of it. Memory, shared memory and disk in GiB."""

    cpus: Count
    memory_gib: Positive
    shm_gib: Positive = Field(description="/dev/shm, where Ray keeps objects and NCCL its buffers")
    disk_gib: Positive
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu: str | None = Field(None, description="a key of GPUS; none where there is no GPU, or one that it lacks")

    @model_validator(mode="after")
    def _check(self) -> Node:
        if self.gpu is not None and self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu} is none of {', '.join(GPUS)}: use one of them, or leave it out")
        if self.gpu is not None and self.gpus == 0:
            raise ValueError(f"gpu={self.gpu} with gpus=0: say how many, or leave gpu out")
        if self.shm_gib > self.memory_gib:
            raise ValueError(f"shm_gib={self.shm_gib:g} must not exceed memory_gib={self.memory_gib:g}: lower it")
        return self


class Interconnect(Frozen):
    """What GPUs of a node talk through, and what nodes do."""

    kind: Literal["none", "pcie", "nvlink"] = Field("none", description="between the GPUs of a node")
    between: Literal["none", "ethernet", "efa", "infiniband"] = Field("none", description="between nodes")
    gbit_per_second: NonNegative = Field(0.0, description="of a node, to all others together")
    pod_resources: dict[str, str] = Field({}, description="what a Kubernetes pod asks for, to use the adapters")


def this_node() -> Node:
    """Look up what the machine of this process has."""
    models = _nvidia_models(Path("/proc/driver/nvidia/gpus"))
    keys = {key for model in models for key, gpu in GPUS.items() if model == gpu.product}
    memory = psutil.virtual_memory().total / 2**30
    return Node(
        cpus=len(os.sched_getaffinity(0)),
        memory_gib=round(memory, 1),
        shm_gib=round(min(shutil.disk_usage("/dev/shm").total / 2**30, memory), 1),
        disk_gib=round(shutil.disk_usage(".").total / 2**30, 1),
        gpus=len(models),
        gpu=keys.pop() if len(keys) == 1 else None,
    )


def _nvidia_models(folder: Path) -> list[str]:
    """Product name of each GPU, as NVIDIA's driver lists them."""
    texts = [path.read_text() for path in sorted(folder.glob("*/information"))]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("Model:")]
    return [line.removeprefix("Model:").strip() for line in lines]
