"""Chat templates are programs by strangers: they run in jinja2's sandbox, which torch brings along, with the filters,
functions and tags that transformers gives to them, for so many rounds of loops and calls, none of which may make
something very large."""

import json
import re
from datetime import datetime
from functools import wraps

from jinja2 import Template, TemplateError, nodes, pass_context, utils
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS, SIZE = 1_000_000, 100_000_000
WIDE = r"%(\(.*?\))?[-+ #.\d]*?(\d{4}|\*)|\{[^{}]*:[^{}]*\d{4}"  # a width in a format


def compiled(text: str, today: datetime, marks: tuple[str, str]) -> Template:
    """With the marks around what the assistant says. Raises whatever jinja2 raises: also RecursionError, and
    SyntaxError of a {% break %} outside of a loop."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, finalize=_output, extensions=[_Generation, loopcontrols])
    env.filters = {name: _filter(name, apply) for name, apply in env.filters.items()} | {
        "tojson": _to_json, "each round": _each_round}
    env.globals |= {"raise_exception": _refuse, "strftime_now": today.strftime, "namespace": _Namespace,
                    "dict": lambda *x, **more: dict(*x, **more)}  # not the class, which leads to others
    env.marks = marks
    tree = env.parse(text)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "each round", [], [], None, None, lineno=loop.lineno, environment=env)
    return env.from_string(tree)


def rendered(template: Template, **values) -> str:
    """Raises whatever a stranger's program may raise."""
    template.environment.steps = STEPS
    return template.render(**values)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} is around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.environment.marks)
        return nodes.Scope([begin, *body, end]).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+"))
    steps = STEPS

    def count(self, steps):
        self.steps -= steps
        if self.steps < 0:
            raise TemplateError(f"expected at most {STEPS} steps, got more")

    def call_binop(self, context, operator, left, right):
        a, b = _amount(left), _amount(right)
        _bound(operator, a * b if operator == "*" else a ** min(b, 99) if operator == "**" else a + b, left)
        return super().call_binop(context, operator, left, right)

    def call(self, context, obj, *args, **more):
        self.count(10)
        subject = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        _bound(getattr(obj, "__name__", "a call"), _product(subject, *args, *more.values()), subject)
        return super().call(context, obj, *args, **more)


class _Namespace(utils.Namespace):
    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise TemplateError(f"expected a name without a leading underscore, got {name}")
        super().__setitem__(name, _output(value))


def _filter(name: str, apply):
    @wraps(apply)
    def bounded(*args, **more):
        given = args[hasattr(apply, "jinja_pass_arg"):]
        _bound(name, _product(*given, *more.values()), given[0])
        return apply(*args, **more)
    return bounded


@pass_context  # not at compile time, once for all
def _each_round(context, items):
    items = items if hasattr(items, "__len__") else list(items)
    context.environment.count(len(items))
    return items


def _output(value: object) -> object:
    _bound("a text", _amount(value))
    return value


def _bound(what: str, size: float, pattern: object = "") -> None:
    if size > SIZE or what in ("%", "format") and re.search(WIDE, str(pattern)):
        raise TemplateError(f"expected steps that make at most {SIZE} characters or items, got {what} of more")


def _amount(x: object) -> float:
    return abs(x) if isinstance(x, int | float) else len(x) if hasattr(x, "__len__") else 1


def _product(subject: object, *others: object) -> float:
    """As many characters as 'a'.center(10**10) or 'aa'.replace('a', …) may make."""
    return _amount(subject) * max(map(_amount, others), default=1)


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise TemplateError(message)
