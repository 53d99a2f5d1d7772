"""Models on the Hugging Face hub, without a network: a cache as huggingface_hub makes it, and fake transfers."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import stickjax
from stickjax import convert, evaluate, generate
from stickjax.convert import export
from stickjax.data.tokenizer import HuggingFaceTokenizer
from stickjax.models.transformer import init
from stickjax.storage import hub
from stickjax.storage.hub import FILES, local_folder
from stickjax.surgery import __main__ as surgery

huggingface_hub = pytest.importorskip("huggingface_hub")
constants, errors = (pytest.importorskip(f"huggingface_hub.{name}") for name in ("constants", "errors"))
ORACLE = Path(__file__).parent / "oracles" / "hf" / "granite_tied"
MODEL = functools.partial(stickjax.ModelConfig, D=8, L=1, N=2, K=1, H=4, F=16, attention="softmax")
NAME, SHA = "org/granite-tied", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_memory():
    """Clear the cache of the process for downloaded models, so that each test downloads its models itself."""
    hub._downloaded.cache_clear()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Give huggingface_hub a new, empty cache and no network. Return the folder of the cache.

    The fixture sets a constant of the package, because HF_HUB_OFFLINE=1 in the environment is read only at its import.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def chat_model(tmp_path, bpe):
    """Return a Hugging Face folder: a model with V=304, a tokenizer, its special tokens and a chat template."""
    folder = tmp_path / "chat"
    export(init(MODEL(V=304), jax.random.key(0)), str(folder), type="llama")
    tree = json.loads(Path(bpe).read_text())
    first = max(tree["model"]["vocab"].values()) + 1
    for i, text in enumerate(("<s>", "<|end|>")):
        tree["added_tokens"].append(tree["added_tokens"][0] | {"id": first + i, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": "<|endoftext|>"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first + 1]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def put_in_cache(cache: Path, name: str, source: Path, without: str = "") -> Path:
    """Copy the files of the folder `source` into a cache of the hub, as the model `name`. Return the snapshot folder.

    The file `without` is not copied. The cache gets the files as blobs, and a snapshot folder with links to the blobs.
    """
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / SHA
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    for file in source.iterdir():
        if file.is_file() and file.name != without:
            shutil.copy(file, repo / "blobs" / file.name)
            (snapshot / file.name).symlink_to(repo / "blobs" / file.name)
    return snapshot


def test_a_model_in_the_cache_is_loaded_without_a_network(offline, capsys):
    snapshot = put_in_cache(offline, NAME, ORACLE)
    assert local_folder(NAME) == str(snapshot)
    ours, theirs = stickjax.load(NAME), stickjax.load(ORACLE)
    for a, b in zip(jax.tree.leaves(ours.model), jax.tree.leaves(theirs.model), strict=True):
        assert np.array_equal(a, b)
    assert ours.run == NAME and list(ours.metrics) == []
    before = sorted(path.name for path in snapshot.iterdir())
    assert evaluate.main(["./org/granite-tied"]) == 1  # a path, although the cache has a model with this name
    assert "nor a model on the hub (org/name): it does not exist" in capsys.readouterr().err
    assert convert.main([NAME, "run"]) == 0 and stickjax.load("run").model.embed.shape == ours.model.embed.shape
    assert surgery.main(["freeze", NAME, "frozen", "embed"]) == 0
    assert sorted(path.name for path in snapshot.iterdir()) == before


def test_a_folder_comes_before_the_hub(offline, tmp_path):
    shutil.copytree(ORACLE, tmp_path / NAME)
    assert local_folder(NAME) == NAME
    for name in ("org/other", "./a/b", "a", "/a/b", "a/b/c"):  # the folder org exists; the others are not org/name
        assert local_folder(name) == name
    assert local_folder(Path("other/model")) == Path("other/model")  # a Path is never the name of a model
    with pytest.raises(ValueError, match="org/other is neither a run folder, .*: it does not exist"):
        stickjax.load("org/other")


def test_what_is_not_there_gives_one_line(offline, monkeypatch, capsys):
    commands = evaluate.main, lambda words: generate.main([*words, "--prompt=a"]), lambda w: convert.main([*w, "out"])
    for main in commands:
        assert main(["nobody/nothing"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: nobody/nothing is not a folder, the Hugging Face hub cannot be reached (")
        assert error.count("\n") == 1 and not Path("out").exists()
    put_in_cache(offline, "org/bin", ORACLE, without="model.safetensors")
    with pytest.raises(ValueError, match="org/bin has no safetensors files on the Hugging Face hub"):
        stickjax.load("org/bin")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"a/b is not a folder; to load .*: pip install 'stickjax\[hf\]'"):
        stickjax.load("a/b")


def failure(kind: str) -> Exception:
    """Return an error of the class `kind` of huggingface_hub, with a message of several lines."""
    error = getattr(errors, kind)
    if not issubclass(error, errors.HfHubHTTPError):
        return error("line one\nline two")
    made = error.__new__(error)  # the constructor needs a response of the HTTP package
    Exception.__init__(made, "401 Client Error.\n\nCannot access the model")
    return made


@pytest.mark.parametrize(
    "kind, said",
    [
        ("RepositoryNotFoundError", "a/b is neither a folder nor a model on the Hugging Face hub; if it is private"),
        ("GatedRepoError", "a/b is gated: ask for access on its page"),
        ("LocalEntryNotFoundError", "a/b is not a folder, the Hugging Face hub cannot be reached"),
        ("HfHubHTTPError", "a/b cannot be downloaded from the Hugging Face hub: HfHubHTTPError: 401 Client Error. Can"),
    ],
)
def test_every_error_of_the_hub_is_one_line(kind, said, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        raise failure(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError) as caught:
        stickjax.load("a/b")
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert asked == [("a/b", {"allow_patterns": list(FILES), "ignore_patterns": ["*/*"]})]


def test_only_parameters_json_and_text_are_downloaded():
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt",
        "pytorch_model.bin", "model.pt", "weights.pkl", "modeling_own.py", "tokenizer.model", "onnx/model.safetensors",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    assert list(kept) == files[:5]


def test_special_tokens_are_used_as_the_model_says_and_travel_along(chat_model, offline, monkeypatch, tmp_path):
    put_in_cache(offline, "org/chat", chat_model)
    assert convert.main(["org/chat", "run"]) == 0
    pushed = {}

    def upload_folder(repo_id, folder_path, **options):
        pushed[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, options

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: pushed.update({f"new {name}": options}))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert convert.main(["run", "me/chat", "--type=llama", "--push"]) == 0
    assert pushed["new me/chat"] == {"private": True, "exist_ok": True}
    files, options = pushed["me/chat"]
    # A push deletes parameters and special tokens of an older version, and keeps files that no export writes.
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.json"]
    others = ["LICENSE.txt", "evaluation/results.json", "adapter/adapter_model.safetensors"]
    deleted = huggingface_hub.utils.filter_repo_objects(old + others, allow_patterns=options["delete_patterns"])
    assert list(deleted) == old
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert files[name] == (chat_model / name).read_bytes()
    assert files.keys() - {"config.json", "model.safetensors"} <= {path.name for path in chat_model.iterdir()}
    back = tmp_path / "back"
    back.mkdir()
    for name, content in files.items():
        (back / name).write_bytes(content)
    bos = json.loads((back / "config.json").read_text())["bos_token_id"]
    for place in ("org/chat", "run", back):
        tokenizer = stickjax.load(place).tokenizer
        assert tokenizer.encode("the").tolist()[0] == bos == tokenizer.bos and tokenizer.prefix == (bos,)
        assert tokenizer.ends == {0, bos + 1}  # both ids of generation_config.json end a text


def test_add_bos_token_decides(chat_model, bpe):
    name, plain = chat_model / "tokenizer.json", HuggingFaceTokenizer(bpe)
    adds = HuggingFaceTokenizer(name)
    assert adds.prefix == (adds.special_id("<s>"),) and adds.name.endswith(f"+[{adds.special_id('<s>')}]")
    (chat_model / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "bos_token": "<s>"}))
    assert HuggingFaceTokenizer(name).prefix == () == plain.prefix and "+" not in HuggingFaceTokenizer(name).name
    (chat_model / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert HuggingFaceTokenizer(name).prefix == ()  # no file names the bos token


def test_a_tokenizer_with_more_ids_than_the_model(chat_model, capsys):
    for name in ("config.json", "model.safetensors"):
        (chat_model / name).unlink()
    own = {path.name: path.read_bytes() for path in chat_model.iterdir()}
    shutil.rmtree(chat_model)
    export(init(MODEL(V=280), jax.random.key(0)), str(chat_model), type="llama")
    for name, content in own.items():
        (chat_model / name).write_bytes(content)
    size = HuggingFaceTokenizer(chat_model / "tokenizer.json").vocab_size
    assert 280 < size < 304
    assert convert.main([str(chat_model), "out"]) == 1
    said = f"tokenizer.json has {size} ids, but the model has V=280; use the model's tokenizer"
    assert capsys.readouterr().err.endswith(f"{said}\n")
    with pytest.raises(ValueError, match=said):
        stickjax.load(chat_model)
    assert not Path("out").exists()


def test_a_push_that_cannot_work_uploads_nothing(chat_model, monkeypatch, capsys):
    uploads = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: uploads.append(name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: uploads.append(options))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert convert.main([str(chat_model), "run"]) == 0
    model = stickjax.load("run")
    for words, said in (
        (["run", "me/chat", "--type=llama"], "to push me/chat, log in to the Hugging Face hub first: hf auth login"),
        (
            ["run", "chat", "--type=llama"],
            "'chat' is not the name of a model on the Hugging Face hub, such as org/name",
        ),
        ([str(chat_model), "me/chat"], "--push needs a run folder"),
    ):
        assert convert.main([*words, "--push"]) == 1
        assert said in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    with pytest.raises(ValueError, match="choose one with --type"):
        stickjax.export(model, "me/chat", push=True)
    assert uploads == []
    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(failure("HfHubHTTPError"))
    )
    with pytest.raises(ValueError, match="me/chat cannot be pushed to the Hugging Face hub: HfHubHTTPError: 401"):
        stickjax.export(model, "me/chat", type="llama", push=True)
    assert uploads == [] and not Path("me").exists()
