"""The table of settings, and what is made from it: variables, README's table, --help, warnings of misspelt variables."""

import ast
import importlib
import re
from dataclasses import fields

import pytest

from defectcam import info
from defectcam.settings import (
    BY_VARIABLE,
    NOT_OF_COMMANDS,
    REMOVED_VARIABLES,
    SETTINGS,
    RequestError,
    Settings,
    function_environ,
    markdown_table,
    read_variable,
    unknown_variables,
)
from tests.conftest import ROOT, tiny_weights


def test_the_table_has_every_field_of_a_request_and_every_variable_that_is_read():
    assert sorted(one.key for one in SETTINGS if one.key) == sorted(field.name for field in fields(Settings))
    assert all(one.variable == f"ADVCAM_{one.key.upper()}" for one in SETTINGS if one.key)
    sources = [*(ROOT / "defectcam").rglob("*.py"), *ROOT.glob("*.yaml"), ROOT / "deploy.sh", ROOT / "README.md"]
    sources += (ROOT / "docs").glob("*.md")
    named = {name for path in sources for name in re.findall(r"\bADVCAM_[A-Z_]*[A-Z]\b", path.read_text())}
    assert named == {*BY_VARIABLE, *REMOVED_VARIABLES, "ADVCAM_ITERATION"}  # the last is the example of a misspelt one


def test_readme_has_the_table():
    begin, end = "<!-- printed by: python -m defectcam.settings -->\n\n", "\n\n<!-- end of the printed table -->"
    table = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0]
    assert table == markdown_table(), "put what `python -m defectcam.settings` prints between the two comments in README.md"


@pytest.mark.parametrize("variable", BY_VARIABLE)
def test_a_blank_variable_is_unset_and_white_space_around_a_value_does_not_count(variable):
    values = {"ADVCAM_DEFECTS": ("rust", ("rust",)), "ADVCAM_SHAPE": ("mask", "mask"), "ADVCAM_ITERATIONS": ("4", 4)}
    values |= {"ADVCAM_MAX_PROPOSALS": ("4", 4), "ADVCAM_DEVICE": ("cpu", "cpu"), "ADVCAM_ENGINE": ("torch", "torch")}
    takes_numbers = BY_VARIABLE[variable].rule.allowed().startswith("a number")
    text, value = values.get(variable, ("1e-1", 0.1) if takes_numbers else ("12", "12"))
    assert read_variable({variable: f" {text}\r\n"}, variable, ["crack", "rust"]) == value
    assert read_variable({variable: " \t\n"}, variable) is read_variable({}, variable) is None


@pytest.mark.parametrize(
    ("variable", "texts", "allowed"),
    [
        ("ADVCAM_DEVICE", ["tpu", "CPU", "1"], '"cpu" or "cuda"'),
        ("ADVCAM_ENGINE", ["onnx", "[]"], '"torch" or "openvino"'),
        ("ADVCAM_MAX_MEGAPIXELS", ["0", "-1", "178.1", "many", "inf", "NaN", "true", "64 MP"], "a number above 0, at most 178"),
        ("ADVCAM_TIME_LIMIT", ["0", "soon", "86401", "100s", "null"], "a number above 0, at most 86400"),
        ("ADVCAM_DEFECTS", ["moss"], "one or more of crack, rust"),
    ],
)
def test_a_variable_that_is_not_allowed_is_named_with_its_value_and_what_is_allowed(variable, texts, allowed):
    for text in texts:
        with pytest.raises(RequestError) as refused:
            read_variable({variable: text}, variable, ["crack", "rust"])
        assert str(refused.value) == f"{variable} is {text!r}, but must be {allowed}"


def test_a_misspelt_variable_is_named_with_the_nearest_one():
    given = {"ADVCAM_ITERATION": "4", "ADVCAM_MEGAPIXELS": "9", "advcam_shape": "mask", "ADVCAM_FOO": "1"}
    right = {**dict.fromkeys(BY_VARIABLE, "1"), "ADVCAM_SNAP": "1", "ADVCAM_SHAPES": " ", "PATH": "/bin"}
    found = dict(zip(sorted(given), unknown_variables({**given, **right}), strict=True))
    assert found["ADVCAM_ITERATION"] == "ADVCAM_ITERATION is no setting and has no effect: did you mean ADVCAM_ITERATIONS?"
    assert found["ADVCAM_MEGAPIXELS"].endswith("did you mean ADVCAM_MAX_MEGAPIXELS?")
    assert found["advcam_shape"].endswith("did you mean ADVCAM_SHAPE?")
    assert found["ADVCAM_FOO"].endswith("has no effect: the README lists all settings")


def test_the_environment_of_a_command_that_runs_the_function():
    """Without CVAT, without a time limit unless one is set, and its own arguments first."""
    environ = dict.fromkeys(NOT_OF_COMMANDS, "x") | {"ADVCAM_SHAPE": "mask", "ADVCAM_TIME_LIMIT": " ", "ADVCAM_DEVICE": "cpu"}
    found = function_environ(environ, iterations=4, device="cuda", defects=None, shape="")
    assert found == {"ADVCAM_TIME_LIMIT": "86400", "ADVCAM_SHAPE": "", "ADVCAM_ITERATIONS": "4", "ADVCAM_DEVICE": "cuda"}
    assert function_environ({"ADVCAM_TIME_LIMIT": "7"}) == {"ADVCAM_TIME_LIMIT": "7"}


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        ("serve", {"ADVCAM_DB"}),
        ("bulk.propose", {*NOT_OF_COMMANDS}),
        ("evaluation.sweep", {*NOT_OF_COMMANDS}),
        ("cvat.annotate", {*NOT_OF_COMMANDS, "ADVCAM_LOG_DIR"}),
    ],
)
def test_help_of_commands_that_run_the_function_lists_its_variables(command, left_out, capsys):
    pytest.importorskip("cvat_sdk")
    with pytest.raises(SystemExit):
        importlib.import_module(f"defectcam.{command}").main(["--help"])
    listed = set(re.findall(r"^  (ADVCAM_\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert listed == set(BY_VARIABLE) - left_out


def test_the_running_weights_are_those_of_the_variable_for_every_command(tmp_path, monkeypatch, capsys):
    others = tiny_weights(tmp_path / "others", ["rust"])
    monkeypatch.setenv("ADVCAM_WEIGHTS", f" {others} ")
    info.main([])
    assert f" in {others}\n" in capsys.readouterr().out
    monkeypatch.setenv("ADVCAM_WEIGHTS", " ")
    monkeypatch.setattr("defectcam.weights.__file__", str(tmp_path / "site" / "defectcam" / "weights.py"))
    with pytest.raises(SystemExit):
        info.main([])
    assert f"argument --weights: no weights in {tmp_path}/site/weights: set ADVCAM_WEIGHTS" in capsys.readouterr().err
    for path in (ROOT / "defectcam").rglob("*.py"):  # others have the option from `add_weights_option`, or no default
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and "'--weights'" in map(ast.unparse, call.args) and path.name != "weights.py":
                assert "required=True" in ast.unparse(call), path
