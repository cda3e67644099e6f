import DiskImage
import ImageStorage

/// Makes LUKS images.
struct LUKSCreator: ImageCreator {
    let canCompress = false

    var options: [OptionDescription] {
        let secret = OptionDescription(
            "key-secret", .text, "ID of the secret that provides the keyslot passphrase")
        let ofFile: [OptionDescription] = [
            .noCopyOnWrite,
            OptionDescription(
                "preallocation", .text, "Preallocation mode (allowed values: off, falloc, full)",
                isOfFile: true),
            .extentSizeHint,
        ]
        return [.size, secret] + OptionDescription.encryption(prefix: "") + ofFile
    }

    func newImage(_ options: TypedOptions) throws(ImageError) -> any NewImage {
        let parameters = try ImageParameters(options) { name throws(ImageError) in
            try Preallocation(option: name)
        }
        return NewLUKSImage(
            parameters: parameters, plan: .new(try LUKSOptions(options, prefix: "")))
    }

    /// Header and keys stay as they are.
    func existingImage(
        _ image: any Image, leavesBacking: Bool
    ) throws(ImageError) -> any WrittenImage {
        guard let image = image as? LUKSImage else {
            throw .unsupported(image.storage.name, "is not a LUKS image")
        }
        return NewLUKSImage(parameters: ImageParameters(), plan: image.plan)
    }

    func measure(
        _ disk: MeasuredDisk, _ options: TypedOptions
    ) throws -> MeasuredSize {
        let size = try LUKSOptions(options, prefix: "").payloadOffset + disk.size
        return MeasuredSize(required: size, fullyAllocated: size)
    }
}

extension OptionDescription {
    /// The options that shape a new LUKS header.
    static func encryption(prefix: String) -> [OptionDescription] {
        [
            OptionDescription(prefix + "cipher-alg", .text, "Name of encryption cipher algorithm"),
            OptionDescription(prefix + "cipher-mode", .text, "Name of encryption cipher mode"),
            OptionDescription(prefix + "ivgen-alg", .text, "Name of IV generator algorithm"),
            OptionDescription(
                prefix + "ivgen-hash-alg", .text, "Name of IV generator hash algorithm"),
            OptionDescription(prefix + "hash-alg", .text, "Name of encryption hash algorithm"),
            OptionDescription(
                prefix + "iter-time", .number, "Time to spend in PBKDF in milliseconds"),
        ]
    }
}

private struct NewLUKSImage: NewImage {
    let parameters: ImageParameters
    let plan: LUKSPlan

    private func target(on storage: any WritableStorage) async throws -> LUKSTarget {
        LUKSTarget(storage: storage, volume: try await plan.makeVolume())
    }

    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) async throws -> any ImageTarget {
        let target = try await target(on: storage)
        try await target.prepare(
            size: size, parameters.preallocation, isThere: settings.isThere)
        if case .new = plan { try await target.clearOldHeader() }
        return target
    }

    /// The payload is left as it is: what the guest reads before it has written is not defined, as
    /// in qemu-img.
    func makeEmpty(on storage: any WritableStorage, size: Int64) async throws {
        let target = try await target(on: storage)
        try await target.prepare(size: size, parameters.preallocation, isThere: false)
        try await target.clearOldHeader()
        try await target.finish(virtualSize: size)
    }
}

/// A LUKS image that is being written. The place of a guest offset is as far behind the header, so
/// pieces are placed in any order. The header comes last.
struct LUKSTarget: ImageTarget {
    /// Unit of writes in bytes, as for raw images.
    private static let unit: Int64 = 4096

    let traits: TargetTraits
    var compresses: Bool { false }
    private let storage: any WritableStorage
    private let volume: LUKSVolume

    init(storage: any WritableStorage, volume: LUKSVolume) {
        self.storage = storage
        self.volume = volume
        // Zeros have to be encrypted and stored like data.
        traits = TargetTraits(
            granularity: max(Self.unit, storage.traits.blockSize), readsAsZeroFrom: .max,
            canWriteZeroes: false, placesInOrder: false)
    }

    /// Makes room for the image.
    ///
    /// - Parameters:
    ///   - size: size of the guest disk in bytes; 0 if it becomes known at the end.
    ///   - isThere: whether the storage keeps its size.
    func prepare(size: Int64, _ preallocation: Preallocation, isThere: Bool) async throws {
        let end = try end(size)
        if isThere {
            guard storage.size >= end else { throw tooSmall(end) }
        } else {
            try await storage.truncate(to: end)
            if preallocation.takesBlocks {
                try storage.requireSpace(end)
                try storage.allocate(0..<end, preallocation)
            }
        }
    }

    /// Clears the first sector of a storage that may hold an old image, whose keys would not fit
    /// what is written now.
    func clearOldHeader() async throws {
        guard !storage.traits.readsAsZero else { return }
        try await storage.writeZeros(0..<min(guestSectorSize, storage.size))
    }

    /// The end of the image in its storage, in bytes.
    private func end(_ size: Int64) throws(ImageError) -> Int64 {
        let rounded = size.roundedUp(to: guestSectorSize)
        guard rounded <= largestDiskSize - volume.length else {
            throw .tooLarge("the image", path: storage.name)
        }
        return volume.length + rounded
    }

    private func tooSmall(_ end: Int64) -> ImageError {
        ImageError(
            .invalid, path: storage.name,
            "is smaller (\(storage.size) bytes) than the image (\(end) bytes)")
    }

    /// All bytes, zeros too; those behind the end of the disk fill its last sector.
    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) -> [EncodedPiece] {
        let count = positions.count.roundedUp(to: Int(guestSectorSize))
        return [
            EncodedPiece(
                guestRange: guestOffset..<guestOffset + Int64(count),
                form: .plain(positions.lowerBound..<positions.lowerBound + count))
        ]
    }

    func place(_ pieces: [EncodedPiece], encoded: RawSpan) -> Placement {
        var placement = Placement()
        for piece in pieces {
            guard case .plain(let positions) = piece.form else {
                preconditionFailure("an encrypted disk holds nothing but data")
            }
            placement.append(
                .plain(positions), at: volume.length + piece.guestRange.lowerBound)
        }
        return placement
    }

    func seal(_ placement: Placement, data: inout MutableRawSpan) throws {
        try volume.cipher.seal(placement, data: &data, from: volume.length)
    }

    func write(_ placement: Placement, data: RawSpan, origin: BufferOrigin) async throws {
        try await storage.writePlacement(placement, data: data)
    }

    func finish(virtualSize: Int64) async throws {
        let end = try end(virtualSize)
        // Made for an open-ended source.
        if storage.size < end {
            guard !storage.traits.isDevice, !storage.traits.isRemote else { throw tooSmall(end) }
            try await storage.truncate(to: end)
        }
        try await storage.flush()
        try await storage.writeBytes(volume.bytes, at: 0)
    }
}

extension DiskCipher {
    /// Encrypts the data that a placement writes, in the chunk's buffer.
    ///
    /// - Parameter start: host offset in bytes from which sectors are counted.
    func seal(
        _ placement: Placement, data: inout MutableRawSpan, from start: Int64
    ) throws(ImageError) {
        for write in placement.writes {
            guard case .plain(let positions) = write.bytes else { continue }
            var part = data.slice(positions)
            try encrypt(&part, at: write.hostOffset - start)
        }
    }
}
