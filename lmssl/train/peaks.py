"""What devices can do at most: dense matrix products, by the name that CUDA gives them.

A name that is not here has no peak, and then no utilisation is shown: one of another model would be wrong. Numbers are
the makers' for dense products without sparsity; fp32 is that of the plain units, for TensorFloat-32 is off by default.

Source: NVIDIA's data sheets of B200 (HGX), H200, H100, A100, L40S, L4 and A10, and its papers on the architectures Ada
and Ampere for GeForce (products of bf16 added up in fp32). On all of them fp16 is as fast as bf16.
"""

from __future__ import annotations

_TERAFLOPS: dict[str, tuple[float, float]] = {
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H200 NVL": (835.5, 60.0),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 NVL": (835.5, 60.0),
    "NVIDIA H100 PCIe": (756.0, 51.2),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA L40S": (362.05, 91.6),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA A10": (125.0, 31.2),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
}
"""bf16, fp32."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Floating-point operations per second of one device, or None where they are not known.

    >>> peak_flops("NVIDIA H200", "bf16"), peak_flops("NVIDIA H200 MIG 1g.18gb", "bf16"), peak_flops("cpu", "fp32")
    (989400000000000.0, None, None)
    """
    found = _TERAFLOPS.get(device_name)
    column = {"bf16": 0, "fp16": 0, "fp32": 1}.get(precision)
    return None if found is None or column is None else found[column] * 1e12
