import DiskImage
import ImageStorage

extension Qcow2Source {
    /// Whether clusters were allocated ahead of their data (`preallocation=metadata`), as far as qemu can tell: the
    /// refcounts know of at least a ninth more clusters than the file takes space for.
    ///
    /// qemu asks the file system about holes in allocated clusters of such images only.
    func hasPreallocatedMetadata() async throws -> Bool {
        guard storage.traits.hasHoles, let allocated = (storage as? FileStorage)?.allocatedSize
        else { return false }
        let clusterSize = header.geometry.clusterSize
        let real = allocated / clusterSize
        let threshold = max(real * 10 / 9, real + 2)
        guard threshold <= storage.size.dividedUp(by: clusterSize) else { return false }
        do {
            return try await countedClusters(upTo: threshold) >= threshold
        } catch is ImageError {
            // Refcounts that cannot be read are no reason not to read the disk.
            return false
        }
    }

    /// What qemu accepts: a refcount table of 8 MiB.
    private static var maximumRefcountTable: Int64 { 8 << 20 }

    /// How many clusters of the file have a refcount; counting ends at `limit`.
    private func countedClusters(upTo limit: Int64) async throws -> Int64 {
        let clusterSize = header.geometry.clusterSize
        let bits = Int64(header.extras.refcountBits)
        let clustersPerBlock = clusterSize * 8 / bits
        let blocks = storage.size.dividedUp(by: clusterSize).dividedUp(by: clustersPerBlock)
        let tableSize = min(
            header.refcountTableClusters * clusterSize, Self.maximumRefcountTable, blocks * 8)
        var table = IOBuffer(byteCount: Int(min(tableSize, 64 << 10)))
        var block = IOBuffer(byteCount: Int(clusterSize))
        var count: Int64 = 0
        for index in 0..<tableSize / 8 {
            let place = Int(index * 8) % table.byteCount
            if place == 0 {
                let rest = min(Int64(table.byteCount), tableSize - index * 8)
                var all = table.mutableBytes
                var part = all.slice(0..<Int(rest))
                try await storage.read(
                    into: &part, at: header.refcountTableOffset.bytes + index * 8)
            }
            let entry = table.bytes.bigEndian(at: place, as: UInt64.self)
            let offset = Int64(entry & Qcow2Entry.offsetMask)
            guard offset != 0 else { continue }
            var span = block.mutableBytes
            try await storage.read(into: &span, at: offset)
            count += Self.countNonzero(block.bytes, bits: Int(bits))
            if count >= limit { break }
        }
        return count
    }

    /// How many numbers of this width in bits are not zero.
    private static func countNonzero(_ bytes: RawSpan, bits: Int) -> Int64 {
        var count: Int64 = 0
        if bits >= 8 {
            for start in stride(from: 0, to: bytes.byteCount, by: bits / 8)
            where !ZeroScan.isZero(bytes, start..<start + bits / 8) { count += 1 }
            return count
        }
        let mask = UInt8(1 << bits) - 1
        for position in 0..<bytes.byteCount {
            let byte = bytes.unsafeLoad(fromByteOffset: position, as: UInt8.self)
            guard byte != 0 else { continue }
            for shift in stride(from: 0, to: 8, by: bits) where byte >> shift & mask != 0 {
                count += 1
            }
        }
        return count
    }
}
