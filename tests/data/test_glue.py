from twin_bench.data.glue import GLUE
from twin_bench.data.metrics import METRICS


def test_the_order_is_that_of_the_papers_task_ids():
    assert list(GLUE) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]


def test_heads_and_metrics():
    assert {name: (task.num_labels, task.metric) for name, task in GLUE.items()} == {
        "cola": (2, "mcc"),
        "sst2": (2, "acc"),
        "mrpc": (2, "acc_f1"),
        "stsb": (1, "pearson_spearman"),
        "qqp": (2, "acc_f1"),
        "mnli": (3, "acc"),
        "qnli": (2, "acc"),
        "rte": (2, "acc"),
    }
    assert all(METRICS[task.metric].fits(task.num_labels) for task in GLUE.values())
    assert [name for name, task in GLUE.items() if task.is_regression] == ["stsb"]


def test_only_mnli_names_its_splits_differently_on_the_hub():
    assert GLUE["mnli"].hub_split("validation").split == "validation_matched"
    assert GLUE["mnli"].hub_split("train").split == "train"
    assert GLUE["rte"].hub_split("validation").split == "validation"
