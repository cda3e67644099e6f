import DiskImage
import Glibc
import ImageFormats

/// One `swimg snapshot` that takes, applies or deletes an internal snapshot.
public struct ImageSnapshots: Sendable {
    public enum Change: Sendable, Equatable {
        /// Takes a snapshot; names are bytes and need not differ.
        case create([UInt8])
        case apply([UInt8])
        case delete([UInt8])
    }

    public var image: ImageInPlace
    public var change: Change

    public init(_ image: ImageInPlace, _ change: Change) {
        self.image = image
        self.change = change
    }

    /// - Throws: `ImageError` in qemu-img's words where qemu-img refuses as well. The image is
    ///   valid in any case.
    public func run() async throws {
        let (storage, format) = try await image.open()
        let editor = format.driver.snapshotEditor
        switch change {
        case .create(let name):
            try await describing("create", name) {
                guard let editor else { throw ImageError(.system(errno: ENOTSUP), "") }
                try await editor.create(name, in: storage)
            }
        case .apply(let name):
            try await describing("apply", name) {
                guard let editor else {
                    throw ImageError.invalid("Block driver does not support snapshots")
                }
                try await editor.apply(.either(name), in: storage)
            }
        case .delete(let name):
            try await describing("delete", name) {
                guard let editor else { throw ImageError.invalid("snapshot not found") }
                try await editor.delete(.either(name), in: storage)
            }
        }
    }

    /// Adds to an error what was to be done.
    private func describing(
        _ verb: String, _ name: [UInt8], _ body: () async throws -> Void
    ) async throws {
        do {
            try await body()
        } catch let error as ImageError {
            var message = error.message
            if case .system(let code) = error.kind, message.isEmpty {
                message = "-\(code) (\(String(cString: strerror(code))))"
            }
            throw ImageError(
                error.kind, path: error.path,
                "Could not \(verb) snapshot '\(name.text)': \(message)")
        }
    }
}
