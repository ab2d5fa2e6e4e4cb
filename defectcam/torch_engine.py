"""PyTorch's engine: the definition of what every engine computes, and the one for GPUs and for training."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import torch

from defectcam.memory import return_freed_memory
from defectcam.network import ScoreNet


class TorchEngine:
    """A frozen ScoreNet on one device.

    Args:
        network: in eval mode, folded or not; moved to `device`.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a network in training mode, whose BatchNorms would drift and mix the batch.
    """

    name = "torch"

    def __init__(self, network: ScoreNet, device: str = "cpu") -> None:
        if network.training:
            raise ValueError("an engine needs the network in eval mode: call network.eval() first")
        # The same photo must give the same answer, and proposals keep their names: no TF32, no search for the fastest
        # algorithm of the day.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        self.network = network.requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = device
        self.stride_px, self.halo_px = network.stride_px, network.halo_px
        self.batch = sys.maxsize  # images at once; fewer once the GPU's memory did not suffice
        self.lock = threading.Lock()  # several threads would only compete for memory

    def score(self, images: np.ndarray) -> np.ndarray:
        """See `Engine.score`."""
        return self._in_batches(self._score, images)[0]

    def score_and_gradient(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.score_and_gradient`."""
        return self._in_batches(self._score_and_gradient, images)

    def _in_batches(self, run: Callable[[np.ndarray], tuple[np.ndarray, ...]], images: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of `run` for all images. From the first error for lack of memory on, half as many images go at once."""
        while True:
            try:
                parts = [run(images[start : start + self.batch]) for start in range(0, len(images), self.batch)]
                return tuple(map(np.concatenate, zip(*parts, strict=True)))
            except torch.OutOfMemoryError:
                if (count := min(self.batch, len(images))) == 1:
                    raise
                self.batch = count // 2
            self.release_memory()  # here the error, which holds the tensors, is gone

    def _score(self, images: np.ndarray) -> tuple[np.ndarray]:
        with self.lock, torch.no_grad():
            return (self.network.score_map(self.tensor(images)).float().cpu().numpy(),)

    def _score_and_gradient(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self.lock, torch.enable_grad():
            tensor = self.tensor(images).requires_grad_(True)
            score = self.network.score_map(tensor)
            return_freed_memory()  # else what the forward pass has left over adds a tenth to the backward pass's peak
            (gradient,) = torch.autograd.grad(score, tensor, grad_outputs=score.detach().sigmoid())
            return score.detach().float().cpu().numpy(), gradient.float().cpu().numpy()

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return_freed_memory()

    def tensor(self, images: np.ndarray) -> torch.Tensor:
        """Images on the device, in the network's dtype, channels last."""
        tensor = torch.from_numpy(np.ascontiguousarray(images)).to(self.device, self.network.head.weight.dtype)
        return tensor.contiguous(memory_format=torch.channels_last)
