"""Trained networks as files for other programs: safetensors, ONNX, torch.export.

    python train_cifar.py --evaluate runs/train_cifar-.../checkpoint.pt --export FILE.safetensors

    from models.export import load_network
    network = load_network("FILE.safetensors")       # in eval mode: network(images)[0] are logits (B, classes)

Beside FILE, FILE.json tells what the weights do not: genotype, settings of the network, image size, classes, and the
mean and the standard deviation by which images are normalised. The networks take float images (B, 3, S, S),
(pixel / 255 - mean) / std, and have no auxiliary head.
"""

import importlib.util
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from genotypes import Genotype
from models.network import CifarNetwork, ImageNetNetwork, Network
from plumbing.checkpoint_files import check_declared
from plumbing.files import atomic_file, from_json, write_json
from plumbing.run_folder import check_writable
from utils import one_line

NETWORKS = {"cifar": CifarNetwork, "imagenet": ImageNetNetwork}
PACKAGES = {".safetensors": ["safetensors"], ".onnx": ["onnx", "onnxscript", "onnxruntime"], ".pt2": []}
TOLERANCE = 1e-4  # absolute and relative difference of logits from another runtime, which sums in another order


def check_export(path: str) -> None:
    """Raise ValueError when a network cannot be exported to that file, or a package for it is missing."""
    suffix = Path(path).suffix
    if suffix not in PACKAGES:
        raise ValueError(f"expected a file name that ends in {', '.join(PACKAGES)}, got {path}")
    missing = [name for name in PACKAGES[suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{suffix} needs packages: pip install {' '.join(missing)}")
    check_writable(Path(path).parent)


def described_in(path: Path) -> Path:
    """The file of the description: FILE.safetensors -> FILE.safetensors.json, which no other file can be called."""
    return path.with_name(path.name + ".json")


def export_network(network: Network, path: str | Path, known: dict) -> list[Path]:
    """Write a network in the format of the file's suffix, and its description as JSON. Returns the paths of both.

    known: the description: "kind" ("cifar" or "imagenet"), "genotype", "network_config", "image_size" in pixels,
        "classes", "mean", "std" and whatever else is to be told.
    Raises ValueError and writes nothing when the exported network does not give the logits of the network.
    """
    path = Path(path)
    check_export(str(path))
    known = {**known, "network_config": {**known["network_config"], "auxiliary": False}}
    plain = rebuild(known, without_auxiliary(network.state_dict()))
    size = known["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    encode, decode = FORMATS[path.suffix]
    try:
        content = encode(plain, images)
        with torch.no_grad():
            expected = plain(images)[0]
            got = decode(content, known, images)
    except Exception as error:  # exporters and runtimes raise all sorts
        raise ValueError(f"{path} is not written: {type(error).__name__}: {error}") from error
    if not torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(f"{path} is not written: its logits differ by up to {(got - expected).abs().max():.2g}")
    with atomic_file(path, "wb") as file:
        file.write(content)
    write_json(described_in(path), known)
    return [path, described_in(path)]


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a .safetensors file and the JSON beside it, in eval mode.

    Raises ValueError naming the file and what is wrong with it, OSError when one of the two cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a .safetensors file, got {path}")
    beside = described_in(path)
    try:
        network = rebuild(from_json(beside.read_text()), load(path.read_bytes()))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({one_line(error, 120)})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = one_line(error, 120)
        raise ValueError(f"{beside} does not describe the network of {path}: {reason}") from None
    return network.to(device, memory_format=torch.channels_last)


def rebuild(known: dict, weights: dict[str, Tensor]) -> Network:
    """The network of a description (see export_network) and its weights, on the CPU, in eval mode."""
    check_declared({**known, "weights": weights})
    network = NETWORKS[known["kind"]](Genotype.from_dict(known["genotype"]), **known["network_config"])
    network.load_state_dict(weights)
    return network.eval()


def without_auxiliary(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network without those of the auxiliary head, on the CPU."""
    return {name: w.detach().cpu().contiguous() for name, w in weights.items() if not name.startswith("auxiliary.")}


# ----------------------------------------------------------------------------------------------------- formats


class Logits(nn.Module):
    """A network as other programs want it: from images (B, 3, S, S) to logits (B, classes)."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


BATCH = {"images": {0: torch.export.Dim("batch")}}  # exported networks take batches of any size


def to_safetensors(network: Network, images: Tensor) -> bytes:
    from safetensors.torch import save

    return save(without_auxiliary(network.state_dict()), {"format": "pt"})


def run_safetensors(content: bytes, known: dict, images: Tensor) -> Tensor:
    from safetensors.torch import load

    return rebuild(known, load(content))(images)[0]


def to_torch_export(network: Network, images: Tensor) -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(Logits(network).eval(), (images,), dynamic_shapes=BATCH), file)
    return file.getvalue()


def run_torch_export(content: bytes, known: dict, images: Tensor) -> Tensor:
    return torch.export.load(io.BytesIO(content)).module()(images)


def to_onnx(network: Network, images: Tensor) -> bytes:
    program = torch.onnx.export(
        Logits(network).eval(),
        (images,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=BATCH,
        input_names=["images"],
        output_names=["logits"],
    )
    return program.model_proto.SerializeToString()


def run_onnx(content: bytes, known: dict, images: Tensor) -> Tensor:
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


# suffix -> (network, example images) -> content of the file; (content, description, images) -> logits
FORMATS = {
    ".safetensors": (to_safetensors, run_safetensors),
    ".onnx": (to_onnx, run_onnx),
    ".pt2": (to_torch_export, run_torch_export),
}
