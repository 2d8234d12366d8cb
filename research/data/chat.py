"""Chat templates: messages to the text that a published model was taught to read them as.

A template is Jinja source that travels with the checkpoint (``chat_template.jinja``, or ``chat_template`` in
``tokenizer_config.json``). It is somebody else's program, so it runs in Jinja's sandbox, on values alone, and can change
nothing.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

ROLES = ("system", "user", "assistant", "tool", "developer")
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template.

    Args:
      source: Jinja, as Hugging Face's tokenizers read it: blocks trimmed, ``break`` and ``continue`` in loops, ``tojson``
        without escapes, ``raise_exception``, ``strftime_now`` and ``{% generation %}`` known.
      tokens: what the template calls ``bos_token`` and so on.

    Raises:
      ValueError: it is no Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        self.source, self._tokens = source, dict(tokens or {})
        extensions = [_Generation, jinja2.ext.loopcontrols]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not Jinja: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """The text of a conversation, special tokens written out, up to where the model is to answer.

        Args:
          messages: ``{"role": "user", "content": "..."}`` and so on, in order.
          add_generation_prompt: end with what an answer begins with.
          values: whatever else the template asks for (``tools``, ``enable_thinking``).

        Raises:
          ValueError: a message without role, or the template refuses the conversation (two user messages running, say).
        """
        for i, message in enumerate(messages):
            if message.get("role") not in ROLES:
                raise ValueError(f"messages[{i}].role must be one of {', '.join(ROLES)}, got {message.get('role')!r}")
        options = {"tools": None, "documents": None, **self._tokens, **values}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **options
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def chat_template(texts: Mapping[str, str]) -> ChatTemplate | None:
    """The template among the files of a Hugging Face directory, by name; None where there is none.

    Of several templates in ``tokenizer_config.json`` it is the one named ``default``.

    Raises:
      ValueError: it cannot be read.
    """
    told: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        told |= json.loads(texts.get(name, "{}"))
    source = texts.get("chat_template.jinja")
    if source is None and "chat_template.json" in texts:
        source = json.loads(texts["chat_template.json"]).get("chat_template")
    if source is None:
        source = told.get("chat_template")
    if isinstance(source, list):
        source = {template["name"]: template["template"] for template in source}.get("default")
    if source is None:
        return None
    named = {name: told.get(name) for name in TOKEN_NAMES}
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    return ChatTemplate(source, tokens)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the parts that are the model's own; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser):
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
