"""The comparison of two checkouts: what it calls equal, how it names differences, and how it spells flags."""

import json

import numpy as np
import pytest
import torch

from benchmarks.same_results import Failed, compare, main, read, relative_difference, spelled


def leaves(tmp_path, **content):
    torch.save(content, tmp_path / "file.pt")
    return read(tmp_path / "file.pt")


def weights(first=1.0):
    return {"cells.normal.add_edge.0.bias": torch.tensor([first, 2.0])}


def test_equal_content_is_equal_whatever_its_order_times_and_flags(tmp_path):
    old = leaves(tmp_path, generator=weights(), epoch=3, args={"pool": 1}, version=1, seconds=5.0)
    new = leaves(tmp_path, seconds=7.0, version=2, args={"pool_size": 1}, epoch=3, generator=weights())
    row = compare("gan-paper/checkpoint.pt", old, new)
    assert row.equal and row.old == row.new and row.difference == ""


def test_a_renamed_weight_setting_or_metric_is_the_same(tmp_path):
    old = leaves(
        tmp_path,
        generator={"cells.normal.chosen.weight": torch.ones(2)},
        generator_config={"edges_in_turn": True},
        obeys_params=0.5,
    )
    new = leaves(
        tmp_path,
        generator={"cells.normal.earlier_edges.weight": torch.ones(2)},
        generator_config={"autoregressive_edges": True},
        controllability_params=0.5,
    )
    assert compare("gan-robust/checkpoint.pt", old, new).equal


def test_a_difference_is_named_with_its_size(tmp_path):
    row = compare("a/b", leaves(tmp_path, g=weights(), name="x"), leaves(tmp_path, g=weights(1.002), name="y"))
    assert row.equal is False and row.old != row.new
    assert "1 of 2 values by up to 1.0e-03 of the largest number (g.cells.normal.add_edge.0.bias)" in row.difference
    assert "1 by other than numbers (name)" in row.difference


def test_another_type_or_shape_is_a_difference(tmp_path):
    one = leaves(tmp_path, g=torch.ones(2))
    assert compare("a/b", one, leaves(tmp_path, g=torch.ones(2).double())).equal is False
    assert compare("a/b", one, leaves(tmp_path, g=torch.ones(1, 2))).equal is False
    assert compare("a/b", one, leaves(tmp_path, g="1")).equal is False


def test_what_only_one_has_is_a_difference_but_for_what_may_be_missing(tmp_path):
    with_it = leaves(tmp_path, discriminator=weights(), g=weights())
    without = leaves(tmp_path, discriminator=None, g=weights())
    assert compare("gan-paper/checkpoint.pt", with_it, without).equal is False
    row = compare("gan-robust/checkpoint.pt", with_it, without)
    assert row.equal and "the discriminator, not trained here: 2 values in one only" in row.difference
    other = leaves(tmp_path, discriminator=weights(3.0), g=weights())
    assert compare("gan-robust/checkpoint.pt", with_it, other).equal is False


def test_json_lines_are_compared_line_by_line(tmp_path):
    for name, loss in (("a", 0.5), ("b", 0.25)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i in (1, 2)))
    row = compare("a/b", read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl"))
    assert "2 of 4 values by up to 5.0e-01" in row.difference


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2], [1, 2], 0), ([1.0, -4.0], [1.0, -2.0], 0.5), ([1, np.nan], [1, 2], np.inf), ([], [], 0)],
)
def test_differences_are_relative_to_the_largest_number(a, b, expected):
    assert relative_difference(np.array(a, float), np.array(b, float)) == expected


def test_flags_are_spelled_as_the_checkout_knows_them():
    assert spelled("--pool_size", {"--pool_size", "--pool"}) == "--pool_size"
    assert spelled("--pool_size", {"--pool"}) == "--pool"
    assert spelled("--seed", {"--seed"}) == "--seed"
    with pytest.raises(Failed, match=r"--pool_size or --pool: edit OLD_FLAGS"):
        spelled("--pool_size", {"--seed"})


def test_what_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path)])
    assert "is not a checkout of the project" in capsys.readouterr().err
