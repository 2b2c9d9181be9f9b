"""Explain errors of object stores in one line that holds no secret.

obstore's messages quote the request, whose address may hold a password, and the server's answer, which may
hold a token. Its exceptions have types for single objects only: the error of a list, which is the first
request of every run, is a GenericError whatever its status. So the few facts that a user needs are picked
from the text: status, code and region, each only where it looks like one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping

PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_"}
"""Beginning of the names of environment variables that a scheme's stores are opened with."""
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")

_CODE = r"(?=[A-Za-z]{2,40}<)(?:[A-Z]{1,4}[a-z]+){1,6}[A-Z]{0,4}"
"""A code such as NoSuchKey or InvalidURI, up to its end; any other text may be a secret."""
_REGION = r"[a-z]{2,4}(?:-[a-z]{2,12}){1,3}-\d{1,2}"


class ObjectStoreError(OSError):
    """An object store that cannot be reached, or that refuses."""


def is_missing_bucket(error: Exception) -> bool:
    """Tell whether an error says that there is no such bucket."""
    return "NoSuchBucket" in str(error)


def is_refusal(error: Exception) -> bool:
    """Tell whether an error is an answer of the store to a faulty request (status 4xx)."""
    return "status code: 4" in str(error)


def explain_error(error: Exception, bucket: str) -> str:
    """Explain an error of obstore without repeating anything of the request."""
    text = str(error)
    if is_missing_bucket(error):
        return f"there is no bucket {bucket!r}"
    # obstore asks these addresses for credentials, on machines of the provider.
    if "169.254.169.254" in text or "metadata.google" in text:
        return (
            "no credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "GOOGLE_APPLICATION_CREDENTIALS), and this machine has none of its own"
        )
    answer = _status_and_code(text)
    details = f" ({answer})" if answer else ""
    if _is_elsewhere(text):
        region = re.search(rf"<Region>({_REGION})</Region>|expecting '({_REGION})'", text)
        setting = f"AWS_REGION={region[1] or region[2]}" if region else "AWS_REGION to that one"
        return f"bucket {bucket!r} is in another region{details}: set {setting}"
    if any(denial in text for denial in ("403 Forbidden", "401 Unauthorized", "AccessDenied")):
        return f"access to bucket {bucket!r} is denied{details}: look at the credentials in the environment"
    if answer:
        return f"the object store refuses: {answer}"
    if "Generic Config error" in text or "builder error" in text:
        return _explain_setting(text)
    line = re.split(r"Debug source|\n|<", text)[0].strip()  # a dump of the request follows
    return f"the object store does not answer: {re.sub(r'//[^/@ ]*@', '//', line)[:300]}"


def _status_and_code(text: str) -> str:
    """Extract status and code of an answer, as in ``400 Bad Request, ExpiredToken``; empty without any."""
    status = re.search(r"status code: (\d{3}[A-Za-z ]*)", text)
    code = re.search(rf"<Code>({_CODE})</Code>", text)
    return ", ".join(match[1].strip() for match in (status, code) if match)


def _is_elsewhere(text: str) -> bool:
    """Tell whether an answer says that the bucket is in another region than the request names."""
    if "redirect without LOCATION" in text or "<Code>PermanentRedirect</Code>" in text:
        return True
    return "<Code>AuthorizationHeaderMalformed</Code>" in text and re.search(r"[Rr]egion", text) is not None


def _explain_setting(text: str) -> str:
    """Name the environment variable whose value obstore can't use."""
    kind = re.search(r"as (boolean|Duration|\w*size)\b", text)
    suffix = f", where a {kind[1].lower()} is expected" if kind else ""
    value = re.search(r'"([^"]*)"', text)
    names = [
        name
        for name in sorted(os.environ)
        if value and os.environ[name] == value[1] and name.startswith(tuple(PREFIXES.values()))
    ]
    return f"{' or '.join(names) or 'a variable AWS_… or GOOGLE_…'} has a value that can't be used{suffix}"


def fault_of_environment(settings: Mapping[str, str]) -> str:
    """Say which variable obstore would panic at or misread, before it does; empty where there is none.

    No value is repeated: an address may hold a password, and any variable a key.
    """
    insecure = settings.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on", "y", "t")
    for name in ENDPOINTS:
        endpoint = settings.get(name)
        if endpoint is None:
            continue
        if not _is_endpoint(endpoint):
            return (
                f"{name} is no address of a server: expected http:// or https://, a host and, if need be, "
                "a port, as in https://127.0.0.1:9000; no user, no password, no '?' or '#'"
            )
        if endpoint.lower().startswith("http://") and not insecure:
            return f"the endpoint in {name} is not encrypted (http://); AWS_ALLOW_HTTP=true allows it"
    for name in CREDENTIALS:
        if not re.fullmatch("[!-~]*", settings.get(name, "")):
            return f"{name} holds a space, the end of a line or a letter that can't be in it"
    for name in REGIONS:
        if not re.fullmatch("[A-Za-z0-9._-]*", settings.get(name, "")):
            return f"{name} is no name of a region: expected one such as eu-central-1"
    return ""


def _is_endpoint(text: str) -> bool:
    """Tell whether a text is ``http[s]://HOST[:PORT][/PATH]`` and no more."""
    host, path = r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", r"(?:/[!-~]*)?"
    match = re.fullmatch(rf"(?i:https?)://({host})(?::(\d{{1,5}}))?{path}", text)
    if match is None or re.search("[?#@]", text) or int(match[2] or 1) not in range(1, 2**16):
        return False
    with contextlib.suppress(ValueError):
        if match[1].startswith("["):
            ipaddress.IPv6Address(match[1].strip("[]"))
        return True
    return False
