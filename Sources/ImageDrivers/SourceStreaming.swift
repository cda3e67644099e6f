import Decompression
import DiskImage
import ImageStorage

/// The manner of reading a file that a person named from front to back.
///
/// A compressed file (`disk.raw.xz`) is decompressed. A file that is described (`json:`,
/// `--image-opts`) or that an image names is taken as it is.
public struct SourceStreaming: Sendable {
    /// Sees all bytes of the file on their way, which reads any file in one pass; nil leaves files
    /// that are not compressed alone.
    public var observer: (@Sendable (_ stream: any ByteStream) throws -> any ByteStream)?

    public init() {}

    /// - Returns: the storage itself if it is not read in one pass.
    /// - Throws: `ImageError`.
    func stream(_ storage: any Storage, _ name: ImageName) async throws -> any Storage {
        let isPath = Storages.isPath(name, isTyped: true)
        let path = name.description.prefix { isPath || $0 != "?" && $0 != "#" }
        let compression = try await Compression.of(storage, path: String(path))
        guard compression != nil || observer != nil else { return storage }
        var stream: any ByteStream = StorageStream(storage)
        if let observer { stream = try observer(stream) }
        if let compression { stream = try compression.decompress(stream, name: storage.name) }
        let result = StreamStorage(
            stream, name: storage.name, size: compression == nil ? storage.size : nil,
            file: storage.file, isRemote: storage.traits.isRemote,
            advice: compression.map { "decompress it with \($0.name) first" }
                ?? "check its digest first, and convert it without --source-digest")
        // A disk that ends within the first bytes has a size from now on.
        _ = try await result.extent(at: 0, limit: 1)
        return result
    }
}
