/// Offset of the first sector of 512 bytes that is that of neither disk, nil if there is none.
///
/// Stands here because it compares megabytes for each crash that a test plays, and this target is
/// optimized, unlike those of the tests.
public func firstMixedSector(of found: [UInt8], old: [UInt8], new: [UInt8]) -> Int? {
    stride(from: 0, to: found.count, by: 512).first {
        let sector = found[$0..<min($0 + 512, found.count)]
        return sector != old[sector.indices] && sector != new[sector.indices]
    }
}
