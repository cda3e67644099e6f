import DiskImage
import ImageStorage

// The facts that `info` shows, with qemu's keys in qemu's order.
extension Qcow2Description {
    /// The image's facts for `info`.
    var facts: FormatFacts {
        var facts = FormatFacts(
            virtualSize: header.geometry.virtualSize.roundedDown(to: guestSectorSize))
        facts.clusterSize = header.geometry.clusterSize
        facts.backing = header.backingFile.map {
            BackingName($0, format: header.backingFormat)
        }
        facts.isDirty = isDirty
        facts.isEncrypted = encryption != nil
        facts.snapshots = snapshots.map(\.facts)
        facts.details = details
        return facts
    }

    private var details: [JSONValue.Member] {
        let isModern = header.version >= 3
        var members: [JSONValue.Member] = [
            .init("compat", .string(isModern ? "1.1" : "0.10")),
            .init("compression-type", .string(header.compression.rawValue)),
        ]
        if isModern {
            members.append(.init("lazy-refcounts", .bool(hasLazyRefcounts)))
            if !bitmaps.isEmpty {
                members.append(.init("bitmaps", .array(bitmaps.map(Self.bitmap))))
            }
        }
        members.append(.init("refcount-bits", .integer(Int64(refcountBits))))
        if let encryption = encryption {
            members.append(.init("encrypt", .object(Self.encryption(encryption))))
        }
        guard isModern else { return members }
        if let file = dataFile { members.append(.init("data-file", .string(file))) }
        if let isRaw = dataFileIsRaw { members.append(.init("data-file-raw", .bool(isRaw))) }
        members.append(.init("corrupt", .bool(isCorrupt)))
        members.append(.init("extended-l2", .bool(header.geometry.hasExtendedL2)))
        return members
    }

    private static func bitmap(_ bitmap: Qcow2Bitmap) -> JSONValue {
        let flags = (bitmap.isInUse ? ["in-use"] : []) + (bitmap.isAuto ? ["auto"] : [])
        return .object([
            .init("flags", .array(flags.map { .string($0) })),
            .init("name", .string(bitmap.name)),
            .init("granularity", .integer(bitmap.granularity)),
        ])
    }

    private static func encryption(
        _ encryption: Encryption
    ) -> [JSONValue.Member] {
        guard case .luks(let luks) = encryption else { return [.init("format", .string("aes"))] }
        var members: [JSONValue.Member] = [
            .init("ivgen-alg", .string(luks.startValue)),
            .init("hash-alg", .string(luks.hash)),
            .init("cipher-alg", .string(luks.cipher)),
            .init("uuid", .string(luks.uuid)),
        ]
        if let hash = luks.startValueHash { members.append(.init("ivgen-hash-alg", .string(hash))) }
        return members + [
            .init("format", .string("luks")),
            .init("cipher-mode", .string(luks.mode)),
            .init("slots", .array(luks.slots.map(slot))),
            .init("payload-offset", .integer(luks.payloadOffset)),
            .init("master-key-iters", .integer(Int64(luks.masterKeyIterations))),
        ]
    }

    private static func slot(_ slot: LUKSHeader.KeySlot) -> JSONValue {
        guard let iterations = slot.iterations else {
            return .object([
                .init("active", .bool(false)), .init("key-offset", .integer(slot.keyOffset)),
            ])
        }
        return .object([
            .init("active", .bool(true)),
            .init("iters", .integer(Int64(iterations))),
            .init("key-offset", .integer(slot.keyOffset)),
            .init("stripes", .integer(Int64(slot.stripes))),
        ])
    }
}
