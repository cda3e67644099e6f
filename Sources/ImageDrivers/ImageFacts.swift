import DiskImage
import ImageFormats
import ImageStorage

/// The facts that `info` shows of an image: from its metadata and about its file.
public struct ImageFacts: Sendable {
    /// The name that the image was opened by.
    public let name: ImageName
    /// The name as qemu shows it: NBD exports in one of their forms.
    public let fileName: String
    public let format: ImageFormat
    public let details: FormatFacts
    /// Space that the file takes in its file system, in bytes; nil if the storage cannot tell.
    public let actualSize: Int64?

    /// The backing file's name as this process can open it; nil if it cannot, or without a backing
    /// file.
    public var fullBackingName: String? {
        guard let backing = details.backing?.name else { return nil }
        // qemu leaves names with a protocol unchanged, even with `file:`.
        guard backing.protocolName == nil else { return backing.description }
        let path = HostPath(bytes: backing.bytes)
        guard !path.isAbsolute else { return path.description }
        return Storages.driver(for: name).name(of: path, in: name)?.description
    }
}

extension ImageOpener {
    /// Reads the facts of an image and opens none of the files that it names, unless asked to.
    ///
    /// - Parameters:
    ///   - format: nil detects it.
    ///   - wholeChain: continues with the backing file, its backing file and so on.
    /// - Returns: the facts of the image first; never empty.
    /// - Throws: `ImageError`; also for a backing chain with a loop.
    public func facts(
        _ name: ImageName, format: ImageFormat?, wholeChain: Bool = false
    ) async throws -> [ImageFacts] {
        var images: [ImageFacts] = []
        var chain = ChainMembers()
        var next: BackingReference? = BackingReference(name: name, format: format)
        while let reference = next {
            let storage = try openStorage(reference.name, namedBy: images.last?.name)
            try chain.add(storage, reference.name)
            let image = try await facts(storage, reference)
            images.append(image)
            guard wholeChain, let backing = image.details.backing,
                try ImageDescription(reference.name)?.ignoresBacking != true
            else { break }
            next = try self.reference(to: backing, in: image.name)
        }
        return images
    }

    private func facts(
        _ storage: any Storage, _ reference: BackingReference
    ) async throws -> ImageFacts {
        let described = try ImageDescription(reference.name)
        let format = try await knownFormat(reference.format, of: storage, described: described)
        let name = (described?.place ?? reference.name).withoutFilePrefix
        return ImageFacts(
            name: name, fileName: Storages.driver(for: name).shownName(name), format: format,
            details: try await format.driver.facts(of: storage),
            actualSize: storage.allocatedSize)
    }
}
