#!/bin/bash
# Makes every image below Fixtures/images and the manifest; a second run makes the same bytes.
#
# Needs qemu-img, qemu-io (Debian 12's 7.2 for the same bytes) and python3. Afterwards qemu-img is
# asked what it reads from each image. That is a second opinion, not the source of the hashes:
# those come from the content that each image was made from.
set -euo pipefail
cd "$(dirname "$0")"

rm -rf images manifest.json
export PYTHONDONTWRITEBYTECODE=1
python3 craft.py images
python3 second_opinion.py images manifest.json
