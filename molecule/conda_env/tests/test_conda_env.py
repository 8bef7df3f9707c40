"""What the role leaves on a node."""

import json

PREFIX = "/opt/shakedown/env"
PYTHON = f"{PREFIX}/bin/python"


def test_the_environment_has_exactly_the_versions_of_the_lock(host):
    argv = f'{PYTHON} -c \'from importlib.metadata import version as v; print(v("click"), v("packaging"))\''
    assert host.check_output(argv) == "8.5.1 26.3"


def test_this_package_answers_from_it_as_it_will_be_started(host):
    answer = host.run(f'echo \'{{"kind": "nonsense"}}\' | {PYTHON} -m runner.node')
    assert answer.rc == 2
    assert "unknown request 'nonsense'" in answer.stderr


def test_the_package_comes_from_the_wheel_and_not_from_the_controllers_checkout(host):
    assert host.check_output(f"cd / && {PYTHON} -c 'import runner; print(runner.__file__)'").startswith(PREFIX + "-")


def test_it_is_switched_by_a_link_to_a_complete_sibling(host):
    place = host.check_output(f"readlink -f {PREFIX}")
    stamp = json.loads(host.file(f"{place}/.shakedown.json").content_string)
    assert place == f"{PREFIX}-{stamp['hash'][:12]}"
    assert stamp["packages"]["click"] == "8.5.1"


def test_every_user_may_use_it(host):
    assert host.check_output(f"su nobody -s /bin/sh -c '{PYTHON} -c \"import click; print(1)\"'") == "1"


def test_the_fact_says_what_is_installed(host):
    fact = json.loads(host.check_output("cat /etc/ansible/facts.d/conda.fact"))
    assert fact["prefix"] == PREFIX
    assert fact["python"].startswith("3.11.")
    assert fact["profile"] == "lock"
    assert fact["versions"]["shakedown"]


def test_nothing_of_the_building_is_left(host):
    assert host.check_output("ls /opt/shakedown | sed 's/-.*//' | sort") == "env\nenv\nwheels"
    assert not host.file(f"{PREFIX}/tmp").exists
