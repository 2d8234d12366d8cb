"""Chat templates, against what transformers 5.23's ``apply_chat_template`` writes for the same source."""

import json

import pytest

from research.data.chat import ChatTemplate, chat_template

SOURCE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- bos_token + '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
    {% generation %}
        {{- '<|im_start|>assistant\n' + message.content }}
    {% endgeneration %}
    {%- endif %}
  {% if loop.last %}
    !{{ messages|length }}é<b>
  {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
MESSAGES = [
    {"role": "system", "content": " Sei knapp. "},
    {"role": "user", "content": "Hi <é>"},
    {"role": "assistant", "content": "Yo"},
    {"role": "tool", "content": "x"},
    {"role": "user", "content": "more"},
]
WRITTEN = (
    "<s><|im_start|>system\n"
    "Sei knapp.<|im_end|>\n"
    "<s><|im_start|>user\n"
    "Hi <é><|im_end|>\n"
    "<|im_start|>assistant\n"
    "Yo\n"
    "<s><|im_start|>user\n"
    "more<|im_end|>\n"
    "    !5é<b>\n"
    "<|im_start|>assistant\n"
    "<think>\n"
    "\n"
    "</think>\n"
    "\n"
)


def test_it_writes_what_transformers_writes():
    template = ChatTemplate(SOURCE, {"bos_token": "<s>"})
    assert template.render(MESSAGES, enable_thinking=False) == WRITTEN
    ends = WRITTEN.index("<|im_start|>assistant\n<think>")
    assert template.render(MESSAGES, add_generation_prompt=False) == WRITTEN[:ends]
    tools = template.render(MESSAGES[1:2], tools=[{"a": "é<"}], add_generation_prompt=False)
    assert tools.startswith('<|im_start|>system\n{"a": "é<"}<s><|im_start|>user')


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "the chat template is not Jinja: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses these messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "the chat template refuses these messages: access to attribute 'append'"),
        ("{{ raise_exception('users first') }}", "the chat template refuses these messages: users first"),
    ],
)
def test_it_runs_in_a_sandbox(source, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ChatTemplate(source).render(MESSAGES)


def test_a_message_has_a_role():
    with pytest.raises(ValueError, match=r"^messages\[1\]\.role must be one of system, user, .* got 'robot'"):
        ChatTemplate("x").render([MESSAGES[0], {"role": "robot", "content": ""}])


def test_where_templates_lie():
    told = {"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": "{{ bos_token }}config"}
    config = {"tokenizer_config.json": json.dumps(told)}

    def written(texts):
        found = chat_template(texts)
        return None if found is None else found.render(MESSAGES)

    assert written({}) is None and written({"tokenizer_config.json": "{}"}) is None
    assert written(config) == "<s>config"
    assert written({**config, "chat_template.json": '{"chat_template": "json"}'}) == "json"
    assert written({**config, "chat_template.jinja": "{{ bos_token }}file"}) == "<s>file"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    assert written({"tokenizer_config.json": json.dumps({"chat_template": several})}) == "usual"
