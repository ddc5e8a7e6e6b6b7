"""Other search spaces, from the NAS dataset to pictures: gan.py, generate_archs.py, visualize.py; what is refused."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import gan
import generate_archs
import visualize
from benchmarks.nasbench201 import Truth, measure
from build_nas_dataset.candidates import read_candidates
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from generation.targets import extreme_genotypes
from genotypes import NAG_SPACE, NASBENCH101, NASBENCH201, SPACES, Genotype, SearchSpace, load_genotype
from models.cost import batch_cost, genotype_cost
from models.generator import Generator
from models.graph import CellBatch
from models.network import CifarNetwork, count_parameters
from models.ops import OPS, Op, SeparableConv
from models.predictor import Predictor
from tests.small_training import refused
from training.steps import genotype_to_train

SMALL = "--n_epochs 2 --g_emb_size 8 --d_emb_size 8 --batch_size 8 --eval_size 6 --device cpu".split()
RECIPES = {"robust": "--pool_size 1000 --policy_gradient_cells 8 --warmup_epochs 1".split(), "paper": []}


def write_dataset(folder, space, n=24):
    """A NAS dataset of n genotypes with an accuracy and a true one, without #params and MACs. Returns its path."""
    pool = random_pool(n, seed=6, space=space)
    records = [Record(i, g, 0.1 + i / 50, columns={"test_accuracy": 0.9}) for i, g in enumerate(pool)]
    write_records(folder / f"{space.name}.jsonl", records, {})
    return folder / f"{space.name}.jsonl"


def trained(folder, space, recipe, *flags):
    """A generator trained for two epochs on made-up records of a space. Returns the run's folder and the records."""
    data, run = write_dataset(folder, space), folder / "run"
    argv = ["--nasbench_data", data, "--recipe", recipe, *SMALL, *RECIPES[recipe], "--output_dir", run, *flags]
    gan.main(gan.parse_args(list(map(str, argv))))
    return run, data


def generate(run, *flags):
    argv = ["--checkpoint", run / "generator.pt", "--num_archs", 30, "--device", "cpu", *flags]
    generate_archs.main(generate_archs.parse_args(list(map(str, argv))))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("space", [NASBENCH101, NASBENCH201], ids=lambda space: space.name)
def test_a_generator_of_the_space_is_trained_and_draws_its_cells(tmp_path, capsys, space, recipe):
    run, _ = trained(tmp_path, space, recipe, "--space", space.name)
    assert json.loads((run / "config.json").read_text())["args"]["space"] == space.name
    # The paper's generator rounds its decisions, and one of two epochs may have no valid cell to write.
    generate(run, "--evaluate", "--temperature", 1.0, "--output_dir", tmp_path / "archs")
    assert "#params" not in capsys.readouterr().out
    entries = json.loads((tmp_path / "archs" / "genotypes.json").read_text())
    assert entries and not {"params", "macs"} & entries[0].keys()
    genotypes = [Genotype.from_dict(entry) for entry in entries]
    assert {genotype.space for genotype in genotypes} == {space} and all(g.prune() == g for g in genotypes)
    assert len({(g.canonical(), tuple(e["labels"])) for g, e in zip(genotypes, entries, strict=True)}) == len(entries)
    evaluation = json.loads((tmp_path / "archs" / "evaluation.json").read_text())
    assert evaluation["generated cells"]["accuracy"]["by"] == "predictor"
    assert evaluation["random cells"]["validity"] == 1 and evaluation["random cells"]["drawn"] == 90
    argv = ["--arch", f"{tmp_path / 'archs' / 'genotypes.json'}:0", "--output_dir", str(tmp_path / "pictures")]
    visualize.main(visualize.parse_args(argv))
    assert (tmp_path / "pictures" / "cell.svg").stat().st_size > 500
    sampled = Generator.from_checkpoint(run / "generator.pt").sample((1,), 8, seed=0, temperature=1.0)
    assert sampled == Generator.from_checkpoint(run / "checkpoint.pt").sample((1,), 8, 0, batch_size=3, temperature=1.0)
    gan.main(gan.parse_args(["--resume", str(run), "--n_epochs", "3"]))


def test_what_does_not_fit_the_space_is_refused_in_one_line(tmp_path, capsys):
    run, data = trained(tmp_path, NASBENCH201, "robust")
    other = write_dataset(tmp_path, NASBENCH101)
    small, drawn = ["--output_dir", tmp_path / "other", "--device", "cpu"], ["--checkpoint", run]
    for script, flags, line in (
        (gan, ["--nasbench_data", data, "--space", "nag"], "of the space nasbench201, expected one of nag"),
        (gan, ["--nasbench_data", other, "--max_step", 8], "--max_step: expected 2 to 7, got 8"),
        (gan, ["--nasbench_data", data, "--max_step", 7], "--max_step: expected 8 to 8, got 7"),
        (gan, ["--nasbench_data", data, "--batch_size", 8, "--objectives", "params"], "no params for 24 of its 24"),
        (generate_archs, [*drawn, "--max_params", "1M"], "--max_params: genotypes of the space nasbench201"),
        (generate_archs, [*drawn, "--nasbench_data", other], "nasbench101, expected one of nasbench201"),
        (generate_archs, [*drawn, "--supernet", "data/supernet.pt"], "--supernet: expected with a GAN of NAG"),
    ):
        assert line in refused(capsys, script, [*flags, *small])
    assert not (tmp_path / "other").exists()


def test_no_network_is_built_of_a_genotype_of_another_space(tmp_path, capsys):
    genotype, path = random_pool(1, 1, NASBENCH201)[0], tmp_path / "genotype.json"
    path.write_text(json.dumps(genotype.to_dict()))
    for build in (CifarNetwork, lambda g: read_candidates(str(path), 0)):
        with pytest.raises(ValueError, match="no network can be built of a genotype of the space nasbench201"):
            build(genotype)
    with pytest.raises(SystemExit):
        genotype_to_train(Namespace(resume=None, arch=str(path)), None)
    assert "--arch: no network can be built" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nasbench201 has no normal cell"):
        genotype.normal  # noqa: B018 what a supernet asks for


def test_a_new_op_is_an_entry_with_its_cost_and_a_name_in_a_space(monkeypatch):
    entry = Op(lambda channels, _, norm: SeparableConv(channels, 7, norm), depthwise=2 * 49, pointwise=2)
    monkeypatch.setitem(OPS, "seqconv7x7", entry)
    space = replace(NAG_SPACE, ops=(*NAG_SPACE.ops, "seqconv7x7"))
    pool = random_pool(12, seed=0, space=space)
    assert any("seqconv7x7" in cell.ops for genotype in pool for cell in genotype.cells)
    cells = (CellBatch.encode([genotype[name] for genotype in pool]) for name in space.cells)
    counted = batch_cost(*cells, space).params.tolist()
    assert counted == [genotype_cost(genotype).params for genotype in pool]
    with torch.device("meta"):
        assert counted == [count_parameters(CifarNetwork(genotype)) for genotype in pool]
    largest = extreme_genotypes(5, space)[-1]
    assert set(largest["normal"].ops[2:-1]) == {"seqconv7x7"}


def test_a_checkpoint_holds_its_space_whatever_spaces_there_are_now(tmp_path, monkeypatch):
    """Also one whose name stands for another space by now."""
    own = SearchSpace("own", ("a", "b", "c"), ("x", "y", "z"), ("add", "multiply"), max_vertices=6, max_edges=7)
    monkeypatch.setitem(SPACES, "own", own)
    run, _ = trained(tmp_path, own, "robust", "--temperature", 1.0)
    monkeypatch.setitem(SPACES, "own", SearchSpace("own", ("a",), ("x",), ("add",), max_vertices=4))
    generator, predictor = (kind.from_checkpoint(run / "generator.pt") for kind in (Generator, Predictor))
    assert generator.space == predictor.config.space == own
    genotypes = [g for g in generator.sample((2,), 40, seed=0) if g is not None]
    assert genotypes and all(g.prune() == g and max(c.num_edges for c in g.cells) <= 7 for g in genotypes)
    assert predictor.quantiles(genotypes).shape == (len(genotypes), 1)
    generate(run, "--output_dir", tmp_path / "archs")
    entries = json.loads((tmp_path / "archs" / "genotypes.json").read_text())
    assert [Genotype.from_dict(entry, own).space for entry in entries] == [own] * len(entries)
    assert all(entry["novel"] in (True, False) for entry in entries)  # the NAS dataset was read
    assert torch.load(run / "generator.pt", weights_only=True)["generator_config"]["space"]["ops"] == own.ops
    assert load_genotype("NAG_HIGH_ACC").space.name == "nag"


def test_the_truth_of_a_table_judges_what_is_drawn():
    """By a source that draws what is asked for, one that draws the opposite, and random cells."""
    pool = list({g.canonical(): g for g in random_pool(300, 3, NASBENCH201)}.values())
    truth = {g: i / 300 for i, g in enumerate(pool)}
    table = [Record(i, g, 1 - value, columns={"truth": value}) for i, (g, value) in enumerate(truth.items())]
    classes = Truth(table, "truth", 3)
    assert classes.agreement == pytest.approx(1 / 3)  # the signal runs the other way: the middle class is the same
    assert classes.agreement_of_cells == pytest.approx(1 / 3)
    assert [classes.cells(k, {g.canonical() for g in pool[:10]}) for k in range(3)] == [90, 100, 100]
    args = Namespace(seed=0, num_archs=20, max_draws=60)

    class Source:
        def __init__(self, shift):
            self.shift = shift

        def sample(self, labels, n, seed):
            first = 100 * ((labels[0] + self.shift) % 3)
            return [*pool[first : first + 30], None, *pool[first : first + n - 31]]

    known = {g.canonical() for g in pool[:10]}
    found = measure(Source(0), classes, 3, known, args)
    assert found["controllability"] == 1 and found["cells_by_class"] == [20] * 3
    assert found["controllability_by_signal_by_class"] == [0, 1, 0]
    assert found["controllability_by_signal"]["controllability"] == pytest.approx(1 / 3)
    assert found["draws_by_class"] == [30, 20, 20] and found["asked_by_obtained"][1] == [0, 20, 0]
    assert found["coverage_by_class"] == pytest.approx([20 / 90, 0.3, 0.3])
    assert found["novelty"] == pytest.approx((10 / 20 + 2) / 3) and found["validity"] == 1
    assert measure(Source(1), classes, 3, known, args)["controllability"] == 0
    same = [Record(i, g, 0.5, columns={"truth": 0.5}) for i, g in enumerate(pool[:9])]
    whole = Truth(same, "truth", 3)
    assert set(whole.of.values()) == {2}  # a value on a boundary belongs to the class above
