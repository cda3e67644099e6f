import Foundation
import Glibc

/// One entry of `Fixtures/manifest.json`; see `Fixtures/fixture_set.py`.
public struct Fixture: Decodable, Sendable, CustomStringConvertible {
    public let file: String
    public let made: String
    /// nil for images that are only probed.
    public let format: String?
    public let virtualSize: Int64?
    public let sha256: String?
    /// A part of the expected message, in any case; empty matches any message.
    public let refused: String?
    /// Whether opening the image without `-f` gives the same result; nil means yes.
    public let probe: Bool?

    enum CodingKeys: String, CodingKey {
        case file, made, format, sha256, refused, probe
        case virtualSize = "virtual-size"
    }

    public var description: String { "\(file): \(made)" }

    public static let all: [Fixture] = {
        let manifest = folder.appendingPathComponent("manifest.json")
        guard let data = try? Data(contentsOf: manifest),
            let list = try? JSONDecoder().decode([Fixture].self, from: data)
        else { fatalError("cannot read \(manifest.path)") }
        return list
    }()

    public static let good = all.filter { $0.refused == nil }
    public static let bad = all.filter { $0.refused != nil }

    private static let folder = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
        .appendingPathComponent("Fixtures")

    /// The path of the unpacked fixture.
    public func path() throws -> String {
        try Self.unpacked.get().path(file)
    }

    public static func folderOfImages() throws -> String { try unpacked.get().path }

    /// A copy of `Fixtures/images`, made once, with holes instead of the zeros that git stores.
    private static let unpacked = Result { () throws -> TempFolder in
        let target = try TempFolder()
        removeAtExit(target.path)
        let images = folder.appendingPathComponent("images").path
        for name in try FileManager.default.subpathsOfDirectory(atPath: images).sorted() {
            let source = "\(images)/\(name)"
            if FileStatus(source).map({ $0.mode & S_IFMT == S_IFDIR }) ?? false {
                _ = try target.makeFolder(name)
            } else if name.hasSuffix(".gz") {
                let place = target.path(String(name.dropLast(3)))
                let unpack = "gzip -dc -- \"$1\" | dd of=\"$2\" bs=4096 conv=sparse status=none"
                try require("sh", ["-c", unpack + " iflag=fullblock", "sh", source, place])
            } else {
                try FileManager.default.copyItem(atPath: source, toPath: target.path(name))
            }
        }
        guard mkfifo(target.path("a-fifo"), 0o644) == 0 else {
            throw CommandError(description: "mkfifo: \(String(cString: strerror(errno)))")
        }
        return target
    }
}

/// Removes a path at exit: globals live until then, so `deinit` cannot remove their folders.
public func removeAtExit(_ path: String) {
    ExitCleanup.shared.add(path)
}

private final class ExitCleanup: @unchecked Sendable {
    static let shared = ExitCleanup()
    private let lock = NSLock()
    private var paths: [String] = []

    private init() {
        atexit { ExitCleanup.shared.removeAll() }
    }

    func add(_ path: String) { lock.withLock { paths.append(path) } }

    private func removeAll() {
        for path in lock.withLock({ paths }) { try? FileManager.default.removeItem(atPath: path) }
    }
}
