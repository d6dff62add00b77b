"""What is hidden, and what is not."""

from __future__ import annotations

import io
import json

import pytest

from mergekit_ray.core.errors import ConfigError, InternalError, Problem
from mergekit_ray.core.plan import InputModel, Plan
from mergekit_ray.core.secrets import RedactedStream, holds_credential, redact, redact_data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://user:token@org/name@main", "hf://…@org/name@main"),
        ("at s3://key:se/cr+et@bucket/p: no", "at s3://…@bucket/p: no"),
        ("file://user:x@/tmp", "file://…@/tmp"),
        ("'ray://user:p@ss@host:10001'", "'ray://…@host:10001'"),
        ("user:pass@host:6379", "…@host:6379"),
        ("http://user@host", "http://…@host"),
        ("found 'hf://user:tok", "found 'hf://…"),  # cut off
        ("/k?X-Amz-Date=1&X-Amz-Signature=ab%2Fc: no", "/k?X-Amz-Date=1&X-Amz-Signature=…: no"),
        ("https://a/b?sig=x&se=2", "https://a/b?sig=…&se=2"),
        ("is hf_" + "a1" * 17, "is …"),
        ("{'Authorization': 'Basic dXNlcjpzZWNyZXQ='}", "{'Authorization': 'Basic …'}"),
        ("Bearer abcdefghijkl", "Bearer …"),
    ],
)
def test_credentials_are_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("hf://gpt2@main", "hf://gpt2@refs/pr/1", "hf://org/name@v1.0+s3://bucket/a@b", "org/name@main"),
        *("s3://bucket/a b@c", "s3://bucket: no such bucket as a@b", "file:///a:b/c@d", "http://localhost:9000/a@b"),
        *("http://[::1]:9000/a@b", "127.0.0.1:6379", "/folder/a:b@c", "ray://head:10001", "s3://bucket/key=value"),
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_credential(text)


def test_values_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", 'planted"token')
    monkeypatch.setenv("HTTPS_PROXY", "http://user:pl%40nted-password@proxy:3128")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")  # too short to be told from a word
    assert redact('a planted"token') == "a …"
    assert redact(json.dumps({"a": 'planted"token'})) == '{"a": "…"}'
    assert redact("pl%40nted-password or pl@nted-password") == "… or …"
    assert redact("s3://testing/x") == "s3://testing/x"


def test_data_keeps_its_form() -> None:
    data = {"s3://k:s@b": ["s3://k:s@b", 1, None, ("x", 2.5)], "x": {"y": True}}
    assert redact_data(data) == {"s3://…@b": ["s3://…@b", 1, None, ("x", 2.5)], "x": {"y": True}}


def test_errors_hold_none() -> None:
    url = "s3://k:planted@b"
    error = ConfigError(url, where=url, remedy=url, problems=[Problem(url, url, url, url)])
    assert "planted" not in f"{error} {error!r} {vars(error)}"
    try:
        raise ValueError(url)
    except ValueError as cause:
        wrapped = InternalError.wrap(cause)
    assert "planted" not in f"{wrapped} {wrapped.traceback}"
    assert "ValueError: s3://…@b" in wrapped.traceback


def test_plans_hold_none() -> None:
    url = "s3://k:planted@b"
    model = InputModel("m0", url, "s3://b", {})
    plan = Plan({"m0": model}, (), {}, (), {"models": [url]}, 0, dropped={f"{url}: x": url}, warnings=(url,))
    assert "planted" not in json.dumps(plan.to_json())
    assert plan.recipe == {"models": ["s3://…@b"]}


def test_a_stream_is_as_before_but_for_credentials() -> None:
    inner = io.StringIO()
    stream = RedactedStream(inner)
    print("s3://k:secret@b", 1, file=stream, flush=True)
    stream.writelines(["hf://u:t@o\n"])
    assert inner.getvalue() == "s3://…@b 1\nhf://…@o\n"
    assert stream.isatty() is False
