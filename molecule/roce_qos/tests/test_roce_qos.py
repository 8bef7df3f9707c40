"""What the role leaves on a node: settings of the NICs, in the words of each tool, and a fact that says so."""

import json

ROOT = "/srv/stand-in"
NICS = {"mlx5_0": "enp26s0np0", "mlx5_1": "enp60s0np0"}


def test_the_fact_names_both_ports_and_the_index_that_was_found(host):
    fact = json.loads(host.file("/etc/ansible/facts.d/roce.fact").content_string)
    assert fact["hca"] == ["mlx5_0:1", "mlx5_1:1"]
    assert (fact["gid_index"], fact["traffic_class"]) == (3, 106)
    for nic in fact["nics"]:
        gid = host.file(f"{ROOT}/sys/class/infiniband/{nic['device']}/ports/1/gids/{nic['gid_index']}")
        assert gid.content_string.strip() == nic["gid"]
        assert (nic["mtu"], nic["roce_mtu"], nic["rate_gbit_per_s"]) == (9000, 4096, 400)


def test_the_nics_hold_every_setting(host):
    for device, netdev in NICS.items():
        state = json.loads(host.file(f"{ROOT}/qos/{netdev}.json").content_string)
        assert state["pfc"] == [0, 0, 0, 1, 0, 0, 0, 0]
        assert [26, 3] in state["dscp"]
        values = [f"net/{netdev}/ecn/roce_{point}/enable/3" for point in ("np", "rp")]
        values += [f"net/{netdev}/mtu", f"infiniband/{device}/tc/1/traffic_class"]
        assert [host.file(f"{ROOT}/sys/class/{path}").content_string for path in values] == ["1", "1", "9000", "106"]


def test_management_is_left_as_it_was(host):
    state = json.loads(host.file(f"{ROOT}/qos/enp90s0f0np0.json").content_string)
    assert (state["pfc"], state["dscp"]) == ([0] * 8, [])
    assert host.file(f"{ROOT}/sys/class/net/enp90s0f0np0/mtu").content_string == "1500\n"


def test_rails_of_one_subnet_answer_for_their_own_addresses(host):
    for netdev in NICS.values():
        conf = f"{ROOT}/proc/sys/net/ipv4/conf/{netdev}"
        values = [host.file(f"{conf}/{name}").content_string for name in ("arp_announce", "arp_ignore", "rp_filter")]
        assert values == ["2", "1", "2"]
        assert (
            f"net.ipv4.conf.{netdev}.rp_filter = 2\n"
            in host.file("/etc/sysctl.d/90-shakedown-roce.conf").content_string
        )


def test_the_service_comes_with_every_start_and_has_nothing_left_to_do(host):
    assert host.service("shakedown-roce").is_enabled
    assert host.run("systemd-analyze verify shakedown-roce.service").stderr == ""
    assert host.run("/usr/local/lib/shakedown/roce_apply.py /etc/shakedown/roce.json").stdout == ""


def test_the_real_dcb_refuses_a_device_without_dcb(host):
    code = (
        "import sys; sys.path.insert(0, '/usr/local/lib/shakedown'); import roce_apply as r; "
        "print(r.qos_of_dcb('eth0', r.run_command)[1])"
    )
    answer = host.run(f'env PATH=/usr/sbin:/usr/bin python3 -B -c "{code}"')
    assert answer.stdout == "dcb pfc: Attribute read: Operation not supported\n"
