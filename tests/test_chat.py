"""Chat templates: a conversation becomes the prompt that its template writes, in a sandbox."""

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
        ("{{ raise_exception('no role ' + messages[0].role) }}", "TemplateError: no role user"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
        ("{% include 'a' %}", "TypeError: no loader"),
        ("{% for %}", "TemplateSyntaxError: "),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    ],
)
def test_a_template_that_fails_is_one_line(template, message):
    with pytest.raises(ValueError, match=f"the chat template of the model failed: {message}") as error:
        chat_prompt({JINJA: template.encode()}, "Hello")
    assert "\n" not in str(error.value)


def test_where_the_template_is_found(monkeypatch):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    own = {"chat_template.json": b'{"chat_template": "j"}'}
    assert [template_of(files) for files in ({}, config, config | own, config | own | {JINJA: b"f"})] == [None, *"djf"]
    with pytest.raises(ValueError, match='none has the name "default"'):
        template_of({"tokenizer_config.json": json.dumps({"chat_template": named[:1]}).encode()})
    with pytest.raises(
        ValueError, match="the model has no chat template in chat_template.jinja, chat_template.json or"
    ):
        chat_prompt({}, "Hello")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="a chat template needs the package jinja2"):
        chat_prompt(config, "Hello")


def test_a_model_answers_in_its_template(bpe, tmp_path, capsys):
    """The prompt of a message is the template's text with special tokens, and begins with one begin-of-text token."""
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
    assert main([run, "--chat", "--prompt", "the stick", "--max-new-tokens=8", "--temperature=1", "--seed=1"]) == 0
    assert capsys.readouterr().out == wanted[0] + "\n"
