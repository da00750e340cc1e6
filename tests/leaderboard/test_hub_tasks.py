"""Where a known task's rows are if a suite names a data set of its own for it."""

import pytest

from twin_bench.data.registry import TASKS
from twin_bench.errors import InputError
from twin_bench.leaderboard.tasks import HubRows, TaskSettings, task_of


def test_a_known_task_reads_the_data_set_that_the_suite_names():
    """It read GLUE's own, and nothing said so."""
    own = task_of("mnli", TaskSettings(), HubRows(hub="me/nli", config="plain", split="validation"))
    assert own.hub_split("validation") == ("me/nli", "plain", "validation")
    for data in ("hub", HubRows(hub="nyu-mll/glue"), HubRows(hub="nyu-mll/glue", config="mnli")):
        assert task_of("mnli", TaskSettings(), data).hub_split("validation") == TASKS["mnli"].hub_split("validation")


def test_a_known_task_of_language_models_has_its_own_data_set():
    assert task_of("mmlu", TaskSettings(), HubRows(hub="cais/mmlu")).hub_split("validation").split == "test"
    with pytest.raises(InputError, match=r"mmlu: its rows are those of cais/mmlu on the hub, not me/mmlu; write data:"):
        task_of("mmlu", TaskSettings(), HubRows(hub="me/mmlu"))
