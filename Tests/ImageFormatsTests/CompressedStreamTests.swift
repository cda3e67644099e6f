import DiskImage
import MemoryImages
import Testing

@testable import ImageFormats

@Suite struct CompressedStreamTests {
    private static let runSize = Int64(CompressedStream.runSize)

    /// What a file would hold after everything was written, and where the writes were.
    private func written(
        _ pieces: [(offset: Int64, bytes: [UInt8])], clusterSize: Int, blockSize: Int64 = 1
    ) throws -> (file: [UInt8], ranges: [Range<Int64>]) {
        var stream = CompressedStream(clusterSize: Int64(clusterSize), blockSize: blockSize)
        var file: [UInt8] = []
        var ranges: [Range<Int64>] = []
        func write(_ placement: Placement) {
            for write in placement.writes {
                guard case .compressed(let run) = write.bytes else { continue }
                let range = write.hostOffset..<write.hostOffset + Int64(run.count)
                ranges.append(range)
                let missing = Int(range.upperBound) - file.count
                if missing > 0 { file += [UInt8](repeating: 0xee, count: missing) }
                file.replaceSubrange(
                    Int(range.lowerBound)..<Int(range.upperBound),
                    with: run.bytes.withUnsafeBytes { Array($0) })
                stream.reuse(run)
            }
        }
        for piece in pieces {
            var placement = Placement()
            let bytes = piece.bytes.span.bytes
            try stream.append(bytes, at: piece.offset, to: &placement)
            write(placement)
        }
        var placement = Placement()
        stream.close(&placement)
        write(placement)
        return (file, ranges)
    }

    @Test(arguments: [512, 4096, 65536, 2 << 20])
    func everyByteGetsToItsPlace(clusterSize: Int) throws {
        var random = SplitMix(seed: UInt64(clusterSize))
        var pieces: [(offset: Int64, bytes: [UInt8])] = []
        var offset = Int64(5 * clusterSize)
        for _ in 0..<300 {
            let count = Int(random.next() % UInt64(clusterSize - 1)) + 1
            pieces.append(
                (offset, (0..<count).map { _ in UInt8(truncatingIfNeeded: random.next()) | 1 }))
            offset += Int64(count)
            // A plain cluster or a table has come in between.
            if random.next() % 20 == 0 {
                offset = offset.roundedUp(to: Int64(clusterSize)) + Int64(clusterSize)
            }
            if offset > 20 << 20 { break }
        }
        let (file, ranges) = try written(pieces, clusterSize: clusterSize)
        for piece in pieces {
            let isThere = file[Int(piece.offset)...].starts(with: piece.bytes)
            #expect(isThere, "\(piece.bytes.count) bytes at \(piece.offset)")
        }
        let page = Int64(min(clusterSize, 4096))
        for (range, next) in zip(ranges, ranges.dropFirst()) {
            #expect(range.upperBound <= next.lowerBound)
            #expect(range.lowerBound % page == 0 && range.upperBound % page == 0)
            #expect(range.count <= Self.runSize)
            // Where the bytes go on, the run was full.
            #expect(
                range.upperBound < next.lowerBound || range.upperBound % Self.runSize == 0
                    || clusterSize < 4096)
        }
    }

    /// What is behind the last byte is zero, not what the memory held before.
    @Test func theRestOfThePageIsZero() throws {
        let full = [UInt8](repeating: 7, count: Int(Self.runSize))
        let (file, ranges) = try written(
            [(0, full), (Self.runSize, [1, 2, 3])], clusterSize: 65536)
        #expect(ranges == [0..<Self.runSize, Self.runSize..<Self.runSize + 4096])
        let expected: [UInt8] = [1, 2, 3] + [UInt8](repeating: 0, count: 4093)
        #expect(Array(file[Int(Self.runSize)...]) == expected)
    }

    /// A server that prefers long blocks gets runs of whole ones.
    @Test(arguments: [128 << 10, 512 << 10, 32 << 20] as [Int64])
    func runsEndWithTheBlocksOfTheStorage(blockSize: Int64) throws {
        let unit = min(blockSize, 2 << 20)
        let pieces = (0..<8).map {
            (offset: Int64($0) * 700_000, bytes: [UInt8](repeating: UInt8($0 + 1), count: 700_000))
        }
        let (file, ranges) = try written(pieces, clusterSize: 2 << 20, blockSize: blockSize)
        #expect(file.prefix(5_600_000) == pieces.flatMap(\.bytes)[...])
        #expect(ranges.count > 1)
        #expect(ranges.allSatisfy { $0.lowerBound % unit == 0 && $0.upperBound % unit == 0 })
    }

    /// A stream that ends with its page needs no padding.
    @Test func nothingIsWrittenTwice() throws {
        let page = [UInt8](repeating: 1, count: 4096)
        let (_, ranges) = try written(
            [(65536, page), (65536 + 4096, page), (4 * 65536, page)], clusterSize: 65536)
        #expect(ranges == [65536..<73728, 262144..<266240])
    }
}
