import Foundation
import Glibc

/// The program under test. `SWIMG` in the environment selects another one: since swimg replaces
/// qemu-img, `SWIMG=/usr/bin/qemu-img swift test` checks the tests themselves.
public enum Swimg {
    public static let path: String = {
        if let chosen = ProcessInfo.processInfo.environment["SWIMG"] { return chosen }
        // The test bundle lies next to the other products of the same build.
        var places = [CommandLine.arguments[0]]
        if let own = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/exe") {
            places.insert(own, at: 0)
        }
        places += CommandLine.arguments.filter { $0.hasSuffix(".xctest") }
        for place in places {
            let folder = URL(fileURLWithPath: place).deletingLastPathComponent()
            let program = folder.appendingPathComponent("swimg").path
            if access(program, X_OK) == 0 { return program }
        }
        fatalError("no swimg beside the tests (\(places)): build it, or set SWIMG")
    }()

    /// Error lines begin with the name under which the program was called.
    public static let prefix = URL(fileURLWithPath: path).lastPathComponent + ": "

    @discardableResult
    public static func convert(
        _ arguments: String..., in folder: String? = nil, timeout: Double = 60
    ) throws -> Outcome {
        try convert(arguments, in: folder, timeout: timeout)
    }

    @discardableResult
    public static func convert(
        _ arguments: [String], in folder: String? = nil, timeout: Double = 60
    ) throws -> Outcome {
        try run(path, ["convert"] + arguments, in: folder, timeout: timeout)
    }

    public static func start(_ arguments: [String]) throws -> RunningProcess {
        try RunningProcess(path, ["convert"] + arguments)
    }
}

public enum Qemu {
    public static let isInstalled = hasProgram("qemu-img") && hasProgram("qemu-io")

    @discardableResult
    public static func img(_ arguments: String..., in folder: String? = nil) throws -> String {
        try require("qemu-img", arguments, in: folder)
    }

    /// Runs `qemu-io` commands such as `write -P 7 64k 4k` on an image in one process.
    public static func io(
        _ format: String, _ path: String, _ commands: [String], in folder: String? = nil
    ) throws {
        guard !commands.isEmpty else { return }
        let output = try require(
            "qemu-io", ["-f", format] + commands.flatMap { ["-c", $0] } + [path], in: folder)
        // Some failed commands leave qemu-io's exit status at 0.
        if output.contains("failed") || output.contains("rror") {
            throw CommandError(description: "qemu-io \(commands): \(output)")
        }
    }

    /// `qemu-img compare`: nil if the guest contents are equal, otherwise its output.
    public static func difference(
        _ one: String, _ format: String, _ other: String, _ otherFormat: String
    ) throws -> String? {
        let outcome = try run("qemu-img", ["compare", "-f", format, "-F", otherFormat, one, other])
        return outcome.isSuccess ? nil : outcome.description
    }

    /// `qemu-img check`: nil if there are no errors or leaks, otherwise its output.
    public static func damage(_ path: String) throws -> String? {
        let outcome = try run("qemu-img", ["check", "-f", "qcow2", path])
        return outcome.isSuccess ? nil : outcome.description
    }

    /// `qemu-img check`: nil if there are no errors but leaks, otherwise its output.
    public static func errors(_ image: String, in folder: String? = nil) throws -> String? {
        let outcome = try run("qemu-img", ["check", "-f", "qcow2", image], in: folder)
        return [0, 3].contains(outcome.status) ? nil : outcome.description
    }

    /// The ranges in bytes that a persistent bitmap has set.
    public static func bitmap(_ name: String, of image: String) throws -> [Range<Int64>] {
        let map = try require("bash", ["-c", bitmapScript, "bash", image, name])
        // qemu shows what is dirty as holes.
        return try JSONDecoder().decode([MapEntry].self, from: Data(map.utf8))
            .filter { !$0.data }.map { $0.start..<$0.start + $0.length }
    }

    /// Serves the bitmap of an image as a context of NBD, and shows it as a map.
    private static let bitmapScript = """
        socket=$1.socket
        qemu-nbd -r -t -k "$socket" -B "$2" -f qcow2 "$1" &
        while [ ! -S "$socket" ]; do sleep 0.01; done
        export="driver=nbd,server.type=unix,server.path=$socket"
        qemu-img map --output=json --image-opts "$export,x-dirty-bitmap=qemu:dirty-bitmap:$2"
        status=$?; kill $!; wait $!; rm -f "$socket"; exit $status
        """

    /// `qemu-img map` as entries of start, length, depth, zero and data.
    public static func map(_ path: String, _ format: String) throws -> [MapEntry] {
        let text = try img("map", "--output=json", "-f", format, path)
        return try JSONDecoder().decode([MapEntry].self, from: Data(text.utf8))
    }

    public struct MapEntry: Decodable, Sendable {
        public let start: Int64
        public let length: Int64
        public let depth: Int
        public let zero: Bool
        public let data: Bool
        /// Offset in the image file, in bytes; nil without data or for compressed data.
        public let offset: Int64?
    }
}

public let isRoot = geteuid() == 0

public func hasProgram(_ name: String) -> Bool {
    let folders = (ProcessInfo.processInfo.environment["PATH"] ?? "/usr/bin").split(separator: ":")
    return (folders + ["/usr/sbin", "/sbin"]).contains { access("\($0)/\(name)", X_OK) == 0 }
}

/// Whether strace is installed and may attach, which containers often forbid.
public let canTraceSystemCalls: Bool = {
    guard hasProgram("strace") else { return false }
    return (try? run("strace", ["-f", "-o", "/dev/null", "true"]).isSuccess) ?? false
}()
