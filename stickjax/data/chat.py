"""Chat templates: a model's folder has a template that writes the messages of a conversation as one prompt.

A template is a program in the language of the package jinja2. It runs in the sandbox of this package, as in
transformers: it can read the messages, but it cannot import anything, write files or change objects.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from stickjax.data.special_tokens import TOKENIZER_CONFIG, TOKENS, read_object

JINJA = "chat_template.jinja"
_JSON = "chat_template.json"
Messages = str | Sequence[Mapping[str, str]]


def template_of(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template in the files beside a tokenizer.json, {name of the file: content}, or None.

    The first of these files that has a template counts: chat_template.jinja, chat_template.json and
    tokenizer_config.json. If a file has several templates with names, the one with the name "default" counts.

    Raises ValueError if a file cannot be read, or has several templates and none with the name "default".

    >>> template_of({"tokenizer_config.json": b'{"chat_template": "{{ messages[0].content }}"}'})
    '{{ messages[0].content }}'
    """
    if JINJA in files:
        return files[JINJA].decode("utf-8-sig")
    for name in (_JSON, TOKENIZER_CONFIG):
        found = read_object(files.get(name, b"{}"), name).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            if "default" not in named:
                raise ValueError(f'{name} has several chat templates, and none has the name "default"')
            found = named["default"]
        if isinstance(found, str):
            return found
    return None


def chat_prompt(files: Mapping[str, bytes], messages: Messages) -> str:
    """Return the prompt with which a model answers the last message of a conversation.

    Encode the prompt with its special tokens: `Tokenizer.prompt(text, special=True)`.

    Args:
      files: {name of the file: content} of the files beside the model's tokenizer.json, such as `tokenizer.files`.
      messages: the conversation, [{"role": "user", "content": text}, ...]. Other roles are usually "system" and
        "assistant". A string is a single message of the user.

    Raises ValueError if the files have no chat template, if the package jinja2 is missing, or if the template fails,
    for example because it does not know a role.

    >>> template = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}\\n{% endfor %}<assistant>"
    >>> chat_prompt({"chat_template.jinja": template}, "Hello")
    '<user>Hello\\n<assistant>'
    """
    if (template := template_of(files)) is None:
        raise ValueError(
            f"the model has no chat template in {JINJA}, {_JSON} or {TOKENIZER_CONFIG}; spell the turns of the chat "
            "in the prompt, with special tokens"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    environment = _environment()
    entries = read_object(files.get(TOKENIZER_CONFIG, b"{}"), Path(TOKENIZER_CONFIG))
    texts = {key: entries.get(key) for key in TOKENS}
    texts = {key: text.get("content") if isinstance(text, dict) else text for key, text in texts.items()}
    variables = {key: text for key, text in texts.items() if text is not None}
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **variables
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"the chat template of the model failed: {type(error).__name__}: {error}") from error


def _environment():
    """Return a sandbox for templates, with the options, functions and tags that transformers offers them."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError("a chat template needs the package jinja2: pip install 'stickjax[hf]'") from error

    class Generation(Extension):
        """Ignores the tags `generation` and `endgeneration`, which mark the parts that an assistant has written."""

        tags = {"generation"}

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
