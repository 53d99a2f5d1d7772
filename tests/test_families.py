"""Every model family works with every command.

This includes a family and an attention variant that a user defines in a file.
"""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stickjax
from stickjax import Config, DataConfig, ModelConfig, SutConfig
from stickjax.__main__ import main
from stickjax.config import ExpertsConfig, OrderedMemoryConfig
from stickjax.config.attention import ATTENTION, AttentionVariant
from stickjax.config.family import MODEL_CONFIGS, FamilyConfig
from stickjax.config.latent_tree import TreeConfig
from stickjax.models.families import FAMILIES
from stickjax.models.family import Family
from stickjax.models.parameters import PARAMETERS
from stickjax.models.stick_breaking import attend
from stickjax.training.loop import fit
from stickjax.training.metrics import read_metrics

SIZES = dict(D=8, L=2, K=1, H=4, F=8)
TEXT, PAIRS = DataConfig(T=8, B=2), DataConfig(source="logic", examples=3000, T=40, B=2)
SUT = dict(experts=ExpertsConfig(3, 2), attention_experts=ExpertsConfig(3, 2), attention="stick_breaking")


MODELS = {
    "decoder": Config(ModelConfig(**SIZES, N=2, experts=ExpertsConfig(E=4, k=2), attention="softmax"), TEXT),
    "sut": Config(SutConfig(**SIZES, **SUT), TEXT),
    "pairs": Config(SutConfig(**SIZES, **SUT, classes=7), PAIRS),
    "ordered_memory": Config(OrderedMemoryConfig(D=8, H=8, N=2), dataclasses.replace(PAIRS, split="A")),  # short texts
    "latent_tree": Config(TreeConfig(H=8, N=1, depth=1, encoder="gru"), DataConfig(source="scan", T=2, B=2)),
}
NAMES = [*MODELS, "bigram"]
LONGEST = 2  # for the fixture `short_scan`: a tree of depth 1
# The command "plan" compiles the step as "dry-run" does, and "pairs" is a second config of the family "sut".
EXHAUSTIVE = {
    "test_every_family_meets_every_command": lambda name, command: (
        (command == "plan" and name not in ("decoder", "sut", "bigram"))
        or (name == "pairs" and command in ("dry-run", "resume"))
    )
}
PAGE = Path(__file__).parent.parent / "docs" / "contributing" / "extending.md"


@pytest.fixture(scope="module", autouse=True)
def bigram():
    """Register the example family of docs/contributing/extending.md during the tests of this file; yield its class."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    names: dict = {"__name__": "extending"}
    exec(compile(code, PAGE, "exec"), names)
    MODELS["bigram"] = Config(names["BigramConfig"](), TEXT)
    yield names["Bigram"]
    del FAMILIES["bigram"], MODEL_CONFIGS["bigram"], PARAMETERS["BigramModel"]


MODULES = "modules (experts) cannot be added to a model of family="
# {family: {command: a part of its error message}}; every other pair of family and command works.
REFUSED = {
    "decoder": {},
    "sut": dict.fromkeys(["report", "extend", "prune", "concentrate"], MODULES)
    | {"convert": "no Hugging Face model_type fits a model of family='sut'", "sweep": "has no m_width"},
    "pairs": dict.fromkeys(["report", "extend", "prune", "concentrate"], MODULES)
    | {
        "generate": "a classifier (classes=7) cannot generate text",
        "convert": "no Hugging Face model_type fits a model of family='sut'",
        "sweep": "has no m_width",
    },
    "ordered_memory": dict.fromkeys(["report", "extend", "prune", "concentrate"], MODULES)
    | {
        "generate": "a model of family='ordered_memory' cannot generate text",
        "convert": "no Hugging Face model_type fits a model of family='ordered_memory'",
        "sweep": "has no m_width",
    },
    "latent_tree": dict.fromkeys(["report", "extend", "prune", "concentrate"], MODULES)
    | {
        "generate": "a model of family='latent_tree' cannot generate text",
        "convert": "no Hugging Face model_type fits a model of family='latent_tree'",
        "sweep": "has no m_width",
    },
    "bigram": dict.fromkeys(["report", "extend", "prune", "concentrate"], MODULES)
    | {
        "generate": "a model of family='bigram' cannot generate text",
        "convert": "no Hugging Face model_type fits a model of family='bigram'",
        "sweep": "has no m_width",
    },
}
COMMANDS = {
    "dry-run": "train CONFIG --dry-run --mesh.data=8 --data.B=8",
    "plan": "plan CONFIG --devices 1",
    "resume": "train CONFIG --run RUN --train.steps=3",
    "evaluate": "evaluate RUN --max-tokens 64 --max-pairs 4 --lengths 1",
    "generate": "generate RUN --prompt a --max-new-tokens 3",
    "convert": "convert RUN OUT --type granitemoe",
    "freeze": "modules freeze RUN OUT *embed* *table*",
    "report": "modules report RUN --tokens 64",
    "extend": "modules extend RUN OUT --experts 1",
    "prune": "modules prune RUN OUT --count 2 --kind ffn --tokens 64",
    "concentrate": "modules concentrate RUN OUT --train.steps=1",
    "sweep": "sweep coordinate --config CONFIG --widths 8,16 --out OUT",
}


@pytest.fixture(scope="module", autouse=True)
def one_length():
    """Pad the texts of all batches to the same length, so that a training compiles its step only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FamilyConfig, "padded_to", 40)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function from the name of a family to a run folder of this family, trained at the first call."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = folder / name
            fit(MODELS[name].replace({"train.steps": 2, "train.log_every": 1}), str(made[name]), quiet=True)
        return made[name]

    return run


@pytest.mark.usefixtures("short_scan")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_meets_every_command(name, command, runs, tmp_path, capsys):
    run = runs(name)
    places = {"RUN": run, "CONFIG": run / "config.json", "OUT": tmp_path / "out"}
    words = [str(places.get(word, word)) for word in COMMANDS[command].split()]
    if command == "sweep" and name == "decoder":
        words += ["--model.L=1", "--model.experts.E=0", "--model.experts.k=0"]  # a fraction of the compilation
    if command == "freeze" and name == "bigram":
        words.remove("*embed*")
    elif command == "freeze":
        words.remove("*table*")
    code = main(words)
    errors = capsys.readouterr().err.strip().splitlines()
    if (refusal := REFUSED[name].get(command)) is None:
        assert code == 0, errors
    else:
        assert code == 1 and errors[-1].startswith("error: ") and refusal in errors[-1]
        assert not (tmp_path / "out").exists()


def test_an_attention_variant_of_the_user(monkeypatch):
    """A user can register an attention variant; here it halves the output of stick-breaking attention.

    An unknown variant, a wrong return value and a name that is taken give clear errors.
    """

    def halved(config, q, k, v, context):
        out, rest = attend(config, q, k, v, context)
        return out / 2, rest

    with pytest.raises(ValueError, match="attention='halved' is not one of 'stick_breaking', 'softmax'"):
        ModelConfig(attention="halved")
    monkeypatch.setattr("stickjax.config.attention.ATTENTION", dict(ATTENTION))
    stickjax.register(AttentionVariant(halved), "halved")
    config = MODELS["decoder"].model
    batch = {"tokens": jnp.arange(8)[None]}
    family = FAMILIES["decoder"]
    model = family.init(config, jax.random.key(0))
    other = family.init(dataclasses.replace(config, attention="halved"), jax.random.key(0))
    assert jnp.abs(family.apply(model, batch).logits - family.apply(other, batch).logits).max() > 1e-3
    stickjax.register(AttentionVariant(lambda config, q, k, v, context: q), "bare")
    with pytest.raises(ValueError, match=r"attention='bare': the function of this variant must return \(out, rest\)"):
        family.apply(family.init(dataclasses.replace(config, attention="bare"), jax.random.key(0)), batch)
    for function in ("module:function", functools.partial(halved), halved):  # whatever may be called
        stickjax.register(AttentionVariant(function), f"as_{type(function).__name__}")
        with pytest.raises(ValueError, match="attention='softmax' is registered already"):
            stickjax.register(AttentionVariant(function), "softmax")
    with pytest.raises(ValueError, match="remainder='value' needs attention='stick_breaking'.*, not 'halved'"):
        ModelConfig(attention="halved", remainder="value")


def test_what_cannot_be_registered(bigram):
    with pytest.raises(ValueError, match=r"takes a Family without a name, .* got what=3, name=None"):
        stickjax.register(3)

    class Other(bigram):
        pass

    with pytest.raises(ValueError, match="family='bigram' is registered already, by Bigram"):
        stickjax.register(Other())
    with pytest.raises(ValueError, match="attention='softmax' is registered already"):
        stickjax.register(AttentionVariant(attend), "softmax")


def test_the_file_of_a_family_may_run_again():
    """The code that registers a family may run twice, as a notebook cell does; the second class replaces the first."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    again: dict = {"__name__": "extending"}
    exec(compile(code, PAGE, "exec"), again)
    assert MODEL_CONFIGS["bigram"] is again["BigramConfig"] and type(FAMILIES["bigram"]) is again["Bigram"]


def test_the_loss_of_the_page_is_the_same_on_several_devices(tmp_path):
    losses = []
    for devices in (1, 2):
        config = Config(MODEL_CONFIGS["bigram"](), TEXT).replace({"train.steps": 3, "train.log_every": 1})
        fit(config.replace({"mesh.data": devices}), str(tmp_path / str(devices)), quiet=True)
        losses.append([(row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / str(devices))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_config_classes_that_are_refused():
    with pytest.raises(TypeError, match="Mine.family='decoder' is already the name of the family of ModelConfig"):

        class Mine(FamilyConfig):
            family: str = "decoder"

    class Wider(ModelConfig):  # another class of the same family
        pass

    assert MODEL_CONFIGS["decoder"] is ModelConfig
    with pytest.raises(
        ValueError, match="family='triram' is not one of .*mean 'bigram'..; import the file that defines"
    ):
        Config.from_dict({"model": {"family": "triram"}})


def test_a_family_without_a_loss_is_refused(bigram):
    class NoLoss(Family):
        config, init, apply = bigram.config, bigram.init, bigram.apply

    with pytest.raises(TypeError, match="abstract method 'loss'"):
        NoLoss()


def test_a_parameter_that_is_not_in_the_table_is_refused(bigram):
    """A parameter without an entry in the table PARAMETERS gives an error.

    Otherwise it would be partitioned and scaled like a parameter of another module with the same name.
    """
    config = MODELS["bigram"]
    model = bigram().init(config.model, jax.random.key(0))
    model.w_out = nnx.Param(jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match="w_out .BigramModel.w_out. is not in the table of parameters"):
        stickjax.training.optimizer.make_optimizer(config, model)
