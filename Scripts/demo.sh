#!/usr/bin/env bash
# Makes a real disk image (an ext4 file system with some hundred MB of this machine's files, as
# qcow2), converts it to raw and has qemu-img compare the two.
# Usage: demo.sh path/to/swimg
set -euo pipefail
swimg=$(realpath "$1")
folder=demo
mkdir -p "$folder"

if [ ! -e "$folder/disk.qcow2" ]; then
    echo "making $folder/disk.qcow2 ..."
    files=$(mktemp -d "$folder/files.XXXXXX")
    trap 'rm -rf "$files" "$folder/disk.tmp"' EXIT
    # Files of all kinds and sizes until there are 400 MB of them.
    find /usr /opt -xdev -type f -readable -size +0 -size -16M -printf '%s %p\0' 2>/dev/null |
        awk 'BEGIN { RS = ORS = "\0" }
             sum < 400000000 { sum += $1; sub(/^[0-9]+ /, ""); print }' > "$files.list"
    tar --null -T "$files.list" -cf - 2>/dev/null | tar -xf - -C "$files"
    rm "$files.list"
    truncate -s 2G "$folder/disk.tmp"
    mkfs.ext4 -q -F -d "$files" "$folder/disk.tmp"
    qemu-img convert -f raw -O qcow2 "$folder/disk.tmp" "$folder/disk.qcow2"
fi

run() { echo "+ $*"; "$@"; }
rm -f "$folder/disk.raw"
cd "$folder"
ls -lsh disk.qcow2
echo "+ swimg convert -f qcow2 -O raw -m 8 -W disk.qcow2 disk.raw"
time "$swimg" convert -f qcow2 -O raw -m 8 -W disk.qcow2 disk.raw
ls -lsh disk.raw
run qemu-img compare -f qcow2 -F raw disk.qcow2 disk.raw
