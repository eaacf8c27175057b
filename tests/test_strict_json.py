"""Every JSON reader can read our JSON, and damaged lines of metrics are detected."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.json_io import as_float, dumps, metrics_row, numbers, with_nan

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refuse(constant):
    raise AssertionError(constant)


@given(values)
def test_the_text_is_strict_json_and_finite_values_survive(value):
    read = json.loads(dumps(value), parse_constant=refuse)
    assert dumps(read) == dumps(value)
    if math.isfinite(sum(_floats(value))):
        assert read == value


def _floats(value):
    if isinstance(value, float):
        return [value * 0]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for child in children for number in _floats(child)]


def test_what_is_not_finite_is_null_and_comes_back_as_nan():
    assert (
        dumps({"a": math.nan, "b": [math.inf, 1.0], "c": (-math.inf,)}) == '{"a": null, "b": [null, 1.0], "c": [null]}'
    )
    assert math.isnan(with_nan({"a": [1, None]})["a"][1])


@pytest.mark.parametrize(
    "line",
    [
        b"", b"nonsense", b"{}", b"null", b"[]", b"5", b"true", b'"text"', b"\xff\xfe", b"\0\0\0", b'{"kind": "train"}',
        b'{"step": 1}', b'{"kind": "train", "step": "1"}', b'{"kind": "train", "step": 1.5}',
        b'{"kind": "train", "step": true}', b'{"kind": "train", "step": -1}', b'{"kind": "train", "step": null}',
        b'{"kind": 1, "step": 1}', b'{"kind": "train", "step": 1', b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}",
        b'{"kind": "train", "step": ' + b"1" * 4000 + b"}",
    ],
    ids=lambda line: str(line[:30]),
)  # fmt: skip
def test_a_damaged_line_is_none(line):
    assert metrics_row(line) is None


def test_a_sound_line_is_its_object():
    assert metrics_row(b'{"kind": "train", "step": 1, "loss": 2.5}') == {"kind": "train", "step": 1, "loss": 2.5}
    assert math.isnan(metrics_row(b'{"kind": "train", "step": 1, "loss": NaN}')["loss"])


@given(st.binary())
def test_any_bytes_are_a_row_or_none(line):
    row = metrics_row(line)
    assert row is None or isinstance(row["step"], int)


def test_values_of_rows_as_numbers():
    assert numbers([1, 2.5]) == [1.0, 2.5]
    assert numbers(3) == [3.0]
    assert all(map(math.isnan, numbers([None, "x", True, 10**400])))
    assert math.isnan(as_float(None))
