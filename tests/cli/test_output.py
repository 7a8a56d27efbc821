"""Text from files never steers the terminal, in whichever way it is printed."""

import json
import math

from repvgg.cli._output import write_error, write_json, write_line, write_table, write_warning

NAME = "\x1b]0;owned\x07\x1b[31mcat\u202e\ud800"
SHOWN = r"\x1b]0;owned\x07\x1b[31mcat\u202e\ud800"


def test_controls_are_escaped(capsys):
    write_line(f"a\n{NAME}")
    write_table([(NAME, "b\nc"), ("a", "b")], numbers=False)
    write_warning(NAME)
    write_error(f"a\n{NAME}")
    out, err = capsys.readouterr()
    assert out.splitlines() == ["a", SHOWN, rf"{SHOWN}  b\nc", f"{'a'.ljust(len(SHOWN))}  b"]
    assert err.splitlines() == [f"warning: {SHOWN}", f"error: a {SHOWN}"]


def test_json_has_no_nan(capsys):
    write_json({NAME: [math.nan, math.inf, 1.5]})
    assert json.loads(capsys.readouterr().out) == {NAME: ["NaN", "Infinity", 1.5]}
