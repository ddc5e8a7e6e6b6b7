"""The NAS dataset file, its classes, and the metrics computed on it."""

import json

import numpy as np
import pytest
import torch

from build_nas_dataset.objectives import objectives_of
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, read_header, read_records, write_records
from genotypes import read_genotypes
from models.cost import genotype_cost


@pytest.fixture
def records():
    pool = random_pool(12, seed=1)
    return [Record(i, genotype, round(0.1 + 0.02 * i, 6), *genotype_cost(genotype)) for i, genotype in enumerate(pool)]


def test_records_survive_the_file(tmp_path, records):
    path = tmp_path / "nasdata.jsonl"
    write_records(path, records, {"pool_seed": 1})
    assert read_records(path) == records
    assert read_header(path)["pool_seed"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d | {"accuracy": 1.5}, "0 to 1"),
        (lambda d: d | {"params": "many"}, "params"),
        (lambda d: d | {"macs": 10**400}, "macs must be a whole number from 0 to 1e15"),
        (lambda d: d | {"normal": {"matrix": [[0] * 4, [0] * 4, [0, 1, 0, 0], [0] * 4], "ops": []}}, "triangular"),
        (lambda d: d | {"normal": d["normal"] | {"ops": ["x"] * len(d["normal"]["ops"])}}, "start with"),
        (lambda d: [1], "object"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, records, change, reason):
    path = tmp_path / "nasdata.jsonl"
    write_records(path, records, {})
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(change(json.loads(lines[3])))
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"line 4.*{reason}"):
        read_records(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1 is empty"),
        ("{}\n", "header"),
        ("not json\n", "line 1 is not JSON"),
        ('{"format": \n', "column 11"),  # where it breaks off
        ("[" * 100_000, "line 1 holds a number or a nesting"),
        ("9" * 5_000, "line 1 holds a number or a nesting"),
    ],
)
def test_what_is_no_nas_dataset_is_refused(tmp_path, text, reason):
    path = tmp_path / "nasdata.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_records(path)
    with pytest.raises(ValueError, match="no such NAS dataset"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_records(tmp_path)


def test_files_of_the_reference_are_read_and_their_params_recounted(tmp_path, records):
    entries = []
    for record in records:
        entry = {"perf": torch.tensor(100 * record.accuracy), "params": torch.tensor(1.0)}
        for name, cell in zip(("conv", "reduc"), record.genotype.cells, strict=True):
            v = cell.num_vertices
            edge, node = torch.zeros(10, 10), torch.zeros(10, 8)
            edge[:v, :v] = torch.tensor(cell.matrix).T  # the row is the target
            node[range(v), [cell.space.token_id[op] for op in cell.ops]] = 1
            entry |= {f"{name}_edge": edge, f"{name}_node": node, f"{name}_n": torch.tensor(v)}
        entries.append(entry)
    torch.save(entries, tmp_path / "nasdata.pt")
    read = read_records(tmp_path / "nasdata.pt")
    assert [(r.genotype, r.params, r.macs) for r in read] == [(r.genotype, r.params, r.macs) for r in records]
    assert np.allclose([r.accuracy for r in read], [r.accuracy for r in records])


def test_torch_files_of_code_or_of_other_data_are_refused(tmp_path):
    torch.save([np.random.default_rng], tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="neither"):
        read_records(tmp_path / "evil.pt")
    torch.save([{"conv_n": 4, "conv_edge": [[0] * 4] * 4}], tmp_path / "lists.pt")
    with pytest.raises(ValueError, match=r"lists\.pt, record 0: AttributeError"):
        read_records(tmp_path / "lists.pt")


def test_shipped_dataset_is_whole_and_its_costs_are_exact():
    records = read_records("data/nasdata.jsonl")
    assert len(records) >= 2000
    assert len({record.genotype.canonical() for record in records}) == len(records)
    assert all(genotype_cost(r.genotype) == (r.params, r.macs) for r in records[:200])
    (accuracy,) = objectives_of(records, {"accuracy": 3})
    sizes = np.bincount([accuracy.class_of(record.accuracy) for record in records])
    assert np.abs(sizes / len(records) - 1 / 3).max() < 0.03  # accuracies are multiples of 1/1000: ties


def test_a_byte_order_mark_before_json_says_nothing(tmp_path, records):
    path = tmp_path / "nasdata.jsonl"
    write_records(path, records, {})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_records(path) == records
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(records[0].to_dict()), encoding="utf-8")
    assert read_genotypes(tmp_path / "x.json")[0][0] == records[0].genotype
