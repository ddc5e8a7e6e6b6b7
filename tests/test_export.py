"""Exported networks give the logits of the network they came from."""

import importlib.util
import json

import pytest
import torch

from genotypes import GENOTYPES
from models import export
from models.network import CifarNetwork, ImageNetNetwork

SHAPES = {"cifar": (CifarNetwork, 16), "imagenet": (ImageNetNetwork, 64)}


def trained(kind: str, auxiliary: bool = True):
    """A network whose batch norms have seen something, and what is known of it."""
    torch.manual_seed(0)
    genotype, (build, size) = GENOTYPES["NAG_ENSEMBLE_B"], SHAPES[kind]
    config = {"num_classes": 3, "layers": 1, "channels": 4, "auxiliary": auxiliary}
    network = build(genotype, **{**config, "auxiliary": False}).train()
    for _ in range(3):
        network(torch.randn(4, 3, size, size) * 2 + 1)
    weights = network.state_dict()
    network = build(genotype, **config)
    network.load_state_dict(weights, strict=False)
    known = {"kind": kind, "genotype": genotype.to_dict(), "network_config": config, "image_size": size}
    known |= {"classes": ["a", "b", "c"], "mean": [0.5] * 3, "std": [0.25] * 3}
    return network.eval(), known


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_safetensors_file_is_loaded_back_as_the_same_network(tmp_path, kind, auxiliary):
    network, known = trained(kind, auxiliary)
    written = export.export_network(network, tmp_path / "n.safetensors", known)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    loaded = export.load_network(tmp_path / "n.safetensors")
    images = torch.randn(5, 3, known["image_size"], known["image_size"])
    assert not loaded.training
    torch.testing.assert_close(loaded(images)[0], network(images)[0])
    described = json.loads((tmp_path / "n.safetensors.json").read_text())
    assert described["classes"] == ["a", "b", "c"] and described["mean"] == [0.5] * 3
    assert described["network_config"] == {"num_classes": 3, "layers": 1, "channels": 4, "auxiliary": False}


def test_a_torch_export_takes_batches_of_any_size(tmp_path):
    network, known = trained("cifar")
    export.export_network(network, tmp_path / "n.pt2", known)
    exported = torch.export.load(tmp_path / "n.pt2").module()
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        torch.testing.assert_close(exported(images), network(images)[0], rtol=1e-4, atol=1e-4)


def test_an_onnx_file_gives_the_same_logits_in_another_runtime(tmp_path):
    for name in export.PACKAGES[".onnx"]:
        pytest.importorskip(name)
    from onnxruntime import InferenceSession

    network, known = trained("cifar")
    export.export_network(network, tmp_path / "n.onnx", known)
    session = InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        torch.testing.assert_close(logits, network(images)[0], rtol=1e-3, atol=1e-3)


def test_a_file_whose_logits_differ_is_not_written(tmp_path, monkeypatch):
    network, known = trained("cifar")
    encode, decode = export.FORMATS[".safetensors"]
    broken = (encode, lambda *args: decode(*args) + 0.1)
    monkeypatch.setitem(export.FORMATS, ".safetensors", broken)
    with pytest.raises(ValueError, match=r"logits differ by up to 0\.1"):
        export.export_network(network, tmp_path / "n.safetensors", known)
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_fails_is_bad_input_and_writes_nothing(tmp_path, monkeypatch):
    network, known = trained("cifar")

    def encode(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setitem(export.FORMATS, ".pt2", (encode, None))
    with pytest.raises(ValueError, match=r"n\.pt2 is not written: RuntimeError: no such operator"):
        export.export_network(network, tmp_path / "n.pt2", known)
    assert not list(tmp_path.iterdir())


def test_other_suffixes_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"ends in \.safetensors, \.onnx, \.pt2, got x\.pth"):
        export.check_export("x.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
        export.check_export("x.onnx")
    export.check_export("x.pt2")


def test_files_that_do_not_fit_together_are_refused_by_name(tmp_path):
    network, known = trained("cifar")
    path, beside = export.export_network(network, tmp_path / "n.safetensors", known)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        export.load_network(beside)
    described = json.loads(beside.read_text())
    for change in (
        {"kind": "speech"},
        {"genotype": GENOTYPES["NAG_ENSEMBLE_C"].to_dict()},
        {"network_config": {"x": 1}},
    ):
        beside.write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=r"n\.safetensors\.json does not describe the network of .*n\.safetensors"):
            export.load_network(path)
    beside.write_text(json.dumps(described))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a safetensors file"):
        export.load_network(path)
    beside.unlink()
    with pytest.raises(OSError, match=r"n\.safetensors\.json"):
        export.load_network(path)
