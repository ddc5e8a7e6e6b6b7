"""build_nas_dataset/outside_scores.py with commands that score well, badly or not at all; brief_scores.py for real."""

import json
import sys

import pytest

from build_nas_dataset import brief_scores
from build_nas_dataset.outside_scores import OutsideScorer, read_scores, split_command
from genotypes import GENOTYPES, NAG_SPACE, CellSpec, Genotype
from tests.small_training import NAMES, TINY, make_images

ARCHS = [GENOTYPES[name] for name in NAMES]
# Scores a genotype by its vertices, and counts its own starts in a file beside it.
SCORER = """
import json, sys
genotypes, scores = sys.argv[-2:]
with open(sys.argv[1], "a") as file:
    file.write("started ")
found = json.load(open(genotypes))
json.dump([len(entry["normal"]["ops"]) + len(entry["reduction"]["ops"]) for entry in found], open(scores, "w"))
"""


def scorer_of(tmp_path, program: str, *arguments: str) -> OutsideScorer:
    (tmp_path / "scorer.py").write_text(program)
    return OutsideScorer([sys.executable, str(tmp_path / "scorer.py"), *arguments], tmp_path / "scores")


def sizes(genotypes) -> list[float]:
    return [float(sum(cell.num_vertices for cell in genotype.cells)) for genotype in genotypes]


def test_scores_come_in_the_order_of_the_genotypes(tmp_path):
    scorer = scorer_of(tmp_path, SCORER, str(tmp_path / "a name; with $(blanks)"))
    assert scorer(ARCHS) == sizes(ARCHS)
    assert scorer(ARCHS[::-1]) == sizes(ARCHS)[::-1]
    assert (tmp_path / "a name; with $(blanks)").read_text() == "started started "  # no shell has seen it


def test_a_search_that_goes_on_asks_only_for_what_it_has_no_scores_of(tmp_path):
    starts = tmp_path / "starts"
    first = scorer_of(tmp_path, SCORER, str(starts))
    first(ARCHS)
    again = scorer_of(tmp_path, SCORER, str(starts))
    assert again(ARCHS) == sizes(ARCHS)
    assert starts.read_text() == "started "
    assert again(ARCHS[:1]) == sizes(ARCHS[:1])
    other = scorer_of(tmp_path, SCORER, str(starts))
    assert other(ARCHS[1:]) == sizes(ARCHS[1:])  # other genotypes in the same place are scored anew
    assert starts.read_text() == "started started started "


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; print('no images here'); sys.exit(3)", "ended with status 3: no images here"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
        ("", "ended without writing scores.part.json"),
        ("import sys; open(sys.argv[-1], 'w').write('[1, NaN, 2]')", "NaN is not JSON"),
        ("import sys; open(sys.argv[-1], 'w').write('[1, 1e999, 2]')", "score 1 is no finite number"),
        ("import sys; open(sys.argv[-1], 'w').write('[1, null, 2]')", "score 1 is no finite number: null"),
        ("import sys; open(sys.argv[-1], 'w').write('[1, true, 2]')", "score 1 is no finite number: true"),
        ("import sys; open(sys.argv[-1], 'w').write('[1, 2]')", "expected 3 scores, one for each genotype, got 2"),
        ("import sys; open(sys.argv[-1], 'w').write('{}')", "expected a JSON list of numbers, got dict"),
        ("import sys; open(sys.argv[-1], 'wb').write(bytes([255]))", "scores.part.json cannot be read"),
    ],
)
def test_a_command_that_gives_no_scores_is_an_error_and_leaves_none(tmp_path, program, says):
    with pytest.raises(ValueError) as error:
        scorer_of(tmp_path, program)(ARCHS)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "scores" / "0000" / "scores.json").exists()
    scorer = scorer_of(tmp_path, SCORER, str(tmp_path / "starts"))  # repaired, the same search goes on
    assert scorer(ARCHS) == sizes(ARCHS)


def test_scores_of_a_folder_that_were_changed_by_hand_are_checked_too(tmp_path):
    scorer_of(tmp_path, SCORER, str(tmp_path / "starts"))(ARCHS)
    (tmp_path / "scores" / "0000" / "scores.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected 3 scores"):
        scorer_of(tmp_path, SCORER, str(tmp_path / "starts"))(ARCHS)


def test_a_command_line_is_split_as_by_a_shell():
    assert split_command(f"{sys.executable} -c 'print(1)' \"a b\"") == [sys.executable, "-c", "print(1)", "a b"]
    for text, says in (("", "got none"), ("python 'x", "No closing quotation"), ("no-such-program x", "no program")):
        with pytest.raises(ValueError, match=says):
            split_command(text)


def test_brief_scores_refuses_what_it_cannot_score(tmp_path, capsys):
    (tmp_path / "genotypes.json").write_text("{")
    for argv, says in (
        ([str(tmp_path / "genotypes.json"), str(tmp_path / "scores.json")], "is not a JSON file"),
        ([str(tmp_path / "genotypes.json")], "expected flags of eval_archs.py"),
        (["--epochs", "3", "--amp"], "expected flags of eval_archs.py"),
    ):
        with pytest.raises(SystemExit) as error:
            brief_scores.main(argv)
        assert error.value.code == 2
        assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genotypes.json"]


def test_brief_scores_gives_isomorphic_genotypes_one_score_and_invalid_ones_none(tmp_path, monkeypatch):
    unconnected = CellSpec([[0] * 3] * 3, [*NAG_SPACE.inputs, "output"])
    archs = [ARCHS[0], Genotype(unconnected, unconnected), ARCHS[1], ARCHS[0]]
    (tmp_path / "genotypes.json").write_text(json.dumps([genotype.to_dict() for genotype in archs]))
    seen = []

    def fake(flags, path, folder):
        seen.extend([flags, len(json.loads(path.read_text()))])
        return {brief_scores.key_of(ARCHS[0]): 0.25, brief_scores.key_of(ARCHS[1]): 0.5}

    monkeypatch.setattr(brief_scores, "train_briefly", fake)
    brief_scores.main(["--epochs", "2", str(tmp_path / "genotypes.json"), str(tmp_path / "scores.json")])
    assert read_scores(tmp_path / "scores.json", 4) == [0.25, 0.0, 0.5, 0.25]
    assert seen == [["--epochs", "2"], 3]


@pytest.mark.slow
def test_brief_training_scores_genotypes_as_eval_archs_ranks_them(tmp_path):
    images = make_images(tmp_path / "images", {"dark": 60, "light": 190})
    flags = [*TINY, "--data", str(images), "--epochs", "1", "--schedule_epochs", "1", "--holdout", "8"]
    command = [sys.executable, "-m", "build_nas_dataset.brief_scores", *flags]
    scorer = OutsideScorer(command, tmp_path / "scores")
    scores = scorer([ARCHS[2], ARCHS[1], ARCHS[2]])
    found = json.loads((tmp_path / "scores" / "0000" / "brief_training" / "results.json").read_text())
    by_key = {brief_scores.key_of(Genotype.from_dict(entry)): entry["held_out_accuracy"] for entry in found}
    assert scores == [by_key[brief_scores.key_of(ARCHS[i])] for i in (2, 1, 2)]
    assert len(found) == 2
