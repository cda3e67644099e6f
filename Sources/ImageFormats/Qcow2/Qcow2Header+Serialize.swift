import DiskImage

extension Qcow2Header {
    /// Returns the first cluster up to its last meaningful byte, with all parts that a parsed
    /// header had.
    ///
    /// - Throws: `ImageError` if the names do not fit into a cluster.
    func serialized() throws(ImageError) -> [UInt8] {
        var bytes: [UInt8] = []
        let names = backingFile?.bytes ?? []
        let extensions = serializedExtensions()
        let length =
            version == 2 ? Self.version2Length : Self.extendedLength + otherFields.count
        let namesOffset = names.isEmpty ? 0 : length + extensions.count
        guard names.count <= Self.maximumBackingNameLength,
            length + extensions.count + names.count <= Int(geometry.clusterSize)
        else {
            throw .invalid(
                names.isEmpty
                    ? "the data file name is too long" : "the backing file name is too long")
        }

        bytes.appendBigEndian(Self.magic)
        bytes.appendBigEndian(UInt32(version))
        bytes.appendBigEndian(UInt64(namesOffset))
        bytes.appendBigEndian(UInt32(names.count))
        bytes.appendBigEndian(UInt32(geometry.clusterBits))
        bytes += changeableFields
        if version >= 3 {
            bytes.appendBigEndian(UInt32(refcountBits.trailingZeroBitCount))
            bytes.appendBigEndian(UInt32(length))
            bytes.append(compression.headerNumber)
            bytes.appendZeros(upTo: Self.extendedLength)
            bytes += otherFields
        }
        return bytes + extensions + names
    }

    /// From the size of the disk to the autoclear bits: what a change in place may touch. All of it
    /// lies within a sector.
    var changeableFields: [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(UInt64(geometry.virtualSize))
        bytes.appendBigEndian(encryptionMethod)
        bytes.appendBigEndian(UInt32(l1Entries))
        bytes.appendBigEndian(UInt64(l1Offset.bytes))
        bytes.appendBigEndian(UInt64(refcountTableOffset.bytes))
        bytes.appendBigEndian(UInt32(refcountTableClusters))
        bytes.appendBigEndian(snapshotCount)
        bytes.appendBigEndian(snapshotTableOffset)
        guard version >= 3 else { return bytes }
        bytes.appendBigEndian(
            incompatibleFeatures
                | (compression == .zlib ? 0 : IncompatibleFeature.compressionType)
                | (geometry.hasExtendedL2 ? IncompatibleFeature.extendedL2 : 0))
        bytes.appendBigEndian(compatibleFeatures)
        bytes.appendBigEndian(autoclearFeatures)
        return bytes
    }

    private func serializedExtensions() -> [UInt8] {
        var all: [(type: UInt32, content: [UInt8]?)] = [
            (ExtensionType.backingFormat, backingFormat.map { Array($0.utf8) }),
            (ExtensionType.dataFile, dataFile?.bytes),
            (ExtensionType.encryption, encryptionHeader?.serialized()),
            (ExtensionType.bitmaps, bitmapExtension?.content),
        ]
        all += otherExtensions.map { ($0.type, $0.content) }
        var bytes: [UInt8] = []
        for case (let type, let content?) in all {
            bytes.appendBigEndian(type)
            bytes.appendBigEndian(UInt32(content.count))
            bytes += content
            bytes.appendZeros(upTo: bytes.count.roundedUp(to: 8))
        }
        bytes.appendBigEndian(ExtensionType.end)
        bytes.appendBigEndian(UInt32(0))
        return bytes
    }
}

extension Qcow2Header.TableRange {
    fileprivate func serialized() -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(offset)
        bytes.appendBigEndian(length)
        return bytes
    }
}
