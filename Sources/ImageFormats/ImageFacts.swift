import DiskImage
import ImageStorage
import NBDStorage

/// What one image says of itself, and what its file says of it.
public struct ImageFacts: Sendable {
    /// The name by which it was opened.
    public let name: ImageName
    /// As qemu names it: NBD exports in one of their forms.
    public let fileName: String
    public let format: ImageFormat
    /// In bytes, a multiple of the sector size.
    public let virtualSize: Int64
    /// How much of its file system the file takes, in bytes; nil where nobody can tell.
    public let actualSize: Int64?
    /// What the format adds; nil for raw.
    public let qcow2: Qcow2Description?
    /// Whether the bytes are elsewhere, behind a server.
    public let isRemote: Bool

    /// The backing file as it can be opened from here; nil if it cannot, or there is none.
    public var fullBackingName: String? {
        guard let backing = qcow2?.header.backingFile else { return nil }
        // qemu shows the name of a protocol as it is, `file:` too.
        guard backing.protocolName == nil else { return backing.description }
        let path = HostPath(bytes: backing.bytes)
        guard !path.isAbsolute else { return path.description }
        guard !isRemote, let overlay = try? name.path() else { return nil }
        return overlay.resolving(path).description
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
            guard wholeChain, let header = image.qcow2?.header,
                try ImageDescription(reference.name)?.ignoresBacking != true
            else { break }
            next = try backing(of: header, at: image.name)
        }
        return images
    }

    private func facts(
        _ storage: any Storage, _ reference: BackingReference
    ) async throws -> ImageFacts {
        let described = try ImageDescription(reference.name)
        let format = try await knownFormat(reference.format, of: storage, described: described)
        let name = (described?.place ?? reference.name).withoutFilePrefix
        let description =
            format == .qcow2 ? try await Qcow2Description.read(from: storage) : nil
        return ImageFacts(
            name: name, fileName: NBDAddress.qemuName(name), format: format,
            virtualSize: description?.header.geometry.virtualSize
                .roundedDown(to: guestSectorSize) ?? storage.size.roundedUp(to: guestSectorSize),
            actualSize: (storage as? FileStorage)?.allocatedSize, qcow2: description,
            isRemote: !(storage is FileStorage))
    }
}
