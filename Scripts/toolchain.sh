#!/usr/bin/env bash
# Runs a program of Swift's toolchain (swift, docc). Another program named swift, such as the client
# of OpenStack's object storage that other packages install, may come first in PATH.
# Usage: toolchain.sh program [argument...]
set -euo pipefail

found=
others=()
while read -r candidate; do
    if [[ $("$candidate" --version 2>/dev/null </dev/null) == *"Swift version"* ]]; then
        found=$candidate
        break
    fi
    others+=("$candidate")
done < <(type -ap swift)
if [ -z "$found" ]; then
    echo "Swift 6.3 or newer is needed: https://swift.org/install${others:+ (not the compiler: ${others[*]})}" >&2
    exit 1
fi

program=$1
shift
[ "$program" != swift ] || exec "$found" "$@"
for folder in "$(dirname "$found")" "$(dirname "$(realpath "$found")")"; do
    [ ! -x "$folder/$program" ] || exec "$folder/$program" "$@"
done
exec "$program" "$@"
