"""twin-bench doctor: what it finds here, what it says of what is missing or broken, and how it reads a twin."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.families import built
from tests.support.interpreter import HEAVY, loaded_by
from twin_bench import InputError, TwinModel, doctor
from twin_bench.cli import main
from twin_bench.doctor import Finding
from twin_bench.twin.directory import load_parts
from twin_bench.twin.paper import PaperFactors
from twin_bench.twin.parts import PaperParts, Parts


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that says which packages seem to be installed: name to version, None for one that is not."""

    def install(versions: Mapping[str, str | None]) -> None:
        def version(name: str) -> str:
            found = versions.get(name, "1.0")
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(doctor, "version", version)

    return install


@pytest.fixture(scope="module")
def made(families: Any, twins: Any, causal_twins: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a name to a twin's folder: of a classifier or a language model, with or without router."""
    unrouted = built({**families("bert").recipe, "router": None}, tmp_path_factory.mktemp("doctor") / "twin")
    return {
        "classifier": twins("bert"),
        "classifier, no router": unrouted,
        "causal": causal_twins("llama"),
    }.__getitem__


def marks(findings: list[Finding]) -> list[str]:
    return [finding.mark for finding in findings]


def test_this_environment_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for package in (*doctor.REQUIRED, *doctor.OPTIONAL):
        assert f"ok       {package} {importlib.metadata.version(package)}\n" in shown
    assert "problem " not in shown
    assert shown.endswith("no problems\n")


def test_no_harness_is_imported() -> None:
    loaded = loaded_by("from twin_bench.cli import main; main(['doctor'])")
    assert loaded & HEAVY >= {"torch", "transformers"}
    assert not loaded & {"lm_eval", "helm", "inspect_ai", "peft", "datasets"}
    assert not [name for name in loaded if name.startswith(("twin_bench_helm", "twin_bench_lm_eval.model"))]


def test_a_finding_is_one_line_that_ends_with_what_to_do() -> None:
    assert str(Finding("problem", "no torch", "install it")) == "problem  no torch: install it"
    assert str(Finding("ok", "torch 2")) == "ok       torch 2"


def test_packages_that_are_missing_or_too_old_come_with_pips_command(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["torch>=2.4", "transformers>=4.53", "lm-eval[hf]>=0.4.13; extra == 'lm-eval'", "twin-bench[helm]"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    installed({"torch": None, "transformers": "4.40", "lm-eval": None, "accelerate": None, "twin-bench": "0.1.0"})
    found = {str(finding) for finding in doctor.packages()}
    assert found >= {
        "problem  torch is not installed: pip install 'torch>=2.4'",
        "problem  transformers 4.40 is not >=4.53, which twin-bench needs: pip install 'transformers>=4.53'",
        "note     lm-eval is not installed: pip install 'lm-eval[hf]>=0.4.13'",
        "note     accelerate is not installed: pip install accelerate",
        "ok       twin-bench 0.1.0",
    }
    assert len(found) == len(doctor.REQUIRED) + len(doctor.OPTIONAL)


def test_a_source_tree_that_is_not_installed_is_a_problem(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    installed({"twin-bench": None})
    assert "problem  twin-bench is not installed: pip install twin-bench" in map(str, doctor.packages())
    assert marks(doctor.plugins()) == ["problem"] * 3


@pytest.mark.parametrize(
    ("plugins", "points", "hooked", "variables", "mark", "says"),
    [
        (False, [], True, {}, "ok", "twin_bench_lm_eval.pth registers twin_merged"),
        (False, ["twin_merged"], False, {}, "problem", "twin_bench_lm_eval.pth did not run: install twin-bench again"),
        (False, [], False, {"TWIN_BENCH_NO_AUTOLOAD": "1"}, "note", "TWIN_BENCH_NO_AUTOLOAD is set: unset it"),
        (True, ["other", "twin_merged"], False, {}, "ok", "through its entry point"),
        (True, ["other"], True, {}, "problem", "entry point is missing: install twin-bench again"),
    ],
)
def test_lm_eval(
    plugins: bool,
    points: list[str],
    hooked: bool,
    variables: dict[str, str],
    mark: str,
    says: str,
    installed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "registry.py").write_text("def load_plugins(): ..." if plugins else "def register(): ...")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace(submodule_search_locations=[tmp_path]))
    monkeypatch.setattr(doctor, "entry_points", lambda *, group: [SimpleNamespace(name=name) for name in points])
    installed({"lm-eval": "0.4.13"})
    (finding,) = doctor.lm_eval(variables, hooked=hooked)
    assert finding.mark == mark
    assert "lm-eval 0.4.13" in str(finding)
    assert says in str(finding)


def test_the_lm_eval_that_is_installed_is_read_without_being_imported() -> None:
    code = "import twin_bench.doctor as d; print(d._lm_eval_loads_plugins()); assert 'lm_eval' not in sys.modules"
    assert "lm_eval" not in loaded_by(code)


@pytest.mark.parametrize(
    ("version", "points", "mark", "says"),
    [
        ("0.5.12", ["twin_bench"], "ok", "crfm-helm 0.5.12 finds twin-bench"),
        ("0.5.9", ["twin_bench"], "problem", "which came with 0.5.12: pip install 'crfm-helm>=0.5.16'"),
        ("0.5.16", [], "problem", "entry point is missing: install twin-bench again"),
        (None, [], "note", "HELM is not installed"),
    ],
)
def test_helm(
    version: str | None, points: list[str], mark: str, says: str, installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda *, group: [SimpleNamespace(name=name) for name in points])
    installed({"crfm-helm": version})
    (finding,) = doctor.helm()
    assert finding.mark == mark
    assert says in str(finding)


@pytest.mark.parametrize(
    ("version", "points", "mark", "says"),
    [
        ("0.3.285", ["twin_bench"], "ok", "inspect-ai 0.3.285 finds twin-bench"),
        ("0.3.285", ["other"], "problem", "entry point is missing: install twin-bench again"),
        (None, [], "note", "Inspect is not installed, so inspect eval can't serve twins: pip install 'twin-bench[ins"),
    ],
)
def test_inspect(
    version: str | None, points: list[str], mark: str, says: str, installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda *, group: [SimpleNamespace(name=name) for name in points])
    installed({"inspect-ai": version})
    (finding,) = doctor.inspect_ai()
    assert finding.mark == mark
    assert says in str(finding)


def test_the_adapter_and_the_doctor_mean_one_version_of_helm() -> None:
    from twin_bench_helm.compat import PLUGINS_SINCE

    assert tuple(map(int, doctor.HELM_PLUGINS_SINCE.split("."))) == PLUGINS_SINCE


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.device() == [Finding("ok", f"cpu, {torch.get_num_threads()} threads")]
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert marks(doctor.device()) == ["ok", "note"]
    assert "is built for the CPU" in str(doctor.device()[1])
    monkeypatch.setattr("torch.version.cuda", "12.8")
    assert "built for CUDA 12.8, and no GPU can be used" in str(doctor.device()[1])
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert doctor.device() == [Finding("ok", "mps, Apple's GPU")]
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    assert [finding.says for finding in doctor.device()] == [
        f"cuda:{index}, NVIDIA H100, 80.0 GiB of memory" for index in range(2)
    ]


def test_a_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor.device()
    assert finding.mark == "problem"
    assert "torch can't be imported" in finding.says


def test_a_torchvision_that_does_not_load_is_named(
    installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    installed({"torchvision": "0.28.0", "torch": "2.13.0+cpu"})
    (finding,) = doctor.fast_paths()
    assert finding.mark == "problem"
    assert "torchvision 0.28.0 does not load beside torch 2.13.0+cpu (operator torchvision::nms" in finding.says
    assert "pip uninstall torchvision" in finding.remedy


def test_a_transformers_that_does_not_import(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed({"torchvision": None})
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", ModuleType("empty"))
    (finding,) = doctor.fast_paths()
    assert finding.mark == "problem"
    assert "transformers can't be imported" in finding.says


def test_fast_paths_that_are_off_are_notes() -> None:
    assert marks(doctor.allowed_paths("cache", True)) == ["ok", "ok"]
    slow = doctor.allowed_paths(None, False)
    assert marks(slow) == ["note", "note"]
    assert "each run whole" in slow[0].says
    assert "all tokens" in slow[1].says


def test_environment(tmp_path: Path) -> None:
    assert marks(doctor.environment({})) == ["note", "note", "note", "ok"]
    variables = {
        "TWIN_BENCH_DATA": str(tmp_path),
        "TWIN_BENCH_EXPERTS": str(tmp_path / "none"),
        "TWIN_BENCH_CACHE": str(tmp_path / "later"),
        "HF_HUB_OFFLINE": "1",
    }
    found = doctor.environment(variables)
    assert marks(found) == ["ok", "problem", "ok", "note"]
    assert f"TWIN_BENCH_EXPERTS is {tmp_path / 'none'}, which is no folder: make it" in str(found[1])
    (tmp_path / "later").write_text("a file")
    assert marks(doctor.environment(variables))[2] == "problem"


@pytest.mark.parametrize("name", ["classifier", "classifier, no router", "causal"])
def test_the_protocols_are_those_that_the_twin_serves(name: str, made: Any) -> None:
    directory, expected = made(name), []
    for protocol in ("standard", "paper", "routed"):
        try:
            twin = TwinModel.from_pretrained(directory, protocol=protocol)
            if protocol == "routed" and name != "causal":
                twin.route_all(twin.encode([("a text", None)]))  # a router that is missing is missed here
            expected.append(protocol)
        except InputError:
            pass
    manifest = json.loads((directory / "twin.json").read_text())
    assert doctor.protocols(manifest["task_type"], load_parts(directory)) == expected


def test_language_models_serve_paper_where_their_experts_factors_are_kept() -> None:
    exclusive: Any = {"mmlu": None}
    factors: Any = PaperFactors({}, 0.3, 0.1, None)
    assert doctor.protocols("causal_lm", Parts(exclusive=exclusive)) == ["standard", "routed"]
    assert doctor.protocols("causal_lm", Parts(exclusive=exclusive, paper=PaperParts(factors=factors))) == [
        "standard",
        "paper",
        "routed",
    ]
    assert doctor.protocols("sequence_classification", Parts()) == ["standard", "paper"]  # a static merge


def test_a_twin_is_described(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(made("classifier"))]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    manifest = json.loads((made("classifier") / "twin.json").read_text())
    assert f"ok       the checksums of its {len(manifest['files'])} files match" in lines
    assert "ok       format 3, a classifier, built by twin-bench 0.1.0" in lines
    assert f"ok       experts: {', '.join(manifest['experts'])}" in lines
    router = manifest["router"]
    says = f"its router reads layer {router['layer']}, and names the right task for {router['accuracy']:.1%} of "
    assert any(says in line for line in lines)
    assert f"ok       sensitivity {manifest['sensitivity']:.3g}: a tolerance can be given" in lines


def test_a_twin_without_a_router_takes_notes(made: Any) -> None:
    assert marks(doctor.twin(made("classifier, no router"))) == ["ok", "ok", "ok", "ok", "note", "note"]


def test_a_damaged_twin_is_status_2(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "twin"
    shutil.copytree(made("causal"), copy)
    with (copy / "model" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    for directory, says in ((copy, "model.safetensors: edited or damaged"), (tmp_path / "none", "no twin there")):
        assert main(["doctor", str(directory)]) == 2
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert line.startswith("error: ")
        assert says in line
        assert "packages\n" in shown.out


def test_a_twin_that_nothing_here_can_read(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "twin_bench.twin.directory", None)
    with pytest.raises(InputError, match="can't be checked; see the problems above"):
        doctor.twin(made("causal"))
