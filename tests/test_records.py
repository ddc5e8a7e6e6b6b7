"""The NAS dataset file, its classes, and the metrics computed on it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from build_nas_dataset.objectives import objectives_of
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, check_held_out, read_header, read_records, read_space, write_records
from genotypes import NAG_SPACE, NASBENCH101, NASBENCH201, CellSpec, Genotype, read_genotypes
from models.cost import genotype_cost
from plumbing.files import write_json


@pytest.fixture
def records():
    pool = random_pool(12, seed=1)
    return [Record(i, genotype, round(0.1 + 0.02 * i, 6), *genotype_cost(genotype)) for i, genotype in enumerate(pool)]


def test_records_survive_the_file(tmp_path, records):
    path = tmp_path / "nasdata.jsonl"
    write_records(path, records, {"pool_seed": 1})
    assert read_records(path) == records
    assert read_header(path)["pool_seed"] == 1


@pytest.mark.parametrize("space", [NASBENCH101, NASBENCH201], ids=lambda space: space.name)
def test_records_of_other_spaces_may_lack_costs_and_carry_further_columns(tmp_path, space):
    path = tmp_path / "nasdata.jsonl"
    truth = [{"test_accuracy": i / 10, "repeats": [0.1, 0.2]} for i in range(5)]
    records = [Record(i, g, 0.5 + i / 20, columns=truth[i]) for i, g in enumerate(random_pool(5, 1, space))]
    write_records(path, records, {"epochs": 12})
    assert read_records(path) == read_records(path, space) == records
    assert (read_space(path), read_header(path)["epochs"]) == (space, 12)
    line = json.loads(path.read_text().splitlines()[1])
    assert not {"params", "macs"} & line.keys() and line["test_accuracy"] == 0
    assert objectives_of(records, {"accuracy": 3})[0].num_classes == 3
    with pytest.raises(ValueError, match="no params for 5 of its 5 records"):
        objectives_of(records, {"params": 2})
    with pytest.raises(ValueError, match=f"of the space {space.name}, expected one of nag"):
        read_records(path, NAG_SPACE)
    path.write_text(path.read_text().replace(f'"search_space": "{space.name}"', '"search_space": "darts"'))
    with pytest.raises(ValueError, match="line 1: unknown search space 'darts'"):
        read_records(path)


def test_another_column_can_be_the_accuracy_if_every_record_has_it(tmp_path, records):
    path = tmp_path / "nasdata.jsonl"
    labelled = [replace(r, columns={"brief_accuracy": (r.id + 1) / 20, "source": "brief"}) for r in records]
    write_records(path, labelled, {"columns": {"brief_accuracy": {"source": "brief", "epochs": 2}}})
    assert read_records(path) == labelled
    asked = read_records(path, accuracy_column="brief_accuracy")
    assert [record.accuracy for record in asked] == [(record.id + 1) / 20 for record in records]
    assert [record.params for record in asked] == [record.params for record in records]
    write_records(path, [*labelled[:7], replace(records[7], columns={"source": "supernet"}), *labelled[8:]], {})
    with pytest.raises(ValueError, match=r"nasdata.jsonl, line 9: record 7 has no brief_accuracy$"):
        read_records(path, accuracy_column="brief_accuracy")
    write_records(path, [replace(records[0], columns={"brief_accuracy": 71.2})], {})
    with pytest.raises(ValueError, match=r"line 2: brief_accuracy must be a fraction from 0 to 1, got 71\.2"):
        read_records(path, accuracy_column="brief_accuracy")
    torch.save([], tmp_path / "reference.pkl")
    with pytest.raises(ValueError, match="is a file of the reference, which has no column brief_accuracy"):
        read_records(tmp_path / "reference.pkl", accuracy_column="brief_accuracy")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"classes": ["cat", "dog"], "columns": {"brief_accuracy": {"classes": ["a", "b"]}}},
         "line 1: the file has accuracies on images of .'cat', 'dog'., the column brief_accuracy of .'a', 'b'."),
        ({"columns": {"a": {"classes": ["x"]}, "b": {}, "c": {"classes": ["y"]}}},
         "line 1: the column a has accuracies on images of .'x'., the column c of .'y'."),
        ({"columns": ["brief_accuracy"]}, 'line 1: expected "columns" to be an object with an object for each'),
    ],
)  # fmt: skip
def test_columns_of_different_data_are_refused(tmp_path, records, header, reason):
    write_records(tmp_path / "nasdata.jsonl", records, header)
    with pytest.raises(ValueError, match=reason):
        read_records(tmp_path / "nasdata.jsonl")


def test_a_held_out_cell_among_the_records_is_named_however_it_is_drawn(tmp_path, records):
    cells = tmp_path / "truth.json"
    apart = [genotype.to_dict() for genotype in random_pool(3, seed=2)]
    write_json(cells, apart)
    check_held_out(records, "nasdata.jsonl", cells)
    normal, reduction = records[5].genotype.cells
    with_idle_vertex = [[*row[:-1], 0, row[-1]] for row in normal.matrix]
    with_idle_vertex.insert(-1, [0] * (normal.num_vertices + 1))
    same = Genotype(CellSpec(with_idle_vertex, [*normal.ops[:-1], "identity", "output"]), reduction)
    write_json(cells, [*apart, same.to_dict()])
    with pytest.raises(ValueError, match=f"^record 5 of nasdata.jsonl is cell 3 of {cells}, which is held out$"):
        check_held_out(records, "nasdata.jsonl", cells)
    write_json(cells, [Genotype(*g.cells, space=g.space).to_dict() for g in random_pool(1, 1, NASBENCH201)])
    with pytest.raises(ValueError, match=r"truth\.json, genotype 0"):
        check_held_out(records, "nasdata.jsonl", cells)


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


def drawn_as_the_reference_draws(rng):
    """A random cell that is valid by the reference's rule, and what its pruning leaves: (CellSpec, matrix, labels).

    Its pruning deletes every vertex on no path from an input to the output, inputs included, and takes a cell for
    valid when three vertices are left.
    """
    while True:
        size = rng.integers(3, 11)
        matrix = np.triu((rng.random((size, size)) + rng.random()).astype(int), 1)
        matrix[:2, :2] = 0
        ops = ["input0", "input1", *rng.choice(NAG_SPACE.ops, size - 3), "output"]
        paths = np.linalg.matrix_power(matrix + np.eye(size, dtype=int), size) > 0  # [from, to]
        keep = np.flatnonzero(paths[:2].any(0) & paths[:, -1])
        if len(keep) >= 3:
            return CellSpec(matrix.tolist(), ops), matrix[np.ix_(keep, keep)], [ops[v] for v in keep]


def reference_entry(cells, perf):
    """A record of the reference: cells are (matrix, labels), normal cell first."""
    entry = {"perf": torch.tensor([perf]), "params": torch.tensor([1])}
    for name, (matrix, ops) in zip(("conv", "reduc"), cells, strict=True):
        node = torch.zeros(len(ops), 8)
        node[range(len(ops)), [NAG_SPACE.token_id[op] for op in ops]] = 1
        edge = torch.tensor(np.array(matrix).T.copy(), dtype=torch.float32)  # the row is the target
        entry |= {f"{name}_edge": edge, f"{name}_node": node, f"{name}_n": torch.tensor([len(ops)])}
    return entry


@pytest.mark.parametrize(("zipped", "n"), [(True, 300), (False, 60)], ids=["zip", "older pickle"])
def test_files_of_the_references_sampler_are_read_and_unused_inputs_put_back(tmp_path, zipped, n, capsys):
    rng, path = np.random.default_rng(0), tmp_path / "nasdata_150"
    drawn = [[drawn_as_the_reference_draws(rng) for _ in range(2)] for _ in range(n)]
    entries = [reference_entry([cell[1:] for cell in pair], 0.25 * i) for i, pair in enumerate(drawn)]
    torch.save(entries, path, _use_new_zipfile_serialization=zipped)
    read = read_records(path)
    assert [r.genotype for r in read] == [Genotype(*(cell[0] for cell in pair)).prune() for pair in drawn]
    assert [r.accuracy for r in read] == pytest.approx([0.0025 * i for i in range(n)])
    assert all((r.params, r.macs) == genotype_cost(r.genotype) for r in read[:30])
    lacking = sum(any(len({"input0", "input1"} & set(ops)) < 2 for _, _, ops in pair) for pair in drawn)
    assert lacking > n / 15
    assert capsys.readouterr().out == (
        f"{path}: {lacking} of {n} records lacked an unused input of a cell, which was put back\n"
    )


def test_padded_records_of_the_reference_are_read(tmp_path, records):
    entries = [reference_entry([(c.matrix, c.ops) for c in r.genotype.cells], 100 * r.accuracy) for r in records]
    for entry in entries:
        for name in ("conv", "reduc"):
            missing = 10 - entry[f"{name}_n"].item()
            entry[f"{name}_edge"] = torch.nn.functional.pad(entry[f"{name}_edge"], (0, missing, 0, missing))
            entry[f"{name}_node"] = torch.nn.functional.pad(entry[f"{name}_node"], (0, 0, 0, missing))
    torch.save(entries, tmp_path / "nasdata.pt")
    read = read_records(tmp_path / "nasdata.pt")
    assert [r.genotype for r in read] == [r.genotype for r in records]
    assert np.allclose([r.accuracy for r in read], [r.accuracy for r in records])


def test_records_of_the_reference_without_a_valid_cell_are_left_out_and_counted(tmp_path, records, capsys):
    whole = [(c.matrix, c.ops) for c in records[0].genotype.cells]
    chain = np.eye(10, k=1, dtype=int)  # ten vertices, of which one input is missing
    bad = {
        "no inputs": (chain[:3, :3], ["identity", "identity", "output"]),
        "no place for the input": (chain, ["input1", *["identity"] * 8, "output"]),
        "no path": (np.zeros((3, 3)), ["input0", "input1", "output"]),
    }
    entries = [reference_entry([cell, whole[1]], 50.0) for cell in (whole[0], *bad.values())]
    torch.save(entries, tmp_path / "nasdata.pt")
    assert [r.genotype for r in read_records(tmp_path / "nasdata.pt")] == [records[0].genotype]
    assert "3 of 4 records were left out" in capsys.readouterr().out
    torch.save(entries[1:], tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no valid records"):
        read_records(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("conv_n", torch.tensor([float("inf")]), "OverflowError"),
        ("conv_n", torch.tensor([10**9]), "conv_n must be from 1 to 10"),
        ("perf", torch.tensor([float("nan")]), "perf must be a percentage"),
        ("reduc_edge", torch.ones(1, 1), "a cell has 3 to 10 vertices, got 1"),
        ("reduc_node", torch.ones(10), "TypeError"),
    ],
)
def test_a_bad_record_of_the_reference_is_named(tmp_path, records, key, value, reason):
    entries = [reference_entry([(c.matrix, c.ops) for c in r.genotype.cells], 50.0) for r in records]
    entries[3][key] = value
    torch.save(entries, tmp_path / "nasdata.pt")
    with pytest.raises(ValueError, match=rf"nasdata\.pt, record 3: .*({reason})"):
        read_records(tmp_path / "nasdata.pt")


def test_mutated_files_of_the_older_format_are_read_or_refused(tmp_path, records):
    entries = [reference_entry([(c.matrix, c.ops) for c in r.genotype.cells], 50.0) for r in records[:3]]
    path, rng = tmp_path / "nasdata", np.random.default_rng(0)
    torch.save(entries, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for _ in range(200):
        mutated = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.2 else whole)
        for place in rng.integers(1, len(mutated), rng.integers(1, 4)) if len(mutated) > 1 else ():
            mutated[place] = rng.integers(256)
        path.write_bytes(mutated)
        try:
            read_records(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


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
