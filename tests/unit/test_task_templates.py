"""What templates of prompts may hold, and that nothing which runs long or reaches out is rendered, or even compiled."""

import pytest

from graft.data.tasks import sandbox
from graft.domain.errors import InvalidArgument

NAMES = ("review", "context", "labels")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("Judge: {{ review }}", "Judge: fine"),
        ("{{ review | upper }} of {{ review | length }}", "FINE of 4"),
        ("{{ review[:2] }}{{ review[-1:] }}", "fie"),
        ("{% if context %}C {{ context }}{% else %}none{% endif %}", "none"),
        ("{% if context and not review %}a{% elif review == 'fine' %}b{% endif %}", "b"),
        ("{{ 'long' if 'ine' in review else 'short' }}", "long"),
        ("{{ labels | join(' or ') }}", "good or bad"),
        ("{% for l in labels %}{{ loop.index }}{{ l }}{{ '' if loop.last else ', ' }}{% endfor %}", "1good, 2bad"),
        ("{{ context | default('?') }}{{ review | replace('f', 'm') | tojson }}", '?"mine"'),
        ("{% raw %}{{ review }}{% endraw %}{# a comment #}", "{{ review }}"),
        ("{% if review %}\nblock\n{% endif %}\nend\n", "block\nend"),
        ("a{% if review %}b{% endif +%}\nc", "ab\nc"),
    ],
)  # fmt: skip
def test_text_fields_filters_conditions_and_a_loop_over_labels_are_rendered(source: str, text: str) -> None:
    assert sandbox.check(source, NAMES) == []
    assert sandbox.render(source, {"review": "fine", "context": "", "labels": ("good", "bad")}) == text


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for a in range(10**9) %}{% endfor %}", "a loop goes over `labels`"),
        ("{% for a in labels %}{% for b in labels %}x{% endfor %}{% endfor %}", "a loop within a loop"),
        ("{% for a in review %}x{% endfor %}", "a loop goes over `labels`"),
        ("{% for a in labels recursive %}{{ loop(labels) }}{% endfor %}", "neither recursive"),
        ("{% for a, b in labels %}x{% endfor %}", "has one variable"),
        ("{{ 'x' * 10**9 }}", "no arithmetic"),
        ("{{ 10**10**10 }}", "no arithmetic"),
        ("{{ '%1000000000s' % review }}", "no arithmetic"),
        ("{{ '{:1000000000}'.format(1) }}", "nothing can be called"),
        ("{{ review ~ review }}", "write `{{ a }}{{ b }}`"),
        ("{{ review + review }}", "no arithmetic"),
        ("{{ ''.__class__ }}", "has no attribute '__class__'"),
        ("{{ ''['__class__'] }}", "a slice of whole numbers"),
        ("{{ review.__class__.__mro__ }}", "has no attribute"),
        ("{{ loop.index }}", "has no attribute 'index'"),
        ("{% for a in labels %}{{ loop.__class__ }}{% endfor %}", "has no attribute '__class__'"),
        ("{{ lipsum(n=1000000) }}", "nothing can be called"),
        ("{{ cycler('a').next() }}", "nothing can be called"),
        ("{{ self.__init__ }}", "has no attribute"),
        ("{{ review | attr('__class__') }}", "there is no filter 'attr'"),
        ("{{ review | center(1000000000) }}", "there is no filter 'center'"),
        ("{{ review | random }}", "there is no filter 'random'"),
        ("{{ review | upper(x=1) }}", "without names"),
        ("{% set x = review %}{{ x }}", "Assign is not allowed"),
        ("{% macro f() %}{{ review }}{% endmacro %}", "Macro is not allowed"),
        ("{% include '/etc/passwd' %}", "nothing can be included"),
        ("{% import 'x' as y %}", "nothing can be included"),
        ("{% extends 'x' %}", "nothing can be included"),
        ("{% filter upper %}x{% endfilter %}", "FilterBlock is not allowed"),
        ("{% with x = review %}{{ x }}{% endwith %}", "With is not allowed"),
        ("{% if context is defined %}x{% endif %}", "write `{% if field %}`"),
        ("{{ 'a' if review }}", "needs an `else`"),
        ("line one\n{{ film }}", "line 2: uses 'film', which is not declared; declared: review, context, labels"),
        ("one\n{% if review %}\nthree", "line 3: Unexpected end of template"),
        ("{{ review", "line 1: unexpected end of template"),
        ("{% for x in labels %}{{ x | upper | nonsense }}{% endfor %}", "there is no filter 'nonsense'"),
        ("{{ labels | upper }}", "cannot be rendered"),
        ("{{ review | join(', ') }}", "join takes a list"),
        ("{{ review | replace('', 'xx') }}", "replace needs a text"),
        ("{{ review | tojson(99) }}", "cannot be rendered"),
        ("{{ " + "(" * 5000 + "review" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "not " * 2000 + "review }}", "nested too deeply"),
        ("{% if review %}" * 200 + "{% endif %}" * 200, "nested too deeply"),
        ("{{ " + "9" * 5000 + " }}", "a number that cannot be read"),
        ("x" * (16 * 1024 + 1), "longer than 16384 bytes"),
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_its_line_before_it_is_compiled(source: str, told: str) -> None:
    faults = sandbox.check(source, NAMES)
    assert len(faults) == 1, faults
    assert told in faults[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ review }}{{ review }}",
        "{{ review | replace('a', 'aaaa') }}",
        "{{ review | tojson | tojson | tojson }}",
        "{% for label in labels %}{{ review[:9000] }}{% endfor %}",
        "{% for label in labels %}{% if review | lower == 'x' %}{% endif %}{% endfor %}",
        "{% for label in labels %}{% if label in review %}x{% endif %}{% endfor %}",
        "{% if review | upper == 'x' %}{% endif %}" * 300,
        "{{ review" + " in review" * 100 + " }}",
    ],
)
def test_a_rendering_that_grows_or_works_too_much_is_refused(source: str) -> None:
    assert sandbox.check(source, NAMES) == []
    values = {"review": 'a"' * 300_000, "context": "", "labels": tuple(map(str, range(256)))}
    with pytest.raises(InvalidArgument) as caught:
        sandbox.render(source, values)
    assert caught.value.reason == "TEMPLATE_TOO_LARGE"


def test_inputs_longer_than_a_row_may_be_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="1048576 are allowed"):
        sandbox.render("{{ review }}", {"review": "x" * 1_048_577})


def test_what_stands_in_a_field_is_text_and_never_a_template() -> None:
    text = "{{ 7 }} {% if %} <b> &amp;"
    assert sandbox.render("{{ review }}", {"review": text}) == text
