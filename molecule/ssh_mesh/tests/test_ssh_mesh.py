"""What the role leaves on a node: every other node answers, by every name, for both users."""

import pytest

NAMES = [f"fukushimadc-02-hgx-{number:04d}" for number in (1, 2, 3)]
ALIASES = ["node001", "node002", "node003"]


@pytest.mark.parametrize("user", ["root", "amy"])
def test_ssh_reaches_every_node_by_name_alias_and_address(host, user):
    hosts = host.check_output("getent hosts %s %s %s", *NAMES).splitlines()
    spellings = [*NAMES, *ALIASES, *(line.split()[0] for line in hosts)]
    loop = "for node in %s; do runuser -u %s -- ssh -n -o BatchMode=yes $node hostname || exit 1; done"
    result = host.run(loop % (" ".join(spellings), user))
    assert (result.stdout.split(), result.stderr) == (NAMES * 3, "")


def test_a_host_that_is_not_pinned_is_refused(host):
    # testinfra takes ssh's own status, 255, for a failure of its connection.
    result = host.run("ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -p 44222 127.0.0.1 true || exit 1")
    assert "Host key verification failed" in result.stderr and result.rc == 1


@pytest.mark.parametrize("home", ["/root", "/home/amy"])
def test_the_private_key_is_the_nodes_own_and_nothing_was_asked(host, home):
    assert not host.file(f"{home}/.ssh/known_hosts").exists
    assert host.file(f"{home}/.ssh/id_ed25519").mode == 0o600
    own = host.check_output("ssh-keygen -y -f %s/.ssh/id_ed25519", home).split()[1]
    lines = host.file(f"{home}/.ssh/authorized_keys").content_string.splitlines()
    keys = [line.split()[1] for line in lines if "shakedown-mesh" in line]
    assert own in keys and len(set(keys)) == 3


def test_the_files_of_the_user_are_the_users_and_other_keys_stay(host):
    files = "/home/amy/.ssh /home/amy/.ssh/id_ed25519 /home/amy/.ssh/id_ed25519.pub /home/amy/.ssh/authorized_keys"
    assert host.check_output(f"stat -c %U {files}").split() == ["amy"] * 4
    mine = "# amy's own\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGretx4I"
    assert host.file("/home/amy/.ssh/authorized_keys").content_string.startswith(mine)
