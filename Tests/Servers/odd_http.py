"""An HTTP server that misbehaves on purpose, for the tests.

Usage: odd_http.py FILE LOG FAULT[=NUMBER]...

Serves FILE under every path. Prints its port. Appends a line to LOG for each request: method, path,
range as it was asked for or sent, status, and number of bytes of the body that were sent.
"""

import http.server
import os
import socket
import struct
import sys
import threading
import time

path, log = sys.argv[1:3]
faults = {}
for word in sys.argv[3:]:
    name, _, number = word.partition("=")
    faults[name] = int(number or 1)
with open(path, "rb") as file:
    content = file.read()
lock = threading.Lock()
# Lists of extents that make no sense, by the number of the fault "wild".
WILD = {
    1: b'[{"start": 0, "length": 9223372036854775807, "zero": true},'
    b' {"start": 9223372036854775807, "length": 9, "zero": true}]',
    2: b'[{"start": 0, "length": -5, "zero": true}]',
    3: b'[{"start": 4096, "length": 4096, "zero": true}]',
    4: b'[{"start": 0}]',
}
# Number of requests so far, and of those to each signed address.
count = 0
uses = {}
# Whether the answer to a PUT was lost on purpose.
is_lost = False


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Number of PUT requests on this connection.
    puts = 0

    def note(self, status, sent=0):
        span = self.headers.get("Range", "-")
        if "Content-Range" in self.headers:
            span = "bytes=" + self.headers["Content-Range"].split()[1].partition("/")[0]
        with lock, open(log, "a") as file:
            words = [self.command, self.path, span, status, sent]
            file.write(" ".join(map(str, words)) + "\n")

    def refuse(self, status, body=b"", **headers):
        self.note(status)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.refuse(405)

    def do_OPTIONS(self):
        if "wild" in faults:
            return self.refuse(200, b'{"features": ["extents"], "max_readers": 1, "max_writers": 1}')
        if "gone" in faults and is_lost:
            return self.refuse(403, b"expired")
        # As an ovirt-imageio daemon before its first version with features.
        self.refuse(405)

    def do_PUT(self):
        global content, is_lost
        first = int(self.headers["Content-Range"].split()[1].partition("-")[0])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.puts += 1
        if self.due("lostput", self.puts):
            is_lost = True
            self.note(0)
            return self.reset()
        with lock:
            content = content[:first] + body + content[first + len(body) :]
        self.refuse(200)

    def due(self, fault, number):
        """Whether a fault comes with this request: with every nth of them."""
        return fault in faults and number % faults[fault] == 0

    def do_GET(self):
        global count
        if self.path.endswith("/extents"):
            return self.refuse(200, WILD[faults["wild"]])
        with lock:
            count += 1
            number = count
        if "delay" in faults:
            time.sleep(faults["delay"] / 1000)
        if self.due("busy", number):
            return self.refuse(503, b"busy", Retry_After="0")
        if "missing" in faults:
            return self.refuse(404)
        if "token" in faults and self.headers.get("Authorization") != "Bearer secret":
            return self.refuse(401)
        # Header lines are bytes, which the library takes for Latin-1.
        if "utf8" in faults and self.headers.get("X-Name", "").encode("latin-1") != "Zoë".encode():
            return self.refuse(401)
        if "redirect" in faults and not self.path.startswith("/signed"):
            return self.refuse(302, Location=f"/signed?key={number}")
        if "expires" in faults and self.path.startswith("/signed"):
            with lock:
                uses[self.path] = uses.get(self.path, 0) + 1
                is_expired = uses[self.path] > faults["expires"]
            if is_expired:
                return self.refuse(403, b"expired")
        self.send_file(number)

    def send_file(self, number):
        tag = '"1"'
        if "changes" in faults and number > faults["changes"]:
            tag = '"2"'
        wanted = self.headers.get("If-Match")
        if wanted and wanted != tag and "careless" not in faults:
            return self.refuse(412)
        start, end = 0, len(content)
        asked = self.headers.get("Range")
        is_part = asked and "noranges" not in faults
        if is_part:
            first, _, last = asked.partition("=")[2].partition("-")
            start, end = int(first), min(int(last) + 1, len(content))
            if start >= len(content):
                return self.refuse(416, Content_Range=f"bytes */{len(content)}")
            if "less" in faults:
                end = min(end, start + faults["less"])
        # A byte that the disk of the server cannot read any more.
        if "unreadable" in faults and start <= faults["unreadable"] < end:
            return self.refuse(500)
        body = content[start:end]
        sent = body
        if self.due("short", number):
            sent = body[: len(body) // 2]
        if self.due("stall", number):
            sent = body[: len(body) // 3]
        self.send_response(206 if is_part else 200)
        if is_part:
            shift = 1 if "wrongrange" in faults and number > 1 else 0
            self.send_header(
                "Content-Range", f"bytes {start + shift}-{end - 1 + shift}/{len(content)}")
        if "nolength" in faults:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        if "notag" not in faults:
            self.send_header("ETag", tag)
        if "gzip" in faults:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        done = 0
        try:
            while done < len(sent):
                piece = sent[done : done + 65536]
                self.wfile.write(piece)
                done += len(piece)
                if "trickle" in faults:
                    time.sleep(faults["trickle"] / 1000)
        except OSError:
            self.close_connection = True
        self.note(206 if is_part else 200, done)
        if self.due("stall", number):
            time.sleep(30)
        if self.due("reset", number):
            self.reset()
        if len(sent) < len(body):
            self.close_connection = True

    def reset(self):
        # Closing with this option sends a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *words):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
