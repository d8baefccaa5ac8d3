"""How precisely matrices are multiplied."""

import torch
from torch import Tensor

__all__ = ["product_rounding"]


def product_rounding(tensor: Tensor) -> float:
    """Relative error of one product in the matrix products behind a tensor."""
    coarse = {"tf32": 2.0**-10, "bf16": 2.0**-8}
    if tensor.dtype == torch.float32 and (choice := _products(tensor.device.type)) in coarse:
        return coarse[choice]
    return torch.finfo(tensor.dtype).eps


def _products(device: str) -> str:
    """In what precision the user lets a device multiply float32 matrices."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    # The older getter raises once the newer setting, which torch 2.9 brought, has been used.
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is not None:
        return precision
    older = {"highest": "ieee", "high": "tf32", "medium": "tf32" if device == "cuda" else "bf16"}
    return older[torch.get_float32_matmul_precision()]
