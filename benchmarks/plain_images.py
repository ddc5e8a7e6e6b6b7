"""Supernet and networks, plain: the same modules in contiguous layout, fed by a torch data loader image by image."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from genotypes import Genotype
from models.supernet import Supernet
from training.images import ImageSet


def contiguous(network: nn.Module) -> nn.Module:
    """A copy with all weights in the contiguous layout that torch makes by default."""
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


class Images(Dataset):
    """An ImageSet image by image; with `train`, each image cropped, flipped and cut out on its own."""

    def __init__(self, images: ImageSet, train: bool = False, cutout_size: int = 16):
        self.images = images.to("cpu")  # workers are forked, and cannot use CUDA
        self.train, self.cutout_size = train, cutout_size
        self.mean, self.std = torch.tensor(images.mean)[:, None, None], torch.tensor(images.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = (self.images.images[i].float() / 255 - self.mean) / self.std  # (3, S, S)
        if self.train:
            size, padding = x.shape[-1], x.shape[-1] // 8
            top, left = torch.randint(2 * padding + 1, (2,)).tolist()
            x = F.pad(x, (padding,) * 4)[:, top : top + size, left : left + size]
            x = x.flip(2) if torch.rand(()) < 0.5 else x.clone()
            if self.cutout_size:
                y, z = (c - self.cutout_size // 2 for c in torch.randint(size, (2,)).tolist())
                x[:, max(y, 0) : y + self.cutout_size, max(z, 0) : z + self.cutout_size] = 0
        return x, self.images.labels[i]


@torch.no_grad()
def score(supernet: Supernet, genotype: Genotype, images: ImageSet, batch_size: int, workers: int) -> float:
    """Accuracy of one genotype on all images, by a data loader made for it, as the reference does."""
    device = next(supernet.parameters()).device
    correct = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as intended
        batches = iter(DataLoader(Images(images), batch_size, num_workers=workers))
    for x, labels in batches:
        logits, _ = supernet(x.to(device), genotype)
        correct += (logits.argmax(1) == labels.to(device)).sum().item()
    return correct / len(images)


def train_step(network, optimizer, x: Tensor, labels: Tensor, *genotype: Genotype, grad_clip: float = 5.0) -> None:
    """One step of SGD on cross entropy, 0.4 of the auxiliary head's added (supernet: along the genotype's path)."""
    logits, auxiliary = network(x, *genotype)
    loss = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], grad_clip)
    optimizer.step()
