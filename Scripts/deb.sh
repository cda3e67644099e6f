#!/usr/bin/env bash
# Makes a Debian package of the files that `make install` installs. Usage: deb.sh FOLDER
# The package is FOLDER/swimg_VERSION_ARCHITECTURE.deb. Needs dpkg-dev.
set -euo pipefail

out=$1
root=$out/root
rm -rf "$root" "$out/debian"
mkdir -p "$root/DEBIAN" "$out/debian"
make --no-print-directory install DESTDIR="$root" PREFIX=/usr

doc=$root/usr/share/doc/swimg
install -D -m 644 LICENSE "$doc/copyright"
install -m 644 README.md "$doc/README.md"
gzip -9n "$root"/usr/share/man/man1/*.1

# The packages of the libraries that the program is linked with.
touch "$out/debian/control"
libraries=$(cd "$out" && dpkg-shlibdeps -O root/usr/bin/swimg 2>/dev/null)
version=$("$root/usr/bin/swimg" --version | awk 'NR == 1 { print $3 }')
architecture=$(dpkg --print-architecture)
cat > "$root/DEBIAN/control" <<CONTROL
Package: swimg
Version: $version
Architecture: $architecture
Maintainer: The swimg project <swimg@localhost>
Installed-Size: $(du -ks --exclude=DEBIAN "$root" | cut -f1)
Depends: ${libraries#shlibs:Depends=}
Recommends: libnbd0, libcurl4, liblzma5, libbz2-1.0, libgcrypt20
Section: otherosfs
Priority: optional
Description: converts disk images, with qemu-img's command line
 Converts disk images between raw and qcow2, on files, block devices and NBD
 exports, on all cores, and never leaves half a target. The verbs around it
 (create, info, map, check, compare, measure, resize, dd) answer as qemu-img
 does, in text, in JSON and in exit codes.
CONTROL
dpkg-deb --root-owner-group --build "$root" "$out/swimg_${version}_$architecture.deb"
