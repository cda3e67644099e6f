import DiskImage
import ImageFormats
import ImageStorage

/// An image's facts: those in its metadata, and those of its file.
public struct ImageFacts: Sendable {
    /// The name by which it was opened.
    public let name: ImageName
    /// The name as qemu shows it: NBD exports in one of their forms.
    public let fileName: String
    public let format: ImageFormat
    public let details: FormatFacts
    /// Space that the file takes in its file system, in bytes; nil where nothing tells.
    public let actualSize: Int64?

    /// The backing file as it can be opened from here; nil if it cannot, or there is none.
    public var fullBackingName: String? {
        guard let backing = details.backing?.name else { return nil }
        // qemu shows the name of a protocol as it is, `file:` too.
        guard backing.protocolName == nil else { return backing.description }
        let path = HostPath(bytes: backing.bytes)
        guard !path.isAbsolute else { return path.description }
        return Storages.driver(for: name).name(of: path, in: name)?.description
    }
}

extension ImageOpener {
    /// Looks at an image without opening what it lies on, nor any other file that it names.
    ///
    /// - Parameters:
    ///   - format: nil looks at the first bytes.
    ///   - wholeChain: go on with the backing file, and with that one's, to the end.
    /// - Returns: the image first; never empty.
    /// - Throws: `ImageError`; also for a chain that leads back into itself.
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
