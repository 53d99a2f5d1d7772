"""Test the Python API as in a notebook: fit, interrupt, fit again, read the metrics, load, generate, evaluate."""

import inspect
import io
import os
import pydoc
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import assert_same_state, without_check

import stickjax
from stickjax import interactive
from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stickjax.convert import export
from stickjax.storage.checkpoints import Checkpoints
from stickjax.system.tables import Columns
from stickjax.training import loop, notebook
from stickjax.training.metrics import read_metrics
from stickjax.training.progress import Progress

CONFIG = Config(
    ModelConfig(D=16, L=1, N=2, K=1, H=8, F=16, attention="softmax"),
    DataConfig(source="text", path=__file__, T=16, B=4),
    OptimConfig(peak_lr=0.01),
    TrainConfig(steps=8, log_every=1, checkpoint_every=1000),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return stickjax.fit(CONFIG, tmp_path_factory.mktemp("whole") / "run", quiet=True)


@pytest.fixture
def displays(monkeypatch):
    """Return a list to which a fake IPython adds one entry at each display.

    An entry is (number of the display, whether the display is new, its content).
    """
    shown = []

    class Handle:
        def __init__(self, number):
            self.number = number

        def update(self, content, *, raw):
            assert raw
            shown.append((self.number, False, content))

    def display(content, *, raw, display_id):
        assert raw and display_id is True
        number = len({number for number, _, _ in shown})
        shown.append((number, True, content))
        return Handle(number)

    fake = types.ModuleType("IPython")
    fake.version_info = (9, 0)  # matplotlib reads it
    fake.get_ipython = lambda: types.SimpleNamespace(kernel="a kernel")
    fake.display = types.ModuleType("IPython.display")
    fake.display.display = display
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel does
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    return shown


def at_step(monkeypatch, step, action):
    """Call `action` when the training reports step `step`.

    If the action requests a stop, the training ends one step later.
    """
    report = loop.Run.report

    def watched(self, row):
        report(self, row)
        if row["step"] == step:
            action()

    monkeypatch.setattr(loop.Run, "report", watched)


CELLS = """
import stickjax
result = stickjax.fit(config)
---
result
---
result.metrics
---
model = stickjax.load(result.run)
model
---
model.generate("def f(x):", max_new_tokens=5)
---
stickjax.fit(config).finished
"""


def test_a_notebook(displays, tmp_path, monkeypatch, capsys):
    """The cells of a typical notebook run, and the results, the progress bar and the plot are correct."""
    monkeypatch.chdir(tmp_path)
    names, values = {"config": CONFIG}, []
    for cell in CELLS.split("---\n"):
        *lines, last = cell.strip().splitlines()
        if "=" in last.partition("(")[0]:
            lines, last = [*lines, last], "None"
        exec("\n".join(lines), names)
        values.append(eval(last, names))
    _, result, metrics, model, text, finished = values
    (run,) = (tmp_path / "runs").iterdir()
    assert result.run == f"runs/{run.name}" and len(run.name) == 8 and finished is True
    assert repr(result).startswith("Result(step=8, finished=True, ") and repr(result).endswith(f"run={result.run!r})")
    assert repr(metrics).splitlines()[0].split()[:3] == ["step", "tokens", "loss"] and len(metrics["loss"]) == 8
    assert repr(model).startswith(f"TrainedModel({result.run!r}, step=8, ") and len(repr(model)) < 80
    assert isinstance(text, str)
    out = capsys.readouterr().out
    assert out.startswith(f"run folder runs/{run.name}\nparameters ") and "is finished" in out and "step 8/8" not in out

    new = [content for _, is_new, content in displays if is_new]
    assert [set(content) for content in new] == [{"text/plain"}, {"image/png", "text/plain"}]
    bars = [content["text/plain"] for number, _, content in displays if number == 0]
    assert bars[-1].startswith("━" * 40 + " 8/8  loss ")
    pictures = [content for number, _, content in displays if number == 1]
    assert len(pictures) <= 3 < 8 <= len(metrics["step"])  # at most one every few seconds, and the last one


def test_without_matplotlib_there_is_a_bar(displays, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stickjax.fit(CONFIG.replace({"train.steps": 2}), tmp_path / "run")
    assert {tuple(content) for _, _, content in displays} == {("text/plain",)}


def test_a_terminal_is_no_notebook(monkeypatch, tmp_path):
    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: types.SimpleNamespace()
    for module in (fake, None):
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert not notebook.in_notebook()
        assert type(notebook.progress_of("run", CONFIG, quiet=False)) is Progress


def test_the_picture_of_a_resumed_run_begins_at_its_first_step(displays, tmp_path):
    run = str(tmp_path / "run")
    stickjax.fit(CONFIG.replace({"train.steps": 4}), run, quiet=True)
    assert not displays
    progress = notebook.NotebookProgress(run, CONFIG)
    progress.update(read_metrics(run)[-1])
    assert [row["step"] for row in progress._rows] == [1, 2, 3, 4]


def test_an_interrupted_kernel_goes_on_to_the_same_bits(displays, whole, tmp_path, monkeypatch, capsys):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = stickjax.fit(CONFIG, run)
    assert not stopped.finished and stopped.stopped_by == signal.SIGINT and int(stopped.state.step) == 4
    assert "stopped at step 4, saved at 4" in capsys.readouterr().out and Checkpoints(run).steps() == [4]
    assert displays[-1][2]["text/plain"] and len(stopped.metrics["step"]) == 4
    assert signal.getsignal(signal.SIGINT) == before
    result = stickjax.fit(CONFIG, run, quiet=True)
    assert result.finished and result.stopped_by == 0
    assert_same_state(result.state, whole.state)
    np.testing.assert_array_equal(result.metrics["loss"], whole.metrics["loss"])


@pytest.mark.parametrize("where", ["_new", "check_program"])
def test_an_interrupt_before_the_first_step_is_no_traceback(where, tmp_path, monkeypatch, capsys):
    function = getattr(loop, where)
    monkeypatch.setattr(loop, where, lambda *a: (signal.raise_signal(signal.SIGINT), function(*a))[1])
    if where == "check_program":
        monkeypatch.setattr(loop, "_new", without_check(loop._new, monkeypatch))
    result = stickjax.fit(CONFIG, tmp_path / "run")
    assert not result.finished and result.stopped_by == signal.SIGINT
    said = "interrupted; there is no checkpoint yet" if where == "_new" else "stopped at step 0, with nothing"
    assert said in capsys.readouterr().out
    step = None if where == "_new" else 0
    assert repr(result).startswith(f"Result(step={step}, finished=False")
    assert not len(result.metrics) and repr(result.metrics) == "an empty table"


def test_a_second_interrupt_ends_the_step_at_once(tmp_path, monkeypatch, capsys):
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    result = stickjax.fit(CONFIG.replace({"train.checkpoint_every": 2}), tmp_path / "run")
    assert result.state is None and result.stopped_by == signal.SIGINT
    assert "interrupted; the newest checkpoint is step 2" in capsys.readouterr().out
    assert not (tmp_path / "run" / "lock").exists()


def test_a_config_by_name_has_the_folder_of_the_command(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(loop, "fit", lambda config, run, **options: called.append((config.model.D, run)))
    for config in ("tiny", CONFIG, CONFIG.replace({"model.D": 32}), CONFIG):
        stickjax.fit(config)
    stickjax.fit("tiny", tmp_path / "mine")
    runs = [run for _, run in called]
    assert called[0] == (128, "runs/tiny") and runs[-1] == str(tmp_path / "mine")
    assert runs[1] == runs[3] != runs[2]


def test_metrics_are_columns(whole):
    metrics, rows = whole.metrics, read_metrics(whole.run)
    assert isinstance(metrics, dict) and metrics["step"].tolist() == list(range(1, 9))
    assert metrics["step"].dtype.kind == "i" and metrics["loss"].tolist() == [row["loss"] for row in rows]
    assert np.isnan(metrics["tokens_per_second"][0]) and metrics["tokens_per_second"][1:].min() > 0
    loaded = stickjax.load(whole.run).metrics
    assert list(loaded) == list(metrics) and loaded["tokens"].tolist() == metrics["tokens"].tolist()


def test_a_long_table_shows_its_ends():
    table = Columns.of({"step": i, "<b>": i / 3} for i in range(100))
    lines = repr(table).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "0", "1", "2", "3", "4", "...", "95", "96", "97", "98", "99"]
    assert lines[2] == "   1  0.33333"
    text = table._repr_html_()
    assert text.count("<tr>") == 12 and "&lt;b&gt;" in text and "<td>99</td><td>33</td>" in text
    assert Columns()._repr_html_() == "<table><tr><th></th></tr></table>"


def test_generate_takes_a_string_or_a_list(whole):
    model = stickjax.load(whole.run)
    one = model.generate("def f(x):", max_new_tokens=6, seed=3)
    assert isinstance(one, str) and model.generate("def f(x):", 6, seed=3) == one
    assert model.generate(["def f(x):", "import"], 6, seed=3)[0] == one
    pieces = []
    model.generate("def", 6, temperature=0, on_text=lambda row, piece: pieces.append(piece))
    assert "".join(pieces) == model.generate("def", 6, temperature=0)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        model.generate("x", 0)


def test_a_loaded_model_is_evaluated_and_exported(whole, tmp_path):
    model = stickjax.load(whole.run)
    found = model.evaluate(lengths=(1, 2), max_tokens=64)
    assert found["multiple"].tolist() == [1, 2] and (found["bits_per_byte"] > 0).all()
    stickjax.export(model, tmp_path / "theirs", type="granite")
    theirs = stickjax.load(tmp_path / "theirs")
    assert_same_state(theirs.model, model.model)
    assert repr(theirs.metrics) == "an empty table" and theirs.run == str(tmp_path / "theirs")
    parameters, config, tokenizer, step = model  # a loaded model still unpacks like a tuple
    assert jax.tree.leaves(parameters) and config.data.T == 16 and step == 8 and tokenizer.eot is not None


@pytest.mark.parametrize("name", ["fit", "load", "export"])
def test_help_is_readable(name):
    function = getattr(stickjax, name)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert "**" not in text and "Args:" in text and ">>> " in text
    assert all(line.isascii() and len(line) <= 124 for line in text.splitlines()[3:])  # the lines after the signature
    assert function.__doc__ and "..." not in str(inspect.signature(function))


def test_the_options_are_those_of_the_functions_that_do_the_work():
    def options(function, *without):
        found = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        return {name: default for name, default in found.items() if name not in without}

    assert options(stickjax.export) == options(export)
    assert options(stickjax.fit, "run") == options(loop.fit, "run", "profile")
    assert options(stickjax.load) == options(interactive.run_folder.load)


def test_dir_and_help_have_the_public_names():
    assert {name for name in dir(stickjax) if not name.startswith("_")} == set(stickjax.__all__)
    assert all(hasattr(stickjax, name) for name in stickjax.__all__)
    text = io.StringIO()
    pydoc.Helper(output=text).help(stickjax)
    assert "stickjax.fit" in text.getvalue() and "renamed.install" not in text.getvalue()


def test_the_package_is_imported_without_what_is_heavy():
    code = "import sys, stickjax; assert not {'jax', 'numpy', 'rich', 'flax', 'IPython'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(CONFIG.replace({"train.steps": 1}).to_json())
    result = stickjax.fit(tmp_path / "mine" / "config.json", quiet=True)
    assert result.finished and (tmp_path / "runs" / "mine" / "metrics.jsonl").exists()
