import Decompression
import DiskImage
import ImageStorage

/// The manner of reading a source that a person named, if it is read from front to back.
///
/// `-` is standard input. A compressed file (`disk.raw.xz`) is decompressed. A file that is
/// described (`json:`, `--image-opts`) or that an image names is taken as it is.
public struct SourceStreaming: Sendable {
    /// Sees all bytes of the file on their way, which reads any file in one pass; nil leaves alone
    /// what can be read in any order.
    public var observer: (@Sendable (_ stream: any ByteStream) throws -> any ByteStream)?

    public init() {}

    /// - Parameter openStorage: opens a file that can be read in any order.
    /// - Returns: what that returns, if it need not be read in one pass.
    /// - Throws: `ImageError`.
    func open(
        _ name: ImageName, _ openStorage: () throws -> any Storage
    ) async throws -> any Storage {
        if let pipe = try pipe(name) {
            let result = try await storage(
                try observer?(pipe) ?? pipe, name: pipe.name, size: nil, file: pipe.file,
                advice: "write it to a file first")
            // The program that should have written has failed.
            guard result.size > 0 else {
                throw ImageError(.invalid, path: pipe.name, "nothing came through the pipe")
            }
            return result
        }
        let base = try openStorage()
        let isPath = Storages.isPath(name, isTyped: true)
        let path = name.description.prefix { isPath || $0 != "?" && $0 != "#" }
        let compression = try await Compression.of(base, path: String(path))
        guard compression != nil || observer != nil else { return base }
        var stream: any ByteStream = StorageStream(base)
        if let observer { stream = try observer(stream) }
        if let compression { stream = try compression.decompress(stream, name: base.name) }
        return try await storage(
            stream, name: base.name, size: compression == nil ? base.size : nil, file: base.file,
            isRemote: base.traits.isRemote,
            advice: compression.map { "decompress it with \($0.name) first" }
                ?? "check its digest first, and convert it without --source-digest")
    }

    /// The stream of a name that means a pipe; nil for other names.
    private func pipe(_ name: ImageName) throws(ImageError) -> DescriptorStream? {
        if name == "-" { return try DescriptorStream() }
        guard Storages.isPath(name, isTyped: true), let path = try? name.path(),
            DescriptorStream.isFIFO(path)
        else { return nil }
        return try DescriptorStream(fifo: path)
    }

    private func storage(
        _ stream: any ByteStream, name: String, size: Int64?, file: FileIdentity?,
        isRemote: Bool = false, advice: String
    ) async throws -> any Storage {
        let result = StreamStorage(
            stream, name: name, size: size, file: file, isRemote: isRemote, advice: advice)
        // A disk that ends within the first bytes has a size from now on.
        _ = try await result.extent(at: 0, limit: 1)
        return result
    }
}
