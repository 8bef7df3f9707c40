#!/usr/bin/env bash
# Install the system packages that the product's two commands need, on Debian or Ubuntu.
#
#   install-system-packages.sh           what `runner testbed` and `make test` need
#   install-system-packages.sh python    only what making .venv needs (`make bench`)
#
# Does nothing, quickly, when all is there. Uses sudo unless it is run as root.
set -euo pipefail

packages=()
if [[ ${1:-} == python ]]; then
    # A python that is not the system's brings these two modules itself.
    "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3 python3-venv)
else
    # podman alone pulls in crun, which refuses cgroup v1; netavark calls iptables without depending on it.
    packages+=(podman runc netavark iptables debootstrap pdsh rsync openssh-client openssh-server)
    # mpirun of the nodes' own version; with its compiler, by which the stand-in for nccl-tests is built.
    packages+=(openmpi-bin libopenmpi-dev)
    # Ubuntu's chromium is a snap, for which a service must run: any browser of the family will do.
    if ! command -v chromium chromium-browser google-chrome >/dev/null; then
        packages+=(chromium)
    fi
fi
[[ ${#packages[@]} -gt 0 ]] || exit 0

installed=" $(dpkg-query --show --showformat '${Package}/${db:Status-Status} ' "${packages[@]}" 2>/dev/null || true)"
missing=()
for package in "${packages[@]}"; do
    [[ $installed == *" $package/installed "* ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "system packages: no apt-get here; install these yourself: ${missing[*]}" >&2
    exit 3
fi
as_root=()
if [[ $EUID -ne 0 ]]; then
    if ! command -v sudo >/dev/null; then
        echo "system packages: ${missing[*]} missing, and neither root nor sudo to install them" >&2
        exit 3
    fi
    as_root=(sudo)
fi

echo "system packages: installing ${missing[*]}"
# A list of some other archive that cannot be fetched is no reason to stop.
"${as_root[@]}" apt-get update -qq || echo "system packages: apt-get update was not complete; going on" >&2
wanted=()
for package in "${missing[@]}"; do
    if [[ $package == chromium && -z $(apt-cache --quiet=2 search --names-only '^chromium$') ]]; then
        echo "system packages: chromium is not packaged here; tests that need a browser will say that they skip"
    else
        wanted+=("$package")
    fi
done
[[ ${#wanted[@]} -gt 0 ]] || exit 0
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
