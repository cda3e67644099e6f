import Foundation

/// A library that is preloaded into a program, to imitate wrappers and security profiles on users'
/// systems.
public struct Preload: Sendable {
    public let path: String
    private let folder: TempFolder

    public static let isUsable = hasProgram("clang")

    /// - Parameter source: C source code.
    public init(_ source: String) throws {
        folder = try TempFolder()
        path = folder.path("preload.so")
        let file = try folder.write("preload.c", Array(source.utf8))
        try require("clang", ["-shared", "-fPIC", "-o", path, file, "-ldl"])
    }

    public var environment: [String: String] { ["LD_PRELOAD": path] }
}

/// Simulated storage latency: each call that moves 4 KiB or more sleeps first
/// (Benchmarks/latency.c).
public struct SlowCalls: Sendable {
    public let environment: [String: String]
    private let library: Preload
    private let log: TempFolder

    public static let isUsable = Preload.isUsable

    public init(milliseconds: Int) throws {
        let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().deletingLastPathComponent()
        library = try Preload(
            String(
                contentsOf: root.appendingPathComponent("Benchmarks/latency.c"), encoding: .utf8))
        log = try TempFolder()
        let time = "\(milliseconds * 1000)"
        environment = library.environment.merging(
            ["SLEEP_READ": time, "SLEEP_WRITE": time, "SLEEP_LOG": log.path("log")],
            uniquingKeysWith: { $1 })
    }

    /// Numbers of calls sleeping at once, one for each call that began to sleep.
    public func sleepers() throws -> [Int] {
        try String(contentsOfFile: log.path("log"), encoding: .utf8).split(separator: "\n")
            .compactMap { Int($0) }
    }
}
