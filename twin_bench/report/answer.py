"""The answer of a leaderboard in a sentence: who leads, who can't be told apart, who is no better than a constant."""

from __future__ import annotations

import pandas as pd

from twin_bench.report.numbers import SIGNIFICANT, interval
from twin_bench.results.board import Leaderboard


def answer(board: Leaderboard, protocol: str) -> list[str]:
    """Return what a protocol's ranking says, one sentence an item.

    The first speaks of the methods that nobody tells the task, and says how many are no better than the best constant
    answer: those whose difference from it is not above 0 at Holm's p < 0.05. The second, if there is one, speaks of the
    methods that are told each input's task.
    """
    ranked = field(board, protocol, told=False)
    told = field(board, protocol, told=True)
    sentences = []
    if not ranked.empty:
        leaders = list(ranked.loc[ranked["tie_group"] == ranked["tie_group"].min(), "method"])
        floored = _no_better(board, protocol, list(ranked["method"]))
        lead = _lead(leaders, len(ranked))
        sentences.append(f"{lead}; {floored}." if floored else f"{lead}.")
    elif told.empty:
        sentences.append("No method is ranked under this protocol.")
    if not told.empty:
        best = told.iloc[0]
        score = interval(best["normalized"], best["ci_low"], best["ci_high"])
        others = _count(len(told), "method")
        apart = "is told the task of each input and is" if len(told) == 1 else "are told the task of each input and are"
        first = f"it scores {score}" if len(told) == 1 else f"the best of them, {best['method']}, scores {score}"
        named = str(best["method"]) if len(told) == 1 else others
        sentences.append(f"{named} {apart} ranked apart: {first}.")
    return sentences


def field(board: Leaderboard, protocol: str, *, told: bool) -> pd.DataFrame:
    """Return the lines of the summary that are ranked with each other under a protocol, the best first."""
    lines = board.summary
    mine = (
        (lines["protocol"] == protocol) & ~lines["bound"].astype(bool) & (lines["told_the_task"].astype(bool) == told)
    )
    return lines[mine & lines["tie_group"].notna()].sort_values("normalized", ascending=False, kind="stable")


def no_better_than_constant(board: Leaderboard, protocol: str) -> set[str] | None:
    """Return the methods whose difference from the constant answer is not above 0; None if there is no such row."""
    lines = board.comparisons
    lines = lines[(lines["protocol"] == protocol) & (lines["reason"] == "constant")]
    if lines.empty:
        return None
    return set(lines.loc[~((lines["difference"] > 0) & (lines["p_holm"] < SIGNIFICANT)), "method"])


def _lead(leaders: list[str], methods: int) -> str:
    if methods == 1:
        return f"{leaders[0]} is the only method"
    if len(leaders) == methods:
        return "The two methods can't be told apart" if methods == 2 else f"The {methods} methods can't be told apart"
    if len(leaders) == 1:
        return f"{leaders[0]} leads"
    if len(leaders) == 2:
        return f"{leaders[0]} and {leaders[1]} lead and can't be told apart"
    return f"{leaders[0]} and {len(leaders) - 1} others lead and can't be told apart"


def _no_better(board: Leaderboard, protocol: str, methods: list[str]) -> str:
    found = no_better_than_constant(board, protocol)
    if found is None:
        return ""
    floored = [method for method in methods if method in found]
    if not floored:
        better = "it is" if len(methods) == 1 else "both are" if len(methods) == 2 else "all methods are"
        return f"{better} better than a constant answer"
    if len(methods) == 1:
        return "it is no better than a constant answer"
    if len(floored) == len(methods):
        return "no method is better than a constant answer"
    if len(floored) == 1:
        return f"{floored[0]} is no better than a constant answer"
    return f"{len(floored)} methods are no better than a constant answer"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
