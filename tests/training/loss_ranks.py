"""Two towers of two layers and the objective above them, in 1, 2 and 4 processes.

`python loss_ranks.py FOLDER` writes what each rank of each world found to FOLDER/W-R.pt: loss,
parts and gradients, averaged over the ranks as DistributedDataParallel does, the peak of memory,
and what gather_rows and exchange_rows give.

Shape legend: N pairs of all ranks, B of one, F inputs, D shared width, K kinds of labels.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fluxclip import plugins
from fluxclip.distributed import exchange_rows, gather_rows
from fluxclip.training.objectives import _views

FOLDER = "fluxclip.training.objectives"
WORLDS = (1, 2, 4)
PAIRS = 24
# logits at once: all, columns in equal chunks (of whichever rows), and with a rest
CHUNKS = (2**24, 6 * PAIRS, 5 * PAIRS)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
ROWS = 128  # of a rank, where memory is measured


class Towers(nn.Module):
    """Clips and captions, by their inputs, to three views, and an objective on them."""

    def __init__(self, objective: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.video = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
        self.text = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.objective = plugins.load(FOLDER, objective).make()
        self.double()

    def features(self, clips_BF: Tensor, captions_BF: Tensor) -> tuple[list[Tensor], Tensor]:
        views = [torch.cat([clips_BF[:, :n], 0 * clips_BF[:, n:]], 1) for n in (6, 4, 2)]
        views_BD = [F.normalize(self.video(view_BF), dim=-1) for view_BF in views]
        return views_BD, F.normalize(self.text(captions_BF), dim=-1)

    def forward(
        self, pairs: tuple[Tensor, Tensor, Tensor], negatives: str
    ) -> tuple[Tensor, dict[str, float]]:
        clips_BF, captions_BF, labels_BK = pairs
        views_BD, text_BD = self.features(clips_BF, captions_BF)
        scale = self.log_scale.exp()
        return self.objective(views_BD, text_BD, scale, labels_BK, align=0.7, negatives=negatives)


def pairs(rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (B, F), captions (B, F) and labels (B, K) of a rank; some recur."""
    random = torch.Generator().manual_seed(1)
    clips_NF = torch.randn(PAIRS, 6, generator=random, dtype=torch.float64)
    captions_NF = torch.randn(PAIRS, 4, generator=random, dtype=torch.float64)
    labels_NK = torch.arange(2 * PAIRS).view(PAIRS, 2)
    # on one rank and across; clip 13 is that of pair 0, its caption that of pair 18
    for column, same in ((0, [0, 13]), (0, [5, 6]), (1, [3, 15, 22]), (1, [13, 18])):
        labels_NK[same, column] = labels_NK[same[0], column].clone()
    own = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    return clips_NF[own], captions_NF[own], labels_NK[own]


class PeakMemory(TorchDispatchMode):
    """The most bytes that results of operations held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._held = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result


def step(objective: str, rank: int, world: int, *, negatives: str, logits: int) -> dict:
    """Loss, parts and gradients of a step, averaged over the ranks."""
    _views.LOGITS_AT_ONCE = logits
    towers = Towers(objective)
    loss, parts = towers(pairs(rank, world), negatives)
    loss.backward()
    found = {"loss": loss.detach()} | {
        f"part {name}": value.double() for name, value in parts.items()
    }
    found |= {f"gradient {name}": p.grad for name, p in towers.named_parameters()}
    for x in found.values():
        dist.all_reduce(x)
        x /= world
    return found


def peak_bytes(objective: str, rank: int, *, negatives: str, logits: int) -> int:
    """The most memory of a step with ROWS pairs a rank."""
    _views.LOGITS_AT_ONCE = logits
    random = torch.Generator().manual_seed(rank)
    video_BD, text_BD = (
        F.normalize(torch.randn(ROWS, 2, generator=random, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    labels_BK = torch.randint(10**6, (ROWS, 2), generator=random)
    scale = torch.tensor(9.0, dtype=torch.float64)
    module = plugins.load(FOLDER, objective).make().double()
    with PeakMemory() as memory:
        leaves = [video_BD.requires_grad_(), text_BD.requires_grad_()]
        loss, _ = module(leaves[:1], text_BD, scale, labels_BK, align=0.0, negatives=negatives)
        loss.backward()
    return memory.peak


def collective(function, number_type: torch.dtype, rank: int, world: int) -> dict:
    """Rows in, rows out, and the gradient of a weighted sum of them, other weights on each rank."""
    random = torch.Generator().manual_seed(10 + rank)
    x = torch.randint(-8, 8, (2 * world, 3), generator=random).to(number_type)
    if x.is_floating_point():
        x.requires_grad_()
    y = function(x)
    weight = torch.randint(-8, 8, y.shape, generator=random).to(number_type)
    if x.requires_grad:
        # neither rows nor gradients need lie in order in memory
        (weight.T.contiguous().T * y).sum().backward()
    return {"x": x.detach(), "y": y.detach(), "weight": weight, "gradient": x.grad}


def work(rank: int, world: int, folder: Path) -> None:
    """One rank of one world."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    store = f"file://{folder / f'store-{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found: dict = {}
    for objective in plugins.available(FOLDER):
        for negatives in ("local", "full"):
            for logits in CHUNKS:
                found["step", objective, negatives, logits] = step(
                    objective, rank, world, negatives=negatives, logits=logits
                )
            for logits in (ROWS**2, 2**40):
                found["peak", objective, negatives, logits] = peak_bytes(
                    objective, rank, negatives=negatives, logits=logits
                )
    for function in (gather_rows, exchange_rows):
        for number_type in TYPES:
            name = function.__name__, str(number_type)
            found[name] = collective(function, number_type, rank, world)
    torch.save({"/".join(map(str, key)): value for key, value in found.items()},
               folder / f"{world}-{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # torch and what checkpoint imports when first used: seconds, spent once for all ranks; with
    # one thread there is nothing that a fork could break
    checkpoint(torch.neg, torch.ones(1), use_reentrant=False)
    fork = multiprocessing.get_context("fork")
    for world in WORLDS:
        ranks = [
            fork.Process(target=work, args=(rank, world, Path(sys.argv[1])))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"{world} ranks: exit codes {[process.exitcode for process in ranks]}")
