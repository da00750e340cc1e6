"""HELM's CNN/DailyMail scenario, with an error that says where its file belongs."""

from __future__ import annotations

from pathlib import Path

from helm.benchmark.scenarios.scenario import Instance
from helm.benchmark.scenarios.summarization_scenario import SummarizationScenario

from twin_bench.errors import InputError


class CnnDailyMail(SummarizationScenario):  # type: ignore[misc]
    """HELM's SummarizationScenario. A file that is missing and can't be downloaded is an InputError that names it."""

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the instances that HELM makes of the file in `output_path`/data."""
        try:
            instances: list[Instance] = super().get_instances(output_path)
        except Exception as error:
            file = Path(output_path) / "data" / "cnndm.pk"
            if file.is_file():
                raise
            message = f"{file}: no such file, and HELM's download of it failed ({error}); put HELM's raw file there"
            raise InputError(" ".join(message.split())) from None
        return instances
