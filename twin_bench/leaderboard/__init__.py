"""The leaderboard: suite file -> merge or build -> evaluate through a harness adapter -> normalise -> report."""
