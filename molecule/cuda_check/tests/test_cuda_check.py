"""What the role leaves on a node."""


def test_fact(host):
    assert host.file("/etc/ansible/facts.d/cuda.fact").content_string == "{}\n"
