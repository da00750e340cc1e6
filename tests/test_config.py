"""Settings: what YAML says is taken in the sense of its values, or refused in one line that names file and key."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from twin_bench import InputError
from twin_bench.config import read_yaml
from twin_bench.leaderboard.suite import read_suite
from twin_bench.merging.export import read_merge_recipe
from twin_bench.twin.recipe import read_recipe

RECIPE = "base_model: base\nexperts: {a: x}\n"


def refused(read: Any, file: Path, text: str) -> str:
    """Write a file that must be refused in a bounded time. Return what is said after the file's name."""
    file.write_text(text)
    started = time.perf_counter()
    with pytest.raises(InputError) as error:
        read(file)
    assert time.perf_counter() - started < 20
    assert str(error.value).startswith(str(file))
    return str(error.value).removeprefix(str(file))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("exclusive: {density: true}", ": exclusive.density: expected a number (found True)"),
        ("exclusive: {rank: false}", ": exclusive.rank: expected a number (found False)"),
        ("exclusive: {density: .nan}", ": exclusive.density: Input should be a finite number (found nan)"),
        ("router: {data: d, temperature: .inf}", ": router.temperature: Input should be a finite number or: "
         "Input should be 'auto' (found inf)"),
        ("router: {data: d, layer: true}", ": router.layer: expected a number (found True)"),
        ("router: {data: d, layer: x}", ": router.layer: Input should be a valid integer, unable to parse string as an "
         "integer or: Input should be 'auto' (found 'x')"),
        ("router: {data: d, layr: 2}", ": router.layr: unknown key; did you mean 'layer'?"),
        ("router: {}", ": router.data: Field required"),
        ("experts: {b: [1]}", ", line 3: the key 'experts' stands twice; remove one"),
        ("seed: 1.5", ": seed: Input should be a valid integer, got a number with a fractional part (found 1.5)"),
        ("seed: true", ": seed: expected a number (found True)"),
        ("seed: -1", ": seed: Input should be greater than or equal to 0 (found -1)"),
        ("seed: 9223372036854775808", ": seed: Input should be less than or equal to 9223372036854775807"),
        ("seed: 1\nmax_length: 8\nseed: 1", ", line 5: the key 'seed' stands twice; remove one"),
        ("shared: {method: ties, density: true}", ": shared: ties: density must be a number, not True"),
        ("shared: {method: ties, density: .nan}", ": shared: ties: density must be a number, not nan"),
        ("shared: {method: ties, scaling: -.inf}", ": shared: ties: scaling must be a number, not -inf"),
        ("shared: {method: dare_ties, seed: 1.5}", ": shared: dare_ties: seed must be a whole number, 0 or more"),
        ("shared: {method: dare_ties, seed: -1}", ": shared: dare_ties: seed must be a whole number, 0 or more"),
        ("shared: {method: dare_ties, density: .5, density: .6}", ", line 3: the key 'density' stands twice"),
        ("max_length: \"\\e[31m\"", ": max_length: Input should be a valid integer, unable to parse string as an "
         "integer (found '\\x1b[31m')"),
        ('"\\e[31mred": 1', ": \\x1b[31mred: unknown key"),
    ],
)  # fmt: skip
def test_values_in_another_sense_than_their_keys(tmp_path: Path, line: str, says: str) -> None:
    assert refused(read_recipe, tmp_path / "recipe.yaml", f"{RECIPE}{line}\n").startswith(says)


def test_suites_merges_and_mergekit_files_are_read_as_strictly(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    suite = "name: s\nbase_model: b\nexperts: e\ndata: d\ntasks: [cola]\n"

    def read_it(file: Path) -> Any:
        return read_suite(str(file))

    for protocol in ("true", "[[paper]]", "{paper: 1}"):
        entry = f"methods: [{{mine: {{method: ties, protocol: {protocol}}}}}]"
        assert refused(read_it, file, f"{suite}{entry}").startswith(": methods: mine: unknown protocol ")
    assert refused(read_it, file, f"{suite}batch_size: true") == ": batch_size: expected a number (found True)"
    assert refused(read_it, file, f"{suite}rows: 0.5").startswith(": rows: Input should be a valid integer")
    entry = "methods: [{mine: {method: ties, density: .inf}}]"
    assert refused(read_it, file, f"{suite}{entry}") == ": methods: mine: ties: density must be a number, not inf"
    entry = "methods: [{mine: {method: twin, exclusive: {density: true}}}]"
    assert refused(read_it, file, f"{suite}{entry}") == (
        ": methods: mine: exclusive.density: expected a number (found True)"
    )
    entry = "methods: [{mine: {method: twin, router: {layer: x}}}]"
    assert refused(read_it, file, f"{suite}{entry}").startswith(": methods: mine: router: layer: Input should be")
    merge = f"{RECIPE}merge: {{method: task_arithmetic, scaling: .nan}}"
    assert "scaling must be a number, not nan" in refused(read_merge_recipe, file, merge)
    mergekit = "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: .nan}"
    assert refused(read_merge_recipe, file, mergekit) == ": parameters.weight: must be a number, not nan"
    mergekit = mergekit.replace(".nan", "1e-1")
    file.write_text(mergekit)
    assert read_merge_recipe(file)[0].merge.options == {"scaling": 0.1}


def test_numbers_in_their_usual_spellings(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("[1e-3, 1.5E3, -2e+1, 0.5, 1e5x, 7, .inf, a1e3]".join(["x: ", "\n"]))
    assert read_yaml(tmp_path / "some.yaml") == {"x": [0.001, 1500.0, -20.0, 0.5, "1e5x", 7, math.inf, "a1e3"]}
    (tmp_path / "some.yaml").write_text(f"{RECIPE}router: {{data: d, temperature: 1e-1, epochs: 20.0}}")
    router = read_recipe(tmp_path / "some.yaml").router
    assert router is not None
    assert (router.temperature, router.epochs) == (0.1, 20)


def test_a_path_that_is_too_long_is_no_path_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(f"base_model: {'x' * 5000}\nexperts: {{a: y}}")
    assert read_recipe(tmp_path / "some.yaml").base_model == "x" * 5000


LAUGHS = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", ", line 1: not YAML (expected the node content"),
        ("a: 1\nb: &b [*b]", ", line 2: a value that contains itself; write it without the alias"),
        ("a: &a {b: {c: *a}}", ", line 1: a value that contains itself"),
        (f"x0: &x0 [ha, ha]\n{LAUGHS}", ", line 1: over 100,000 keys and values, with aliases written out"),
        (LAUGHS.replace("[", "{<<: [").replace("]", "]}").replace("*x0", "{a: 1}"), ", line 1: over 100,000 keys"),
        ("a: " + "[" * 5000, ": nested too deeply; make it flatter"),
        ("a: 2020-99-99", ": not YAML (month must be in 1..12)"),
        ("a: !!int ''", ": not YAML ("),
        ("a: !!timestamp x", ": not YAML ("),
        ("a: 1" + "0" * 5000, ": not YAML (Exceeds the limit"),
        ("a: \x00", ": not YAML (unacceptable character #x0000"),
        ("- a list", ": expected a mapping of keys, found list"),
        ("a: 1\n---\nb: 2", ", line 2: not YAML (but found another document)"),
        ("a: !!python/object:os.system []", ", line 1: not YAML (could not determine a constructor"),
    ],
)
def test_yaml_that_can_not_be_read(tmp_path: Path, text: str, says: str) -> None:
    said = refused(read_yaml, tmp_path / "some.yaml", text)
    assert said.startswith(says)
    assert "<unicode string>" not in said


def test_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = "a: &a {k: 1, m: 2}\nb: {<<: *a, k: 3}\nc: [*a, *a]\nd: {<<: &d {<<: *a, m: 4}, m: 5}\ne: *d"
    (tmp_path / "some.yaml").write_text(text)
    a = {"k": 1, "m": 2}
    found = read_yaml(tmp_path / "some.yaml")
    assert found == {"a": a, "b": {"k": 3, "m": 2}, "c": [a, a], "d": {"k": 1, "m": 5}, "e": {"k": 1, "m": 4}}


def test_a_value_of_five_megabytes_is_shortened(tmp_path: Path) -> None:
    said = refused(read_recipe, tmp_path / "recipe.yaml", f"{RECIPE}seed: {'a' * 5_000_000}")
    assert said.startswith(": seed: Input should be a valid integer")
    assert len(said) < 400
