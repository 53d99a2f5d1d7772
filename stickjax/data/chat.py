"""Chat templates: a model's folder may have a template that writes the messages of a conversation as one prompt.

A template is a program in the language of the package jinja2. It runs in the sandbox of this package, as in
transformers. There it cannot import modules, read or write files, or change the messages. The sandbox does not limit
the time and the memory of a template.
"""

import datetime
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stickjax.data.special_tokens import TOKENIZER_CONFIG, read_object, token_texts

JINJA = "chat_template.jinja"
_JSON = "chat_template.json"
_OLDEST = (3, 1, 6)  # older versions of jinja2 have known ways out of the sandbox
Conversation = str | Sequence[Mapping[str, Any]]


def template_of(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template of a model, or None if the model has no template.

    `files` is {name: content} of the files beside the model's tokenizer.json. The template is read from the first of
    these files that has one: chat_template.jinja, tokenizer_config.json, chat_template.json. If a file has several
    templates with names, the one with the name "default" is used.

    Raises ValueError if a file cannot be read, or has several templates and none with the name "default".

    >>> template_of({"tokenizer_config.json": b'{"chat_template": "{{ messages[0].content }}"}'})
    '{{ messages[0].content }}'
    """
    if JINJA in files:
        try:
            return files[JINJA].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{JINJA} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for name in (TOKENIZER_CONFIG, _JSON):
        found = read_object(files.get(name, b"{}"), name).get("chat_template")
        if isinstance(found, list):
            found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            if not isinstance(found.get("default"), str):
                raise ValueError(f'{name} has no chat template with the name "default"')
            found = found["default"]
        if isinstance(found, str):
            return found
        if found is not None:
            raise ValueError(f"{name}: chat_template={found!r:.40} is not a text")
    return None


def chat_prompt(files: Mapping[str, bytes], conversation: Conversation) -> str:
    """Return the prompt with which a model answers the last message of a conversation.

    The prompt contains special tokens as text. If the model needs a prefix, the template has already written it. So
    encode the prompt by `Tokenizer.prompt(text, special=True, prefix=False)`.

    Args:
      files: {name of the file: content} of the files beside the model's tokenizer.json, such as `tokenizer.files`.
      conversation: a list of messages, [{"role": "user", "content": text}, ...]. Other roles are usually "system" and
        "assistant". A string is a single message of the user.

    Raises ValueError if the files have no chat template, if `conversation` has another form, if the package jinja2 is
    missing or too old, or if the template fails, for example because it does not know a role.

    >>> template = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}\\n{% endfor %}<assistant>"
    >>> chat_prompt({"chat_template.jinja": template}, "Hello")
    '<user>Hello\\n<assistant>'
    """
    messages = _messages(conversation)
    if (template := template_of(files)) is None:
        raise ValueError(
            f"the model has no chat template in {JINJA}, {TOKENIZER_CONFIG} or {_JSON}; do not use the option chat: "
            "write the turns and their special tokens into the prompt, and use the option special_tokens"
        )
    environment, tokens = _environment(), token_texts(files, Path())
    options = dict(add_generation_prompt=True, tools=None, documents=None)
    try:
        return environment.from_string(template).render(messages=messages, **options, **tokens)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it may fail in any way
        line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the chat template of the model failed: {reason}{line}") from error


def _messages(conversation: Conversation) -> list[dict]:
    """Return the messages of a conversation as new dictionaries of JSON values, without entries that are None.

    So a template can neither change the dictionaries of the caller nor call the methods of other objects.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    is_list = isinstance(conversation, Sequence) and not isinstance(conversation, bytes) and len(conversation) > 0
    if not is_list or not all(isinstance(message, Mapping) for message in conversation):
        raise ValueError(
            'a conversation must be a string, or a list of messages such as {"role": "user", "content": "Hello"}, not '
            f"{conversation!r:.80}"
        )
    for i, message in enumerate(conversation):
        if not isinstance(message.get("role"), str):
            raise ValueError(f'message {i} of the conversation needs a "role", such as "user"')
        if message.get("content") is None and not message.keys() - {"role", "content"}:
            raise ValueError(f'message {i} of the conversation needs a "content"')
    try:
        return [json.loads(json.dumps({k: v for k, v in m.items() if v is not None})) for m in conversation]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a message may have only texts, numbers, lists and dictionaries: {error}") from error


def _environment():
    """Return a sandbox for templates, with the options, functions and tags that transformers offers them."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError as error:
        raise ValueError("a chat template needs the package jinja2: pip install 'stickjax[hf]'") from error
    version = importlib.metadata.version("jinja2")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ValueError(f"a chat template needs jinja2 {oldest} or newer, not {version}: pip install -U jinja2")

    class Generation(Extension):
        """Ignores the tags `generation` and `endgeneration`, which mark the parts that an assistant has written."""

        tags = {"generation"}

        def parse(self, parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def fail(message: str):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def namespace(*args, **entries) -> Namespace:
        if wrong := [name for name in dict(*args, **entries) if str(name).startswith("_")]:
            raise SecurityError(f"a namespace may not have the name {wrong[0]!r}")
        return Namespace(*args, **entries)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= dict(
        raise_exception=fail,
        strftime_now=lambda format: datetime.datetime.now().strftime(format),
        namespace=namespace,
        dict=lambda *args, **entries: dict(*args, **entries),  # the class has methods that change its objects
    )
    return environment
