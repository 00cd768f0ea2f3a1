"""The work of training in floating-point operations, and what a device can do of it in a second.

A multiply-accumulate is two operations. What activation checkpointing and pieces compute a second
time is not counted: it is no work that training needs.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fluxclip.model.video_tower import VideoTower
from fluxclip.text.encoder import TextEncoder

_OF_A_PRODUCT = {"cuda": 8192, "cpu": 1024}  # rows and columns, enough to keep the device busy


def passes(tower: nn.Module) -> float:
    """Forward passes that a tower's part in a training step is worth.

    3 where all of it is trained, since the backward pass is twice the work of the forward one; 1
    where it is frozen; between by the share of its weights that are trained, which is the least
    that a backward pass down to them takes.
    """
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    return 1 + 2 * trained / max(1, sum(p.numel() for p in tower.parameters()))


def clip_macs(tower: VideoTower, *, embedded: int, views: tuple[int, ...]) -> int:
    """Multiply-accumulates of a clip's forward pass, its patches embedded once for all views.

    embedded: tokens of its grid. views: tokens that go into the blocks, for each view.
    """
    embedding = tower.macs(embedded, 0) - tower.macs(0, 0)
    return embedding + sum(tower.macs(0, kept) for kept in views)


@torch.no_grad()
def caption_macs(encoder: TextEncoder, ids_BL: Tensor) -> int:
    """Multiply-accumulates of one caption of L tokens, by torch's operator counter.

    It is run for that in eval mode, so that nothing is drawn from torch's generator.
    """
    was_training, was_fast = encoder.training, torch.backends.mha.get_fastpath_enabled()
    encoder.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # a kernel that the counter does not know
    try:
        # autocast would keep weights that it has made half here, without their graph
        without = torch.autocast(ids_BL.device.type, enabled=False)
        with without, FlopCounterMode(display=False) as counter:
            encoder(ids_BL[:1])
    finally:
        encoder.train(was_training)
        torch.backends.mha.set_fastpath_enabled(was_fast)
    macs: int = counter.get_total_flops() // 2
    return macs


def matrix_peak(device: torch.device | str, *, bf16: bool, seconds: float = 1.0) -> float:
    """Operations per second of large matrix products on a device, measured for so many seconds.

    bf16: in that precision, else in fp32 as torch is set to compute it (tensor cores or not).
    """
    device = torch.device(device)
    side = _OF_A_PRODUCT[device.type]
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def seconds_of(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds_of(1)  # chooses its kernel
    end = time.perf_counter() + seconds
    rates: list[float] = []
    while not rates or time.perf_counter() < end:
        rates.append(8 * 2 * side**3 / seconds_of(8))
    return statistics.median(rates)
