"""utils.py: what a script says before it ends is one line, whatever it quotes."""

import pytest

from utils import fail


@pytest.mark.parametrize("content", ["x" * 10**7, "x y\n" * 10**6, "a/b " * 10**6])
def test_what_a_message_quotes_is_cut_to_a_line(content, capsys):
    with pytest.raises(SystemExit):
        fail(f"--arch: /a/long/{'path/' * 60}a.json, genotype 3: unknown op {content}")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "a.json, genotype 3: unknown op " in line and len(line) < 320 + 250
    assert line.endswith("...\n")


def test_a_message_of_usual_length_is_whole(capsys):
    text = f"--output_dir: {'/folder' * 30} holds another run; go on with that run by --resume {'/folder' * 30}"
    with pytest.raises(SystemExit):
        fail(text)
    assert text in capsys.readouterr().err
