#!/usr/bin/env python3
"""Times uploads to ovirt-imageio, and downloads, against its own client, in turns.

Usage: imageio_upload.py path/to/swimg [--folder DIR] [--rounds N] [--only WORD]

The daemon runs on this machine and serves exports of qemu-nbd, as a host of oVirt does; the disk is
the 1 GiB of remote.py. The client is the best of 1, 4 and 8 workers in each series.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import time

import datasets
import remote
from datasets import run

HERE = os.path.dirname(os.path.realpath(__file__))
PROGRAMS = f"{os.path.dirname(HERE)}/.build/imageio/bin"
MEMORY = "/dev/shm/swimg-imageio"

CLIENT = """
import sys
from ovirt_imageio import client
verb, path, url, workers, ca = sys.argv[1:]
words = dict(secure=bool(ca), max_workers=int(workers))
if verb == "upload":
    client.upload(path, url, ca or None, **words)
else:
    client.download(url, path, ca or None, fmt="raw", **words)
"""

SETTINGS = """
[daemon]
systemd_enable = false
drop_privileges = false
run_dir = {folder}
[tls]
enable = {tls}
key_file = {keys}/key.pem
cert_file = {keys}/cert.pem
ca_file = {keys}/cert.pem
[remote]
host = 127.0.0.1
port = 0
[local]
enable = {local}
socket = {folder}/socket
[control]
transport = unix
socket = {folder}/control
[handlers]
keys = stderr
[logger_root]
level = INFO
handlers = stderr
"""


@contextlib.contextmanager
def served(disk, form, keys, tls):
    """A daemon for a disk of 1 GiB; gives the names that swimg and the client use."""
    os.makedirs(f"{MEMORY}/conf.d", exist_ok=True)
    nbd = f"{MEMORY}/nbd"
    export = subprocess.Popen(
        ["qemu-nbd", "--persistent", "--shared=16", "--discard=unmap", "--detect-zeroes=unmap", "-f", form,
         "--socket", nbd, disk])
    with open(f"{MEMORY}/conf.d/a.conf", "w") as file:
        file.write(SETTINGS.format(folder=MEMORY, keys=keys, tls=tls, local=not tls))
    with open(f"{MEMORY}/ticket", "w") as file:
        json.dump({"uuid": "t", "size": 1 << 30, "url": f"nbd:unix:{nbd}", "timeout": 3000, "sparse": True,
                   "ops": ["read", "write"]}, file)
    while not os.path.exists(nbd):
        time.sleep(0.01)
    daemon = subprocess.Popen(
        [f"{PROGRAMS}/ovirt-imageio", "-c", MEMORY, "-t", f"{MEMORY}/ticket"], stderr=subprocess.PIPE, text=True)
    port = None
    for line in daemon.stderr:
        if "remote.service listening on" in line:
            port = int("".join(c if c.isdigit() else " " for c in line.split("listening on")[1]).split()[-1])
        if "Ready for requests" in line:
            break
    # The pipe has to be emptied, or the daemon would wait.
    drain = subprocess.Popen(["cat"], stdin=daemon.stderr, stdout=subprocess.DEVNULL)
    try:
        scheme = "imageio" if tls else "imageio+http"
        yield f"{scheme}://localhost:{port}/images/t", f"http{'s' if tls else ''}://localhost:{port}/images/t"
    finally:
        for process in [daemon, export]:
            process.terminate()
            process.wait()
        drain.wait()
        for name in ["nbd", "socket", "control"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{MEMORY}/{name}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("swimg")
    parser.add_argument("--folder", default="/var/tmp/swimg-bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    swimg = os.path.realpath(options.swimg)
    source = f"{options.folder}/http"
    if not os.path.exists(f"{options.folder}/part.raw"):
        datasets.prepare(options.folder)
    remote.prepare(source, options.folder)
    os.makedirs(MEMORY, exist_ok=True)
    with open(f"{MEMORY}/client.py", "w") as file:
        file.write(CLIENT)
    python = f"{PROGRAMS}/python"
    print("| work | swimg | processor | MiB | best client | its time | its processor | times as fast |")
    print("|---|---|---|---|---|---|---|---|")
    for verb in ["upload", "download"]:
        for form in ["raw", "qcow2"]:
            for tls in [False, True]:
                name = f"{verb}, {form}{', TLS' if tls else ''}"
                if options.only not in name or tls and form == "qcow2":
                    continue
                disk, target = f"{MEMORY}/disk.{form}", f"{MEMORY}/out"
                run("qemu-img", "create", "-q", "-f", form, disk, "1G")
                if verb == "download":
                    run("qemu-img", "convert", "-O", form, f"{source}/disk.raw", disk)
                with served(disk, form, source, tls) as (ours, theirs):
                    path = f"{source}/disk.{form}"
                    words = ["--cacert", f"{source}/cert.pem"] if tls else []
                    if verb == "upload":
                        own = [swimg, "convert", *words, "-n", "-W", "-f", form, "-O", "raw", path, ours]
                    else:
                        own = [swimg, "convert", *words, "-W", "-f", "raw", "-O", "raw", ours, target]
                    ca = f"{source}/cert.pem" if tls else ""
                    local = path if verb == "upload" else target
                    commands = {"": own}
                    for workers in [1, 4, 8]:
                        commands[str(workers)] = [python, f"{MEMORY}/client.py", verb, local, theirs, str(workers), ca]
                    runs = {key: [] for key in commands}
                    for number in range(options.rounds):
                        for key in random.sample(list(commands), len(commands)):
                            runs[key].append(remote.usage(commands[key], target))
                            if key == "" and number == 0:
                                check = target if verb == "download" else None
                                if check:
                                    run("qemu-img", "compare", "-f", "raw", "-F", "raw", check, f"{source}/disk.raw")
                                else:
                                    run(swimg, "compare", *words, ours, f"{source}/disk.raw")
                    times = {key: [r[0] for r in values] for key, values in runs.items()}
                    best = min(list(times)[1:], key=lambda key: statistics.median(times[key]))
                    ratio = statistics.median(b / a for a, b in zip(times[""], times[best]))
                    print(
                        f"| {name} | {statistics.median(times['']):.2f} s "
                        f"| {statistics.median(r[1] for r in runs['']):.2f} s | {max(r[2] for r in runs['']):.1f} "
                        f"| {best} workers | {statistics.median(times[best]):.2f} s "
                        f"| {statistics.median(r[1] for r in runs[best]):.2f} s | {ratio:.2f} |", flush=True)
                os.unlink(disk)
                if os.path.exists(target):
                    os.unlink(target)


if __name__ == "__main__":
    main()
