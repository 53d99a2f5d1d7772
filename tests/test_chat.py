"""Chat templates: a conversation becomes the prompt that its template writes, in a sandbox."""

import io
import json
import sys
from pathlib import Path

import jax
import pytest

import stickjax
from stickjax import Config, ModelConfig
from stickjax.data.chat import chat_prompt, template_of
from stickjax.data.tokenizer import load_tokenizer
from stickjax.generate import generate_text, main
from stickjax.models.transformer import init
from stickjax.storage.run_folder import Loaded, save

JINJA = "chat_template.jinja"
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Héllo"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
# Templates with the constructs that published templates use, and what each writes for MESSAGES.
TEMPLATES = {
    "turns": (
        "{%- for m in messages %}\n    {{- '<|im_start|>' + m['role'] + '\\n' }}"
        "{{ m['content'] | trim + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHéllo<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system first": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
        "<<{{ messages[0].content.strip() }}>>{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
        "<s><<Be brief.>>Héllo</s>Hi</s>",
    ),
    "json": (
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{{ m | tojson }}{% endfor %}{{ ns.n }}{{ tools is none }}{{ strftime_now('%%') }}",
        '{"role": "user", "content": "Héllo"}{"role": "user", "content": "Bye"}2True%',
    ),
}
SPECIAL = {"tokenizer_config.json": json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}).encode()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_prompts(name):
    template, wanted = TEMPLATES[name]
    assert chat_prompt(SPECIAL | {JINJA: template.encode()}, MESSAGES) == wanted


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no role\\n' + messages[0].role) }}", "TemplateError: no role user"),
        ("{{ dict.update(messages[0], content='other') }}", "UndefinedError: .*update"),
        ("{{ namespace(__class__=1) }}", "SecurityError: a namespace may not have the name '__class__'"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
        ("{% include 'a' %}", "TypeError: no loader"),
        ("a\n{% for %}", "TemplateSyntaxError: .* .line 2."),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    ],
)
def test_a_template_that_fails_is_one_line(template, message):
    with pytest.raises(ValueError, match=f"the chat template of the model failed: {message}") as error:
        chat_prompt({JINJA: template.encode()}, "Hello")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([], "a conversation must be a string, or a list of messages"),
        (["a", "b"], "a conversation must be a string, or a list of messages"),
        (MESSAGES[0], "a conversation must be a string, or a list of messages"),
        (b"abc", "a conversation must be a string, or a list of messages"),
        ([MESSAGES], "a conversation must be a string, or a list of messages"),
        ([{"content": "a"}], 'message 0 of the conversation needs a "role"'),
        ([*MESSAGES, {"role": "user", "content": None}], 'message 4 of the conversation needs a "content"'),
        ([{"role": "user", "content": Path("a")}], "a message may have only texts, numbers, lists and dictionaries"),
    ],
)
def test_a_wrong_conversation_is_refused(conversation, message):
    with pytest.raises(ValueError, match=message):
        chat_prompt({JINJA: b"{{ messages }}"}, conversation)


def test_special_tokens_come_from_both_files():
    files = {"special_tokens_map.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": ["p"]}'}
    files |= {"tokenizer_config.json": b'{"eos_token": "<e>"}', JINJA: b"{{ bos_token }}{{ eos_token }}{{ pad_token }}"}
    assert chat_prompt(files, "Hello") == "<s><e>"


def test_where_the_template_is_found(monkeypatch):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    own = {"chat_template.json": b'{"chat_template": "j"}'}
    cases = {}, own, config | own, config | own | {JINJA: b"f"}
    assert [template_of(files) for files in cases] == [None, *"jdf"]
    assert template_of({"tokenizer_config.json": b'{"chat_template": {"default": "d"}}'}) == "d"
    for wrong, said in ((named[:1], "the name .default."), ({}, "the name .default."), (3, "chat_template=3 is not a")):
        with pytest.raises(ValueError, match=said):
            template_of({"tokenizer_config.json": json.dumps({"chat_template": wrong}).encode()})
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8 text: invalid start byte at byte 1"):
        template_of({JINJA: b"a\xff"})
    with pytest.raises(ValueError, match="no chat template in chat_template.jinja, tokenizer_config.json or chat_"):
        chat_prompt({}, "Hello")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.1.5")
    with pytest.raises(ValueError, match="a chat template needs jinja2 3.1.6 or newer, not 3.1.5"):
        chat_prompt(config, "Hello")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="a chat template needs the package jinja2"):
        chat_prompt(config, "Hello")


def test_a_model_answers_in_its_template(bpe, tmp_path, monkeypatch, capsys):
    """With `chat`, the prompt is the text of the template. Special tokens in it are encoded as special tokens.

    The tokenizer does not add a begin-of-text token of its own.
    """
    tree = json.loads(Path(bpe).read_text())
    first = max(tree["model"]["vocab"].values()) + 1
    for i, text in enumerate(("<s>", "<|user|>")):
        tree["added_tokens"].append(tree["added_tokens"][0] | {"id": first + i, "content": text})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    (tmp_path / JINJA).write_text("{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    config = Config(ModelConfig(V=tokenizer.vocab_size, D=16, L=1, N=2, K=1, H=8, F=16, init_std=0.6))
    config = config.replace({"data.tokenizer": str(tmp_path / "tokenizer.json")})
    loaded = Loaded(init(config.model, jax.random.key(0)), config, tokenizer, 0)
    options = dict(max_new_tokens=8, temperature=1.0, seed=1)
    spelled = "<s><|user|>the stick"
    assert tokenizer.prompt(spelled, special=True)[:2].tolist() == [first, first + 1]
    wanted = generate_text(loaded, [spelled], special_tokens=True, **options)
    assert wanted != generate_text(loaded, ["the stick"], **options)
    assert generate_text(loaded, ["the stick"], chat=True, **options) == wanted
    run = str(tmp_path / "run")
    save(run, loaded.model, config)
    messages = [{"role": "user", "content": "the stick"}]
    assert stickjax.load(run).generate(messages, chat=True, **options) == wanted[0]
    both = generate_text(loaded, [spelled] * 2, special_tokens=True, **options)
    assert stickjax.load(run).generate([messages, "the stick"], chat=True, **options) == both
    with pytest.raises(ValueError, match="prompts must be a list of conversations"):
        generate_text(loaded, messages[0], chat=True)
    with pytest.raises(ValueError, match="a prompt must be a string, not .* set chat=True"):
        generate_text(loaded, [messages])
    files = tokenizer.files | {JINJA: b"<|user|>{{ messages[0].content }}"}
    without = tokenizer.prompt(chat_prompt(files, "the stick"), special=True, prefix=False)
    assert without[0] == first + 1 and tokenizer.prefix == (first,)
    assert main([run, "--chat", "--prompt", "the stick", "--max-new-tokens=8", "--temperature=1", "--seed=1"]) == 0
    assert capsys.readouterr().out == wanted[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("the stick\n"))
    assert main([run, "--chat", "--max-new-tokens=8", "--temperature=1", "--seed=1"]) == 0
    assert capsys.readouterr().out == wanted[0] + "\n"
