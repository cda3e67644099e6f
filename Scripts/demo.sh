#!/usr/bin/env bash
# Makes a real disk image (an ext4 file system with several hundred MB of this machine's files, as
# qcow2), converts it to raw and lets qemu-img compare the two.
# Usage: demo.sh path/to/swimg
set -euo pipefail
swimg=$(realpath "$1")
mkdir -p demo
folder=$(realpath demo)

if [ ! -e "$folder/disk.qcow2" ]; then
    echo "making demo/disk.qcow2 ..."
    # Temporary files; an earlier run that was killed may have left some.
    work=$folder/work
    trap 'rm -rf "$work"' EXIT
    # bash runs this trap after the current command has ended, so no command writes during the
    # cleanup.
    trap 'exit 1' INT TERM HUP
    rm -rf "$work"
    mkdir -p "$work/files"
    # Files of all kinds and sizes, 400 MB in total.
    find /usr /opt -xdev -type f -readable -size +0 -size -16M -printf '%s %p\0' 2>/dev/null |
        awk 'BEGIN { RS = ORS = "\0" }
             sum < 400000000 { sum += $1; sub(/^[0-9]+ /, ""); print }' > "$work/list"
    tar --null -T "$work/list" -cf - 2>/dev/null | tar -xf - -C "$work/files"
    truncate -s 2G "$work/disk"
    mkfs.ext4 -q -F -d "$work/files" "$work/disk"
    qemu-img convert -f raw -O qcow2 "$work/disk" "$work/disk.qcow2"
    mv "$work/disk.qcow2" "$folder/disk.qcow2"
    rm -rf "$work"
    trap - EXIT INT TERM HUP
fi

run() { echo "+ $*"; "$@"; }
rm -f "$folder/disk.raw"
cd "$folder"
ls -lsh disk.qcow2
echo "+ swimg convert -f qcow2 -O raw -m 8 -W disk.qcow2 disk.raw"
time "$swimg" convert -f qcow2 -O raw -m 8 -W disk.qcow2 disk.raw
ls -lsh disk.raw
run qemu-img compare -f qcow2 -F raw disk.qcow2 disk.raw
