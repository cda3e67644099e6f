import DiskImage

extension Qcow2Header {
    /// The header cluster of a fresh image up to the last byte that means something.
    ///
    /// - Throws: `ImageError` if the names do not fit into a cluster.
    func serialized() throws(ImageError) -> [UInt8] {
        var bytes: [UInt8] = []
        let names = backingFile?.bytes ?? []
        let extensions = serializedExtensions()
        let length = version == 2 ? Self.version2Length : Self.extendedLength
        let namesOffset = names.isEmpty ? 0 : length + extensions.count
        guard names.count <= Self.maximumBackingNameLength,
            length + extensions.count + names.count <= Int(geometry.clusterSize)
        else { throw .invalid("the backing file name is too long") }

        bytes.appendBigEndian(Self.magic)
        bytes.appendBigEndian(UInt32(version))
        bytes.appendBigEndian(UInt64(namesOffset))
        bytes.appendBigEndian(UInt32(names.count))
        bytes.appendBigEndian(UInt32(geometry.clusterBits))
        bytes.appendBigEndian(UInt64(geometry.virtualSize))
        bytes.appendBigEndian(UInt32(0))  // encryption: none
        bytes.appendBigEndian(UInt32(l1Entries))
        bytes.appendBigEndian(UInt64(l1Offset.bytes))
        bytes.appendBigEndian(UInt64(refcountTableOffset.bytes))
        bytes.appendBigEndian(UInt32(refcountTableClusters))
        bytes.appendBigEndian(UInt32(0))  // snapshots
        bytes.appendBigEndian(UInt64(0))  // snapshot table
        if version >= 3 {
            bytes.appendBigEndian(
                (compression == .zlib ? 0 : IncompatibleFeature.compressionType)
                    | (geometry.hasExtendedL2 ? IncompatibleFeature.extendedL2 : 0))
            bytes.appendBigEndian(extras.compatibleFeatures)
            bytes.appendBigEndian(UInt64(0))  // autoclear features
            bytes.appendBigEndian(UInt32(extras.refcountBits.trailingZeroBitCount))
            bytes.appendBigEndian(UInt32(length))
            bytes.append(compression.headerNumber)
            bytes.append(contentsOf: repeatElement(0, count: length - bytes.count))
        }
        return bytes + extensions + names
    }

    private func serializedExtensions() -> [UInt8] {
        var bytes: [UInt8] = []
        if let backingFormat {
            let name = Array(backingFormat.utf8)
            bytes.appendBigEndian(ExtensionType.backingFormat)
            bytes.appendBigEndian(UInt32(name.count))
            bytes += name
            bytes.append(
                contentsOf: repeatElement(0, count: name.count.roundedUp(to: 8) - name.count))
        }
        bytes.appendBigEndian(ExtensionType.end)
        bytes.appendBigEndian(UInt32(0))
        return bytes
    }
}
