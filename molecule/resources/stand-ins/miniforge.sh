#!/usr/bin/env bash
# STAND-IN for Miniforge's installer: no conda is in it. Takes -b (no questions) and -p PREFIX as the real one, and
# refuses a PREFIX that exists as the real one does. Its bin/conda knows `create --prefix DIR python=X.Y pip` with the
# options of the real one, and makes a venv of this machine's python3 instead of downloading Python from a channel.
set -euo pipefail
prefix=
while getopts "bfp:u" option; do
    case $option in
        p) prefix=$OPTARG ;;
        b | f | u) ;;
        *) exit 2 ;;
    esac
done
[[ -n $prefix ]] || { echo "ERROR: a prefix is needed: -p" >&2; exit 1; }
if [[ -e $prefix ]]; then
    echo "ERROR: File or directory already exists: '$prefix'" >&2
    echo "If you want to update an existing installation, use the -u option." >&2
    exit 1
fi
mkdir -p "$prefix/bin" "$prefix/conda-meta"
cat >"$prefix/bin/conda" <<'CONDA'
#!/usr/bin/env bash
# STAND-IN for conda: see the installer.
set -euo pipefail
[[ ${1:-} == create ]] || { echo "CondaError: this stand-in knows only create" >&2; exit 1; }
shift
prefix= python=
while [[ $# -gt 0 ]]; do
    case $1 in
        --prefix) prefix=$2; shift ;;
        --channel) shift ;;
        --yes | --quiet | --offline | --override-channels | pip) ;;
        python=*) python=${1#python=} ;;
        *) echo "conda: error: unrecognized arguments: $1" >&2; exit 2 ;;
    esac
    shift
done
if [[ $(python3 -c 'import platform; print(platform.python_version())') != "$python"* ]]; then
    echo "PackagesNotFoundError: The following packages are not available from current channels:" >&2
    echo "  - python=$python" >&2
    exit 1
fi
python3 -m venv "$prefix"
mkdir -p "$prefix/conda-meta"
echo "# STAND-IN for conda: python=$python is this machine's own" >"$prefix/conda-meta/history"
CONDA
chmod 755 "$prefix/bin/conda"
echo "STAND-IN for Miniforge: installation finished."
