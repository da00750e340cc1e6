"""Messages are one line that a terminal can show, whatever is in them."""

from __future__ import annotations

import pytest

from twin_bench.errors import LONGEST, InputError, one_line, shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\n  lines\r\n", "two lines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\u202eb\u200bc", "a\\u202eb\\u200bc"),  # they turn the direction of a text, and can't be seen
        ("half of a pair: \udc80", "half of a pair: \\udc80"),
        ("two  blanks, naïve, 日本, \U0001f600", "two  blanks, naïve, 日本, \U0001f600"),
    ],
)
def test_what_a_terminal_can_not_show_is_escaped(text: str, line: str) -> None:
    assert str(InputError(text)) == line
    assert one_line(line) == line


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(InputError(f"rows.jsonl, line 3: label {'x' * 5_000_000}; give a number"))
    assert len(message) <= LONGEST
    assert message.startswith("rows.jsonl, line 3: label xxx")
    assert message.endswith("xxx; give a number")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, 1 << 20_000, [[["x" * 1000] * 99] * 99] * 99], ids=["text", "number", "lists"]
)
def test_a_long_value_is_shown_in_short(value: object) -> None:
    assert len(shown(value)) < 300
    assert shown("short") == "'short'"
    assert shown(-12) == "-12"
