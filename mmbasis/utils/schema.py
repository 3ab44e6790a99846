# Copyright (c) mmbasis authors. All rights reserved.
"""What values from outside may be: one way to say it, one way to refuse.

Recipes, plans, latency tables, planners and hooks name a :class:`Rule` for
each of their fields. The error names the field, what it may be, and what was
found.
"""
import argparse
import json
import math
import numbers
import re
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping

#: characters of a wrong value that an error shows
_SHOWN = 100
#: seconds that a pattern may need for all names of a model
PATTERN_SECONDS = 5.


@dataclass(frozen=True)
class Rule:
    """What a value may be: in words, as in "must be …", and as a test."""
    words: str
    allows: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Require it of a value; the ValueError names the key."""
        if not self.allows(value):
            raise ValueError(
                f'{key} must be {self.words}, but got {shown(value)}')

    def __or__(self, other: 'Rule') -> 'Rule':
        return Rule(f'{self.words} or {other.words}',
                    lambda x: self.allows(x) or other.allows(x))


def shown(value: Any) -> str:
    """A value as errors show it, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f'a {type(value).__name__}, nested too deeply to be shown'
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…'


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no truth value."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past all floats
        return False


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def of_type(words: str, *types: type) -> Rule:
    """Values of some types."""
    return Rule(words, lambda x: isinstance(x, types))


def one_of(*values: str) -> Rule:
    """One of some texts."""
    words = ' or '.join([', '.join(map(repr, values[:-1]))] * (
        len(values) > 1) + [repr(values[-1])])
    return Rule(words, lambda x: isinstance(x, str) and x in values)


def integer(least: int) -> Rule:
    """Integers from a least one on."""
    words = {0: 'an integer of at least 0', 1: 'a positive integer'}[least]
    return Rule(words, lambda x: is_integer(x) and x >= least)


def list_of(words: str, rule: Rule, *lengths: int) -> Rule:
    """Lists and tuples of such values; of one of some lengths, if any."""
    return Rule(words, lambda x: isinstance(x, (list, tuple)) and all(
        map(rule.allows, x)) and (not lengths or len(x) in lengths))


def dict_of(words: str, rule: Rule) -> Rule:
    """Mappings from texts to such values."""
    return Rule(words, lambda x: isinstance(x, Mapping) and all(
        isinstance(k, str) and rule.allows(v) for k, v in x.items()))


NONE = Rule('None', lambda x: x is None)
BOOL = of_type('True or False', bool)
TEXT = of_type('a string', str)
COUNT = integer(1)
WHOLE = integer(0)
WEIGHT = Rule('a number of at least 0', lambda x: is_number(x) and x >= 0)
POSITIVE = Rule('a positive number', lambda x: is_number(x) and x > 0)
FRACTION = Rule('a number in (0, 1]', lambda x: is_number(x) and 0 < x <= 1)
SHARE = Rule('a number in [0, 1]', lambda x: is_number(x) and 0 <= x <= 1)
SHAPE = list_of('a list of positive integers', COUNT)
PATTERNS = list_of('a list of patterns', TEXT)


def checked(rule: Rule, default: Any = MISSING) -> Any:
    """A field of a :class:`Checked` dataclass, with a rule for what it may be
    beside its default."""
    return field(default=default, metadata=dict(rule=rule))


class Checked:
    """A dataclass that names the first field with a wrong value."""
    #: what stands before the names of fields
    prefix = ''

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value, rule = getattr(self, entry.name), entry.metadata.get('rule')
            if rule is not None and value is not entry.default:
                rule.check(f'{self.prefix}{entry.name}', value)

    @classmethod
    def parse(cls, config: Any) -> Any:
        """From its config; an instance is returned as it is."""
        if isinstance(config, cls):
            return config
        key = cls.prefix.rstrip('.: ') or 'a recipe'
        names = [x.name for x in fields(cls)]  # type: ignore[arg-type]
        if not isinstance(config, Mapping) or set(config) - set(names):
            raise ValueError(f'{key} must be dict(…) with some of '
                             f'{", ".join(names)}, but got {shown(config)}')
        try:
            return cls(**config)
        except TypeError as error:
            raise ValueError(f'{key} is not complete: {error}') from None


def check_all(owner: str, rules: Mapping[str, Rule],
              values: Mapping[str, Any]) -> None:
    """Require what rules say of the values that there are."""
    for key, rule in rules.items():
        if key in values:
            rule.check(f'{owner}{key}', values[key])


def read_json(path: str) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, nested too deeply to be read, or has a
            key twice; names the file.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not JSON: {error}') from None
    except RecursionError:
        raise ValueError(f'{path} is not JSON that can be read: it is nested '
                         'too deeply') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _without_duplicates(pairs: List[Any]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise ValueError(f'the key {twice!r} stands there twice')
    return found


def matching(pattern: str, names: Iterable[str], key: str) -> List[str]:
    """The names that a regular expression matches as a whole.

    Args:
        pattern (str): Of the user.
        names (Iterable[str]): All names that it may speak of.
        key (str): Where the pattern was given, for errors.

    Raises:
        ValueError: If it is no regular expression, or takes longer than
            :data:`PATTERN_SECONDS`. Only the main thread can keep the time.
    """
    try:
        with _time_limit(PATTERN_SECONDS):
            return [x for x in names if re.fullmatch(pattern, x)]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'{key}: {shown(pattern)} is not a regular '
                         f'expression: {error}') from None
    except TimeoutError:
        raise ValueError(
            f'{key}: matching {shown(pattern)} takes more than '
            f'{PATTERN_SECONDS:g} s: it tries too many ways. Do not repeat '
            'what repeats itself, as (a+)+ does') from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError after some seconds. Python's regular expressions
    look for signals while they match; threads would wait for them."""
    if (threading.current_thread() is not threading.main_thread()
            or not hasattr(signal, 'setitimer')):
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, end) or signal.SIG_DFL
    # again and again: what collects garbage swallows an error
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, .5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


def argument(convert: Callable[[str], Any],
             rule: Rule) -> Callable[[str], Any]:
    """The ``type`` of a command line's argument: argparse names the option,
    and this what it may be."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text
        if not rule.allows(value):
            raise argparse.ArgumentTypeError(
                f'must be {rule.words}, but got {text!r}')
        return value

    return parse


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; of ``--option=--``, argparse would make an empty
    list, past the type and the choices of the option."""
    for text in sys.argv[1:]:
        if text.startswith('--') and text.endswith('=--'):
            parser.error(f'argument {text[:-3]}: expected a value')
    return parser.parse_args()
