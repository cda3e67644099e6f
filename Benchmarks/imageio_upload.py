#!/usr/bin/env python3
"""Times uploads to ovirt-imageio, and downloads, against its own client, in turns.

Usage: imageio_upload.py path/to/swimg [--folder DIR] [--rounds N] [--only WORD] [--verify]

The daemon runs on this machine and serves exports of qemu-nbd, as a host of oVirt does; the disk is
the 1 GiB of remote.py. The client is the best of 1, 4 and 8 workers in each series. Latency is that
of nbdkit's filter delay, which serves the disk of the daemon then: each of its requests waits. With
--verify, uploads with this option take the place of the client.
"""

import argparse
import contextlib
import json
import os
import subprocess
import time

import datasets
import remote
from datasets import run

HERE = os.path.dirname(os.path.realpath(__file__))
PROGRAMS = f"{os.path.dirname(HERE)}/.build/imageio/bin"
MEMORY = "/dev/shm/swimg-imageio"

WORKERS = ["1", "4", "8"]

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
def served(disk, form, keys, tls, delay):
    """A daemon for a disk of 1 GiB; gives the names that swimg and the client use.

    delay: time in milliseconds that the daemon waits for each answer of its disk.
    """
    os.makedirs(f"{MEMORY}/conf.d", exist_ok=True)
    nbd = f"{MEMORY}/nbd"
    command = ["qemu-nbd", "--persistent", "--shared=16", "--discard=unmap", "--detect-zeroes=unmap", "-f", form,
               "--socket", nbd, disk]
    if delay:
        waits = [f"{what}={delay}ms" for what in ["rdelay", "wdelay", "delay-zero", "delay-trim"]]
        command = ["nbdkit", "-f", "-U", nbd, "--filter=delay", "file", disk, *waits]
    export = subprocess.Popen(command)
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
    parser.add_argument("--verify", action="store_true")
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
        for form, tls, delay in [("raw", False, 0), ("raw", True, 0), ("qcow2", False, 0), ("raw", False, 5)]:
            name = f"{verb}, {form}{', TLS' if tls else ''}{f', {delay} ms' if delay else ''}"
            if options.only not in name:
                continue
            disk, target = f"{MEMORY}/disk.{form}", f"{MEMORY}/out"
            run("qemu-img", "create", "-q", "-f", form, disk, "1G")
            if verb == "download":
                run("qemu-img", "convert", "-O", form, f"{source}/disk.raw", disk)
            with served(disk, form, source, tls, delay) as (ours, theirs):
                path = f"{source}/disk.{form}"
                words = ["--cacert", f"{source}/cert.pem"] if tls else []
                if verb == "upload":
                    own = [swimg, "convert", *words, "-n", "-W", "-f", form, "-O", "raw", path, ours]
                    check = [swimg, "compare", *words, ours, f"{source}/disk.raw"]
                else:
                    own = [swimg, "convert", *words, "-W", "-f", "raw", "-O", "raw", ours, target]
                    check = ["qemu-img", "compare", "-f", "raw", "-F", "raw", target, f"{source}/disk.raw"]
                run(*own)
                run(*check)
                ca = f"{source}/cert.pem" if tls else ""
                local = path if verb == "upload" else target
                commands = {"": own}
                for workers in WORKERS:
                    commands[workers] = [python, f"{MEMORY}/client.py", verb, local, theirs, workers, ca]
                if verb == "upload" and options.verify:
                    commands = {"": own, "--verify": own[:2] + ["--verify"] + own[2:]}
                runs = remote.in_turns(commands, target, options.rounds)
                best = min(list(runs)[1:], key=lambda key: remote.median(runs[key]))
                print(
                    f"| {name} | {remote.median(runs['']):.2f} s | {remote.median(runs[''], 1):.2f} s "
                    f"| {max(r[2] for r in runs['']):.1f} | {best} | {remote.median(runs[best]):.2f} s "
                    f"| {remote.median(runs[best], 1):.2f} s | {remote.times_as_fast(runs[''], runs[best]):.2f} |",
                    flush=True)
            os.unlink(disk)
            if os.path.exists(target):
                os.unlink(target)


if __name__ == "__main__":
    main()
