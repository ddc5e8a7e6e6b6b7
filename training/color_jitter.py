"""Flips and colour jitter of streamed images, a batch at a time on the device, as torchvision does it for one image."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from training.images import to_device

BRIGHTNESS = CONTRAST = SATURATION = 0.4  # each is multiplied by a factor from 1 - 0.4 to 1 + 0.4
HUE = 0.2  # the hue turns by up to that part of the colour circle, either way


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Flip uint8 images (B, 3, S, S) with probability 1/2 and jitter their colours. Returns floats from 0 to 255.

    draws: (B, 9) on the CPU, uniform from 0 to 1. Of an image's nine numbers, the first decides about the flip, the
        next four are the amounts of brightness, contrast, saturation and hue, and the last four sort these adjustments.
    """
    flip, *amounts = to_device(draws[:, :5], images.device).T[..., None, None, None]  # (B, 1, 1, 1) each
    images = torch.where(flip < 0.5, images.flip(3), images).float()
    ranges = ((1, BRIGHTNESS), (1, CONTRAST), (1, SATURATION), (0, HUE))
    amounts = [centre + spread * (2 * amount - 1) for amount, (centre, spread) in zip(amounts, ranges, strict=True)]
    return color_jitter(images, amounts, draws[:, 5:].argsort(1))


def color_jitter(images: Tensor, amounts: list[Tensor], order: Tensor) -> Tensor:
    """Jitter the colours as torchvision's ColorJitter does, with amounts and an order for each image.

    images: (B, 3, S, S) float from 0 to 255, changed in place; unlike uint8, they are not rounded between adjustments.
    amounts: (B, 1, 1, 1) each: the factors of brightness, contrast and saturation, and the turn of the hue.
    order: (B, 4) on the CPU. order[b] is a permutation of 0 to 3: the adjustments of image b, first to last.
    """
    grouped = to_device(order.argsort(0), images.device)  # (B, 4): column i has the images sorted by their i-th one
    for i, index in enumerate(grouped.unbind(1)):
        counts = order[:, i].bincount(minlength=4).tolist()  # a CPU tensor, so that the device is not waited for
        for group, amount, adjust in zip(index.split(counts), amounts, ADJUSTMENTS, strict=True):
            if len(group):
                images[group] = adjust(images[group], amount[group])
    return images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = transforms.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp(0, 255)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(transforms.rgb_to_grayscale(images), images, factor).clamp(0, 255)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue by the part `turn` of the colour circle, in HSV: chroma is saturation times value."""
    value, chroma = images.amax(1, keepdim=True), images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    r, g, b = images.split(1, dim=1)
    span = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == g, 2 + (b - r) / span, 4 + (r - g) / span)
    hue = torch.where(value == r, (g - b) / span, hue) + 6 * turn  # (B, 1, S, S), in sixths of the circle
    offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # 5, 3, 1: of red, green, blue
    k = (hue + offsets) % 6  # (B, 3, S, S)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
