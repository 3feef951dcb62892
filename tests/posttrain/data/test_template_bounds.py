"""One expression of a chat template takes neither all memory nor minutes; ordinary templates are what they were."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys

import pytest
from light_model import light_model

from gemma2.core.errors import InputError
from gemma2.posttrain.data import template_sandbox, template_time
from gemma2.posttrain.data.chat import GEMMA_TEMPLATE, ChatFormat
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer
from gemma2.posttrain.data.template_sandbox import BoundedEnvironment
from gemma2.posttrain.data.template_time import TemplateOutOfBounds

SMALL = 64 * 2**20  # a bound that is reached sooner
N = 16 * SMALL  # characters: beyond what other tests of this process may free meanwhile
DOUBLED = "{% set s = namespace(t='xxxxxxxx') %}{% for i in range(40) %}"
TOO_MUCH = {
    "a product": f"{{{{ 'x' * {N} }}}}",
    "a product of ten thousand million": "{{ 'x' * 10000000000 }}",
    "a product of a variable": f"{{% set n = {N} %}}{{{{ messages[0]['role'] * n }}}}",
    "a list": f"{{{{ ([0] * {N // 8}) | length }}}}",
    "doubled by ~": f"{DOUBLED}{{% set s.t = s.t ~ s.t %}}{{% endfor %}}",
    "doubled by +": f"{DOUBLED}{{% set s.t = s.t + s.t %}}{{% endfor %}}",
    "center": f"{{{{ 'x' | center({N}) }}}}",
    "the method center": f"{{{{ 'x'.center({N}) }}}}",
    "ljust": f"{{{{ 'x'.ljust({N}) }}}}",
    "zfill": f"{{{{ 'x'.zfill({N}) }}}}",
    "percent": f"{{{{ '%{N}d' % 1 }}}}",
    "format": f"{{{{ '%{N}d' | format(1) }}}}",
    "the method format": f"{{{{ '{{:{N}d}}'.format(1) }}}}",
    "replace": "{{ ('x' * 100000) | replace('x', 'y' * 20000) }}",
    "join": "{{ (['x' * 100000] * 100000) | join }}",
    "indent": f"{{{{ ('x\\n' * 1000) | indent({N // 1000}) }}}}",
    "expandtabs": f"{{{{ '\\t'.expandtabs({N}) }}}}",
    "tojson": "{{ (['x' * 100000] * 100000) | tojson }}",
    "nested lists": "{% set s = namespace(t=[1]) %}{% for i in range(64) %}{% set s.t = s.t + s.t %}{% endfor %}",
    "slices": "{{ range(100000) | batch(3, 'x') | map('list') | list * 10000 }}",
    "lipsum": "{{ lipsum(n=3) * 10000000 }}",
}
TOO_LONG = {
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power of a variable": "{% set n = 999999999 %}{{ (n ** n) % 7 }}",
    "squares": "{% set s = namespace(n=99) %}{% for i in range(99) %}{% set s.n = s.n * s.n %}{% endfor %}",
    "a quotient": "{{ (('f' * 9999999) | int(0, 16)) // 7 }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "text": "{% for i in range(100000) %}{{ 'x' * 300 }}{% endfor %}",
}


def chat(path, template):
    model = light_model(path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return ChatFormat(load_light_tokenizer(model))


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else says what is in use, and bounds it")
@pytest.mark.parametrize("name", TOO_MUCH)
def test_an_expression_does_not_take_all_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr(template_sandbox, "TEMPLATE_MEMORY", SMALL)
    gc.collect()  # what earlier tests left and is freed while the template renders would count as room
    with pytest.raises(TemplateOutOfBounds, match="the chat template needs more than"):
        chat(tmp_path, TOO_MUCH[name])


@pytest.mark.parametrize("name", TOO_LONG)
def test_an_expression_does_not_compute_where_no_signal_arrives(name, tmp_path, monkeypatch):
    monkeypatch.setattr(template_time, "TEMPLATE_SECONDS", 2.0)
    with pytest.raises(InputError, match=r"an integer of more|round to|million characters|seconds"):
        chat(tmp_path, TOO_LONG[name])


def test_a_call_that_does_not_come_back_ends_with_the_process():
    code = (
        "from gemma2.posttrain.data import template_time\n"
        "template_time.TEMPLATE_SECONDS = 0.02\n"
        "with template_time.bounded_rendering('x'):\n"
        "    sum(range(10**11))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert -done.returncode == 27  # SIGPROF: nothing that Python could have caught


def test_the_environment_of_transformers_is_the_bounded_one():
    from transformers.utils import chat_template_utils

    template_time.use_bounded_environment()
    compiled = chat_template_utils._compile_jinja_template("{{ 2 ** 3 }} and nothing else")
    assert type(compiled.environment) is BoundedEnvironment
    assert compiled.render() == "8 and nothing else"


def test_limits_are_as_before_after_a_rendering(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    plain = chat(tmp_path, GEMMA_TEMPLATE)
    assert plain.prompt_ids([{"role": "user", "content": "x" * 100_000}])
    with pytest.raises(TemplateOutOfBounds):
        chat(tmp_path / "bad", "{% for i in range(100000) %}{{ 'x' * 300 }}{% endfor %}")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "text",
    ["{{ '  ' * 3 }}", "{{ 7 // 2 }}{{ 7 % 4 }}{{ 6 / 4 }}", "{{ '%s-%d' % ('a', 3) }}", "{{ 2.5 | round }}"],
)
def test_what_templates_compute_is_as_jinja_computes_it(text):
    import jinja2

    assert BoundedEnvironment().from_string(text).render() == jinja2.Environment().from_string(text).render()
