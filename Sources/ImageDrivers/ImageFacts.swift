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
    /// The name of the format; that of a storage's driver, if the description names no other.
    public let formatName: String
    public let details: FormatFacts
    /// Space that the file takes in its file system, in bytes; nil if the storage cannot tell.
    public let actualSize: Int64?
    /// The node below the image: a storage, or a part of one; nil if it is a storage itself.
    public let child: NodeFacts?

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

/// The facts about what lies below an image: a part of a storage, or at last the storage.
public struct NodeFacts: Sendable {
    /// The name as qemu shows it.
    public let fileName: String
    /// qemu's name of the driver.
    public let driver: String
    /// Size in bytes, whole sectors.
    public let size: Int64
    /// See `ImageFacts.actualSize`.
    public let actualSize: Int64?
    /// Whether the storage is a file or a device of this machine.
    public let isLocal: Bool
    /// The node below this one; at most one.
    public let children: [NodeFacts]
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
        var next: ImageReference? = ImageReference(name: name, format: format)
        while let reference = next {
            let image = try await reference.name.opening {
                let storage = try await openStorage(reference)
                try chain.add(storage, reference)
                return try await facts(storage, reference)
            }
            images.append(image)
            guard wholeChain else { break }
            next = try backing(image.details.backing, of: image.name, reference)
        }
        return images
    }

    private func facts(
        _ storage: any Storage, _ reference: ImageReference
    ) async throws -> ImageFacts {
        let described = try reference.description()
        let format = try await knownFormat(reference.format, of: storage, described: described)
        let name = described.place(or: reference.name).withoutFilePrefix
        let driver = Storages.driver(for: name)
        var fileName = driver.shownName(name)
        if let described, !described.place.bytes.isEmpty { fileName = described.shownName(format) }
        return ImageFacts(
            name: name, fileName: fileName, format: format,
            formatName: described?.storageAsFormat ?? format.name,
            details: try await format.driver.facts(of: storage),
            actualSize: storage.allocatedSize,
            child: child(of: described, format, storage, name))
    }

    /// - Parameters:
    ///   - storage: holds the image.
    ///   - place: its name.
    private func child(
        of described: ImageDescription?, _ format: ImageFormat, _ storage: any Storage,
        _ place: ImageName
    ) -> NodeFacts? {
        guard described?.storageAsFormat == nil else { return nil }
        let driver = Storages.driver(for: place)
        let size = storage.innermost.size
        let below = described?.driversBelow ?? []
        let drivers = below.isEmpty ? [nil] : below
        var child: NodeFacts?
        for (index, name) in drivers.enumerated().reversed() {
            let isStorage = index == drivers.count - 1
            child = NodeFacts(
                fileName: isStorage
                    ? driver.shownName(place)
                    : described?.shownName(format, level: index + 1) ?? "",
                driver: name ?? driver.names[0],
                size: (isStorage ? size : storage.size).roundedUp(to: guestSectorSize),
                actualSize: storage.allocatedSize,
                isLocal: !storage.traits.isRemote, children: [child].compactMap { $0 })
        }
        return child
    }
}
