#!/usr/bin/env python3
"""Times reading from an HTTP server against curl, nbdkit and qemu-img, in turns.

Usage: remote.py path/to/swimg [--folder DIR] [--rounds N] [--only WORD]

The server is nginx on this machine. Latency is that of its module echo, which sleeps before it
answers. A disk of 1 GiB is served as raw, as qcow2 and as compressed qcow2. Targets are in memory,
so that the disk of this machine does not count, and each is compared with the disk once.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import time

import datasets
from datasets import run

MEMORY = "/dev/shm"
PORT = 18080


def settings(folder):
    return f"""
daemon off; user root; worker_processes 2; pid {folder}/pid; error_log {folder}/errors;
include /usr/share/nginx/modules-available/mod-http-echo.conf;
load_module /usr/lib/nginx/modules/ngx_http_echo_module.so;
events {{ worker_connections 1024; }}
http {{
    access_log {folder}/log; sendfile on; tcp_nopush off;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{PORT};
        listen 127.0.0.1:{PORT + 1} ssl;
        ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
        location / {{ root {folder}; }}
        location /slow/ {{ echo_sleep 0.020; echo_exec /inner$uri; }}
        location /inner/slow/ {{ internal; alias {folder}/; }}
    }}
}}
"""


def prepare(folder, base):
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/zlib.qcow2"):
        # The first GiB that holds data of the disk of `make bench`.
        run("dd", f"if={base}/part.raw", f"of={folder}/disk.raw", "bs=1M", "count=1024", "status=none")
        run("qemu-img", "convert", "-O", "qcow2", f"{folder}/disk.raw", f"{folder}/disk.qcow2")
        run("qemu-img", "convert", "-c", "-m", "8", "-W", "-O", "qcow2", f"{folder}/disk.raw", f"{folder}/zlib.qcow2")
    if not os.path.exists(f"{folder}/cert.pem"):
        run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "999", "-subj", "/CN=localhost",
            "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem")
    conf = settings(folder).replace("include /usr/share/nginx/modules-available/mod-http-echo.conf;\n", "")
    with open(f"{folder}/conf", "w") as file:
        file.write(conf)


def usage(command, target):
    """Elapsed and processor seconds of one run, and the peak memory in MiB, as GNU time reports them."""
    if os.path.exists(target):
        os.unlink(target)
    report = f"{MEMORY}/time"
    start = time.monotonic()
    run("/usr/bin/time", "-o", report, "-f", "%U %S %M", *command)
    elapsed = time.monotonic() - start
    with open(report) as file:
        user, system, peak = file.read().split()[-3:]
    os.unlink(report)
    return elapsed, float(user) + float(system), int(peak) / 1024


def in_turns(commands, target, rounds, once=()):
    """What `usage` says of each run of each command, by key. Each round has all of them in random order.

    once: keys of commands that run only in the first round; their result counts for all.
    """
    runs = {key: [] for key in commands}
    for _ in range(rounds):
        for key in random.sample(list(commands), len(commands)):
            is_known = key in once and runs[key]
            runs[key].append(runs[key][0] if is_known else usage(commands[key], target))
    return runs


def median(runs, column=0):
    return statistics.median(run[column] for run in runs)


def times_as_fast(runs, others):
    return statistics.median(other[0] / run[0] for run, other in zip(runs, others))


def requests(folder):
    with open(f"{folder}/log") as file:
        return sum(1 for _ in file)


def nbdkit(url, target, *words):
    command = f"qemu-img convert -m 8 -W -f {words[0]} -O raw $uri {target}"
    return ["nbdkit", "-U", "-", "curl", url, "sslverify=false", "--run", command]


def rows(swimg, folder, target):
    plain, secure = f"http://127.0.0.1:{PORT}", f"https://localhost:{PORT + 1}"
    copy = f"{MEMORY}/swimg-http.copy"

    def own(url, form):
        return [swimg, "convert", "--insecure", "-f", form, "-O", "raw", url, target]

    def curl(url):
        return ["curl", "-s", "-k", "-o", target, url]

    def curl_first(url, form):
        return ["sh", "-c", f"curl -s -o {copy} {url} && {swimg} convert -f {form} -O raw {copy} {target}; rm {copy}"]

    def local(name, form):
        return [swimg, "convert", "-f", form, "-O", "raw", f"{folder}/{name}", target]

    for name, url in [("http", plain), ("https", secure)]:
        yield (f"raw, {name}", own(f"{url}/disk.raw", "raw"),
               {"curl": curl(f"{url}/disk.raw"), "nbdkit": nbdkit(f"{url}/disk.raw", target, "raw")})
    yield ("qcow2", own(f"{plain}/disk.qcow2", "qcow2"),
           {"curl": curl(f"{plain}/disk.qcow2"), "nbdkit": nbdkit(f"{plain}/disk.qcow2", target, "qcow2")})
    yield ("zlib", own(f"{plain}/zlib.qcow2", "qcow2"),
           {"local": local("zlib.qcow2", "qcow2"), "curl, swimg": curl_first(f"{plain}/zlib.qcow2", "qcow2")})
    for name, form in [("disk.raw", "raw"), ("disk.qcow2", "qcow2"), ("zlib.qcow2", "qcow2")]:
        peers = {"0 ms": own(f"{plain}/{name}", form)}
        if name != "zlib.qcow2":
            peers["nbdkit"] = nbdkit(f"{plain}/slow/{name}", target, form)
        yield (f"{name}, 20 ms", own(f"{plain}/slow/{name}", form), peers)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("swimg")
    parser.add_argument("--folder", default="/var/tmp/swimg-bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    swimg = os.path.realpath(options.swimg)
    folder = f"{options.folder}/http"
    if not os.path.exists(f"{options.folder}/part.raw"):
        datasets.prepare(options.folder)
    prepare(folder, options.folder)
    target = f"{MEMORY}/swimg-http.raw"
    server = subprocess.Popen(["nginx", "-p", folder, "-c", f"{folder}/conf", "-e", f"{folder}/errors"])
    try:
        time.sleep(1)
        print("| work | swimg | processor | MiB | requests | peers: times as fast |\n|---|---|---|---|---|---|")
        for name, command, peers in rows(swimg, folder, target):
            if options.only not in name:
                continue
            before = requests(folder)
            usage(command, target)
            asked = requests(folder) - before
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", target, f"{folder}/disk.raw")
            # nbdkit takes a minute behind latency; one run is enough to see that.
            once = ["nbdkit"] if "ms" in name else []
            runs = in_turns({"": command, **peers}, target, options.rounds, once)
            ratios = [f"{key} {times_as_fast(runs[''], runs[key]):.2f}" for key in peers]
            own = runs[""]
            print(
                f"| {name} | {median(own):.2f} s | {median(own, 1):.2f} s | {median(own, 2):.1f} "
                f"| {asked} | {', '.join(ratios)} |", flush=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        for path in [target, f"{MEMORY}/swimg-http.copy"]:
            if os.path.exists(path):
                os.unlink(path)


if __name__ == "__main__":
    main()
