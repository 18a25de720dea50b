"""Models that the engine's tests name with --model: quick ones, and ones that fail in a certain way."""

from __future__ import annotations

import os
import sys
import time
import zlib
from pathlib import Path

import torch

from engine.model import Batch, Outputs
from engine.parallel import Parallel


def checksum(pixels: torch.Tensor) -> list[float]:
    """CRC-32 of all bytes and the number of patches, in numbers that float32 holds exactly."""
    crc = zlib.crc32(pixels.numpy().data)
    return [float(crc >> 16), float(crc & 0xFFFF), float(len(pixels))]


class Checksum:
    """Every byte counts in its embeddings; takes no time."""

    def load(self, *, device: torch.device, seed: int) -> None:
        return

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(torch.tensor([checksum(pixels) for pixels in batch.pixel_values]))


class Picky(Checksum):
    """Refuses photographs taller than wide, answers square ones wrongly, says when it is at work."""

    def forward(self, batch: Batch) -> Outputs:
        print(f"{len(batch.pixel_values)} photographs", flush=True)
        embeddings = super().forward(batch).embeddings
        for _, height, width in batch.grid_thw.tolist():
            if height > width:
                raise ValueError(f"{height} patches are too tall for {width}")
            if height == width:
                embeddings = embeddings.flatten()
        return Outputs(embeddings)


class LoadsLate(Checksum):
    """Is loaded once the file named by the environment is there."""

    def load(self, *, device: torch.device, seed: int) -> None:
        while not Path(os.environ["LOAD_WHEN"]).exists():
            time.sleep(0.01)


class TellsWhere(Checksum):
    """Fails with the path over which the workers of its rank meet."""

    def forward(self, batch: Batch) -> Outputs:
        raise OSError(f"cannot read {sys.argv[sys.argv.index('--rendezvous') + 1]}")


class DiesInLoad(Checksum):
    """Ends its process before it is ready."""

    def load(self, *, device: torch.device, seed: int) -> None:
        print("no such luck", flush=True)
        os._exit(7)


class Divided(Checksum):
    """Each worker of a rank checks its own rows; refuses tall photographs, and square ones in one worker."""

    def load(self, *, device: torch.device, seed: int, parallel: Parallel | None = None) -> None:
        assert parallel is not None
        self._parallel = parallel

    def forward(self, batch: Batch) -> Outputs:
        for _, height, width in batch.grid_thw.tolist():
            if height > width:
                raise ValueError(f"{height} patches are too tall for {width}")
        sums = [self._parallel.sum(self._part(pixels)) for pixels in batch.pixel_values]
        if self._parallel.rank == 1 and any(height == width for _, height, width in batch.grid_thw.tolist()):
            raise ValueError("only here")
        return Outputs(torch.stack(sums))

    def _part(self, pixels: torch.Tensor) -> torch.Tensor:
        place, size = self._parallel.rank, self._parallel.size
        parts = torch.zeros(size, 3)
        parts[place] = torch.tensor(checksum(pixels.chunk(size)[place]))
        return parts.flatten()
