"""From the host's memory to the device that the model runs on."""

from __future__ import annotations

import torch


def stage(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. On the CPU it stays the view into the ring that it is.

    Elsewhere the copy is complete on return, so that the caller may let go of the view.
    """
    return tensor.to(device, non_blocking=False)


def choose_device(name: str, place: int = 0) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here; of several GPUs, workers take turns by `place`.

    Raises:
        ValueError: `cuda` where torch finds none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(f"device 'cuda': torch {torch.__version__} ({build}) finds no GPU; use auto or cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", place % torch.cuda.device_count())
