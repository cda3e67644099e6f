#!/usr/bin/env bash
# Installs the missing Debian packages that building, or also testing, needs.
# Usage: setup.sh build|test
set -euo pipefail

packages=(dpkg-dev pkg-config zlib1g-dev libzstd-dev libdeflate-dev libisal-dev libnbd-dev libssl-dev
    libcurl4-openssl-dev liblzma-dev libbz2-dev
    libgcrypt20-dev)
if [ "${1:-build}" = test ]; then
    # qemu-img and other judges, and the programs that make images and file systems for the tests.
    packages+=(
        qemu-utils cryptsetup-bin nbdkit libnbd-bin gnutls-bin e2fsprogs xfsprogs btrfs-progs util-linux gzip
        xz-utils zstd bzip2 attr acl strace time python3
        python3-oslo.utils python3-venv python3-dev gcc
        nginx-light libnginx-mod-http-echo openssl curl)
fi

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    [ "${state:0:2}" = ii ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    echo "installing: ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive \
        "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    # The tests start nginx themselves; the package would serve this machine.
    case " ${missing[*]} " in
        *" nginx-light "*) "${as_root[@]}" systemctl disable -q --now nginx 2>/dev/null || true ;;
    esac
fi
if [ "${1:-build}" = test ] && [ ! -x .build/imageio/bin/ovirt-imageio ]; then
    # The daemon that judges uploads to oVirt is no package of Debian. Without a network its tests
    # are left out.
    mkdir -p .build
    python3 -m venv .build/imageio && .build/imageio/bin/pip install -q ovirt-imageio==2.5.1 \
        || echo "ovirt-imageio cannot be installed: its tests are left out"
fi
"$(dirname "$0")/toolchain.sh" swift --version >/dev/null
