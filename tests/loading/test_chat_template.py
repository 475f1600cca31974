"""Chat templates: what real ones use, and what hostile ones try."""

import time

import numpy as np
import pytest

from jaxserve.errors import ValidationError
from jaxserve.loading.chat_template import render

HELLO = [{"role": "user", "content": "héllo <b>"}]

LLAMA_STYLE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no ' ~ message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>' + message['content'] | trim + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def test_a_template_with_what_real_ones_use():
    messages = [{"role": "system", "content": "be kind "}, *HELLO]
    expected = "<s><|system|>be kind\n<|user|>héllo <b>\n"
    special = {"bos_token": "<s>"}
    assert render(LLAMA_STYLE, messages, special_tokens=special) == expected + "<|assistant|>"
    assert render(LLAMA_STYLE, messages, special_tokens=special, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "héllo <b>"}]'),
        ("{{ messages[0].content.strip().split(' ')[-1].startswith('<') }}", "True"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% if tools %}t{% else %}none{% endif %}", "none"),
        ("{% for m in messages %}{% if loop.last %}{{ loop.index0 }}{% endif %}{% endfor %}", "0"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ messages[::-1][0]['role'] }}{% if x is defined %}d{% endif %}", "user"),
        ("a\n{% if true %}\nb\n{% endif %}\nc", "a\nb\nc"),
    ],
)
def test_features(template, text):
    assert render(template, HELLO) == text


def test_dates_and_tools():
    assert render("{{ strftime_now('%Y') }}", HELLO) == time.strftime("%Y")
    tools = [{"name": "add", "parameters": {}}]
    assert render("{{ tools | tojson(indent=2) }}", HELLO, tools=tools).startswith(
        '[\n  {\n    "name": "add"'
    )


def test_a_template_may_refuse():
    with pytest.raises(ValidationError, match=r"messages=\['tool'\]: the chat template says: no tool"):
        render(LLAMA_STYLE, [{"role": "tool", "content": "x"}])


HOSTILE = {
    "nested loops": "{% for i in range(9000) %}{% for j in range(9000) %}x{% endfor %}{% endfor %}",
    "huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "huge string": "{{ 'a' * 10 ** 9 }}",
    "much output": "{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}",
    "deep nesting": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "unfinished": "{{ messages",
    "unknown filter": "{{ messages | danger }}",
    "long source": "x" * 70_000,
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_and_clearly(name):
    start = time.perf_counter()
    with pytest.raises(ValidationError, match=r"^chat_template="):
        render(HOSTILE[name], HELLO)
    assert time.perf_counter() - start < 5.0


def test_python_is_out_of_reach():
    assert render("{{ ''.__class__ }}{{ messages.__class__ }}{{ raise_exception.__globals__ }}", HELLO) == ""


def test_the_longest_conversation_has_steps_enough():
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2048
    assert render(LLAMA_STYLE, messages).count("<|assistant|>y\n") == 2048


def test_braces_in_a_message_are_text():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 1 + 1 }}"}]) == "{{ 1 + 1 }}"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        {"role": "user", "content": "x"},
        [],
        ["hi"],
        [{"content": "x"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": "x"}] * 5000,
        [{"role": "user", "content": "x" * 5_000_000}],
        [{"role": "user", "content": "x", "name": "x" * 5_000_000}],
        [{"role": ["user"], "content": "x"}],
        [{"role": np.array(["user", "tool"]), "content": "x"}],
    ],
    ids=lambda messages: repr(messages)[:40],
)
def test_bad_messages_name_the_field(messages):
    with pytest.raises(ValidationError, match=r"^messages="):
        render("x", messages)


@pytest.mark.parametrize("key", ["content", "name"])
def test_lone_surrogates_are_refused(key):
    with pytest.raises(ValidationError, match=r"^messages='a\\ud800b': must be valid Unicode"):
        render("x", [{"role": "user", "content": "x"} | {key: "a\ud800b"}])
