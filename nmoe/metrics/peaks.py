"""The named peak of a device: dense FLOPs a second as its maker states them, without sparsity, at its full clock.

MFU, model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B), is the plan's FLOPs over the time that
they would take at this peak; no FLOPs of recomputation count. Closed: a device that is not here has no MFU, rather
than a guess. Sources: NVIDIA's data sheets of H100, H200 and B200; torch's names of the devices.
"""

PEAKS: dict[tuple[str, str], float] = {
    ("NVIDIA H100 80GB HBM3", "bf16"): 989.4e12,
    ("NVIDIA H100 PCIe", "bf16"): 756e12,
    ("NVIDIA H100 NVL", "bf16"): 835e12,
    ("NVIDIA H200", "bf16"): 989.4e12,
    ("NVIDIA H200 NVL", "bf16"): 835e12,
    ("NVIDIA GH200 480GB", "bf16"): 989.4e12,
    ("NVIDIA B200", "bf16"): 2250e12,
}


def seconds_at_peak(flops: float, device: str | None, dtype: str) -> float | None:
    """What so many FLOPs take a device, by torch's name, in products of [model] dtype; None where no peak is named."""
    peak = None if device is None else PEAKS.get((device, dtype))
    return None if peak is None else flops / peak
