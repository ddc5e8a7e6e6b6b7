"""Weights of the reference's generator, under its names and in its files, become a generator that draws the same."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import generate_archs
import generate_archs_multiobj
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from generation import from_reference
from generation.from_reference import convert, read_weights
from genotypes import NAG_SPACE
from models.cost import genotype_cost
from models.generator import Generator
from tests.small_training import refused

GOLDEN = Path(__file__).parent / "data" / "gan_outputs.npz"


def reference_outputs(kind):
    """What the reference gave: weights ("generator/NAME"), noise, labels and soft cells, in float64."""
    with np.load(GOLDEN) as file:
        return {key.removeprefix(f"{kind}/"): torch.from_numpy(file[key]) for key in file if key.startswith(kind)}


def weights_of(data):
    prefix = "generator/"
    return OrderedDict((key.removeprefix(prefix), value.float()) for key, value in data.items() if prefix in key)


@pytest.fixture
def nasdata(tmp_path):
    records = [Record(i, g, 0.2 + 0.01 * i, *genotype_cost(g)) for i, g in enumerate(random_pool(24, seed=1))]
    write_records(tmp_path / "nasdata.jsonl", records, {})
    return tmp_path / "nasdata.jsonl"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older pickle"])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_converted_weights_give_the_cells_of_the_reference(tmp_path, kind, zipped):
    data, path = reference_outputs(kind), tmp_path / "generator.pkl"
    torch.save(weights_of(data), path, _use_new_zipfile_serialization=zipped)
    generator = convert(read_weights(path))
    assert (generator.config.latent_dim, generator.config.vertex_size, generator.config.graph_size) == (5, 12, 6)
    assert generator.config.num_classes == (3,) * data["labels"].shape[1]
    with torch.no_grad():
        cells = generator.double()(data["z"], data["labels"])
    for name, batch in zip(NAG_SPACE.cells, cells, strict=True):
        assert torch.equal(batch.num_nodes, data[f"{name}_num_nodes"].squeeze(1))
        torch.testing.assert_close(batch.adj, data[f"{name}_edges"].mT, rtol=0, atol=1e-5)  # the weights: float32
        torch.testing.assert_close(batch.ops, data[f"{name}_ops"], rtol=0, atol=1e-5)


def test_the_sizes_are_read_off_the_weights():
    """Made-up weights of the reference's default sizes."""
    tokens, z, ndim, sdim = 8, 110, 250, 56
    shapes = {"perf_label_embedding.weight": (3, 10)}
    for cell in ("conv_generator", "reduc_generator"):
        linear = {
            "nodeInit.f_init": (ndim + sdim, ndim + sdim + z),
            "nodeInit.f_init_2": (ndim, ndim + sdim),
            "nodeInit.f_start": (ndim + sdim, ndim + z),
            "nodeInit.f_start_2": (ndim, ndim + sdim),
            "nodeAdd.f_an": (sdim, z + sdim),
            "nodeAdd.f_an_2": (tokens, sdim),
            "edgeAdd.f_s_1": (ndim + sdim, 2 * ndim + sdim + z),
            "edgeAdd.f_s_2": (1, ndim + sdim),
        }
        linear |= {f"prop.{name}.f_m": (sdim, ndim) for name in ("GraphEmb", "GraphEmb_init")}
        for layer in range(3):
            own = f"prop.NodeEmb.GNNLayers.{layer}"
            linear |= {f"{own}.{name}": (2 * ndim, 2 * ndim) for name in ("msg", "msg_rev")}
            for gate in ("ih", "hh"):
                shapes[f"{cell}.stepGenerator.{own}.upd.weight_{gate}"] = 3 * ndim, (2 if gate == "ih" else 1) * ndim
                shapes[f"{cell}.stepGenerator.{own}.upd.bias_{gate}"] = (3 * ndim,)
        shapes[f"{cell}.stepGenerator.nodeInit.NodeInits.weight"] = tokens, ndim
        for name, shape in linear.items():
            shapes[f"{cell}.stepGenerator.{name}.weight"] = shape
            shapes[f"{cell}.stepGenerator.{name}.bias"] = shape[:1]
    config = convert({name: torch.zeros(shape) for name, shape in shapes.items()}, max_vertices=7).config
    assert (config.latent_dim, config.vertex_size, config.graph_size, config.num_layers) == (100, 250, 56, 3)
    assert (config.aggregation, config.max_vertices, config.label_sizes) == ("mean", 7, (10,))


def test_the_script_writes_a_generator_that_cells_are_drawn_with(tmp_path, nasdata, capsys):
    for kind, script in (("single", generate_archs), ("multi", generate_archs_multiobj)):
        weights, folder = tmp_path / f"{kind}.pkl", tmp_path / kind
        torch.save(weights_of(reference_outputs(kind)), weights, _use_new_zipfile_serialization=False)
        words = [weights, "--batch_size", 8, "--device", "cpu", "--nasbench_data", nasdata, "--output_dir", folder]
        from_reference.main(from_reference.parse_args(list(map(str, words))))
        assert f"next: python {script.__name__}.py" in capsys.readouterr().out
        labels = (2,) * (1 if kind == "single" else 2)
        expected = convert(read_weights(weights)).sample(labels, 5, seed=0)
        assert Generator.from_checkpoint(folder / "generator.pt").sample(labels, 5, seed=0) == expected
        out = tmp_path / f"{kind}-cells"
        drawing = ["--checkpoint", folder / "generator.pt", "--num_archs", 4, "--device", "cpu", "--output_dir", out]
        script.main(script.parse_args(list(map(str, drawing))))
        assert (out / "genotypes.json").exists()
        assert "holds another run" in refused(capsys, from_reference, words)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: [1, 2], "expected the state_dict"),
        (lambda w: {"a": torch.zeros(1)}, "perf_label_embedding.weight is missing"),
        (lambda w: {**w, "extra.weight": torch.zeros(1)}, "unknown name extra.weight"),
        (lambda w: {k: v for k, v in w.items() if "f_s_2.bias" not in k}, "f_s_2.bias is missing"),
        (lambda w: {**w, "perf_label_embedding.weight": torch.zeros(3)}, "not those of a generator"),
        (lambda w: {k: v.mT if "f_an.weight" in k else v for k, v in w.items()}, "not those of a generator"),
        (lambda w: {k: v * float("nan") for k, v in w.items()}, "not all finite"),
    ],
)
def test_other_files_are_refused_by_one_line(tmp_path, nasdata, capsys, change, reason):
    path = tmp_path / "generator.pkl"
    torch.save(change(weights_of(reference_outputs("single"))), path)
    words = [path, "--nasbench_data", nasdata, "--device", "cpu", "--output_dir", tmp_path / "out"]
    line = refused(capsys, from_reference, words)
    assert reason in line and "weights:" in line
    assert not (tmp_path / "out").exists()
