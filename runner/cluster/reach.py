"""How Ansible reaches a host, as lines of an ssh_config: each of its variables and settings is carried over or refused.

`OPTIONS` are the options of Ansible's ssh plugin with the variables that set them; of several that are set the last one
counts, and any variable counts before ansible.cfg and the environment. Lines come in the order of Ansible's command
line, since ssh takes the first value of each keyword.
"""

from __future__ import annotations

import difflib
import functools
import getopt
import getpass
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from runner.errors import UsageError, unknown
from runner.system import process

CARRIED, IGNORED = "carried over", "makes no difference here"


def is_true(value: Any) -> bool:
    """Whether Ansible reads `value` as a true boolean."""
    return str(value).strip().lower() in ("y", "yes", "on", "1", "true", "t", "1.0")


@dataclass(frozen=True)
class Option:
    """An option of Ansible's ssh plugin: its variables in Ansible's order, and what becomes of it.

    `fate` is CARRIED, IGNORED, or the reason why a value is refused. `secret`: its value is not read at all.
    `harmless` tells the values that are not refused, since they change nothing.
    """

    variables: tuple[str, ...]
    fate: str
    secret: bool = False
    harmless: Callable[[Any], bool] = lambda value: not value


_NO_PASSWORD = "nodes are reached with a key, never with a password: authorize a key there, and leave it out"
_NO_TOKEN = "a key that needs a PIN is not supported: load it into ssh-agent, and leave it out"
_NO_KEY_TEXT = "a key is read from a file or from ssh-agent: set ansible_ssh_private_key_file instead"

OPTIONS: Mapping[str, Option] = {
    "host": Option(
        (
            "inventory_hostname",
            "ansible_host",
            "ansible_ssh_host",
            "delegated_vars['ansible_host']",
            "delegated_vars['ansible_ssh_host']",
        ),
        CARRIED,
    ),
    "port": Option(("ansible_port", "ansible_ssh_port"), CARRIED),
    "remote_user": Option(("ansible_user", "ansible_ssh_user"), CARRIED),
    "private_key_file": Option(("ansible_private_key_file", "ansible_ssh_private_key_file"), CARRIED),
    "ssh_args": Option(("ansible_ssh_args",), CARRIED),
    "ssh_common_args": Option(("ansible_ssh_common_args",), CARRIED),
    "ssh_extra_args": Option(("ansible_ssh_extra_args",), CARRIED),
    "timeout": Option(("ansible_ssh_timeout",), CARRIED),
    "host_key_checking": Option(
        ("ansible_host_key_checking", "ansible_ssh_host_key_checking"),
        "host keys are always checked: pin them (`ssh-keyscan HOST > known_hosts` beside the inventory), leave it out",
        harmless=lambda value: value is None or is_true(value),
    ),
    "ssh_executable": Option(
        ("ansible_ssh_executable",),
        "`ssh` is started from PATH: put it first there",
        harmless=lambda value: not value or shutil.which(str(value)) == shutil.which("ssh"),
    ),
    "password": Option(("ansible_password", "ansible_ssh_pass", "ansible_ssh_password"), _NO_PASSWORD, True),
    "password_mechanism": Option(("ansible_ssh_password_mechanism",), IGNORED),
    "sshpass_prompt": Option(("ansible_sshpass_prompt",), IGNORED),
    "pkcs11_provider": Option(("ansible_ssh_pkcs11_provider",), _NO_TOKEN),
    "private_key": Option(("ansible_private_key", "ansible_ssh_private_key"), _NO_KEY_TEXT, True),
    "private_key_passphrase": Option(
        ("ansible_private_key_passphrase", "ansible_ssh_private_key_passphrase"), _NO_KEY_TEXT, True
    ),
    # How Ansible copies, retries, multiplexes and reports; `runner` has its own ways.
    "sftp_executable": Option(("ansible_sftp_executable",), IGNORED),
    "scp_executable": Option(("ansible_scp_executable",), IGNORED),
    "scp_extra_args": Option(("ansible_scp_extra_args",), IGNORED),
    "sftp_extra_args": Option(("ansible_sftp_extra_args",), IGNORED),
    "sftp_batch_mode": Option(("ansible_sftp_batch_mode",), IGNORED),
    "ssh_transfer_method": Option(("ansible_ssh_transfer_method",), IGNORED),
    "reconnection_retries": Option(("ansible_ssh_retries",), IGNORED),
    "pipelining": Option(("ansible_pipelining", "ansible_ssh_pipelining"), IGNORED),
    "control_path": Option(("ansible_control_path",), IGNORED),
    "control_path_dir": Option(("ansible_control_path_dir",), IGNORED),
    "use_tty": Option(("ansible_ssh_use_tty",), IGNORED),
    "verbosity": Option(("ansible_ssh_verbosity",), IGNORED),
}

# Ansible's connections, and whether each is to this machine.
_CONNECTIONS = {
    "ssh": False, "ansible.builtin.ssh": False, "smart": False, "local": True, "ansible.builtin.local": True,
}  # fmt: skip
_NO_SUDO_PASSWORD = "`sudo` must not ask for a password there: allow that (NOPASSWD), and leave it out"
BECOME: Mapping[str, Option] = {
    "become": Option(("ansible_become",), CARRIED),
    "become_user": Option(("ansible_become_user", "ansible_sudo_user"), CARRIED),
    "become_method": Option(
        ("ansible_become_method",),
        "only sudo is supported: leave it out",
        harmless=lambda value: value in (None, "", "sudo", "ansible.builtin.sudo"),
    ),
    "become_exe": Option(("ansible_become_exe", "ansible_sudo_exe"), "`sudo` is started from PATH: leave it out"),
    "become_flags": Option(("ansible_become_flags", "ansible_sudo_flags"), "`sudo` has its own: leave it out"),
    "become_pass": Option(
        ("ansible_become_password", "ansible_become_pass", "ansible_sudo_pass"), _NO_SUDO_PASSWORD, True
    ),
    "sudo_chdir": Option(("ansible_sudo_chdir",), IGNORED),
}
_MISSPELT = 0.93  # how like one of Ansible's a name is if it is meant to be that: one or two letters are wrong

# What the options of `ssh` mean as keywords of ssh_config; "" for those that make no difference here, see ssh(1).
_LETTERS: Mapping[str, str] = {
    "4": "AddressFamily inet", "6": "AddressFamily inet6", "A": "ForwardAgent yes", "a": "ForwardAgent no",
    "b": "BindAddress", "B": "BindInterface", "c": "Ciphers", "F": "Include", "i": "IdentityFile",
    "I": "PKCS11Provider", "J": "ProxyJump", "K": "GSSAPIAuthentication yes", "k": "GSSAPIDelegateCredentials no",
    "l": "User", "m": "MACs", "o": "", "p": "Port", "P": "Tag",
    "C": "", "q": "", "v": "", "x": "", "X": "", "Y": "", "T": "", "t": "", "n": "", "M": "", "S": "", "E": "", "y": "",
}  # fmt: skip
_GRAMMAR = "1246AaCfGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:P:p:Q:R:S:W:w:"

# Keywords of ssh_config, in lower case. Those in neither table are carried over, if ssh knows them.
_MOOT = frozenset((
    "batchmode", "compression", "controlmaster", "controlpath", "controlpersist", "enableescapecommandline",
    "escapechar", "exitonforwardfailure", "forwardx11", "forwardx11timeout", "forwardx11trusted", "hashknownhosts",
    "loglevel", "logverbose", "numberofpasswordprompts", "obscurekeystroketiming", "requesttty",
    "serveralivecountmax", "serveraliveinterval", "streamlocalbindmask", "streamlocalbindunlink", "syslogfacility",
    "tcpkeepalive", "updatehostkeys", "visualhostkey", "checkhostip", "xauthlocation", "passwordauthentication",
    "kbdinteractiveauthentication", "challengeresponseauthentication",
))  # fmt: skip
_OWN_COMMAND = "`runner` starts its own commands on the nodes, and nothing else: leave it out"
_OWN_PLACE = "an option cannot begin a section: write the keyword itself"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys((
        "remotecommand", "sessiontype", "stdinnull", "forkafterauthentication", "localcommand", "permitlocalcommand",
        "localforward", "remoteforward", "dynamicforward", "tunnel", "tunneldevice", "gatewayports",
        "permitremoteopen",
    ), _OWN_COMMAND),
    "host": _OWN_PLACE,
    "match": _OWN_PLACE,
}  # fmt: skip
_FILES = ("identityfile", "certificatefile")
_NOTHING = ("no", "false", "none", "default")  # the values of those above that ask for nothing
_CHECKED = ("yes", "true", "ask")
_KEYWORD = re.compile(r"\s*([A-Za-z0-9]+)(?:\s*=\s*|\s+)(.*\S)\s*")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True)
class Reach:
    """How one host is reached.

    `user` None: as ssh chooses. `options` are lines of an ssh_config. `known_hosts_files` are the files that the
    inventory names instead of the user's own, `host_key_alias` a further name under which they may have its key.
    `become` is the user that Ansible becomes there, None if it stays the one that logs in.
    """

    address: str
    port: int
    user: str | None
    key_file: str | None
    local: bool
    options: tuple[str, ...]
    known_hosts_files: tuple[str, ...]
    host_key_alias: str | None
    become: str | None


def option_of(variable: str) -> str | None:
    """The option of Ansible's ssh or sudo plugin that `variable` sets, if any."""
    return _BY_VARIABLE.get(variable)


def relevant(name: str) -> bool:
    """Whether the variable `name` may say how a host is reached."""
    return name in _BY_VARIABLE or name == "ansible_connection" or name.startswith("ansible_ssh_")


_ALL: Mapping[str, Option] = {**OPTIONS, **BECOME}
_BY_VARIABLE = {variable: name for name, option in _ALL.items() for variable in option.variables}


def reach(where: str, name: str, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> Reach:
    """How Ansible reaches the host `name`.

    `variables` are the host's; `settings` are those of ansible.cfg and the environment by the plugin's option, beside
    `transport` and `become`. `where` names the host in errors. Raises UsageError for what cannot be carried over.
    """
    for variable in variables:
        # Others are the inventory's own, such as ansible_ssh_public_key_file, which Ansible knows as little.
        misspelt = difflib.get_close_matches(variable, _BY_VARIABLE, 1, _MISSPELT)
        if variable.startswith("ansible_ssh_") and misspelt and variable not in _BY_VARIABLE:
            raise unknown("variable", variable, misspelt, where)
    if _is_local(where, variables, settings):
        address = _set(where, "host", variables, settings)[1] or name
        return Reach(str(address), 22, None, None, True, (), (), None, None)
    for option, row in OPTIONS.items():
        _refuse(where, option, row, variables, settings)
    return _Reading(where, name, variables, settings).reach()


def _is_local(where: str, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    value = variables.get("ansible_connection") or settings.get("transport") or "ssh"
    if value not in _CONNECTIONS:
        raise UsageError(f"{where}: ansible_connection {value!r} is not supported: nodes are reached by ssh, or local")
    return _CONNECTIONS[str(value)]


def _set(where: str, option: str, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, Any]:
    """The name of what sets an option, and the value; None if nothing does. The last variable counts, as in Ansible."""
    for variable in reversed(_ALL[option].variables):
        if variables.get(variable) is not None:
            return variable, variables[variable]
    return f"{option} of ansible.cfg or the environment", settings.get(option)


def _refuse(where: str, option: str, row: Option, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if row.fate in (CARRIED, IGNORED):
        return
    source, value = _set(where, option, variables, settings)
    if not row.harmless(value):
        raise UsageError(f"{where}: {source}: {row.fate}")  # without its value, which may be a secret


class _Reading:
    """One host's variables as lines of an ssh_config."""

    def __init__(self, where: str, name: str, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.where, self.name, self.variables, self.settings = where, name, variables, settings
        self.files: list[str] = []
        self.host: str | None = None
        self.alias: str | None = None
        self.lines: list[str] = []

    def reach(self) -> Reach:
        address, port, key_file, user = (
            self._text(option) for option in ("host", "port", "private_key_file", "remote_user")
        )
        if port is not None and not (port.isdecimal() and 0 < int(port) < 65536):
            raise UsageError(f"{self.where}: {self._value('port')[0]} = {port!r}: not a port, which is 1 to 65535")
        self._arguments("ssh_args")
        if port:
            self.lines.append(f"Port {port}")
        if user:
            self.lines.append(f"User {user}")
        key_file = _whole(key_file)
        if key_file:
            self.lines.append(f'IdentityFile "{key_file}"')
        if timeout := self._text("timeout"):
            if not timeout.isdecimal():
                raise UsageError(f"{self.where}: {self._value('timeout')[0]} = {timeout!r}: not a number of seconds")
            self.lines.append(f"ConnectTimeout {timeout}")
        self._arguments("ssh_common_args")
        self._arguments("ssh_extra_args")
        first = {keyword.lower(): value for keyword, value in (line.split(None, 1) for line in reversed(self.lines))}
        identity = first.get("identityfile")
        if not first.get("port", "22").isdecimal():
            raise UsageError(f"{self.where}: Port {first['port']}: write the number of the port")
        address = (self.host or "%h").replace("%h", address or self.name)
        return Reach(
            address=address,
            port=int(first.get("port", "22")),
            user=_bare(first.get("user")),
            key_file=key_file or _bare(identity),
            local=False,
            options=tuple(_given(line, address) for line in self.lines),
            known_hosts_files=tuple(self.files),
            host_key_alias=self.alias,
            become=self._become(_bare(first.get("user"))),
        )

    def _value(self, option: str) -> tuple[str, Any]:
        return _set(self.where, option, self.variables, self.settings)

    def _text(self, option: str) -> str | None:
        source, value = self._value(option)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UsageError(f"{self.where}: {source} is not text but {type(value).__name__}")
        return str(value)

    def _become(self, user: str | None) -> str | None:
        if not is_true(self._value("become")[1]):
            return None
        target = self._text("become_user") or "root"
        if target == (user or getpass.getuser()):
            return None
        for option, row in BECOME.items():
            _refuse(self.where, option, row, self.variables, self.settings)
        return target

    def _arguments(self, option: str) -> None:
        """Add the lines of an option that holds arguments of `ssh`."""
        source, text = self._value(option)[0], self._text(option)
        where = f"{self.where}: {source}"
        for line in _arguments(where, text or ""):
            keyword, value = line.split(None, 1)
            name = keyword.lower()
            if name in ("userknownhostsfile", "globalknownhostsfile"):
                files = [_whole(file) for file in shlex.split(value)]
                self.files += [file for file in files if file not in ("none", "/dev/null", *self.files)]
            elif name == "hostname":
                self.host = self.host or _bare(value)
            elif name == "hostkeyalias":
                self.alias = self.alias or _bare(value)
            elif name == "stricthostkeychecking":
                if value.lower() not in _CHECKED:
                    raise UsageError(f"{where}: {keyword} {value}: {OPTIONS['host_key_checking'].fate}")
            elif name in _REFUSED and value.lower() not in _NOTHING:
                raise UsageError(f"{where}: {keyword}: {_REFUSED[name]}")
            elif name not in _MOOT and name not in _REFUSED:
                if reason := _ssh_refuses(line):
                    raise UsageError(f"{where}: ssh refuses {line!r}: {reason}")
                file = _bare(value) or value
                moved = name in _FILES and _whole(file) != file
                self.lines.append(f'{keyword} "{_whole(file)}"' if moved else line)


@overload
def _whole(file: str) -> str: ...
@overload
def _whole(file: str | None) -> str | None: ...
def _whole(file: str | None) -> str | None:
    """The path of a file that the inventory names, for an ssh in any folder: a relative one begins here, as it does
    for Ansible.
    """
    if not file or file == "none" or file.startswith(("/", "~", "%", "$")):  # which ssh completes itself
        return file
    return str(Path(file).absolute())


def _given(line: str, address: str) -> str:
    """`line` for another name on the command line: Ansible gives ssh the address, which `%n` there stands for."""
    escaped = address.replace("%", "%%")
    return re.sub("%(.)", lambda match: escaped if match[1] == "n" else match[0], line)


def _bare(value: str | None) -> str | None:
    """A value of ssh_config without the quotes that may be around it."""
    return value[1:-1] if value and len(value) > 1 and value[0] == value[-1] == '"' else value


def _arguments(where: str, text: str) -> Iterator[str]:
    """Arguments of `ssh` as lines of an ssh_config, `Keyword value`, in their order."""
    try:
        options, rest = getopt.getopt(shlex.split(text), _GRAMMAR)
    except (ValueError, getopt.GetoptError) as error:
        raise UsageError(f"{where}: {str(error).lower()}; found {text!r}") from None
    if rest:
        raise UsageError(f"{where}: {rest[0]!r} is not an option of ssh: quote what belongs together; found {text!r}")
    for option, value in options:
        letter = option[1:]
        if letter not in _LETTERS:
            raise UsageError(f"{where}: {option}: {_OWN_COMMAND}")
        if _CONTROL.search(value):
            raise UsageError(f"{where}: {option} {value!r} has characters that are not allowed there")
        if letter == "o":
            match = _KEYWORD.fullmatch(value)
            if match is None:
                raise UsageError(f"{where}: -o {value!r} has no value: write -o Keyword=value")
            yield f"{match[1]} {match[2]}"
        elif letter == "F":
            # "none" stands for a file without lines, instead of the user's own as any other.
            yield f'Include "{Path("/dev/null" if value == "none" else value).expanduser().absolute()}"'
        elif _LETTERS[letter]:
            quoted = f'"{value}"' if " " in value else value
            yield f"{_LETTERS[letter]} {quoted}".rstrip()


@functools.cache
def _ssh_refuses(line: str) -> str | None:
    """Why ssh itself refuses a line of its configuration, an unknown keyword or value; connects to nothing."""
    keyword, value = line.split(None, 1)
    if keyword.lower() == "include":  # not a matter of the inventory what is in there
        return None
    outcome = process.run(["ssh", "-G", "-F", "/dev/null", "-o", f"{keyword}={value}", "localhost"], timeout_s=10)
    return outcome.last_line.rpartition("line 0: ")[2].rstrip(".") if outcome.rc != 0 else None
