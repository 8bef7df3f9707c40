"""Checks whether this node can use a package index, before anything is downloaded."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
import ssl
import stat
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode

PIP_CONFIGURATION = ("/etc/pip.conf", "/root/.config/pip/pip.conf", "/root/.pip/pip.conf")


def check_url(phase):
    """Record a problem where the index's URL contains credentials: settings are shown and logged."""
    if "@" in urllib.parse.urlsplit(phase.want["index_url"]).netloc:
        phase.problem(
            "conda_env_index_url",
            "a URL without credentials",
            "one with credentials",
            "put them into a netrc file on the nodes, mode 0600, and its path into conda_env_netrc",
        )


def check_index(phase, lock):
    """Record a problem for each index that the settings and `lock` (a Lock) need and that this node cannot use."""
    want = phase.want
    urls = [want["index_url"]] if want["source"] == "mirror" else [default_index(), lock.index]
    if want["source"] == "mirror" and not want["index_url"]:
        phase.problem("conda_env_index_url", "the mirror's URL", "none", "set it, or conda_env_source: online")
    if want["netrc"] and (wrong := netrc_error(want["netrc"])):
        phase.problem(f"conda_env_netrc {want['netrc']}", "a netrc file of mode 0600", wrong, "chmod 600, as root")
        return
    for url in filter(None, urls):
        if "@" in urllib.parse.urlsplit(url).netloc:
            continue  # pip's own configuration, or already reported; a URL with credentials must not be shown
        if reason := unreachable(url, want["netrc"]):
            phase.problem(f"package index {url}", "reachable", reason, "check the URL, proxy and firewall")


def netrc_error(path):
    """The reason why the netrc file `path` cannot be used, "" where it can; never any of its content."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077:
            return f"mode {mode:04o}"
        netrc.netrc(path)
    except OSError as error:
        return (error.strerror or "unreadable").lower()
    except netrc.NetrcParseError as error:
        return f"line {error.lineno} is not valid"
    return ""


def default_index(files=PIP_CONFIGURATION, environment=os.environ):
    """The URL of the index that this node's pip uses: from PIP_INDEX_URL, pip.conf, else PyPI."""
    parser = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error):
        parser.read(files)
    configured = parser.get("global", "index-url", fallback="https://pypi.org/simple/")
    return environment.get("PIP_INDEX_URL") or configured


def unreachable(url, netrc_file="", timeout_s=15):
    """The reason why the index at `url` cannot be used, "" where it can."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        return "" if os.path.isdir(parts.path) else "no such folder"
    request = urllib.request.Request(url.rstrip("/") + "/", headers={"User-Agent": "pip"})
    if netrc_file and (login := netrc.netrc(netrc_file).authenticators(parts.hostname or "")):
        request.add_header("Authorization", "Basic " + b64encode(f"{login[0]}:{login[2]}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        # Some mirrors have no list of all packages: it must answer and accept the credentials.
        return f"status {error.code}" if error.code in (401, 403) or error.code >= 500 else ""
    except (urllib.error.URLError, ssl.SSLError, TimeoutError, ConnectionError, ValueError) as error:
        return str(getattr(error, "reason", None) or error)
