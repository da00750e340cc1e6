"""The answer of a leaderboard in a sentence: who leads, who can't be told apart, how many beat a constant answer."""

from __future__ import annotations

import pandas as pd

from twin_bench.report.numbers import interval
from twin_bench.report.words import CAUTIONS
from twin_bench.results.board import Leaderboard

APART = ("that is not told the task", "that are not told the task")


def answer(board: Leaderboard, protocol: str) -> list[str]:
    """Return what a protocol's ranking says, one sentence an item.

    The first speaks of the methods that nobody tells the task, and says how many are not surely better than the
    constant answer: those that are not told apart from it, or are below it. Then leaders are named that learned on the
    scored rows. The last, if there is one, speaks of the methods that are told each input's task.
    """
    ranked = field(board, protocol, told=False)
    told = field(board, protocol, told=True)
    sentences = []
    if not ranked.empty:
        kinds = ("method", "methods") if told.empty else (f"method {APART[0]}", f"methods {APART[1]}")
        leaders = ranked[ranked["tie_group"] == ranked["tie_group"].min()]
        lead = _lead(list(leaders["method"]), len(ranked), kinds)
        floored = _not_better(board, protocol, list(ranked["method"]), len(leaders), kinds)
        sentences.append(f"{lead}; {floored}." if floored else f"{lead}.")
        sentences += _learned(list(leaders.loc[leaders["track"] == "test-time", "method"]))
        sentences += [] if floored else _floorless(board, protocol)
    elif told.empty:
        sentences.append("No method is ranked under this protocol.")
    return sentences if told.empty else [*sentences, _told(told)]


def warned(board: Leaderboard, protocol: str) -> list[str]:
    """Return the answer, and a sentence on its protocol if that tells a model what no user can."""
    return [*answer(board, protocol), *([CAUTIONS[protocol]] if protocol in CAUTIONS else [])]


def field(board: Leaderboard, protocol: str, *, told: bool) -> pd.DataFrame:
    """Return the lines of the summary that are ranked with each other under a protocol, the best first."""
    lines = board.summary
    mine = (
        (lines["protocol"] == protocol) & ~lines["bound"].astype(bool) & (lines["told_the_task"].astype(bool) == told)
    )
    return lines[mine & lines["tie_group"].notna()].sort_values("normalized", ascending=False, kind="stable")


def ordered(board: Leaderboard, protocol: str) -> pd.DataFrame:
    """Return a protocol's lines of the summary: ranked ones, those told the task, those without a rank, the bounds."""
    lines = board.summary[board.summary["protocol"] == protocol]
    ranked = pd.concat([field(board, protocol, told=False), field(board, protocol, told=True)])
    rest = lines.loc[lines.index.difference(ranked.index, sort=False)]
    bound = rest["bound"].astype(bool)
    return pd.concat([ranked, rest[~bound], rest[bound]])


def not_surely_better(board: Leaderboard, protocol: str) -> set[str] | None:
    """Return the methods that are not above the constant answer for sure; None if none is compared with it."""
    lines = board.comparisons
    lines = lines[(lines["protocol"] == protocol) & (lines["reason"] == "constant")]
    if lines.empty:
        return None
    return set(lines.loc[~((lines["difference"] > 0) & lines["sure"].astype(bool)), "method"])


def _lead(leaders: list[str], methods: int, kinds: tuple[str, str]) -> str:
    if methods == 1:
        return f"{leaders[0]} is the only {kinds[0]}"
    if len(leaders) == methods:
        return f"The {'two' if methods == 2 else methods} {kinds[1]} can't be told apart"
    if len(leaders) == 1:
        return f"{leaders[0]} leads"
    if len(leaders) == 2:
        return f"{leaders[0]} and {leaders[1]} lead and can't be told apart"
    return f"{leaders[0]} and {len(leaders) - 1} others lead and can't be told apart"


def _not_better(board: Leaderboard, protocol: str, methods: list[str], leaders: int, kinds: tuple[str, str]) -> str:
    """Return how many are not surely better than the constant answer; empty if none is compared with it."""
    found = not_surely_better(board, protocol)
    if found is None:
        return ""
    floored = [method for method in methods if method in found]
    everyone = leaders == len(methods)  # and the sentence begins with all of them
    if len(methods) == 1:
        return f"it is {'not ' if floored else ''}surely better than a constant answer"
    if not floored:
        number = "both" if len(methods) == 2 else "all"
        return f"{number if everyone else f'{number} {kinds[1]}'} are surely better than a constant answer"
    if len(floored) == len(methods):
        return f"{'none' if everyone else f'no {kinds[0]}'} is surely better than a constant answer"
    if len(floored) == 1:
        return f"{floored[0]} is not surely better than a constant answer"
    return f"{len(floored)} {kinds[1]} are not surely better than a constant answer"


def _learned(leaders: list[str]) -> list[str]:
    """Return what must be known of leaders that learned on the rows that are scored."""
    if not leaders:
        return []
    are, they = ("is", "it") if len(leaders) == 1 else ("are", "they")
    learned = "learned on the rows that are scored, without their labels"
    return [f"{' and '.join(leaders)} {are} on the track test-time: {they} {learned}."]


def _floorless(board: Leaderboard, protocol: str) -> list[str]:
    """Return why no method is compared with the constant answer, if there is one on other tasks."""
    lines = board.tasks[(board.tasks["protocol"] == protocol) & board.tasks["expert"].notna()]
    missing = list(lines.loc[lines["floor"].isna(), "task"])
    if not missing or len(missing) == len(lines):
        return []
    return [f"No method is compared with the constant answer, which has no score on {', '.join(missing)}."]


def _told(told: pd.DataFrame) -> str:
    best = told.iloc[0]
    score = interval(best["normalized"], best["ci_low"], best["ci_high"])
    if len(told) == 1:
        return f"{best['method']} is told the task of each input and is ranked apart: it scores {score}."
    scored = f"the best of them, {best['method']}, scores {score}"
    return f"{len(told)} methods are told the task of each input and are ranked apart: {scored}."
