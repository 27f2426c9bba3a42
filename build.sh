#!/bin/bash
# Usage: build.sh demo [--keep | --stop]      boot a diskless node here, with everything it needs
#        build.sh test [--fast | PYTEST ARGS] run the tests; --fast leaves out boots, servers and builds
#        build.sh test --matrix [PYTEST ARGS] boot every generation of dracut, and write doc/generations.md
#        build.sh bench [fetch | crowd | disk | packages | registry] [ARGS] measure build and boot, a download, many at
#                                                         once, a disk, RPMs, or two ways to boot from a registry
#        build.sh [ARGS]                      anchor-build ARGS; without ARGS build the RPMs
#
# Prepares what is missing first: the distribution's packages named in contrib/packages.txt, and a
# private Python environment in .venv. With nothing missing it starts the command right away.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
APT_LOCK_LIMIT=300 # seconds

say() { printf 'build.sh: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 1
}

main() {
    local command=${1:-}
    case $command in
        demo)
            shift
            prepare build demo
            cd "$here"
            exec "$venv/bin/python" -m contrib.site.demo "$@"
            ;;
        test)
            shift
            prepare build rpm demo test
            [[ ${1:-} == --fast ]] && shift && set -- -m 'not slow and not boot' "$@"
            cd "$here"
            # It has installed what the tests need: a test that finds a program missing has failed.
            export ANCHOR_BUILD_SH=1
            # Two nodes boot side by side; a file's tests share their servers and initramfs.
            [[ ${1:-} == --matrix ]] && shift && run_matrix "$@"
            exec "$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
            ;;
        bench)
            shift
            prepare build rpm demo test bench
            cd "$here"
            exec "$venv/bin/python" -m tests.bench "$@"
            ;;
        *)
            if (($# == 0)); then
                cd "$here"
                set -- rpm
            fi
            if asks_for_rpm "$@"; then prepare build rpm; else prepare build; fi
            exec "$venv/bin/anchor-build" "$@"
            ;;
    esac
}

# run_matrix ARGS…: boot what test_generations.py has, side by side, and write down what came of it.
run_matrix() {
    local status=0
    ANCHOR_MATRIX=1 "$venv/bin/python" -m pytest --numprocesses 2 --dist load --maxschedchunk 1 \
        tests/integration/test_generations.py "$@" || status=$?
    "$venv/bin/python" -m tests.integration.generations_table
    exit "$status"
}

# asks_for_rpm ARGS…: whether anchor-build's command is rpm, whatever options stand before it.
asks_for_rpm() {
    local word
    for word in "$@"; do
        [[ $word == -* ]] || break
    done
    [[ $word == rpm ]]
}

# prepare USE…: install what these uses need and this host lacks.
prepare() {
    local family
    family=$(package_family)
    install_packages "$family" "$@"
    prepare_python "$([[ " $* " == *' test '* ]] && printf test || printf build)"
}

# package_family: print deb or rpm. What counts is the distribution: mmdebstrap brings apt to Fedora, too.
package_family() {
    local ID='' ID_LIKE='' NAME='this system'
    # shellcheck disable=SC1091 # the system's own file
    . "${ANCHOR_ROOT:-}/etc/os-release"
    case " $ID $ID_LIKE " in
        *' debian '* | *' ubuntu '*) command -v apt-get >/dev/null && printf deb && return ;;
        *' fedora '* | *' rhel '*) command -v dnf >/dev/null && printf rpm && return ;;
    esac
    fail "$NAME has neither apt nor dnf, and this script knows no other way to install packages." \
        "Install what contrib/packages.txt lists by hand, and run anchor-build from a virtual environment."
}

install_packages() {
    local family=$1 wanted=() missing=() use deb rpm
    shift
    while read -r use deb rpm; do
        [[ " $* " == *" $use "* && ${!family} != - ]] && wanted+=("${!family}")
    done <"$here/contrib/packages.txt"
    mapfile -t missing < <("missing_$family" "${wanted[@]}")
    ((${#missing[@]})) || return 0
    say "installing: ${missing[*]}"
    local as_root=()
    if (($(id -u) != 0)); then
        command -v sudo >/dev/null || fail "installing needs root, and there is no sudo: run this once as root"
        say "using sudo, since only root may install packages"
        as_root=(sudo)
    fi
    "install_$family" "${missing[@]}" || fail "could not install: ${missing[*]}"
}

# missing_deb NAME…, missing_rpm NAME…: print those that are not installed, one per line.
missing_deb() {
    local name installed
    installed=" $(dpkg-query -W -f '${db:Status-Status}:${Package} ' "$@" 2>/dev/null)" || true
    for name in "$@"; do
        [[ $installed == *" installed:$name "* ]] || printf '%s\n' "$name"
    done
}

missing_rpm() {
    LC_ALL=C rpm -q --whatprovides "$@" | sed -n 's/^no package provides //p' || true
}

install_deb() {
    local output deadline=$((SECONDS + APT_LOCK_LIMIT)) status=0
    until output=$("${as_root[@]}" apt-get -q update 2>&1); do
        # Another repository may be broken; what matters is whether the installation succeeds.
        [[ $output == *'Could not get lock'* ]] || break
        ((SECONDS < deadline)) || fail "another program has held apt's lock for $APT_LOCK_LIMIT s"
        sleep 2
    done
    forbid_daemons
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o "DPkg::Lock::Timeout=$APT_LOCK_LIMIT" \
        install --no-install-recommends "$@" >&2 || status=$?
    allow_daemons
    local daemon
    for daemon in nginx chrony; do # nor shall they start at the next boot
        if [[ " $* " == *" $daemon "* && $daemon != "$keep_daemon" ]] && command -v systemctl >/dev/null; then
            "${as_root[@]}" systemctl --quiet disable "$daemon.service" || true
        fi
    done
    return "$status"
}

install_rpm() {
    "${as_root[@]}" dnf install -y --setopt=install_weak_deps=False "$@" >&2 && return
    say "on Enterprise Linux some of these come from EPEL and CRB: enable those two first"
    return 1
}

# forbid_daemons, allow_daemons: Debian's packages start their services; a policy of 101 says no. A policy
# that is already there stays. chrony may start where it replaces a running time service.
forbid_daemons() {
    keep_daemon=none
    policy=${ANCHOR_ROOT:-}/usr/sbin/policy-rc.d
    if command -v systemctl >/dev/null && systemctl --quiet is-active systemd-timesyncd.service; then
        keep_daemon=chrony
    fi
    [[ ! -e $policy ]] || { policy='' && return; }
    trap allow_daemons EXIT
    # shellcheck disable=SC2016 # $1 is the policy's own argument
    printf '#!/bin/sh\ncase $1 in %s*) exit 0 ;; *) exit 101 ;; esac\n' "$keep_daemon" |
        "${as_root[@]}" install -m 755 /dev/stdin "$policy"
}

allow_daemons() {
    [[ -z $policy ]] || "${as_root[@]}" rm -f "$policy"
    policy=''
}

# prepare_python build|test: make .venv what pyproject.toml says, unless it already is.
prepare_python() {
    local stamp=$venv/.prepared-$1
    prepared "$stamp" && return
    mkdir -p "$venv"
    (
        flock 9
        prepared "$stamp" || make_venv "$1"
        cp "$here/pyproject.toml" "$stamp"
    ) 9>"$venv/.lock"
}

prepared() { [[ -x $venv/bin/python ]] && cmp -s "$here/pyproject.toml" "$1"; }

make_venv() {
    local group=$1 python
    if [[ ! -x $venv/bin/python ]]; then
        python=$(find_python)
        say "making the Python environment .venv"
        "$python" -m venv "$venv" || fail "$python cannot make a virtual environment: is its venv module installed?"
    fi
    say "installing Python packages for: $group"
    local pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install --editable "$here")
    if [[ $group == test ]]; then
        # pip learnt to read dependency groups only in version 25.1
        mapfile -t -O "${#pip[@]}" pip < <("$venv/bin/python" -c '
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["dependency-groups"]["test"], sep="\n")' "$here/pyproject.toml")
    fi
    "${pip[@]}" || fail "pip could not install what pyproject.toml asks for"
}

find_python() {
    local python
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        command -v "$python" >/dev/null || continue
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        printf '%s' "$python"
        return
    done
    fail "anchor-build needs Python 3.11 or newer; install one beside the system's, such as python3.12"
}

main "$@"
