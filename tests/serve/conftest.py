"""Clients of servers on this machine, which all want the certificates of the world's."""

import functools
import ssl
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def certificates_are_read_once() -> Iterator[None]:
    """Each client of HTTP reads them anew, which takes as long as all else that it does here."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(ssl.create_default_context)
        patch.setattr(ssl, "create_default_context", once)
        yield
